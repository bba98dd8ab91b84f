"""Files from a server: a download that broke off goes on where it stopped.

What has arrived waits in FILE.part, beside FILE.part.json, which tells what it is part of. A file
gets its name only when it is whole. This module imports nothing heavy.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from . import checkpoints
from .launchers import first_line

BLOCK = 2**18  # bytes in a read
TIMEOUT = 60.0  # seconds without a byte
TRIES = 5  # times in a row that a connection may break without having brought anything
PAUSE = 2.0  # seconds before the second try, twice as many before each that follows
NETWORK = (OSError, http.client.HTTPException)  # what a broken connection raises
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may think better of it


@dataclass(frozen=True)
class Wanted:
    """A file that a server has.

    Attributes:
        url: its address, http or https.
        size: in bytes, None if it is not known beforehand.
        timeout: seconds without a byte, after which a connection counts as broken.
        remedy: what to do if it cannot be had there; it completes an error.
        elsewhere: what to do if its folder is full, or cannot be written; likewise.
    """

    url: str
    size: int | None = None
    timeout: float = TIMEOUT
    remedy: str = "try again later"
    elsewhere: str = "choose another folder"


def download(wanted: Wanted, path: str, judge: Callable[[str], Any] = lambda path: None) -> Any:
    """Bring a file here, which gets its name when it is whole and not before.

    Args:
        wanted: the file.
        path: where to; its folder is made if need be.
        judge: is given the path of what came, and raises a ValueError if that is another file than
            expected, which is then left as FILE.refused.

    Returns:
        what the judge does.

    Raises:
        ValueError: the server does not have the file or does not deliver it, it is another one,
            or the disk does not take it. One line that says what to do.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        part = Part(f"{path}.part")
        with part.lock():
            try:
                _fetch(wanted, part)
            except KeyboardInterrupt:
                print(f"stopped; run this again to go on from {part.size():,} bytes", flush=True)
                raise
            try:
                verdict = judge(part.path)
            except ValueError as error:
                part.leave(f"{path}.refused")
                problem = str(error).replace(part.path, f"{path}.refused")
                raise ValueError(
                    f"{wanted.url} brought another file than expected: {problem}"
                ) from error
            part.leave(path)
            return verdict
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({checkpoints.reason_of(error)}): make room there and run "
            f"this again, or {wanted.elsewhere}"
        ) from error


# --------------------------------------------------------------------------------------------
# What is here


class Part:
    """What has arrived of a file, FILE.part, and beside it in FILE.part.json what it is part of.

    Attributes:
        path: of the bytes.
        source: the address, the validator with which the server tells whether the file is still
            the same (its ETag, or when it was modified) and its size, None where unknown.
    """

    def __init__(self, path: str):
        self.path = path
        self.source: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(checkpoints.read_file(f"{path}.json"))
            self.source = found if isinstance(found, dict) else {}

    def size(self) -> int:
        """Return how many bytes are here."""
        return checkpoints.size_of(self.path) or 0

    def begin(self, source: dict[str, Any]) -> None:
        """Throw away what is here; what comes next is the front of another file."""
        os.truncate(self.path, 0)
        checkpoints.write_bytes(f"{self.path}.json", json.dumps(source).encode())
        self.source = source

    def leave(self, name: str) -> None:
        """Give the bytes another name, and forget where they came from."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, name)
        checkpoints.remove(f"{self.path}.json")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other downloads of the file away within the block."""
        import fcntl

        with open(self.path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.path} is being written by another download: wait for its end"
                ) from None
            except OSError:
                pass  # this disk knows no locks
            try:
                yield
            finally:
                if not self.size():
                    for path in (self.path, f"{self.path}.json"):
                        checkpoints.remove(path)


# --------------------------------------------------------------------------------------------
# What comes


class Broken(Exception):
    """A connection broke, or a server is busy: another try may succeed."""


def _fetch(wanted: Wanted, part: Part) -> None:
    """Download into `part`, going on where it ends, through some broken connections.

    Raises:
        ValueError: if the server does not have the file, or does not deliver it.
    """
    failures, best = 0, part.size()
    while True:
        try:
            return _fetch_once(wanted, part)
        except Broken as error:
            failures = 1 if part.size() > best else failures + 1
            best = max(best, part.size())
            if failures >= TRIES:
                raise ValueError(
                    f"{wanted.url} broke off {failures} times in a row ({error}): run this again "
                    f"to go on from {part.size():,} bytes, or {wanted.remedy}"
                ) from error
        time.sleep(PAUSE * 2 ** (failures - 1))


def _fetch_once(wanted: Wanted, part: Part) -> None:
    """Download the rest of a file in one connection; raise Broken if another may do better."""
    held = part.size()
    validator = part.source.get("validator") if part.source.get("url") == wanted.url else None
    headers = {"Accept-Encoding": "identity", "User-Agent": "guided-diffusion"}
    if held and validator:  # a server whose file has changed sends the whole instead
        headers |= {"Range": f"bytes={held}-", "If-Range": validator}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(wanted.url, headers=headers), timeout=wanted.timeout
        )
    except urllib.error.HTTPError as error:
        return _judge_answer(error, wanted, part)
    except NETWORK as error:
        raise Broken(first_line(error).strip("<>")) from error
    with answer:
        _receive(answer, wanted, part)


def _judge_answer(error: urllib.error.HTTPError, wanted: Wanted, part: Part) -> None:
    """Return if an answer other than success means that all is here; else raise."""
    error.close()
    if error.code == 416:  # there is nothing behind what is here
        total = _range_of(error.headers)[1]
        if total is not None and total == part.size() == (part.source.get("size") or total):
            return
        part.begin({})
        raise Broken("the server's file is shorter than what is here; starting over")
    if error.code in TRANSIENT:
        raise Broken(f"{error.code} {error.reason}")
    raise ValueError(
        f"{wanted.url} cannot be downloaded ({error.code} {error.reason}): {wanted.remedy}"
    )


def _receive(answer: Any, wanted: Wanted, part: Part) -> None:
    """Write the body of an answer into `part`, and compare its size with what was announced."""
    if answer.status == 206:
        start, total = _range_of(answer.headers)
        total = total or part.source.get("size")
        if start != part.size() or total != (part.source.get("size") or total):
            part.begin({})
            raise Broken("the server sent another part than asked for; starting over")
    else:
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else wanted.size
        part.begin({"url": wanted.url, "validator": _validator(answer.headers), "size": total})
    if wanted.size not in (None, total):
        _refuse(wanted, part, f"{total:,}", wanted.size)
    room = shutil.disk_usage(os.path.dirname(os.path.abspath(part.path))).free
    if total is not None and total - part.size() > room:
        raise ValueError(
            f"{part.path} needs {total - part.size():,} bytes more, but {room:,} are free: make "
            f"room, or {wanted.elsewhere}"
        )
    with open(part.path, "ab") as file:
        _copy(answer, file, part.size(), total)
    if total is not None and part.size() > total:
        _refuse(wanted, part, "more", total)
    if total is not None and part.size() < total:
        raise Broken(f"{part.size():,} of {total:,} bytes came")


def _refuse(wanted: Wanted, part: Part, found: str, expected: int) -> NoReturn:
    """Throw away what came of a file of another size."""
    part.begin({})
    raise ValueError(
        f"{wanted.url} has {found} bytes instead of {expected:,}, so it is another file: "
        f"{wanted.remedy}"
    )


def _copy(answer: Any, file: BinaryIO, held: int, total: int | None) -> None:
    """Copy what comes, but hardly more than the total, and show how fast."""
    from tqdm import tqdm

    name = os.path.basename(file.name).removesuffix(".part")
    with tqdm(desc=name, initial=held, total=total, unit="B", unit_scale=True) as bar:
        while (total is None or held <= total) and (block := _read(answer)):
            file.write(block)
            held += len(block)
            bar.update(len(block))


def _read(answer: Any) -> bytes:
    """Read a block of an answer's body, empty at its end and where the connection was closed."""
    try:
        return answer.read(BLOCK)
    except NETWORK as error:
        raise Broken(first_line(error)) from error


def _range_of(headers: Any) -> tuple[int | None, int | None]:
    """Return the first byte and the size of the whole from a Content-Range header."""
    found = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", ""))
    if not found:
        return None, None
    start, total = found.groups()
    return int(start) if start else None, int(total) if total != "*" else None


def _validator(headers: Any) -> str | None:
    """Return what tells this version of a file from others; a weak ETag does not."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")
