"""Depthwise convolutions of one array, each with bias and gelu, as one differentiable call that reads it once.

    out_p[t, d] = gelu(sum_w taps_p[w, d] x[t + w - n_p, d] + bias_p[d])

(Chang et al. 2021, section 4.) The meaning is that of `model.convolution.depthwise`: a tap reaches only tokens of its
own text. Sums are float32; the gradient of taps is added up in a fixed order, without atomics.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from convattn_jax.kernels import depthwise_passes
from convattn_jax.kernels.depthwise_program import GELU_SCALE, Operands, Segments, Spec, Walk
from convattn_jax.model.convolution import Kernel

MAX_TAPS, MAX_RADIUS = 64, 16  # what a thread's registers hold

# Each thread has a channel; the chunk trades loads of neighbours against registers.
FORWARD = Walk(channels=128, warps=4, chunk=8, run=64, texts=1)
BACKWARD = Walk(channels=128, warps=4, chunk=8, run=128, texts=2)


def supports(radii: Sequence[int], dtype) -> str | None:
    """Why the kernel can't take convolutions; None when it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is neither bfloat16 nor float32"
    if max(radii) > MAX_RADIUS:
        return f"a convolution reaches {max(radii)} positions, more than {MAX_RADIUS}"
    taps = sum(2 * radius + 1 for radius in radii)
    if taps > MAX_TAPS:
        return f"the convolutions have {taps} taps, more than {MAX_TAPS}"
    return None


def depthwise_convolutions(
    x: Float[Array, "B T D"],
    kernels: Sequence[Kernel],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B T"],
    *,
    forward: Walk = FORWARD,
    backward: Walk = BACKWARD,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...]]:
    """x itself and one array for each kernel, in its type.

    The gradient that comes back for the returned x is added to that of the convolutions as it is written.

    Args:
      query_segments, key_segments: position t is reached from those whose segment is t's, and not 0; none is negative.
      forward, backward: how the passes walk, if not as usual.
      interpret: run the kernels' bodies on the CPU.
    """
    radii = tuple(kernel.taps.shape[0] // 2 for kernel in kernels)
    reason = supports(radii, x.dtype)
    if reason:
        raise ValueError(f"depthwise_convolutions: {reason}")
    activations = tuple(kernel.activation for kernel in kernels)
    specs = tuple(
        Spec(x.shape[1], x.shape[2], radii, activations, x.dtype == jnp.bfloat16, _fitted(walk, x.shape[0]), interpret)
        for walk in (forward, backward)
    )
    scales = [GELU_SCALE if kernel.activation else 1.0 for kernel in kernels]
    operands = Operands(
        x,
        tuple(scale * kernel.taps.astype(jnp.float32) for scale, kernel in zip(scales, kernels, strict=True)),
        tuple(scale * kernel.bias.astype(jnp.float32)[None] for scale, kernel in zip(scales, kernels, strict=True)),
    )
    return _convolutions(specs, operands, query_segments, key_segments)


def _fitted(walk: Walk, batch: int) -> Walk:
    """The same, with a number of texts that divides the batch."""
    return dataclasses.replace(walk, texts=math.gcd(walk.texts, batch))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolutions(
    specs: tuple[Spec, ...], operands: Operands, query_segments: Array, key_segments: Array
) -> tuple[Array, tuple[Array, ...]]:
    return operands.x, _run(specs[0], operands, query_segments, key_segments, differentiated=False)[0]


def _run(spec: Spec, operands: Operands, query_segments: Array, key_segments: Array, differentiated: bool):
    return depthwise_passes.forward(spec, operands, segments_of(spec, query_segments, key_segments), differentiated)


def _forward(specs: tuple[Spec, ...], operands: Operands, query_segments: Array, key_segments: Array):
    outs, slopes = _run(specs[0], operands, query_segments, key_segments, differentiated=True)
    return (operands.x, outs), (operands, query_segments, key_segments, slopes)


def _backward(specs: tuple[Spec, ...], saved, d_results: tuple[Array, tuple[Array, ...]]):
    operands, query_segments, key_segments, slopes = saved
    segments = segments_of(specs[1], query_segments, key_segments)
    return Operands(*depthwise_passes.backward(specs[1], operands, segments, slopes, *d_results)), None, None


_convolutions.defvjp(_forward, _backward)


def segments_of(spec: Spec, query_segments: Int[Array, "B T"], key_segments: Int[Array, "B T"]) -> Segments:
    """What a pass reads of the segments."""
    batch, length = query_segments.shape
    size, chunks, rows = spec.walk.chunk, spec.chunks, spec.walk.chunk + 2 * spec.reach
    more = chunks * size - length
    queries = jnp.pad(query_segments, ((0, 0), (0, more))).reshape(batch, chunks, size)
    keys = jnp.pad(key_segments, ((0, 0), (spec.reach, more + spec.reach)))
    windows = jnp.stack([keys[:, row : row + chunks * size : size] for row in range(rows)], axis=-1)

    earlier = jnp.tril(jnp.ones((size, size), bool), -1)
    repeated = jnp.any((queries[..., :, None] == queries[..., None, :]) & earlier, axis=-1)
    new = (queries != 0) & ~repeated
    place = jnp.cumsum(new, axis=-1) - 1
    hot = new[..., :, None] & (place[..., :, None] == jnp.arange(size))
    distinct = jnp.sum(jnp.where(hot, queries[..., :, None], 0), axis=-2)[..., None]  # 0 for none

    def words(members: Bool[Array, "B N U R"]) -> Int[Array, "B X"]:
        """A bit for each of R, the lowest first."""
        count = members.shape[-1]
        members = jnp.pad(members, (*[(0, 0)] * 3, (0, -count % 32)))
        members = members.reshape(*members.shape[:3], -1, 32).astype(jnp.uint32)
        words = jnp.sum(members << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
        return lax.bitcast_convert_type(words, jnp.int32).reshape(batch, -1)

    sees = (windows[..., None, :] == distinct) & (distinct != 0)
    owns = (queries[..., None, :] == distinct) & (distinct != 0)
    return Segments(words(sees), words(owns), jnp.sum(new, axis=-1, dtype=jnp.int32))
