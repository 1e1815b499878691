"""LN(x + dropout(out)), the end of every sublayer, as one differentiable call whose passes touch each array once.

    z = x + dropout(out)    m, s = mean and 1 / standard deviation of z    y = (z - m) s scale + bias
    dz = s (g - mean(g) - n mean(g n)),  n = (z - m) s,  g = dy scale      dx = dz,  dout = dropout(dz)

(Ba et al. 2016.) The forward pass leaves m and s; z is made again. Compiled from array operations the same takes
several times the traffic: the sums over rows, over columns and the elementwise part each read everything anew. The
gradients of scale and bias are shares of each program, added up in a fixed order outside: no atomics, bit-identical
when repeated.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, UInt32

from convattn_jax.kernels.blocks import power_of_two
from convattn_jax.model import dropout
from convattn_jax.model.layers import LAYER_NORM_EPS

MAX_WIDTH = 4096


@dataclasses.dataclass(frozen=True)
class Walk:
    """Rows that a program takes at once and in all, and its warps."""

    rows: int
    run: int
    warps: int


def walks(width: int) -> tuple[Walk, Walk]:
    """How the passes walk rows of some width: one warp, 32 numbers a thread (measured on an H200)."""
    rows = max(1, 1024 // power_of_two(width))
    return Walk(rows, 4 * rows, 1), Walk(rows, 32 * rows, 1)


@dataclasses.dataclass(frozen=True)
class Spec:
    """Everything static about a pass: N rows of D columns, T of them a text, and how they are walked."""

    count: int
    width: int
    length: int
    rate: float
    walk: Walk
    interpret: bool

    @property
    def padded(self) -> int:
        """Columns of a block, a power of two."""
        return power_of_two(self.width)

    @property
    def programs(self) -> int:
        """How many share the rows."""
        return -(-self.count // self.walk.run)


class Operands(NamedTuple):
    """What both passes read."""

    x: Any  # (N, D)
    out: Any  # (N, D)
    scale: Any  # (1, D) float32
    bias: Any
    words: tuple[Any, Any] | None  # (B,) uint32: the texts' words of dropout


def supports(width: int, dtype) -> str | None:
    """Why the kernel can't take rows; None when it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"dtype {jnp.dtype(dtype).name} is neither bfloat16 nor float32"
    if width > MAX_WIDTH:
        return f"rows of {width} columns are longer than {MAX_WIDTH}"
    return None


def add_norm(
    x: Float[Array, "B T D"],
    out: Float[Array, "B T D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    rate: float,
    seed: UInt32[Array, "2"] | None,
    rows: UInt32[Array, " B"] | None = None,
    *,
    forward: Walk | None = None,
    backward: Walk | None = None,
    interpret: bool = False,
) -> Float[Array, "B T D"]:
    """LN(x + dropout(out)), z in float32.

    Args:
      rows: the texts' numbers in the whole batch, where a device holds a part.
      forward, backward: how the passes walk, if not as usual.
      interpret: run the kernels' bodies on the CPU.
    """
    reason = supports(x.shape[2], x.dtype)
    if reason:
        raise ValueError(f"add_norm: {reason}")
    batch, length, width = x.shape
    words = None
    if seed is not None and rate:
        numbers = jnp.arange(batch, dtype=jnp.uint32) if rows is None else rows.astype(jnp.uint32)
        words = dropout.row_words(seed, numbers)
    usual = walks(width)
    first, second = (
        Spec(batch * length, width, length, rate if words else 0.0, walk, interpret)
        for walk in (forward or usual[0], backward or usual[1])
    )
    flat, columns = (batch * length, width), (1, width)
    scale, bias = scale.astype(jnp.float32).reshape(columns), bias.astype(jnp.float32).reshape(columns)
    y: Array = _add_norm((first, second), Operands(x.reshape(flat), out.reshape(flat), scale, bias, words))
    return y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_norm(specs: tuple[Spec, Spec], operands: Operands) -> Array:
    return _run_forward(specs[0], operands)[0]


def _forward(specs: tuple[Spec, Spec], operands: Operands):
    y, *moments = _run_forward(specs[0], operands)
    return y, (operands, tuple(moments))


def _backward(specs: tuple[Spec, Spec], saved, dy: Array) -> tuple[Operands]:
    operands, moments = saved
    dx, dout, *shares = _run_backward(specs[1], operands, moments, dy)
    d_scale, d_bias = (share.sum(0, keepdims=True)[:, : specs[1].width] for share in shares)
    return (Operands(dx, dx if dout is None else dout, d_scale, d_bias, None),)


_add_norm.defvjp(_forward, _backward)


# --- calls -----------------------------------------------------------------------------------------------------------


def _call(spec: Spec, kernel: Callable, name: str, inputs, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        functools.partial(kernel, spec),
        name=name,
        grid=(spec.programs,),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=spec.walk.warps, num_stages=1),
        interpret=spec.interpret,
    )(*inputs)


def _specs(spec: Spec, operands: Operands) -> tuple[pl.BlockSpec, pl.BlockSpec, Operands]:
    """The blocks of rows, of numbers a row, of all operands."""
    rows = pl.BlockSpec((spec.walk.run, spec.padded), lambda n: (n, 0))
    numbers = pl.BlockSpec((spec.walk.run,), lambda n: (n,))
    column = pl.BlockSpec((1, spec.padded), lambda n: (0, 0))
    words = None
    if operands.words is not None:
        word = pl.BlockSpec(operands.words[0].shape, lambda n: (0,))
        words = (word, word)
    return rows, numbers, Operands(rows, rows, column, column, words)


def _run_forward(spec: Spec, operands: Operands) -> Any:
    rows, numbers, specs = _specs(spec, operands)
    like, moment = jax.ShapeDtypeStruct(operands.x.shape, operands.x.dtype), _float32(spec.count)
    return _call(
        spec,
        _forward_kernel,
        "add_norm_forward",
        (operands,),
        [specs],
        [rows, numbers, numbers],
        [like, moment, moment],
    )


def _run_backward(spec: Spec, operands: Operands, moments: tuple[Array, Array], dy: Array) -> Any:
    rows, numbers, specs = _specs(spec, operands)
    like, share = jax.ShapeDtypeStruct(dy.shape, dy.dtype), _float32(spec.programs, spec.padded)
    shares = pl.BlockSpec((None, spec.padded), lambda n: (n, 0))
    twice = operands.words is not None
    return _call(
        spec,
        _backward_kernel,
        "add_norm_backward",
        (operands, moments, dy),
        [specs, (numbers, numbers), rows],
        [rows, rows if twice else None, shares, shares],
        [like, like if twice else None, share, share],
    )


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# --- inside a program ------------------------------------------------------------------------------------------------


class Tile:
    """Some rows of a program: which they are, and how they are read and written."""

    def __init__(self, spec: Spec, program: Array, step: Array):
        self.spec, self.size = spec, spec.walk.rows
        self.here = pl.ds(step * self.size, self.size)
        self.row = program * spec.walk.run + step * self.size + lax.iota(jnp.int32, self.size)
        self.column = lax.broadcasted_iota(jnp.int32, (self.size, spec.padded), 1)
        self.wanted = (self.column < spec.width) & (self.row[:, None] < spec.count)

    def load(self, ref) -> Array:
        """Rows as float32, 0 beyond their ends."""
        return plgpu.load(ref.at[self.here, :], mask=self.wanted, other=0.0).astype(jnp.float32)

    def numbers(self, ref) -> Array:
        """A number a row, as a column."""
        return plgpu.load(ref.at[self.here], mask=self.row < self.spec.count, other=0.0)[:, None]

    def store(self, ref, value: Array) -> None:
        """Writes what exists of the rows, or of numbers a row."""
        if value.ndim == 1:
            plgpu.store(ref.at[self.here], value, mask=self.row < self.spec.count)
        else:
            plgpu.store(ref.at[self.here, :], value.astype(ref.dtype), mask=self.wanted)

    def mean(self, value: Array) -> Array:
        """Over the columns, as a column; the value must be 0 beyond them."""
        return (jnp.sum(value, axis=1) * (1 / self.spec.width))[:, None]

    def kept(self, words) -> Array:
        """The mask of dropout, bit for bit that of `convattn_jax.model.dropout`."""
        spec = self.spec
        text = lax.div(jnp.minimum(self.row, spec.count - 1), spec.length)
        place = (self.row - text * spec.length)[:, None] * spec.width + self.column
        of_text = plgpu.load(words[0].at[text])[:, None], plgpu.load(words[1].at[text])[:, None]
        return dropout.keep_at(of_text, place.astype(jnp.uint32), spec.rate)

    def drop(self, value: Array, kept: Array | None) -> Array:
        """dropout(value)."""
        return value if kept is None else jnp.where(kept, value * np.float32(1 / (1 - self.spec.rate)), 0.0)


def _columns(spec: Spec, ref) -> Array:
    """A number a column, (1, D), 0 beyond the last."""
    wanted = lax.broadcasted_iota(jnp.int32, (1, spec.padded), 1) < spec.width
    return plgpu.load(ref.at[:, :], mask=wanted, other=0.0)


def _forward_kernel(spec: Spec, refs: Operands, y_ref, mean_ref, inverse_ref) -> None:
    scale, bias, program = _columns(spec, refs.scale), _columns(spec, refs.bias), pl.program_id(0)

    def body(step: Array, carry: None) -> None:
        tile = Tile(spec, program, step)
        kept = None if refs.words is None else tile.kept(refs.words)
        z = tile.load(refs.x) + tile.drop(tile.load(refs.out), kept)
        mean = tile.mean(z)
        centred = jnp.where(tile.wanted, z - mean, 0.0)
        inverse = lax.rsqrt(tile.mean(centred * centred) + LAYER_NORM_EPS)
        tile.store(y_ref, centred * inverse * scale + bias)
        tile.store(mean_ref, mean[:, 0])
        tile.store(inverse_ref, inverse[:, 0])

    lax.fori_loop(0, spec.walk.run // spec.walk.rows, body, None)


def _backward_kernel(spec: Spec, refs: Operands, moments, dy_ref, dx_ref, dout_ref, d_scale_ref, d_bias_ref) -> None:
    scale, program = _columns(spec, refs.scale), pl.program_id(0)

    def body(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        tile = Tile(spec, program, step)
        kept = None if refs.words is None else tile.kept(refs.words)
        mean, inverse = (tile.numbers(ref) for ref in moments)
        z = tile.load(refs.x) + tile.drop(tile.load(refs.out), kept)
        normal = jnp.where(tile.wanted, (z - mean) * inverse, 0.0)
        dy = tile.load(dy_ref)
        g = dy * scale
        dz = inverse * (g - tile.mean(g) - normal * tile.mean(g * normal))
        tile.store(dx_ref, dz)
        if dout_ref is not None:
            tile.store(dout_ref, tile.drop(dz, kept))
        return sums[0] + dy * normal, sums[1] + dy

    zeros = jnp.zeros((spec.walk.rows, spec.padded), jnp.float32)
    d_scale, d_bias = lax.fori_loop(0, spec.walk.run // spec.walk.rows, body, (zeros, zeros))
    d_scale_ref[...] = jnp.sum(d_scale, axis=0)
    d_bias_ref[...] = jnp.sum(d_bias, axis=0)
