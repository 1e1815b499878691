"""A mesh that isn't there: what each device would hold and send, by compiling the step for it.

For so many CPU devices, anywhere; or, where libtpu is installed, by the compiler for TPUs for a slice of them, which
needs no TPU. The number of CPU devices is fixed when JAX starts, so a process of its own compiles; it reads no text and
runs nothing.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from convattn_jax import sharding
from convattn_jax.collectives import Collective, collectives
from convattn_jax.config import UserError, check, from_config, to_plain
from convattn_jax.console import Console, human
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.kernels import choice
from convattn_jax.program import PretrainConfig, Program, made_up_vocabulary

# What is compiled never runs: no time goes into making it fast.
COMPILER = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
MOST_DEVICES = 2048  # XLA numbers a process's CPU devices with eleven bits
UNSEEN = (
    "Compiled for CPU devices with model.kernel=plain, which cannot show: the fused attention kernel (the memory above "
    "holds the plain form's T x T scores); most reduce-scatters (here an all-reduce, then a cut); bfloat16 sums and "
    "products (widened to float32 here: up to twice the bytes of activations); how collectives are combined and "
    "overlapped; time."
)
UNSEEN_FOR_TPUS = (
    "Compiled by XLA for these TPUs, with the kernels of model.kernel; it refuses what their memory doesn't hold. What "
    "it cannot show: time."
)
LIBTPU = "pip install -e '.[tpu]'"
# The compiler asks neither for the machine's own TPUs nor for their metadata server.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of the machine that it would run on; whichever
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second process may compile too: no chip is at stake
}
OUT_OF_MEMORY = (  # what newer and older compilers say, with what is needed and what is there
    re.compile(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)"),
    re.compile(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm"),
)


def start(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Compiles in a process of its own, prints what it found and returns it.

    Raises:
      UserError: the mesh has no definite size, does not go with batch and heads, or is too large for the chips' memory;
        there is no compiler for the chips; or as a run raises it.
    """
    plain = config.to_dict()
    plain["data"]["source"] = "docstrings"  # whichever: no text is read
    c = from_config(PretrainConfig, plain)
    if c.mesh.chips:
        check(
            importlib.util.find_spec("libtpu") is not None,
            f"mesh.chips={c.mesh.chips} needs libtpu, the compiler for TPUs, here without any: {LIBTPU}, best in an "
            "environment of its own",
        )
        where, flags = c.mesh.chips, ""  # libtpu ends the process at a flag that isn't its own: it has LIBTPU_INIT_ARGS
    else:
        c, devices = _for_cpus(c)
        where = f"{devices} CPU devices"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {COMPILER} --xla_force_host_platform_device_count={devices}"
    Console().message(
        f"compiling {c.model.layers} layers for {where}: {'minutes' if c.mesh.chips else 'half a minute'}"
    )
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3", **NO_TPU_HERE}
    ended = subprocess.run(
        [sys.executable, "-m", "convattn_jax.dryrun"],
        input=json.dumps(to_plain(c)),
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode:
        remedy = f"; is libtpu the one that this JAX asks for? {LIBTPU}" if c.mesh.chips else ""
        raise UserError(f"mesh.dry_run: compiling for {where} ended with status {ended.returncode} (see above){remedy}")
    found = json.loads(ended.stdout)
    check("error" not in found, found.get("error", ""))
    print("\n".join(report(c, found)))
    return found


def _for_cpus(c: PretrainConfig) -> tuple[PretrainConfig, int]:
    """What a CPU can compile of a configuration, and for how many devices."""
    check(-1 not in c.mesh.sizes, "mesh.dry_run: no devices say what -1 (the rest) is: give all of data, fsdp, tensor")
    devices = math.prod(c.mesh.sizes)
    check(
        devices <= MOST_DEVICES,
        f"mesh.dry_run: {devices} devices, but a compilation for CPU has {MOST_DEVICES} at most: take fewer, and rows "
        "(train.batch_size) in proportion; with equal fsdp and tensor a device holds the same",
    )
    sharding.check_divides(sharding.abstract_mesh(c.mesh), c.train.batch_size, c.train.accumulate, c.model.heads)
    return dataclasses.replace(c, model=dataclasses.replace(c.model, kernel="plain")), devices


def slice_of(chips: str) -> list[Any]:
    """The devices of a slice of TPUs, such as v5e:16x16, that need not be there.

    Raises:
      UserError: libtpu knows no such slice.
    """
    from jax.experimental import topologies

    one_of_two_cores = {"chip_config_name": "megacore"} if chips.startswith("v4") else {}
    try:
        return list(topologies.get_topology_desc(chips, platform="tpu", **one_of_two_cores).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        said = "" if "regex" in reason else f" ({reason})"
        raise UserError(
            f"mesh.chips={chips} is no slice that libtpu knows{said}: name it like v5e:16x16, v6e:4x4, v5p:4x4x4"
        ) from error


def describe(c: PretrainConfig) -> dict[str, Any]:
    """What the compiled step says of itself; the devices are those of this process, or the slice of `mesh.chips`."""
    t = c.tokenizer
    size = Tokenizer.from_file(t.model, t.normalization).size if t.model else t.vocab_size
    devices = slice_of(c.mesh.chips) if c.mesh.chips else jax.devices()
    mesh = sharding.make_mesh(c.mesh, devices)
    sharding.check_divides(mesh, c.train.batch_size, c.train.accumulate, c.model.heads)
    with choice.compiling_for(choice.platform_of(devices[0].device_kind, devices[0].platform)):
        program = Program(c, made_up_vocabulary(size), np.ones(size, np.int64), mesh)
        compiled = _compiled(c, program)
    memory: Any = compiled.memory_analysis()
    return {
        "mesh": list(mesh.devices.shape),
        "device": devices[0].device_kind,
        "parameters": [
            [sharding.path_name(path), list(leaf.shape), _axes(leaf.sharding.spec, mesh), _bytes(leaf)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(program.like.params)
        ],
        "bytes": {
            "parameters": sum(map(_bytes, jax.tree.leaves(program.like.params))),
            "optimizer": sum(map(_bytes, jax.tree.leaves(program.like.opt_state))),
        },
        "collectives": [one for one in collectives(compiled.as_text()) if one.group > 1],  # alone, none sends a thing
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "results beside them": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    }


def _compiled(c: PretrainConfig, program: Program) -> Any:
    """The compiled step.

    Raises:
      UserError: it needs more memory than a chip has.
    """
    try:
        return program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = [match.groups() for pattern in OUT_OF_MEMORY if (match := pattern.search(str(error)))]
        if not found:
            raise
        [(needed, there)] = found
        raise UserError(
            f"train.batch_size={c.train.batch_size}: a step needs {needed}iB of the {there}iB that a chip of "
            f"mesh.chips={c.mesh.chips} has: raise train.accumulate (now {c.train.accumulate}), lower "
            "train.batch_size, set model.remat=True, or cut along fsdp"
        ) from error


def report(c: PretrainConfig, found: Mapping[str, Any]) -> Iterator[str]:
    """The lines that a person reads."""
    axes = dict(zip(sharding.AXES, found["mesh"], strict=True))
    rows = c.train.batch_size // (axes["data"] * axes["fsdp"])
    named = f" ({found['device']})" if c.mesh.chips else ""
    sizes = " x ".join(f"{axis}={size}" for axis, size in axes.items())
    yield f"mesh {sizes}: {math.prod(found['mesh'])} devices{named}"
    yield f"batch {c.train.batch_size} x {c.data.length} tokens: {rows} rows a device, in {c.train.accumulate} passes"
    yield from ("", f"{'parameter':56} {'shape':>18}  {'cut along':24} {'bytes a device':>14}")
    for name, shape, spec, times, size in _alike(found["parameters"]):
        yield f"{name:56} {' x '.join(map(str, shape)):>18}  {spec or 'whole on each':24} {_size(size):>14} {times}"
    total = found["bytes"]["parameters"] + found["bytes"]["optimizer"]
    yield from ("", "a device holds, between steps")
    yield from (f"  {name:20} {_size(size):>10}" for name, size in found["bytes"].items())
    yield f"  {'together':20} {_size(total):>10}"
    yield from ("", f"{'collectives of a step':24} {'devices':>8} {'count':>7} {'bytes':>10} {'sent':>10}  a device")
    for one in (Collective(*row) for row in found["collectives"]):
        yield f"  {one.kind:22} {one.group or '?':>8} {one.runs:>7} {_size(one.bytes):>10} {_size(one.sent):>10}"
    yield from ("", "memory of a device while it steps, estimated by the compiler")
    yield from (f"  {name:20} {_size(size):>10}" for name, size in found["memory"].items())
    yield f"  {'together':20} {_size(sum(found['memory'].values())):>10}"
    yield from ("", UNSEEN_FOR_TPUS if c.mesh.chips else UNSEEN)


def _axes(spec: jax.sharding.PartitionSpec, mesh: jax.sharding.Mesh) -> str:
    """The mesh axis that each axis of an array is cut along, - where it isn't; empty where none is."""
    axes = [axis if axis and mesh.shape[axis] > 1 else None for axis in spec]
    return ", ".join(axis or "-" for axis in axes) if any(axes) else ""


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    sharding = leaf.sharding
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _alike(parameters: list[list[Any]]) -> Iterator[tuple[str, list[int], str, str, int]]:
    """One line for the same parameter of all layers."""

    def any_layer(row: list[Any]) -> tuple[str, list[int], str, int]:
        name, shape, spec, size = row
        return re.sub(r"layer_\d+", "layer_*", name), shape, spec, size

    for (name, shape, spec, size), group in itertools.groupby(sorted(map(any_layer, parameters))):
        count = len(list(group))
        yield name, shape, spec, f"x {count}" if count > 1 else "", size


def _size(count: float | int) -> str:
    return "?" if math.isnan(count) else f"{human(count, ' ')}B"


def main() -> None:
    """Reads a configuration, writes what `describe` finds or {"error": what the user can mend}, all as JSON."""
    try:
        found = describe(from_config(PretrainConfig, json.load(sys.stdin)))
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
