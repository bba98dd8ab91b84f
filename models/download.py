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
import json
import os
import re
import urllib.parse
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from guided_diffusion import checkpoints, downloads
from guided_diffusion.flag_parsing import MISTAKE_IN_FLAGS, run
from guided_diffusion.presets import MODELS, PRESETS, URL

CHECKSUMS = "checksums.json"

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
    wanted = downloads.Wanted(
        f"{base_url.rstrip('/')}/{urllib.parse.quote(release.file)}",
        timeout=timeout,
        remedy="give another --base_url",
        elsewhere="give another --out",
    )
    digest = downloads.download(wanted, path, lambda came: verify(release, came, folder))
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
    add(
        "--timeout",
        type=float,
        default=downloads.TIMEOUT,
        help="seconds without a byte [%(default)s]",
    )
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
    for release in chosen:
        download(release, args.out, args.base_url, args.timeout)


if __name__ == "__main__":
    run(main)
