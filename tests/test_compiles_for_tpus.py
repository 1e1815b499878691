"""Steps as TPUs would run them, by the compiler for TPUs, which needs none: every variant, pre-training, fine-tuning.

Slow, and only where libtpu is installed (pip install -e '.[tpu]'): python -m pytest -n 0 -m slow -k compiles_for_tpus
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from convattn_jax import dryrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
ROOT = pathlib.Path(dryrun.__file__).parent.parent
VARIANTS = sorted(
    path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base", "glue")
)


@pytest.mark.parametrize(("chips", "kind"), [("v5e:4x4", "TPU v5 lite"), ("v6e:4x4", "TPU v6 lite")])
def test_the_fused_kernel_and_what_a_cpu_reduces_and_cuts(tmp_path, chips, kind):
    # heads of 64 and rows of 128 tokens, which the kernel is made for
    shape = {"layers": 1, "width": 128, "heads": 2, "hidden": 256, "embedding": 128, "dtype": "bfloat16"}
    changes = {f"model__{key}": value for key, value in shape.items()} | {"model__kernel": "pallas_tpu"}
    changes |= {"mesh__fsdp": 4, "data__length": 128, "model__max_length": 128, "train__batch_size": 32}
    found = dryrun.start(tiny.config(tmp_path, mesh__dry_run=True, mesh__chips=chips, **changes))
    assert found["mesh"] == [4, 4, 1]
    assert found["device"] == kind
    runs = {(kind, group): runs for kind, group, runs, _ in found["collectives"]}
    assert runs["reduce-scatter", 4] >= 4  # of the gradients of a layer's kernels
    assert runs["all-gather", 4] >= 2 * 4


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    c = importlib.import_module(f"configs.{name}").get_config("small")
    c.model.layers = 1
    c.train.batch_size = 32
    c.mesh.update(dry_run=True, chips="v5e:2x2", data=2, fsdp=1, tensor=2)
    found = dryrun.start(c)
    kinds = {(kind, group) for kind, group, *_ in found["collectives"]}
    assert ("all-reduce", 2) in kinds  # over `data` gradients, over `tensor` activations
    assert ("all-reduce", 4) in kinds  # gradients of what is whole on each


FINE_TUNING = """
import sys
import jax
from configs import composite
from convattn_jax import dryrun, sharding
from convattn_jax.collectives import collectives
from convattn_jax.config import from_config
from convattn_jax.glue.task_run import classifier_of
from convattn_jax.glue.training import Trainer
from convattn_jax.kernels import choice
from convattn_jax.model.config import ModelConfig

chips = dryrun.slice_of("v5e:2x4")
jax.devices, jax.device_count = lambda: chips, lambda: len(chips)
model = composite.get_config("small").model
model.layers = 1
seeds = int(sys.argv[1])
with choice.compiling_for("tpu"):
    trainer = Trainer(classifier_of(from_config(ModelConfig, model.to_dict(), "model."), 1000, 3))
    text = trainer.prepare_step(seeds, 32, 80, now=True).result().as_text()
mesh = sharding.seed_mesh(seeds, 32).shape
print(mesh["seeds"], mesh["data"], "tpu_custom_call" in text, sum(c.bytes for c in collectives(text) if c.group > 1))
"""


@pytest.mark.parametrize(("seeds", "apart", "data"), [(8, 8, 1), (10, 2, 4), (3, 1, 8)])
def test_fine_tuning_on_eight_chips(seeds, apart, data):
    environment = os.environ | dryrun.NO_TPU_HERE | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FINE_TUNING, str(seeds)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    *mesh, fused, sent = ended.stdout.split()
    assert mesh == [str(apart), str(data)]
    assert fused == "True"  # the kernel, under vmap and on each chip
    assert (int(sent) < 100) == (data == 1)  # seeds apart tell nothing but their losses
