"""Signals before training: while Python loads modules, and in callbacks whose exceptions it drops."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from convattn_jax import stopping
from convattn_jax.config import BY_KEYBOARD, Interrupted

WHILE_LOADING = """
import os, signal, sys
from convattn_jax import stopping
with stopping.listening(loading=True):
    os.kill(os.getpid(), int(sys.argv[1]))
    print("went on")
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, BY_KEYBOARD)])
def test_while_modules_are_loaded_a_signal_ends_the_process_with_one_line(number, status):
    ended = subprocess.run([sys.executable, "-c", WHILE_LOADING, str(int(number))], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (status, "", 1)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_within_a_callback_that_drops_exceptions_still_stops(number, kind):
    def callback(phase, _):
        if phase == "start" and sent.append(phase) is None and len(sent) == 1:
            os.kill(os.getpid(), number)

    def work():
        with stopping.listening(loading=False):
            gc.collect()
            for _ in range(200):
                time.sleep(0.01)

    sent = []
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)], sys.unraisablehook
    gc.callbacks.append(callback)
    try:
        with pytest.raises(kind):
            work()
    finally:
        gc.callbacks.remove(callback)
    after = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)], sys.unraisablehook
    assert after == before
