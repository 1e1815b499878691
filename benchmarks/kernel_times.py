"""Where a step's device time goes: sums the kernels of a profiler trace by what they do and where they stand.

    python -m benchmarks.step --profile=DIR ...          traces each configuration and prints this
    python -m benchmarks.kernel_times DIR/NAME           the same again, of a trace that is there

DIR/NAME holds `program.txt` (XLA's text of the compiled step), `steps.txt` (how many were traced) and the trace.
"""

import dataclasses
import json
import pathlib
import re
from collections import defaultdict
from typing import Any

from benchmarks.arguments import documented
from benchmarks.hlo import Operation, operations

MATRIX_KERNELS = re.compile(r"nvjet|gemm|cutlass|xmma|wgmma", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel on the device."""

    name: str
    operation: str  # the instruction that it belongs to; the kernel's own name where the trace doesn't say
    start: float  # ns
    duration: float  # ns


def events(path: pathlib.Path) -> list[Event]:
    """The kernels of every stream of the first GPU; on a CPU the operations that its threads report."""
    from jax.profiler import ProfileData

    files = sorted(path.rglob("*.xplane.pb"))
    if not files:
        raise SystemExit(f"{path}: no *.xplane.pb below it")
    planes = {plane.name: plane for plane in ProfileData.from_file(str(files[-1])).planes}
    gpu = min((name for name in planes if name.startswith("/device:GPU")), default=None)
    found = []
    for line in planes[gpu or "/host:CPU"].lines if gpu or "/host:CPU" in planes else ():
        if gpu and not (line.name or "").startswith("Stream"):
            continue
        for event in line.events:
            operation = {key: str(value) for key, value in event.stats if key == "hlo_op"}.get("hlo_op")
            if gpu or operation:
                found.append(Event(event.name, operation or event.name, event.start_ns, event.duration_ns))
    return found


def busy(found: list[Event]) -> float:
    """Nanoseconds in which at least one of the events ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(found, key=lambda e: e.start):
        total += max(0.0, event.start + event.duration - max(end, event.start))
        end = max(end, event.start + event.duration)
    return total


def summary(found: list[Event], program: dict[str, Operation], steps: int) -> dict[str, Any]:
    """Milliseconds a step: by kind, by place, and by group of like kernels (equal but for the layer)."""
    kinds: dict[str, float] = defaultdict(float)
    places: dict[str, float] = defaultdict(float)
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for event in found:
        operation = program.get(event.operation) or program.get(event.operation.removeprefix("%"))
        ms = event.duration / steps / 1e6
        stem = re.sub(r"[._]\d+", "", event.name)
        if operation is None:
            matrix = MATRIX_KERNELS.search(event.name)
            kind = "matrix product" if matrix else "copy" if event.name.startswith("Mem") else "not in the program"
            operation = Operation(kind, "", "", (), 0.0, 0.0)
        kinds[operation.kind] += ms
        places[_module(operation.place)] += ms
        key = (operation.kind, operation.place, operation.result, stem)
        group = groups.setdefault(
            key,
            {"ms": 0.0, "count": 0.0, "bytes": 0.0, "flops": 0.0, "kind": operation.kind, "place": operation.place,
             "result": operation.result, "kernel": event.name, "operation": event.operation,
             "inside": operation.inside},
        )  # fmt: skip
        group["ms"] += ms
        group["count"] += 1 / steps
        group["bytes"] += operation.bytes / steps
        group["flops"] += operation.flops / steps
    span = max((e.start + e.duration for e in found), default=0.0) - min((e.start for e in found), default=0.0)
    return {
        "busy_ms": busy(found) / steps / 1e6,
        "span_ms": span / steps / 1e6,
        "kernels": len(found) / steps,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "places": dict(sorted(places.items(), key=lambda item: -item[1])),
        "groups": sorted(groups.values(), key=lambda group: -group["ms"]),
    }


def _module(place: str) -> str:
    """The path without its last two parts: the module."""
    direction, _, path = place.partition(": ")
    return f"{direction}: {'/'.join(path.split('/')[:4][:-1])}" if path else direction or "unknown"


def report(figures: dict[str, Any], top: int = 40) -> str:
    """Text: totals, then the groups of kernels that take longest."""
    lines = [
        f"device busy {figures['busy_ms']:.3f} of {figures['span_ms']:.3f} ms a step, {figures['kernels']:.0f} kernels",
        "",
        "ms a step by kind",
        *(f"{ms:9.3f}  {kind}" for kind, ms in figures["kinds"].items()),
        "",
        "ms a step by place",
        *(f"{ms:9.3f}  {name}" for name, ms in list(figures["places"].items())[:top]),
        "",
        f"the {top} groups of kernels that take longest, layers taken together",
        "       ms  count  us each    TB/s  TFLOP/s  kind: place -> result [fused] (kernel of one of them)",
    ]
    for group in figures["groups"][:top]:
        each, seconds = group["ms"] / max(group["count"], 1e-9) * 1e3, max(group["ms"], 1e-9) / 1e3
        terabytes, teraflops = group["bytes"] / seconds / 1e12, group["flops"] / seconds / 1e12
        lines.append(
            f"{group['ms']:9.3f} {group['count']:6.1f} {each:8.1f} {terabytes:7.2f} {teraflops:8.1f}  "
            f"{group['kind']}: {group['place'] or '-'} -> {group['result'][:80]} [{' '.join(group['inside'])[:120]}] "
            f"({group['operation'][:40]}; {group['kernel'][:60]})"
        )
    return "\n".join(lines) + "\n"


def analyse(folder: pathlib.Path, top: int = 40) -> str:
    """The report of a folder with a trace; also leaves it there, as kernel_times.txt and .json."""
    program = operations((folder / "program.txt").read_text())
    figures = summary(events(folder), program, int((folder / "steps.txt").read_text()))
    text = report(figures, top)
    (folder / "kernel_times.txt").write_text(text)
    (folder / "kernel_times.json").write_text(json.dumps(figures, indent=1))
    return text


def main() -> None:
    parser = documented(__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--top", type=int, default=40, help="groups of kernels to print")
    args = parser.parse_args()
    print(analyse(args.folder, args.top), end="")


if __name__ == "__main__":
    main()
