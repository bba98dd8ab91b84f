"""guided_diffusion.downloads: what is common to all files that come from a server.

More laws are in test_download.py, of the program for the released checkpoints.
"""

import resource
from pathlib import Path

import pytest
from scripting import files_below
from serving import serving

from guided_diffusion import downloads
from guided_diffusion.downloads import Wanted, download

CONTENT = bytes(range(256)) * 300


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setattr(downloads, "BLOCK", 1000)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    with serving("/a.bin", CONTENT) as server:
        yield server


@pytest.fixture
def wanted(server):
    """The server's file, of which the size is known."""
    address = f"http://127.0.0.1:{server.server_port}/a.bin"
    return Wanted(address, len(CONTENT), remedy="ask Ann", elsewhere="buy a disk")


def check_refusal(wanted, path, *words):
    """Assert that a download ends in one line with these words, and no file of the name."""
    with pytest.raises(ValueError) as error:
        download(wanted, str(path))
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert not path.exists()


@pytest.mark.parametrize("tells_size", [True, False])
def test_a_file_of_the_known_size_comes_whole(server, wanted, tmp_path, capsys, tells_size):
    """Into a folder that is made for it; what the judge says of it is the result."""
    server.plan.tells_size = tells_size
    path = tmp_path / "new" / "a.bin"
    assert download(wanted, str(path), lambda came: Path(came).name) == "a.bin.part"
    assert path.read_bytes() == CONTENT and files_below(tmp_path) == {"new", "new/a.bin"}
    assert "a.bin: 100%" in capsys.readouterr().err


def test_a_file_of_another_size_is_not_even_begun(server, wanted, tmp_path):
    """What the server announces is enough; nothing is left."""
    server.plan.content = CONTENT * 100
    check_refusal(wanted, tmp_path / "a.bin", "7,680,000 bytes instead of 76,800", "ask Ann")
    assert len(server.plan.requests) == 1 and not files_below(tmp_path)


def test_a_file_that_does_not_end_is_left_alone(server, wanted, tmp_path, monkeypatch):
    """Where no size is announced no more than the known one is read."""
    server.plan.tells_size, server.plan.content = False, CONTENT * 100
    read, blocks = downloads._read, []
    monkeypatch.setattr(
        downloads, "_read", lambda answer: blocks.append(read(answer)) or blocks[-1]
    )
    check_refusal(wanted, tmp_path / "a.bin", "more bytes instead of 76,800", "ask Ann")
    assert sum(map(len, blocks)) <= len(CONTENT) + 1000 and not files_below(tmp_path)


def test_too_few_bytes_are_a_broken_connection(server, wanted, tmp_path):
    """Also where none are announced: the next run goes on, and no byte comes twice."""
    server.plan.tells_size, server.plan.cuts = False, [5000] + [0] * 5
    check_refusal(wanted, tmp_path / "a.bin", "broke off 5 times", "5,000 bytes, or ask Ann")
    download(wanted, str(tmp_path / "a.bin"))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.plan.sent == len(CONTENT)


def test_a_full_disk_is_one_line_and_keeps_what_came(server, wanted, tmp_path):
    """A limit on the size of files stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        words = "a.bin cannot be written (File too large)", "or buy a disk"
        check_refusal(wanted, tmp_path / "a.bin", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    download(wanted, str(tmp_path / "a.bin"))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.plan.requests[-1]["Range"] == "bytes=50000-"


def test_a_folder_that_cannot_be_made_is_one_line(wanted, tmp_path):
    """Before the server is asked."""
    (tmp_path / "file").touch()
    check_refusal(
        wanted, tmp_path / "file" / "below" / "a.bin", "(Not a directory)", "or buy a disk"
    )
