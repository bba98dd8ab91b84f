"""Laws of guided_diffusion/heartbeat.py: stages, signs of life and the lines that name a cause."""

import json
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from guided_diffusion import heartbeat
from guided_diffusion import signs as signs_module
from guided_diffusion.heartbeat import Sign, explain, stage
from guided_diffusion.launchers import Launch


@pytest.fixture(autouse=True)
def no_stage(monkeypatch):
    """Start outside any stage, and leave no heartbeat behind."""
    monkeypatch.setattr(heartbeat, "_stages", [])
    monkeypatch.setattr(heartbeat, "_failed", [])
    yield
    heartbeat.stop()


def present_name():
    now = heartbeat._present()
    return now and now.name


def test_stages_nest():
    """The innermost stage counts, and leaving it returns to the one around it."""
    assert present_name() is None
    with stage("outside"):
        with stage("inside"):
            assert present_name() == "inside"
        assert present_name() == "outside"
    assert present_name() is None


def test_a_failed_stage_is_remembered():
    """After an error the stage is the innermost in which it rose, until another is entered."""
    with pytest.raises(KeyError), stage("outside"), stage("inside"):
        raise KeyError
    assert present_name() == "inside" and heartbeat._present().is_vain()
    with stage("later"):
        assert present_name() == "later"
    assert present_name() is None


def test_a_wait_is_named_as_the_stage_around_it():
    """A collective within a named stage waits under that name, else under its own."""
    assert heartbeat.waiting("a barrier").name == "a barrier"
    with stage("saving"):
        inner = heartbeat.waiting("a barrier")
    assert inner.name == "saving" and inner.waits


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("--lr is\n  wrong"), "--lr is wrong"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file", "a.pt"), "[Errno 2] No such file: 'a.pt'"),
        (KeyError("a"), None),
        (RuntimeError("size mismatch"), None),
        (KeyboardInterrupt(), None),
        (SystemExit(1), None),
    ],
)
def test_errors_for_people_are_one_line(error, line):
    """Mistakes of people become one line; those of programmers keep their traceback."""
    assert explain(error) == line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        RuntimeError("can't allocate memory: you tried\nto"),
    ],
)
def test_lack_of_memory_has_remedies(error):
    """The line says what was lacking, and names the flags that need less of it."""
    line = explain(error)
    assert line.startswith(f"out of memory ({str(error).splitlines()[0]}): use a smaller")
    for name in ("--batch_size", "--microbatch", "--use_checkpoint True", "--use_bf16 True"):
        assert name in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/a/gloo/pair.cc:5] Connection closed by peer. Check the logs of the other"),
        dist.DistBackendError("Connection closed by peer"),
        dist.DistStoreError("Connection closed by peer"),
    ],
)
def test_errors_between_ranks_name_the_stage(error):
    """Also where setup_dist() did not make the group, and no heart beats."""
    with pytest.raises(RuntimeError), stage("averaging gradients"):
        raise error
    assert explain(error) == "Connection closed by peer, in stage 'averaging gradients' for 0 s"


@pytest.mark.parametrize(
    "error, printed",
    [
        (KeyboardInterrupt(), ""),
        (SystemExit(3), ""),
        (SystemExit("no images"), "error: no images\n"),
        (ValueError("--lr is\nwrong"), "error: --lr is wrong\n"),
    ],
)
def test_what_a_failing_rank_prints(capsys, error, printed):
    """One line for people's mistakes, nothing where someone wanted the end."""
    heartbeat.report_error(error, rank=0)
    assert capsys.readouterr().err == printed


def test_the_traceback_is_shown_for_programmers(capsys, monkeypatch):
    """A programmer's error is shown whole, and a mistake of people too where asked for."""
    heartbeat.report_error(KeyError("a"), rank=0)
    assert capsys.readouterr().err == "KeyError: 'a'\n"
    monkeypatch.setenv("GUIDED_DIFFUSION_TRACEBACK", "1")
    heartbeat.report_error(ValueError("--lr is wrong"), rank=0)
    assert capsys.readouterr().err == "ValueError: --lr is wrong\nerror: --lr is wrong\n"


def make_sign(**said):
    """What rank 1 told, just now unless said otherwise."""
    heard = time.monotonic() - said.pop("silence", 0)
    usual = {"beat": 1, "host": "node1", "stage": "a", "age": 3, "waits": True, "last_words": None}
    return Sign(usual | said, heard)


ONGOING = "rank 1 on node1 is still in stage {}, for 3 s"


@pytest.mark.parametrize(
    "said, cause",
    [
        ({}, None),
        ({"waits": False}, ONGOING.format("'a'")),
        ({"stage": "b"}, ONGOING.format("'b'")),
        ({"stage": None, "age": None, "waits": False}, "rank 1 on node1 is busy outside any stage"),
    ],
)
def test_late_ranks(said, cause):
    """A rank is late unless it waits where this one waits, as far as names can tell."""
    assert heartbeat.name_late(1, make_sign(**said), "a") == cause


def test_silent_ranks():
    """Silence names a rank, unless it took its leave."""
    silent = "rank 1 on node1 has been silent for 12 s, last seen "
    assert heartbeat.name_silent(1, make_sign(silence=12)) == silent + "in stage 'a'"
    assert (
        heartbeat.name_silent(1, make_sign(silence=12, stage=None)) == silent + "outside any stage"
    )
    assert heartbeat.name_silent(1, make_sign(silence=12, last_words="")) is None
    assert heartbeat.name_silent(1, make_sign()) is None


@pytest.fixture
def beating(monkeypatch):
    """A fast heartbeat of rank 0 of three, and a function that tells a sign for another rank."""
    for module in (heartbeat, signs_module):
        monkeypatch.setattr(module, "BEAT", 0.05)
        monkeypatch.setattr(module, "SILENCE", 0.5)
    minute = timedelta(minutes=1)
    server = dist.TCPStore("localhost", 0, None, True, minute, wait_for_workers=False)
    signs = dist.PrefixStore("guided_diffusion/heartbeat/0", server)
    pulse = heartbeat.start(Launch("env", 0, 3), timeout=60)
    pulse.connect(server)
    yield pulse, lambda rank, sign: signs.set(str(rank), json.dumps(sign.said)), signs


@pytest.mark.parametrize(
    "words, cause",
    [
        ("--lr is wrong", "rank 2 on node1 ended: --lr is wrong; rank 0 waited in stage 'a'"),
        ("", "rank 1 on node1 has been silent for"),  # rank 2 was itself a victim
    ],
)
def test_the_first_cause_is_named(beating, words, cause):
    """A rank that told why it ended comes before those that are silent since."""
    _, tell, _ = beating
    tell(1, make_sign())
    tell(2, make_sign(last_words=words))
    with pytest.raises(dist.DistError), stage("a", waits=True):
        raise dist.DistStoreError("wait timeout")
    line = explain(dist.DistStoreError("wait timeout"))
    assert line.startswith(cause) and line.endswith("(wait timeout)")
    assert words or "rank 2" not in line


def test_a_rank_that_never_came_is_named(beating):
    """A rank without any sign of life has not come."""
    pulse, tell, _ = beating
    tell(1, make_sign(waits=False))
    with stage("a", waits=True):
        assert pulse.name_cause("x").startswith("rank 2 has not come; rank 0 waited in stage 'a'")


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("--lr is wrong"), "--lr is wrong"),
        (KeyError("a"), "KeyError 'a'"),
        (dist.DistStoreError("wait timeout"), ""),
    ],
)
def test_last_words(beating, error, words):
    """A failing rank tells why and that the job is over; one that waited in vain blames no one."""
    _, tell, signs = beating
    tell(1, make_sign(last_words="disk full"))
    heartbeat.report_error(error, rank=0)
    assert json.loads(signs.get("0"))["last_words"] == words
    assert signs.get("over") == b"error"


def test_an_error_outside_any_stage_is_explained(beating):
    """Programs that name no stage learn at least what the other ranks did."""
    _, tell, _ = beating
    tell(1, make_sign(stage="saving", waits=False, silence=0))
    tell(2, make_sign(last_words="it is over"))
    line = explain(RuntimeError("gloo: Connection closed by peer"))
    assert line.startswith("rank 2 on node1 ended: it is over; rank 0 waited outside any stage")


def test_a_rank_tells_its_stage_and_its_end(beating):
    """The sign of life holds the present stage; the last one, why the rank went."""
    pulse, _, signs = beating

    def wait_for(name, value):
        deadline = time.monotonic() + 10
        while json.loads(signs.get("0"))[name] != value:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    with stage("reading"):
        wait_for("stage", "reading")
    wait_for("stage", None)
    heartbeat.stop()
    wait_for("last_words", "its program was over")
    assert not any(thread.is_alive() for thread in pulse._threads)
