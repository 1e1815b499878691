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
from jax import Array
from jaxtyping import Float, Int

from convattn_jax.kernels import depthwise_passes
from convattn_jax.kernels.depthwise_program import Operands, Segments, Spec, Walk
from convattn_jax.kernels.inputs import NO_KEY, NO_QUERY
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
) -> tuple[Float[Array, "B T D"], ...]:
    """One array for each kernel, in the type of x.

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
        Spec(x.shape[1], x.shape[2], radii, activations, _fitted(walk, x.shape[0]), interpret)
        for walk in (forward, backward)
    )
    operands = Operands(
        x,
        tuple(kernel.taps.astype(jnp.float32) for kernel in kernels),
        tuple(kernel.bias.astype(jnp.float32)[None] for kernel in kernels),
    )
    return _convolutions(specs, operands, query_segments, key_segments)


def _fitted(walk: Walk, batch: int) -> Walk:
    """The same, with a number of texts that divides the batch."""
    return dataclasses.replace(walk, texts=math.gcd(walk.texts, batch))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolutions(
    specs: tuple[Spec, ...], operands: Operands, query_segments: Array, key_segments: Array
) -> tuple[Array, ...]:
    return _run(specs[0], operands, query_segments, key_segments, differentiated=False)[0]


def _run(spec: Spec, operands: Operands, query_segments: Array, key_segments: Array, differentiated: bool):
    return depthwise_passes.forward(spec, operands, segments_of(spec, query_segments, key_segments), differentiated)


def _forward(specs: tuple[Spec, ...], operands: Operands, query_segments: Array, key_segments: Array):
    outs, slopes = _run(specs[0], operands, query_segments, key_segments, differentiated=True)
    return outs, (operands, query_segments, key_segments, slopes)


def _backward(specs: tuple[Spec, ...], saved, d_outs: tuple[Array, ...]):
    operands, query_segments, key_segments, slopes = saved
    segments = segments_of(specs[1], query_segments, key_segments)
    return Operands(*depthwise_passes.backward(specs[1], operands, segments, slopes, d_outs)), None, None


_convolutions.defvjp(_forward, _backward)


def segments_of(spec: Spec, query_segments: Int[Array, "B T"], key_segments: Int[Array, "B T"]) -> Segments:
    """What a pass reads of the segments."""
    batch, length = query_segments.shape
    size, chunks = spec.walk.chunk, spec.chunks
    more = chunks * size - length
    queries = jnp.where(query_segments == 0, NO_QUERY, query_segments).astype(jnp.int32)
    queries = jnp.pad(queries, ((0, 0), (0, more)), constant_values=NO_QUERY)
    keys = jnp.where(key_segments == 0, NO_KEY, key_segments).astype(jnp.int32)
    keys = jnp.pad(keys, ((0, 0), (spec.reach, more + spec.reach)), constant_values=NO_KEY)

    grouped = queries.reshape(batch, chunks, size)
    earlier = jnp.tril(jnp.ones((size, size), bool), -1)
    repeated = jnp.any((grouped[..., :, None] == grouped[..., None, :]) & earlier, axis=-1)
    new = (grouped != NO_QUERY) & ~repeated
    place = jnp.cumsum(new, axis=-1) - 1
    hot = new[..., :, None] & (place[..., :, None] == jnp.arange(size))
    distinct = jnp.sum(jnp.where(hot, grouped[..., :, None], 0), axis=-2)
    return Segments(queries, keys, distinct.reshape(batch, -1), jnp.sum(new, axis=-1, dtype=jnp.int32))
