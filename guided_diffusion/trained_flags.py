"""Completing a command line with the flags that checkpoints were trained with.

They stand in the file beside a checkpoint; without one, in the table of a preset; else they are
inferred from its tensors. Only where tensors are read is torch imported: any other contradiction is
told before anything is loaded or written.
"""

import argparse
import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from . import checkpoint_sets, checkpoints, config, infer_flags, presets
from .infer_flags import KINDS

# What a classifier and the model that it guides must have in common.
COMMON = (
    "image_size", "in_channels", "num_classes", "diffusion_steps", "noise_schedule",
    "rescale_timesteps",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What is known of how a checkpoint was trained.

    Attributes:
        flags: flag -> value.
        certain: names of flags that a command line may not contradict.
        note: what was read from the tensors and what assumed, for the log; mostly empty.
    """

    flags: dict[str, Any]
    certain: Collection[str]
    note: str = ""


def complete(args: argparse.Namespace, kind: str = "diffusion model") -> argparse.Namespace:
    """Fill in the flags that --model_path and, if given, --classifier_path were trained with.

    Args:
        args: the command line of a script that samples or scores, from `config.parse_flags`.
        kind: which of KINDS --model_path must be.

    Returns:
        a copy of `args`, in which `notes` says, a line per checkpoint that has no flags file,
        what was read from its tensors and what assumed. To complete it again changes nothing.

    Raises:
        ValueError: if a file is missing or of another kind, a flag contradicts it, or flags do
            not go together.
    """
    is_guided = bool(getattr(args, "classifier_path", "") and args.classifier_scale)
    model = find_trained(args, "model_path", kind)
    if is_guided and model.note:  # of what was assumed, the classifier may know better
        classifier = find_trained(args, "classifier_path", "classifier")
        known = {name: classifier.flags[name] for name in COMMON if name in classifier.flags}
        likely = {name: value for name, value in known.items() if name in classifier.certain}
        model = find_trained(args, "model_path", kind, likely)
    args = adopt_flags(args, model, "model_path", *KINDS[kind])
    args.notes = [model.note] if model.note else []
    if is_guided:
        args = _adopt_classifier(args)
    if getattr(args, "guide_model_path", ""):
        args = _adopt_guide(args, kind)
    if getattr(args, "num_steps", 0) and "timestep_respacing" not in args.given:
        args.timestep_respacing = ""  # a preset's steps give way
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
        a copy of `args`, in which `resume_checkpoint` is a file or "", `resume_asked` what the
        user gave, and `notes` as in `complete`. Flags that fix the network may differ from those
        of `init_from`, since what does not fit is not taken over, but not from those of a run
        that goes on.

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
    args.notes = []
    flag = "resume_checkpoint" if args.resume_checkpoint else "init_from" if init_from else None
    if flag:
        trained = find_trained(args, flag, kind)
        args = adopt_flags(args, trained, flag, *KINDS[kind], strict=flag != "init_from")
        args.notes = [trained.note] if trained.note else []
    conflict = config.find_conflict(vars(args))
    if conflict:
        raise ValueError(conflict)
    return args


def _adopt_classifier(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the classifier's own flags, and check that it fits the model."""
    path, common = args.classifier_path, {name: getattr(args, name) for name in COMMON}
    trained = find_trained(args, "classifier_path", "classifier", likely=common)
    saved = trained.flags
    if not args.class_cond and "num_classes" not in args.given:  # the model itself knows no classes
        args.num_classes = saved.get("num_classes", args.num_classes)
    for name in COMMON:
        mine = getattr(args, name)
        if saved.get(name, mine) != mine:
            raise ValueError(
                f"--classifier_path {path} was trained with --{name} {saved[name]}, but the model "
                f"of --model_path {args.model_path} has --{name} {mine}: use a classifier that "
                "was trained for this model"
                + (_null_class_hint(mine, saved[name]) if name == "num_classes" else "")
            )
    args = adopt_flags(args, trained, "classifier_path", config.ClassifierConfig)
    args.notes = args.notes + ([trained.note] if trained.note else [])
    return args


def _adopt_guide(args: argparse.Namespace, kind: str) -> argparse.Namespace:
    """Find the flags of the weaker network, and check that it can stand in for the model.

    Returns:
        a copy of `args` with `guide_kind` and `guide_flags`, which build that network.
    """
    groups, path = KINDS[kind], args.guide_model_path
    mine = {name: getattr(args, name) for name in config.defaults(*groups)}
    # Of a file without flags it is not known either whether its last class is the null class.
    blank = argparse.Namespace(**vars(args) | {"given": {"label_dropout"}, "preset": ""})
    trained = find_trained(blank, "guide_model_path", kind, likely=mine)
    flags = config.defaults(*groups) | {"label_dropout": mine["label_dropout"]} | trained.flags
    sizes = ("large_size", "small_size") if kind == "upsampler" else ("image_size",)
    alike = {*COMMON, "class_cond", "predict_xstart"} - {"image_size"} | {*sizes}
    alike -= {"num_classes"} if not args.class_cond else set()
    wrong = [f"{n} {_shown(flags[n])} there, {_shown(mine[n])} here" for n in sorted(alike)
             if flags[n] != mine[n]]  # fmt: skip
    if wrong:
        raise ValueError(
            f"--guide_model_path {path} is of another kind than --model_path ({'; '.join(wrong)}): "
            "use a weaker network, such as an early checkpoint, of the same training"
        )
    flags = {name: flags[name] for name in mine} | {"timestep_respacing": ""}
    notes = args.notes + ([trained.note] if trained.note else [])
    return argparse.Namespace(
        **vars(args) | {"notes": notes, "guide_kind": kind, "guide_flags": flags}
    )


def adopt_flags(
    args: argparse.Namespace, trained: Trained, flag: str, *groups: type, strict: bool = True
) -> argparse.Namespace:
    """Fill in the flags that a checkpoint was trained with.

    Args:
        args: the command line, from `config.parse_flags`.
        trained: what is known of the checkpoint.
        flag: the flag that names the checkpoint, for the message.
        groups: the groups that describe this kind of checkpoint.
        strict: False lets the user's values win.

    Returns:
        a copy of `args`; flags that neither the user nor a preset set have the checkpoint's values.

    Raises:
        ValueError: if the user gave a flag that fixes the network another value.
    """
    merged, preset = argparse.Namespace(**vars(args)), _preset(args)
    names = [name for name in config.defaults(*groups) if name in trained.flags]
    for name in names:
        if name not in args.given and not (preset and name in preset.sampling):
            setattr(merged, name, trained.flags[name])
    mine = {name: getattr(args, name) for name in names if name in args.given}
    network = vars(args) | trained.flags
    wrong = [n for n in infer_flags.departures(network, mine) if n in trained.certain]
    if strict and wrong:
        told = [
            f"{name}: the checkpoint has {_shown(network[name])}, the command line says "
            f"{_shown(mine[name])}"
            for name in wrong
        ]
        remedy = f"leave {', '.join(f'--{name}' for name in wrong)} out"
        if "num_classes" in wrong:
            remedy += _null_class_hint(network["num_classes"], args.num_classes)
        raise ValueError(f"--{flag} {getattr(args, flag)}: {'; '.join(told)}: {remedy}")
    return merged


def _null_class_hint(theirs: int, mine: int) -> str:
    """Return a further remedy where a network may have a null class that nobody spoke of."""
    if theirs != mine + 1:
        return ""
    return ", or give --label_dropout 0.1 if its last class is the null class of such a training"


def _shown(value: Any) -> str:
    return '""' if value == "" else str(value)


# --------------------------------------------------------------------------------------------
# Where the flags of a checkpoint stand


def find_trained(
    args: argparse.Namespace, flag: str, kind: str, likely: dict[str, Any] | None = None
) -> Trained:
    """Find out how the checkpoint that `flag` names was trained; it must be a `kind`.

    Args:
        args: the command line.
        flag: model_path, classifier_path, guide_model_path, resume_checkpoint or init_from.
        kind: a key of KINDS.
        likely: values to assume, rather than the defaults, for what tensors do not show.

    Raises:
        ValueError: if there is no such file, or it is of another kind or damaged.
    """
    path, preset = getattr(args, flag), _preset(args)
    if not checkpoints.exists(path):
        raise ValueError(f"--{flag} {path} does not exist: give a checkpoint file")
    saved = checkpoints.load_flags(path)
    if saved:
        _require_kind(checkpoints.kind_of(saved), kind, flag, path)
        _check_values(saved, kind, checkpoints.flags_path(path))
        return Trained(saved, config.fixed_names(*KINDS[kind]))
    if preset and kind in preset.network:
        network = whole_network(preset.network[kind], kind)
        given = {name: getattr(args, name) for name in args.given}
        if flag in given and not infer_flags.departures(network, given):
            _require_network(
                network, args.preset, kind, flag, path
            )  # it is not the preset's own file
        return Trained(network, network.keys())
    return _infer(args, flag, kind, likely or {})


def _preset(args: argparse.Namespace) -> presets.Preset | None:
    return presets.PRESETS.get(getattr(args, "preset", ""))


def _require_kind(found: str, kind: str, flag: str, path: str) -> None:
    """Raise a ValueError if a checkpoint is of another kind."""
    if found != kind:
        holds, wanted = f"{presets.article(found)} {found}", f"{presets.article(kind)} {kind}"
        raise ValueError(f"--{flag} {path} holds {holds}: give a file with {wanted}")


def _require_network(network: dict[str, Any], preset: str, kind: str, flag: str, path: str) -> None:
    """Raise a ValueError if the tensors of a checkpoint contradict the network of a preset."""
    found = _read_network(flag, path, {}, network)
    _require_kind(found.kind, kind, flag, path)
    shown = found.shown
    wrong = infer_flags.departures(network, shown)
    if wrong:
        told = [
            f"{n}: the file has {_shown(shown[n])}, the preset {_shown(network[n])}" for n in wrong
        ]
        raise ValueError(
            f"--{flag} {path} is not of --preset {preset} ({'; '.join(told)}): leave --preset out"
        )


def _check_values(saved: dict[str, Any], kind: str, file: str) -> None:
    """Raise a ValueError if a flags file has a value that no command line could have."""
    declared = {f.name: f for group in KINDS[kind] for f in fields(group)}
    for name in declared.keys() & saved.keys():
        problem = _find_mistake(declared[name], saved[name])
        if problem:
            raise ValueError(f"{file}: {problem}; restore or remove it")


def _find_mistake(f: Any, value: Any) -> str | None:
    """Say what is wrong with the value of a flag from a file, or return None."""
    whole_for_real = f.type is float and type(value) is int
    if type(value) is not f.type and not whole_for_real:
        return f"--{f.name} must be of type {f.type.__name__}, not {value!r}"
    return config.find_mistake(f, value)


def whole_network(network: dict[str, Any], kind: str) -> dict[str, Any]:
    """Complete the table of a preset with the defaults that fix a network and its process.

    The published commands give a classifier no process of its own, so it has that of the model.
    """
    groups = [
        g for g in KINDS[kind] if not (kind == "classifier" and g is config.DiffusionConfig)
    ]  # fmt: skip
    fixed = config.fixed_names(*groups)
    return {n: v for n, v in config.defaults(*groups).items() if n in fixed} | network


class ForeignNetwork(ValueError):
    """A checkpoint holds weights, but of no network of this project."""


def _read_network(flag: str, path: str, *more: dict[str, Any]) -> infer_flags.Inferred:
    """Infer the flags of a checkpoint from its tensors; `more` goes to `infer_flags.infer`."""
    shapes = read_shapes(path)
    try:
        return infer_flags.infer(shapes, *more)
    except ValueError as error:
        remedy = "give a checkpoint of these scripts, or of the published ones"
        raise ForeignNetwork(f"--{flag} {path} holds weights, but {error}: {remedy}") from error


def _infer(args: argparse.Namespace, flag: str, kind: str, likely: dict[str, Any]) -> Trained:
    """Infer flags from the tensors of a checkpoint, and from its name if that is a released one."""
    path = getattr(args, flag)
    shapes = read_shapes(path)
    try:
        found = _read_network(flag, path)
    except ForeignNetwork:
        if flag == "init_from":  # which takes what fits
            return Trained({}, ())
        raise
    _require_kind(found.kind, kind, flag, path)
    why = "since weights do not show it"
    release = presets.by_file(path)
    if release and kind in release.network:
        whole = whole_network(release.network[kind], kind)
        if not infer_flags.departures(whole, infer_flags.infer(shapes, {}, whole).shown):
            likely, why = likely | whole, "from its name"
    given = {name: getattr(args, name) for name in args.given}
    found = infer_flags.infer(shapes, given, likely)
    return Trained(found.shown | found.assumed, found.shown.keys(), _note(path, found, given, why))


def _note(path: str, found: infer_flags.Inferred, given: dict[str, Any], why: str) -> str:
    """Say what was read from a checkpoint and what was assumed."""
    read = {name: value for name, value in found.shown.items() if name not in given}
    parts = [
        f"{lead}: {', '.join(f'{name} {_shown(value)}' for name, value in flags.items())}"
        for lead, flags in [("read from its weights", read), (f"assumed, {why}", found.assumed)]
        if flags
    ]
    if found.assumed:
        parts.append("give those that differ")
    return f"{path} has no flags file: {'; '.join(parts)}" if parts else ""


def read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint, by name.

    Raises:
        ValueError: if the file cannot be read or holds anything but tensors.
    """
    tensors = checkpoints.read_tensors(path, mmap=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def settle_precision(args: argparse.Namespace, device: str) -> list[str]:
    """Leave a preset's float16 on a CPU, which is slow at it, unless the user asked for it.

    Args:
        args: the completed command line, which is changed.
        device: "cpu", "cuda:0" and so on.

    Returns:
        a line for the log for each flag that is changed.
    """
    preset = _preset(args)
    if preset is None or device != "cpu":
        return []
    told = []
    for name in ("use_fp16", "classifier_use_fp16"):
        if getattr(args, name, False) and name not in args.given:
            setattr(args, name, False)
            told.append(f"--{name} of the preset is for GPUs: computing in float32")
    return told
