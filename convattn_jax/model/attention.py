"""Attention with relative positions: scores, masked softmax, values; pure functions.

    alpha_ij = softmax_j(score_ij over the visible j)        out_i = sum_j dropout(alpha_ij) v_j

(Chang et al. 2021, section 3). B batch, T query position, S key position, H heads, K head size, D width, W taps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Integer

from convattn_jax.model.dropout import Seed, keep_pairs
from convattn_jax.model.layers import wide_product
from convattn_jax.model.score import Score

# Queries (B, T, H, K), keys and values (B, S, H, K); or of one product, side by side: (B, T, H, 3, K)
QKV = tuple[Array, Array, Array] | Float[Array, "B T H 3 K"]
MAX_ONE_HOT_TAPS = 65  # a one-hot product beats a gather up to about this many taps (docs/performance.md)


def visible(query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """Query i sees key j iff they share a segment and the key is no padding (segment 0)."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments != 0)[:, None, :])[:, None]


def _distance(queries: int, keys: int, width: int) -> Int[np.ndarray, "T S"]:
    """c(j-i) + n: the tap between each query and key."""
    return np.clip(np.arange(keys) - np.arange(queries)[:, None], -(width // 2), width // 2) + width // 2


def _one_hot_distance(queries: int, keys: int, width: int, dtype: jnp.dtype) -> Float[Array, "T S W"]:
    return jax.nn.one_hot(_distance(queries, keys, width), width, dtype=dtype)


def expand_taps(taps: Float[Array, "B H T W"], keys: int) -> Float[Array, "B H T S"]:
    """out[..., i, j] = taps[..., i, c(j-i)]: a value per tap becomes a value per key."""
    queries, width = taps.shape[-2:]
    if width <= MAX_ONE_HOT_TAPS:
        return jnp.einsum("bhtw,tsw->bhts", taps, _one_hot_distance(queries, keys, width, taps.dtype))
    distance = jnp.broadcast_to(_distance(queries, keys, width), (*taps.shape[:-1], keys))
    return jnp.take_along_axis(taps, distance, axis=-1)


def expand_fixed(taps: Float[Array, "H W"], queries: int, keys: int) -> Float[Array, "H T S"]:
    """out[h, i, j] = taps[h, c(j-i)]."""
    if taps.shape[-1] <= MAX_ONE_HOT_TAPS:
        return jnp.einsum("hw,tsw->hts", taps, _one_hot_distance(queries, keys, taps.shape[-1], taps.dtype))
    return taps[:, _distance(queries, keys, taps.shape[-1])]


def dynamic_taps(x: Float[Array, "B T H K"], taps: Float[Array, "#H K W"]) -> Float[Array, "B H T W"]:
    """The kernel that each query or key makes for itself, x_t.w[tap], in logit units."""
    wide = jnp.promote_types(x.dtype, jnp.float32)  # the taps' precision decides that of their gradient
    return jnp.einsum("bthk,hkw->bhtw", x.astype(wide), jnp.broadcast_to(taps, (x.shape[2], *taps.shape[1:])))


def scores(q: Float[Array, "B T H K"], k: Float[Array, "B S H K"], score: Score) -> Float[Array, "#B #H T S"]:
    """All parts of the score, summed, in float32 or better."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    total = jnp.zeros((1, 1, q.shape[1], k.shape[1]), wide)
    fixed = score.fixed
    if score.content:
        total += wide_product("bthk,bshk->bhts", q, k) * score.content
    if score.dynamic_query is not None:
        taps = dynamic_taps(q, score.dynamic_query)
        if fixed is not None and fixed.shape[-1] == taps.shape[-1]:  # one expansion serves both
            taps, fixed = taps + fixed[:, None], None
        total += expand_taps(taps, k.shape[1])
    if fixed is not None:
        total += expand_fixed(fixed, q.shape[1], k.shape[1])
    if score.dynamic_key is not None:
        total += expand_taps(dynamic_taps(k, score.dynamic_key), q.shape[1]).swapaxes(-1, -2)
    if score.dense is not None:
        total += score.dense
    return total


def masked_softmax(scores: Float[Array, "#B #H T S"], visible: Bool[Array, "B #H T S"]) -> Float[Array, "B #H T S"]:
    """Softmax over the visible keys; a query that sees none gets zeros, and zero gradients."""
    lowest = jnp.finfo(scores.dtype).min
    hidden = jnp.where(visible, scores, lowest)
    exp = jnp.where(visible, jnp.exp(hidden - jax.lax.stop_gradient(hidden.max(-1, keepdims=True))), 0)
    total = exp.sum(-1, keepdims=True)
    return exp / jnp.where(total == 0, 1, total)


def attention_map(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    score: Score,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Float[Array, "B H T S"]:
    """alpha, before dropout."""
    alpha = masked_softmax(scores(q, k, score), visible(query_segments, key_segments))
    return jnp.broadcast_to(alpha, (q.shape[0], q.shape[2], *alpha.shape[2:]))


def drop(
    alpha: Float[Array, "B H T S"],
    dropout_rate: float,
    seed: Seed | None,
    rows: Integer[Array, " B"] | None = None,
    heads: Integer[Array, " H"] | None = None,
) -> Float[Array, "B H T S"]:
    """dropout(alpha_ij); no dropout without a seed."""
    if seed is None or dropout_rate == 0:
        return alpha
    kept = keep_pairs(seed, alpha.shape, dropout_rate, rows, heads)
    return jnp.where(kept, alpha * (1 / (1 - dropout_rate)), 0)


def weighted_values(alpha: Float[Array, "B H T S"], v: Float[Array, "B S H K"]) -> Float[Array, "B T H K"]:
    """sum_j alpha_ij v_j."""
    return jnp.einsum("bhts,bshk->bthk", alpha.astype(v.dtype), v)


def separate(qkv: QKV) -> tuple[Array, Array, Array]:
    """Queries, keys and values as arrays of their own."""
    return qkv if isinstance(qkv, tuple) else (qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :])


def attend(
    qkv: QKV,
    score: Score,
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    dropout_rate: float,
    seed: Seed | None,
    rows: Integer[Array, " B"] | None = None,
    heads: Integer[Array, " H"] | None = None,
) -> Float[Array, "B T H K"]:
    """Attention as plain array operations: the meaning of every faster form, and its fallback.

    `rows` and `heads` are their numbers in the whole batch, where a device holds a part: dropout depends on them.
    """
    q, k, v = separate(qkv)
    alpha = attention_map(q, k, score, query_segments, key_segments)
    return weighted_values(drop(alpha, dropout_rate, seed, rows, heads), v)


Attend = Callable[..., Array]  # the signature of `attend`
