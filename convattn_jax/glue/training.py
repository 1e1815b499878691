"""Trains one task for several seeds at once, as one `vmap`ped program; all that is random depends on the seed alone.

All devices of the host share the work: each trains its share of the seeds if their number divides, else of the rows.

S seeds, B rows of a batch, T tokens, C classes (1: a regression).
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from convattn_jax.glue import examples
from convattn_jax.glue.examples import Encoded, buckets
from convattn_jax.model.classifier import SequenceClassifier
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


class Rows(NamedTuple):
    """Texts as the encoder reads them; a row whose mask is all 0 stands for none."""

    ids: Int[np.ndarray, "*S B T"] | Array
    types: Int[np.ndarray, "*S B T"] | Array
    mask: Int[np.ndarray, "*S B T"] | Array


class Batch(NamedTuple):
    """Rows with their labels."""

    rows: Rows
    labels: np.ndarray | Array


def pad_rows(encoded: Sequence[Encoded], length: int, pad: int, count: int = 0) -> Rows:
    """Rows of `length` tokens, followed by empty ones up to `count` rows."""
    ids = np.full((max(count, len(encoded)), length), pad, np.int32)
    types, mask = np.zeros_like(ids), np.zeros_like(ids)
    for row, text in enumerate(encoded):
        size = len(text.ids)
        ids[row, :size], types[row, :size], mask[row, :size] = text.ids, text.types, 1
    return Rows(ids, types, mask)


def stack(
    encoded: Sequence[Encoded], labels: np.ndarray, parts: Sequence[examples.Batch], count: int, pad: int
) -> Batch:
    """The batch of one step, (S, count, T): each seed's part of the plan, its missing rows left empty."""
    padded = [pad_rows([encoded[i] for i in part.rows], part.length, pad, count) for part in parts]
    stacked = np.zeros((len(parts), count), labels.dtype)
    stacked[:, : len(parts[0].rows)] = [labels[part.rows] for part in parts]
    return Batch(Rows(*(np.stack(leaves) for leaves in zip(*padded, strict=True))), stacked)


def loss(model: SequenceClassifier, params: Params, batch: Batch, key: Array) -> Array:
    """Mean cross-entropy, or squared error of a regression, over the rows that hold a text."""
    logits = predict(model, params, batch.rows, key)
    if model.classes == 1:
        losses = jnp.square(logits[:, 0].astype(jnp.float32) - batch.labels)
    else:
        losses = cross_entropy(logits, jnp.asarray(batch.labels))
    return losses.mean(where=jnp.asarray(batch.rows.mask)[:, 0] != 0)


def predict(model: SequenceClassifier, params: Params, rows: Rows, key: Array | None = None) -> Float[Array, "B C"]:
    """Logits; dropout iff there is a key."""
    inputs = from_mask(jnp.asarray(rows.ids), jnp.asarray(rows.mask), jnp.asarray(rows.types))
    logits: Any = model.apply({"params": params}, inputs, rngs=None if key is None else {"dropout": key})
    return logits


def _rows_like(*shape: int) -> Rows:
    return Rows(*(jax.ShapeDtypeStruct(shape, np.int32) for _ in Rows._fields))  # pyright: ignore[reportArgumentType]


# Adam as the reference fine-tunes with it; the rate comes with each step, so that tasks of one shape share a program.
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(eps=1e-8))


def make_compilers() -> concurrent.futures.ThreadPoolExecutor:
    """Threads for `Trainer`: few, so that the programs which are wanted first are ready first."""
    return concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1), "compile")


def _options() -> dict[str, str | bool] | None:
    """Of the compiler: on GPUs no search for Triton matrix products, half of all compilation, which short runs are."""
    return {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None


class Trainer:
    """The compiled programs of a model, for S seeds at once: a start, a step and a prediction.

    A program serves one shape of batch. `prepare_step` and `prepare_predict` hand to `compilers` those that will be
    wanted, to be compiled side by side and while others train; what nobody announced is compiled when it is met, by
    whoever meets it.
    """

    def __init__(self, model: SequenceClassifier, compilers: concurrent.futures.Executor | None = None):
        self.model, self._compilers = model, compilers or make_compilers()
        devices = jax.local_devices()
        self._mesh = jax.make_mesh((len(devices),), ("devices",), axis_types=(AxisType.Auto,), devices=devices)
        self._start = jax.jit(jax.vmap(self._start_one, in_axes=(0, None)))
        self._start_each = jax.jit(jax.vmap(self._start_one))
        self._step = jax.jit(self._step_all, donate_argnums=0)
        self._predict = jax.jit(jax.vmap(functools.partial(predict, model), in_axes=(0, None)))
        self._programs: dict[Hashable, concurrent.futures.Future[Any]] = {}

    def start(self, seeds: Sequence[int], encoders: Sequence[Params]) -> tuple[TrainState, Array]:
        """States of all seeds, (S, ...), and their keys: heads drawn by seed, encoders given, one or one a seed."""
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        if len(encoders) == 1:
            state = self._start(keys, encoders[0])
        else:
            state = self._start_each(keys, jax.tree.map(lambda *leaves: jnp.stack(leaves), *encoders))
        return self._spread(state, len(seeds)), self._spread(keys, len(seeds))

    def prepare_step(self, seeds: int, rows: int, length: int, now: bool = False) -> concurrent.futures.Future[Any]:
        """The program of a training step on (seeds, rows, length) tokens, as soon as it is compiled."""

        def compile_step():
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), seeds))
            encoder = jax.eval_shape(self.model.initial_params, jax.random.key(0))["encoder"]
            state, keys = (self._placed(tree, seeds) for tree in (jax.eval_shape(self._start, keys, encoder), keys))
            label: Any = jax.ShapeDtypeStruct((seeds, rows), np.float32 if self.model.classes == 1 else np.int32)
            batch = self._placed(Batch(_rows_like(seeds, rows, length), label), seeds, 0, 1)
            return self._step.lower(state, batch, keys, jax.ShapeDtypeStruct((), np.float32)).compile(_options())

        return self._program(("step", seeds, rows, length), compile_step, now)

    def prepare_predict(self, seeds: int, rows: int, length: int, now: bool = False) -> concurrent.futures.Future[Any]:
        """The program of a prediction for (rows, length) tokens, the same for all seeds."""

        def compile_predict():
            params = jax.eval_shape(self.model.initial_params, jax.random.key(0))
            stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), params)
            batch = self._placed(_rows_like(rows, length), seeds, None, 0)
            return self._predict.lower(self._placed(stacked, seeds), batch).compile(_options())

        return self._program(("predict", seeds, rows, length), compile_predict, now)

    def _program(self, key: Hashable, compile_it: Callable[[], Any], now: bool) -> concurrent.futures.Future[Any]:
        if key not in self._programs and now:
            self._programs[key] = concurrent.futures.Future()
            self._programs[key].set_result(compile_it())
        elif key not in self._programs:
            self._programs[key] = self._compilers.submit(compile_it)
        return self._programs[key]

    def _sharding(self, leaf: Any, seeds: int, seed_axis: int | None, row_axis: int | None) -> NamedSharding:
        """Seeds spread over the devices if their number divides, else rows if theirs does, else everything on each."""
        axis = row_axis if seeds % self._mesh.size else seed_axis
        if axis is None or leaf.shape[axis] % self._mesh.size:
            return NamedSharding(self._mesh, PartitionSpec())
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, "devices"))

    def _spread(self, tree: Any, seeds: int, seed_axis: int | None = 0, row_axis: int | None = None) -> Any:
        """A tree of arrays on all devices."""
        return jax.tree.map(lambda leaf: jax.device_put(leaf, self._sharding(leaf, seeds, seed_axis, row_axis)), tree)

    def _placed(self, tree: Any, seeds: int, seed_axis: int | None = 0, row_axis: int | None = None) -> Any:
        """The shapes of what `_spread` gives."""

        def of(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self._sharding(leaf, seeds, seed_axis, row_axis)
            )

        return jax.tree.map(of, tree)

    def _start_one(self, key: Array, encoder: Params) -> TrainState:
        params = {**self.model.initial_params(jax.random.fold_in(key, 0)), "encoder": encoder}
        return TrainState(jnp.zeros((), jnp.int32), params, ADAM.init(params))

    def train(
        self,
        state: TrainState,
        keys: Array,
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
            state, losses = program(state, self._spread(batch, len(keys), 0, 1), keys, rate)
            report(step, losses, int(batch.rows.mask.sum()))
            if ends(step, state):
                break
        return state

    def _step_all(self, state: TrainState, batch: Batch, keys: Array, rate: Array) -> tuple[TrainState, Array]:
        state, losses = jax.vmap(self._step_one, in_axes=(0, 0, 0, None))(state, batch, keys, rate)
        placed = jax.tree.map(lambda leaf: self._sharding(leaf, len(keys), 0, None), state)
        return jax.lax.with_sharding_constraint(state, placed), losses

    def _step_one(self, state: TrainState, batch: Batch, key: Array, rate: Array) -> tuple[TrainState, Array]:
        dropout_key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        value, gradient = jax.value_and_grad(functools.partial(loss, self.model))(state.params, batch, dropout_key)
        directions, opt_state = ADAM.update(gradient, state.opt_state)
        params = jax.tree.map(lambda param, direction: param - rate * direction, state.params, directions)
        return TrainState(state.step + 1, params, opt_state), value

    def predict(
        self, params: Params, encoded: Sequence[Encoded], edges: Sequence[int], batch_size: int, pad: int
    ) -> Float[np.ndarray, "S N C"]:
        """Logits of every row exactly once, in the rows' order; rows of like length share a batch."""
        lengths = np.asarray([len(text.ids) for text in encoded], np.int64)
        seeds = jax.tree.leaves(params)[0].shape[0]
        params = self._spread(params, seeds)
        out = np.zeros((seeds, len(encoded), self.model.classes), np.float32)
        bucket = buckets(lengths, edges)
        for index, edge in enumerate(edges):
            rows = np.flatnonzero(bucket == index)
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                filled = np.resize(part, batch_size)  # one shape a bucket: the last batch repeats rows
                padded = pad_rows([encoded[i] for i in filled.tolist()], edge, pad)
                program = self.prepare_predict(seeds, batch_size, edge, now=True).result()
                logits = program(params, self._spread(padded, seeds, None, 0))
                out[:, part] = np.asarray(logits)[:, : len(part)]
        return out


def bytes_per_seed(model: SequenceClassifier, parameters: int, batch_size: int, length: int) -> int:
    """Memory one seed takes while training: parameters, gradient and two moments in float32, and activations."""
    c = model.config
    width = 4 if c.dtype == "float32" else 2
    per_layer = batch_size * length * (14 * c.width + 3 * c.hidden) * width + 3 * batch_size * c.heads * length**2 * 4
    return 16 * parameters + c.layers * per_layer


def seeds_that_fit(one_seed: int, seeds: int, budget: int | None, devices: int = 1) -> int:
    """How many seeds train together, at least one: all, or what 80 % of each device's memory (`budget`) holds.

    More than there are devices are a multiple of them, so that each device gets as many.
    """
    fit = seeds if budget is None else min(seeds, devices * (int(0.8 * budget) // one_seed))
    return max(1, fit - fit % devices if fit > devices else fit)
