"""Who is in which stage: what it takes to say which rank a job failed on, and in which stage.

`stage()` names what this process does. In a job of several ranks each one tells the others its
stage about once a second, through the store by which they met, over a connection of its own. When
a rank waits for the others in vain, `explain()` names those who let it wait. A wait that does not
even fail is ended from outside. Importing this module costs no import of torch.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from .launchers import GRACE, Launch, abort, first_line
from .signs import BEAT, SILENCE, TOO_SILENT, Sign, name_failed, name_late, name_silent

LESS_MEMORY = (
    "use a smaller --batch_size or, in training, a smaller --microbatch, --use_checkpoint True, "
    "--use_bf16 True"
)
# What gloo and nccl write into a RuntimeError, unlike the store, which has errors of its own.
BETWEEN_RANKS = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out waiting", re.I)

_stages: list[Stage] = []  # entered and not left, the innermost last
_failed: list[Stage] = []  # the one that an error left first; empty once another is entered
_pulse: list[Heartbeat] = []  # of this process, if it is in a job of several ranks


class Stage:
    """What the main thread does between entering and leaving this context."""

    __slots__ = ("name", "since", "until", "waits")

    def __init__(self, name: str, waits: bool = False):
        self.name = name
        self.waits = waits
        self.since = self.until = None

    def __enter__(self) -> Stage:
        self.since = time.monotonic()
        _failed.clear()
        _stages.append(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        _stages.pop()
        if error is not None and not _failed:
            self.until = time.monotonic()
            _failed.append(self)

    def is_vain(self) -> bool:
        """Tell whether this rank waits here, or failed here: then others are the cause."""
        return self.waits or self.until is not None

    def age(self) -> float:
        """Return for how many seconds this stage has gone on, or went on until it failed."""
        return (self.until or time.monotonic()) - self.since


def stage(name: str, waits: bool = False) -> Stage:
    """Name what the main thread does in a `with` block, for the errors of this and other ranks.

    Args:
        name: completes "in stage ...", such as "averaging gradients".
        waits: True if the block does nothing but wait for other ranks. It then ends the job
            when it takes much longer than the timeout of the job.
    """
    return Stage(name, waits)


def waiting(name: str) -> Stage:
    """Return a stage that waits, named as the present one or else as told."""
    return Stage(_stages[-1].name if _stages else name, waits=True)


def _present() -> Stage | None:
    """Return the stage of the main thread: the innermost, or the one in which it failed."""
    for top in (_stages[-1:], _failed[-1:]):  # slices: the main thread may leave meanwhile
        if top:
            return top[0]
    return None


# Telling and hearing


class Heartbeat:
    """Tells the other ranks what this one does, and hears them when it has to wait.

    Two threads: one talks to the store and may be stuck with it; the other watches the main
    thread, and needs nobody's answer to end the process.
    """

    def __init__(self, launch: Launch, timeout: float):
        self.launch = launch
        self.timeout = timeout
        self.store = None
        self.answered = time.monotonic()  # when the store last did
        self.signs: dict[int, Sign] = {}
        self.listening: float | None = None  # since when
        self.num_beats = 0
        self.last_words: str | None = None
        self.failed = self.server_left = self.asked = self.listens = False
        self.job_over: float | None = None  # since when this rank knows
        self._parent = os.getppid()
        self._stop, self._wake, self._told = (threading.Event() for _ in range(3))
        self._threads = [self._start(self._watch)]

    def _start(self, loop: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=loop, name="heartbeat", daemon=True)
        thread.start()
        return thread

    def connect(self, store: Any) -> None:
        """Begin to beat, over another connection to the server of this TCPStore."""
        import torch.distributed as dist

        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        seconds = timedelta(seconds=max(5.0, self.timeout))
        own = dist.TCPStore(store.host, store.port, None, False, seconds, wait_for_workers=False)
        self.store = dist.PrefixStore(f"guided_diffusion/heartbeat/{attempt}", own)
        self._threads.append(self._start(self._beat))

    def stop(self) -> None:
        """End the threads, before the store or the interpreter goes away."""
        self._stop.set()
        self._wake.set()
        # Patiently: a thread that still talks to the store when Python ends aborts the process.
        for thread in self._threads:
            thread.join(timeout=15 * BEAT)

    def say_last_words(self, words: str) -> None:
        """Tell the others that this rank ends the job, and why ("" if it is but a victim)."""
        self.last_words, self.failed = words, True
        if self.store is not None:
            self._wake.set()
            self._told.wait(BEAT)
        if self.launch.launcher == "slurm" and self.launch.rank == 0:
            time.sleep(2 * BEAT)  # srun may let the others live, and the store ends with this rank

    # The thread that talks to the store

    def _beat(self) -> None:
        """Tell, and hear, once a second; end with the store."""
        try:
            while not self._stop.is_set() and not self._server_leaves():
                self._tell()
                if self._wants_to_know():
                    self._listen()
                self._wake.wait(BEAT)
                self._wake.clear()
            self._leave()
        except RuntimeError:  # the server is gone, as `answered` will tell
            return

    def _server_leaves(self) -> bool:
        """Ask whether the job is over, and learn from the answer that the store lives."""
        over = self.store.get("over") if self.store.check(["over"]) else b""
        self.answered = time.monotonic()
        if over == b"error" and not self.failed and self.job_over is None:
            self.job_over = self.answered
        self.server_left = over == b"end"
        return self.server_left

    def _tell(self) -> None:
        """Give one sign of life."""
        now, self.num_beats = _present(), self.num_beats + 1
        said = {
            "beat": self.num_beats,
            "host": socket.gethostname(),
            "stage": now and now.name,
            "age": now and now.age(),
            "waits": now is not None and now.is_vain(),
            "last_words": self.last_words,
        }
        self.store.set(str(self.launch.rank), json.dumps(said))
        if self.failed:
            self.store.set("over", "error")
            self.store.check(["over"])  # answered only after the store took the lines above
            self._told.set()

    def _wants_to_know(self) -> bool:
        """Tell whether to hear the others: not before this rank has waited or failed."""
        now = _present()
        if (
            self.asked
            or self.listens
            or (now and now.is_vain() and (now.until or now.age() > BEAT))
        ):
            return True
        self.listening = None
        self.signs.clear()
        return False

    def _listen(self) -> None:
        """Read the last sign of each other rank."""
        for rank in map(str, range(self.launch.world_size)):
            if rank == str(self.launch.rank) or not self.store.check([rank]):
                continue
            said, old = json.loads(self.store.get(rank)), self.signs.get(int(rank))
            if old is None or old.said["beat"] != said["beat"]:
                self.signs[int(rank)] = Sign(said, time.monotonic())
        self.answered = time.monotonic()
        self.listening = self.listening or self.answered

    def _server(self) -> str:
        """Say who serves the store: torchrun does, where it is the launcher."""
        is_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return "torchrun" if is_agent and self.launch.launcher == "env" else "rank 0"

    def _leave(self) -> None:
        """Sign off; the rank that serves the store lets the others do so first."""
        if self.last_words is None:
            self.last_words = "its program was over"
        self._tell()
        gone = self.store.add("gone", 1)
        if self.launch.rank > 0 or self._server() != "rank 0" or self.failed:
            return
        self.store.set("over", "end")
        deadline = time.monotonic() + 2 * BEAT
        while gone < self.launch.world_size and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = self.store.add("gone", 0)

    # The thread that watches

    def _watch(self) -> None:
        """End the process if it waits far too long, or long after another rank ended the job.

        If the launcher is killed, torchrun's children live on; each gets the signal then that a
        launcher sends which is told to stop.
        """
        while not self._stop.wait(BEAT / 2):
            if os.getppid() != self._parent:
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            now = _present()
            too_long = now is not None and now.age() > self.timeout + GRACE
            if too_long and now.waits and now.until is None:
                self._end(self.name_cause("no answer"))
            if self.job_over is not None and time.monotonic() - self.job_over > 2 * GRACE:
                self._end("another rank ended the job, and this one went on")

    def _end(self, line: str) -> None:
        report(f"error: {line}", self.launch.rank)
        self.say_last_words("")
        abort(1)

    # What is known

    def name_cause(self, symptom: str) -> str:
        """Say in one line who let this rank wait, and in which stage it did."""
        self.asked = True
        self._hear_out()
        now = _present()
        mine = f"in stage {now.name!r} for {now.age():.0f} s" if now else "outside any stage"
        causes = self._find_causes()
        shown = "; ".join(causes[:4]) + (f"; and {len(causes) - 4} more" if causes[4:] else "")
        return f"{shown}; rank {self.launch.rank} waited {mine} ({symptom})"

    def _hear_out(self) -> None:
        """Wait until a silence would have been noticed, or a rank has told its last words."""
        self._wake.set()
        deadline = time.monotonic() + SILENCE + 2 * BEAT
        while self.store is not None and time.monotonic() < deadline:
            since = self.listening
            if self.server_left or self._store_is_lost():
                return
            told = any(sign.said["last_words"] for sign in list(self.signs.values()))
            if told or (since and time.monotonic() - since > SILENCE):
                return
            time.sleep(0.1)

    def _store_is_lost(self) -> bool:
        return time.monotonic() - self.answered > SILENCE

    def _find_causes(self) -> list[str]:
        """Name the ranks that are to blame: those that failed, else the silent, else the late."""
        if self.store is None:
            return ["some rank did not come"]
        if self.server_left:
            return ["rank 0 ended: its program was over"]
        if self._store_is_lost():
            silence = time.monotonic() - self.answered
            return [
                f"{self._server()}, which serves the store, cannot be reached for {silence:.0f} s"
            ]
        signs, now = sorted(dict(self.signs).items()), _present()
        absent = set(range(self.launch.world_size)) - {self.launch.rank, *dict(signs)}
        found = [
            [name_failed(*heard) for heard in signs],
            [f"rank {rank} has not come" for rank in sorted(absent)],
            [name_silent(*heard) for heard in signs],
            [name_late(*heard, now and now.name) for heard in signs],
        ]
        named = (list(filter(None, causes)) for causes in found)
        return next(filter(None, named), ["every rank waits there, each for another"])


# Of this process


def start(launch: Launch, timeout: float) -> Heartbeat:
    """Begin to watch the waits of this process; `connect()` then makes its heart beat."""
    _pulse[:] = [Heartbeat(launch, timeout)]
    atexit.register(stop)
    return _pulse[0]


@contextmanager
def listening() -> Iterator[None]:
    """Hear the other ranks within the block, for `end_if_silent`."""
    for pulse in _pulse:
        pulse.listens = True
    yield
    for pulse in _pulse:
        pulse.listens = False


def end_if_silent() -> None:
    """Raise an error between ranks if another one has given no sign of life for too long."""
    for pulse in _pulse:
        silences = [sign.silence() for sign in list(pulse.signs.values())]
        if max(silences, default=0.0) > min(pulse.timeout, TOO_SILENT):
            raise RuntimeError("timed out waiting for a silent rank")


def stop() -> None:
    """End the heartbeat of this process, if it has one."""
    while _pulse:
        _pulse.pop().stop()
    atexit.unregister(stop)


# Errors


def explain(error: BaseException) -> str | None:
    """Return the line to show people for an error, or None if its traceback should be shown.

    An error between ranks is explained by what the others last told; to hear them takes some
    seconds.
    """
    if is_between_ranks(error):
        symptom = re.sub(r"^\[[^\]]*\]\s*", "", first_line(error)).split(". ")[0]
        return _pulse[0].name_cause(symptom) if _pulse else _place(symptom)
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split()) or type(error).__name__
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_memory or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return f"out of memory ({first_line(error)}): {LESS_MEMORY}"
    return None


def is_between_ranks(error: BaseException) -> bool:
    """Tell whether an error came from a collective or the store, not from this rank alone."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and bool(BETWEEN_RANKS.search(str(error)))


def _place(symptom: str) -> str:
    now = _present()
    return f"{symptom}, in stage {now.name!r} for {now.age():.0f} s" if now else symptom


def report_error(error: BaseException, rank: int) -> None:
    """Print what ends this rank, for people in one line, and tell it the other ranks."""
    if isinstance(error, SystemExit) and not isinstance(error.code, int):
        line = str(error.code)
    else:
        line = explain(error)
    _say_last_words(error, line)
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and line is None):
        return
    shown = [f"error: {line}"] if line else []
    if line is None or os.environ.get("GUIDED_DIFFUSION_TRACEBACK"):
        shown.insert(0, "".join(traceback.format_exception(error)).rstrip())
    report("\n".join(shown), rank)


def _say_last_words(error: BaseException, line: str | None) -> None:
    """Tell the other ranks why this one ends, in a few words."""
    words = "" if is_between_ranks(error) else line or f"{type(error).__name__} {error}"
    if _pulse:
        _pulse[0].say_last_words(" ".join(words.split())[:300])


def explain_if_uncaught(rank: int) -> None:
    """Let an uncaught exception be told the other ranks, and one that came from them explained."""
    show = sys.excepthook

    def show_and_explain(kind, error, trace):
        """Take the place of sys.excepthook."""
        show(kind, error, trace)
        line = explain(error)
        _say_last_words(error, line)
        if is_between_ranks(error):
            report(f"error: {line}", rank)

    sys.excepthook = show_and_explain


def report(text: str, rank: int) -> None:
    """Print an error on stderr; of one that all ranks have, rank 0 tells and ends the others."""
    if rank > 0:
        time.sleep(2)
    print(text if rank == 0 else f"rank {rank}: {text}", file=sys.stderr, flush=True)
