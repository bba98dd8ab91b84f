"""Completing a command line with the flags that stand beside checkpoints.

No torch is imported here: a contradiction is told before anything is loaded or written.
"""

import argparse
import os
from dataclasses import fields
from typing import Any

from . import checkpoint_sets, checkpoints, config

KINDS = {  # what a checkpoint may be -> the groups of its flags
    "diffusion model": config.DIFFUSION_GROUPS,
    "upsampler": config.SUPER_RES_GROUPS,
    "classifier": config.CLASSIFIER_GROUPS,
}

# What a classifier and the model that it guides must have in common.
COMMON = (
    "image_size", "in_channels", "num_classes", "diffusion_steps", "noise_schedule",
    "rescale_timesteps",
)  # fmt: skip


def complete(args: argparse.Namespace, kind: str = "diffusion model") -> argparse.Namespace:
    """Fill in the flags that --model_path and, if given, --classifier_path were trained with.

    Args:
        args: the command line of a script that samples or scores, from `config.parse_flags`.
        kind: which of KINDS --model_path must be.

    Returns:
        a copy of `args`; to complete it again changes nothing.

    Raises:
        ValueError: if a file is missing or of another kind, a flag contradicts it, or flags do
            not go together.
    """
    saved = _read(args.model_path, "model_path", kind)
    args = adopt_flags(args, saved, args.model_path, *KINDS[kind])
    if getattr(args, "classifier_path", "") and args.classifier_scale:
        args = _adopt_classifier(args)
    conflict = config.find_conflict(vars(args))
    if conflict:
        raise ValueError(conflict)
    return args


def resume(args: argparse.Namespace, kind: str = "diffusion model") -> argparse.Namespace:
    """Find what a run goes on from or begins with, and fill in the flags of its network.

    Args:
        args: the command line of a script that trains, from `config.parse_flags`.
        kind: which of KINDS the script trains.

    Returns:
        a copy of `args`, in which `resume_checkpoint` is a file or "" and `resume_asked` what
        the user gave. Flags that fix the network may differ from those of `init_from`, since what
        does not fit is not taken over, but not from those of a run that goes on.

    Raises:
        ValueError: as `complete`, or if there is nothing to go on from.
    """
    args = argparse.Namespace(**vars(args), resume_asked=args.resume_checkpoint)
    log_dir = getattr(args, "log_dir", "") or os.environ.get("OPENAI_LOGDIR", "")
    args.resume_checkpoint = checkpoint_sets.resolve_resume(args.resume_asked, log_dir)
    init_from = getattr(args, "init_from", "")
    if args.resume_checkpoint and init_from and args.resume_asked != "auto":
        raise ValueError(
            f"--init_from {init_from} begins a new run and --resume_checkpoint "
            f"{args.resume_asked} goes on with an old one: give one of them"
        )
    found = {"resume_checkpoint": args.resume_checkpoint, "init_from": init_from}
    for flag, path in found.items():
        if path:
            saved = _read(path, flag, kind)
            args = adopt_flags(args, saved, path, *KINDS[kind], strict=flag != "init_from")
            break
    conflict = config.find_conflict(vars(args))
    if conflict:
        raise ValueError(conflict)
    return args


def _adopt_classifier(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the classifier's own flags, and check that it fits the model."""
    path = args.classifier_path
    saved = _read(path, "classifier_path", "classifier")
    if not args.class_cond and "num_classes" not in args.given:  # the model itself knows no classes
        args.num_classes = saved.get("num_classes", args.num_classes)
    for name in COMMON:
        mine = getattr(args, name)
        if saved.get(name, mine) != mine:
            raise ValueError(
                f"--classifier_path {path} was trained with --{name} {saved[name]}, but the model "
                f"of --model_path {args.model_path} has --{name} {mine}: use a classifier that "
                "was trained for this model"
            )
    return adopt_flags(args, saved, path, config.ClassifierConfig)


def _read(path: str, flag: str, kind: str) -> dict[str, Any]:
    """Return the flags beside checkpoint `path`, {} if there are none; it must be a `kind`."""
    if not checkpoints.exists(path):
        raise ValueError(f"--{flag} {path} does not exist: give a checkpoint file")
    saved = checkpoints.load_flags(path)
    if saved and checkpoints.kind_of(saved) != kind:
        raise ValueError(
            f"--{flag} {path} holds a {checkpoints.kind_of(saved)}: give a file with a {kind}"
        )
    declared = {f.name: f for group in KINDS[kind] for f in fields(group)}
    for name in declared.keys() & saved.keys():
        problem = _find_mistake(declared[name], saved[name])
        if problem:
            raise ValueError(f"{checkpoints.flags_path(path)}: {problem}; restore or remove it")
    return saved


def _find_mistake(f: Any, value: Any) -> str | None:
    """Say what is wrong with the value of a flag from a file, or return None."""
    whole_for_real = f.type is float and type(value) is int
    if type(value) is not f.type and not whole_for_real:
        return f"--{f.name} must be of type {f.type.__name__}, not {value!r}"
    return config.find_mistake(f, value)


def adopt_flags(
    args: argparse.Namespace,
    saved: dict[str, Any],
    path: str,
    *groups: type,
    strict: bool = True,
) -> argparse.Namespace:
    """Fill in the flags that a checkpoint was trained with.

    Args:
        args: the command line, from `config.parse_flags`.
        saved: flag -> value from the file beside the checkpoint.
        path: the checkpoint, for the message.
        groups: the groups that describe this kind of checkpoint.
        strict: False lets the user's values win.

    Returns:
        a copy of `args`; flags that the user did not give have the checkpoint's values.

    Raises:
        ValueError: if the user gave a flag that fixes the network another value.
    """
    fixed, merged = config.fixed_names(*groups), argparse.Namespace(**vars(args))
    for name in (name for name in config.defaults(*groups) if name in saved):
        mine, theirs = getattr(args, name), saved[name]
        if name not in args.given:
            setattr(merged, name, theirs)
        elif strict and name in fixed and _canonical(mine) != _canonical(theirs):
            raise ValueError(
                f"--{name} {mine} contradicts {path}, which was trained with --{name} {theirs}; "
                f"leave --{name} out"
            )
    return merged


def _canonical(value: Any) -> Any:
    """Make '16,8' and '16, 8' equal; everything else stays as it is."""
    return value.replace(" ", "") if isinstance(value, str) else value
