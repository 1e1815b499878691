"""Training speed on 1, 2, ... devices of one host: data parallel and FSDP, the same rows a device.

    python -m benchmarks.scaling --devices=1,2 --meshes=data,fsdp --sizes=base,large --out=results      # GPUs
    python -m benchmarks.scaling --variants='default;xla_gpu_all_reduce_combine_threshold_bytes=268435456'
    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m benchmarks.scaling \
        --devices=1,4 --sizes=tiny --rows=4 --length=32 --vocabulary=500 --turns=2 --steps=2 --set=model.layers=1

Composite attention, bfloat16, dropout 0.1 (attention's too), masking on the device, AdamW; random ids in full rows.
`large` runs its 24 layers as a scan, which compiles in a fraction of the time of unrolled ones; a size is compared
with itself on one device. One process: a mesh takes the first n devices. All programs of a size are compiled side by
side, then take turns; the ratio to one device is taken within a turn. Writes scaling.jsonl and scaling.md to --out.

Below each table: the collectives of the compiled step, and of those that run beside other work how many kernels stand
between their start and their end in the schedule: 0 means that a device waits.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from benchmarks.settings import configured
from convattn_jax import compiled, sharding
from convattn_jax.collectives import Collective, collectives
from convattn_jax.config import from_config
from convattn_jax.console import human
from convattn_jax.program import PretrainConfig, Program, made_up_vocabulary

MESHES = {"data": (-1, 1, 1), "fsdp": (1, -1, 1), "tensor": (1, 1, -1)}
SETTINGS = ("data.source=docstrings", "model.dtype=bfloat16", "model.dropout=0.1", "model.attention_dropout=0.1")
BATCHES = 4  # different ones, used in turn
_STARTED = re.compile(r"%([\w.\-]+) = .*? (?:all-reduce|all-gather|async)-start\(")
_WORK = re.compile(r" (fusion|custom-call|dot|convolution)\(")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program: a size on the first devices of the host, along one axis, compiled with some options."""

    size: str
    mesh: str
    devices: int
    variant: str

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's, as it takes them: those of a run, and the variant's."""
        usual = compiled.options() or {}
        if self.variant == "default":
            return usual
        pairs = (part.split("=", 1) for part in self.variant.split(","))
        return usual | {name: {"true": True, "false": False}.get(value, value) for name, value in pairs}


def contenders(size: str, meshes: list[str], devices: list[int], variants: list[str]) -> list[Contender]:
    """One device once, data parallel and by default: the yardstick, first."""
    more = [Contender(size, m, n, v) for n in devices if n > 1 for m in meshes for v in variants]
    return [Contender(size, "data", 1, "default"), *more]


class Runner:
    """A compiled step with its state and batches on its devices."""

    def __init__(self, contender: Contender, args: argparse.Namespace):
        c = configured(f"configs/composite.py:{contender.size}", [*SETTINGS, *args.set])
        if contender.size == "large" and not any(text.startswith("model.loop=") for text in args.set):
            c.model.loop = "scan"
        c.train.batch_size, c.data.length = args.rows * contender.devices, args.length
        c = from_config(PretrainConfig, c)
        shape = tuple(contender.devices if n == -1 else n for n in MESHES[contender.mesh])
        devices, kinds = jax.devices()[: contender.devices], (AxisType.Auto,) * len(shape)
        mesh = jax.make_mesh(shape, sharding.AXES, axis_types=kinds, devices=devices)
        sharding.check_divides(mesh, c.train.batch_size, 1, c.model.heads)
        self.program = Program(c, made_up_vocabulary(args.vocabulary), np.ones(args.vocabulary, np.int64), mesh)
        began = time.perf_counter()
        self.step: Any = self.program.lower().compile(contender.options)
        self.compile_seconds = time.perf_counter() - began
        self.text: str = self.step.as_text()

    def start(self) -> None:
        """Makes state and batches."""
        c = self.program.c
        rows = np.random.default_rng(0).integers(
            5, len(self.program.objective.unigram) // 2, (BATCHES, c.train.batch_size, c.data.length), np.uint16
        )
        rows[:, :, 0], rows[:, :, c.data.length // 2], rows[:, :, -1] = 2, 3, 3
        self.batches = [jax.device_put(batch, self.program.rows) for batch in rows]
        self.state = self.program.init(jax.random.key(0))

    def run(self, steps: int) -> float:
        """Seconds a step."""
        began, sums = time.perf_counter(), None
        for i in range(steps):
            self.state, sums = self.step(self.state, self.batches[i % BATCHES], np.uint32(0))
        jax.block_until_ready((self.state, sums))
        return (time.perf_counter() - began) / steps


def measure(chosen: list[Contender], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each contender, the yardstick first."""
    with ThreadPoolExecutor(len(chosen)) as pool:
        runners = dict(zip(chosen, pool.map(lambda one: Runner(one, args), chosen), strict=True))
    for runner in runners.values():
        runner.start()
        runner.run(2)
    seconds: dict[Contender, list[float]] = {one: [] for one in chosen}
    for _ in range(args.turns):
        for one, runner in runners.items():
            runner.run(1)  # so that nobody pays for whoever ran before
            seconds[one].append(runner.run(args.steps))
    return [record(one, runners[one], seconds[one], seconds[chosen[0]], args) for one in chosen]


def record(
    one: Contender, runner: Runner, times: list[float], alone: list[float], args: argparse.Namespace
) -> dict[str, Any]:
    """What is written as a JSON line."""
    return {
        **dataclasses.asdict(one),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows_per_device": args.rows,
        "length": args.length,
        "loop": runner.program.c.model.loop,
        "layers": runner.program.c.model.layers,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(runner.program.like.params)),
        "step_ms": [1e3 * t for t in times],
        "tokens_per_second": [one.devices * args.rows * args.length / t for t in times],
        "speedup": [one.devices * a / t for a, t in zip(alone, times, strict=True)],
        "compile_s": runner.compile_seconds,
        "collectives": collectives(runner.text),
        "overlap": overlaps(runner.text),
    }


def overlaps(text: str) -> list[int]:
    """For each collective that is started and awaited apart: kernels between the two in the schedule."""
    found, running = [], {}
    for line in text.splitlines():
        if started := _STARTED.search(line):
            running[started[1]] = 0
        elif "-done(" in line:
            for name in [name for name in running if re.search(rf"%{re.escape(name)}[,)]", line)]:
                found.append(running.pop(name))
        elif _WORK.search(line):
            running = {name: count + 1 for name, count in running.items()}
    return found


def markdown(records: list[dict[str, Any]]) -> Iterator[str]:
    """The table of a size, and the collectives of its programs."""
    first = records[0]
    yield f"### {first['size']}: {first['layers']} layers ({first['loop']}), {human(first['parameters'])} parameters"
    yield (
        f"\n{first['rows_per_device']} x {first['length']} tokens a device, {first['device']}, JAX {first['jax']}, "
        f"{len(first['step_ms'])} turns: median (lowest to highest)"
    )
    yield from (
        "",
        "| devices | mesh | compiler | ms | tokens/s | against one | compiled in |",
        "|---|---|---|---|---|---|---|",
    )
    for r in records:
        ms, tokens = _spread(r["step_ms"], ".1f"), _spread(r["tokens_per_second"], ",.0f")
        figures = [ms, tokens, _spread(r["speedup"], ".3f"), f"{r['compile_s']:.0f} s"]
        yield f"| {r['devices']} | {r['mesh']} | {r['variant']} | {' | '.join(figures)} |"
    yield ""
    for r in records[1:]:
        sent = ", ".join(f"{c.runs} {c.kind} of {human(c.bytes, ' ')}B" for c in map(_collective, r["collectives"]))
        beside = f"; kernels beside each: {r['overlap']}" if r["overlap"] else "; none beside other work"
        yield f"- {r['devices']} x {r['mesh']}, {r['variant']}: {sent}{beside}"


def _collective(row: Any) -> Collective:
    return Collective(*row)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Measures each size, prints its table, writes the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2", help="how many, by commas; one is always measured")
    parser.add_argument("--meshes", default="data,fsdp", help=f"by commas: {', '.join(MESHES)}")
    parser.add_argument("--sizes", default="base,large", help="of configs/base.py, by commas")
    parser.add_argument("--variants", default="default", help="compiler options NAME=VALUE,..., variants apart by ;")
    parser.add_argument("--rows", type=int, default=256, help="per device")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--vocabulary", type=int, default=30004, help="ids")
    parser.add_argument("--steps", type=int, default=10, help="steps per turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each program")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.loop=unroll")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    args = parser.parse_args()
    devices, meshes = [int(n) for n in args.devices.split(",")], args.meshes.split(",")
    if max(devices) > len(jax.devices()):
        parser.error(f"--devices={args.devices}: this host has {len(jax.devices())}")
    if unknown := [mesh for mesh in meshes if mesh not in MESHES]:
        parser.error(f"--meshes={unknown[0]} is unknown; there are: {', '.join(MESHES)}")

    lines: list[str] = []
    tables: list[str] = []
    for size in args.sizes.split(","):
        records = measure(contenders(size, meshes, devices, args.variants.split(";")), args)
        lines += [json.dumps(one) for one in records]
        tables += ["\n".join(markdown(records)) + "\n"]
        print("\n" + tables[-1], flush=True)
        if args.out:  # after every size: what is measured stays
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "scaling.jsonl").write_text("\n".join(lines) + "\n")
            (args.out / "scaling.md").write_text("\n".join(tables))


if __name__ == "__main__":
    main()
