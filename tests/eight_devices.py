"""Training on meshes of eight devices and on one device: a program that test_sharding.py starts."""

import functools
import json
import pathlib
import re
import shutil
import sys

import jax
import numpy as np
import tiny
from jax.sharding import AxisType

from convattn_jax import compiled, kept, pretrain, sharding
from convattn_jax.config import from_config
from convattn_jax.console import Console
from convattn_jax.program import PretrainConfig, Program, Steps, made_up_vocabulary, plain
from convattn_jax.train import TrainState

SIZE = 40
ROWS = np.random.default_rng(0).integers(5, SIZE, (2, 8, 16)).astype(np.uint16)
MESHES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]  # the batch is over data and fsdp alike
# all four terms: taps of heads, shared taps and segments cross the map; dropout depends on global rows and heads
SHAPE = {
    "model__layers": 1,
    "model__heads": 8,
    "model__scores": ("content", "fixed", "dynamic_query", "dynamic_key"),
    "model__taps_init": "wide",
    "model__dropout": 0.2,
    "model__attention_dropout": 0.3,
    "train__batch_size": 8,
    "train__accumulate": 1,
}


def program(sizes: tuple[int, int, int], mesh: sharding.Mesh | None = None) -> Program:
    c = tiny.config(pathlib.Path(), **SHAPE)
    c.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    c = from_config(PretrainConfig, c)
    return Program(c, made_up_vocabulary(SIZE), np.ones(SIZE, np.int64), mesh or sharding.make_mesh(c.mesh))


def trained(program: Program, initial: TrainState | None = None):
    """State and sums after two steps from an initial state, or the program's own, and the text of the compiled step."""
    step, sums = program.lower().compile(), None
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.like)
    state = plain(program.init(0) if initial is None else jax.device_put(initial, shardings))
    for batch in ROWS:
        read = functools.partial(lambda rows, first, count: rows[first : first + count], batch)
        state, sums = step(state, sharding.global_batch(read, *batch.shape, program.mesh), np.uint32(0))
    return state, jax.device_get(sums), step.as_text()


def check_meshes() -> None:
    """Raises where a mesh disagrees with one device."""
    alone = jax.make_mesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
    initial = jax.device_get(program((1, 1, 1), alone).init(0))
    expected, expected_sums, _ = trained(program((1, 1, 1), alone), initial)
    for sizes in MESHES:
        state, sums, text = trained(program(sizes), None if sizes == (2, 2, 2) else initial)
        _, fsdp, tensor = sizes
        kernel = state["params"]["encoder"]["layer_0"]["mlp_in"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (16 // fsdp, 32 // tensor)
        gathered = set(re.findall(r"= \w+\[(\d+),8\]\S* all-gather\(", text))
        assert (str(SIZE // tensor) in gathered) == (fsdp > 1), sizes  # the embedding, (40, 8), over `fsdp`
        assert tensor == 1 or str(SIZE) not in gathered, sizes  # and not over `tensor`
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=str(sizes))
        for name in sums:
            np.testing.assert_allclose(sums[name], expected_sums[name], rtol=1e-4, err_msg=f"{name} {sizes}")


def check_resuming(home: pathlib.Path) -> None:
    """Raises where a run that goes on with another mesh logs other figures."""

    def run(**sizes: int) -> list[dict[str, float]]:
        c = tiny.config(home, **SHAPE, train__steps=3, train__eval_every=1)
        c.mesh.update(sizes)
        pretrain.run(c, str(home / "run"), Console(quiet=True))
        return tiny.metrics(home / "run")

    expected = run(fsdp=8)
    shutil.rmtree(home / "run" / "checkpoints" / "3")
    (home / "run" / "summary.json").unlink()
    found = run(tensor=4)
    assert json.loads((home / "run" / "summary.json").read_text())["step"] == 3
    for a, b in zip(expected, found, strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} at step {a['step']}")


def check_kept(home: pathlib.Path) -> None:
    """Raises where a program that was kept computes other bits on a mesh, or leaves them elsewhere."""
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[::-1])
    batch = ROWS[0]
    rows = sharding.global_batch(lambda first, count: batch[first : first + count], *batch.shape, mesh)
    compiled.keep("")

    def stepped(place: pathlib.Path | None):
        kept.use(place)
        one = program((2, 2, 2), mesh)
        return one.like, one.train_step(one.init(0), rows)

    traced, written, trace = stepped(None), stepped(home), Steps._train_step
    del Steps._train_step
    read = stepped(home)
    Steps._train_step = trace
    for other in (written, read):
        for a, b in zip(*map(jax.tree.leaves, (traced, other)), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
            assert isinstance(a, jax.ShapeDtypeStruct) or np.array_equal(a, b)


if __name__ == "__main__":
    assert jax.device_count() == 8
    check_meshes()
    check_resuming(pathlib.Path(sys.argv[1]))
    check_kept(pathlib.Path(sys.argv[1]))
