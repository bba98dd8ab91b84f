"""A polite end: a signal asks the training loop to stop after the step it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

# Ctrl-C, the end of a job's time, and the warning before it that schedulers can send.
ASKING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


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
