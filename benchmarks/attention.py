"""Attention alone, forward and backward: the fused kernel against cuDNN, SDPA, FlexAttention and the plain form.

    python -m benchmarks.attention --out=results            one GPU, a few minutes
    python -m benchmarks.attention --candidates             tile sizes for convattn_jax/kernels/blocks.py
    python -m benchmarks.attention --check                  errors against float64, and repeatability

Contenders take turns, several rounds; a figure is the median over rounds with the lowest and highest beside it. Writes
attention.jsonl, attention.md and attention.png to --out. Contenders whose library is missing are left out.
"""

import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.arguments import chosen, documented, need_gpu, positive, sizes
from benchmarks.attention_problem import (
    QUERY_SIDE,
    RATE,
    Contender,
    Problem,
    draw,
    measure,
    reference,
    with_gradients,
)

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU

SHAPES = ((256, 128), (64, 512), (16, 2048), (4, 8192))


# --- contenders in JAX -----------------------------------------------------------------------------------------------


def jax_contender(attend: Callable[..., Any], problem: Problem, taps: tuple[str, ...] = ()) -> Contender:
    import jax

    x = draw(problem)
    args = (x["q"], x["k"], x["v"]), {name: x[name] for name in taps}, x["g"]
    step = with_gradients(attend)
    return Contender(lambda: step(*args), jax.block_until_ready)


def kernel(problem: Problem, rate: float = 0.0, taps: tuple[str, ...] = QUERY_SIDE, padded: bool = False) -> Contender:
    """The fused kernel; `padded` masks an eighth of every row."""
    import jax.numpy as jnp

    from convattn_jax.kernels.composite import composite_attention

    seed = jnp.array([1, 2], jnp.uint32) if rate else None
    segments = None
    if padded:
        visible = jnp.arange(problem.length) < problem.length * 7 // 8
        segments = jnp.broadcast_to(visible, (problem.batch, problem.length)).astype(jnp.int32)

    def attend(q, k, v, **taps):
        return composite_attention(
            (q, k, v),
            **taps,
            scale=problem.head_size**-0.5,
            query_segments=segments,
            key_segments=segments,
            dropout_rate=rate,
            dropout_seed=seed,
        )

    return jax_contender(attend, problem, taps)


def plain_form(problem: Problem) -> Contender:
    """The same composite attention as array operations, compiled by XLA."""
    return jax_contender(reference(problem), problem, QUERY_SIDE)


def cudnn(problem: Problem) -> Contender:
    """Plain attention by cuDNN, through JAX."""
    import jax

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return jax_contender(attend, problem)


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "plain: cuDNN": cudnn,
    "plain: kernel": lambda problem: kernel(problem, taps=()),
    f"plain: kernel, dropout {RATE}": lambda problem: kernel(problem, RATE, ()),
    "composite: kernel": kernel,
    f"composite: kernel, dropout {RATE}": lambda problem: kernel(problem, RATE),
    f"composite: kernel, padding, dropout {RATE}": lambda problem: kernel(problem, RATE, padded=True),
    "fixed: kernel": lambda problem: kernel(problem, taps=("fixed",)),
    "composite with dynamic_key: kernel": lambda problem: kernel(problem, taps=(*QUERY_SIDE, "dynamic_key")),
    "composite: plain form": plain_form,
}
QUADRATIC_MEMORY = {"composite: plain form": 1024}  # longest rows that these are tried on

# ratio of medians: name, the fastest of those, over the fastest of these
RATIOS = (
    ("composite kernel / plain by cuDNN through JAX", ("composite: kernel",), ("plain: cuDNN",)),
    (
        "composite kernel / the fastest plain attention",
        ("composite: kernel",),
        ("plain: cuDNN", "plain: SDPA", "plain: SDPA, flash", "plain: SDPA, cuDNN", "plain: kernel"),
    ),
    (
        "FlexAttention, the faster form / composite kernel",
        ("composite: FlexAttention, table by query", "composite: FlexAttention, table by tap"),
        ("composite: kernel",),
    ),
    (
        f"composite kernel / the fastest plain attention, dropout {RATE}",
        (f"composite: kernel, dropout {RATE}",),
        (f"plain: kernel, dropout {RATE}", f"plain: SDPA, dropout {RATE}"),
    ),
)


def contenders() -> dict[str, Callable[[Problem], Contender]]:
    """All there are; PyTorch's too, which are found missing when they are built."""
    from benchmarks.attention_peers import PEERS

    return CONTENDERS | PEERS


def compare(shapes: list[tuple[int, int]], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A record per shape and contender."""
    records = []
    for batch, length in shapes:
        problem, built = Problem(batch, length), {}
        for name in names:
            if length > QUADRATIC_MEMORY.get(name, length):
                continue
            try:
                contender = contenders()[name](problem)
                contender.wait(contender.run())
                built[name] = contender
            except Exception as error:
                print(f"{problem} {name}: left out, {str(error).splitlines()[0][:200]}", file=sys.stderr)
        for name, times in measure(built, rounds).items():
            figures = {"ms": statistics.median(times), "low": min(times), "high": max(times)}
            record = {"batch": batch, "length": length, "contender": name} | figures
            records.append(record)
            print(json.dumps(record), flush=True)
    return records


# --- report ----------------------------------------------------------------------------------------------------------


def markdown(records: list[dict[str, Any]]) -> str:
    """A row per contender, a column per shape."""
    shapes = list(dict.fromkeys((r["batch"], r["length"]) for r in records))
    cells = {(r["contender"], r["batch"], r["length"]): r for r in records}
    lines = [
        "| forward + backward, ms | " + " | ".join(f"{b} x {t}" for b, t in shapes) + " |",
        "|---" * (len(shapes) + 1) + "|",
    ]
    for name in dict.fromkeys(r["contender"] for r in records):
        row = [cells.get((name, *shape)) for shape in shapes]
        texts = [f"{r['ms']:.3f} ({r['low']:.3f} to {r['high']:.3f})" if r else "" for r in row]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    for name, of, to in RATIOS:
        texts = []
        for shape in shapes:
            above, below = ([cells[c, *shape]["ms"] for c in side if (c, *shape) in cells] for side in (of, to))
            texts.append(f"{min(above) / min(below):.2f}" if above and below else "")
        if any(texts):
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def picture(records: list[dict[str, Any]], spaces: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Time against length, and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in dict.fromkeys(r["contender"] for r in records):
        points = [(r["length"], r["ms"]) for r in records if r["contender"] == name]
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set(xscale="log", yscale="log", xlabel="tokens in a row", ylabel="ms, forward + backward")
    left.legend(fontsize=7)
    for name in dict.fromkeys(r["memory"] for r in spaces):
        points = [(r["length"], r["temporary_bytes"] / 2**20) for r in spaces if r["memory"] == name]
        right.plot(*zip(*points, strict=True), marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="tokens in a row (batch 1)", ylabel="MiB beyond arguments and results")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = documented(__doc__)
    parser.add_argument(
        "--shapes",
        type=sizes("batch", "length"),
        default=",".join(f"{b}x{t}" for b, t in SHAPES),
        help="batch x length, by commas",
    )
    parser.add_argument("--contenders", default="", help="only those whose names hold one of these words, by commas")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--candidates", action="store_true", help="time tile sizes instead")
    parser.add_argument("--check", action="store_true", help="errors and repeatability instead")
    parser.add_argument("--memory", action="store_true", help="memory against length instead")
    parser.add_argument("--rate", type=float, default=0.0, help="dropout, with --candidates")
    parser.add_argument("--dtype", default="bfloat16", help="with --candidates")
    parser.add_argument("--head-size", type=positive, default=64, help="with --candidates")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the results")
    options = parser.parse_args()
    shapes: list[tuple[int, int]] = options.shapes
    if options.check:
        need_gpu(parser, "--check")
        from benchmarks.attention_checks import CHECKS, check

        for case in CHECKS:
            print(json.dumps(check(*case)), flush=True)
    elif options.candidates:
        need_gpu(parser, "--candidates")
        from benchmarks.attention_tiles import candidates

        candidates(shapes, options.rounds, options.rate, options.dtype, options.head_size)
    elif options.memory:
        from benchmarks.attention_checks import memory

        memory()
    else:
        records = compare(shapes, chosen(parser, options.contenders, contenders()), options.rounds)
        table = markdown(records)
        print(table)
        if options.out:
            from benchmarks.attention_checks import memory

            spaces = memory()
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "attention.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records + spaces))
            (options.out / "attention.md").write_text(table)
            picture(records, spaces, options.out / "attention.png")


if __name__ == "__main__":
    main()
