"""What is under way of a task: which seeds train together, and how far they are.

Seeds that began as one program go on as one, so that on a CPU an interruption changes no bit of what they end with.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from convattn_jax.account import Account
from convattn_jax.checkpoint import Checkpoints
from convattn_jax.config import check
from convattn_jax.console import Console
from convattn_jax.glue.tasks import Task
from convattn_jax.run import RunFolder
from convattn_jax.train import TrainState, agree
from convattn_jax.watchdog import Alive

SHOWN = 20  # steps between two looks at the losses


def begun(folder: RunFolder, task: Task) -> dict[str, Any]:
    """What `begin` was given last; empty when nothing is under way."""
    return folder.read(f"unfinished/{task.name}/group") or {}


def begin(folder: RunFolder, task: Task, group: dict[str, Any]) -> None:
    """Notes which seeds train together, and what decides about their numbers; what another group has left goes."""
    if begun(folder, task) != group:
        end(folder, task)
        folder.write(f"unfinished/{task.name}/group", group)


def checkpoints(folder: RunFolder, task: Task) -> epath.Path:
    """Where the states of the group are saved."""
    return folder.path / "unfinished" / task.name / "checkpoints"


def end(folder: RunFolder, task: Task) -> None:
    """Forgets the group."""
    everything = folder.path / "unfinished"
    if (everything / task.name).exists():
        (everything / task.name).rmtree()
    if everything.exists() and not any(everything.iterdir()):
        everything.rmdir()


def groups(missing: Sequence[int], together: int, begun_together: Sequence[int]) -> list[list[int]]:
    """The seeds that are missing, at most `together` at a time; those that have begun together stay so, and go first.

    Those of them that are finished already are trained once more: they would not be the same program without.
    """
    first = list(begun_together) if set(begun_together) & set(missing) and len(begun_together) <= together else []
    rest = [seed for seed in missing if seed not in first]
    return [*([first] if first else []), *(rest[i : i + together] for i in range(0, len(rest), together))]


@dataclasses.dataclass
class Progress:
    """While seeds train: what a person sees, what is saved and when they stop, and that all is finite."""

    task: str
    seeds: Sequence[int]
    steps: int
    save_seconds: float
    console: Console
    account: Account
    checkpoints: Checkpoints
    stop: Callable[[int], bool]
    alive: Alive

    def __post_init__(self):
        self.stopped = False
        self._began, self._saved, self._tokens = time.perf_counter(), time.monotonic(), 0
        self._losses: list[tuple[int, Any]] = []  # since they were looked at last

    def report(self, step: int, losses: jax.Array, tokens: int) -> None:
        """Shows some steps, and looks at the losses of all."""
        self._losses.append((step, losses))
        self._tokens += tokens
        if step % SHOWN == 0 or step == self.steps:
            self._check_finite()
            self.alive()
            elapsed, left = time.perf_counter() - self._began, self.console.seconds_left(step, self.steps)
            self.console.training(
                step, self.steps, float(np.asarray(losses).mean()), None, self._tokens / elapsed, left
            )

    def ends(self, step: int, state: TrainState) -> bool:
        """Saves when it is time or when training is to stop here, which it says."""
        stops = self.stopped = self.stop(step)
        if step == self.steps:
            return False  # what these seeds end with is still written
        asks = step % SHOWN == 0 or jax.process_count() == 1  # several have to agree, which takes time
        if stops or (asks and agree(time.monotonic() - self._saved > self.save_seconds)):
            self._check_finite()
            self.account.charge("training")
            self.checkpoints.save(state)
            self.account.charge("saving")
            self._saved = time.monotonic()
            self.alive()
        return stops

    def _check_finite(self) -> None:
        """Raises a `UserError` at the first step whose loss is not finite, before anything of it is saved."""
        for step, losses in jax.device_get(self._losses):
            for seed, loss in zip(self.seeds, losses, strict=True):
                check(
                    bool(np.isfinite(loss)),
                    f"glue.tasks={self.task}: the loss of seed {seed} is not finite at step {step}: choose a lower "
                    "glue.learning_rate, in another --workdir",
                )
        self._losses = []
