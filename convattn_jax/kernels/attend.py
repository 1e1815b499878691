"""`model.attention.attend` by the implementation that serves a call best."""

import functools
from collections.abc import Callable

from jax import Array

from convattn_jax.kernels.choice import Call, default_platform, implementation
from convattn_jax.model import attention
from convattn_jax.model.score import Score


def attend_by(kernel: str) -> attention.Attend:
    """The attention function that `model.kernel` names: `auto`, or an implementation that must serve every call."""
    return functools.partial(_attend, kernel)


def _attend(
    kernel: str,
    qkv: attention.QKV,
    score: Score,
    query_segments: Array,
    key_segments: Array,
    dropout_rate: float,
    seed: Array | None,
    rows: Array | None = None,
    heads: Array | None = None,
) -> Array:
    taps = [part for part in (score.fixed, score.dynamic_query, score.dynamic_key) if part is not None]
    q, k = qkv[:2] if isinstance(qkv, tuple) else (qkv, qkv)
    call = Call(
        platform=default_platform(),
        length=q.shape[1],
        keys=k.shape[1],
        head_size=q.shape[-1],
        dtype=q.dtype.name,
        dense=score.dense is not None,
        radius=max((part.shape[-1] // 2 for part in taps), default=0),
    )
    name = implementation(call, kernel)
    if name == "plain":
        return attention.attend(qkv, score, query_segments, key_segments, dropout_rate, seed, rows, heads)
    return _fused(name)(
        qkv,
        fixed=score.fixed,
        dynamic_query=score.dynamic_query,
        dynamic_key=score.dynamic_key,
        content=score.content,
        query_segments=query_segments,
        key_segments=key_segments,
        dropout_rate=dropout_rate,
        dropout_seed=seed,
        rows=rows,
        heads=heads,
    )


def _fused(name: str) -> Callable[..., Array]:
    """The kernel's code is loaded where it serves, and no other's."""
    if name == "pallas_tpu":
        from convattn_jax.kernels.tpu import composite_attention
    else:
        from convattn_jax.kernels.composite import composite_attention
    return composite_attention
