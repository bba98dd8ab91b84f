"""Downloads end in the released file, bit for bit, or in one line and no file by its name."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT
from scripting import CLASSIFIER, SMALL, files_below
from serving import DATE, serving

from guided_diffusion import downloads, presets, script_util

NETWORKS = {"diffusion model": SMALL, "classifier": CLASSIFIER}
TINY = presets.Preset({"diffusion model": "tiny.pt", "classifier": "tiny_c.pt"}, NETWORKS)


class Harmful:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (os.makedirs, ("harm",))


def saved(state):
    """Return the bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.fixture(scope="session")
def weights():
    """The state dict of the tiny network."""
    flags = script_util.model_and_diffusion_defaults() | SMALL
    return script_util.create_model_and_diffusion(**flags)[0].state_dict()


@pytest.fixture(scope="session")
def content(weights):
    """What the server has by the name tiny.pt."""
    return saved(weights)


@pytest.fixture
def server(content):
    """A server and its plan, by default a good one."""
    with serving("/models/tiny.pt", content) as server:
        yield server


@pytest.fixture
def plan(server):
    return server.plan


@pytest.fixture
def program(monkeypatch):
    """models/download.py, with the tiny preset alone."""
    spec = importlib.util.spec_from_file_location("download", ROOT / "models" / "download.py")
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "download", program)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "PRESETS", {"tiny": TINY, "fashion": presets.PRESETS["fashion"]})
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setattr(downloads, "BLOCK", 1000)
    monkeypatch.setattr("sys.argv", ["download.py"])
    monkeypatch.setenv("no_proxy", "*")
    return program


@pytest.fixture
def download(program, server, tmp_path):
    """Run a command line that downloads into tmp_path/out; return its code, output and error."""

    def run(*words, out=tmp_path / "out"):
        base = f"http://127.0.0.1:{server.server_port}/models"
        argv = [*(words or ["tiny.pt"]), "--out", str(out), "--base_url", base]
        stdout, stderr, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                program.run(lambda: program.main(argv))
            except SystemExit as end:
                code = end.code
        lines = [line for line in stderr.getvalue().replace("\r", "\n").split("\n") if line]
        errors = [line for line in lines if "B/s" not in line]
        return SimpleNamespace(code=code, out=stdout.getvalue(), errors=errors)

    return run


def check_failure(done, *words):
    """Assert that a run ended in one line that holds these words."""
    assert done.code == 1 and len(done.errors) == 1, done.errors
    assert done.errors[0].startswith("download.py: error: ")
    assert all(word in done.errors[0] for word in words), done.errors


def check_success(done, folder, content):
    """Assert that a run left the file and its checksum, and nothing else."""
    digest = hashlib.sha256(content).hexdigest()
    assert (done.code, done.errors) == (0, []), done.errors
    assert (folder / "tiny.pt").read_bytes() == content
    assert json.loads((folder / "checksums.json").read_text()) == {"tiny.pt": digest}
    assert done.out == f"{digest}  {folder / 'tiny.pt'}\n"
    assert files_below(folder) == {"tiny.pt", "checksums.json"}


def test_a_file_comes_once(download, plan, content, tmp_path):
    """The second run asks the server nothing, and says the same."""
    for _ in range(2):
        check_success(download(), tmp_path / "out", content)
    assert len(plan.requests) == 1 and "Range" not in plan.requests[0]
    assert download("--check", "tiny").out.startswith(hashlib.sha256(content).hexdigest())


def test_broken_connections_go_on_where_they_stopped(download, plan, content, tmp_path):
    """No byte comes twice, within a run and across runs."""
    plan.cuts = [5000, 0, 0, 70_000] + [0] * 5
    check_failure(download(), "broke off 5 times", "75,000 bytes")
    assert files_below(tmp_path / "out") == {"tiny.pt.part", "tiny.pt.part.json"}
    assert plan.requests[-1]["Range"] == "bytes=75000-" and plan.requests[-1]["If-Range"] == '"1"'
    check_success(download(), tmp_path / "out", content)
    assert plan.sent == len(content)


@pytest.mark.parametrize(
    "change",
    [
        {"knows_ranges": False},
        {"validators": {"ETag": '"2"'}},
        {"validators": {}},
        {"shifted": 1},
    ],
)
def test_parts_of_different_files_are_never_joined(change, download, plan, content, tmp_path):
    """What cannot be the rest of what is here is not appended to it."""
    old = bytes(len(content))
    plan.content, plan.cuts = old, [50_000] + [0] * 5
    assert download().code == 1
    plan.content, plan.cuts = content, []
    vars(plan).update(change)
    if change == {"shifted": 1}:
        plan.validators = {"ETag": '"1"'}
    if "validators" not in change:
        (tmp_path / "out" / "tiny.pt.part").write_bytes(content[:50_000])
    check_success(download(), tmp_path / "out", content)


@pytest.mark.parametrize("validators", [{"ETag": 'W/"1"'}, {"ETag": ""}])
def test_a_weak_etag_does_not_count(validators, download, plan, content, tmp_path):
    """Without a strong ETag the date tells the versions apart; without any, all comes anew."""
    plan.validators = validators | {"Last-Modified": DATE}
    plan.cuts = [5000]
    check_success(download(), tmp_path / "out", content)
    assert plan.requests[1]["If-Range"] == plan.validators["Last-Modified"]
    (tmp_path / "out" / "tiny.pt").unlink()
    plan.validators, plan.cuts = {"ETag": 'W/"1"'}, [5000]
    check_success(download(), tmp_path / "out", content)
    assert "Range" not in plan.requests[-1]


def test_another_address_is_another_file(download, plan, program, content, tmp_path):
    """A part from one mirror is not continued at another, though the ETags be equal."""
    plan.cuts = [5000] + [0] * 5
    assert download().code == 1
    path = tmp_path / "out" / "tiny.pt.part.json"
    path.write_text(path.read_text().replace("127.0.0.1", "mirror"))
    check_success(download(), tmp_path / "out", content)
    assert "Range" not in plan.requests[-1]


def test_a_part_that_is_whole_needs_its_name_only(download, plan, program, content, tmp_path):
    """A run that was killed before the renaming is finished without a byte."""
    plan.cuts = [len(content) - 1] + [0] * 5
    assert download().code == 1
    (tmp_path / "out" / "tiny.pt.part").write_bytes(content)
    check_success(download(), tmp_path / "out", content)
    assert plan.sent == len(content) - 1


def test_a_part_that_is_too_long_is_thrown_away(download, plan, content, tmp_path):
    """Bytes behind the end of the server's file are no part of it."""
    plan.cuts = [5000] + [0] * 5
    assert download().code == 1
    (tmp_path / "out" / "tiny.pt.part").write_bytes(content + b"x")
    check_success(download(), tmp_path / "out", content)


def test_fewer_bytes_than_promised_are_no_file(download, plan, content, tmp_path):
    """A server that lies about the size is told apart from one that sent all."""
    plan.exaggerated = 3
    check_failure(download(), f"{len(content):,} of {len(content) + 3:,} bytes", "tiny.pt")
    assert not (tmp_path / "out" / "tiny.pt").exists()


def test_a_size_need_not_be_told(download, plan, content, tmp_path):
    """Without a Content-Length the end of the connection is the end, and the judge decides."""
    plan.tells_size = False
    check_success(download(), tmp_path / "out", content)


def test_a_busy_server_is_asked_again(download, plan, content, tmp_path):
    """503 may pass; 404 will not, and leaves nothing."""
    plan.statuses = [503, 429]
    check_success(download(), tmp_path / "out", content)
    check_failure(download("tiny_c.pt"), "tiny_c.pt", "404", "--base_url")
    assert files_below(tmp_path / "out") == {"tiny.pt", "checksums.json"}


def test_no_server_is_one_line(program, download, server, monkeypatch):
    """Where nobody listens, the line names the address."""
    monkeypatch.setattr(server, "server_port", 1)
    check_failure(download(), "127.0.0.1:1/models/tiny.pt", "refused")


def wrong_files(weights):
    """Return what a server may send instead -> its bytes, and a word of the error."""
    name = next(iter(weights))
    less = {k: v for k, v in weights.items() if k != name}
    return {
        "page": (b"<!DOCTYPE html><title>Sign in</title>", "web page"),
        "nothing": (b" ", "not written by torch.save"),
        "cut": (saved(weights)[:9000], "cut short"),
        "code": (saved({"a": Harmful()}), "could run code"),
        "shape": (saved(weights | {name: torch.zeros(3)}), f"{name} is [3] there"),
        "less": (saved(less), f"no {name}"),
        "more": (saved(weights | {"extra": torch.zeros(1)}), "extra"),
        "nested": (saved({"model": dict(weights)}), "holds no weights"),
    }


@pytest.mark.parametrize(
    "kind", ["page", "nothing", "cut", "code", "shape", "less", "more", "nested"]
)
def test_what_is_not_the_network_gets_no_name(kind, download, plan, weights, tmp_path, monkeypatch):
    """Another file than the released network is set aside, told in one line, and never run."""
    monkeypatch.chdir(tmp_path)
    plan.content, word = wrong_files(weights)[kind]
    check_failure(download(), "another file than expected", "tiny.pt.refused", word)
    assert files_below(tmp_path) == {"out", "out/tiny.pt.refused"}


def test_a_file_that_changed_is_refused(download, plan, weights, content, tmp_path):
    """After the first use only the same bytes are good, here and from the server."""
    folder = tmp_path / "out"
    check_success(download(), folder, content)
    other = saved({k: v + 1 for k, v in weights.items()})
    (folder / "tiny.pt").write_bytes(other)
    for words in ([], ["tiny", "--check"]):
        done = download(*words)
        check_failure(done, hashlib.sha256(other).hexdigest(), "checksums.json", "remove or rename")
    assert (folder / "tiny.pt").read_bytes() == other and len(plan.requests) == 1
    (folder / "tiny.pt").unlink()
    plan.content = other
    check_failure(download(), hashlib.sha256(content).hexdigest(), "checksums.json")
    assert not (folder / "tiny.pt").exists()
    plan.content = content
    assert download().code == 0 and (folder / "tiny.pt").read_bytes() == content


def test_damaged_checksums_come_first(download, plan, tmp_path):
    """They are not overwritten, and nothing is downloaded."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checksums.json").write_text("{")
    check_failure(download(), "checksums.json is damaged")
    assert not plan.requests and files_below(tmp_path / "out") == {"checksums.json"}


def test_ctrl_c_keeps_the_part(download, plan, program, content, tmp_path, monkeypatch):
    """The next run goes on from there."""
    read, blocks = downloads._read, iter(range(20))

    def interrupted(answer):
        if next(blocks, None) is None:
            raise KeyboardInterrupt
        return read(answer)

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_read", interrupted)
        done = download()
    assert done.code == 130 and "20,000 bytes" in done.out and not done.errors
    check_success(download(), tmp_path / "out", content)
    assert plan.requests[-1]["Range"] == "bytes=20000-"


def test_one_download_of_a_file_at_a_time(download, program, tmp_path):
    """Another one is refused, and the part stays with the first."""
    (tmp_path / "out").mkdir()
    with downloads.Part(str(tmp_path / "out" / "tiny.pt.part")).lock():
        check_failure(download(), "tiny.pt.part is being written by another download")


def test_too_little_room_is_told_before(download, program, content, tmp_path, monkeypatch):
    """A disk that is too full is told with the numbers."""
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: SimpleNamespace(free=5))
    check_failure(download(), f"{len(content):,} bytes", "--out")
    assert not (tmp_path / "out" / "tiny.pt").exists()


def test_words_name_files(program, monkeypatch):
    """A preset is all its files, a file is itself, and "all" are the 15 released ones."""
    monkeypatch.setattr(program, "PRESETS", presets.PRESETS)
    names = [release.file for release in program.choose(["imagenet64", "64x64_classifier.pt"])]
    assert names == ["64x64_diffusion.pt", "64x64_classifier.pt"]
    assert len(program.choose(["all"])) == 15
    for word, answer in {"imagenet65": "imagenet64", "fashion": "comes with"}.items():
        with pytest.raises(ValueError, match=answer):
            program.choose([word])


def test_the_list_tells_what_is_here(download, content, tmp_path):
    """Sizes come from the networks; --check without any file says so."""
    check_failure(download("tiny", "--check"), "--out", "none of these files")
    assert download().code == 0
    rows = [line.split() for line in download("--list").out.splitlines()]
    assert rows[:3] == [
        ["file", "MB", "here", "preset"], ["tiny.pt", f"{len(content) / 1e6:.0f}", "yes", "tiny"],
        ["tiny_c.pt", "2", "no", "tiny"],
    ]  # fmt: skip


def test_sizes_are_those_of_the_readme(program, monkeypatch):
    """The table of models/README.md has the parameters of the networks that are checked."""
    monkeypatch.setattr(program, "PRESETS", presets.PRESETS)
    lines = (ROOT / "models" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| [")]
    told = {row[1][1:].split("]")[0]: int(row[4].replace(",", "")) for row in rows}
    assert told == {name: r.num_bytes() // 4 for name, r in program.releases().items()}


@pytest.mark.parametrize(
    "words", [[], ["tiny", "--base_url", "ftp://x"], ["tiny", "--timeout", "0"], ["--unknown"]]
)
def test_a_mistake_in_the_flags_is_one_line(words, program, capsys):
    """As in the scripts, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        program.main(words)
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
