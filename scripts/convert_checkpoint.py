"""Write the weights of a checkpoint as .safetensors or .pt: convert_checkpoint.py SOURCE TARGET.

The endings tell the formats; .pt to .pt renews a file of an old torch. Names, order, types and
values of the tensors stay, and the flags and class names beside the source go along.
"""

import os

from guided_diffusion import checkpoints, config


def find_companions(source: str, target: str) -> dict[str, bytes]:
    """Return what is to be written beside the target: path -> content.

    Raises:
        ValueError: if the target, or a flags file with its name, is there already.
    """
    if os.path.exists(target):
        raise ValueError(f"--target {target} exists: choose another name, or remove it")
    names = {checkpoints.flags_path(source): checkpoints.flags_path(target)}
    here, there = (os.path.join(os.path.dirname(p), checkpoints.CLASSES) for p in (source, target))
    if not os.path.exists(there):
        names[here] = there
    contents = {
        copy: checkpoints.read_file(path) if checkpoints.exists(path) else None
        for path, copy in names.items()
    }
    for copy in filter(os.path.exists, [*contents]):
        if checkpoints.read_file(copy) != contents.pop(copy):
            raise ValueError(f"--target {target}: {copy} is of another checkpoint: rename one")
    return {copy: content for copy, content in contents.items() if content is not None}


def main(argv=None):
    """Read the flags and the source, and write the target and what goes beside it."""
    words = ("source", "target")
    args = config.parse_flags(__doc__, config.ConvertConfig, argv=argv, positional=words)
    companions = find_companions(args.source, args.target)
    if args.dry_run:
        print(f"--source {args.source}\n--target {args.target}\nwould write:")
        print("\n".join(map(os.path.abspath, [args.target, *companions])))
        return
    weights = checkpoints.read_tensors(args.source, mmap=True)
    checkpoints.make_folder(os.path.dirname(args.target) or ".")
    try:
        for path, content in companions.items():
            checkpoints.write_bytes(path, content)
        checkpoints.save(args.target, weights)
    except BaseException:  # flags without weights would be taken for those of another file
        for path in companions:
            checkpoints.remove(path)
        raise
    print(f"read {os.path.abspath(args.source)}: {len(weights)} tensors")
    for path in (args.target, *companions):
        print(f"wrote {os.path.abspath(path)}: {checkpoints.size_of(path):,} bytes")


if __name__ == "__main__":
    config.run(main)
