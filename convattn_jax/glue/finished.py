"""What fine-tuning has left in a run folder: the finished seeds of each task, their parameters and predictions."""

import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from convattn_jax import checkpoint
from convattn_jax.config import check
from convattn_jax.data import corpus
from convattn_jax.glue.config import SEEDS
from convattn_jax.glue.tasks import TASKS, Task
from convattn_jax.run import RunFolder

Params = Any


def name(metric: str, split: str) -> str:
    """The name of a metric on a split: accuracy, accuracy_matched, accuracy_mismatched."""
    return metric + split.removeprefix("validation")


def seeds(folder: RunFolder, task: Task) -> list[int]:
    """The seeds of a task that are trained and evaluated."""
    return [seed for seed in SEEDS if (folder.path / "tasks" / task.name / f"{seed}.json").exists()]


def keeps(folder: RunFolder, task: Task, metrics: Mapping[str, float]) -> bool:
    """Whether a seed's parameters are kept: the best one's, since no others are used, or all if a task starts there."""
    earlier = [_score(folder, task, other) for other in seeds(folder, task)]
    return _is_a_start(task) or _rank(task, metrics) >= max(earlier, default=[])


def _is_a_start(task: Task) -> bool:
    return any(other.starts_from == task.name for other in TASKS.values())


def save(folder: RunFolder, task: Task, seed: int, params: Params | None, ended: Mapping[str, Any]) -> None:
    """The parameters of a seed if `keeps` says so, then what it ended with, which marks it as finished."""
    checkpoints = folder.checkpoints / task.name
    if params is not None:
        checkpoint.save_params(checkpoints, seed, params)
    folder.write(f"tasks/{task.name}/{seed}", ended)
    if not _is_a_start(task):
        for other in set(checkpoint.steps_of(checkpoints)) - {best(folder, task)}:
            (checkpoints / str(other)).rmtree()


def read(folder: RunFolder, task: Task, seed: int) -> dict[str, Any]:
    """What a finished seed ended with: metrics, by_label, starts_from, steps, seconds."""
    file = f"tasks/{task.name}/{seed}"
    ended = folder.read(file) or {}
    damaged = f"{folder.path / file}.json is damaged: delete it, and the same command trains this seed anew"
    check(isinstance(ended.get("metrics"), dict), damaged)
    return ended


def params(folder: RunFolder, task: Task, shapes: Any, seed: int) -> Params:
    """The parameters of a finished seed."""
    return checkpoint.load_params(folder.checkpoints / task.name, shapes, seed)


def best(folder: RunFolder, task: Task) -> int:
    """The finished seed with the best main metric on the first split, where it is even on the second.

    Raises:
      UserError: no seed of the task is finished.
    """
    ended = seeds(folder, task)
    check(bool(ended), f"{folder.path} has no finished run of {task.name}: fine-tune it first")
    return max(ended, key=lambda seed: _score(folder, task, seed))


def best_first(task: Task, metrics: Sequence[Mapping[str, float]]) -> list[int]:
    """Seeds by their metrics, numbered as these: saved in this order, only the first one's parameters are written."""
    return sorted(range(len(metrics)), key=lambda i: _rank(task, metrics[i]), reverse=True)


def _score(folder: RunFolder, task: Task, seed: int) -> list[float]:
    return _rank(task, read(folder, task, seed)["metrics"])


def _rank(task: Task, metrics: Mapping[str, float]) -> list[float]:
    """What seeds are ordered by: the main metric, split by split."""
    return [metrics.get(name(task.main, split), -math.inf) for split in task.splits]


def table(folder: RunFolder) -> dict[str, dict[str, list[float]]]:
    """{task: {metric: [one value a seed]}} of all finished tasks; metrics that some seed lacks are left out."""
    found = {}
    for task in TASKS.values():
        runs = [read(folder, task, seed)["metrics"] for seed in seeds(folder, task)]
        if runs:
            common = [metric for metric in runs[0] if all(metric in run for run in runs)]
            found[task.name] = {metric: [run[metric] for run in runs] for metric in common}
    return found


def save_prediction(
    folder: RunFolder, task: str, split: str, seed: int, digest: str, idx: np.ndarray, logits: np.ndarray
) -> None:
    """What a seed says of the rows of a test split, whose digest goes with it."""
    content = io.BytesIO()
    np.savez(content, seed=seed, digest=digest, idx=idx, logits=logits)
    path = _prediction(folder, task, split)
    path.parent.mkdir(exist_ok=True)
    corpus.write_atomically(path, content.getvalue())


def prediction(folder: RunFolder, task: str, split: str) -> dict[str, np.ndarray]:
    """What `save_prediction` saved last of a test split; empty if nothing."""
    path = _prediction(folder, task, split)
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file:
            return dict(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return {}  # damaged: it will be predicted anew


def predictions(folder: RunFolder) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{task: {test split: (idx, logits)}}, of the best seeds only."""
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for task in TASKS.values():
        for split in task.tests:
            saved = prediction(folder, task.name, split)
            if saved and saved["seed"] == best(folder, TASKS[task.predicted_by or task.name]):
                found.setdefault(task.name, {})[split] = (saved["idx"], saved["logits"])
    return found


def _prediction(folder: RunFolder, task: str, split: str) -> epath.Path:
    return folder.path / "predictions" / f"{task}-{split}.npz"
