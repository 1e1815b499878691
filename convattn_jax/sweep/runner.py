"""Runs jobs, one or several at a time, each stage as a process of its own, and writes down how each ended.

A process a stage costs JAX's start, seconds beside minutes; in return whatever a run dies of (memory, a signal, a
compiler's abort) takes nothing with it, the device's memory is free again, and a stage is an ordinary command that can
be typed by hand. Compiled programs are shared through a folder: seeds of one variant compile once.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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


Work = Generator[None, None, str]  # of a job: it hands control back while its process works, and ends with its state


def run_jobs(jobs: Sequence[Job], workdir: pathlib.Path, board: Board, at_once: int = 1) -> tuple[list[str], list[str]]:
    """Brings each job to its end, as far as it can be, `at_once` of them at a time.

    Returns the names of those that failed, and of those that another process is at work on: one that was left behind
    when a sweep was killed, or another sweep.
    """
    ended: dict[str, str] = {}
    waiting, running = list(jobs), dict[int, tuple[Job, Work]]()
    processes: list[subprocess.Popen] = []
    try:
        while waiting or running:
            for slot in (slot for slot in range(at_once) if slot not in running):
                if not waiting or _prepares_data(job for job, _ in running.values()):
                    break
                job = waiting.pop(0)
                running[slot] = job, _run(job, workdir, board, _environment(slot, at_once), processes)
            for slot, (job, work) in list(running.items()):
                try:
                    next(work)
                except StopIteration as end:
                    ended[job.name] = end.value
                    del running[slot]
            with suppress(subprocess.TimeoutExpired):
                for process in processes[:1]:
                    process.wait(POLL)
    finally:
        for process in processes:
            process.terminate()  # all are told before the first one is waited for
        for _, work in running.values():
            work.close()
    failed, elsewhere = ([job.name for job in jobs if ended[job.name] == kind] for kind in ("failed", ELSEWHERE))
    return failed, elsewhere


def _prepares_data(running: Iterator[Job]) -> bool:
    """Whether a job is at what the next ones would do beside it: text and tokenizer are prepared once for all."""
    return any(not (job.folder / "data.json").exists() for job in running)


def _environment(slot: int, at_once: int) -> dict[str, str]:
    """What a job gets that is not alone: memory as it is needed, and one of the GPUs that the user has named."""
    if at_once == 1:
        return {}
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    own = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    return own | {"XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}


def _run(
    job: Job, workdir: pathlib.Path, board: Board, environment: Mapping[str, str], processes: list[subprocess.Popen]
) -> Work:
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
            with _started(stage, log, environment, processes) as process:
                while process.poll() is None:
                    where, loss = _progress(job)
                    if stage.name != job.stages[0].name:
                        where = _count(stage)
                    seconds = time.monotonic() - began
                    board.show(job.name, state="running", stage=stage.name, where=where, loss=loss, seconds=seconds)
                    yield
            code = process.returncode
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
    if left or (folder.read(f"status/{job.name}") or {}).get("state", "done") != "done":  # ended by other means
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


@contextmanager
def _started(
    stage: Stage, log: pathlib.Path, environment: Mapping[str, str], processes: list[subprocess.Popen]
) -> Iterator[subprocess.Popen]:
    """The process of a stage, among `processes` while it is one; none is left behind when the body ends early.

    Then it is told to stop, and given time to save.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", stage.module, *stage.args]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        processes.append(process)
        try:
            yield process
        except BaseException:
            for one in processes:
                one.terminate()  # nothing where it has ended
            raise
        finally:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            processes.remove(process)


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
