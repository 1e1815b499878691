"""Two steps of a toy model on meshes of four devices and on one device: a program that test_sharding.py starts."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convattn_jax import sharding
from convattn_jax.masking import MaskingConfig
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.model.operations import PLAIN
from convattn_jax.objective import MaskedLanguageModelling
from convattn_jax.optim import OptimizerConfig, make_optimizer
from convattn_jax.sharding import MeshConfig
from convattn_jax.train import TrainState, make_train_step

SIZE = 40
SPECIAL = np.arange(SIZE) < 5
TOKENIZER = types.SimpleNamespace(pad=0, cls=1, sep=2, mask=3, special=SPECIAL, starts_word=SPECIAL)
ROWS = np.random.default_rng(0).integers(5, SIZE, (2, 8, 16)).astype(np.uint16)
MESHES = [MeshConfig(4, 1, 1), MeshConfig(1, 4, 1), MeshConfig(2, 1, 2)]


def trained(mesh: sharding.Mesh):
    """State and sums after two steps."""
    # all four terms: taps of heads, shared taps and segments cross the map; dropout depends on global rows and heads
    scores = ("content", "fixed", "dynamic_query", "dynamic_key")
    separable = {"kind": "separable", "radius": 2, "groups": 1, "activation": True, "half": False}
    config = tiny.model_config(layers=1, scores=scores, taps_init="wide", attention_dropout=0.3, value=separable)
    model = MaskedLM(config, SIZE, sharding.shard_operations(PLAIN, mesh))
    objective = MaskedLanguageModelling(model, TOKENIZER, "pairs", MaskingConfig(0.15, False), np.zeros(SIZE))
    optimizer = make_optimizer(OptimizerConfig(0.01, 0.0, 0.9, 0.99, 1e-6, 0.01, 1.0), 10)

    def initial(key):
        params = model.initial_params(key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    shardings = sharding.tree_shardings(jax.eval_shape(initial, jax.random.key(0)), mesh)
    rows, everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        make_train_step(objective, optimizer, seed=0),
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, everywhere),
    )
    state = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
    for batch in ROWS:
        read = functools.partial(lambda rows, first, count: rows[first : first + count], batch)
        state, sums = step(state, sharding.global_batch(read, *batch.shape, mesh))
    return state, jax.device_get(sums)


def main() -> None:
    """Raises where a mesh disagrees with one device."""
    assert jax.device_count() == 4
    alone = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    expected, expected_sums = trained(alone)
    for config in MESHES:
        state, sums = trained(sharding.make_mesh(config))
        kernel = state.params["encoder"]["layer_0"]["mlp_in"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (16 // config.fsdp, 32 // config.tensor)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=str(config))
        for name in sums:
            np.testing.assert_allclose(sums[name], expected_sums[name], rtol=1e-4, err_msg=str(config))


if __name__ == "__main__":
    main()
