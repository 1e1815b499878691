"""Dropout whose every bit is a function of (seed, global row, place in the row).

A counter instead of a random stream: the same bits whatever the tile, the mesh, `vmap` over seeds or the backend, and
the fused kernels draw exactly what the plain path draws. Elementwise integer arithmetic fuses into its neighbours, so
no mask is stored: the backward pass computes it again.

Elements are hashed one by one. Attention has T x T pairs, so there each query i and each key j of a (row, head) is
hashed to an odd factor of 32 bits, and a pair draws w_ij = a_i b_j mod 2^32: one multiplication. If the factors are
independent and uniform over the odd numbers, so is every w_ij, and so are any pairs without a cycle (i,j), (i',j),
(i',j'), ... among them. Around a cycle one word follows from the others, as w_ij w_i'j' = w_ij' w_i'j, but not its
leading bits, which alone decide, from theirs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Integer, UInt32

Seed = UInt32[Array, "2"]

# attention: row * ROW_STRIDE + head numbers the (row, head) pairs, in 32 bits: 4,096 heads, 2^20 rows of a global batch
ROW_STRIDE = 1 << 12


def seed_from_key(key: Array) -> Seed:
    """Two words that stand for a JAX random key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep(seed: Seed, row: Integer[Array, "..."], place: Integer[Array, "..."], rate: float) -> Array:
    """True with probability 1 - rate: a hash of seed, row and place, which broadcast against each other."""
    return keep_at(row_words(seed, row.astype(jnp.uint32)), place.astype(jnp.uint32), rate)


def row_words(seed: Seed, row: UInt32[Array, "..."]) -> tuple[Array, Array]:
    """The two words of each row that a place's hash takes in."""
    return _mix(row ^ seed[0]), _mix(row + seed[1])


def keep_at(words: tuple[Array, Array], place: Array, rate: float) -> Array:
    """`keep`, of a row's words; elementwise, so that kernels call it on their tiles."""
    word = place ^ words[0]
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = word ^ words[1]  # a second word of the row: blocks that collide in the first differ here
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    return (word ^ (word >> 16)) >= lowest_kept(rate)


def lowest_kept(rate: float) -> np.uint32:
    """Words from here on stay."""
    return np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(word: Array) -> Array:
    word = (word ^ (word >> 16)) * np.uint32(0x21F0AAAD)
    word = (word ^ (word >> 15)) * np.uint32(0x735A2D97)
    return word ^ (word >> 15)


def dropout(
    x: Float[Array, "B T D"], rate: float, seed: Seed | None, rows: Integer[Array, " B"] | None = None
) -> Float[Array, "B T D"]:
    """Zeroes entries with probability `rate` and divides the rest by 1 - rate; the identity without a seed.

    `rows` are the rows' numbers in the whole batch, where a device holds a part of it.
    """
    if seed is None or rate == 0.0:
        return x
    return _dropout(x, seed, rows, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropout(x: Array, seed: Array, rows: Array | None, rate: float) -> Array:
    return jnp.where(keep_elements(seed, x.shape, rate, rows), x * (1 / (1 - rate)), 0).astype(x.dtype)


def keep_elements(seed: Seed, shape: tuple[int, ...], rate: float, rows: Array | None = None) -> Array:
    """The mask of `dropout` for an array whose first axis is the batch row."""
    row = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    if rows is not None:
        row = rows.astype(jnp.uint32).reshape(-1, *(1,) * (len(shape) - 1))
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        place = place * np.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return keep(seed, row, place, rate)


def keep_pairs(
    seed: Seed, shape: tuple[int, ...], rate: float, rows: Array | None = None, heads: Array | None = None
) -> Array:
    """The mask of attention dropout for probabilities of shape (B, H, T, S).

    `rows` (B,) and `heads` (H,) are their numbers in the whole batch, where a device holds a part of it.
    """
    batch, head_count, queries, keys = shape
    of_queries, of_keys = pair_factors(seed, batch, head_count, max(queries, keys), rows, heads)
    return keep_product(of_queries[..., :queries, None], of_keys[..., None, :keys], rate)


def pair_factors(
    seed: Seed, batch: int, head_count: int, length: int, rows: Array | None = None, heads: Array | None = None
) -> tuple[UInt32[Array, "B H T"], UInt32[Array, "B H T"]]:
    """The factors of every query and of every key, whose products `keep_product` judges."""
    row = jnp.arange(batch, dtype=jnp.uint32) if rows is None else rows.astype(jnp.uint32)
    head = jnp.arange(head_count, dtype=jnp.uint32) if heads is None else heads.astype(jnp.uint32)
    words = row_words(seed, row[:, None] * np.uint32(ROW_STRIDE) + head)
    of_queries, of_keys = (_mix(jnp.arange(length, dtype=jnp.uint32) ^ word[..., None]) | 1 for word in words)
    return of_queries, of_keys


def keep_product(of_query: Array, of_key: Array, rate: float) -> Array:
    """`keep_pairs`, of the factors; elementwise, so that kernels call it on their tiles."""
    return of_query * of_key >= lowest_kept(rate)


def _forward(x: Array, seed: Array, rows: Array | None, rate: float) -> tuple[Array, tuple[Array, Array | None]]:
    return _dropout(x, seed, rows, rate), (seed, rows)


def _backward(rate: float, saved: tuple[Array, Array | None], gradient: Array) -> tuple[Array, None, None]:
    return _dropout(gradient, *saved, rate), None, None


_dropout.defvjp(_forward, _backward)
