"""A task's splits as token rows: of GLUE's files, or of the run's held-out text."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from convattn_jax.config import check
from convattn_jax.data.config import DataConfig
from convattn_jax.data.corpora import open_corpus
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.glue import examples, probes
from convattn_jax.glue.config import GlueConfig
from convattn_jax.glue.sources import SOURCES, Split
from convattn_jax.glue.tasks import Task, select


class Texts(NamedTuple):
    """A split as token rows."""

    rows: list[examples.Encoded]
    labels: np.ndarray
    idx: np.ndarray

    @property
    def digest(self) -> str:
        """Of the rows, without their labels."""
        digest = hashlib.blake2b(self.idx.tobytes(), digest_size=16)
        for row in self.rows:
            digest.update(row.ids.tobytes() + row.types.tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TaskData:
    """One task's splits: training rows (of an epoch, where they are drawn afresh), splits with labels, test splits."""

    train: Callable[[int], Texts]
    evaluated: dict[str, Texts]
    tests: dict[tuple[str, str], Texts]  # by (task, split): MNLI's model predicts AX too

    @property
    def digest(self) -> str:
        """Of all rows and labels, of those that are drawn afresh each epoch the first ones."""
        splits = [self.train(0), *self.evaluated.values(), *self.tests.values()]
        told = "".join(split.digest + hashlib.sha256(split.labels.tobytes()).hexdigest() for split in splits)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def load_data(task: Task, c: GlueConfig, tokenizer: Tokenizer, text: DataConfig) -> TaskData:
    """All rows of a task; `text` is what a run was pre-trained on, whose held-out part the probes are made of.

    Raises:
      UserError: whatever is wrong with the files or the text.
    """

    def encode(split: Split) -> Texts:
        return Texts(examples.encode(tokenizer, split.texts, c.length_of(task)), split.labels, split.idx)

    if task.is_probe:
        probe = probes.make_probe(task, open_corpus(text).documents("heldout"), seed=0)
        drawn = functools.lru_cache(maxsize=2)(lambda epoch: encode(probe.train(epoch)))
        return TaskData(drawn, {"validation": encode(probe.validation)}, {})

    read = SOURCES[c.source]
    splits = read(c.data_dir, task)
    train = encode(splits["train"])
    evaluated = {name: encode(splits[name]) for name in task.splits if name in splits}  # MNLI may lack one of two
    files = " and ".join(f"{task.folder}/{name.replace('validation', 'dev')}.tsv" for name in task.splits)
    check(bool(evaluated), f"glue.data_dir={c.data_dir}: {files} is missing; {task.name} is evaluated on it")
    tests = {(task.name, name): encode(splits[name]) for name in task.tests if name in splits}
    for other in select(c.tasks):
        if other.predicted_by == task.name:
            found = read(c.data_dir, other)
            tests |= {(other.name, name): encode(found[name]) for name in other.tests if name in found}
    return TaskData(lambda epoch: train, evaluated, tests)
