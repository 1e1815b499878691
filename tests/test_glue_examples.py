"""Texts as rows for classification, and the plan of an epoch's batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convattn_jax.config import UserError
from convattn_jax.data import tokenizer as tokenizers
from convattn_jax.glue.examples import BUCKETS, buckets, encode, epoch_batches, lengths_met, truncate


@pytest.fixture(scope="module")
def tokenizer():
    lines = [f"the cat number {i} sat on the mat and looked at {i * 7} dogs" for i in range(200)]
    return tokenizers.train(lines, 60, "reference")


def test_a_sentence_and_a_pair_are_framed(tokenizer):
    t = tokenizer
    a, b = (ids.tolist() for ids in t.encode(["the cat sat", "on the mat"]))
    (single,) = encode(t, [("the cat sat",)], 64)
    assert single.ids.tolist() == [t.cls, *a, t.sep]
    assert single.types.tolist() == [0] * len(single.ids)
    (pair,) = encode(t, [("the cat sat", "on the mat")], 64)
    assert pair.ids.tolist() == [t.cls, *a, t.sep, *b, t.sep]
    assert pair.types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert pair.ids.dtype == pair.types.dtype == np.int32
    assert encode(t, [], 64) == []


def test_long_texts_keep_their_special_tokens(tokenizer):
    t = tokenizer
    long, short = "the cat sat on the mat and looked " * 10, "cat"
    room = 16 - 3 - len(t.encode([short])[0])
    for texts, second in [((long,), None), ((long, short), room + 2), ((short, long), 16 - room - 1)]:
        (row,) = encode(t, [texts], 16)
        assert len(row.ids) == 16
        assert row.ids[0] == t.cls
        assert row.ids[-1] == t.sep
        assert (row.ids == t.sep).sum() == len(texts)
        if second is not None:
            assert row.types.tolist() == [0] * second + [1] * (16 - second)
    with pytest.raises(UserError, match="at least 8"):
        encode(t, [("cat",)], 7)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_the_longer_text_is_cut_first(a, b, room):
    sizes = [a, b]
    while sum(sizes) > room:
        sizes[0 if sizes[0] > sizes[1] else 1] -= 1
    assert truncate([a, b], room) == sizes
    assert truncate([a], room) == [min(a, room)]


def test_a_row_takes_the_shortest_bucket_that_holds_it():
    assert buckets(np.array([1, 24, 25, 48, 128])).tolist() == [0, 0, 1, 1, len(BUCKETS) - 1]
    with pytest.raises(ValueError, match="a row of 129 tokens is longer than the last bucket, 128"):
        buckets(np.array([3, 129]))


def plan(lengths, size, epoch=0, seed=0, task="rte"):
    return epoch_batches(lengths, size, BUCKETS, task, epoch, seed)


@given(st.lists(st.integers(2, 128), min_size=1, max_size=150), st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_row_once_in_batches_that_hold_it(lengths, size, epoch):
    lengths = np.array(lengths)
    batches = plan(lengths, size, epoch)
    assert sorted(np.concatenate([rows for _, rows in batches]).tolist()) == list(range(len(lengths)))
    assert all(lengths[rows].max() <= length for length, rows in batches)
    assert len(batches) == -(-len(lengths) // size)
    assert sum(len(rows) < size for _, rows in batches) <= 1
    assert sorted({length for length, _ in batches}) == lengths_met(lengths, size, BUCKETS)


def test_a_length_is_met_only_by_what_shorter_rows_leave_over():
    """Three rows wait for the next bucket, which fills a batch of five with them; the last has two left."""
    assert lengths_met(np.array([10] * 3 + [30] * 3 + [60]), 5, BUCKETS) == [48, 80]


def test_seeds_share_shapes_but_not_rows():
    lengths = np.random.default_rng(0).integers(4, 100, 500)
    first, again, second = plan(lengths, 16), plan(lengths, 16), plan(lengths, 16, seed=1)
    shapes = [[(length, len(rows)) for length, rows in batches] for batches in (first, second)]
    assert shapes[0] == shapes[1]
    assert [rows.tolist() for _, rows in first] == [rows.tolist() for _, rows in again]
    assert all(sorted(a) != sorted(b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_epochs_and_tasks_differ_in_the_order_of_their_buckets():
    lengths = np.random.default_rng(0).integers(4, 100, 500)
    orders = {
        tuple(length for length, _ in batches)
        for batches in (plan(lengths, 16), plan(lengths, 16, epoch=1), plan(lengths, 16, task="mrpc"))
    }
    assert len(orders) == 3


def test_most_rows_stay_in_their_own_bucket():
    lengths = np.random.default_rng(0).integers(4, 100, 1000)
    own = np.array(BUCKETS)[buckets(lengths)]
    moved = sum((own[rows] < length).sum() for length, rows in plan(lengths, 16))
    assert 0 < moved < 16 * len(BUCKETS)


def test_no_rows_are_no_epoch():
    with pytest.raises(ValueError, match="rte: there are no rows"):
        plan(np.empty(0, int), 16)
