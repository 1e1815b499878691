"""A process of `benchmarks.scaling`: compiles the programs it is told of, then runs steps on demand."""

import dataclasses
import json
import os
import re
import sys
import time
from typing import Any

from benchmarks.served import requests
from benchmarks.settings import configured

AXES = {"data": (-1, 1, 1), "fsdp": (1, -1, 1), "tensor": (1, 1, -1)}
SETTINGS = ("data.source=docstrings", "model.dtype=bfloat16", "model.dropout=0.1", "model.attention_dropout=0.1")
BATCHES = 4  # different ones, used in turn
_STARTED = re.compile(r"%([\w.\-]+) = .*? (?:all-reduce|all-gather|async)-start\(")
_WORK = re.compile(r" (fusion|custom-call|dot|convolution)\(")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all programs of a call have in common."""

    rows: int  # a device
    length: int
    vocabulary: int
    assignments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Contender:
    """One program: a size on some devices of the host from `number` on, along one axis, compiled with some options."""

    size: str
    mesh: str
    devices: int
    variant: str
    number: int = 0

    @property
    def place(self) -> str:
        """Its devices, in words."""
        return f"device {self.number}" if self.devices == 1 else f"{self.devices} devices"

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's, beside those of a run."""
        if self.variant == "default":
            return {}
        pairs = (part.split("=", 1) for part in self.variant.split(","))
        return {name: {"true": True, "false": False}.get(value, value) for name, value in pairs}


class Runner:
    """A compiled step with its state and batches on its devices."""

    def __init__(self, contender: Contender, shape: Shape):
        import jax
        import numpy as np
        from jax.sharding import AxisType

        from convattn_jax import sharding
        from convattn_jax.config import from_config
        from convattn_jax.program import PretrainConfig, Program, made_up_vocabulary, plain

        c = configured(f"configs/composite.py:{contender.size}", [*SETTINGS, *shape.assignments])
        if contender.size == "large" and not any(text.startswith("model.loop=") for text in shape.assignments):
            c.model.loop = "scan"
        c.train.batch_size, c.data.length = shape.rows * contender.devices, shape.length
        c = from_config(PretrainConfig, c)
        axes = tuple(contender.devices if n == -1 else n for n in AXES[contender.mesh])
        last = contender.number + contender.devices
        if len(jax.devices()) < last:
            raise ValueError(f"--devices={last}: this host has {len(jax.devices())}")
        devices = jax.devices()[contender.number : last]
        mesh = jax.make_mesh(axes, sharding.AXES, axis_types=(AxisType.Auto,) * len(axes), devices=devices)
        sharding.check_divides(mesh, c.train.batch_size, 1, c.model.heads)
        self.program = Program(c, made_up_vocabulary(shape.vocabulary), np.ones(shape.vocabulary, np.int64), mesh)
        began = time.perf_counter()
        self.step: Any = self.program.lower().compile(contender.options)
        self.compile_seconds = time.perf_counter() - began
        self.text: str = self.step.as_text()
        self.seed = np.uint32(0)

        rows = np.random.default_rng(0).integers(
            5, shape.vocabulary // 2, (BATCHES, c.train.batch_size, c.data.length), np.uint16
        )
        rows[:, :, 0], rows[:, :, c.data.length // 2], rows[:, :, -1] = 2, 3, 3
        self.batches = [
            sharding.global_batch(lambda first, count, b=b: b[first : first + count], len(b), c.data.length, mesh)
            for b in rows
        ]
        self.state = plain(self.program.init(0))

    def run(self, steps: int) -> float:
        """Seconds a step."""
        import jax

        began, sums = time.perf_counter(), None
        for i in range(steps):
            self.state, sums = self.step(self.state, self.batches[i % BATCHES], self.seed)
        jax.block_until_ready((self.state, sums))
        return (time.perf_counter() - began) / steps

    def facts(self) -> dict[str, Any]:
        """What is known of the program."""
        import jax

        from convattn_jax.collectives import collectives

        return {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "loop": self.program.c.model.loop,
            "layers": self.program.c.model.layers,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.program.like.params)),
            "compile_s": self.compile_seconds,
            "collectives": collectives(self.text),
            "overlap": overlaps(self.text),
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


def main() -> None:
    """Says each program's facts and its first steps' time, then answers INDEX STEPS with the seconds a step."""
    told, asked, out = json.loads(sys.argv[1]), requests(), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, in C++ too, is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    try:
        import jax

        if told["processes"] > 1:
            jax.distributed.initialize(
                told["coordinator"], told["processes"], told["process"], cluster_detection_method="deactivate"
            )
        if jax.default_backend() == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
            raise RuntimeError("JAX finds no GPU or TPU; to try it on a CPU: JAX_PLATFORMS=cpu, see --help")
        shape = Shape(**{**told["shape"], "assignments": tuple(told["shape"]["assignments"])})
        runners = []
        for fields in told["contenders"]:
            runners.append(Runner(Contender(**fields), shape))
            runners[-1].run(2)
            say(runners[-1].facts())
        for line in asked:
            index, steps = map(int, line.split())
            runners[index].run(1)  # so that nobody pays for whoever ran before
            say({"seconds": runners[index].run(steps)})
    except Exception as error:
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
