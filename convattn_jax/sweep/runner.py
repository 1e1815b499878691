"""Runs jobs one after another, each stage as a process of its own, and writes down how each ended.

A process a stage costs JAX's start, seconds beside minutes; in return whatever a run dies of (memory, a signal, a
compiler's abort) takes nothing with it, the device's memory is free again, and a stage is an ordinary command that can
be typed by hand. Compiled programs are shared through a folder: seeds of one variant compile once.
"""

import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from convattn_jax.config import BY_KEYBOARD, UserError
from convattn_jax.run import RunFolder
from convattn_jax.sweep.board import Board
from convattn_jax.sweep.plan import Job, Stage

POLL = 0.5  # seconds
INTERRUPTED = (BY_KEYBOARD, -signal.SIGINT)  # how a process ends after Ctrl-C
ELSEWHERE = "elsewhere"  # the state of a job that another process is at work on
GRACE = 120.0  # seconds that a stage has to save and end when the sweep is told to stop


class Stopped(BaseException):
    """The sweep was told to stop by SIGTERM."""


def run_jobs(jobs: Sequence[Job], workdir: pathlib.Path, board: Board) -> tuple[list[str], list[str]]:
    """Brings each job to its end, as far as it can be.

    Returns the names of those that failed, and of those that another process is at work on: one that was left behind
    when a sweep was killed, or another sweep.
    """
    ended = {job.name: _run(job, workdir, board) for job in jobs}
    failed, elsewhere = ([name for name, state in ended.items() if state == kind] for kind in ("failed", ELSEWHERE))
    return failed, elsewhere


def _run(job: Job, workdir: pathlib.Path, board: Board) -> str:
    """How the job ended, which status/NAME.json says too, unless another process is at work on it."""
    folder, began = RunFolder(workdir), time.monotonic()
    left = job.open_stages()
    status = {"state": "done", "stage": "", "error": "", "seconds": 0.0}
    for stage in left:
        if _in_use(stage.folder):
            board.show(job.name, state=ELSEWHERE, stage=stage.name, where="at work in another process")
            return ELSEWHERE
        folder.write(f"status/{job.name}", {**status, "state": "running", "stage": stage.name})
        log = workdir / "logs" / f"{job.name}-{stage.name}.log"
        try:
            code = _launch(job, stage, log, board, began)
            if code in INTERRUPTED and not stage.is_done():
                raise KeyboardInterrupt
        except BaseException:
            folder.write(f"status/{job.name}", {**status, "state": "stopped", "stage": stage.name})
            board.show(job.name, state="stopped")
            raise
        if not stage.is_done():
            status = {"state": "failed", "stage": stage.name, "error": _reason(log, code)}
            break
    seconds = time.monotonic() - began
    if left:
        folder.write(f"status/{job.name}", {**status, "seconds": round(seconds, 1)})
    where = str(status["error"]) if status["state"] == "failed" else "" if left else "was done before"
    board.show(
        job.name,
        state=str(status["state"]),
        stage=str(status["stage"]),
        where=where,
        loss=_progress(job)[1],
        seconds=seconds if left else 0.0,
    )
    return str(status["state"])


def _in_use(folder: pathlib.Path) -> bool:
    """Whether another process is at work in a run folder."""
    try:
        if folder.exists():
            with RunFolder(folder).lock():
                pass
    except UserError:
        return True
    return False


def _launch(job: Job, stage: Stage, log: pathlib.Path, board: Board, began: float) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", stage.module, *stage.args]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        with _ending(process):
            while True:
                where, loss = _progress(job) if stage is job.stages[0] else (_count(stage), _progress(job)[1])
                seconds = time.monotonic() - began
                board.show(job.name, state="running", stage=stage.name, where=where, loss=loss, seconds=seconds)
                try:
                    return process.wait(POLL)
                except subprocess.TimeoutExpired:
                    continue


@contextmanager
def _ending(process: subprocess.Popen) -> Iterator[None]:
    """Leaves no process behind: it is told to stop, and given time to save, when the body ends early."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `Stopped` within."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress(job: Job) -> tuple[str, str]:
    """(step / steps, held-out loss) as metrics.jsonl has them."""
    rows = RunFolder(job.folder).rows()
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    return (
        f"step {rows[-1]['step']:,}/{job.steps:,}" if rows else "",
        f"{losses[-1]:.3f}" if losses else "",
    )


def _count(stage: Stage) -> str:
    ended = len(list((stage.folder / "tasks").glob("*/*.json")))
    return f"{ended} seeds of tasks ended" if ended else ""


def _reason(log: pathlib.Path, code: int) -> str:
    """The line that says why a stage ended: its error, else the last one it printed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{last[:300]} ({how}; {log})"
