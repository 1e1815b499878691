"""Trains one task for several seeds at once, as one `vmap`ped program; all that is random depends on the seed alone.

All devices of all processes share the work: seeds as far as their number divides, then the rows of each seed's batch.

S seeds, B rows of a batch, T tokens, C outputs of the head (of which a regression has 1).
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from convattn_jax import compiled, sharding
from convattn_jax.glue.batches import Batch, Joined, Rows, join, pad_rows
from convattn_jax.glue.examples import Encoded, buckets
from convattn_jax.model.classifier import SequenceClassifier, narrow, widen
from convattn_jax.model.heads import cross_entropy
from convattn_jax.model.inputs import from_mask
from convattn_jax.train import TrainState

Params = Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Length and rate of a task's training (Adam without weight decay, clipped at 1; linear rise and fall)."""

    steps: int
    learning_rate: float
    warmup_steps: int

    def rates(self) -> Float[np.ndarray, " steps"]:
        """The learning rate of each step: from 0 up over the warm-up, then down to 0 after the last."""
        step, warmup = np.arange(self.steps), max(1, self.warmup_steps)
        fall = (self.steps - step) / max(1, self.steps - warmup)
        return (self.learning_rate * np.minimum(step / warmup, np.minimum(fall, 1))).astype(np.float32)


def loss(model: SequenceClassifier, params: Params, batch: Batch, key: Array, outputs: Array | int) -> Array:
    """Mean cross-entropy of the head's first `outputs` logits, or squared error of the only one, over the rows there
    are. The further columns of a wide head get no gradient."""
    logits = predict(model, params, batch.rows, key).astype(jnp.float32)
    labels = jnp.asarray(batch.labels)
    counted = jnp.where(jnp.arange(model.classes) < outputs, logits, jnp.finfo(logits.dtype).min)
    losses = jnp.where(
        outputs == 1, jnp.square(logits[:, 0] - labels), cross_entropy(counted, labels.astype(jnp.int32))
    )
    return losses.mean(where=jnp.asarray(batch.rows.mask)[:, 0] != 0)


def predict(model: SequenceClassifier, params: Params, rows: Rows, key: Array | None = None) -> Float[Array, "B C"]:
    """Logits; dropout iff there is a key."""
    inputs = from_mask(jnp.asarray(rows.ids), jnp.asarray(rows.mask), jnp.asarray(rows.types))
    logits: Any = model.apply({"params": params}, inputs, rngs=None if key is None else {"dropout": key})
    return logits


# Adam as the reference fine-tunes with it; the rate comes with each step, so that tasks of one shape share a program.
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(eps=1e-8))


def make_compilers() -> concurrent.futures.ThreadPoolExecutor:
    """Threads for `Trainer`: few, so that the programs which are wanted first are ready first."""
    return concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1), "compile")


class Trainer:
    """The compiled programs of a model, for S seeds at once: a start, a step and a prediction.

    A program serves one shape of batch, and all tasks: the head is as wide as any task's, and how many `outputs` of it
    a task has is an argument. `prepare_*` hands to `compilers` what will be wanted, to be compiled side by side and
    while others train; what nobody announced is compiled when it is met, by whoever meets it.
    """

    def __init__(self, model: SequenceClassifier, compilers: concurrent.futures.Executor | None = None):
        self.model, self._compilers = model, compilers or make_compilers()
        self._shapes: Any = jax.eval_shape(model.initial_params, jax.random.key(0))
        self._programs: dict[Hashable, concurrent.futures.Future[Any]] = {}

    def shapes(self, outputs: int) -> Any:
        """The shapes of one seed's parameters, the head cut to a task's outputs."""

        def cut(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*leaf.shape[:-1], outputs), leaf.dtype)

        return {**self._shapes, "classifier": jax.tree.map(cut, self._shapes["classifier"])}

    def start(self, seeds: Sequence[int], encoders: Sequence[Params], outputs: int) -> tuple[TrainState, Array]:
        """States of all seeds, (S, ...), and their keys: heads drawn by seed, encoders given, one or one a seed."""
        count, apart = len(seeds), len(encoders) > 1
        encoder = encoders[0]
        if apart:
            encoder = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *encoders)
        program = self.prepare_start(count, outputs, apart, now=True).result()
        given = _place(encoder, sharding.seed_mesh(count, 1), of_seeds if apart else of_all)
        return program(given, np.asarray(seeds, np.uint32))

    def prepare_start(self, seeds: int, outputs: int, apart: bool, now: bool = False) -> concurrent.futures.Future[Any]:
        """The program that draws heads of so many outputs for one encoder, or one a seed (`apart`)."""

        def compile_start():
            mesh, encoder = sharding.seed_mesh(seeds, 1), self._shapes["encoder"]
            encoder = _like(_stacked(encoder, seeds) if apart else encoder, mesh, of_seeds if apart else of_all)
            numbers = jax.ShapeDtypeStruct((seeds,), np.uint32)
            start = jax.jit(functools.partial(self._start_all, mesh, outputs, apart))
            return start.lower(encoder, numbers).compile(compiled.options())

        return self._program(("start", seeds, outputs, apart), compile_start, now)

    def prepare_step(self, seeds: int, rows: int, length: int, now: bool = False) -> concurrent.futures.Future[Any]:
        """The program of a training step on (seeds, rows, length) tokens, as soon as it is compiled."""

        def compile_step():
            mesh = sharding.seed_mesh(seeds, rows)
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds))
            state = jax.eval_shape(jax.vmap(_fresh), _stacked(self._shapes, seeds))
            label: Any = jax.ShapeDtypeStruct((seeds, rows), np.float32)
            batch = _like(Batch(_rows_like(seeds, rows, length), label), mesh, of_rows)
            state, keys = (_like(tree, mesh, of_seeds) for tree in (state, keys))
            numbers = (jax.ShapeDtypeStruct((), kind) for kind in (np.float32, np.int32))
            step = jax.jit(functools.partial(self._step_all, mesh), donate_argnums=0)
            return step.lower(state, batch, keys, *numbers).compile(compiled.options())

        return self._program(("step", seeds, rows, length), compile_step, now)

    def prepare_predict(self, seeds: int, rows: int, length: int, now: bool = False) -> concurrent.futures.Future[Any]:
        """The program of a prediction for (seeds, rows, length) tokens."""

        def compile_predict():
            mesh = sharding.seed_mesh(seeds, rows)
            params = _like(_stacked(self._shapes, seeds), mesh, of_seeds)
            batch = _like(_rows_like(seeds, rows, length), mesh, of_rows)
            of_one = functools.partial(predict, self._on(mesh))
            all_read = NamedSharding(mesh, PartitionSpec())
            of_all_seeds = jax.jit(jax.vmap(of_one, spmd_axis_name=sharding.SEEDS), out_shardings=all_read)
            return of_all_seeds.lower(params, batch).compile(compiled.options())

        return self._program(("predict", seeds, rows, length), compile_predict, now)

    def _on(self, mesh: Mesh) -> SequenceClassifier:
        """The model with its operations spread over a mesh."""
        return self.model.clone(operations=sharding.shard_operations(self.model.operations, mesh), parent=None)

    def _program(self, key: Hashable, compile_it: Callable[[], Any], now: bool) -> concurrent.futures.Future[Any]:
        if key not in self._programs and now:
            self._programs[key] = concurrent.futures.Future()
            self._programs[key].set_result(compile_it())
        elif key not in self._programs:
            self._programs[key] = self._compilers.submit(compile_it)
        return self._programs[key]

    def _start_all(
        self, mesh: Mesh, outputs: int, apart: bool, encoder: Params, seeds: Array
    ) -> tuple[TrainState, Array]:
        narrow = self.model.clone(classes=outputs, parent=None)

        def of_seed(encoder: Params, seed: Array) -> tuple[TrainState, Array]:
            key = jax.random.key(seed)
            params = narrow.initial_params(jax.random.fold_in(key, 0))
            return _fresh(widen({**params, "encoder": encoder}, self.model.classes)), key

        return _held(jax.vmap(of_seed, in_axes=(0 if apart else None, 0))(encoder, seeds), mesh)

    def train(
        self,
        state: TrainState,
        keys: Array,
        outputs: int,
        schedule: Schedule,
        batches: Iterable[Batch],
        report: Callable[[int, Array, int], None],
        ends: Callable[[int, TrainState], bool] = lambda step, state: False,
    ) -> TrainState:
        """The steps after `state.step`, to the last or until `ends(step, state)`; `batches` are theirs.

        `report(step, losses (S,), tokens)` gets each step's losses, still on the device.
        """
        first = int(state.step[0])
        for step, (batch, rate) in enumerate(zip(batches, schedule.rates()[first:], strict=True), start=first + 1):
            program = self.prepare_step(*batch.rows.ids.shape, now=True).result()
            placed = _place(batch, sharding.seed_mesh(*batch.labels.shape), of_rows)
            state, losses = program(state, placed, keys, rate, np.int32(outputs))
            report(step, losses, int(batch.rows.mask.sum()))
            if ends(step, state):
                break
        return state

    def _step_all(
        self, mesh: Mesh, state: TrainState, batch: Batch, keys: Array, rate: Array, outputs: Array
    ) -> tuple[TrainState, Array]:
        step = functools.partial(self._step_one, model=self._on(mesh))
        each = jax.vmap(step, in_axes=(0, 0, 0, None, None), spmd_axis_name=sharding.SEEDS)
        return _held(each(state, batch, keys, rate, outputs), mesh)

    def _step_one(
        self, state: TrainState, batch: Batch, key: Array, rate: Array, outputs: Array, model: SequenceClassifier
    ) -> tuple[TrainState, Array]:
        dropout_key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        loss_of = jax.value_and_grad(functools.partial(loss, model))
        value, gradient = loss_of(state.params, batch, dropout_key, outputs)
        directions, opt_state = ADAM.update(gradient, state.opt_state)
        params = jax.tree.map(lambda param, direction: param - rate * direction, state.params, directions)
        return TrainState(state.step + 1, params, opt_state), value

    def predict(
        self, params: Params, encoded: Sequence[Encoded], edges: Sequence[int], batch_size: int, pad: int
    ) -> Float[np.ndarray, "S N C"]:
        """Logits of every row exactly once by every seed, in the rows' order; rows of like length share a batch."""
        seeds = jax.tree.leaves(params)[0].shape[0]
        out = np.zeros((seeds, len(encoded), self.model.classes), np.float32)
        texts = join(encoded)
        for edge, part, numbers in _parts(encoded, edges, batch_size):
            everyone = np.broadcast_to(numbers, (seeds, batch_size))
            out[:, part] = self._logits(params, texts, everyone, edge, pad)[:, : len(part)]
        return out

    def copies(self, params: Params, count: int) -> Params:
        """One seed's parameters so many times, (S, ...), for `predict_alone`."""
        wide = widen(jax.device_get(params), self.model.classes)
        copies = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (count, *leaf.shape)), wide)
        return _place(copies, sharding.seed_mesh(count, 1), of_seeds)

    def params_of(self, params: Params, index: int, outputs: int) -> Params:
        """One seed's parameters on every host, the head cut to a task's outputs."""
        seeds = jax.tree.leaves(params)[0].shape[0]

        def compile_take():
            mesh = sharding.seed_mesh(seeds, 1)
            shapes = _like(_stacked(self._shapes, seeds), mesh, of_seeds)
            all_read = NamedSharding(mesh, PartitionSpec())
            take = jax.jit(lambda params, i: jax.tree.map(lambda leaf: leaf[i], params), out_shardings=all_read)
            return take.lower(shapes, jax.ShapeDtypeStruct((), np.int32)).compile()

        take = self._program(("take", seeds), compile_take, now=True).result()
        return narrow(jax.tree.map(np.asarray, take(params, np.int32(index))), outputs)

    def predict_alone(
        self, params: Params, encoded: Sequence[Encoded], edges: Sequence[int], batch_size: int, pad: int
    ) -> Float[np.ndarray, "N C"]:
        """Logits of every row by one seed, of which there are copies: each takes rows of its own."""
        copies = jax.tree.leaves(params)[0].shape[0]
        out, texts = np.zeros((len(encoded), self.model.classes), np.float32), join(encoded)
        for edge, part, numbers in _parts(encoded, edges, copies * batch_size):
            logits = self._logits(params, texts, numbers.reshape(copies, batch_size), edge, pad)
            out[part] = logits.reshape(-1, self.model.classes)[: len(part)]
        return out

    def _logits(self, params: Params, texts: Joined, numbers: np.ndarray, edge: int, pad: int) -> np.ndarray:
        seeds, count = numbers.shape
        program = self.prepare_predict(seeds, count, edge, now=True).result()
        rows = _place(pad_rows(texts, numbers, edge, pad), sharding.seed_mesh(seeds, count), of_rows)
        return np.asarray(program(params, rows))


# --- where arrays are: (S, ...) of seeds, (S, B, ...) of the rows of their batches, or the same for all ---


def of_seeds(leaf: Any) -> PartitionSpec:
    """Each device has its seeds; one number a seed is on every device, where every process reads it."""
    return PartitionSpec(sharding.SEEDS) if leaf.ndim > 1 else PartitionSpec()


def of_rows(leaf: Any) -> PartitionSpec:
    """Each device has its rows of its seeds' batches."""
    return PartitionSpec(sharding.SEEDS, *sharding.BATCH)


def of_all(leaf: Any) -> PartitionSpec:
    """Every device has it."""
    return PartitionSpec()


Where = Callable[[Any], PartitionSpec]


def _shardings(tree: Any, mesh: Mesh, where: Where) -> Any:
    return jax.tree.map(lambda leaf: NamedSharding(mesh, where(leaf)), tree)


def _place(tree: Any, mesh: Mesh, where: Where) -> Any:
    """A host's arrays on all devices."""
    return sharding.place(tree, _shardings(tree, mesh, where))


def _like(tree: Any, mesh: Mesh, where: Where) -> Any:
    """The shapes of what `_place` gives."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, where(leaf))), tree
    )


def _held(tree: Any, mesh: Mesh) -> Any:
    """What a program leaves of its seeds, in its place."""
    return jax.lax.with_sharding_constraint(tree, _shardings(tree, mesh, of_seeds))


def _fresh(params: Params) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, ADAM.init(params))


def _stacked(shapes: Any, seeds: int) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), shapes)


def _rows_like(*shape: int) -> Rows:
    return Rows(*(jax.ShapeDtypeStruct(shape, np.int32) for _ in Rows._fields))  # pyright: ignore[reportArgumentType]


def _parts(
    encoded: Sequence[Encoded], edges: Sequence[int], count: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Bucket by bucket (its edge, at most `count` row numbers, `count` of them: -1 for none)."""
    bucket = buckets(np.asarray([len(text.ids) for text in encoded], np.int64), edges)
    for index, edge in enumerate(edges):
        rows = np.flatnonzero(bucket == index)
        for start in range(0, len(rows), count):
            part = rows[start : start + count]
            yield edge, part, np.concatenate([part, np.full(count - len(part), -1)])


def bytes_per_seed(model: SequenceClassifier, parameters: int, batch_size: int, length: int) -> int:
    """Memory one seed takes while training: parameters, gradient and two moments in float32, and activations."""
    c = model.config
    width = 4 if c.dtype == "float32" else 2
    per_layer = batch_size * length * (14 * c.width + 3 * c.hidden) * width + 3 * batch_size * c.heads * length**2 * 4
    return 16 * parameters + c.layers * per_layer


def seeds_that_fit(one_seed: int, seeds: int, budget: int | None, devices: int = 1) -> int:
    """How many seeds train together, at least one: all, or what 80 % of each device's memory (`budget`) holds.

    Of more than it holds, a number that divides well over the devices is taken.
    """
    room = seeds if budget is None else int(0.8 * budget) // one_seed
    together = range(seeds, 1, -1)
    return next((count for count in together if count // math.gcd(count, devices) <= room), 1)
