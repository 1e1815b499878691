"""The pre-training objective's corruption, on the device, as a function of (key, rows) (Devlin et al. 2019, 3.1)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from convattn_jax.config import check
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.model.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How much is predicted; `configs/base.py` documents each key."""

    rate: float
    whole_words: bool

    def __post_init__(self):
        check(0 < self.rate < 1, f"masking.rate={self.rate} must lie between 0 and 1")

    def slots(self, length: int) -> int:
        """P: the most tokens of a row that are ever predicted."""
        return math.ceil(self.rate * length)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the model side knows of the ids: the ones with a meaning, which are special, which begin a word."""

    mask: int
    special: np.ndarray
    starts_word: np.ndarray
    pad: int = 0
    cls: int = 2
    sep: int = 3

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Reads it off a tokenizer."""
        t = tokenizer
        return cls(t.mask, t.special, t.starts_word, t.pad, t.cls, t.sep)


class Masked(NamedTuple):
    """A corrupted batch: what the encoder reads, and the P slots it is asked about; unused slots weigh nothing."""

    inputs: Inputs
    positions: Int[Array, "B P"]
    labels: Int[Array, "B P"]
    weights: Float[Array, "B P"]
    hidden: Bool[Array, "B P"]  # the slot shows [MASK]; the others show a random or the right token


def mask_tokens(key: Array, inputs: Inputs, vocabulary: Vocabulary, config: MaskingConfig) -> Masked:
    """Chooses `rate` of each row's own ordinary tokens; 80 % become [MASK], 10 % a random ordinary id, 10 % stay."""
    order_key, kind_key, random_key = jax.random.split(key, 3)
    ids = inputs.ids
    ordinary = inputs.valid & ~jnp.asarray(vocabulary.special)[ids]
    slots = config.slots(ids.shape[1])
    wanted = jnp.clip(jnp.round(config.rate * ordinary.sum(1)).astype(jnp.int32), 1, slots)
    wanted = jnp.minimum(wanted, ordinary.sum(1))

    if config.whole_words:
        # a special token ends a word too, so words never reach across segments
        begins = jnp.asarray(vocabulary.starts_word | vocabulary.special)[ids]
        word = jnp.cumsum(begins.astype(jnp.int32), axis=1)
        positions, chosen = _whole_words(order_key, word, ordinary, wanted, slots)
    else:
        draw = jnp.where(ordinary, jax.random.uniform(order_key, ids.shape), -1.0)
        positions = jnp.argsort(-draw, axis=1)[:, :slots]  # a mesh would gather all rows for top_k
        chosen = jnp.arange(slots) < wanted[:, None]

    labels = jnp.take_along_axis(ids, positions, axis=1)
    kind = jax.random.uniform(kind_key, positions.shape)
    candidates = jnp.asarray(np.flatnonzero(~vocabulary.special), ids.dtype)
    random_ids = candidates[jax.random.randint(random_key, positions.shape, 0, len(candidates))]
    shown = jnp.where(kind < 0.8, vocabulary.mask, jnp.where(kind < 0.9, random_ids, labels))
    return Masked(
        inputs=inputs._replace(ids=_put(ids, positions, shown, chosen)),
        positions=positions,
        labels=labels,
        weights=chosen.astype(jnp.float32),
        hidden=chosen & (kind < 0.8),
    )


def _whole_words(key: Array, word: Array, ordinary: Array, wanted: Array, slots: int) -> tuple[Array, Array]:
    """Words in random order, as many as fit whole into `wanted` tokens; (positions, chosen), each (B, slots)."""
    batch, length = word.shape
    draw = jnp.take_along_axis(jax.random.uniform(key, (batch, length + 1)), word, axis=1)
    order = jnp.argsort(jnp.where(ordinary, draw, 2.0), axis=1, stable=True)
    sorted_word = jnp.take_along_axis(jnp.where(ordinary, word, -1), order, axis=1)
    last = jnp.concatenate([sorted_word[:, 1:] != sorted_word[:, :-1], jnp.ones((batch, 1), bool)], axis=1)
    place = jnp.broadcast_to(jnp.arange(length), word.shape)
    end = jax.lax.cummin(jnp.where(last, place, length), axis=1, reverse=True)  # where this token's word ends
    fits = (end < wanted[:, None]) & (sorted_word >= 0)
    # should the first word alone be longer than all that is wanted, its beginning is masked: a row is never idle
    lonely = (place < wanted[:, None]) & ~fits[:, :1] & (sorted_word == sorted_word[:, :1]) & (sorted_word >= 0)
    return order[:, :slots], (fits | lonely)[:, :slots]


def _put(ids: Array, positions: Array, values: Array, chosen: Array) -> Array:
    """ids with values at the chosen positions, by comparison: (B, T, P) booleans fuse, a scatter does not."""
    here = (jnp.arange(ids.shape[1])[None, :, None] == positions[:, None, :]) & chosen[:, None, :]
    return jnp.where(here.any(-1), jnp.where(here, values[:, None, :], 0).sum(-1), ids)
