"""Work that no interrupt passes through: it is left at once, and the process ends without waiting for it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from cascade_export.interrupts import uninterrupted


def test_results_and_errors_are_handed_on() -> None:
    assert uninterrupted(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 / 0)


CODE = """
import sys, time
from cascade_export.interrupts import uninterrupted
from cascade_rt.commands import run_command

def work():
    print("working", flush=True)
    while True:
        time.sleep(0.01)

sys.exit(run_command(lambda: uninterrupted(work), ends=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_does_not_wait_for_the_work(number: int) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "working\n"
    started = time.monotonic()
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert (running.returncode, errors) == (1, "error: interrupted; nothing half-written was left behind\n")
