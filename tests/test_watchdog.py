"""A process that is gone or stuck: the others leave with a non-zero status, soon, and say where they stood."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest
import tiny
from etils import epath
from processes import free_port

from convattn_jax import checkpoint
from convattn_jax.config import AloneError, UserError
from convattn_jax.run import RunFolder
from convattn_jax.watchdog import WatchdogConfig, watched

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text and a configuration of a run that takes long enough to be disturbed."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")
    tiny.write_config(home, train__steps=1_000_000, train__log_every=5, train__eval_every=100_000, model__layers=1)
    return home


def start(home, run, *more):
    """Two processes of one run, once they are training."""
    command = [sys.executable, "-m", "convattn_jax.main", f"--config={home / 'config.py'}", f"--workdir={run}", *more]
    command += [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    running = [
        subprocess.Popen(
            [*command, f"--process={i}"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    while not list(run.glob("checkpoints/*/manifest.json")):
        assert all(process.poll() is None for process in running), [process.communicate()[1] for process in running]
        time.sleep(0.01)
    return running


def test_two_processes_stop_at_one_step_when_one_of_them_is_told_to(home, tmp_path):
    running = start(home, tmp_path / "run")
    running[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    step = int(said[0].partition("stopped at step ")[2].partition(":")[0])
    assert f"stopped at step {step}: the same command resumes" in said[1]
    folder = RunFolder(tmp_path / "run")
    assert max(int(path.parent.name) for path in folder.checkpoints.glob("*/manifest.json")) == step
    assert [row["step"] for row in folder.rows()] == list(range(5, step + 1, 5))


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_others_leave_when_one_is(home, tmp_path, fault):
    short = ["--config.watchdog.killed_seconds=10", "--config.watchdog.frozen_seconds=40"]
    staying, lost = start(home, tmp_path / "run", *short)
    lost.send_signal(fault)
    try:
        said = staying.communicate(timeout=200)[1]
    finally:
        lost.kill()
        lost.communicate()
    assert staying.returncode != 0
    where = ("another process is gone, or its network (", "Thread 0x", "Fatal Python error", "Traceback")
    assert any(words in said for words in where), said


def test_a_collective_that_fails_for_a_process_that_is_gone_is_one_line(monkeypatch):
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    said = r"^another process is gone, .*\(Gloo .* reset by peer\): .* last checkpoint$"
    with pytest.raises(AloneError, match=said), watched(1000):
        raise jax.errors.JaxRuntimeError("Gloo all-reduce failed:\n Connection reset by peer")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"), watched(1000):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    failed = checkpoint.unwritten(epath.Path("run"), TimeoutError("Timed out while waiting for async_write barrier."))
    assert isinstance(failed, AloneError)
    assert not isinstance(checkpoint.unwritten(epath.Path("run"), OSError(28, "No space left on device")), AloneError)


def test_a_process_that_gets_on_no_more_ends_with_the_stacks_of_all_threads():
    program = """
import time, jax
from convattn_jax import watchdog
jax.process_count = lambda: 2
watchdog.COMPILING = 1
with watchdog.watched(2) as alive:
    for _ in range(30):
        alive()
        time.sleep(0.1)
    print("alive", flush=True)
    time.sleep(600)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stdout == "alive\n"  # three seconds of work, in which it was never quiet for two
    assert "Timeout (0:00:02)!" in ended.stderr
    assert 'File "<string>", line 11 in <module>' in ended.stderr


def test_what_is_compiled_first_may_take_longer(monkeypatch):
    allowed = []
    monkeypatch.setattr("faulthandler.enable", lambda: None)
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: None)
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit: allowed.append(seconds))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with watched(1000) as alive:
        for compiling in (False, False, True, False, False):
            alive(compiling)
    assert allowed == [10_000, 1000, 10_000, 1000]


def test_a_single_process_is_let_alone(monkeypatch):
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: pytest.fail("a timer was set"))
    assert jax.process_count() == 1
    with watched(1) as alive:
        alive()


def test_senseless_limits_are_errors():
    with pytest.raises(UserError, match=r"watchdog\.frozen_seconds=0 must be at least 1"):
        WatchdogConfig(100, 0)
