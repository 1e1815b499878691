"""Training speed on 1, 2, ... devices of one host: data parallel and FSDP, the same rows a device.

    python -m benchmarks.scaling --devices=1,2 --meshes=data,fsdp --sizes=base,large --out=results      # GPUs
    python -m benchmarks.scaling --variants='default;xla_gpu_all_reduce_combine_threshold_bytes=268435456'
    JAX_PLATFORMS=cpu python -m benchmarks.scaling \
        --devices=1,4 --sizes=tiny --rows=4 --length=32 --vocabulary=500 --turns=2 --steps=2 --set=model.layers=1

Composite attention, bfloat16, dropout 0.1 (attention's too), masking on the device, AdamW; random ids in full rows.
`large` runs its 24 layers as a scan, which compiles in a fraction of the time of unrolled ones; a size is compared
with itself on one device, on each of them in turn: devices of one host differ by some per cent, and what waits for all
of them is as slow as the slowest. One process a device, as NVIDIA advises (`--processes=one`: one for all of them). All
programs of a size are compiled beforehand, then take turns; ratios to one device are taken within a turn. Who gives
no answer in time is left out, with its stacks. Writes scaling.jsonl and scaling.md to --out.

Below each table: the collectives of the compiled step, and of those that run beside other work how many kernels stand
between their start and their end in the schedule: 0 means that a device waits.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import socket
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.arguments import documented, positive
from benchmarks.scaling_worker import AXES, SETTINGS, Contender, Shape
from benchmarks.served import LeftOutError, Served
from benchmarks.settings import configured
from convattn_jax.console import human

PROCESSES = ("each", "one")


def contenders(size: str, meshes: Sequence[str], devices: Sequence[int], variants: Sequence[str]) -> list[Contender]:
    """Each device by itself, data parallel and by default: the yardsticks, first."""
    alone = [Contender(size, "data", 1, "default", i) for i in range(max(devices))]
    return [*alone, *(Contender(size, m, n, v) for n in devices if n > 1 for m in meshes for v in variants)]


class Group:
    """The processes of all programs on so many devices."""

    def __init__(self, devices: int, chosen: Sequence[Contender], shape: Shape, processes: str, patience: float):
        count = devices if processes == "each" else 1
        seen = devices // count + max(one.number for one in chosen)  # by a process
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        told = {
            "coordinator": f"localhost:{port}",
            "processes": count,
            "shape": dataclasses.asdict(shape),
            "contenders": [dataclasses.asdict(one) for one in chosen],
        }
        self.chosen, self.name = chosen, f"{devices} device{'s' * (devices > 1)}"
        self.workers = [
            Served(
                "benchmarks.scaling_worker",
                told | {"process": i},
                environment(seen, i if count > 1 else None),
                patience,
                later=True,
            )
            for i in range(count)
        ]

    def ready(self) -> dict[Contender, dict[str, Any]]:
        """The facts of each program, of those that run."""
        found = {}
        try:
            for one in self.chosen:
                facts = [worker.answer() for worker in self.workers]
                found[one] = facts[0]
                print(f"{one.size}, {one.place}, {one.mesh}: compiled in {facts[0]['compile_s']:.0f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
        except LeftOutError as error:
            self.leave_out(error)
        return found

    def run(self, one: Contender, steps: int) -> float:
        """Seconds a step, of the slowest process."""
        for worker in self.workers:
            worker.ask(f"{self.chosen.index(one)} {steps}")
        return max(worker.answer()["seconds"] for worker in self.workers)

    def leave_out(self, error: Exception) -> None:
        """Says why this group has no further figures, and ends it."""
        print(f"{self.name}: left out, {error}", file=sys.stderr, flush=True)
        for worker in self.workers:
            worker.process.kill()

    def close(self) -> None:
        """Ends the processes."""
        for worker in self.workers:
            if worker.process.stdin is not None and not worker.process.stdin.closed:
                worker.process.stdin.close()  # all of them: each waits for the others
        for worker in self.workers:
            worker.close()


def environment(devices: int, process: int | None) -> dict[str, str]:
    """What a process with so many devices needs; a `process` of several takes one GPU, by its number."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "force_host_platform_device_count" not in f]
        return {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}
    own = {} if process is None else {"JAX_LOCAL_DEVICE_IDS": str(process)}
    return own | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # groups share the devices


def measure(size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record of each contender that ran, the yardstick first."""
    shape = Shape(args.rows, args.length, args.vocabulary, tuple(args.set))
    chosen = contenders(size, args.meshes, args.devices, args.variants)
    counts = sorted({one.devices for one in chosen})
    groups: dict[int, Group] = {}
    facts: dict[Contender, dict[str, Any]] = {}
    try:
        for n in counts:  # one after the other: compilers time kernels, and need a quiet device
            groups[n] = Group(n, [one for one in chosen if one.devices == n], shape, args.processes, args.patience)
            facts |= groups[n].ready()
        running = {one for one in facts if set(groups[one.devices].chosen) <= facts.keys()}
        seconds: dict[Contender, list[float]] = {one: [] for one in chosen if one in running}
        for _ in range(args.turns):
            for one in list(seconds):
                try:
                    seconds[one].append(groups[one.devices].run(one, args.steps))
                except LeftOutError as error:
                    groups[one.devices].leave_out(error)
                    seconds = {other: times for other, times in seconds.items() if other.devices != one.devices}
                    break
    finally:
        for group in groups.values():
            group.close()
    alone = [times for one, times in seconds.items() if one.devices == 1]
    if not alone:
        raise SystemExit(f"{size}: nothing ran on one device, for the reason above")
    return [record(one, facts[one], times, alone, args) for one, times in seconds.items()]


def record(
    one: Contender, facts: dict[str, Any], times: list[float], alone: list[list[float]], args: argparse.Namespace
) -> dict[str, Any]:
    """What is written as a JSON line."""
    return {
        **dataclasses.asdict(one),
        "processes": args.processes,
        "rows_per_device": args.rows,
        "length": args.length,
        **facts,
        "step_ms": [1e3 * t for t in times],
        "tokens_per_second": [one.devices * args.rows * args.length / t for t in times],
        "speedup": [one.devices * a / t for a, t in zip(alone[0], times, strict=False)],
        "speedup_of_slowest": [one.devices * max(a) / t for *a, t in zip(*alone, times, strict=False)],
    }


def markdown(records: list[dict[str, Any]]) -> Iterator[str]:
    """The table of a size, and the collectives of its programs."""
    first = records[0]
    yield f"### {first['size']}: {first['layers']} layers ({first['loop']}), {human(first['parameters'])} parameters"
    yield (
        f"\n{first['rows_per_device']} x {first['length']} tokens a device, {first['device']}, JAX {first['jax']}, "
        f"{'one process a device' if first['processes'] == 'each' else 'one process'}, "
        f"{len(first['step_ms'])} turns: median (lowest to highest)"
    )
    yield from (
        "",
        "| devices | mesh | compiler | ms | tokens/s | against the first | against the slowest | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    )
    for r in records:
        ms, tokens = _spread(r["step_ms"], ".1f"), _spread(r["tokens_per_second"], ",.0f")
        ratios = [_spread(r[name], ".3f") for name in ("speedup", "speedup_of_slowest")]
        which = f"1 (number {r['number']})" if r["devices"] == 1 else str(r["devices"])
        figures = [which, r["mesh"], r["variant"], ms, tokens, *ratios, f"{r['compile_s']:.0f} s"]
        yield f"| {' | '.join(figures)} |"
    yield ""
    for r in (r for r in records if r["devices"] > 1):
        sent = ", ".join(f"{runs} {kind} of {human(size, ' ')}B" for kind, _, runs, size in r["collectives"])
        beside = f"; kernels beside each: {r['overlap']}" if r["overlap"] else "; none beside other work"
        yield f"- {r['devices']} x {r['mesh']}, {r['variant']}: {sent}{beside}"


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Measures each size, prints its table, writes the records."""
    parser = documented(__doc__)
    parser.add_argument("--devices", default="1,2", help="how many, by commas; each by itself is always measured")
    parser.add_argument("--meshes", default="data,fsdp", help=f"by commas: {', '.join(AXES)}")
    parser.add_argument("--sizes", default="base,large", help="of configs/base.py, by commas")
    parser.add_argument("--variants", default="default", help="compiler options NAME=VALUE,..., variants apart by ;")
    parser.add_argument("--processes", default="each", choices=PROCESSES, help="one for each device, or one for all")
    parser.add_argument("--patience", type=float, default=300, help="seconds to wait for a program or a turn")
    parser.add_argument("--rows", type=positive, default=256, help="per device")
    parser.add_argument("--length", type=positive, default=128, help="tokens per row")
    parser.add_argument("--vocabulary", type=positive, default=30004, help="ids")
    parser.add_argument("--steps", type=positive, default=10, help="steps per turn")
    parser.add_argument("--turns", type=positive, default=5, help="turns of each program")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.loop=unroll")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    args = parser.parse_args()
    if not all(n.isdecimal() and int(n) for n in args.devices.split(",")):
        parser.error(f"--devices={args.devices} must be whole numbers with commas between them")
    args.devices = [int(n) for n in args.devices.split(",")]
    args.meshes, args.variants = args.meshes.split(","), args.variants.split(";")
    if unknown := [mesh for mesh in args.meshes if mesh not in AXES]:
        parser.error(f"--meshes={unknown[0]} is unknown; there are: {', '.join(AXES)}")

    for size in args.sizes.split(","):
        configured(f"configs/composite.py:{size}", [*SETTINGS, *args.set])  # what is wrong there, said before all else

    lines: list[str] = []
    tables: list[str] = []
    for size in args.sizes.split(","):
        records = measure(size, args)
        lines += [json.dumps(one) for one in records]
        tables += ["\n".join(markdown(records)) + "\n"]
        print("\n" + tables[-1], flush=True)
        if args.out:  # after every size: what is measured stays
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "scaling.jsonl").write_text("\n".join(lines) + "\n")
            (args.out / "scaling.md").write_text("\n".join(tables))


if __name__ == "__main__":
    main()
