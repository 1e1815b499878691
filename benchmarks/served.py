"""A contender in a process of its own that runs steps on demand: the near side, and how the far side hears it.

The far side gets its configuration as JSON, says a line of facts once it is ready, and answers each line with one of
its own, JSON all of them; {"error": why} is its last. What it writes to stderr is seen.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any


class LeftOutError(Exception):
    """A contender that cannot run here, and why."""


class Served:
    """Starts `python -m MODULE CONFIG`; `facts` are its first answer, awaited unless `later`."""

    def __init__(
        self,
        module: str,
        config: dict[str, Any],
        environment: Mapping[str, str] | None = None,
        patience: float = 900.0,
        later: bool = False,
    ):
        self.patience = patience  # seconds for an answer
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONFAULTHANDLER": "1"} | dict(environment or {}),
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.facts: dict[str, Any] = {} if later else self.answer()

    def ask(self, line: object) -> None:
        """Sends a line."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `answer` says so
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line.

        Raises:
          LeftOutError: it failed, or said nothing for `patience` seconds (then its stacks are on stderr).
        """
        try:
            line = self._lines.get(timeout=self.patience)
        except queue.Empty:
            self.process.send_signal(signal.SIGABRT)
            self.close()
            raise LeftOutError(f"no answer within {self.patience:.0f} s") from None
        said = json.loads(line) if line else {}
        if not line or "error" in said:
            self.close()
            raise LeftOutError(said.get("error", f"its process ended with status {self.process.returncode}"))
        return said

    def close(self) -> None:
        """Ends the process, one that hangs too."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")


def requests() -> Iterator[str]:
    """The lines that the near side sends. When it is gone this process ends within a second, compiling or not.

    Call it first: a contender that outlives who started it holds a device that others are timed on.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    idle = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        if not idle.wait(1.0):
            os._exit(1)

    def each() -> Iterator[str]:
        while True:
            idle.set()
            line = lines.get()
            if line is None:
                return
            idle.clear()
            yield line

    threading.Thread(target=listen, daemon=True).start()
    return each()
