"""The projections to queries, keys and values, forward and backward: linear, and separable in several forms.

    python -m benchmarks.convolution --out=results          one GPU, about a minute
    python -m benchmarks.convolution --candidates           walks for convattn_jax/kernels/depthwise.py
    python -m benchmarks.convolution --check                errors against float64, and repeatability

Contenders take turns, several rounds; a figure is the median over rounds with the lowest and highest beside it. The
difference of a separable row and the linear one, times the layers, is what the convolutions add to a training step.
"""

import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.arguments import chosen, documented, need_gpu, positive, sizes
from benchmarks.attention_problem import Contender, measure
from convattn_jax.kernels.depthwise import BACKWARD, FORWARD, depthwise_convolutions
from convattn_jax.kernels.depthwise_program import Walk
from convattn_jax.model import convolution
from convattn_jax.model.convolution import Convolve, Kernel
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import linear


class Problem(NamedTuple):
    batch: int
    length: int
    width: int
    radius: int = 8
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.width}"


SHAPES = ((256, 128, 768), (1024, 128, 256))
NAMES = ("query", "key", "value")


@functools.cache
def draw(problem: Problem, seed: int = 0) -> tuple[dict[str, Any], Inputs]:
    """x, the gradients of its use elsewhere and of the projections, their parameters; full rows."""
    b, t, d, n, dtype = problem
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0, dtype: str = "float32") -> Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) * scale, dtype)

    taps = [(normal(2 * n + 1, d, scale=0.2), normal(d, scale=0.2)) for _ in NAMES]
    matrices = [(normal(d, d, scale=d**-0.5), normal(d)) for _ in NAMES]
    arrays = {"x": normal(b, t, d, dtype=dtype), "g": [normal(b, t, d, dtype=dtype) for _ in ("x", *NAMES)]}
    ones = jnp.ones((b, t), jnp.int32)
    return arrays | {"taps": taps, "matrices": matrices}, Inputs(ones, ones, ones, ones, ones)


# --- forms of the convolution ----------------------------------------------------------------------------------------


def shifted(x: Array, kernels: Any, inputs: Inputs) -> tuple[Array, tuple[Array, ...]]:
    """Shifted multiply-adds with a hand-written gradient: float32 sums, one expression for the gradient of x."""
    activations = tuple(kernel.activation for kernel in kernels)
    return x, _shifted(activations, x, tuple(kernel[:2] for kernel in kernels), inputs)


def _offsets(taps: Array) -> list[tuple[int, int]]:
    return [(tap, tap - taps.shape[0] // 2) for tap in range(taps.shape[0])]


def _there(x: Array, offset: int, inputs: Inputs) -> Array:
    wide = convolution.neighbour(x, offset).astype(jnp.float32)
    return wide * convolution.reachable(inputs, offset)[..., None].astype(jnp.float32)


def _sums(x: Array, taps: Array, bias: Array, inputs: Inputs) -> Array:
    return sum((_there(x, offset, inputs) * taps[tap] for tap, offset in _offsets(taps)), bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted(activations: tuple[bool, ...], x: Array, parameters: Any, inputs: Inputs) -> tuple[Array, ...]:
    return _shifted_forward(activations, x, parameters, inputs)[0]


def _activate(activation: bool, total: Array, dtype: Any) -> Array:
    return (jax.nn.gelu(total, approximate=False) if activation else total).astype(dtype)


def _shifted_forward(activations: tuple[bool, ...], x: Array, parameters: Any, inputs: Inputs):
    sums = [_sums(x, pair[0], pair[1], inputs).astype(x.dtype) for pair in parameters]
    outs = tuple(
        _activate(activation, total.astype(jnp.float32), x.dtype)
        for activation, total in zip(activations, sums, strict=True)
    )
    return outs, (x, parameters, inputs, sums)


def _shifted_backward(activations: tuple[bool, ...], saved: Any, d_outs: tuple[Array, ...]):
    x, parameters, inputs, sums = saved
    d_x, gradients = jnp.zeros(x.shape, jnp.float32), []
    for activation, (taps, _), total, d_out in zip(activations, parameters, sums, d_outs, strict=True):
        pull = jax.vjp(functools.partial(_activate, activation, dtype=x.dtype), total.astype(jnp.float32))[1]
        d_sum = pull(d_out)[0].astype(x.dtype)
        d_taps = []
        for tap, offset in _offsets(taps):
            mask = convolution.reachable(inputs, offset)[..., None].astype(x.dtype)
            d_x += convolution.neighbour(d_sum * mask, -offset).astype(jnp.float32) * taps[tap]
            d_taps.append(jnp.sum(_there(x, offset, inputs) * d_sum.astype(jnp.float32), axis=(0, 1)))
        gradients.append((jnp.stack(d_taps), jnp.sum(d_sum.astype(jnp.float32), axis=(0, 1))))
    return d_x.astype(x.dtype), tuple(gradients), None


_shifted.defvjp(_shifted_forward, _shifted_backward)


def by_kernel(x: Array, kernels: Any, inputs: Inputs, **options: Any) -> tuple[Array, tuple[Array, ...]]:
    """The fused kernel."""
    return depthwise_convolutions(x, kernels, inputs.query_segments, inputs.key_segments, **options)


def no_convolution(x: Array, kernels: Any, inputs: Inputs) -> tuple[Array, tuple[Array, ...]]:
    """Linear projections."""
    return x, (x,) * len(kernels)


FORMS: dict[str, Convolve] = {
    "linear": no_convolution,
    "separable: plain form": convolution.convolve,
    "separable: shifted, own gradient": shifted,
    "separable: kernel": by_kernel,
}


# --- timing ----------------------------------------------------------------------------------------------------------


def with_gradients(convolve: Convolve, inputs: Inputs, pointwise: bool = True) -> Callable[..., Any]:
    """x for its use elsewhere, the projections, and the gradients of x and all parameters."""

    def project(x: Array, taps: Any, matrices: Any) -> list[Array]:
        x, outs = convolve(x, [Kernel(*pair, activation=True) for pair in taps], inputs)
        if not pointwise:
            return [x, *outs]
        return [x, *(linear(out, *matrix) for out, matrix in zip(outs, matrices, strict=True))]

    @jax.jit
    def both(x: Array, taps: Any, matrices: Any, g: Any):
        outs, pull = jax.vjp(project, x, taps, matrices)
        return outs, pull(g)

    return both


def contender(convolve: Convolve, problem: Problem, pointwise: bool = True) -> Contender:
    arrays, inputs = draw(problem)
    step = with_gradients(convolve, inputs, pointwise)
    return Contender(lambda: step(arrays["x"], arrays["taps"], arrays["matrices"], arrays["g"]), jax.block_until_ready)


def compare(
    problems: list[Problem], built: dict[str, Callable[[Problem], Contender]], rounds: int, compiling: int
) -> list[dict]:
    """A record per shape and contender; what a machine cannot run is left out. `compiling`: how many at a time."""
    records = []
    for problem in problems:

        def start(name: str, problem: Problem = problem) -> Contender | None:
            try:
                contender = built[name](problem)
                contender.wait(contender.run())
                return contender
            except Exception as error:
                print(f"{problem} {name}: left out, {str(error).splitlines()[0][:200]}", file=sys.stderr)
                return None

        draw(problem)
        with ThreadPoolExecutor(compiling) as pool:
            started = dict(zip(built, pool.map(start, built), strict=True))
        contenders = {name: contender for name, contender in started.items() if contender}
        for name, times in measure(contenders, rounds).items():
            record = {"shape": str(problem), "contender": name, "ms": statistics.median(times)}
            records.append(record | {"low": min(times), "high": max(times)})
            print(json.dumps(records[-1]), flush=True)
    return records


# (channels, warps, chunk, run, texts)
WALKS = {
    "forward": [(128, 4, 8, 64, 1), (128, 4, 8, 128, 1), (128, 4, 16, 64, 1), (128, 4, 4, 64, 1), (128, 4, 4, 128, 1)],
    "backward": [
        (128, 4, 8, 128, 2),
        (128, 4, 8, 128, 1),
        (128, 4, 4, 128, 2),
        (128, 4, 4, 128, 1),
        (64, 2, 4, 128, 2),
    ],
}


def candidates() -> dict[str, Callable[[Problem], Contender]]:
    """The convolutions alone, every walk of one pass with the usual walk of the other."""
    usual = {"forward": FORWARD, "backward": BACKWARD}
    built = {}
    for name, walks in WALKS.items():
        for given in walks:
            walk = Walk(*given)
            form = functools.partial(by_kernel, **{**usual, name: walk})
            built[f"{name} {given}"] = functools.partial(contender, form, pointwise=False)
    return built


# --- errors and repeatability ----------------------------------------------------------------------------------------

CHECKS = [Problem(4, 128, 256), Problem(3, 301, 200, 3), Problem(4, 128, 256, dtype="float32")]


def check(problem: Problem) -> dict[str, Any]:
    """Norm-wise errors of kernel and plain form against float64 on packed and padded rows, and whether bits repeat."""
    arrays, inputs = draw(problem)
    place = jnp.arange(problem.length)
    segments = jnp.broadcast_to(1 + (place > 37) + (place > 40), (problem.batch, problem.length)).astype(jnp.int32)
    segments = segments.at[0, -20:].set(0)
    inputs = inputs._replace(query_segments=segments, key_segments=segments)
    args = arrays["x"], arrays["taps"], arrays["matrices"], arrays["g"]
    ours, plain = (with_gradients(form, inputs, pointwise=False) for form in (by_kernel, convolution.convolve))
    first, second = ours(*args), ours(*args)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a.astype("float32")), "float64"), args)
        here = inputs._replace(query_segments=np.asarray(segments), key_segments=np.asarray(segments))
        exact = with_gradients(convolution.convolve, jax.tree.map(np.asarray, here), pointwise=False)(*wide)

    def errors(result: Any) -> dict[str, float]:
        worst: dict[str, float] = {}
        (outs, (d_x, d_taps, _)), (exact_outs, (exact_x, exact_taps, _)) = result, exact
        for name, a, b in (("out", outs, exact_outs), ("x", d_x, exact_x), ("taps", d_taps, exact_taps)):
            for mine, true in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                difference = np.asarray(mine.astype("float32"), np.float64) - np.asarray(true)
                worst[name] = max(worst.get(name, 0.0), float(np.linalg.norm(difference) / np.linalg.norm(true)))
        return {name: float(f"{error:.2g}") for name, error in worst.items()}

    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    ours_and_theirs = {"kernel": errors(first), "plain": errors(plain(*args))}
    return {"problem": str(problem), "dtype": problem.dtype, **ours_and_theirs, "repeats": same}


# --- report ----------------------------------------------------------------------------------------------------------


def markdown(records: list[dict]) -> str:
    """A row per contender, a column per shape."""
    shapes = list(dict.fromkeys(r["shape"] for r in records))
    cells = {(r["contender"], r["shape"]): f"{r['ms']:.3f} ({r['low']:.3f} to {r['high']:.3f})" for r in records}
    lines = ["| forward + backward, ms | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    for name in dict.fromkeys(r["contender"] for r in records):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, shape), "") for shape in shapes) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints JSON lines, then a Markdown table."""
    parser = documented(__doc__)
    text = ",".join("x".join(map(str, shape)) for shape in SHAPES)
    parser.add_argument(
        "--shapes", type=sizes("batch", "length", "width"), default=text, help="batch x length x width, by commas"
    )
    parser.add_argument("--contenders", default="", help="only those whose names hold one of these words, by commas")
    parser.add_argument("--radius", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--candidates", action="store_true", help="time the kernel's walks instead")
    parser.add_argument("--check", action="store_true", help="errors and repeatability instead")
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the results")
    options = parser.parse_args()
    if options.check:
        need_gpu(parser, "--check")
        for problem in CHECKS:
            print(json.dumps(check(problem)), flush=True)
        return
    if options.candidates:
        need_gpu(parser, "--candidates")
    built = candidates() if options.candidates else {n: functools.partial(contender, f) for n, f in FORMS.items()}
    built = {name: built[name] for name in chosen(parser, options.contenders, built)}
    problems = [Problem(b, t, d, options.radius) for b, t, d in options.shapes]
    # walks need no tuning by XLA, which times matrix products while it compiles
    records = compare(problems, built, options.rounds, compiling=8 if options.candidates else 1)
    print(markdown(records))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "convolution.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (options.out / "convolution.md").write_text(markdown(records))


if __name__ == "__main__":
    main()
