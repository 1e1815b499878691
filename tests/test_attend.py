"""The attention function that a configuration names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convattn_jax.config import UserError
from convattn_jax.kernels.attend import attend_by
from convattn_jax.model.attention import attend
from convattn_jax.model.score import Score


def call(function):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, 6, 2, 8)) for key in keys[:3])
    score = Score(content=0.5, fixed=jax.random.normal(keys[3], (2, 5)), dynamic_query=None)
    segments = jnp.asarray([[1, 1, 1, 1, 1, 0], [1, 1, 2, 2, 2, 2]])
    seed = jax.random.bits(keys[4], (2,), np.uint32)
    return function((q, k, v), score, segments, segments, 0.2, seed)


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_where_no_kernel_can_serve_the_plain_form_does(kernel):
    np.testing.assert_array_equal(call(attend_by(kernel)), call(attend))


def test_queries_keys_and_values_may_be_one_array():
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 6, 2, 8)) for key in keys[:3])
    segments, score = jnp.ones((2, 6), jnp.int32), Score(content=0.5, fixed=jax.random.normal(keys[3], (2, 5)))
    one, three = (attend(rows, score, segments, segments, 0.0, None) for rows in (jnp.stack([q, k, v], 3), (q, k, v)))
    np.testing.assert_array_equal(one, three)


def test_a_kernel_that_is_forced_and_cannot_run_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"model\.kernel=pallas_gpu .* not on cpu"):
        call(attend_by("pallas_gpu"))
