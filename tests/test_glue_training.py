"""Seeds together equal seeds apart, the schedule, and predictions of every row exactly once."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from convattn_jax.glue.batches import Batch, Rows, join, pad_rows
from convattn_jax.glue.examples import Encoded
from convattn_jax.glue.training import Schedule, Trainer, bytes_per_seed, loss, predict, seeds_that_fit
from convattn_jax.model.classifier import SequenceClassifier, narrow

SIZE, STEPS, PAD = 40, 5, 0
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}  # float32 on CPU; a step moves a parameter by 1e-3
OF_MEANS = {"rtol": 1e-3, "atol": 1e-6}  # of gradients over the steps, whose norm is clipped at 1


@pytest.fixture(scope="module")
def trainer():
    return Trainer(SequenceClassifier(tiny.model_config(layers=1), SIZE, classes=3))


@pytest.fixture(scope="module")
def encoder(trainer):
    return fresh_encoder(trainer.model)


def fresh_encoder(model):
    return jax.jit(model.initial_params)(jax.random.key(7))["encoder"]


def texts(count, longest=14):
    draw = np.random.default_rng(count)
    ids = [draw.integers(5, SIZE, draw.integers(3, longest + 1)).astype(np.int32) for _ in range(count)]
    return [Encoded(row, np.arange(len(row), dtype=np.int32) // 4 % 2) for row in ids]


def padded(rows, length, empty=0):
    """All rows, and empty ones."""
    return pad_rows(join(rows), np.asarray([*range(len(rows)), *[-1] * empty]), length, PAD)


def batches(seeds, outputs=3):
    """Rows of each seed's own."""
    for step in range(STEPS):
        parts = [padded(texts(100 * step + seed)[:4], 16) for seed in seeds]
        labels = np.stack([np.random.default_rng(seed + step).integers(0, outputs, 4) for seed in seeds])
        yield Batch(Rows(*(np.stack(leaves) for leaves in zip(*parts, strict=True))), labels.astype(np.float32))


def train(trainer, seeds, encoders, outputs=3):
    state, keys = trainer.start(seeds, encoders, outputs)
    seen, given = [], batches(seeds, outputs)
    state = trainer.train(state, keys, outputs, Schedule(STEPS, 1e-3, 1), given, lambda *row: seen.append(row))
    assert [step for step, _, _ in seen] == list(range(1, STEPS + 1))
    assert seen[0][2] == next(batches(seeds)).rows.mask.sum()
    return state, np.stack([losses for _, losses, _ in seen])


@pytest.fixture(scope="module")
def together(trainer, encoder):
    return train(trainer, (42, 97, 834), [encoder])


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **TOLERANCE)


def of_seed(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_seeds_together_equal_one_after_the_other_with_dropout(trainer, encoder, together):
    state, losses = together
    assert trainer.model.config.dropout > 0
    assert trainer.model.config.attention_dropout > 0
    for i, seed in enumerate((42, 97, 834)):
        alone, alone_losses = train(trainer, (seed,), [encoder])
        assert_close(of_seed(state.params, i), of_seed(alone.params, 0))
        np.testing.assert_allclose(losses[:, i], alone_losses[:, 0], rtol=1e-5)


def test_a_seed_does_not_depend_on_the_others_nor_on_its_place(trainer, encoder, together):
    state, _ = train(trainer, (97, 57, 42), [encoder])
    assert_close(of_seed(state.params, 0), of_seed(together[0].params, 1))
    assert_close(of_seed(state.params, 2), of_seed(together[0].params, 0))


def test_seeds_differ_and_dropout_is_on_in_training_only(trainer, encoder, together):
    state, losses = together
    kernel = state.params["classifier"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    start, _ = trainer.start((42, 97, 834), [encoder], 3)
    batch = next(batches((42,)))
    rows = [Encoded(ids[mask == 1], types[mask == 1]) for ids, types, mask in zip(*of_seed(batch.rows, 0), strict=True)]
    logits, again = (trainer.predict(start.params, rows, [16], 4, PAD)[0] for _ in range(2))
    np.testing.assert_array_equal(logits, again)
    assert losses[0, 0] != pytest.approx(cross_entropy(logits, batch.labels[0]), rel=1e-4)


def cross_entropy(logits, labels):
    return np.mean([np.log(np.exp(row).sum()) - row[int(label)] for row, label in zip(logits, labels, strict=True)])


@pytest.mark.parametrize("outputs", [1, 2])
def test_tasks_share_a_wide_head_and_end_as_with_one_of_their_own(trainer, encoder, outputs):
    own = Trainer(SequenceClassifier(trainer.model.config, SIZE, classes=outputs))
    (wide, wide_losses), (expected, losses) = (train(one, (42, 97), [encoder], outputs) for one in (trainer, own))
    np.testing.assert_allclose(wide_losses, losses, rtol=1e-5)
    assert_close(narrow(wide.params, outputs), expected.params)
    assert not np.any(wide.params["classifier"]["kernel"][..., outputs:])
    assert not np.any(wide.params["classifier"]["bias"][..., outputs:])
    assert len({key for key in trainer._programs if key[:2] == ("step", 2)}) == 1


def test_each_seed_may_start_from_an_encoder_of_its_own(trainer, encoder):
    other = jax.tree.map(lambda leaf: leaf + 1, encoder)
    state, _ = trainer.start((42, 97), [other, encoder], 3)
    for i, expected in enumerate((other, encoder)):
        for x, y in zip(jax.tree.leaves(state.params["encoder"]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x[i], y)
    alone, _ = trainer.start((97,), [encoder], 3)
    np.testing.assert_array_equal(state.params["pooler"]["kernel"][1], alone.params["pooler"]["kernel"][0])


def test_a_step_is_adam_on_the_clipped_gradient_of_the_mean_squared_error():
    """-rate g / (|g| + eps) in the second of two steps with one gradient, for the first has rate 0."""
    model = SequenceClassifier(tiny.model_config(layers=1, dropout=0.0, attention_dropout=0.0), SIZE, classes=1)
    trainer, batch = Trainer(model), next(batches((42,)))
    batch = Batch(batch.rows, 2.0 + batch.labels)
    start, keys = trainer.start((42,), [fresh_encoder(model)], 1)
    params, one = jax.tree.map(lambda leaf: leaf[0] + 0, start.params), of_seed(batch, 0)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(model, p, one, jax.random.key(0), 1)))(params)
    scores = np.asarray(jax.jit(lambda p: predict(model, p, one.rows))(params))
    assert float(value) == pytest.approx(np.mean((scores[:, 0] - one.labels) ** 2), rel=1e-5)

    norm = float(optax.tree.norm(gradient))
    assert norm > 2
    state = trainer.train(start, keys, 1, Schedule(2, 0.01, 1), [batch, batch], lambda *row: None)
    assert float(optax.tree.norm(state.opt_state[1].mu)) == pytest.approx(1 - 0.9**2, rel=1e-4)  # clipped to norm 1
    for old, new, g in zip(*map(jax.tree.leaves, (params, state.params, gradient)), strict=True):
        clipped = np.asarray(g, np.float64) / norm
        step = 0.01 * clipped / (np.abs(clipped) + 1e-8)
        solid = np.abs(clipped) > 1e-6  # of smaller ones rounding decides
        np.testing.assert_allclose(np.asarray(old - new[0])[solid], step[solid], rtol=1e-2)


def test_the_loss_of_classes_is_cross_entropy(trainer, encoder):
    rows, labels, key = padded(texts(4), 16), np.asarray([0, 1, 2, 1]), jax.random.key(1)
    params = {**jax.jit(trainer.model.initial_params)(jax.random.key(0)), "encoder": encoder}

    @jax.jit
    def both(p):
        return loss(trainer.model, p, Batch(rows, labels), key, 3), predict(trainer.model, p, rows, key)

    value, logits = both(params)
    assert float(value) == pytest.approx(cross_entropy(np.asarray(logits), labels), rel=1e-5)


def test_empty_rows_change_neither_the_loss_nor_its_gradient(trainer, encoder):
    labels, key = np.asarray([0, 1, 2]), jax.random.key(1)
    params = of_seed(trainer.start((42,), [encoder], 3)[0].params, 0)
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: loss(trainer.model, params, batch, key, 3)))
    (value, grads), (filled_value, filled_grads) = (
        gradient(params, Batch(padded(texts(3), 16, empty), np.pad(labels, (0, empty)))) for empty in (0, 2)
    )
    assert float(value) == pytest.approx(float(filled_value), rel=1e-6)
    assert_close(grads, filled_grads)


def test_each_seed_draws_dropout_of_its_own(trainer, encoder):
    """The same parameters and rows under the keys of three seeds."""
    state, keys = trainer.start((42, 97, 834), [encoder], 3)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf[0]] * 3), state)
    batch = jax.tree.map(lambda leaf: np.stack([leaf[0]] * 3), next(batches((42,))))
    seen = []
    trainer.train(state, keys, 3, Schedule(1, 1e-3, 1), [batch], lambda *row: seen.append(row[1]))
    assert len(set(np.asarray(seen[0]).tolist())) == 3


def test_the_rate_rises_from_zero_to_its_peak_and_falls_to_zero_after_the_last_step():
    rates = Schedule(20, 0.5, 4).rates()
    np.testing.assert_allclose(rates[:5], [0, 0.125, 0.25, 0.375, 0.5])
    np.testing.assert_allclose(rates[4:], 0.5 * np.arange(16, 0, -1) / 16)
    assert rates.dtype == np.float32
    for steps, warmup in ((1, 0), (2, 0), (3, 3), (10, 1)):
        rates = Schedule(steps, 1.0, warmup).rates()
        assert len(rates) == steps
        assert rates[0] == 0
        assert np.isfinite(rates).all()
        assert (rates <= 1).all()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 128])
def test_every_row_is_predicted_in_its_place_whatever_the_batch(trainer, encoder, batch_size):
    state, _ = trainer.start((42, 97), [encoder], 3)
    rows = texts(11)
    found = trainer.predict(state.params, rows, [4, 8, 16], batch_size, PAD)
    assert found.shape == (2, 11, 3)
    apart = np.concatenate([trainer.predict(state.params, [row], [16], 4, PAD) for row in rows], axis=1)
    np.testing.assert_allclose(found, apart, rtol=1e-4, atol=1e-6)
    assert trainer.predict(state.params, [], [16], 4, PAD).shape == (2, 0, 3)
    alone = trainer.predict_alone(trainer.copies(of_seed(state.params, 1), 2), rows, [4, 8, 16], batch_size, PAD)
    np.testing.assert_allclose(alone, apart[1], rtol=1e-4, atol=1e-6)


def test_a_row_longer_than_the_longest_bucket_is_not_passed_over(trainer, encoder):
    state, _ = trainer.start((42, 97), [encoder], 3)
    with pytest.raises(ValueError, match="longer than the last bucket"):
        trainer.predict(state.params, texts(3), [4], 4, PAD)


def test_rows_are_padded_at_their_ends():
    texts = [Encoded(np.int32([5, 6, 7]), np.int32([0, 1, 1])), Encoded(np.int32([8]), np.int32([1]))]
    rows = pad_rows(join(texts), np.asarray([[0, 1], [1, -1]]), 4, 9)
    assert rows.ids.tolist() == [[[5, 6, 7, 9], [8, 9, 9, 9]], [[8, 9, 9, 9], [9, 9, 9, 9]]]
    assert rows.types.tolist() == [[[0, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]
    assert rows.mask.tolist() == [[[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]]]


def test_as_many_seeds_train_together_as_the_memory_holds():
    assert seeds_that_fit(10, 10, None) == 10
    assert seeds_that_fit(10, 10, 1000) == 10
    assert seeds_that_fit(10, 10, 50) == 4  # 80 % of 50
    assert seeds_that_fit(10, 10, 5) == 1
    assert seeds_that_fit(10, 0, None) == 1  # a step through an empty list
    assert seeds_that_fit(10, 10, 1000, devices=4) == 10  # five on two, and half of each batch
    assert seeds_that_fit(10, 10, 30, devices=4) == 8  # two on each
    assert seeds_that_fit(10, 10, 15, devices=4) == 4
    assert seeds_that_fit(10, 3, 1000, devices=4) == 3


def test_a_seed_takes_its_parameters_four_times_and_more_for_more_tokens(trainer):
    small = bytes_per_seed(trainer.model, 1000, 16, 16)
    assert small > 16_000
    assert bytes_per_seed(trainer.model, 2000, 16, 16) == small + 16_000
    assert bytes_per_seed(trainer.model, 1000, 32, 16) - 16_000 == 2 * (small - 16_000)
    assert bytes_per_seed(trainer.model, 1000, 16, 32) - 16_000 > 2 * (small - 16_000)


def test_four_devices_train_and_predict_as_one_does(trainer, together, tmp_path):
    state = together[0]
    found = {"logits": trainer.predict(state.params, texts(6), [16], 4, PAD)}
    for name, tree in {"params": state.params, "mean": state.opt_state[1].mu}.items():
        found |= {f"{name}{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
    np.savez(tmp_path / "one.npz", **found)
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(here.parent),
    }
    command = [sys.executable, here / "four_devices_glue.py", tmp_path / "one.npz"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
