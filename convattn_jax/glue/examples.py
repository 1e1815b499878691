"""Texts as token rows for classification, and which rows share a batch; pure functions.

Rows are bucketed by length, so that short ones carry little padding. Which bucket each step takes depends on the task
and the rows' lengths, never on the seed: several seeds run as one program, each with its own rows in the same shapes.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from convattn_jax.config import check
from convattn_jax.data.tokenizer import Tokenizer

BUCKETS = (24, 48, 80, 128)  # few: on an accelerator each costs a compilation, which is longer than a small task


class Encoded(NamedTuple):
    """One row without padding: token ids and token types, int32 (T,) both."""

    ids: np.ndarray
    types: np.ndarray


class Batch(NamedTuple):
    """The numbers of the rows (B,) of one step, all to be padded to `length` tokens."""

    length: int
    rows: np.ndarray


def encode(tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]], max_length: int) -> list[Encoded]:
    """Rows `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` of at most `max_length` tokens, of type 0 and from b on 1.

    Texts that are too long lose tokens at their ends, always the longer one; special tokens are never lost.
    """
    check(max_length >= 8, f"the longest row has {max_length} tokens: it must have at least 8")
    if not texts:
        return []
    parts = [tokenizer.encode(column) for column in zip(*texts, strict=True)]
    return [_frame(tokenizer, pieces, max_length) for pieces in zip(*parts, strict=True)]


def _frame(tokenizer: Tokenizer, pieces: Sequence[np.ndarray], max_length: int) -> Encoded:
    keep = truncate([len(part) for part in pieces], max_length - 1 - len(pieces))
    cls, sep = np.array([tokenizer.cls], np.int32), np.array([tokenizer.sep], np.int32)
    framed = [np.concatenate([part[:kept], sep]) for part, kept in zip(pieces, keep, strict=True)]
    ids = np.concatenate([cls, *framed]).astype(np.int32)
    types = np.zeros(len(ids), np.int32)
    types[1 + len(framed[0]) :] = 1
    return Encoded(ids, types)


def truncate(sizes: Sequence[int], room: int) -> list[int]:
    """How much of one or two texts stays when tokens go one by one from the longer, the second where they are even."""
    if len(sizes) == 1:
        return [min(sizes[0], room)]
    a, b = sizes
    a = min(a, max(room - b, (room + 1) // 2))
    return [a, min(b, room - a)]


def buckets(lengths: np.ndarray, edges: Sequence[int] = BUCKETS) -> np.ndarray:
    """For each row the number of the shortest bucket that holds it.

    Raises:
      ValueError: a row is longer than the last edge.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > edges[-1]:
        raise ValueError(f"a row of {lengths.max()} tokens is longer than the last bucket, {edges[-1]}")
    return np.searchsorted(edges, lengths)


def lengths_met(lengths: np.ndarray, batch_size: int, edges: Sequence[int]) -> list[int]:
    """The lengths that the batches of `epoch_batches` are padded to, in increasing order."""
    met, rest, bucket = [], 0, buckets(lengths, edges)
    last = int(bucket.max(initial=-1))
    for index in range(last + 1):
        rest += int((bucket == index).sum())
        if rest >= batch_size or (index == last and rest):
            met.append(edges[index])
        rest %= batch_size
    return met


def epoch_batches(
    lengths: np.ndarray, batch_size: int, edges: Sequence[int], task_key: str, epoch: int, seed: int
) -> list[Batch]:
    """One epoch: every row exactly once, in ceil(N / batch_size) batches, only one of which may be smaller.

    The shapes are a function of (lengths, batch_size, edges, task_key, epoch), common to all seeds; the rows are one of
    the seed as well. A bucket's rows are shuffled and cut into full batches; what is left joins the next longer bucket,
    and the last remainder is the smaller batch. The order of all batches is shuffled.

    Raises:
      ValueError: there are no rows, or one is longer than the last edge.
    """
    bucket = buckets(lengths, edges)
    if not len(bucket):
        raise ValueError(f"{task_key}: there are no rows")
    key = zlib.crc32(task_key.encode())
    of_seed = np.random.default_rng([key, epoch, seed])
    batches: list[Batch] = []
    rest = np.empty(0, np.int64)
    for index in range(int(bucket.max()) + 1):
        rows = of_seed.permutation(np.concatenate([rest, np.flatnonzero(bucket == index)]))
        full = len(rows) // batch_size * batch_size
        batches += [Batch(edges[index], part) for part in rows[:full].reshape(-1, batch_size)]
        rest = rows[full:]
    if len(rest):
        batches.append(Batch(edges[int(bucket.max())], rest))
    order = np.random.default_rng([key, epoch]).permutation(len(batches))
    return [batches[i] for i in order]
