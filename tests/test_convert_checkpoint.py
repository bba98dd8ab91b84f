"""Checkpoints as .safetensors: the same names, order, types and values, and nothing ever run."""

import contextlib
import io
import json
import struct
import sys

import numpy as np
import pytest
import torch
from scripting import SMALL, Done, files_below, load_script, succeed

from guided_diffusion import checkpoints, config, dist_util, script_util, weight_files

DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"]
PAIRS = [(".pt", ".safetensors"), (".safetensors", ".pt"), (".pt", ".pt")]


@pytest.fixture
def state():
    """Tensors of all types in an order that is neither the alphabet's nor that of their sizes."""
    names = [f"{'zyxa'[i % 4]}.{i}" for i in range(len(DTYPES))]
    state = {n: torch.arange(6 + i).to(getattr(torch, DTYPES[i])) for i, n in enumerate(names)}
    return state | {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "b": torch.ones(2, 3)}


def convert(*words):
    """Run the script with a command line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [str(word) for word in words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            config.run(lambda: load_script("convert_checkpoint").main(argv))
        except SystemExit as end:
            code = end.code
    return Done(code, out.getvalue(), err.getvalue())


def check_failure(done, *words):
    """Assert that a run ended in one line that holds these words."""
    assert done.code == 1 and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err


def same(one, other):
    """Tell whether two state dicts are equal in names, order, types and values."""
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("source, target", PAIRS)
def test_everything_stays(source, target, state, tmp_path):
    """Names, order, types and values survive each way; the paths and the number are printed."""
    checkpoints.save(str(tmp_path / f"model{source}"), state)
    done = convert(tmp_path / f"model{source}", tmp_path / f"sub/other{target}")
    assert done.code == 0, done.err
    path = tmp_path / f"sub/other{target}"
    assert same(dist_util.load_state_dict(path), state)
    assert f"read {tmp_path}/model{source}: {len(state)} tensors\n" in done.out
    assert f"wrote {path}: {path.stat().st_size:,} bytes\n" in done.out
    assert files_below(tmp_path / "sub") == {path.name}


def test_an_old_file_is_renewed(state, tmp_path):
    """What torch wrote before 1.6 becomes a zip that can be mapped into memory."""
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(dist_util.load_state_dict(tmp_path / "old.pt", mmap=True), state)
    assert convert(tmp_path / "old.pt", tmp_path / "new.pt").code == 0
    assert same(torch.load(tmp_path / "new.pt", mmap=True, weights_only=True), state)


def test_shared_and_strided_tensors_are_written_whole(tmp_path):
    """The format knows no tensor that lies in another: each gets its own bytes."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base, "c": base.T, "d": base[1:]}
    checkpoints.save(str(tmp_path / "x.safetensors"), state)
    assert same(dist_util.load_state_dict(tmp_path / "x.safetensors"), state)


def test_flags_and_classes_go_along(state, tmp_path):
    """The flags file gets the target's name; classes.txt stays what it was where there is one."""
    (tmp_path / "a").mkdir()
    checkpoints.save(str(tmp_path / "a/x.pt"), state)
    checkpoints.save_flags(str(tmp_path / "a/x.pt"), SMALL)
    (tmp_path / "a" / "classes.txt").write_text("cat\ndog\n")
    for name in ("y", "z"):
        assert convert(tmp_path / "a/x.pt", tmp_path / f"b/{name}.safetensors").code == 0
        assert checkpoints.load_flags(str(tmp_path / f"b/{name}.safetensors")) == SMALL
        text = (tmp_path / "b" / "classes.txt").read_text()
        assert text == ("cat\ndog\n" if name == "y" else "cow\n")
        (tmp_path / "b" / "classes.txt").write_text("cow\n")
    assert convert(tmp_path / "a/x.pt", tmp_path / "a/x.safetensors").code == 0
    assert files_below(tmp_path / "a") == {"x.pt", "x.json", "x.safetensors", "classes.txt"}


def test_nothing_is_overwritten(state, tmp_path):
    """Neither the target nor the flags of another checkpoint of that name."""
    checkpoints.save(str(tmp_path / "x.pt"), state)
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "flags.json").write_text("{}")
    before = files_below(tmp_path)
    check_failure(convert(tmp_path / "x.pt", tmp_path / "there.pt"), "there.pt exists", "--target")
    check_failure(convert(tmp_path / "x.pt", tmp_path / "flags.pt"), "flags.json", "another")
    assert files_below(tmp_path) == before and (tmp_path / "there.pt").read_text() == "mine"


def test_a_dry_run_tells_and_writes_nothing(state, tmp_path):
    """--dry_run prints the flags and the paths."""
    checkpoints.save(str(tmp_path / "x.pt"), state)
    checkpoints.save_flags(str(tmp_path / "x.pt"), SMALL)
    done = convert(tmp_path / "x.pt", tmp_path / "y.safetensors", "--dry_run", "True")
    assert done.code == 0 and f"{tmp_path}/y.safetensors\n{tmp_path}/y.json\n" in done.out
    assert files_below(tmp_path) == {"x.pt", "x.json"}


@pytest.mark.parametrize("content", [{"opt": {"state": 1}}, {"step": 3}, [1, 2], {1: [2]}])
@pytest.mark.parametrize("target", ["y.safetensors", "y.pt"])
def test_what_are_no_weights_is_refused(content, target, tmp_path):
    """An optimizer's state is named, and leaves no flags without weights behind."""
    torch.save(content, tmp_path / "x.pt")
    checkpoints.save_flags(str(tmp_path / "x.pt"), SMALL)
    check_failure(convert(tmp_path / "x.pt", tmp_path / target), "x.pt holds no weights")
    assert files_below(tmp_path) == {"x.pt", "x.json"}
    with pytest.raises(ValueError, match="y.safetensors can hold a dictionary of dense tensors"):
        checkpoints.save(str(tmp_path / "y.safetensors"), content)
    assert files_below(tmp_path) == {"x.pt", "x.json"}


def test_flags_go_again_if_the_weights_cannot_be_written(state, tmp_path, monkeypatch):
    """A disk that is full leaves neither the target nor what goes beside it."""
    checkpoints.save(str(tmp_path / "x.pt"), state)
    checkpoints.save_flags(str(tmp_path / "x.pt"), SMALL)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_files, "save", fail)
    check_failure(convert(tmp_path / "x.pt", tmp_path / "y.safetensors"), "No space left")
    assert files_below(tmp_path) == {"x.pt", "x.json"}


def test_without_the_package_the_remedy_is_told(state, tmp_path, monkeypatch):
    """Reading and writing name the package."""
    checkpoints.save(str(tmp_path / "x.safetensors"), state)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        dist_util.load_state_dict(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="pip install safetensors"):
        checkpoints.save(str(tmp_path / "y.safetensors"), state)
    assert files_below(tmp_path) == {"x.safetensors"}


def packed(header, body=b""):
    """Return the bytes of a .safetensors file with a header that may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


HOSTILE = {
    "empty": b"",
    "text": b"hello world, this is no checkpoint",
    "pickle": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exitq\x00\x85q\x01R.",
    "huge_header": struct.pack("<Q", 2**60) + b"{}",
    "not_json": packed(b"{" * 50),
    "deep_json": packed(b'{"a":' * 5000),
    "not_utf8": packed(b'{"\xff": 1}'),
    "overlap": packed({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "beyond": packed({"a": entry(0, 400, (100,))}, bytes(4)),
    "hole": packed({"a": entry(4, 8)}, bytes(8)),
    "wrong_size": packed({"a": entry(0, 4, (7,))}, bytes(4)),
    "overflow": packed({"a": entry(0, 4, (2**40, 2**40))}, bytes(4)),
    "negative": packed({"a": entry(0, 4, (-1,))}, bytes(4)),
    "dtype": packed({"a": entry(0, 4, dtype="O")}, bytes(4)),
    "rest": packed({"a": entry(0, 4)}, bytes(9)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name, tmp_path):
    """A damaged or hostile .safetensors file is named, with what to do."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match="x.safetensors is no whole .safetensors file") as caught:
        dist_util.load_state_dict(path)
    assert "\n" not in str(caught.value) and "download it again" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_files_are_one_line(share, state, tmp_path):
    """Wherever the file is cut, it is refused."""
    path = tmp_path / "x.safetensors"
    checkpoints.save(str(path), state)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="x.safetensors is no whole"):
        dist_util.load_state_dict(path)


@pytest.mark.parametrize("names", [None, "", "{", '["a"]', '["a", "a"]', '["b", 1]', "[" * 9999])
def test_without_a_good_order_the_files_own_counts(names, tmp_path):
    """Files of other programs tell no order, or a wrong one: then tensors come as they lie."""
    header = {"a": entry(4, 8), "b": entry(0, 4)}
    if names is not None:
        header["__metadata__"] = {"names": names}
    (tmp_path / "x.safetensors").write_bytes(packed(header, struct.pack("<2f", 1, 2)))
    found = dist_util.load_state_dict(tmp_path / "x.safetensors")
    assert [(k, v.item()) for k, v in found.items()] == [("b", 1.0), ("a", 2.0)]


def test_device_and_address(state, tmp_path, monkeypatch):
    """map_location names the device; an address is read through blobfile."""
    import blobfile

    checkpoints.save(str(tmp_path / "x.safetensors"), state)
    found = dist_util.load_state_dict(tmp_path / "x.safetensors", map_location="meta")
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    monkeypatch.setattr(blobfile, "BlobFile", lambda path, mode: (tmp_path / path[5:]).open(mode))
    assert same(dist_util.load_state_dict("az://x.safetensors"), state)
    torch.save(state, tmp_path / "x.pt")
    assert same(dist_util.load_state_dict("az://x.pt", mmap=True), state)


def test_a_sampler_draws_the_same_from_both(tmp_path):
    """Bit for bit, with the flags that went along."""
    flags = script_util.model_and_diffusion_defaults() | SMALL
    network = script_util.create_model_and_diffusion(**flags)[0]
    model = tmp_path / "model.pt"
    checkpoints.save(str(model), {k: torch.randn_like(v) for k, v in network.state_dict().items()})
    checkpoints.save_flags(str(model), flags)
    assert convert(model, tmp_path / "m.safetensors").code == 0
    images = []
    for i, path in enumerate([model, tmp_path / "m.safetensors"]):
        flags = {"model_path": path, "num_samples": 2, "batch_size": 2, "seed": 1}
        succeed("image_sample", flags, timestep_respacing="3", log_dir=tmp_path / str(i))
        images.append(np.load(tmp_path / str(i) / "samples_2x8x8x1.npz")["arr_0"])
    np.testing.assert_array_equal(*images)
