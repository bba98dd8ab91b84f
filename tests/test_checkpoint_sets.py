"""Sets of checkpoint files: which is complete, which is the newest, which are deleted."""

import errno
import json
import os
import shutil

import pytest
import torch

from guided_diffusion import checkpoint_sets, checkpoints
from guided_diffusion.checkpoint_sets import SetWriter, find_newest, prune, resolve_resume

NAMES = ("model{}.pt", "ema_0.9_{}.pt", "opt{}.pt", "state{}.pt", "model{}.json", "ema_0.9_{}.json")


def write_set(folder, step, value=0.0, flags=None):
    """Write a small set as the loop does; return the path of its weights."""
    with SetWriter(str(folder), step, {"image_size": 8} if flags is None else flags) as writer:
        writer.weights(checkpoints.model_name(step), {"w": torch.full((3,), value)})
        writer.weights(checkpoints.ema_name(0.9, step), {"w": torch.full((3,), value)})
        writer.save(checkpoints.opt_name(step), {"state": {}, "param_groups": []})
        writer.complete({"step": step})
    return str(folder / checkpoints.model_name(step))


def write_published(folder, step, with_opt=True):
    """Write what the published code leaves: no flags, no state."""
    torch.save({"w": torch.zeros(3)}, folder / f"model{step:06d}.pt")
    if with_opt:
        torch.save({}, folder / f"opt{step:06d}.pt")
    return str(folder / f"model{step:06d}.pt")


def names_of(step):
    return {name.format(f"{step:06d}") for name in NAMES}


def test_a_set_is_found_by_its_state(tmp_path):
    """The newest complete set counts; a set holds weights, flags, optimizer and state."""
    assert find_newest(str(tmp_path)) is None and find_newest(str(tmp_path / "none")) is None
    for step in (2, 10, 9):
        path = write_set(tmp_path, step)
        assert names_of(step) <= {p.name for p in tmp_path.iterdir()}
    assert find_newest(str(tmp_path)) == path.replace("000009", "000010")


DAMAGES = [(name, damage) for name in NAMES[:4] for damage in ("gone", "short")]


@pytest.mark.parametrize("name, damage", sorted({*DAMAGES} - {("state{}.pt", "gone")}))
def test_a_damaged_set_is_passed_over(tmp_path, name, damage):
    """Without one of its files, or with one cut short, a set is none, and the one before counts."""
    before = write_set(tmp_path, 1)
    write_set(tmp_path, 2)
    path = tmp_path / name.format("000002")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert find_newest(str(tmp_path)) == before


class Killed(BaseException):
    """Stands for a kill: nothing is tidied up after it."""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Killed])
@pytest.mark.parametrize("written", range(6))
def test_a_save_that_breaks_off_completes_nothing(tmp_path, monkeypatch, written, kind):
    """After any number of its files, replacing a set of the same number included."""
    before = write_set(tmp_path, 1)
    write_set(tmp_path, 2, value=0.0)
    replace, remove, replaced, ended = os.replace, os.remove, [], []

    def break_off(source, target):
        if len(replaced) == written:
            ended.append(kind)
            raise kind
        replaced.append(target)
        replace(source, target)

    def remove_unless_killed(path):
        if Killed not in ended:
            remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", break_off)
        patch.setattr(os, "remove", remove_unless_killed)
        with pytest.raises(kind):
            write_set(tmp_path, 2, value=1.0)
    assert find_newest(str(tmp_path)) == before
    if kind is KeyboardInterrupt:
        assert not list(tmp_path.glob("*.tmp*")) and not list(tmp_path.glob("*000002*"))
    write_set(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp*")) and not list(tmp_path.glob("*000002*"))


def test_sets_without_a_state_count(tmp_path):
    """Those of the published code, and of an early version of this one, which wrote flags."""
    write_published(tmp_path, 5, with_opt=False)
    path = write_published(tmp_path, 3)
    assert find_newest(str(tmp_path)) == path
    early = write_set(tmp_path, 9)
    (tmp_path / "state000009.pt").unlink()
    assert find_newest(str(tmp_path)) == early
    write_set(tmp_path, 10)
    assert prune(str(tmp_path), 1, newest=10) == []
    assert {"model000003.pt", "model000009.pt"} <= {path.name for path in tmp_path.iterdir()}


def test_an_error_takes_its_files_back(tmp_path):
    """What a failed save has written goes, so that a full disk has room again."""
    before = write_set(tmp_path, 1)
    names = {path.name for path in tmp_path.iterdir()}
    writer = SetWriter(str(tmp_path), 2, {"image_size": 8})
    with pytest.raises(KeyError), writer:
        writer.weights("model000002.pt", {"w": torch.zeros(3)})
        assert find_newest(str(tmp_path)) == before
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_state_can_be_replaced(tmp_path):
    """What is learnt after a save can be added to it: the set is whole before, and after."""
    writer = SetWriter(str(tmp_path), 2, {})
    writer.weights("model000002.pt", {"w": torch.zeros(3)})
    writer.complete({"step": 2, "more": 0})
    writer.complete({"step": 2, "more": 1})
    newest = find_newest(str(tmp_path))
    assert checkpoint_sets.read_state(newest)["more"] == 1


def test_what_resume_checkpoint_accepts(tmp_path, monkeypatch):
    """A file, a folder, auto and nothing."""
    monkeypatch.delenv("DIFFUSION_BLOB_LOGDIR", raising=False)
    path, folder = write_set(tmp_path, 3), str(tmp_path)
    assert resolve_resume("", folder) == ""
    assert resolve_resume(path, "") == resolve_resume(folder, "") == path
    assert resolve_resume("auto", folder) == path
    assert resolve_resume("auto", str(tmp_path / "new")) == ""
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", folder)
    assert resolve_resume("auto", str(tmp_path / "new")) == path


@pytest.mark.parametrize(
    "asked, words",
    [
        ("auto", "auto --log_dir"),
        ("PLACE/none", "PLACE/none neither file folder"),
        ("PLACE/empty", "PLACE/empty complete set"),
        ("PLACE/opt000003.pt", "opt000003.pt no weights model000003.pt"),
        ("PLACE/state000003.pt", "state000003.pt no weights model000003.pt"),
    ],
)
def test_what_resume_checkpoint_refuses(tmp_path, monkeypatch, asked, words):
    """Each in one line with the remedy."""
    monkeypatch.delenv("DIFFUSION_BLOB_LOGDIR", raising=False)
    (tmp_path / "empty").mkdir()
    write_set(tmp_path, 3)
    with pytest.raises(ValueError) as caught:
        resolve_resume(asked.replace("PLACE", str(tmp_path)), "")
    message = str(caught.value)
    assert "\n" not in message
    assert all(w in message for w in words.replace("PLACE", str(tmp_path)).split())


@pytest.mark.parametrize("content, word", [({}, "no training state"), ({"files": {}}, "format")])
def test_a_strange_state_is_refused(tmp_path, content, word):
    """A later format, or something else of that name, is one line, and not taken for complete."""
    path = write_set(tmp_path, 3)
    torch.save(content, tmp_path / "state000003.pt")
    with pytest.raises(ValueError, match=word):
        checkpoint_sets.read_state(path)
    assert find_newest(str(tmp_path)) is None


def test_an_average_has_no_state(tmp_path):
    """Only modelNNNNNN.pt goes on where its set stopped."""
    path = write_set(tmp_path, 3)
    assert checkpoint_sets.read_state(path)["step"] == 3
    assert checkpoint_sets.read_state(path.replace("model", "ema_0.9_")) is None
    assert checkpoint_sets.read_state(path.replace("model", "my_model")) is None


def test_old_sets_are_deleted(tmp_path):
    """The newest K up to the present one stay; published sets, later ones and other files, too."""
    for step in (1, 2, 3, 4, 9):
        write_set(tmp_path, step)
    write_published(tmp_path, 0)
    (tmp_path / "classes.txt").touch()
    assert prune(str(tmp_path), 2, newest=4) == [2, 1]
    names = {path.name for path in tmp_path.iterdir()}
    kept = {"model000000.pt", "opt000000.pt", "classes.txt"}
    assert names == names_of(3) | names_of(4) | names_of(9) | kept
    assert prune(str(tmp_path), 2, newest=4) == []


def test_a_folder_is_one_runs_own(tmp_path, monkeypatch):
    """A second run in the same folder is refused, until the first has ended."""
    monkeypatch.setattr(checkpoint_sets, "PATIENCE", 0.3)
    folder, other = str(tmp_path / "run"), str(tmp_path / "other")
    with checkpoint_sets.reserved(folder), checkpoint_sets.reserved(other):
        second = checkpoint_sets.reserved(folder)
        with pytest.raises(ValueError, match="in use by another run.*--log_dir"):
            second.__enter__()
    with checkpoint_sets.reserved(folder):
        assert os.listdir(folder) == []


def test_only_our_leftovers_are_removed(tmp_path):
    """Temporary files of a killed save go; nothing else does."""
    ours = ["model000001.pt.tmp12", "ema_0.9999_000001.json.tmp3", "classes.csv.tmp4"]
    ours += ["state000002.pt.tmp4", "model000002.pt"]  # of a set that was cut short
    others = ["model000001.pt", "notes.tmp", "my_model.pt.tmp1x", "opt000001.pt.tmp"]
    for name in ours + others:
        (tmp_path / name).touch()
    checkpoint_sets.remove_leftovers(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


class FullDisk:
    """A file that takes a few bytes and then says that the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 1500])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, room):
    """It names the file; the sets before it stay, and nothing half-written is left."""
    before = write_set(tmp_path, 1)
    write = checkpoints._write_local

    def write_on_full_disk(path, fill, durable):
        write(path, lambda file: fill(FullDisk(file, room)), durable)

    monkeypatch.setattr(checkpoints, "_write_local", write_on_full_disk)
    with pytest.raises(OSError) as caught:
        write_set(tmp_path, 2)
    assert "000002" in str(caught.value) and "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert find_newest(str(tmp_path)) == before
    assert not list(tmp_path.glob("*.tmp*")) and not list(tmp_path.glob("*000002*"))


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    """A folder that is gone, for example."""
    writer = SetWriter(str(tmp_path / "run"), 1, {})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match=r"model000001\.pt cannot be written \(No such file"):
        writer.weights("model000001.pt", {"w": torch.zeros(1)})


def test_flags_stand_beside_the_weights_alone(tmp_path):
    """Not beside optimizer and state, and not at all if there are none."""
    write_set(tmp_path, 1)
    write_set(tmp_path / "bare", 1, flags={})
    assert json.loads((tmp_path / "model000001.json").read_text()) == {"image_size": 8}
    assert not (tmp_path / "opt000001.json").exists()
    assert not list((tmp_path / "bare").glob("*.json"))
