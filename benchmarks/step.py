"""Times whole training steps: masking, forward, backward, optimizer.

    python -m benchmarks.step                                       # the demonstration: composite beside plain BERT
    python -m benchmarks.step --configs=configs/composite.py:small,configs/composite.py:small@model.kernel=plain \
        --batch=1024 --length=128 --vocabulary=30004
    python -m benchmarks.step --profile=traces --steps=3            # where the device time goes, kernel by kernel

Variants take turns, so that a machine that slows down slows all of them; compare by ratio within one call. The rows
are random token ids in full rows: every slot counts as a token.
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import kernel_times
from benchmarks.settings import configured
from convattn_jax import optim, train
from convattn_jax.config import from_config
from convattn_jax.kernels.attend import attend_by
from convattn_jax.masking import MaskingConfig, Vocabulary
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling

SPECIAL = 5  # ids 0 to 4: padding, unknown, [CLS], [SEP], [MASK]


class Stepper(NamedTuple):
    """A training step that is compiled and has its state."""

    run: Callable[[int], None]  # some steps, and waits for the last
    program: Callable[[], str]  # XLA's text of the compiled step


def stepper(spec: str, assignments: list[str], batch: int, length: int, vocabulary: int) -> Stepper:
    """The training step of a configuration."""
    file, *own = spec.split("@")
    config = configured(file, [*assignments, *own])
    special = np.arange(vocabulary) < SPECIAL
    shape = from_config(ModelConfig, config.model, "model.")
    model = MaskedLM(shape, vocabulary, attend_by(shape.kernel))
    masking = from_config(MaskingConfig, config.masking, "masking.")
    unigram = np.zeros(model.vocab_rows, np.float32)
    objective = MaskedLanguageModelling(model, Vocabulary(4, special, ~special), config.data.layout, masking, unigram)
    optimizer = optim.make_optimizer(from_config(optim.OptimizerConfig, config.optimizer, "optimizer."), 1000)
    step = jax.jit(train.make_train_step(objective, optimizer, 0), donate_argnums=0)

    @jax.jit
    def start(key: jax.Array) -> train.TrainState:
        params = model.initial_params(key)
        return train.TrainState(jax.numpy.zeros((), jax.numpy.int32), params, optimizer.init(params))

    rows = np.random.default_rng(0).integers(SPECIAL, vocabulary, (8, batch, length), np.uint16)
    rows[:, :, 0], rows[:, :, length // 2], rows[:, :, -1] = 2, 3, 3
    batches = [jax.device_put(part) for part in rows]
    state = start(jax.random.key(0))
    compiled = step.lower(state, batches[0]).compile()

    def run(steps: int) -> None:
        nonlocal state
        sums = None
        for i in range(steps):
            state, sums = compiled(state, batches[i % len(batches)])
        jax.block_until_ready(sums)

    return Stepper(run, lambda: compiled.as_text() or "")


def profile(runs: dict[str, Stepper], folder: pathlib.Path, steps: int) -> None:
    """Traces some steps of each and prints where the device time goes."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    for spec, step in runs.items():
        step.run(2)
        inside = folder / re.sub(r"[^\w.=]+", "-", spec)
        inside.mkdir(parents=True, exist_ok=True)
        with jax.profiler.trace(str(inside), profiler_options=options):
            step.run(steps)
        (inside / "program.txt").write_text(step.program())
        (inside / "steps.txt").write_text(str(steps))
        print(f"\n{spec}: {inside}\n{kernel_times.analyse(inside)}", flush=True)


def main() -> None:
    """Prints a table, the first configuration as the yardstick, and writes JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configs", default="configs/composite.py,configs/bert.py", help="comma-separated FILE[:SIZE][@KEY=VALUE...]"
    )
    parser.add_argument("--batch", type=int, default=32, help="rows per step")
    parser.add_argument("--length", type=int, default=64, help="tokens per row")
    parser.add_argument("--vocabulary", type=int, default=4096, help="ids")
    parser.add_argument("--steps", type=int, default=5, help="steps per turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.dtype=float32")
    parser.add_argument(
        "--profile", type=pathlib.Path, metavar="DIR", help="trace --steps steps of each, and stop there"
    )
    parser.add_argument("--json", help="a file for the figures as JSON lines")
    args = parser.parse_args()
    if args.profile:  # kernels inside of a CUDA graph don't say which operation they belong to
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

    runs, compile_seconds, seconds = {}, {}, {}
    for spec in args.configs.split(","):
        began = time.perf_counter()
        runs[spec] = stepper(spec, args.set, args.batch, args.length, args.vocabulary)
        runs[spec].run(1)
        compile_seconds[spec], seconds[spec] = time.perf_counter() - began, []
    if args.profile:
        profile(runs, args.profile, args.steps)
        return
    for _ in range(args.turns):
        for spec, step in runs.items():
            began = time.perf_counter()
            step.run(args.steps)
            seconds[spec].append((time.perf_counter() - began) / args.steps)

    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, {args.batch} x {args.length} tokens, {args.turns} turns")
    yardstick = statistics.median(next(iter(seconds.values())))
    lines = []
    for spec, times in seconds.items():
        median = statistics.median(times)
        tokens = args.batch * args.length / median
        print(
            f"  {spec:48} {median * 1e3:9.2f} ms ({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f})  "
            f"{tokens:12,.0f} tokens/s  x {median / yardstick:.3f}  first step {compile_seconds[spec]:.1f} s"
        )
        lines.append({
            "config": spec, "device": device, "jax": jax.__version__, "batch": args.batch, "length": args.length,
            "step_ms": [t * 1e3 for t in times], "tokens_per_second": tokens, "first_step_s": compile_seconds[spec],
        })  # fmt: skip
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
