"""Signals ask the loop to stop; nothing else is interrupted."""

import os
import signal
import threading

import pytest

from guided_diffusion.signals import ASKING, StopSignals


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_kept_within_the_block(number):
    """Its name is remembered, and after the block it means again what it meant before."""
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_three_signals_ask():
    """Ctrl-C, the end of a job, and the warning before it."""
    assert set(ASKING) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def test_a_second_ctrl_c_interrupts():
    """Who does not want to wait for the step and the save need not."""
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_another_thread_may_train():
    """Python handles signals in the main thread alone; elsewhere the block does nothing."""
    seen = []

    def train():
        with StopSignals() as signals:
            seen.append(signals.received)

    before = [signal.getsignal(number) for number in ASKING]
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [None] and [signal.getsignal(number) for number in ASKING] == before
