"""How long a run takes from its command to the end of its first step: with nothing compiled yet, then once more.

    python -m benchmarks.start --config=configs/composite.py
    python -m benchmarks.start --config=configs/composite.py:base --config.data.files='my_text/*.txt' --repeats=2

Every start is a process of its own, all on one fresh folder of compiled programs. Preparing the text is timed by itself
and not counted: it happens once, whatever is compiled. Prints a Markdown table; --json=FILE adds JSON lines. Beside the
whole stand its parts, in seconds: importing, finding the devices, tracing, lowering, compiling (once more: reading what
was compiled), and the rest, the step itself among it. What happens in two threads at once is counted twice, so that the
rest of a start with traced programs can be less than nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.arguments import documented

BEGAN = "CONVATTN_BENCHMARK_BEGAN"
PHASES = {  # told to JAX's monitoring, whose sums are columns of the table
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",  # or reading what was compiled
}


def main() -> None:
    """Starts the processes and prints the table."""
    parser = documented(__doc__)
    parser.add_argument("--repeats", type=int, default=1, help="starts with a warm cache")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per start")
    args, rest = parser.parse_known_args()
    records = []
    with tempfile.TemporaryDirectory() as cache:
        for i in range(1 + args.repeats):
            records.append({"start": "warm" if i else "cold", **start(rest, cache)})
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
        size = sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(cache) for name in names)
    print(markdown(records, size / 2**20))
    if args.json:
        with open(args.json, "a") as file:
            file.writelines(json.dumps({"arguments": rest, **record}) + "\n" for record in records)


def start(arguments: list[str], cache: str) -> dict[str, Any]:
    """The figures of one process."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "benchmarks.start", "child", *arguments]
        environment = {**os.environ, BEGAN: repr(time.time())}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run(
            [*command, f"--workdir={workdir}/run", f"--compile_cache={cache}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """A run that ends with its first step."""
    from convattn_jax import main as door

    began = float(os.environ[BEGAN])
    import jax

    from convattn_jax import distributed, pretrain, train

    seconds = {"imports": time.time() - began, **dict.fromkeys(("devices", "text", *PHASES.values()), 0.0)}

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.time() - before

        return run

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if event in PHASES:
            seconds[PHASES[event]] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)

    def first_step(state, config, *, train_step, batches, **_):
        jax.block_until_ready(train_step(state, next(iter(batches))))
        seconds["first_step"] = time.time() - began - seconds["text"]
        print("\n" + json.dumps({**seconds, "device": jax.devices()[0].device_kind}), flush=True)
        os._exit(0)

    distributed.check_devices = timed(distributed.check_devices, "devices")  # who asks for them first
    pretrain.find_rows, train.fit = timed(pretrain.find_rows, "text"), first_step
    door.main([sys.argv[0], *sys.argv[2:]])


def markdown(records: list[dict[str, Any]], megabytes: float) -> str:
    """A row per start, the share of the cold one beside each."""
    cold = records[0]["first_step"]
    lines = [f"{records[0]['device']}; {megabytes:.0f} MB of compiled programs", ""]
    parts = ("imports", "devices", *PHASES.values())
    lines += [f"| start | first step after, s | of the cold start | {' | '.join(parts)} | the rest |"]
    lines += ["|---" * (len(parts) + 4) + "|"]
    for r in records:
        rest = r["first_step"] - sum(r[part] for part in parts)
        cells = (r["start"], f"{r['first_step']:.1f}", f"{r['first_step'] / cold:.0%}")
        lines.append(f"| {' | '.join([*cells, *(f'{r[part]:.1f}' for part in parts), f'{rest:.1f}'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["child"] else main()
