"""What is fine-tuned, on which rows, with how many seeds."""

import dataclasses
import math

from convattn_jax.config import check, check_choice
from convattn_jax.glue.examples import BUCKETS
from convattn_jax.glue.sources import SOURCES
from convattn_jax.glue.tasks import GLUE, GLUE_PRESETS, Recipe, Task, recipe, select

SEEDS = (42, 97, 834, 622, 329, 75, 213, 101, 123, 57)  # the reference's


@dataclasses.dataclass(frozen=True)
class GlueConfig:
    """Tasks and how they are trained; `configs/glue.py` documents each key."""

    tasks: tuple[str, ...]
    source: str
    data_dir: str
    preset: str
    learning_rate: float
    epochs: int
    seeds: int
    together: int
    length: int
    save_seconds: float

    def __post_init__(self):
        names = tuple(name for given in self.tasks for name in (GLUE if given == "all" else (given,)))
        object.__setattr__(self, "tasks", names)
        tasks = select(names)
        for task in tasks:
            check(
                task.predicted_by in ("", *names),
                f"glue.tasks={task.name} is predicted by the model of {task.predicted_by}: name that task too",
            )
        check_choice("glue.source", self.source, SOURCES)
        check_choice("glue.preset", self.preset, GLUE_PRESETS)
        check(
            0 <= self.learning_rate < math.inf,
            f"glue.learning_rate={self.learning_rate} must be 0 (the preset's) or a positive number",
        )
        check(self.epochs >= 0, f"glue.epochs={self.epochs} must be 0 (what the preset says) or more")
        check(0 <= self.seeds <= len(SEEDS), f"glue.seeds={self.seeds} must lie in 0 .. {len(SEEDS)}")
        check(self.together >= 0, f"glue.together={self.together} must be 0 (as many as fit) or more")
        check(8 <= self.length <= BUCKETS[-1], f"glue.length={self.length} must lie in 8 .. {BUCKETS[-1]} tokens")
        check(self.save_seconds >= 0, f"glue.save_seconds={self.save_seconds} must be 0 or more")
        needs_files = self.source == "tsv" and not all(task.is_probe for task in tasks)
        check(bool(self.data_dir) or not needs_files, "glue.data_dir is empty: name the folder of GLUE's TSV files")

    def seeds_of(self, task: Task) -> tuple[int, ...]:
        """The seeds a task is run with."""
        return SEEDS[: self.seeds or (2 if task.is_probe else len(SEEDS))]

    def recipe_of(self, task: Task) -> Recipe:
        """How a task is trained: its preset, and what is set beside it."""
        chosen = recipe(self.preset, task)
        if self.learning_rate:
            chosen = dataclasses.replace(chosen, learning_rate=self.learning_rate)
        return dataclasses.replace(chosen, steps=0, epochs=self.epochs) if self.epochs else chosen

    def length_of(self, task: Task) -> int:
        """The longest row of a task, in tokens."""
        return min(self.length, self.recipe_of(task).length)
