"""Starts runs of several processes on this machine, as a launcher would."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(
    count: int, args: list[str], own: dict[int, list[str]] | None = None, program: str = "", **places
) -> list[Ended]:
    """Runs the program in `count` processes with one CPU device each, some with arguments of their `own`.

    `program` is Python to run in its place, `host_1` the folder that process 1 runs in.
    """
    what = ["-c", program] if program else ["-m", "convattn_jax.main"]
    command = [sys.executable, *what, *args, f"--coordinator=localhost:{free_port()}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, f"--processes={count}", f"--process={i}", *(own or {}).get(i, [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=places.get(f"host_{i}"),
        )
        for i in range(count)
    ]
    try:
        said = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, *texts) for process, texts in zip(running, said, strict=True)]
