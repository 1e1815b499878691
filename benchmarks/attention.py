"""Attention alone, forward and backward: the fused kernel against cuDNN, SDPA, FlexAttention and the plain form.

    python -m benchmarks.attention --out=results            one GPU, a few minutes
    python -m benchmarks.attention --candidates             tile sizes for convattn_jax/kernels/blocks.py
    python -m benchmarks.attention --check                  errors against float64, and repeatability

Contenders take turns, several rounds; a figure is the median over rounds with the lowest and highest beside it. Writes
attention.jsonl, attention.md and attention.png to --out. Contenders whose library is missing are left out.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU


class Problem(NamedTuple):
    batch: int
    length: int
    heads: int = 12
    head_size: int = 64
    radius: int = 8

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


class Contender(NamedTuple):
    run: Callable[[], Any]
    wait: Callable[[Any], Any]


RATE = 0.1
SHAPES = ((256, 128), (64, 512), (16, 2048), (4, 8192))


# --- contenders in JAX -----------------------------------------------------------------------------------------------


def draw(problem: Problem, dtype: str = "bfloat16", seed: int = 0) -> dict[str, Any]:
    """Random q, k, v, the gradient of the output, and taps, as in a model that has trained for a while."""
    import jax.numpy as jnp
    import numpy as np

    random = np.random.default_rng(seed)
    b, t, h, k, n = problem

    def normal(*shape, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

    rows = {name: normal(b, t, h, k) for name in ("q", "k", "v", "g")}
    width = 2 * n + 1
    taps = {"fixed": normal(h, width, dtype="float32"), "dynamic_query": normal(k, width, dtype="float32")}
    return rows | taps | {"dynamic_key": normal(k, width, dtype="float32")}


def with_gradients(attend: Callable[..., Any]) -> Any:
    """The output and all gradients, of q, k, v and taps."""
    import jax

    def both(rows, taps, g):
        out, pull = jax.vjp(lambda rows, taps: attend(*rows, **taps), rows, taps)
        return out, pull(g)

    return jax.jit(both)


def jax_contender(attend: Callable[..., Any], problem: Problem, taps: tuple[str, ...] = ()) -> Contender:
    import jax

    x = draw(problem)
    args = (x["q"], x["k"], x["v"]), {name: x[name] for name in taps}, x["g"]
    step = with_gradients(attend)
    return Contender(lambda: step(*args), jax.block_until_ready)


QUERY_SIDE = ("fixed", "dynamic_query")


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
            q,
            k,
            v,
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


def reference(problem: Problem) -> Callable[..., Any]:
    """The model's plain form with the taps as arguments."""
    import jax.numpy as jnp

    from convattn_jax.model.attention import attend as plain
    from convattn_jax.model.score import Score

    scale = problem.head_size**-0.5
    ones = jnp.ones((problem.batch, problem.length), jnp.int32)

    def attend(q, k, v, fixed=None, dynamic_query=None, dynamic_key=None):
        dynamic_query, dynamic_key = (None if x is None else x[None] * scale for x in (dynamic_query, dynamic_key))
        return plain(q, k, v, Score(scale, fixed, dynamic_query, dynamic_key), ones, ones, 0.0, None)

    return attend


def cudnn(problem: Problem) -> Contender:
    """Plain attention by cuDNN, through JAX."""
    import jax

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    return jax_contender(attend, problem)


# --- contenders in PyTorch -------------------------------------------------------------------------------------------


def torch_contender(attend: Callable[..., Any], problem: Problem, taps: tuple[str, ...] = ()) -> Contender:
    import torch  # pyright: ignore[reportMissingImports]

    b, t, h, k, n = problem

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    rows = [normal(b, h, t, k) for _ in range(3)]
    sizes = {"fixed": (h, 2 * n + 1), "dynamic_query": (k, 2 * n + 1)}
    learned = [normal(*sizes[name], dtype=torch.float32) for name in taps]
    g = torch.randn_like(rows[0])

    def run():
        return torch.autograd.grad(attend(*rows, *learned), rows + learned, g)

    return Contender(run, lambda _: torch.cuda.synchronize())


def sdpa(problem: Problem) -> Contender:
    """Plain attention by PyTorch's own choice of kernel."""
    from torch.nn.functional import scaled_dot_product_attention  # pyright: ignore[reportMissingImports]

    return torch_contender(scaled_dot_product_attention, problem)


def flex(problem: Problem) -> Contender:
    """FlexAttention's composite: the taps of every query as a table, looked up by score_mod."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import flex_attention  # pyright: ignore[reportMissingImports]

    radius = problem.radius

    def attend(q, k, v, fixed, dynamic_query):
        taps = (q.float() @ dynamic_query) * problem.head_size**-0.5 + fixed[None, :, None]

        def score_mod(score, b, h, i, j):
            return score + taps[b, h, i, torch.clamp(j - i, -radius, radius) + radius]

        return flex_attention(q, k, v, score_mod=score_mod)

    return torch_contender(torch.compile(attend, dynamic=False), problem, QUERY_SIDE)


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "plain: cuDNN": cudnn,
    "plain: SDPA": sdpa,
    "plain: kernel": lambda problem: kernel(problem, taps=()),
    f"plain: kernel, dropout {RATE}": lambda problem: kernel(problem, RATE, ()),
    "composite: kernel": kernel,
    f"composite: kernel, dropout {RATE}": lambda problem: kernel(problem, RATE),
    f"composite: kernel, padding, dropout {RATE}": lambda problem: kernel(problem, RATE, padded=True),
    "fixed: kernel": lambda problem: kernel(problem, taps=("fixed",)),
    "composite with dynamic_key: kernel": lambda problem: kernel(problem, taps=(*QUERY_SIDE, "dynamic_key")),
    "composite: FlexAttention": flex,
    "composite: plain form": plain_form,
}
QUADRATIC_MEMORY = {"composite: plain form": 1024}  # longest rows that these are tried on


# --- timing ----------------------------------------------------------------------------------------------------------


def once(contender: Contender, repeats: int) -> float:
    """Milliseconds a call."""
    start = time.perf_counter()
    result = None
    for _ in range(repeats):
        result = contender.run()
    contender.wait(result)
    return (time.perf_counter() - start) / repeats * 1e3


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, the contenders taking turns."""
    repeats = {}
    for name, contender in contenders.items():
        contender.wait(contender.run())
        repeats[name] = max(3, min(100, int(30 / once(contender, 5))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(once(contender, repeats[name]))
    return times


def compare(shapes: list[tuple[int, int]], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """A record per shape and contender."""
    records = []
    for batch, length in shapes:
        problem, contenders = Problem(batch, length), {}
        for name in names:
            if length > QUADRATIC_MEMORY.get(name, length):
                continue
            try:
                contender = CONTENDERS[name](problem)
                contender.wait(contender.run())
                contenders[name] = contender
            except Exception as error:
                print(f"{problem} {name}: left out, {str(error).splitlines()[0][:200]}", file=sys.stderr)
        for name, times in measure(contenders, rounds).items():
            figures = {"ms": statistics.median(times), "low": min(times), "high": max(times)}
            record = {"batch": batch, "length": length, "contender": name} | figures
            records.append(record)
            print(json.dumps(record), flush=True)
    return records


# --- tile sizes ------------------------------------------------------------------------------------------------------

TILES: dict[str, list[tuple[int, int, int, int]]] = {
    "forward": [(64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 1), (128, 64, 4, 2), (64, 128, 4, 2), (128, 128, 8, 1)],
    "dq": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 1), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 3)],
    "dkv": [(32, 128, 4, 3), (32, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (16, 128, 4, 3)],
    "one pass": [(128, 128, 8, 1)],
}


def candidates(shapes: list[tuple[int, int]], rounds: int, rate: float, dtype: str, head_size: int) -> None:
    """Times every pass of the kernel with every tile that compiles."""
    from concurrent.futures import ThreadPoolExecutor

    import jax

    for batch, length in shapes:
        problem = Problem(batch, length, head_size=head_size)
        jobs = [
            (name, sizes) for name, tiles in TILES.items() for sizes in tiles if name != "one pass" or length <= 128
        ]

        def build(job, problem=problem):
            try:
                return one_pass(problem, job[0], job[1], rate, dtype)
            except Exception as error:
                print(f"{problem} {job}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
                return None

        with ThreadPoolExecutor(8) as pool:
            built = dict(zip(jobs, pool.map(build, jobs), strict=True))
        contenders = {str(job): Contender(run, jax.block_until_ready) for job, run in built.items() if run}
        times = {name: statistics.median(values) for name, values in measure(contenders, rounds).items()}
        for name, ms in sorted(times.items(), key=lambda item: (item[0].split(",")[0], item[1])):
            print(f"{problem} {name}: {ms:.3f} ms", flush=True)


def one_pass(problem: Problem, name: str, sizes: tuple[int, int, int, int], rate: float, dtype: str):
    """A compiled call of one pass with one tile."""
    import jax

    from convattn_jax.kernels import backward, composite, forward
    from convattn_jax.kernels.blocks import Blocks, Tile

    x = draw(problem, dtype)
    size = Tile(*sizes)
    seed = jax.numpy.array([1, 2], "uint32") if rate else None
    spec, operands = composite.prepare(
        x["q"],
        x["k"],
        x["v"],
        fixed=x["fixed"],
        dynamic_query=x["dynamic_query"],
        scale=problem.head_size**-0.5,
        dropout_rate=rate,
        dropout_seed=seed,
        blocks=Blocks(size, size, None if name == "one pass" else size),
    )
    rows, heads, padded = problem.batch, problem.heads, spec.padded
    lse = jax.numpy.zeros((rows, heads, padded))
    slots = jax.numpy.ones((rows, heads, padded * 2 * problem.radius))
    rest = x["v"] if spec.half and not spec.whole_rows else None
    saved = forward.Saved(lse, slots, None, rest)
    out = None if spec.whole_rows else x["v"]
    by_queries = lambda *args: backward.pass_by_queries(spec, *args), (operands, saved, out, x["g"])
    runs = {
        "forward": (lambda *args: forward.forward(spec, *args), (operands,)),
        "dq": by_queries,
        "one pass": by_queries,
        "dkv": (lambda *args: backward.pass_by_keys(spec, *args), (operands, saved, x["g"], lse)),
    }
    function, args = runs[name]
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: compiled(*args)


# --- errors, repeatability, memory -----------------------------------------------------------------------------------


def check(problem: Problem, dtype: str, taps: tuple[str, ...]) -> dict[str, Any]:
    """Norm-wise errors of kernel and plain form against float64, and whether a second run gave the same bits."""
    import jax
    import numpy as np

    from convattn_jax.kernels.composite import composite_attention

    x = draw(problem, dtype)
    args = (x["q"], x["k"], x["v"]), {name: x[name] for name in taps}, x["g"]
    scale = problem.head_size**-0.5
    step = with_gradients(lambda *rows, **taps: composite_attention(*rows, **taps, scale=scale))
    first, second = step(*args), step(*args)
    plain = with_gradients(reference(problem))(*args)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact_args = jax.tree.map(lambda a: jax.numpy.asarray(np.asarray(a.astype("float32")), "float64"), args)
        exact = with_gradients(reference(problem))(*exact_args)

    def errors(result):
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(exact), strict=True)
        wide = [(np.asarray(a.astype("float32"), np.float64), np.asarray(b)) for a, b in pairs]
        return [float(f"{np.linalg.norm(a - b) / np.linalg.norm(b):.2g}") for a, b in wide]

    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    names = ["out", "q", "k", "v", *sorted(taps)]
    ours, theirs = errors(first), errors(plain)
    table = {name: (a, b) for name, a, b in zip(names, ours, theirs, strict=True)}
    return {"problem": str(problem), "dtype": dtype, "taps": taps, "kernel, plain": table, "repeats": same}


CHECKS = [
    (Problem(2, 128, 4), "bfloat16", QUERY_SIDE),
    (Problem(2, 512, 4), "bfloat16", QUERY_SIDE),
    (Problem(2, 300, 2, 40), "bfloat16", (*QUERY_SIDE, "dynamic_key")),
    (Problem(2, 77, 2, 128, 16), "bfloat16", (*QUERY_SIDE, "dynamic_key")),
    (Problem(2, 128, 2), "float32", (*QUERY_SIDE, "dynamic_key")),
    (Problem(2, 30, 2, 24, 64), "float32", (*QUERY_SIDE, "dynamic_key")),
    (Problem(2, 300, 2, 128, 70), "float32", (*QUERY_SIDE, "dynamic_key")),
    (Problem(2, 512, 2), "bfloat16", ()),
]


def memory(lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)) -> list[dict[str, Any]]:
    """Bytes that forward and backward hold beyond their arguments and results, as the compiler plans them."""
    import jax

    from convattn_jax.kernels.composite import composite_attention

    records = []
    for length in lengths:
        problem = Problem(1, length)
        x = draw(problem)
        step = with_gradients(lambda *rows, **taps: composite_attention(*rows, **taps, scale=0.125))
        args = (x["q"], x["k"], x["v"]), {name: x[name] for name in QUERY_SIDE}, x["g"]
        compiled = step.lower(*args).compile()
        jax.block_until_ready(compiled(*args))
        records.append({"length": length, "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes})
        print(json.dumps(records[-1]), flush=True)
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
    points = [(r["length"], r["temporary_bytes"] / 2**20) for r in spaces]
    right.plot(*zip(*points, strict=True), marker="o")
    right.set(xscale="log", yscale="log", xlabel="tokens in a row (batch 1)", ylabel="MiB beyond arguments and results")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(f"{b}x{t}" for b, t in SHAPES), help="batch x length, by commas")
    parser.add_argument("--contenders", default="", help="only those whose names hold one of these words, by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--candidates", action="store_true", help="time tile sizes instead")
    parser.add_argument("--check", action="store_true", help="errors and repeatability instead")
    parser.add_argument("--memory", action="store_true", help="memory against length instead")
    parser.add_argument("--rate", type=float, default=0.0, help="dropout, with --candidates")
    parser.add_argument("--dtype", default="bfloat16", help="with --candidates")
    parser.add_argument("--head-size", type=int, default=64, help="with --candidates")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the results")
    options = parser.parse_args()
    shapes = [(int(batch), int(length)) for batch, length in (s.split("x") for s in options.shapes.split(","))]
    if options.check:
        for case in CHECKS:
            print(json.dumps(check(*case)), flush=True)
    elif options.candidates:
        candidates(shapes, options.rounds, options.rate, options.dtype, options.head_size)
    elif options.memory:
        memory()
    else:
        words = options.contenders.split(",")
        records = compare(shapes, [name for name in CONTENDERS if any(word in name for word in words)], options.rounds)
        table = markdown(records)
        print(table)
        if options.out:
            spaces = memory()
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "attention.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records + spaces))
            (options.out / "attention.md").write_text(table)
            picture(records, spaces, options.out / "attention.png")


if __name__ == "__main__":
    main()
