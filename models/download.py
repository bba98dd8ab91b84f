"""Download the released checkpoints, and make sure that they are what they should be.

    python models/download.py imagenet64             # the files of a preset
    python models/download.py 64x64_classifier.pt    # a file
    python models/download.py --list                 # what there is, and what is here

A download that broke off goes on where it stopped. A file gets its name only when it is whole and
holds the tensors of its network; nothing in it is ever run. Its SHA-256 is printed, and kept in
checksums.json from the first time on: a file that differs later is refused.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from guided_diffusion import checkpoints
from guided_diffusion.flag_parsing import MISTAKE_IN_FLAGS, run
from guided_diffusion.launchers import first_line
from guided_diffusion.presets import MODELS, PRESETS, URL

CHECKSUMS = "checksums.json"
BLOCK = 2**18  # bytes in a read
TRIES = 5  # times in a row that a connection may break without having brought anything
PAUSE = 2.0  # seconds before the second try, twice as many before each that follows
NETWORK = (OSError, http.client.HTTPException)  # what a broken connection raises
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may think better of it

# --------------------------------------------------------------------------------------------
# What there is


@dataclass
class Release:
    """A released file.

    Attributes:
        file: its name.
        kind: "diffusion model", "upsampler" or "classifier".
        network: the flags that fix its network, where they are not the defaults.
        presets: the names of the presets that it belongs to.
    """

    file: str
    kind: str
    network: dict[str, Any]
    presets: list[str] = field(default_factory=list)

    def build(self) -> Any:
        """Return its network on the meta device: names and shapes without numbers."""
        import torch

        from guided_diffusion import config, script_util, trained_flags

        flags = config.defaults(*trained_flags.KINDS[self.kind]) | self.network
        with torch.device("meta"):
            return script_util.CREATE[self.kind](**flags)[0]

    def num_bytes(self) -> int:
        """Return the size of its tensors, all float32; the file is a little larger."""
        return sum(4 * tensor.numel() for tensor in self.build().state_dict().values())


def releases() -> dict[str, Release]:
    """Return all released files by name."""
    found: dict[str, Release] = {}
    for name, preset in PRESETS.items():
        for kind, file in {} if preset.bundled else preset.files.items():
            release = found.setdefault(file, Release(file, kind, preset.network.get(kind, {})))
            release.presets.append(name)
    return found


def choose(names: list[str]) -> list[Release]:
    """Return the files that some words name: file names, presets or "all".

    Raises:
        ValueError: for a word that is none of these.
    """
    table, chosen = releases(), {}
    for name in names:
        if name in PRESETS and PRESETS[name].bundled:
            raise ValueError(f"{name} comes with this project, in {os.path.join(MODELS, name)}")
        files = [f for f in table if name in ("all", f, *table[f].presets)]
        if not files:
            presets = sorted({preset for release in table.values() for preset in release.presets})
            raise ValueError(
                f"{name!r} is no released model: give a preset ({', '.join(presets)}), a file that "
                "--list shows, or all"
            )
        chosen |= {file: table[file] for file in files}
    return list(chosen.values())


def print_table(folder: str) -> None:
    """Print each file, its presets, its size and whether it is in a folder."""
    rows = [("file", "MB", "here", "preset")]
    for file, release in releases().items():
        path = os.path.join(folder, file)
        here = "yes" if os.path.isfile(path) else "part" if os.path.isfile(path + ".part") else "no"
        rows.append((file, f"{release.num_bytes() / 1e6:,.0f}", here, ", ".join(release.presets)))
    width = max(len(row[0]) for row in rows)
    for file, size, here, presets in rows:
        print(f"{file:{width}}  {size:>6}  {here:4}  {presets}")
    print(f"here: {os.path.abspath(folder)}")


# --------------------------------------------------------------------------------------------
# Fetching


class Broken(Exception):
    """A connection broke, or a server is busy: another try may succeed."""


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
                raise ValueError(f"{self.path} is being written by another download") from None
            except OSError:
                pass  # this disk knows no locks
            try:
                yield
            finally:
                if not self.size():
                    for path in (self.path, f"{self.path}.json"):
                        checkpoints.remove(path)


def fetch(url: str, part: Part, timeout: float) -> None:
    """Download into `part`, going on where it ends, through some broken connections.

    Raises:
        ValueError: if the server does not have the file, or does not deliver it.
    """
    failures, best = 0, part.size()
    while True:
        try:
            return _fetch_once(url, part, timeout)
        except Broken as error:
            failures = 1 if part.size() > best else failures + 1
            best = max(best, part.size())
            if failures >= TRIES:
                raise ValueError(
                    f"{url} broke off {failures} times in a row ({error}): run this again to go on "
                    f"from {part.size():,} bytes"
                ) from error
        time.sleep(PAUSE * 2 ** (failures - 1))


def _fetch_once(url: str, part: Part, timeout: float) -> None:
    """Download the rest of a file in one connection; raise Broken if another may do better."""
    held = part.size()
    validator = part.source.get("validator") if part.source.get("url") == url else None
    headers = {"Accept-Encoding": "identity", "User-Agent": "guided-diffusion"}
    if held and validator:  # a server whose file has changed sends the whole instead
        headers |= {"Range": f"bytes={held}-", "If-Range": validator}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), timeout=timeout
        )
    except urllib.error.HTTPError as error:
        return _judge_answer(error, url, part)
    except NETWORK as error:
        raise Broken(first_line(error)) from error
    with answer:
        _receive(answer, url, part)


def _judge_answer(error: urllib.error.HTTPError, url: str, part: Part) -> None:
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
        f"{url} cannot be downloaded ({error.code} {error.reason}): look at --list for the names, "
        "or give another --base_url"
    )


def _receive(answer: Any, url: str, part: Part) -> None:
    """Write the body of an answer into `part`, and compare its size with what was announced."""
    if answer.status == 206:
        start, total = _range_of(answer.headers)
        total = total or part.source.get("size")
        if start != part.size() or total != (part.source.get("size") or total):
            part.begin({})
            raise Broken("the server sent another part than asked for; starting over")
    else:
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        part.begin({"url": url, "validator": _validator(answer.headers), "size": total})
    room = shutil.disk_usage(os.path.dirname(part.path)).free
    if total is not None and total - part.size() > room:
        raise ValueError(
            f"{part.path} needs {total - part.size():,} bytes more, but {room:,} are free: make "
            "room, or give another --out"
        )
    with open(part.path, "ab") as file:
        _copy(answer, file, part.size(), total)
    if total is not None and part.size() != total:
        raise Broken(f"{part.size():,} of {total:,} bytes came")


def _copy(answer: Any, file: BinaryIO, held: int, total: int | None) -> None:
    """Copy what comes, and show how fast."""
    from tqdm import tqdm

    name = os.path.basename(file.name).removesuffix(".part")
    with tqdm(desc=name, initial=held, total=total, unit="B", unit_scale=True) as bar:
        while block := _read(answer):
            try:
                file.write(block)
            except OSError as error:
                raise ValueError(
                    f"{file.name} cannot be written ({error.strerror}): make room there, and run "
                    "this again to go on"
                ) from error
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


# --------------------------------------------------------------------------------------------
# Judging


def remembered(folder: str) -> dict[str, str]:
    """Return file name -> SHA-256 as of its first use.

    Raises:
        ValueError: if the file of checksums is damaged.
    """
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.exists(path):
        return {}
    with suppress(ValueError, RecursionError):
        found = json.loads(checkpoints.read_file(path))
        if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
            return found
    raise ValueError(f"{path} is damaged: restore or remove it")


def verify(release: Release, path: str, folder: str) -> str:
    """Return the SHA-256 of a file that holds the tensors of its network.

    Raises:
        ValueError: if it is another file than at its first use, or no such checkpoint.
    """
    digest, before = checkpoints.digest(path), remembered(folder).get(release.file)
    if before not in (None, digest):
        raise ValueError(
            f"{path} has SHA-256 {digest}, but {os.path.join(folder, CHECKSUMS)} remembers "
            f"{before}: remove or rename the file, or that line if the release did change"
        )
    checkpoints.read_weights(release.build(), path, mmap=True)
    return digest


def remember(release: Release, digest: str, folder: str) -> None:
    """Print the SHA-256 of a good file, and keep it if there was none."""
    path, known = os.path.join(folder, CHECKSUMS), remembered(folder)
    print(f"{digest}  {os.path.abspath(os.path.join(folder, release.file))}", flush=True)
    if release.file not in known:
        text = json.dumps(known | {release.file: digest}, indent=1, sort_keys=True) + "\n"
        checkpoints.write_bytes(path, text.encode())


def check(release: Release, folder: str) -> None:
    """Judge a file that is here, and remember it."""
    path = os.path.join(folder, release.file)
    remember(release, verify(release, path, folder), folder)


def check_all(chosen: list[Release], folder: str) -> None:
    """Judge those of some files that are here.

    Raises:
        ValueError: if one is not what it should be, or none is here.
    """
    here = [r for r in chosen if os.path.isfile(os.path.join(folder, r.file))]
    if not here:
        raise ValueError(f"--out {folder} has none of these files: leave out --check to get them")
    for release in here:
        check(release, folder)


def download(release: Release, folder: str, base_url: str, timeout: float) -> None:
    """Bring a file here if it is not, judge it, and remember it."""
    path = os.path.join(folder, release.file)
    if os.path.exists(path):
        check(release, folder)
        return
    remembered(folder)  # if that is damaged, say so before the long part
    part = Part(f"{path}.part")
    url = f"{base_url.rstrip('/')}/{urllib.parse.quote(release.file)}"
    with part.lock():
        try:
            fetch(url, part, timeout)
        except KeyboardInterrupt:
            print(f"stopped; run this again to go on from {part.size():,} bytes", flush=True)
            raise
        try:
            digest = verify(release, part.path, folder)
        except ValueError as error:
            part.leave(f"{path}.refused")
            problem = str(error).replace(part.path, f"{path}.refused")
            raise ValueError(f"{url} brought another file than expected: {problem}") from error
        part.leave(path)
    remember(release, digest, folder)


# --------------------------------------------------------------------------------------------
# The command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(MISTAKE_IN_FLAGS, f"{self.prog}: error: {message} (--help lists all flags)\n")


def read_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends the process with one line."""
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [NAME ...] [--list] [--check] [--out DIR] [--base_url URL]",
    )  # fmt: skip
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", help="a preset, a file, or all")
    add("--list", action="store_true", help="print what there is, and what is here")
    add("--check", action="store_true", help="judge files that are here; download nothing")
    add("--out", metavar="DIR", default=MODELS, help="folder of the files [%(default)s]")
    add("--base_url", metavar="URL", default=URL, help="where they come from [%(default)s]")
    add("--timeout", type=float, default=60.0, help="seconds without a byte [%(default)s]")
    args = parser.parse_args(argv)
    args.out = os.path.expanduser(args.out)
    if not args.names and not args.list:
        parser.error("NAME is missing: give a preset, a file, or all")
    if not re.match(r"https?://.", args.base_url):
        parser.error(f"--base_url {args.base_url} must begin with http:// or https://")
    if not 0 < args.timeout < 1e6:
        parser.error(f"--timeout {args.timeout} must be greater than 0")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"--out {args.out} is a file: give a folder")
    return args


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    args = read_command_line(argv)
    chosen = choose(args.names)
    if args.list:
        print_table(args.out)
        return
    if args.check:
        check_all(chosen, args.out)
        return
    checkpoints.make_folder(args.out)
    for release in chosen:
        download(release, args.out, args.base_url, args.timeout)


if __name__ == "__main__":
    run(main)
