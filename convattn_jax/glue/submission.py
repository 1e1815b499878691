"""Predictions as the zip of TSVs that the GLUE server reads."""

import io
import logging
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from convattn_jax.data.corpus import write_atomically
from convattn_jax.glue.tasks import GLUE, TASKS, Task

COMPLETE = "submission.zip"
INCOMPLETE = "submission-incomplete.zip"
_BEGINNING = (1980, 1, 1, 0, 0, 0)  # one date for all entries: equal predictions give equal bytes

_log = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What a model says of one test split: idx int (N,), logits (N, C) or scores (N,) or (N, 1)."""

    idx: np.ndarray
    logits: np.ndarray


class Submission(NamedTuple):
    """The zip that was written, and for each file that it lacks, wholly or in part, what is the matter."""

    path: epath.Path
    missing: tuple[str, ...]


def to_tsv(task: Task, prediction: Prediction) -> str:
    """The server's format: `index`, `prediction`, ordered by index; scores are clipped to [0, 5] with three decimals.

    Raises:
      ValueError: an idx stands there twice, or idx and logits differ in number.
    """
    idx, logits = np.asarray(prediction.idx), np.asarray(prediction.logits)
    if len(idx) != len(logits) or len(np.unique(idx)) != len(idx):
        raise ValueError(f"{task.name}: {len(logits)} predictions for {len(np.unique(idx))} different idx")
    order = np.argsort(idx, kind="stable")
    if task.is_regression:
        words = [f"{score:.3f}" for score in np.clip(logits.reshape(-1), 0.0, 5.0)[order]]
    else:
        names = [str(i) for i in range(len(task.labels))] if task.numbered else task.labels
        words = [names[i] for i in logits.argmax(-1)[order]]
    lines = (f"{i}\t{word}\n" for i, word in zip(idx[order], words, strict=True))
    return "index\tprediction\n" + "".join(lines)


def write(
    folder: epath.PathLike, predictions: Mapping[str, Mapping[str, Prediction | tuple[np.ndarray, np.ndarray]]]
) -> Submission:
    """Writes predictions {task: {test split: (idx, logits)}} as submission.zip, one TSV a split.

    The zip is called submission-incomplete.zip while the server would lack a file or rows of one; the one of the other
    name, from an earlier call, is taken away.
    """
    files: dict[str, str] = {}
    missing: list[str] = []
    for task in (TASKS[name] for name in GLUE):
        for split, file in task.server.items():
            found = predictions.get(task.name, {}).get(split)
            if found is None:
                missing.append(f"{file.name} ({task.name}, {split}): no predictions")
                continue
            prediction = Prediction(*found)
            files[file.name] = to_tsv(task, prediction)
            if not np.array_equal(np.sort(prediction.idx), np.arange(file.rows)):
                missing.append(f"{file.name} ({task.name}, {split}): {len(prediction.idx)} rows, not {file.rows}")
    for line in missing:
        _log.warning("the submission is incomplete: %s", line)

    folder = epath.Path(folder)
    name, other = (INCOMPLETE, COMPLETE) if missing else (COMPLETE, INCOMPLETE)
    write_atomically(folder / name, _zipped(files))
    (folder / other).unlink(missing_ok=True)
    return Submission(folder / name, tuple(missing))


def _zipped(files: Mapping[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name, _BEGINNING), text, zipfile.ZIP_DEFLATED)
    return content.getvalue()
