"""Token rows of different lengths in one array, and the batches that are cut from it, padded; all on the host.

S seeds, B rows of a batch, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from convattn_jax.glue import examples
from convattn_jax.glue.examples import Encoded


class Rows(NamedTuple):
    """Texts as the encoder reads them; a row whose mask is all 0 stands for none."""

    ids: Int[np.ndarray, "*S B T"] | Array
    types: Int[np.ndarray, "*S B T"] | Array
    mask: Int[np.ndarray, "*S B T"] | Array


class Batch(NamedTuple):
    """Rows with their labels, which are class numbers or scores."""

    rows: Rows
    labels: Float[np.ndarray, "*S B"] | Array


class Joined(NamedTuple):
    """Rows one behind the other: the tokens of row n are `starts[n]` to `starts[n + 1]`."""

    ids: Int[np.ndarray, " tokens"]
    types: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " N+1"]


def join(encoded: Sequence[Encoded]) -> Joined:
    """Rows as arrays, from which a batch is gathered at once; a token follows, for positions of none."""
    none = [np.zeros(1, np.int32)]
    ids, types = (np.concatenate([row[field] for row in encoded] + none) for field in (0, 1))
    return Joined(ids, types, np.cumsum([0, *(len(row.ids) for row in encoded)]))


def pad_rows(texts: Joined, numbers: Int[np.ndarray, "*S B"], length: int, pad: int) -> Rows:
    """The rows with these numbers, of `length` tokens; where a number is -1 the row is empty."""
    there = numbers >= 0
    first = np.where(there, texts.starts[numbers], 0)[..., None]
    size = np.where(there, texts.starts[numbers + 1] - texts.starts[numbers], 0)[..., None]
    token = np.arange(length)
    mask = token < size
    taken = np.where(mask, first + token, -1)
    ids = np.where(mask, texts.ids[taken], np.int32(pad))
    return Rows(ids, np.where(mask, texts.types[taken], np.int32(0)), mask.astype(np.int32))


def stack(texts: Joined, labels: np.ndarray, parts: Sequence[examples.Batch], count: int, pad: int) -> Batch:
    """The batch of one step, (S, count, T): each seed's part of the plan, its missing rows left empty."""
    numbers = np.full((len(parts), count), -1)
    numbers[:, : len(parts[0].rows)] = [part.rows for part in parts]
    found = np.where(numbers >= 0, labels[numbers], 0).astype(np.float32)
    return Batch(pad_rows(texts, numbers, parts[0].length, pad), found)
