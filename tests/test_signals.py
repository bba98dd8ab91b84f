"""Signals ask the loop to stop; nothing else is interrupted. Ctrl-C ends a program for sure."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from launching import clean_environment

from guided_diffusion.flag_parsing import run
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


PROGRAM = """
import sys, threading, time
from guided_diffusion.flag_parsing import run
def pause(moment):
    print(moment, flush=True)
    time.sleep(60 if moment in sys.argv else 0)
def wait_for_the_end():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    pause("ended")  # Python waits for its threads
def main():
    threading.Thread(target=wait_for_the_end).start()
    try:
        pause("begun")
    finally:
        pause("ending")
run(main)
"""


@pytest.mark.parametrize("moments", [("begun", "ending"), ("begun", "ended"), ("ended",)])
def test_ctrl_c_ends_a_program_at_any_moment(moments):
    """Also while the first one is answered and while Python ends: in one line, without waiting."""
    command = [sys.executable, "-c", PROGRAM, *moments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=clean_environment(), **pipes) as process:
        for moment in moments:
            while process.stdout.readline() != f"{moment}\n":
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "-c: interrupted\n"
    assert process.returncode == 130


def test_ctrl_c_once_ends_a_program_without_a_word(capsys):
    """As long as nothing holds up its end."""
    with pytest.raises(SystemExit) as end:
        run(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert end.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_program_that_is_not_to_hear_ctrl_c_does_not():
    """Who starts it decides, as nohup and the & of a script do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
