"""The fused end of a sublayer, its body run by an interpreter, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpu import absent_gpu

from convattn_jax.config import UserError
from convattn_jax.kernels import add_norm as kernel
from convattn_jax.kernels.add_norm import Walk
from convattn_jax.kernels.normalise import add_norm_implementation
from convattn_jax.model import layers

draw = np.random.default_rng(0)
SEED = jnp.asarray([3, 4], jnp.uint32)
SMALL = {"forward": Walk(rows=2, run=8, warps=4), "backward": Walk(rows=4, run=16, warps=4), "interpret": True}


def arrays(batch, length, width, dtype="float32"):
    rows = [jnp.asarray(draw.normal(1.0, 2.0, (batch, length, width)), dtype) for _ in range(3)]
    columns = [jnp.asarray(draw.normal(size=width), jnp.float32) for _ in range(2)]
    return [*rows[:2], *columns], rows[2]


def with_gradients(function, inputs, cotangent):
    def run(inputs, cotangent):
        y, pull = jax.vjp(function, *inputs)
        return y, *pull(cotangent)

    return jax.jit(run)(inputs, cotangent)


def fused(rate, seed, **options):
    return lambda x, out, scale, bias: kernel.add_norm(x, out, scale, bias, rate, seed, **(SMALL | options))


def plain(rate, seed, rows=None):
    return lambda x, out, scale, bias: layers.add_norm(x, out, scale, bias, rate, seed, rows)


# widths that are and are not a power of two; rows that fill the programs and rows that do not
@pytest.mark.parametrize("shape", [(2, 16, 32), (3, 5, 24)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_kernel_is_the_plain_form_and_so_are_its_gradients(shape, rate):
    inputs, cotangent = arrays(*shape)
    ours, theirs = (with_gradients(f(rate, SEED), inputs, cotangent) for f in (fused, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_half_precision_is_no_further_from_the_truth_than_the_plain_form():
    inputs, cotangent = arrays(2, 16, 32, "bfloat16")
    wide = with_gradients(plain(0.3, SEED), [x.astype(jnp.float32) for x in inputs], cotangent.astype(jnp.float32))
    ours, theirs = (with_gradients(f(0.3, SEED), inputs, cotangent) for f in (fused, plain))
    for a, b, true in zip(ours, theirs, wide, strict=True):
        assert a.dtype == b.dtype
        error, yardstick = (np.linalg.norm(np.asarray(x, np.float32) - true) for x in (a, b))
        assert error <= 1.05 * yardstick + 1e-3


def test_a_part_of_the_batch_draws_what_the_whole_draws():
    inputs, _ = arrays(4, 6, 8)
    part, rows = [*(x[2:] for x in inputs[:2]), *inputs[2:]], jnp.asarray([2, 3], jnp.uint32)
    whole = fused(0.5, SEED)(*inputs)[2:]
    np.testing.assert_array_equal(fused(0.5, SEED, rows=rows)(*part), whole)
    np.testing.assert_allclose(plain(0.5, SEED, rows)(*part), whole, rtol=1e-4, atol=1e-5)


def test_mapped_over_seeds_it_is_what_it_is_alone():
    inputs, cotangent = zip(*(arrays(2, 4, 8) for _ in range(2)), strict=True)
    seeds = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs), jnp.stack(cotangent)

    def one(inputs, cotangent, seed):
        return with_gradients(fused(0.3, seed), inputs, cotangent)

    mapped = jax.vmap(one)(*stacked, seeds)
    for i in range(2):
        for a, b in zip(mapped, one(inputs[i], cotangent[i], seeds[i]), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_what_it_cannot_take_is_said():
    assert kernel.supports(768, jnp.bfloat16) is None
    assert "float64" in (kernel.supports(768, jnp.float64) or "")
    assert "5000" in (kernel.supports(5000, jnp.float32) or "")


def test_a_gpu_gets_the_kernel_where_it_serves_and_is_told_where_it_does_not():
    assert add_norm_implementation("gpu", 768, "bfloat16") == "pallas_gpu"
    assert add_norm_implementation("gpu", 768, "bfloat16", "plain") == "plain"
    assert add_norm_implementation("cpu", 768, "bfloat16") == "plain"
    assert add_norm_implementation("tpu", 768, "bfloat16", "pallas_tpu") == "plain"
    with pytest.raises(UserError, match=r"model.kernel=pallas_gpu .*5000 columns.*auto"):
        add_norm_implementation("gpu", 5000, "bfloat16", "pallas_gpu")


@pytest.mark.parametrize("width", [256, 768])
def test_it_compiles_for_a_gpu_as_far_as_that_goes_without_one(width):
    inputs, cotangent = arrays(2, 64, width, "bfloat16")
    function = fused(0.1, SEED, forward=None, backward=None, interpret=False)
    gradient = jax.jit(lambda inputs, cotangent: jax.vjp(function, *inputs)[1](cotangent))
    with absent_gpu():
        text = gradient.trace(inputs, cotangent).lower(lowering_platforms=("cuda",)).as_text()
    assert "add_norm_backward" in text
