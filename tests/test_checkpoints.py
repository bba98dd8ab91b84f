"""Laws of guided_diffusion/checkpoints.py: names, whole files, clear refusals."""

import json
import os

import pytest
import torch
from torch import nn

from guided_diffusion import checkpoints, config


def test_names_are_the_published_ones():
    """Six digits, more where needed, and the rate as it was given."""
    assert checkpoints.model_name(10) == "model000010.pt"
    assert checkpoints.model_name(1234567) == "model1234567.pt"
    assert checkpoints.ema_name(0.9999, 10) == checkpoints.ema_name("0.9999", 10)
    assert checkpoints.ema_name(0.9999, 10) == "ema_0.9999_000010.pt"
    assert checkpoints.opt_name(10) == "opt000010.pt"


@pytest.mark.parametrize(
    "path, step",
    [
        ("model000010.pt", 10),
        ("/models/model/model1234567.pt", 1234567),
        ("gs://bucket/model000003.pt", 3),
        ("64x64_diffusion.pt", 0),
        ("/model000010/other.pt", 0),
        ("ema_0.9999_000010.pt", 0),
        ("model.pt", 0),
        ("", 0),
    ],
)
def test_the_step_is_read_from_the_file_name(path, step):
    """The step is that of modelNNNNNN.pt; folders do not count, other names mean 0."""
    assert checkpoints.step_of(path) == step


def test_local_and_remote_paths_are_joined():
    """A bucket's address keeps its slashes on every system."""
    assert checkpoints.join("gs://bucket/run/", "a.pt") == "gs://bucket/run/a.pt"
    assert checkpoints.join("run", "a.pt") == os.path.join("run", "a.pt")
    assert checkpoints.join("", "a.pt") == "a.pt"


def test_flags_survive_their_file(tmp_path):
    """What save_flags wrote beside X.pt, as X.json, load_flags reads."""
    path = str(tmp_path / "ema_0.9999_000010.pt")
    flags = config.defaults(*config.DIFFUSION_GROUPS)
    checkpoints.save_flags(path, flags)
    assert checkpoints.flags_path(path) == str(tmp_path / "ema_0.9999_000010.json")
    assert checkpoints.load_flags(path) == flags
    assert [p.name for p in tmp_path.iterdir()] == ["ema_0.9999_000010.json"]


def test_no_flags_file_means_no_flags(tmp_path):
    """Weights from elsewhere have no flags file."""
    assert checkpoints.load_flags(str(tmp_path / "a.pt")) == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": 1} x', b"\xff\xfe"])
def test_a_broken_flags_file_is_an_error(text, tmp_path):
    """The error names the flags file and the way out."""
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match="a.json.*JSON.*remove"):
        checkpoints.load_flags(str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    "groups, kind",
    [
        (config.DIFFUSION_GROUPS, "diffusion model"),
        (config.SUPER_RES_GROUPS, "upsampler"),
        (config.CLASSIFIER_GROUPS, "classifier"),
    ],
)
def test_flags_tell_what_they_describe(groups, kind):
    """Each kind of network has a flag that no other has."""
    assert checkpoints.kind_of(config.defaults(*groups)) == kind


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """Whoever reads the path sees the old file or the new one, whole."""
    path = str(tmp_path / "a.pt")

    def write(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_file(path, write)
    assert not list(tmp_path.iterdir())
    checkpoints.write_file(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write_file(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert checkpoints.read_file(path) == b"old"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_cannot_be_written_is_told_without_a_flag(tmp_path, what):
    """What one program calls --log_dir is --out, --json or --target of another."""
    (tmp_path / "a").touch()
    path = str(tmp_path / "a" / "b")
    with pytest.raises((OSError, ValueError)) as error:
        if what == "file":
            checkpoints.write_bytes(path, b"")
        else:
            checkpoints.make_folder(path)
    line = str(error.value)
    assert path in line and "Not a directory" in line and "choose another" in line
    assert "--" not in line and "$" not in line


def test_an_unpicklable_state_leaves_nothing(tmp_path):
    """torch.save fails in the middle of a file; the file is not there then."""
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        checkpoints.save(str(tmp_path / "a.pt"), {"a": torch.ones(3), "b": lambda: 0})
    assert not list(tmp_path.iterdir())


def test_saved_weights_are_loaded(tmp_path):
    """load_weights brings back what save wrote, whatever torch.load without code can read."""
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoints.save(str(tmp_path / "a.pt"), one.state_dict())
    checkpoints.load_weights(other, str(tmp_path / "a.pt"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "state, words",
    [
        ({"weight": torch.ones(2, 3)}, "no bias"),
        ({"weight": torch.ones(2, 4), "bias": torch.ones(2)}, "weight [2, 4] [2, 3]"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": torch.ones(1)}, "also x"),
        ({"state": {}, "param_groups": []}, "no weights modelNNNNNN.pt"),
        ([torch.ones(1)], "no weights"),
        (torch.ones(1), "no weights"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(state, words, tmp_path):
    """The error names the file and the first difference, and the network is untouched."""
    torch.save(state, tmp_path / "a.pt")
    model = nn.Linear(3, 2)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        checkpoints.load_weights(model, str(tmp_path / "a.pt"), " (a hint)")
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(" (a hint)") == ("no weights" not in message)
    assert all(word in message for word in ["a.pt", *words.split()]), message
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04half", json.dumps({}).encode()])
def test_what_is_no_checkpoint_is_one_line(content, tmp_path):
    """A file that torch did not write is refused by name."""
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="a.pt") as error:
        checkpoints.load_weights(nn.Linear(3, 2), str(tmp_path / "a.pt"))
    assert "\n" not in str(error.value)
