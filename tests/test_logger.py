"""Laws of guided_diffusion/logger.py."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import dist_util, log_outputs, logger


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Give each test an empty folder to work in, and no settings from outside."""
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist_util, "get_rank", lambda: 0)
    monkeypatch.setattr(logger._terminal, "values", {})
    monkeypatch.setattr(logger._terminal, "counts", {})
    monkeypatch.chdir(tmp_path)
    yield
    logger.reset()


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def dump(**kvs):
    logger.logkvs(kvs)
    return logger.dumpkvs()


def test_a_run_leaves_its_files_and_says_where(tmp_path, capsys):
    """configure() names the folder as an absolute path; text and numbers go to their files."""
    logger.configure("run", ["stdout", "log", "csv", "json"])
    logger.log("epoch", 3)
    dump(loss=0.25, step=100000, name="a")
    logger.reset()
    folder = tmp_path / "run"
    assert capsys.readouterr().out.startswith(f"Logging to {folder}\nepoch 3\n---")
    text = (folder / "log.txt").read_text()
    assert f"Logging to {folder}" in text and "| step | 100000 |" in text
    assert read_csv(folder / "progress.csv") == [["loss", "name", "step"], ["0.25", "a", "100000"]]
    assert json.loads((folder / "progress.json").read_text()) == dict(
        loss=0.25, name="a", step=100000
    )


def test_the_table_is_aligned():
    """Every line of a table is equally long, keys are sorted, long texts are cut."""
    table = log_outputs.format_table(
        {"step": 12, "b": 1 / 3, "A": float("nan"), "k" * 99: "v" * 99}
    )
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[1][:4] for line in lines[1:-1]] == ["A", "b", "kkkk", "step"]
    assert "0.3333" in table and "nan" in table and "..." in table


def test_csv_columns_may_grow(tmp_path):
    """A new key adds a column, empty in the rows before; a missing one leaves its field empty."""
    logger.configure(tmp_path, ["csv"])
    dump(b=1)
    dump(b=2, a=0.5)
    dump(c="x,y")
    assert read_csv("progress.csv") == [
        ["b", "a", "c"],
        ["1", "", ""],
        ["2", "0.5", ""],
        ["", "", "x,y"],
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_resumed_run_appends(tmp_path):
    """Files of an earlier run go on; its header stays in step, and half a row is dropped."""
    for step in range(2):
        logger.configure(tmp_path, ["log", "csv", "json"])
        logger.log(f"run {step}")
        dump(step=step, loss=1.5)
    logger.reset()
    with open("progress.csv", "a") as file:
        file.write("1.2")
    logger.configure(tmp_path, ["csv"])
    dump(acc=1, step=2)
    assert read_csv("progress.csv") == [
        ["loss", "step", "acc"],
        ["1.5", "0", ""],
        ["1.5", "1", ""],
        ["", "2", "1"],
    ]
    assert re.findall(r"run \d", Path("log.txt").read_text()) == ["run 0", "run 1"]
    assert len(Path("progress.json").read_text().splitlines()) == 2


def test_means_run_since_the_last_dump():
    """logkv_mean averages its calls since the last dump; logkv keeps the last value."""
    for value in (1, 2.0, np.float32(6)):
        logger.logkv_mean("mean", value)
        logger.logkv("last", value)
    assert logger.getkvs() == {"mean": 3.0, "last": 6.0}
    assert logger.dumpkvs() == {"mean": 3.0, "last": 6.0}
    assert logger.dumpkvs() == logger.getkvs() == {}
    logger.logkv_mean("mean", 5)
    assert logger.dumpkvs() == {"mean": 5.0}


def test_tensors_are_read_at_the_dump(monkeypatch):
    """No value is fetched from the device while logging, and later changes do not reach it."""
    value = torch.tensor(2.0, requires_grad=True)
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
            patch.setattr(torch.Tensor, name, lambda *_: pytest.fail("waited for the device"))
        logger.logkv("last", value)
        logger.logkv_mean("mean", value)
        logger.logkv_mean("mean", value * 3)
        logger.logkv_mean("half", torch.tensor(1.0, dtype=torch.bfloat16))
        logger.logkv_mean("half", torch.tensor(1 / 128, dtype=torch.bfloat16) / 4)
    with torch.no_grad():
        value.fill_(100)
    kvs = logger.dumpkvs()
    assert kvs == {"last": 2.0, "mean": 4.0, "half": (1 + 1 / 512) / 2}
    assert {type(number) for number in kvs.values()} == {float}


@pytest.mark.parametrize("value", [np.int64(7), np.array(7), torch.tensor(7), torch.tensor([7])])
def test_numbers_are_written_plainly(tmp_path, value):
    """Numpy and torch numbers look like Python's in every file."""
    logger.configure(tmp_path, ["csv", "json"])
    dump(x=value)
    assert read_csv("progress.csv")[1] == ["7"]
    assert Path("progress.json").read_text() == '{"x": 7}\n'


def test_levels_hide_lines(capsys):
    """Lines below the level are not shown; DISABLED shows none."""
    try:
        logger.debug("one")
        logger.info("two")
        logger.set_level(logger.ERROR)
        logger.warn("three")
        logger.error("four")
        logger.set_level(logger.DISABLED)
        logger.error("five")
        dump(x=1)
    finally:
        logger.set_level(logger.INFO)
    assert capsys.readouterr().out == "two\nfour\n"


def test_before_configure_there_is_the_terminal(tmp_path, capsys):
    """Logging needs no configure() and makes no file; get_dir() makes the default folder."""
    logger.log("hello")
    dump(x=1)
    assert "hello\n-" in capsys.readouterr().out and not list(tmp_path.iterdir())
    folder = Path(logger.get_dir())
    assert folder.is_absolute() and folder.parent == tmp_path / "logs" and folder.is_dir()
    assert re.fullmatch(r"\d{4}(-\d\d){5}(-\d+)?", folder.name)
    assert logger.get_current().dir == str(folder)


def test_dated_folders_are_not_shared():
    """Two runs that start in the same second get a folder each."""
    folders = set()
    for _ in range(3):
        logger.configure(format_strs=[])
        folders.add(logger.get_dir())
    assert len(folders) == 3


def test_the_environment_chooses_folder_and_formats(tmp_path, monkeypatch):
    """OPENAI_LOGDIR and OPENAI_LOG_FORMAT are honoured, ~ is expanded, arguments win."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_LOGDIR", "~/from/env")
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log, json")
    logger.configure()
    assert logger.get_dir() == str(tmp_path / "from" / "env")
    assert sorted(os.listdir(logger.get_dir())) == ["log.txt", "progress.json"]
    logger.configure("~/given", ["csv"], log_suffix="-x")
    assert os.listdir(tmp_path / "given") == ["progress-x.csv"]


def test_other_ranks_keep_off_the_terminal(tmp_path, monkeypatch, capsys):
    """A rank other than 0 writes log-rankNNN.txt and prints nothing, even if asked to."""
    monkeypatch.setattr(dist_util, "get_rank", lambda: 2)
    logger.log("early")
    logger.configure(tmp_path)
    logger.log("one")
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "stdout,csv")
    logger.configure(tmp_path)
    logger.log("two")
    assert capsys.readouterr().out == ""
    assert sorted(os.listdir(tmp_path)) == ["log-rank002.txt", "progress-rank002.csv"]
    assert "one" in Path("log-rank002.txt").read_text()


@pytest.mark.parametrize("bad", ["file", "file/below", "gs://bucket/x", "/dev/null/x"])
def test_a_bad_folder_is_named(tmp_path, bad):
    """A path that cannot be a folder is one line with the flag and the path."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"--log_dir '{bad}' .*") as caught:
        logger.configure(bad)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"] and logger.get_current() is logger._terminal


def test_a_dated_folder_that_cannot_be_made_names_the_flag(tmp_path):
    """Where ./logs cannot be made, the error offers --log_dir."""
    (tmp_path / "logs").write_text("")
    with pytest.raises(ValueError, match="--log_dir"):
        logger.configure()


def test_unknown_format_lists_the_names(tmp_path):
    """A misspelt format is an error that lists those that there are."""
    with pytest.raises(ValueError, match="'cvs'.*'csv'.*'tensorboard'"):
        logger.configure(tmp_path, ["cvs"])


def test_session_closes_its_files_on_an_error(tmp_path):
    """After a session the files are whole and closed and the logger before it is back."""
    outer = logger.get_current()
    with pytest.raises(KeyError), logger.session(tmp_path / "a"):
        file = logger.get_current().outputs[1].file
        logger.log("last words")
        with logger.scoped_configure(tmp_path / "b", ["log"]):
            logger.log("inner")
        logger.log("still here")
        raise KeyError
    assert logger.get_current() is outer and file.closed
    assert (tmp_path / "a" / "log.txt").read_text().endswith("last words\nstill here\n")
    assert "inner" in (tmp_path / "b" / "log.txt").read_text()


class FakeComm:
    """Two ranks of an mpi4py communicator, of which the other logged [(values, counts)]."""

    def __init__(self, rank, other):
        self.rank, self.other = rank, other

    def Get_rank(self):  # noqa: N802
        return self.rank

    def gather(self, mine, root):
        return [mine, self.other] if self.rank == root else None


def test_comm_averages_over_ranks(tmp_path):
    """With a communicator, means weigh every call of every rank; only rank 0 gets them."""
    other = ({"loss": 5.0, "step": 9, "rare": 2.0}, {"loss": 3, "rare": 1})
    for rank, expected in ((0, {"loss": 4.0, "step": 1, "rare": 2.0}), (1, {})):
        logger.configure(tmp_path, ["csv"], comm=FakeComm(rank, other))
        logger.logkv_mean("loss", 1.0)
        logger.logkv("step", 1)
        assert logger.dumpkvs() == expected


def test_tensorboard_writes_curves_over_step(tmp_path):
    """Numbers become curves over "step"; text is left out."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger.configure(tmp_path, ["tensorboard"])
    for step in (10, 20):
        dump(step=step, loss=step / 8, note="text")
    logger.reset()
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (10, 1.25),
        (20, 2.5),
    ]
    assert set(events.Tags()["scalars"]) == {"step", "loss"}


def test_missing_tensorboard_has_a_remedy(tmp_path, monkeypatch):
    """Without the package the error is one line that says what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        logger.configure(tmp_path, ["tensorboard"])


def test_logging_needs_no_torch(tmp_path):
    """The logger alone imports no torch, so that --help and small tools stay fast."""
    program = "from guided_diffusion import logger; logger.configure('.'); logger.logkv('a', 1); "
    program += "logger.dumpkvs(); import sys; assert 'torch' not in sys.modules"
    root = Path(logger.__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
