"""Errors of the fused kernel against float64, whether it repeats bit for bit, and what memory it takes."""

import json
import math
import sys
from typing import Any

from benchmarks.attention_problem import QUERY_SIDE, Problem, draw, reference, with_gradients


def check(problem: Problem, dtype: str, taps: tuple[str, ...]) -> dict[str, Any]:
    """Norm-wise errors of kernel and plain form against float64, and whether a second run gave the same bits."""
    import jax
    import numpy as np

    from convattn_jax.kernels.composite import composite_attention

    x = draw(problem, dtype)
    args = (x["q"], x["k"], x["v"]), {name: x[name] for name in taps}, x["g"]
    scale = problem.head_size**-0.5
    step = with_gradients(lambda *rows, **taps: composite_attention(rows, **taps, scale=scale))
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
    """Bytes that forward and backward hold beyond their arguments and results, as the compiler plans them.

    The kernel is run at every length as well; the plain form is planned only, up to 4,096 tokens.
    """
    import jax

    from convattn_jax.kernels.composite import composite_attention

    def fused(*rows, **taps):
        return composite_attention(rows, **taps, scale=64**-0.5)

    attends = {"composite: kernel": lambda problem: fused, "composite: plain form": reference}
    records = []
    for name, attend in attends.items():
        begun = None
        for length in [n for n in lengths if attend is not reference or n <= 4096]:
            problem = Problem(1, length)
            x = draw(problem)
            args = (x["q"], x["k"], x["v"]), {tap: x[tap] for tap in QUERY_SIDE}, x["g"]
            try:
                compiled = with_gradients(attend(problem)).lower(*args).compile()
            except Exception as error:
                print(f"{problem} {name}: left out, {str(error).splitlines()[0][:200]}", file=sys.stderr)
                break
            if attend is not reference:
                jax.block_until_ready(compiled(*args))
            held = compiled.memory_analysis().temp_size_in_bytes
            begun = begun or (length, held)
            slope = math.log(held / begun[1]) / math.log(length / begun[0]) if length > begun[0] else None
            records.append({"memory": name, "length": length, "temporary_bytes": held, "slope": slope})
            print(json.dumps(records[-1]), flush=True)
    return records
