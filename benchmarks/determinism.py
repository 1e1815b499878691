"""Whether a run that is killed and resumed on a GPU ends with the same bits, and what that costs.

    python -m benchmarks.determinism                      # a GPU, four minutes; JSON lines on stdout

For each setting of train.deterministic: a run of its own, untouched; the same command again, killed with SIGKILL after
its first checkpoint and resumed; then the bits of parameters and optimizer and all logged losses are compared, and
tokens/s of the untouched run given. Compiled programs are not kept, so that every start tunes and compiles anew.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.arguments import documented, positive

WORDS = "the a one old new cat dog bird fish sat ran sang swam on under by with mat tree pond sun rain and then"


def write_text(path: pathlib.Path, documents: int) -> None:
    draw = random.Random(0)
    sentences = (" ".join(draw.choices(WORDS.split(), k=draw.randint(5, 30))) + "." for _ in range(8 * documents))
    path.write_text("\n\n".join("\n".join(next(sentences) for _ in range(8)) for _ in range(documents)) + "\n")


def command(home: pathlib.Path, run: pathlib.Path, args: argparse.Namespace, deterministic: bool) -> list[str]:
    """One pre-training run."""
    values = {
        "data.source": "text",
        "data.files": str(home / "text.txt"),
        "data.length": args.length,
        "data.cache_dir": str(home / "cache"),
        "tokenizer.vocab_size": 48,
        "model.vocab_multiple": args.vocabulary,
        "model.layers": args.layers,
        "train.steps": args.steps,
        "train.batch_size": args.batch,
        "train.log_every": args.steps // 10,
        "train.eval_every": args.steps,
        "train.eval_rows": args.batch,
        "train.deterministic": deterministic,
        "checkpoint.every_seconds": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    program = [sys.executable, "-m", "convattn_jax.main", f"--config={args.config}", "--compile_cache="]
    return [*program, f"--workdir={run}", *flags]


def arrays(run: pathlib.Path, step: int) -> list[np.ndarray]:
    """All numbers of a checkpoint, read without a device's help."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    with ocp.StandardCheckpointer() as orbax:
        items = [orbax.restore(epath.Path(run) / "checkpoints" / str(step) / item) for item in ("params", "rest")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(items)]


def rows(run: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(home: pathlib.Path, args: argparse.Namespace, deterministic: bool) -> dict[str, object]:
    """The figures of one setting."""
    name = "deterministic" if deterministic else "default"
    untouched, killed = home / f"{name}-untouched", home / f"{name}-killed"
    log = {"stdout": subprocess.DEVNULL, "env": os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}}
    began = time.perf_counter()
    subprocess.run(command(home, untouched, args, deterministic), check=True, **log)
    process = subprocess.Popen(command(home, killed, args, deterministic), **log)
    while not list(killed.glob("checkpoints/*/manifest.json")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    was_killed = process.wait() == -signal.SIGKILL
    resumed_from = max((int(path.parent.name) for path in killed.glob("checkpoints/*/manifest.json")), default=0)
    subprocess.run(command(home, killed, args, deterministic), check=True, **log)

    a, b = arrays(untouched, args.steps), arrays(killed, args.steps)
    losses = [[row["loss"] for row in rows(run)] for run in (untouched, killed)]
    different = sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))
    speeds = [row["tokens_per_second"] for row in rows(untouched) if row["tokens_per_second"] > 0]
    return {
        "deterministic": deterministic,
        "killed": was_killed,
        "resumed_from": resumed_from,
        "same_bits": different == 0 and losses[0] == losses[1],
        "numbers": sum(x.size for x in a),
        "different_numbers": different,
        "largest_difference": max(float(np.abs(x.astype(np.float64) - y).max()) for x, y in zip(a, b, strict=True)),
        "losses_equal": sum(x == y for x, y in zip(*losses, strict=True)),
        "losses": len(losses[0]),
        "tokens_per_second": float(np.median(speeds)),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Prints one JSON line a setting, and one with the cost."""
    parser = documented(__doc__)
    parser.add_argument("--config", default="configs/composite.py:small")
    parser.add_argument("--layers", type=positive, default=6)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--length", type=positive, default=128)
    parser.add_argument("--vocabulary", type=positive, default=8192, help="rows of the embedding")
    parser.add_argument("--documents", type=positive, default=6000, help="of made-up text")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="determinism-") as folder:
        home = pathlib.Path(folder)
        write_text(home / "text.txt", args.documents)
        found = []
        for deterministic in (True, False):
            found.append(compare(home, args, deterministic))
            print(json.dumps(found[-1]), flush=True)
    speeds = [float(str(one["tokens_per_second"])) for one in found]
    print(json.dumps({"deterministic_speed": speeds[0] / speeds[1]}), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
