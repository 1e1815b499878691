"""Where each array stands on a mesh, and that a mesh changes no number."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from convattn_jax import sharding
from convattn_jax.config import UserError
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.sharding import AXES, MeshConfig, path_name, spec, tree_shardings


def mesh(data=1, fsdp=2, tensor=2):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder/layer_0/attention/query/kernel", (16, 2, 8), P("fsdp", "tensor", None)),
        ("encoder/layers/attention/query/kernel", (3, 16, 2, 8), P(None, "fsdp", "tensor", None)),
        ("encoder/layer_0/attention/output/kernel", (2, 8, 16), P("tensor", None, "fsdp")),
        ("encoder/layer_0/attention/fixed/taps", (2, 5), P("tensor", None)),
        ("encoder/layer_0/attention/dynamic_query/taps", (8, 5), P()),
        ("encoder/layer_0/mlp_out/kernel", (32, 16), P("tensor", "fsdp")),
        ("encoder/embeddings/word", (24, 16), P("tensor", "fsdp")),
        ("encoder/embeddings/word", (25, 16), P(None, "fsdp")),  # 25 rows do not divide by 2
        ("encoder/layer_0/mlp_norm/scale", (16,), P()),
        ("head/bias", (24,), P("tensor")),
        ("head/transform/bias", (16,), P()),
        ("step", (), P()),
    ],
)
def test_a_parameter_stands_where_its_name_says_as_far_as_it_divides(name, shape, expected):
    assert spec(name, shape, mesh()) == expected


@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_optimizer_moments_stand_with_their_parameters(loop):
    model = MaskedLM(tiny.model_config(loop=loop), 20)
    params = jax.eval_shape(model.initial_params, jax.random.key(0))
    state = jax.eval_shape(optax.adamw(0.1).init, params)
    assert tree_shardings(state, mesh())[0].mu == tree_shardings(params, mesh())
    large = [
        path_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.size >= 128 and spec(path_name(path), leaf.shape, mesh()) == P()
    ]
    assert not large


VARIANTS = [
    {"scores": ("content", "fixed", "dynamic_query", "dynamic_key"), "branches": ("depthwise_scaled",)},
    *[{"mixer": mixer, "scores": ()} for mixer in ("lightweight", "dynamic", "convbert")],
    *[
        {name: {"kind": kind, "radius": 2, "groups": 1, "activation": True, "half": half}}
        for name in ("query_key", "value")
        for kind, half in (("separable", False), ("separable", True), ("grouped", False))
    ],
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_has_a_place_on_a_mesh(changes):
    model = MaskedLM(tiny.model_config(layers=1, **changes), 20)
    params = jax.eval_shape(model.initial_params, jax.random.key(0))
    for leaf, placed in zip(jax.tree.leaves(params), jax.tree.leaves(tree_shardings(params, mesh())), strict=True):
        placed.shard_shape(leaf.shape)  # raises where an axis does not divide


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(-1, 1, 1), 8, (8, 1, 1)),
        (MeshConfig(-1, 2, 2), 8, (2, 2, 2)),
        (MeshConfig(1, -1, 1), 1, (1, 1, 1)),
        (MeshConfig(2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_the_rest_of_the_devices_is_filled_in(config, devices, expected):
    assert config.shape(devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ((0, 1, 1), 1, "mesh.data=0 must be at least 1, or -1 for the rest"),
        ((1, -2, 1), 1, "mesh.fsdp=-2 must be at least 1"),
        ((-1, -1, 1), 1, "mesh: only one of data, fsdp, tensor can be -1"),
        ((-1, 1, 3), 8, "mesh.data=-1 x mesh.fsdp=1 x mesh.tensor=3 does not multiply to the 8 devices"),
        ((2, 1, 1), 8, "mesh.data=2 x mesh.fsdp=1 x mesh.tensor=1 does not multiply to the 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(sizes, devices, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(*sizes).shape(devices)


def test_batches_and_heads_divide_over_the_mesh():
    sharding.check_divides(mesh(2, 2, 2), 8, 2, 4)
    with pytest.raises(UserError, match=r"train\.batch_size=12 does not divide by .* = 4 x 2"):
        sharding.check_divides(mesh(2, 2, 2), 12, 2, 4)
    with pytest.raises(UserError, match=r"mesh\.tensor=2 does not divide model\.heads=3"):
        sharding.check_divides(mesh(2, 2, 2), 8, 2, 3)


def test_one_process_feeds_the_whole_batch():
    rows = np.arange(8, dtype=np.uint16).reshape(4, 2)
    one = sharding.make_mesh(MeshConfig(-1, 1, 1))
    placed = sharding.global_batch(lambda first, count: rows[first : first + count], 4, 2, one)
    assert placed.dtype == jnp.uint16
    np.testing.assert_array_equal(placed, rows)


def test_training_on_eight_devices_agrees_with_one_and_goes_on_with_another_mesh(tmp_path):
    tiny.write_corpus(tmp_path / "text.txt")
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(here.parent),
    }
    command = [sys.executable, here / "eight_devices.py", tmp_path]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
