"""A polite end: what Ctrl-C, and the signals of schedulers, mean to a program and to its loop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NoReturn

INTERRUPTED = 130  # the exit code
# Ctrl-C, the end of a job's time, and the warning before it that schedulers can send.
ASKING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


# --------------------------------------------------------------------------------------------
# A program


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the block, and end the process from then on.

    Another one thus waits for nothing, such as threads that read, and shows no traceback of the
    clearing up; nor does a first one after the block, while Python ends.
    """
    _answer_ctrl_c(_interrupt)
    try:
        yield
    finally:
        _answer_ctrl_c(_end)


def _answer_ctrl_c(answer: Callable[[int, FrameType | None], NoReturn]) -> None:
    """Choose the answer, unless this process is not to hear of Ctrl-C, or not in this thread."""
    hears = signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    if hears and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, answer)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _answer_ctrl_c(_end)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode())
    os._exit(INTERRUPTED)


# --------------------------------------------------------------------------------------------
# A loop


class StopSignals:
    """Within the block, SIGINT, SIGTERM and SIGUSR1 are kept instead of obeyed.

    Once one has come, Ctrl-C interrupts at once. Outside the main thread, where Python handles no
    signals, the block changes nothing.

    Attributes:
        received: the name of the first signal, None before it.
    """

    def __init__(self):
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._keep) for number in ASKING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
