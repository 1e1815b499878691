"""The step is pure, accumulation changes nothing, and the loop logs, evaluates and saves in its rhythm."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convattn_jax import train
from convattn_jax.account import Account
from convattn_jax.config import UserError
from convattn_jax.train import TrainConfig, TrainState, make_train_step


class Regression:
    """Least squares with weighted slots, noise as dropout."""

    def prepare(self, key, rows):
        weights = (jax.random.uniform(key, rows.shape) < 0.7).astype(jnp.float32)
        return {"x": rows, "weights": weights}, weights.sum()

    def sums(self, params, batch, key):
        noise = 0.0 if key is None or not params["noisy"].shape[0] else jax.random.normal(key)
        error = jnp.square(batch["x"] @ params["kernel"] - 1.0 + noise)
        loss = (error[:, None] * batch["weights"]).sum()
        return {"loss": loss, "weight": batch["weights"].sum(), "tokens": batch["weights"].size}


ROWS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
OPTIMIZER = optax.sgd(0.1)


def state(noisy=False, step=0):
    params = {"kernel": jnp.asarray([0.5, -1.0, 2.0]), "noisy": jnp.zeros(int(noisy))}
    return TrainState(jnp.asarray(step, jnp.int32), params, OPTIMIZER.init(params))


def step_of(seed=0, accumulate=1):
    return jax.jit(make_train_step(Regression(), OPTIMIZER, seed, accumulate))


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_changes_nothing_but_the_order_of_sums(accumulate):
    once, sums = step_of()(state(), ROWS)
    parts, sums_of_parts = step_of(accumulate=accumulate)(state(), ROWS)
    np.testing.assert_allclose(once.params["kernel"], parts.params["kernel"], rtol=1e-5)
    for name in sums:
        np.testing.assert_allclose(sums[name], sums_of_parts[name], rtol=1e-5)


def test_the_gradient_is_of_the_mean_over_all_slots():
    new, sums = step_of()(state(), ROWS)
    expected = jax.grad(lambda kernel: mean_loss(kernel, 0))(state().params["kernel"])
    np.testing.assert_allclose((state().params["kernel"] - new.params["kernel"]) / 0.1, expected, rtol=1e-4)
    assert sums["gradient_norm"] == pytest.approx(float(jnp.linalg.norm(expected)), rel=1e-4)


def mean_loss(kernel, seed):
    key = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))[0]
    batch, weight = Regression().prepare(key, jnp.asarray(ROWS))
    return Regression().sums({"kernel": kernel, "noisy": jnp.zeros(0)}, batch, None)["loss"] / weight


@pytest.mark.parametrize("accumulate", [1, 2])
def test_randomness_is_a_function_of_seed_and_step(accumulate):
    def new(seed, step):
        return np.asarray(step_of(seed, accumulate)(state(True, step), ROWS)[0].params["kernel"])

    assert np.array_equal(new(0, 3), new(0, 3))
    assert not np.array_equal(new(0, 3), new(0, 4))
    assert not np.array_equal(new(0, 3), new(1, 3))


def test_each_part_of_a_batch_has_noise_of_its_own():
    equal = np.ones_like(ROWS)
    whole, parts = (step_of(accumulate=n)(state(True), equal)[1]["loss"] for n in (1, 8))
    assert not np.isclose(whole, parts)


# --- the loop ---

CONFIG = TrainConfig(
    steps=10,
    batch_size=8,
    accumulate=1,
    log_every=2,
    eval_every=4,
    eval_rows=8,
    skip_nonfinite=0,
    deterministic=False,
)


class Run:
    """Plays `fit` with a step that only counts; `figures` overrides what a step returns."""

    def __init__(
        self, start=0, config=CONFIG, save_seconds=1e9, figures=None, eval_loss=1.0, window=(), stop_at=None, skipped=0
    ):
        self.rows, self.saved, self.notes, self.figures = [], [], {}, figures or {}
        self.calls = []
        self.account = Account()
        self.account.resume({"training": 5.0}, 5.0)
        fields = TrainState(jnp.asarray(start), {}, ())
        self.end = train.fit(
            fields,
            config,
            train_step=self.step,
            batches=(np.zeros(1) for _ in range(start, config.steps)),
            evaluate=lambda params: self.calls.append("evaluate") or {"eval_loss": eval_loss},
            save=self.save,
            save_seconds=save_seconds,
            record=self.rows.append,
            account=self.account,
            window=window,
            skipped=skipped,
            stop=lambda step: step == stop_at,
            alive=lambda compiling=False: self.calls.append("compiling" if compiling else "alive"),
        )

    def save(self, state, metrics, notes):
        self.calls.append("save")
        self.saved.append((int(state.step), metrics and metrics["eval_loss"]))
        self.notes = json.loads(json.dumps(notes))

    def step(self, state, rows):
        step = int(state.step) + 1
        sums = {
            "loss": 3.0 * step,
            "weight": 3.0,
            "tokens": 100.0 * step,
            "gradient_norm": float(step),
        } | self.figures.get(step, {})
        return state.replace(step=jnp.asarray(step)), jax.tree.map(np.float32, sums)


def test_rows_are_means_over_windows():
    run = Run()
    assert [row["step"] for row in run.rows] == [2, 4, 6, 8, 10]
    assert [row["loss"] for row in run.rows] == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert [row["gradient_norm"] for row in run.rows] == [1.5, 3.5, 5.5, 7.5, 9.5]
    assert [row["step"] for row in run.rows if "eval_loss" in row] == [4, 8, 10]
    assert int(run.end.step) == 10


def test_speed_is_in_tokens_without_padding():
    first, second = Run().rows[:2]
    assert second["tokens_per_second"] * (second["seconds"] - first["seconds"]) == pytest.approx(300 + 400)
    assert not any("tokens" in row for row in Run().rows)


def test_a_window_weighs_its_slots_alike():
    run = Run(figures={1: {"loss": 8.0, "weight": 2.0}, 2: {"loss": 6.0, "weight": 12.0}})
    assert run.rows[0]["loss"] == 1.0


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def test_a_resumed_run_writes_the_rows_of_an_uninterrupted_one():
    assert timeless(Run(start=4).rows) == timeless(Run().rows)[2:]


@pytest.mark.parametrize("at", range(1, 10))
def test_a_run_stopped_at_any_step_writes_the_rows_of_an_uninterrupted_one(at):
    figures = {step: {"loss": 1 / step, "weight": float(step % 3 + 1)} for step in range(1, 11)}
    stopped = Run(figures=figures, stop_at=at)
    assert int(stopped.end.step) == at
    assert stopped.saved[-1][0] == at
    assert len(stopped.notes["window"]) == at % CONFIG.log_every
    resumed = Run(start=at, figures=figures, window=stopped.notes["window"])
    assert timeless(stopped.rows + resumed.rows) == timeless(Run(figures=figures).rows)


def test_it_stops_without_saving_twice():
    assert Run(stop_at=4).saved == [(4, 1.0)]
    assert Run(stop_at=10).saved == [(4, 1.0), (8, 1.0), (10, 1.0)]


def test_every_second_is_charged_to_something():
    now = iter(range(1000))
    account = Account(clock=lambda: next(now))
    for kind in ("starting", "waiting", "training", "waiting"):
        account.charge(kind)
    assert {kind: seconds for kind, seconds in account.seconds.items() if seconds} == {
        "starting": 1,
        "waiting": 2,
        "training": 1,
    }
    assert account.trained == 3
    account.resume({"training": 50.0, "waiting": 2.0, "saving": 7.0}, trained=60.0)
    assert account.seconds["lost"] == 5 + 8  # what this process took to start, and what is trained again
    assert (account.trained, account.seconds["saving"], account.seconds["starting"]) == (52.0, 7.0, 0.0)


def test_training_time_goes_on_from_what_was_trained_before():
    seconds = [row["seconds"] for row in Run().rows]
    assert seconds[0] >= 5.0
    assert seconds == sorted(seconds)


def test_it_saves_at_each_evaluation_and_between_them_when_time_is_up():
    assert Run().saved == [(4, 1.0), (8, 1.0), (10, 1.0)]
    assert Run(save_seconds=-1.0).saved == [(2, None), (4, 1.0), (6, None), (8, 1.0), (10, 1.0)]


def test_it_says_after_each_long_piece_of_work_that_it_gets_on():
    evaluated = ["evaluate", "alive", "save", "alive"]
    steps = ["alive"] * 4
    assert Run(config=dataclasses.replace(CONFIG, steps=8)).calls == [
        *steps,
        "compiling",
        *evaluated,
        *steps,
        *evaluated,
    ]


def test_the_last_step_is_logged_evaluated_and_saved_whatever_the_rhythm():
    run = Run(config=dataclasses.replace(CONFIG, steps=5))
    assert [row["step"] for row in run.rows] == [2, 4, 5]
    assert run.saved == [(4, 1.0), (5, 1.0)]


@pytest.mark.parametrize(
    ("figures", "eval_loss", "message"),
    [
        ({3: {"loss": np.nan}}, 1.0, "loss is not finite at step 3: lower optimizer.learning_rate"),
        ({4: {"gradient_norm": np.inf}}, 1.0, "gradient_norm is not finite at step 4"),
        ({}, float("nan"), "eval_loss is not finite at step 4"),
    ],
)
def test_nothing_is_logged_or_saved_once_a_figure_is_not_finite(figures, eval_loss, message):
    run = object.__new__(Run)
    with pytest.raises(UserError, match=message):
        run.__init__(save_seconds=-1.0, figures=figures, eval_loss=eval_loss)
    assert run.saved == [(2, None)]
    assert [row["step"] for row in run.rows] == [2]


def test_updates_that_are_not_finite_are_left_out_as_often_as_allowed():
    config = dataclasses.replace(CONFIG, skip_nonfinite=2)
    bad = {"loss": np.nan, "skipped": 1.0}
    fine = {step: {"skipped": 0.0} for step in range(1, 11)}
    run = Run(config=config, figures=fine | {3: bad, 5: bad})
    assert [row["loss"] for row in run.rows] == [1.5, 4.0, 6.0, 7.5, 9.5]
    assert [row["skipped"] for row in run.rows] == [0, 1, 1, 0, 0]
    assert run.notes["skipped"] == 2
    with pytest.raises(UserError, match="loss is not finite at step 7"):
        Run(config=config, figures=fine | {3: bad, 5: bad, 7: bad})
    with pytest.raises(UserError, match="loss is not finite at step 7"):  # a resumed run counts on
        Run(start=6, config=config, figures=fine | {7: bad}, skipped=2)


def test_a_window_of_which_every_update_was_left_out_joins_the_next():
    config = dataclasses.replace(CONFIG, skip_nonfinite=2)
    bad = {"gradient_norm": np.inf, "skipped": 1.0}
    fine = {step: {"skipped": 0.0} for step in range(1, 11)}
    run = Run(config=config, figures=fine | {5: bad, 6: bad}, save_seconds=-1.0)
    assert [(row["step"], row["loss"], row["skipped"]) for row in run.rows] == [
        (2, 1.5, 0),
        (4, 3.5, 0),
        (8, 7.5, 2),
        (10, 9.5, 0),
    ]
    with pytest.raises(UserError, match="loss is not finite at step 10"):
        Run(config=config, figures=fine | {9: bad, 10: bad})


def test_an_update_left_out_changes_nothing_but_the_step():
    rows = ROWS.copy()
    rows[0, 0] = np.inf
    for bad, skipped in ((ROWS, 0.0), (rows, 1.0)):
        step = jax.jit(make_train_step(Regression(), optax.adam(0.1), 0, skip_nonfinite=True))
        before = TrainState(jnp.asarray(2, jnp.int32), state().params, optax.adam(0.1).init(state().params))
        after, sums = step(before, bad)
        assert float(sums["skipped"]) == skipped
        assert int(after.step) == 3
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()), (before.params, before.opt_state), (after.params, after.opt_state)
        )
        assert all(jax.tree.leaves(same)) == bool(skipped)


def test_parameters_that_are_not_finite_are_not_saved():
    class Overflowing(Run):
        def step(self, state, rows):
            state, sums = super().step(state, rows)
            return state.replace(params=jnp.asarray(np.inf if int(state.step) > 2 else 1.0)), sums

    run = object.__new__(Overflowing)
    with pytest.raises(UserError, match="a parameter is not finite at step 4"):
        run.__init__(save_seconds=-1.0)
    assert run.saved == [(2, None)]


def test_evaluation_adds_up_all_batches():
    sums = train.evaluate(
        lambda params, rows, index: {"loss": params * rows.sum(), "index": jnp.asarray(index)},
        2.0,
        [jnp.ones(3), jnp.ones(2)],
    )
    assert sums == {"loss": 10.0, "index": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "train.steps=0 must be at least 1"),
        ({"eval_every": 3}, "train.eval_every=3 must be a multiple of train.log_every=2"),
        ({"accumulate": 3}, "train.accumulate=3 does not divide train.batch_size=8"),
    ],
)
def test_senseless_settings_are_errors(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **change)
