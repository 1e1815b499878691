"""Times every pass of the fused kernel with every tile that compiles, for the table in kernels/blocks.py."""

import statistics
import sys

from benchmarks.attention_problem import Contender, Problem, draw, measure

TILES: dict[str, list[tuple[int, int, int, int]]] = {
    "forward": [
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 128, 4, 1),
        (128, 64, 4, 2),
        (64, 128, 4, 2),
        (64, 128, 8, 1),
        (32, 128, 4, 1),
    ],
    "dq": [
        (64, 64, 4, 3),
        (64, 128, 4, 1),
        (64, 128, 4, 2),
        (64, 128, 8, 1),
        (64, 64, 8, 2),
        (32, 128, 4, 1),
        (32, 64, 4, 2),
    ],
    "dkv": [(32, 128, 4, 3), (64, 64, 4, 3), (16, 128, 4, 3), (16, 128, 8, 3), (32, 128, 8, 1), (64, 128, 8, 1)],
    "one pass": [(128, 128, 8, 1), (16, 128, 4, 3), (16, 128, 4, 2), (32, 128, 4, 2), (16, 128, 8, 3)],
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
        (x["q"], x["k"], x["v"]),
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
        "one pass": (lambda *args: backward.pass_by_keys(spec, *args), (operands, saved, x["g"], None))
        if spec.by_keys
        else by_queries,
        "dkv": (lambda *args: backward.pass_by_keys(spec, *args), (operands, saved, x["g"], lse)),
    }
    function, args = runs[name]
    compiled = jax.jit(function).lower(*args).compile()
    return lambda: compiled(*args)
