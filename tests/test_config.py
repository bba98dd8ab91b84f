"""Laws of guided_diffusion/config.py and flag_checks.py: every flag, declared once."""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripting import SCRIPTS, load_script

from guided_diffusion import config, flag_checks, flag_parsing, resample, schedules

FLAGS = json.loads((Path(__file__).parent / "reference" / "flags.json").read_text())
TYPES = {"str2bool": bool, "int": int, "float": float, "str": str}
GIVEN = [(script, flag) for script in FLAGS for flag in FLAGS[script]]


class Captured(Exception):
    """Carries what a script hands to parse_flags."""


@pytest.fixture
def declared(monkeypatch):
    """Return a function: script name -> (groups, overrides) that it hands to parse_flags."""

    def capture(description, *groups, argv=None, overrides=None, positional=()):
        raise Captured(description, groups, overrides or {})

    def ask(script):
        with monkeypatch.context() as patch:
            patch.setattr(config, "parse_flags", capture)
            with pytest.raises(Captured) as caught:
                load_script(script).main([])
        return caught.value.args[1:]

    return ask


def lenient(groups):
    """Return copies of the groups in which nothing is required or checked."""
    return [
        dataclasses.make_dataclass(
            group.__name__,
            [(f.name, f.type, config.flag(f.default, f.metadata["help"])) for f in fields],
            namespace={"__doc__": group.__doc__},
        )
        for group in groups
        for fields in [dataclasses.fields(group)]
    ]


@pytest.mark.parametrize("script", FLAGS)
def test_published_flags_have_their_defaults_and_types(script, declared):
    """Each script takes every published flag, of the published type and with its default."""
    groups, overrides = declared(script.removesuffix(".py"))
    args = config.parse_flags("", *lenient(groups), argv=[], overrides=overrides)
    for flag, published in FLAGS[script].items():
        value = getattr(args, flag[2:])
        assert value == published["default"], flag
        assert type(value) is TYPES[published["type"]], flag


@pytest.mark.parametrize("script", FLAGS)
def test_published_flags_are_read_from_the_command_line(script, declared):
    """Each published flag, given with another value, has that value."""
    groups, overrides = declared(script.removesuffix(".py"))
    other = {bool: "True", int: "3", float: "0.25", str: "x"}
    argv = []
    for flag, published in FLAGS[script].items():
        kind = TYPES[published["type"]]
        argv += [flag, str(not published["default"]) if kind is bool else other[kind]]
    args = config.parse_flags("", *lenient(groups), argv=argv, overrides=overrides)
    for flag, text in zip(argv[::2], argv[1::2], strict=True):
        assert str(getattr(args, flag[2:])) == text
    assert args.given == {flag[2:] for flag in FLAGS[script]}


def test_there_are_seven_scripts():
    """Every published script is here."""
    assert {f"{name}.py" for name in SCRIPTS} >= set(FLAGS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_torch_and_explains_each_flag(script, declared, tmp_path):
    """--help needs neither torch nor numpy, and shows each flag with its help in a group."""
    program = (
        "import sys, runpy\nsys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print('LOADED', end.code, *sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(SCRIPTS[script]), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    shown, loaded = done.stdout.split("LOADED")
    assert loaded.split()[0] == "0" and not {"torch", "numpy", "PIL"} & set(loaded.split())
    words = " ".join(shown.split())
    for group in declared(script)[0]:
        assert group.__doc__.rstrip(".") + ":" in words
        for f in dataclasses.fields(group):
            assert f"--{f.name} " in words
            assert f.metadata["help"] in words, f.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_declares_a_flag_twice(script, declared):
    """The groups of a script share no flag, and its overrides name flags that it has."""
    groups, overrides = declared(script)
    names = [f.name for group in groups for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))
    assert overrides.keys() <= set(names)


@pytest.mark.parametrize("f", config.all_fields(), ids=lambda f: f.name)
def test_each_default_passes_its_own_check(f):
    """A default has the type of its flag, and only a required one is a mistake."""
    assert type(f.default) is f.type
    assert f.metadata["help"]
    mistake = config.find_mistake(f, f.default)
    assert bool(mistake) == f.metadata["required"], mistake


@pytest.mark.parametrize(
    "name, table",
    [
        ("noise_schedule", schedules.SCHEDULES),
        ("schedule_sampler", resample.SCHEDULE_SAMPLERS),
    ],
)
def test_a_flag_accepts_the_names_of_its_table(name, table):
    """What can be built by name can be asked for on the command line, and nothing else."""
    fields = [f for f in config.all_fields() if f.name == name]
    assert fields
    for f in fields:
        listed = f.metadata["check"]("").removeprefix("must be one of ").split(", ")
        assert sorted(listed) == sorted(table)
        assert [config.find_mistake(f, known) for known in table] == [None] * len(table)


@pytest.mark.parametrize("text", ["yes", "True", "t", "Y", "1"])
def test_true_has_five_spellings(text):
    """Case does not matter."""
    assert config.str2bool(text) is True and config.str2bool(True) is True


@pytest.mark.parametrize("text", ["no", "False", "f", "N", "0"])
def test_false_has_five_spellings(text):
    """Case does not matter."""
    assert config.str2bool(text) is False and config.str2bool(False) is False


def test_other_spellings_are_an_argparse_error():
    """A published program catches argparse.ArgumentTypeError."""
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        config.str2bool("maybe")


def test_flags_are_never_abbreviated():
    """--num_sam is no flag: a new flag would make it ambiguous."""
    with pytest.raises(SystemExit):
        config.parse_flags("", config.BatchConfig, argv=["--batch", "3"])


@dataclasses.dataclass(frozen=True)
class Words:
    """Flags of which two may stand without their names."""

    source: str = config.flag("", "whence", required=True)
    copies: int = config.flag(1, "how many", check=flag_checks.at_least(1))
    offset: float = config.flag(0.0, "how far")
    label: str = config.flag("", "what it is called")


WORDS = ["a.npz", "--offset -3", "--label=x", "2"]
LINES = [
    " ".join(line)
    for line in itertools.permutations(WORDS)
    if line.index("2") > line.index("a.npz")
]


@pytest.mark.parametrize(
    "line", [*LINES, "--offset -3 --label x -- a.npz 2", "2 --label x --source a.npz --offset=-3"]
)
def test_values_without_names_may_stand_anywhere(line):
    """Between flags and around them; their own order tells which is whose."""
    args = config.parse_flags("", Words, argv=line.split(), positional=("source", "copies"))
    assert (args.source, args.copies, args.offset, args.label) == ("a.npz", 2, -3, "x")
    assert args.given == {"source", "copies", "offset", "label"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --label x 2 c", "unrecognized arguments: c"),
        ("--label x a b", "--copies: invalid int value: 'b'"),
        ("--source a 2 c", "unrecognized arguments: c"),
        ("a --label x 0", "--copies 0 must be at least 1"),
        ("--label x", "--source is missing"),
        ("a 2 --label", "--label: expected one argument"),
        ("a --lable x", "unrecognized arguments: --lable"),
    ],
)
def test_values_without_names_are_checked_as_those_with(line, words, capsys):
    """One line that says what is wrong."""
    with pytest.raises(SystemExit):
        config.parse_flags("", Words, argv=line.split(), positional=("source", "copies"))
    found = capsys.readouterr().err
    assert words in found and found.count("\n") == 1


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (flag_checks.at_least(1), [1, 2], [0, -1, float("nan")]),
        (flag_checks.above(0), [0.1], [0, -1, float("nan")]),
        (flag_checks.above(0, most=10), [0.1, 10], [0, 11, float("nan")]),
        (flag_checks.count(9), [1, 9], [0, -1, 10]),
        (flag_checks.count(9, least=-1), [-1, 9], [-2, 10]),
        (flag_checks.between(-1, 3), [-1, 3], [-2, 4]),
        (flag_checks.fraction, [0, 0.5], [1, -0.1, float("nan")]),
        (flag_checks.one_of("a", "b"), ["a"], ["c", ""]),
        (flag_checks.count_or_unset, [-1, 1], [0, -2]),
        (flag_checks.list_of(int, "1,2"), ["", "16,8", "16, 8"], ["16,", "0", "-1", "1.5", "a"]),
        (flag_checks.list_of(float, "1,2"), ["0.5,1"], ["nan", "inf", ",", "0.5;1"]),
        (flag_checks.ema_rates, ["", "0.9", "0.9,0.99"], ["1.1", "-0.1", "nan", "a", "0.9,"]),
        (flag_checks.label_source, ["filename", "folder"], ["", "names", "x.txt", "missing.csv"]),
        (flag_checks.class_list, ["", "0", "207,360", "otter, 2"], ["-1", "1,", ",", " ", "2,-30"]),
        (flag_checks.respacing, ["", "250", "10,20", "ddim25"], ["ddim", "fast", "-5", "1.5"]),
        (flag_checks.device_name, ["", "cpu", "cuda", "cuda:3", "mps"], ["gpu", "cuda:", "cpu:0"]),
    ],
)
def test_checks_accept_the_good_and_explain_the_bad(check, good, bad):
    """A check returns None, or a phrase that says what a good value is."""
    assert [check(value) for value in good] == [None] * len(good)
    assert all(isinstance(check(value), str) for value in bad), bad


def test_paths_are_checked(tmp_path):
    """Input files and folders must exist, and the output folder must be possible."""
    file = tmp_path / "file"
    file.touch()
    missing, folder = str(tmp_path / "missing"), str(tmp_path)
    for check in (flag_checks.checkpoint_file, flag_checks.npz_file):
        assert check("") is check(str(file)) is check("gs://bucket/file") is None
        assert "folder" in check(folder) and "exist" in check(missing)
    assert flag_checks.image_source(folder) is flag_checks.image_source("gs://x/y") is None
    assert "zip" in flag_checks.image_source(str(file))
    assert "exist" in flag_checks.image_source(missing)
    for given in ("", "auto", folder, str(file), "gs://bucket/run"):
        assert flag_checks.checkpoint_source(given) is None
    assert "exist" in flag_checks.checkpoint_source(missing)
    assert flag_checks.output_folder("") is flag_checks.output_folder(missing + "/a/b") is None
    assert "file" in flag_checks.output_folder(str(file))
    assert "file" in flag_checks.output_folder(f"{file}/below")
    assert "local" in flag_checks.output_folder("gs://bucket/logs")


def be_rank_1(monkeypatch):
    """Let a launcher have started this process; return the list of its naps."""
    launch = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    waited = []
    monkeypatch.setattr(flag_parsing.time, "sleep", waited.append)
    return waited


def test_a_mistake_in_the_flags_is_told_once(monkeypatch, capsys):
    """All ranks have the same flags: rank 0 tells the mistake, the others end without a word."""
    waited = be_rank_1(monkeypatch)
    with pytest.raises(SystemExit) as end:
        config.parse_flags("", config.BatchConfig, argv=["--batch_size", "0"])
    assert waited and end.value.code == 2 and capsys.readouterr().err == ""


def test_the_error_of_another_rank_says_which(monkeypatch, capsys):
    """Any other error may be of one rank alone, which names itself if it is not ended before."""

    def main():
        raise ValueError("no such disk")

    waited = be_rank_1(monkeypatch)
    with pytest.raises(SystemExit):
        config.run(main)
    assert waited and "rank 1: error: no such disk" in capsys.readouterr().err


def test_run_shows_the_traceback_on_request(monkeypatch):
    """GUIDED_DIFFUSION_TRACEBACK lets the error through."""

    def main():
        raise ValueError("two\nlines")

    monkeypatch.setenv("GUIDED_DIFFUSION_TRACEBACK", "1")
    with pytest.raises(ValueError):
        config.run(main)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("64 GiB\nmore"),
        RuntimeError("can't allocate memory: 9 bytes"),
        MemoryError("Unable to allocate 9 GiB"),
    ],
)
def test_run_says_what_to_do_without_memory(error, capsys):
    """Too large a batch ends in one line that names the flags to change."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        config.run(main)
    told = capsys.readouterr().err
    assert end.value.code == 1 and told.count("\n") == 1
    assert all(
        word in told for word in ("out of memory", "--microbatch", "--use_checkpoint", "--use_bf16")
    )


def test_run_lets_other_errors_through():
    """A bug shows its traceback."""

    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        config.run(main)


def test_run_joins_the_lines_of_an_error(monkeypatch, capsys):
    """Whatever an error says, it is one line on stderr."""

    def main():
        raise ValueError("two\nlines")

    monkeypatch.delenv("GUIDED_DIFFUSION_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        config.run(main)
    assert end.value.code == 1
    assert capsys.readouterr().err.endswith("error: two lines\n")
