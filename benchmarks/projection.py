"""Scaling on paper: compute, collective bytes, input and checkpoints of machines that were not measured.

    python -m benchmarks.projection

The formulas stand in docs/scaling.md, beside the table that this prints; nothing here was measured on these machines.
"""

import dataclasses
from collections.abc import Iterator

MEASURED_MS, MEASURED_TOKENS = 43.9, 256 * 128  # BERT-base, composite, one H200: docs/performance.md
H200 = 989e12  # dense bfloat16 FLOP/s of an H200, as published
RATE = 0.8  # of published link speeds that collectives are taken to reach
STORAGE = 1e9  # bytes/s that a host writes to storage; an assumption


@dataclasses.dataclass(frozen=True)
class Machine:
    """Published figures of one device and of what joins it to the others; bytes/s are of one direction."""

    name: str
    devices: int
    per_host: int
    flops: float  # dense bfloat16
    inside: float  # bytes/s out of a device to others of its island
    island: int  # devices that such links join
    outside: float  # bytes/s out of a device to other islands


MACHINES = (
    Machine("TPU v5e-256", 256, 4, 197e12, 1600e9 / 8, 256, 0.0),
    Machine("TPU v6e-256", 256, 4, 918e12, 3584e9 / 8, 256, 0.0),
    Machine("64 H100 (8 hosts)", 64, 8, 989e12, 450e9, 8, 400e9 / 8),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A shape of configs/base.py with composite attention; V is the vocabulary's rows."""

    name: str
    layers: int
    width: int
    hidden: int
    rows: int = 30_080

    @property
    def weights(self) -> int:
        """Of the layers' matrices."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden)

    @property
    def parameters(self) -> int:
        """N, of matrices and embedding; biases, taps and scales are below half a per cent."""
        return self.weights + self.rows * self.width + self.width**2

    def flops(self, rows: int, length: int) -> float:
        """6 tokens x weights + 12 L B T^2 D + 6 predicted positions x head weights, of a step."""
        predicted = rows * -(-15 * length // 100)
        attention = 12 * self.layers * rows * length**2 * self.width
        return 6 * rows * length * self.weights + attention + 6 * predicted * (self.width**2 + self.rows * self.width)


BASE, LARGE = Model("base", 12, 768, 3072), Model("large", 24, 1024, 4096)


def utilisation() -> float:
    """The share of the peak that the measured step reaches; every machine is taken to reach the same."""
    return BASE.flops(256, 128) / (MEASURED_MS / 1e3) / H200


def all_reduce_seconds(machine: Machine, size: float) -> float:
    """A ring within each island, then rings between islands, each device with its part: 2 (n-1)/n S / b for each."""
    inside = 2 * (machine.island - 1) / machine.island * size / (RATE * machine.inside)
    islands = machine.devices // machine.island
    if islands == 1:
        return inside
    return inside + 2 * (islands - 1) / islands * size / machine.island / (RATE * machine.outside)


@dataclasses.dataclass(frozen=True)
class Projection:
    """What a step and a checkpoint take."""

    compute: float  # seconds
    data: float  # seconds of data parallel's collectives: the gradient's all-reduce, 4 N bytes
    fsdp: float  # seconds of FSDP's: two gathers of 4 N bytes (forward, backward) and a scatter, 3/2 all-reduces
    tokens: int  # of a step, on all devices
    host_input: float  # bytes/s that a host reads: 2 bytes a token
    checkpoint: float  # seconds to write 12 N bytes, all hosts at once

    def tokens_per_second(self, collectives: float, hidden: bool) -> float:
        """Of all devices, with collectives wholly beside the computation or wholly after it."""
        step = max(self.compute, collectives) if hidden else self.compute + collectives
        return self.tokens / step


def project(machine: Machine, model: Model, rows: int = 256, length: int = 128) -> Projection:
    """`rows` are those of each device."""
    compute = model.flops(rows, length) / (machine.flops * utilisation())
    once = all_reduce_seconds(machine, 4 * model.parameters)
    hosts = machine.devices / machine.per_host
    return Projection(
        compute=compute,
        data=once,
        fsdp=1.5 * once,
        tokens=machine.devices * rows * length,
        host_input=2 * rows * length * machine.per_host / compute,
        checkpoint=12 * model.parameters / (hosts * STORAGE),
    )


def markdown() -> Iterator[str]:
    """The table of docs/scaling.md."""
    yield "| machine | model | compute | all-reduce | FSDP | M tokens/s, data | FSDP | input a host | checkpoint |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for machine in MACHINES:
        for model in (BASE, LARGE):
            p = project(machine, model)
            speeds = [
                " to ".join(f"{p.tokens_per_second(seconds, hidden) / 1e6:.1f}" for hidden in (False, True))
                for seconds in (p.data, p.fsdp)
            ]
            times = [f"{1e3 * seconds:.1f} ms" for seconds in (p.compute, p.data, p.fsdp)]
            rest = [f"{p.host_input / 1e6:.1f} MB/s", f"{p.checkpoint:.2f} s"]
            yield f"| {' | '.join([machine.name, model.name, *times, *speeds, *rest])} |"


if __name__ == "__main__":
    print(f"utilisation of the measured step: {utilisation():.1%}\n")
    print("\n".join(markdown()))
