"""One task of a fine-tuning run: its seeds, from where they start to what they leave; predictions of the best one."""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from convattn_jax import checkpoint, distributed, interrupt, memory
from convattn_jax.account import Account
from convattn_jax.config import Interrupted
from convattn_jax.console import Console
from convattn_jax.glue import examples, finished, metrics, unfinished
from convattn_jax.glue.batches import Batch, join, stack
from convattn_jax.glue.config import GlueConfig
from convattn_jax.glue.data import TaskData, Texts
from convattn_jax.glue.tasks import TASKS, Task, steps_for
from convattn_jax.glue.training import Schedule, Trainer, bytes_per_seed, seeds_that_fit
from convattn_jax.inference import Pretrained
from convattn_jax.kernels.operations import operations_by
from convattn_jax.model.classifier import SequenceClassifier
from convattn_jax.model.config import ModelConfig
from convattn_jax.run import RunFolder
from convattn_jax.train import TrainState
from convattn_jax.watchdog import Alive

EVALUATION_BATCH = 128
Params = Any


class Found(NamedTuple):
    """What a run folder holds of a task, and the room there is."""

    ended: list[int]  # its finished seeds
    starts: list[int]  # those of the task that it starts from
    begun: dict[str, Any]  # the group that is under way
    capacity: int | None  # bytes of a device


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
        alive: Alive,
    ):
        self.alive = alive
        self.c, self.task, self.data, self.console, self.account = c, task, data, console, account
        self.pretrained, self.folder, self.trainer = pretrained, folder, trainer
        self.recipe = c.recipe_of(task)
        steps = steps_for(task, self.recipe, len(data.train(0).rows))
        self.schedule = Schedule(steps, self.recipe.learning_rate, round(self.recipe.warmup * steps))
        self.edges = edges_to(c.length_of(task))
        self._copies = 1  # of the best seed while it predicts: as many as have trained together, in whose program

    def complete(self) -> None:
        """Trains the seeds that are not finished, as many together as fit, and predicts the test rows."""
        found = self._found()
        groups = self._groups(found)
        distributed.from_first(lambda: self._say_starts([seed for group in groups for seed in group], found))
        for group in groups:
            self._train(group, found)
        self._predict_tests()

    def missing(self) -> list[int]:
        """The seeds that are asked for and not finished."""
        ended = self._found().ended
        return [seed for seed in self.c.seeds_of(self.task) if seed not in ended]

    def _found(self) -> Found:
        """What the folder holds, as the first process sees it: to others a shared one may look old for a while."""

        def look() -> list[Any]:
            source = TASKS.get(self.task.starts_from)
            starts = [] if source is None else finished.seeds(self.folder, source)
            begun = unfinished.begun(self.folder, self.task)
            return [finished.seeds(self.folder, self.task), starts, begun, memory.capacity()]

        return Found(*distributed.from_first(look))

    def _groups(self, found: Found) -> list[list[int]]:
        """The seeds that are missing, those together that train together."""
        asked, before = self.c.seeds_of(self.task), found.begun.get("seeds", [])
        missing = [seed for seed in asked if seed not in found.ended]
        if not set(before) <= set(asked) or found.begun != self._group(before, found):
            before = []
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.pretrained.params))
        one = bytes_per_seed(self.trainer.model, parameters, self.recipe.batch_size, self.edges[-1])
        most = max(len(missing), len(before))
        together = self.c.together or seeds_that_fit(one, most, found.capacity, jax.device_count())
        return unfinished.groups(missing, together, before)

    def _group(self, seeds: Sequence[int], found: Found) -> dict[str, Any]:
        """What decides about the numbers that seeds end with, when they train together."""
        starts = [self._start_of(seed, found) for seed in seeds]
        head = self.trainer.model.classes  # in the states that are saved
        return {"seeds": list(seeds), "steps": self.schedule.steps, "starts_from": starts, "head": head}

    def compile_ahead(self) -> None:
        """Has the compiler begin with the programs that `complete` will want, in that order."""
        groups = self._groups(self._found())
        counts = list(dict.fromkeys(len(group) for group in groups))
        for seeds in counts:
            apart = seeds > 1 and self.task.starts_from in self.c.tasks  # that one will be finished by then
            self.trainer.prepare_start(seeds, self.task.outputs, apart)
            for length in examples.lengths_met(self._train_lengths(0), self.recipe.batch_size, self.edges):
                self.trainer.prepare_step(seeds, self.recipe.batch_size, length)
            self._prepare_predict(seeds, self.data.evaluated.values())
        unpredicted = list(self.data.tests) if groups else [test for test, _ in self._unpredicted()[1]]
        self._prepare_predict(counts[-1] if counts else 1, [self.data.tests[test] for test in unpredicted])

    def _prepare_predict(self, seeds: int, splits: Iterable[Texts]) -> None:
        for texts in splits:
            for length in examples.lengths_met(lengths_of(texts), 1, self.edges):
                self.trainer.prepare_predict(seeds, EVALUATION_BATCH, length)

    def _train_lengths(self, epoch: int) -> np.ndarray:
        return lengths_of(self.data.train(epoch))

    def _train(self, seeds: Sequence[int], found: Found) -> None:
        began = time.perf_counter()
        steps, name = self.schedule.steps, f"{self.task.name} x {len(seeds)}"
        distributed.from_first(lambda: unfinished.begin(self.folder, self.task, self._group(seeds, found)))
        with distributed.together():
            encoders = self._encoders(seeds, found)
        where = unfinished.checkpoints(self.folder, self.task)
        with interrupt.deferred() as stop, contextlib.closing(checkpoint.Checkpoints(where, keep=1)) as checkpoints:
            state, keys = self.trainer.start(seeds, encoders, self.task.outputs)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            saved = checkpoints.restore(like, self.console.message)
            state = state if saved is None else saved.state
            first = step_of(state)
            again = f", from step {first} on" if first else ""
            self.console.message(f"{name} seeds: {steps} steps of {self.recipe.batch_size} rows{again}")
            self.account.charge("starting")
            self.alive(compiling=True)
            progress = unfinished.Progress(
                self.task.name,
                seeds,
                steps,
                self.c.save_seconds,
                self.console,
                self.account,
                checkpoints,
                stop,
                self.alive,
            )
            batches = itertools.islice(self._batches(seeds, first), steps - first)
            state = self.trainer.train(
                state, keys, self.task.outputs, self.schedule, batches, progress.report, progress.ends
            )
            self.account.charge("training")
        if step_of(state) < steps:
            stopped = f"{name} seeds stopped at step {step_of(state)}: the same command resumes from there"
            raise Interrupted(stopped, stop.status)
        self.alive(compiling=True)
        outputs, pad = self.task.outputs, self.pretrained.tokenizer.pad
        logits = {
            split: self.trainer.predict(state.params, texts.rows, self.edges, EVALUATION_BATCH, pad)[..., :outputs]
            for split, texts in self.data.evaluated.items()
        }
        self.account.charge("evaluating")
        seconds = time.perf_counter() - began
        figures = [self._figures({split: values[i] for split, values in logits.items()}) for i in range(len(seeds))]
        self._leave(seeds, state.params, [one | {"steps": steps, "seconds": seconds} for one in figures], found)
        self._copies = len(seeds)
        self.account.charge("saving")
        if progress.stopped:
            raise Interrupted(f"{name} seeds are finished, stopped there: the same command goes on", stop.status)

    def _leave(self, seeds: Sequence[int], params: Params, ended: Sequence[dict[str, Any]], found: Found) -> None:
        """Saves what the seeds ended with, the best one first, and parameters where they are kept."""
        metrics = [one["metrics"] for one in ended]
        for i in distributed.from_first(lambda: finished.best_first(self.task, metrics)):
            kept = distributed.from_first(lambda i=i: finished.keeps(self.folder, self.task, metrics[i]))
            of_seed = self.trainer.params_of(params, i, self.task.outputs) if kept else None
            what = seeds[i], of_seed, ended[i] | {"starts_from": self._start_of(seeds[i], found)}
            distributed.from_first(lambda what=what: finished.save(self.folder, self.task, *what))
        distributed.from_first(lambda: unfinished.end(self.folder, self.task))

    def _start_of(self, seed: int, found: Found) -> str:
        """The task whose encoder a seed starts from, '' for pre-training."""
        return self.task.starts_from if seed in found.starts else ""

    def _say_starts(self, missing: Sequence[int], found: Found) -> None:
        name, source = self.task.name, self.task.starts_from
        fresh = [seed for seed in missing if self._start_of(seed, found) != source]
        if fresh:
            self.console.message(f"{name}: no {source} run of seeds {fresh} here, they start from pre-training")
        ended = [seed for seed in self.c.seeds_of(self.task) if seed not in missing]
        other = [
            seed
            for seed in ended
            if finished.read(self.folder, self.task, seed)["starts_from"] != self._start_of(seed, found)
        ]
        if other:
            self.console.message(
                f"{name}: seeds {other} started from pre-training, before {source} was there; to train them from it, "
                f"delete {self.folder.path / 'tasks' / name}"
            )

    def _encoders(self, seeds: Sequence[int], found: Found) -> list[Params]:
        """The pre-trained encoder, or for each seed where it starts."""
        starts = [self._start_of(seed, found) for seed in seeds]
        if not any(starts):
            return [self.pretrained.params["encoder"]]
        return [self._encoder(seed, start) for seed, start in zip(seeds, starts, strict=True)]

    def _encoder(self, seed: int, start: str) -> Params:
        if not start:
            return self.pretrained.params["encoder"]
        shapes = self.trainer.shapes(TASKS[start].outputs)
        return finished.params(self.folder, TASKS[start], shapes, seed)["encoder"]

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
        best, todo = self._unpredicted()
        if not todo:
            return
        outputs, pad = self.task.outputs, self.pretrained.tokenizer.pad
        with distributed.together():
            params = finished.params(self.folder, self.task, self.trainer.shapes(outputs), best)
        copies = self.trainer.copies(params, self._copies)
        for test, digest in todo:
            self.alive(compiling=True)
            texts = self.data.tests[test]
            logits = self.trainer.predict_alone(copies, texts.rows, self.edges, EVALUATION_BATCH, pad)[:, :outputs]
            what = *test, best, digest, texts.idx, logits
            distributed.from_first(lambda what=what: finished.save_prediction(self.folder, *what))

    def _unpredicted(self) -> tuple[int, list[tuple[tuple[str, str], str]]]:
        """The best seed, and the test splits, with their digests, of which it has not said anything yet."""

        def look() -> list[Any]:
            best, todo = finished.best(self.folder, self.task), []
            for (task, split), texts in self.data.tests.items():
                saved, digest = finished.prediction(self.folder, task, split), texts.digest
                if not saved or (saved["seed"], saved["digest"]) != (best, digest):
                    todo.append([task, split, digest])
            return [best, todo]

        best, todo = distributed.from_first(look)
        return best, [((task, split), digest) for task, split, digest in todo]


def step_of(state: TrainState) -> int:
    """The steps that seeds which train together have made."""
    return int(np.asarray(state.step)[0])


def lengths_of(texts: Texts) -> np.ndarray:
    """Tokens of each row."""
    return np.asarray([len(row.ids) for row in texts.rows])


def edges_to(length: int) -> list[int]:
    """The lengths that rows of at most `length` tokens are padded to."""
    return [*(edge for edge in examples.BUCKETS if edge < length), length]


def classifier_of(config: ModelConfig, vocabulary: int, outputs: int) -> SequenceClassifier:
    """With the operations that `model.kernel` names."""
    return SequenceClassifier(config, vocabulary, operations_by(config.kernel), classes=outputs)
