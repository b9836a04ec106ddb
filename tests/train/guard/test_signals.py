"""A stop request is never lost once the handlers are installed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import ROOT, handles

LISTEN = """
import sys, time
from train.guard.signals import stop_signals
stop_signals.install()
deadline = time.monotonic() + 5
while not stop_signals.received and time.monotonic() < deadline:
    pass
print(stop_signals.received.name if stop_signals.received else "lost")
"""


def test_a_signal_at_the_very_moment_of_installing_is_heard():
    """A signal may arrive between the installation of the handlers and of the thread that reads the pipe."""
    for _ in range(30):
        process = subprocess.Popen([sys.executable, "-S", "-c", LISTEN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while not handles(process.pid, signal.SIGTERM):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30)[0] == "SIGTERM\n"


@pytest.mark.parametrize(("before", "said"), [([], "SIGHUP\n"), (["nohup"], "lost\n")])
def test_a_closed_terminal_is_a_request_to_stop_unless_it_was_to_be_ignored(before, said):
    command = [*before, sys.executable, "-S", "-c", LISTEN]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )
    while not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[0] == said


def test_a_second_interrupt_ends_it_at_once():
    program = LISTEN.replace("deadline = ", "print('ready', flush=True)\ndeadline = ").replace(
        "while not stop_signals.received and", "while"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    said = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and said[1].endswith("KeyboardInterrupt\n")
