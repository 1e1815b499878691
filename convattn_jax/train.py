"""The train state, the pure train step, and the loop; what is trained is an `Objective`."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.experimental import multihost_utils

from convattn_jax.account import Account
from convattn_jax.config import UserError, check
from convattn_jax.watchdog import Alive

Params = Any
Batch = Any


class TrainState(struct.PyTreeNode):
    """All that changes while training."""

    step: Any  # () int32; Any, as in the other fields, for trees of shapes or shardings have this form too
    params: Params
    opt_state: optax.OptState


@runtime_checkable
class Objective(Protocol):
    """What is minimised: a weighted mean of losses over the slots of a batch."""

    def prepare(self, key: Array, rows: Array) -> tuple[Batch, Array]:
        """(batch, total weight) of the rows as they come from the host; every leaf of the batch has rows in front."""
        ...

    def sums(self, params: Params, batch: Batch, key: Array | None) -> dict[str, Array]:
        """Sums over the batch: `loss`, `weight`, `tokens` (padding not counted), further figures; dropout iff `key`."""
        ...


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run; `configs/base.py` documents each key."""

    steps: int
    batch_size: int
    accumulate: int
    log_every: int
    eval_every: int
    eval_rows: int
    skip_nonfinite: int
    deterministic: bool

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_rows"):
            check(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        check(self.skip_nonfinite >= 0, f"train.skip_nonfinite={self.skip_nonfinite} must be 0 or more")
        check(
            self.eval_every % self.log_every == 0,
            f"train.eval_every={self.eval_every} must be a multiple of train.log_every={self.log_every}",
        )
        check(
            self.batch_size % self.accumulate == 0,
            f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}",
        )


def step_keys(seed: int | Array, step: Array) -> tuple[Array, Array]:
    """The keys of a step, for preparing its batch and for dropout."""
    prepare_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return prepare_key, dropout_key


def split_batch(batch: Batch, accumulate: int) -> Batch:
    """(accumulate, B / accumulate, ...): part i takes rows i, i + accumulate, ...; each device splits what it has."""
    return jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)


def parts_of(batch: Batch, key: Array, accumulate: int) -> list[tuple[Batch, Array]]:
    """The parts of a batch and their dropout keys, as a train step takes them."""
    if accumulate == 1:
        return [(batch, key)]
    parts, keys = split_batch(batch, accumulate), jax.random.split(key, accumulate)
    return [(jax.tree.map(lambda x, i=i: x[i], parts), keys[i]) for i in range(accumulate)]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    seed: int | Array,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]:
    """(state, rows) -> (state, sums): pure; every random number in it is a function of (seed, state.step).

    With `skip_nonfinite` an update of a loss or gradient that is not finite leaves parameters and optimizer as they
    are, and `skipped` is 1.
    """

    def train_step(state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        prepare_key, dropout_key = step_keys(seed, state.step)
        batch, weight = objective.prepare(prepare_key, rows)

        def loss(params: Params, part: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
            sums = objective.sums(params, part, key)
            return sums["loss"] / jnp.maximum(weight, 1), sums

        gradient = jax.grad(loss, has_aux=True)
        if accumulate == 1:
            grads, sums = gradient(state.params, batch, dropout_key)
        else:
            parts, keys = split_batch(batch, accumulate), jax.random.split(dropout_key, accumulate)

            def add(total, part_and_key):
                return jax.tree.map(jnp.add, total, gradient(state.params, *part_and_key)), None

            shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts), keys[0])
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(add, zeros, (parts, keys))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums = {**sums, "gradient_norm": optax.tree.norm(grads)}
        if skip_nonfinite:
            finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(sums["gradient_norm"])
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
            )
            sums["skipped"] = 1.0 - finite
        return TrainState(state.step + 1, params, opt_state), sums

    return train_step


def evaluate(
    eval_step: Callable[[Params, Array, int], Mapping[str, Array]], params: Params, batches: Iterable[Array]
) -> dict[str, float]:
    """Adds up the sums of all batches, in float64."""
    totals: dict[str, float] = {}
    for sums in jax.device_get([eval_step(params, rows, index) for index, rows in enumerate(batches)]):
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


AHEAD = 2  # steps under way beside the one just dispatched: enough to keep a device busy, few enough to stop soon


class NotFiniteError(UserError):
    """Training stopped at a step of which a figure is not finite; nothing later was saved."""

    def __init__(self, name: str, step: int, found: str = ""):
        self.name, self.step, self.found = name, step, found
        super().__init__(
            f"{name} is not finite at step {step}{found and f' ({found})'}: lower optimizer.learning_rate, in another "
            "--workdir or from the last checkpoint on with --config.resume.allow=optimizer.learning_rate; or leave "
            "such updates out with train.skip_nonfinite"
        )


def fit(
    state: TrainState,
    config: TrainConfig,
    *,
    train_step: Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]],
    batches: Iterable[Array],
    evaluate: Callable[[Params], dict[str, float]],
    save: Callable[[TrainState, Mapping[str, float | int] | None, Mapping[str, Any]], None],
    save_seconds: float,
    record: Callable[[dict[str, float | int]], None],
    account: Account,
    window: Sequence[Mapping[str, float]] = (),
    skipped: int = 0,
    stop: Callable[[int], bool] = lambda step: False,
    alive: Alive = lambda compiling=False: None,
) -> TrainState:
    """Trains from `state.step` to `config.steps`, or until `stop` says so, recording one row per `log_every` steps.

    Rows are means over whole windows. A checkpoint between two rows notes the sums of its part of a window, and
    `window` gives them back, so a resumed run writes the rows that an uninterrupted one writes. `skipped` updates were
    left out before. `alive` is called whenever the run has got on.

    Raises:
      NotFiniteError: the loss, its gradient or a parameter is no longer finite; nothing is saved after that.
    """
    sums: list[Mapping[str, Any]] = list(window)
    first = int(state.step)
    timed, trained, saved = 0, account.trained, time.monotonic()
    evaluated = False
    account.charge("starting")
    for step, rows in enumerate(batches, start=first + 1):
        account.charge("waiting")
        state, step_sums = train_step(state, rows)
        sums.append(step_sums)
        if step == first + 1:
            jax.block_until_ready(step_sums)
            account.charge("compiling")
        else:
            timed += 1
            if len(sums) > AHEAD:
                jax.block_until_ready(sums[-AHEAD - 1])
            account.charge("training")
        alive()
        last, stopped = step == config.steps, stop(step)
        if step % config.log_every and not last and not stopped:
            continue

        sums = jax.device_get(sums)
        account.charge("training")
        left_out = sum(int(figures.get("skipped", 0)) for figures in sums)
        _check_finite(sums, step, config.skip_nonfinite - skipped)
        evaluation = None
        if left_out == len(sums) and last:
            raise NotFiniteError("loss", step, "as of all steps since the last row")
        if (last or step % config.log_every == 0) and left_out < len(sums):  # of nothing there is no mean
            skipped += left_out
            elapsed = account.trained - trained
            row = {"step": step, **_means(sums)}
            tokens = sum(float(figures["tokens"]) for figures in sums[len(sums) - timed :])
            row["tokens_per_second"] = tokens / elapsed if timed else 0.0
            row["seconds"] = account.trained
            if step % config.eval_every == 0 or last:
                if not evaluated:
                    alive(compiling=True)
                evaluation, evaluated = evaluate(state.params), True
                alive()
                account.charge("evaluating")
                if not math.isfinite(evaluation["eval_loss"]):
                    raise NotFiniteError("eval_loss", step, "on held-out text, after finite steps")
            record(row | (evaluation or {}))
            sums, timed, trained = [], 0, account.trained
        if evaluation or stopped or agree(time.monotonic() - saved > save_seconds):
            if not bool(all_finite(state)):
                raise NotFiniteError("a parameter", step, first_bad(state))
            notes: dict[str, Any] = {"window": [_plain(figures) for figures in sums], "skipped": skipped}
            notes["account"] = dict(account.seconds)
            save(state, evaluation, notes)
            saved = time.monotonic()
            alive()
            account.charge("saving")
        if stopped:
            break
    return state


@jax.jit
def all_finite(tree: Any) -> Array:
    """Whether no number of a tree is NaN or infinite."""
    return jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def first_bad(tree: Any) -> str:
    """The path of the first array of a tree that holds NaN or an infinity, and how many more there are; or ''."""
    bad = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not bool(jnp.isfinite(leaf).all())
    ]
    return bad[0] + (f" and {len(bad) - 1} more" if bad[1:] else "") if bad else ""


def _check_finite(sums: Sequence[Mapping[str, Any]], last: int, skippable: int) -> None:
    """Raises at the first of the steps up to `last` of which a figure is not finite, but for `skippable` left out."""
    for step, figures in enumerate(sums, start=last - len(sums) + 1):
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(figures[name]):
                skippable -= 1
                if skippable < 0:
                    raise NotFiniteError(name, step)
                break


def _plain(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _means(window: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Figures per slot over a window of steps; the gradient's norm is per step. Updates left out are only counted."""
    fetched = [figures for figures in window if not figures.get("skipped")]
    total = {name: sum(float(sums[name]) for sums in fetched) for name in fetched[0] if name != "skipped"}
    norm, weight = total.pop("gradient_norm"), total.pop("weight")
    total.pop("tokens", None)  # says how fast, not how well
    means = {name: value / max(weight, 1.0) for name, value in total.items()}
    means["gradient_norm"] = norm / len(fetched)
    return means | ({"skipped": len(window) - len(fetched)} if "skipped" in fetched[0] else {})


def agree(mine: bool) -> bool:
    """What the first process says, on every process: clocks differ between hosts."""
    if jax.process_count() == 1:
        return mine
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(mine)))
