"""One task of a fine-tuning run: its seeds, from where they start to what they leave; predictions of the best one."""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from convattn_jax import checkpoint, interrupt, memory
from convattn_jax.account import Account
from convattn_jax.config import Interrupted, check
from convattn_jax.console import Console
from convattn_jax.glue import examples, finished, metrics, unfinished
from convattn_jax.glue.batches import Batch, join, stack
from convattn_jax.glue.config import GlueConfig
from convattn_jax.glue.data import TaskData, Texts
from convattn_jax.glue.tasks import TASKS, Task, steps_for
from convattn_jax.glue.training import Schedule, Trainer, bytes_per_seed, seeds_that_fit
from convattn_jax.inference import Pretrained
from convattn_jax.kernels.operations import operations_by
from convattn_jax.model.classifier import SequenceClassifier, narrow
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.operations import PLAIN
from convattn_jax.run import RunFolder

EVALUATION_BATCH = 128
Params = Any


class TaskRun:
    """One task: what is trained, where its seeds start, what they leave behind."""

    def __init__(
        self,
        c: GlueConfig,
        task: Task,
        data: TaskData,
        pretrained: Pretrained,
        trainer: Trainer,
        folder: RunFolder,
        console: Console,
        account: Account,
    ):
        self.c, self.task, self.data, self.console, self.account = c, task, data, console, account
        self.pretrained, self.folder, self.trainer = pretrained, folder, trainer
        self.recipe = c.recipe_of(task)
        steps = steps_for(task, self.recipe, len(data.train(0).rows))
        self.schedule = Schedule(steps, self.recipe.learning_rate, round(self.recipe.warmup * steps))
        self.edges = edges_to(c.length_of(task))
        self._copies = 1  # of the best seed while it predicts: as many as have trained together, in whose program

    def complete(self) -> None:
        """Trains the seeds that are not finished, as many together as fit, and predicts the test rows."""
        groups = self._groups()
        self._say_starts(self.c.seeds_of(self.task), [seed for group in groups for seed in group])
        for group in groups:
            self._train(group)
        self._predict_tests()

    def missing(self) -> list[int]:
        """The seeds that are asked for and not finished."""
        ended = finished.seeds(self.folder, self.task)
        return [seed for seed in self.c.seeds_of(self.task) if seed not in ended]

    def _groups(self) -> list[list[int]]:
        """Them, those together that train together."""
        asked, missing = self.c.seeds_of(self.task), self.missing()
        begun = unfinished.begun(self.folder, self.task)
        as_begun = set(begun.get("seeds", ())) <= set(asked) and begun == self._group(begun.get("seeds", ()))
        before = begun["seeds"] if as_begun else []
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.pretrained.params))
        one = bytes_per_seed(self.trainer.model, parameters, self.recipe.batch_size, self.edges[-1])
        most = max(len(missing), len(before))
        together = self.c.together or seeds_that_fit(one, most, memory.capacity(), jax.local_device_count())
        return unfinished.groups(missing, together, before)

    def _group(self, seeds: Sequence[int]) -> dict[str, Any]:
        """What decides about the numbers that seeds end with, when they train together."""
        starts = [self._start_of(seed) for seed in seeds]
        head = self.trainer.model.classes  # in the states that are saved
        return {"seeds": list(seeds), "steps": self.schedule.steps, "starts_from": starts, "head": head}

    def compile_ahead(self) -> None:
        """Has the compiler begin with the programs that `complete` will want, in that order."""
        groups = self._groups()
        counts = list(dict.fromkeys(len(group) for group in groups))
        for seeds in counts:
            apart = seeds > 1 and self.task.starts_from in self.c.tasks  # that one will be finished by then
            self.trainer.prepare_start(seeds, self.task.outputs, apart)
            for length in examples.lengths_met(self._train_lengths(0), self.recipe.batch_size, self.edges):
                self.trainer.prepare_step(seeds, self.recipe.batch_size, length)
            self._prepare_predict(seeds, self.data.evaluated.values())
        unpredicted = self.data.tests if groups else self._unpredicted()
        self._prepare_predict(counts[-1] if counts else 1, [self.data.tests[key] for key in unpredicted])

    def _prepare_predict(self, seeds: int, splits: Iterable[Texts]) -> None:
        for texts in splits:
            for length in examples.lengths_met(lengths_of(texts), 1, self.edges):
                self.trainer.prepare_predict(seeds, EVALUATION_BATCH, length)

    def _train_lengths(self, epoch: int) -> np.ndarray:
        return lengths_of(self.data.train(epoch))

    def _train(self, seeds: Sequence[int]) -> None:
        began = time.perf_counter()
        steps, name = self.schedule.steps, f"{self.task.name} x {len(seeds)}"
        unfinished.begin(self.folder, self.task, self._group(seeds))
        where = unfinished.checkpoints(self.folder, self.task)
        with interrupt.deferred() as stop, contextlib.closing(checkpoint.Checkpoints(where, keep=1)) as checkpoints:
            state, keys = self.trainer.start(seeds, self._encoders(seeds), self.task.outputs)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            saved = checkpoints.restore(like, self.console.message)
            state = state if saved is None else saved.state
            first = int(state.step[0])
            again = f", from step {first} on" if first else ""
            self.console.message(f"{name} seeds: {steps} steps of {self.recipe.batch_size} rows{again}")
            self.account.charge("starting")
            progress = unfinished.Progress(
                self.task.name, seeds, steps, self.c.save_seconds, self.console, self.account, checkpoints, stop
            )
            batches = itertools.islice(self._batches(seeds, first), steps - first)
            state = self.trainer.train(
                state, keys, self.task.outputs, self.schedule, batches, progress.report, progress.ends
            )
            self.account.charge("training")
        if int(state.step[0]) < steps:
            step = int(state.step[0])
            raise Interrupted(f"{name} seeds stopped at step {step}: the same command resumes from there", stop.status)
        outputs, pad = self.task.outputs, self.pretrained.tokenizer.pad
        logits = {
            split: self.trainer.predict(state.params, texts.rows, self.edges, EVALUATION_BATCH, pad)[..., :outputs]
            for split, texts in self.data.evaluated.items()
        }
        self.account.charge("evaluating")
        seconds, params = time.perf_counter() - began, narrow(jax.device_get(state.params), outputs)
        found = [self._figures({split: values[i] for split, values in logits.items()}) for i in range(len(seeds))]
        for i in finished.best_first(self.task, [figures["metrics"] for figures in found]):
            of_seed = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            rest = {"starts_from": self._start_of(seeds[i]), "steps": steps, "seconds": seconds}
            finished.save(self.folder, self.task, seeds[i], of_seed, found[i] | rest)
        self._copies = len(seeds)
        unfinished.end(self.folder, self.task)
        self.account.charge("saving")

    def _start_of(self, seed: int) -> str:
        """The task whose encoder a seed starts from, '' for pre-training."""
        source = TASKS.get(self.task.starts_from)
        return source.name if source is not None and seed in finished.seeds(self.folder, source) else ""

    def _say_starts(self, seeds: Sequence[int], missing: Sequence[int]) -> None:
        name, source = self.task.name, self.task.starts_from
        fresh = [seed for seed in missing if self._start_of(seed) != source]
        if fresh:
            self.console.message(f"{name}: no {source} run of seeds {fresh} here, they start from pre-training")
        ended = [seed for seed in seeds if seed not in missing]
        other = [s for s in ended if finished.read(self.folder, self.task, s)["starts_from"] != self._start_of(s)]
        if other:
            self.console.message(
                f"{name}: seeds {other} started from pre-training, before {source} was there; to train them from it, "
                f"delete {self.folder.path / 'tasks' / name}"
            )

    def _encoders(self, seeds: Sequence[int]) -> list[Params]:
        """The pre-trained encoder, or for each seed where it starts."""
        if not any(self._start_of(seed) for seed in seeds):
            return [self.pretrained.params["encoder"]]
        return [self._encoder(seed) for seed in seeds]

    def _encoder(self, seed: int) -> Params:
        source = self._start_of(seed)
        if not source:
            return self.pretrained.params["encoder"]
        shapes = self.trainer.shapes(TASKS[source].outputs)
        return finished.params(self.folder, TASKS[source], shapes, seed)["encoder"]

    def _batches(self, seeds: Sequence[int], first: int) -> Iterator[Batch]:
        """A batch for each step after `first` others, (S, B, T): one bucket for all seeds, the rows each seed's own."""
        size, pad = self.recipe.batch_size, self.pretrained.tokenizer.pad
        for epoch in itertools.count():
            texts = self.data.train(epoch)
            lengths, rows = self._train_lengths(epoch), join(texts.rows)
            plans = [examples.epoch_batches(lengths, size, self.edges, self.task.name, epoch, seed) for seed in seeds]
            skipped = min(first, len(plans[0]))
            first -= skipped
            for parts in itertools.islice(zip(*plans, strict=True), skipped, None):
                yield stack(rows, texts.labels, parts, size, pad)

    def _figures(self, logits: dict[str, np.ndarray]) -> dict[str, Any]:
        """What one seed's logits are worth, split by split."""
        metric = {
            finished.name(metric, split): value
            for split, texts in self.data.evaluated.items()
            for metric, value in metrics.evaluate(self.task.metrics, logits[split], texts.labels).items()
        }
        by_label = {
            split: metrics.by_label(logits[split], texts.labels) for split, texts in self.data.evaluated.items()
        }
        return {"metrics": metric, "by_label": by_label}

    def _predict_tests(self) -> None:
        """What the best seed says of the test rows, where it has not said it yet; needs no training."""
        best, todo = finished.best(self.folder, self.task), self._unpredicted()
        if not todo:
            return
        outputs, pad = self.task.outputs, self.pretrained.tokenizer.pad
        params = finished.params(self.folder, self.task, self.trainer.shapes(outputs), best)
        copies = self.trainer.copies(params, self._copies)
        for (task, split), digest in todo.items():
            texts = self.data.tests[task, split]
            logits = self.trainer.predict_alone(copies, texts.rows, self.edges, EVALUATION_BATCH, pad)[:, :outputs]
            finished.save_prediction(self.folder, task, split, best, digest, texts.idx, logits)

    def _unpredicted(self) -> dict[tuple[str, str], str]:
        """The test splits, with their digests, of which the best seed has not said anything yet."""
        best, todo = finished.best(self.folder, self.task), {}
        for (task, split), texts in self.data.tests.items():
            saved, digest = finished.prediction(self.folder, task, split), digest_of(texts)
            if not saved or (saved["seed"], saved["digest"]) != (best, digest):
                todo[task, split] = digest
        return todo


def lengths_of(texts: Texts) -> np.ndarray:
    """Tokens of each row."""
    return np.asarray([len(row.ids) for row in texts.rows])


def edges_to(length: int) -> list[int]:
    """The lengths that rows of at most `length` tokens are padded to."""
    return [*(edge for edge in examples.BUCKETS if edge < length), length]


def classifier_of(config: ModelConfig, vocabulary: int, outputs: int) -> SequenceClassifier:
    """On one device with fused kernels.

    Raises:
      UserError: there are several devices, among which no kernel is divided, and `model.kernel` asks for one.
    """
    devices = jax.local_device_count()
    check(
        devices == 1 or config.kernel in ("auto", "plain"),
        f"model.kernel={config.kernel} of the run of init_from can't serve {devices} devices at once: show one only "
        "(such as CUDA_VISIBLE_DEVICES=0)",
    )
    operations = operations_by(config.kernel) if devices == 1 else PLAIN
    return SequenceClassifier(config, vocabulary, operations, classes=outputs)


def digest_of(texts: Texts) -> str:
    """Of the rows to be predicted."""
    digest = hashlib.blake2b(texts.idx.tobytes(), digest_size=16)
    for row in texts.rows:
        digest.update(row.ids.tobytes() + row.types.tobytes())
    return digest.hexdigest()
