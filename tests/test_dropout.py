"""Dropout's bits are a hash of (seed, row, place): right in number, independent, and equal on both ways."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convattn_jax.model.dropout import dropout, keep_elements, keep_pairs, seed_from_key

SEED = seed_from_key(jax.random.key(0))
X = jnp.ones((8, 32, 64))


def bits(seed=SEED, rate=0.5, shape=(16, 64, 64)):
    return np.asarray(keep_elements(seed, shape, rate))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_stays_is_one_minus_the_rate_in_every_row_and_place(rate):
    kept = bits(rate=rate)
    for axes in ((1, 2), (0, 1), (0, 2)):
        share = kept.mean(axes)
        error = (rate * (1 - rate) / (kept.size / share.size)) ** 0.5
        assert abs(share - (1 - rate)).max() < 5 * error


def test_rows_places_and_seeds_are_independent():
    kept = bits()
    other = bits(seed_from_key(jax.random.key(1)))
    neighbours = [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[:, :, 1:], kept[:, :, :-1]), (kept, other)]
    for a, b in neighbours:
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / a.size**0.5


@pytest.mark.parametrize("word", [0, 1])
def test_both_words_of_the_seed_decide(word):
    kept, other = bits(), bits(SEED.at[word].add(1))
    assert abs((kept == other).mean() - 0.5) < 5 * 0.5 / kept.size**0.5


def test_heads_and_pairs_of_positions_are_independent():
    kept = np.asarray(keep_pairs(SEED, (4, 4, 32, 32), 0.5))
    for axis in range(4):
        a, b = np.take(kept, range(1, kept.shape[axis]), axis), np.take(kept, range(kept.shape[axis] - 1), axis)
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / a.size**0.5
    assert (kept != kept.swapaxes(2, 3)).any()


# Places (query, key) that belong together, wherever the first of them stands: an even choice would show their bond.
TOGETHER = {
    "neighbours of a query": [(0, 0), (0, 1)],
    "neighbours of a key": [(0, 0), (1, 0)],
    "every other key": [(0, 0), (0, 2)],
    "on a diagonal": [(0, 0), (1, 1)],
    "on the other diagonal": [(0, 1), (1, 0)],
    "three of a query": [(0, 0), (0, 1), (0, 2)],
    "three of a rectangle": [(0, 0), (0, 1), (1, 0)],
    "a rectangle": [(0, 0), (0, 1), (1, 0), (1, 1)],
    "a wide rectangle": [(0, 0), (0, 5), (3, 0), (3, 5)],
    "a cycle of six": [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)],
}


@pytest.mark.parametrize("shape", [(96, 12, 12, 12), (1, 3, 256, 256)], ids=["short rows", "long rows"])
@pytest.mark.parametrize("places", TOGETHER.values(), ids=TOGETHER)
def test_pairs_of_positions_are_dropped_independently(places, shape):
    rate = 0.3
    dropped = ~np.asarray(keep_pairs(SEED, shape, rate))
    queries, keys = (length - max(place) for length, place in zip(shape[2:], zip(*places, strict=True), strict=True))
    code = sum(
        dropped[:, :, i : i + queries, j : j + keys].astype(int) << number for number, (i, j) in enumerate(places)
    )
    counts = np.bincount(np.ravel(code), minlength=1 << len(places))
    struck = [bin(case).count("1") for case in range(len(counts))]
    expected = np.size(code) * np.array([rate**n * (1 - rate) ** (len(places) - n) for n in struck])
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5


def test_every_query_and_every_key_of_every_row_loses_the_same_share():
    rate, shape = 0.1, (8, 12, 128, 128)
    dropped = ~np.asarray(keep_pairs(SEED, shape, rate))
    for axes in (2, 3, (2, 3), (0, 1)):
        struck = dropped.sum(axes)
        draws = dropped.size / struck.size
        spread = ((struck - draws * rate) ** 2).mean() / (draws * rate * (1 - rate))
        assert abs(spread - 1) < 6 * (2 / struck.size) ** 0.5


def test_a_row_has_the_same_bits_whatever_stands_beside_it():
    assert np.array_equal(bits(shape=(4, 8, 64)), bits(shape=(16, 8, 64))[:4])
    few, many = (np.asarray(keep_pairs(SEED, shape, 0.5)) for shape in ((2, 2, 8, 8), (3, 4, 16, 12)))
    assert np.array_equal(few, many[:2, :2, :8, :8])


def test_what_stays_is_scaled_and_the_mean_is_kept():
    out = np.asarray(dropout(X, 0.25, SEED))
    assert set(np.unique(out)) == {0.0, np.float32(4 / 3)}
    assert out.mean() == pytest.approx(1.0, abs=0.02)


def test_the_gradient_passes_where_the_value_passed():
    out, pull = jax.vjp(lambda x: dropout(x, 0.25, SEED), X)
    np.testing.assert_array_equal(pull(jnp.ones_like(X))[0], out)


def test_without_a_seed_or_a_rate_nothing_is_dropped():
    assert dropout(X, 0.5, None) is X
    assert dropout(X, 0.0, SEED) is X


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_stays(dtype):
    assert dropout(X.astype(dtype), 0.1, SEED).dtype == dtype


def test_bits_are_the_same_under_jit_and_vmap():
    seeds = jnp.stack([SEED, SEED + 1])
    mapped = jax.jit(jax.vmap(lambda seed: dropout(X, 0.5, seed)))(seeds)
    for one, seed in zip(mapped, seeds, strict=True):
        np.testing.assert_array_equal(one, dropout(X, 0.5, seed))


def test_seeds_of_different_keys_differ():
    seeds = [tuple(seed_from_key(jax.random.key(i)).tolist()) for i in range(20)]
    assert all(a != b for a, b in itertools.combinations(seeds, 2))
