"""Where a number stopped being finite is named: a parameter, the output of a module, a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from convattn_jax import diagnosis
from convattn_jax.masking import MaskingConfig, Vocabulary
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling
from convattn_jax.train import TrainState, first_bad, make_train_step

SIZE = 40
SPECIAL = np.arange(SIZE) < 5
VOCABULARY = Vocabulary(3, SPECIAL, SPECIAL, pad=0, cls=1, sep=2)
ROWS = jnp.asarray(np.random.default_rng(0).integers(5, SIZE, (4, 16)))


class BrokenGradient(MaskedLanguageModelling):
    """The root of a parameter that is zero: its value is finite, its slope is not."""

    def sums(self, params, batch, key):
        found = super().sums(params, batch, key)
        return found | {"loss": found["loss"] + jnp.sqrt(params["head"]["bias"][0])}


def build(kind=MaskedLanguageModelling, **changes):
    model = MaskedLM(tiny.model_config(**changes), SIZE)
    objective = kind(model, VOCABULARY, "packed", MaskingConfig(0.15, False), np.zeros(SIZE))
    return objective, jax.jit(model.initial_params)(jax.random.key(0))


def where(objective, params, accumulate=1):
    return diagnosis.where(objective, TrainState(jnp.asarray(3), params, ()), ROWS, seed=0, accumulate=accumulate)


@pytest.mark.parametrize("changes", [{}, {"loop": "scan", "remat": True}], ids=str)
def test_the_first_output_that_is_not_finite_is_named(changes):
    objective, params = build(**changes)
    encoder = params["encoder"]
    for name, layer in (("layer_1", ...), ("layers", 1)):
        if name in encoder:
            kernel = encoder[name]["mlp_in"]["kernel"]
            encoder[name]["mlp_in"]["kernel"] = kernel.at[layer].set(3e38)
    assert where(objective, params) == "first in the output of encoder/layer_1/mlp_in"


def test_a_parameter_a_gradient_and_nothing_are_named():
    objective, params = build(BrokenGradient, layers=1)
    found = where(objective, params, accumulate=2)
    assert found == "first in the gradient of head/bias, of a finite loss"
    plain, _ = build(layers=1)
    assert where(plain, params) == "not again when the step was repeated"
    params["head"]["bias"] = params["head"]["bias"].at[1].set(jnp.nan)
    assert where(plain, params) == "first in the parameter head/bias"


def test_arrays_that_are_not_finite_are_counted():
    assert first_bad({"a": jnp.zeros(2), "b": [jnp.asarray([1, jnp.inf]), jnp.asarray(jnp.nan)]}) == "b/0 and 1 more"
    assert first_bad({"a": jnp.zeros(2)}) == ""


def test_parts_are_those_of_a_train_step():
    objective, params = build(layers=1)
    state = TrainState(jnp.asarray(3), params, optax.sgd(0.0).init(params))
    _, sums = jax.jit(make_train_step(objective, optax.sgd(0.0), seed=5, accumulate=2))(state, ROWS)
    prepare, dropout = diagnosis.step_keys(5, state.step)
    batch, _ = objective.prepare(prepare, ROWS)
    parts = [objective.sums(params, part, key)["loss"] for part, key in diagnosis.parts_of(batch, dropout, 2)]
    np.testing.assert_allclose(sum(parts), sums["loss"], rtol=1e-5)
