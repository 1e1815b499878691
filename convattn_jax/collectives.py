"""The collectives of a compiled program, read off its optimized HLO text."""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# TPUs: a collective under way beside several fusions stands in each of them, with the number of its chain; and one that
# is cut at once is an all-reduce within a fusion that is named after both.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SCATTERED = "all-reduce-scatter"
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)(?:e\w+)?\[([\d,]*)\]")


class Collective(NamedTuple):
    """Those of one kind over groups of one size: how often a step runs one, their results' bytes on a device."""

    kind: str
    group: int  # devices that take part in each; 0 where the text doesn't say
    runs: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step if each runs around a ring (Patarasuk and Yuan 2009)."""
        others = self.group - 1
        if self.kind == "all-reduce":
            return 2 * others / self.group * self.bytes if self.group else math.nan
        if self.kind == "reduce-scatter":
            return float(others * self.bytes)
        return others / self.group * self.bytes if self.kind != "collective-permute" else float(self.bytes)


def collectives(hlo: str) -> list[Collective]:
    """All of them, by kind and group, each as often as the loops around it run; the most bytes first."""
    bodies, entry = _computations(hlo)
    totals: dict[tuple[str, int], list[int]] = collections.defaultdict(lambda: [0, 0])
    chains: set[str] = set()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            if found := _INSTRUCTION.search(line):
                if chain := _CHAIN.search(line):
                    if chain[1] in chains:
                        continue
                    chains.add(chain[1])
                result, kind, started = found.groups()
                group, size = _group(line), _bytes(result, kind, bool(started))
                if kind == "all-reduce" and name.startswith(_SCATTERED):
                    kind, size = "reduce-scatter", size // max(group, 1)
                total = totals[kind, group]
                total[0] += times
                total[1] += times * size
            elif loop := _WHILE.search(line):
                trips = _TRIPS.search(line)
                visit(loop[1], times * int(trips[1]) if trips else times)
            else:
                branches = _BRANCHES.search(line)
                inner = re.findall(r"[\w.\-]+", branches[1]) if branches else []
                for called in (*_CALLS.findall(line), *inner):
                    visit(called, times)

    visit(entry, 1)
    return sorted((Collective(*key, *total) for key, total in totals.items()), key=lambda c: (-c.bytes, c))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if begun := _COMPUTATION.match(line):
            name = begun[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _bytes(result: str, kind: str, started: bool) -> int:
    """Bytes of a result; what a -start returns has its operands in front, an all-reduce's only in some versions."""
    sizes = [math.prod(map(int, filter(None, dims.split(",")))) * _width(kind) for kind, dims in _ARRAY.findall(result)]
    if started and (kind in ("all-gather", "collective-permute") or result.startswith("((")):
        wide = [size for size in sizes if size > 8] if kind == "collective-permute" else sizes  # two words of context
        return sum(wide[len(wide) // 2 :])
    return sum(sizes)


def _width(dtype: str) -> int:
    return 1 if dtype == "pred" else 2 if dtype == "bf16" else max(1, int(dtype[1:]) // 8)


def _group(line: str) -> int:
    """Devices of one group: replica_groups={{0,1},{2,3}}, =[2,4]<=[8] or =mesh['x'=2,'y'=4] {'y'}."""
    groups = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if iota := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(iota[1])
    if mesh := re.match(r"mesh\[([^\]]*)\].*? \{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 0
