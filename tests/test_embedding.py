"""The embedding look-up and the gradient of its table, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convattn_jax.model.embedding import TILE, add_by_scatter, add_by_sorting, lookup

draw = np.random.default_rng(0)
IDS = jnp.asarray(draw.integers(0, 5, (3, 7)))  # of 6 rows: some often, one never


@pytest.mark.parametrize("form", [add_by_scatter, add_by_sorting])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_the_embedding_gradient_add_up_each_rows_uses(form, dtype):
    gradient = jnp.asarray(draw.normal(size=(21, 4)), dtype)
    expected = np.zeros((6, 4), np.float32)
    np.add.at(expected, np.asarray(IDS).reshape(-1), np.asarray(gradient, np.float32))
    summed = form(IDS.reshape(-1), gradient, 6, jnp.dtype("float32"))
    assert summed.dtype == jnp.float32  # of the parameters, whatever the activations are
    np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_look_up_reads_rows_and_its_gradient_stays_in_the_tables_type(dtype):
    table = jnp.asarray(draw.normal(size=(6, 4)), jnp.float32)
    out, pull = jax.vjp(lambda table: lookup(table, IDS, jnp.dtype(dtype)), table)
    np.testing.assert_array_equal(out, table.astype(dtype)[IDS])
    (gradient,) = pull(jnp.ones_like(out))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient[:, 0], np.bincount(np.asarray(IDS).reshape(-1), minlength=6))


@pytest.mark.parametrize("tokens", [1, TILE - 1, TILE, 5 * TILE + 3])
@pytest.mark.parametrize("often", [0.0, 0.5, 1.0])
def test_sums_of_sorted_tiles_hold_runs_over_several_tiles(tokens, often):
    """Ids 0 to 199, of which one has a share of `often`: its run begins anywhere and ends tiles later."""
    ids = np.where(draw.random(tokens) < often, 77, draw.integers(0, 200, tokens))
    x = draw.normal(size=(tokens, 3)).astype(np.float32)
    expected = np.zeros((200, 3))
    np.add.at(expected, ids, x)
    summed = jax.jit(add_by_sorting, static_argnums=(2, 3))(jnp.asarray(ids), jnp.asarray(x), 200, jnp.dtype("float32"))
    np.testing.assert_allclose(summed, expected, rtol=1e-5, atol=1e-4)


def test_sums_of_sorted_tiles_may_be_mapped():
    ids = jnp.asarray(draw.integers(0, 6, (2, 300)))
    x = jnp.asarray(draw.normal(size=(2, 300, 3)), jnp.float32)
    mapped = jax.vmap(lambda ids, x: add_by_sorting(ids, x, 6, jnp.dtype("float32")))(ids, x)
    for one, *args in zip(mapped, ids, x, strict=True):
        np.testing.assert_allclose(one, add_by_scatter(*args, 6, jnp.dtype("float32")), rtol=1e-5, atol=1e-5)
