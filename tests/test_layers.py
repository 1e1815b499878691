"""The parts that all variants share, against what NumPy says they mean."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from convattn_jax.model.heads import cross_entropy, sums_at_once, take_positions, tied_logits
from convattn_jax.model.layers import gelu, layer_norm, linear, wide_product

draw = np.random.default_rng(0)


def test_layer_norm_normalises_the_last_axis():
    x, scale, bias = draw.normal(3.0, 5.0, (2, 3, 8)), draw.normal(size=8), draw.normal(size=8)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * scale + bias
    out = layer_norm(*(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_of_half_precision_has_statistics_in_float32():
    x = jnp.asarray(1000 + draw.normal(size=(2, 64)), jnp.bfloat16)
    ones, zeros = jnp.ones(64), jnp.zeros(64)
    out = layer_norm(x, ones, zeros)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), layer_norm(x.astype(jnp.float32), ones, zeros), atol=0.02)


def test_layer_norm_of_equal_entries_is_its_bias_with_a_finite_gradient():
    def norm(x):
        return layer_norm(x, jnp.ones(4), jnp.full(4, 0.5))

    np.testing.assert_array_equal(norm(jnp.zeros((1, 4))), 0.5)
    assert np.isfinite(jax.grad(lambda x: norm(x)[0, 0])(jnp.zeros((1, 4)))).all()


def test_layer_norm_has_the_gradient_of_what_it_computes():
    def plain(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True)) * scale + bias

    arrays = [jnp.asarray(draw.normal(size=size), jnp.float32) for size in ((2, 3, 8), 8, 8)]
    cotangent = jnp.asarray(draw.normal(size=(2, 3, 8)), jnp.float32)
    ours, theirs = (jax.vjp(f, *arrays)[1](cotangent) for f in (layer_norm, plain))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gelu_is_x_times_the_normal_distribution_and_so_is_its_slope():
    x = np.linspace(-6, 6, 49)
    cdf, density = np.array([math.erf(v / math.sqrt(2)) / 2 + 0.5 for v in x]), np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    value, pull = jax.vjp(gelu, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, x * cdf, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones(49, jnp.float32))[0], cdf + x * density, rtol=1e-5, atol=1e-6)
    half = gelu(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), x * cdf, rtol=0.02, atol=0.005)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    logits, labels = draw.normal(0, 3, (2, 3, 7)).astype(np.float32), draw.integers(0, 7, (2, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, labels[..., None], -1)[..., 0])
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_one_reading_of_the_logits_gives_both_sums(scale):
    """What accelerators run in the place of two readings."""
    logits = scale * np.random.default_rng(0).standard_normal((3, 5, 700)).astype(np.float32)
    logits[0, 0, 3] = np.finfo(np.float32).min
    labels = np.arange(15).reshape(3, 5)
    total, picked = jax.jit(sums_at_once)(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(total, logsumexp(logits.astype(np.float64), axis=-1), rtol=1e-6)
    np.testing.assert_array_equal(picked, np.take_along_axis(logits, labels[..., None], -1)[..., 0])


def test_cross_entropy_bears_huge_logits_and_ruled_out_rows():
    lowest = np.finfo(np.float32).min
    logits = jnp.asarray([[1e4, 0.0, lowest], [0.0, 0.0, lowest]])
    loss, gradient = jax.value_and_grad(lambda x: cross_entropy(x, jnp.asarray([0, 1])).sum())(logits)
    assert loss == pytest.approx(np.log(2))
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0.5, -0.5, 0]], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_taking_positions_is_exact_and_adds_up_in_its_gradient(dtype):
    x, positions = jnp.asarray(draw.normal(size=(2, 5, 3)), dtype), jnp.asarray([[4, 0, 4], [1, 1, 1]])
    out, pull = jax.vjp(lambda x: take_positions(x, positions), x)
    np.testing.assert_array_equal(out, jnp.take_along_axis(x, positions[..., None], 1))
    assert pull(jnp.ones_like(out))[0][:, :, 0].tolist() == [[1, 0, 0, 0, 2], [0, 3, 0, 0, 0]]


def test_a_linear_map_contracts_its_axes():
    x, kernel, bias = draw.normal(size=(2, 3, 4, 5)), draw.normal(size=(4, 5, 6, 7)), draw.normal(size=(6, 7))
    out = linear(*(jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)), contracted=2)
    np.testing.assert_allclose(out, np.einsum("btij,ijkl->btkl", x, kernel) + bias, rtol=1e-4, atol=1e-5)


def test_wide_products_of_half_precision_are_in_float32():
    a, b = (jnp.asarray(draw.normal(size=(4, 64)), jnp.bfloat16) for _ in range(2))
    out = wide_product("ik,jk->ij", a, b)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.asarray(a, np.float32) @ np.asarray(b, np.float32).T, rtol=1e-5, atol=1e-5)


def test_logits_of_half_precision_and_their_gradients_are_products_accumulated_in_float32():
    x, word = (jnp.asarray(draw.normal(size=size), jnp.bfloat16) for size in ((4, 64), (7, 64)))
    word = word.astype(jnp.float32)  # as the table is kept
    logits, pull = jax.vjp(tied_logits, x, word)
    wide_x, wide_word = (np.asarray(a, np.float32) for a in (x, word))
    np.testing.assert_allclose(logits, wide_x @ wide_word.T, rtol=1e-5, atol=1e-5)
    gradient = jnp.asarray(draw.normal(size=(4, 7)), jnp.bfloat16)
    d_x, d_word = pull(gradient.astype(jnp.float32))
    assert (d_x.dtype, d_word.dtype) == (jnp.bfloat16, jnp.float32)
    wide = np.asarray(gradient, np.float32)
    np.testing.assert_allclose(np.asarray(d_x, np.float32), wide @ wide_word, rtol=0.01, atol=0.01)
    np.testing.assert_allclose(d_word, wide.T @ wide_x, rtol=1e-5, atol=1e-5)
