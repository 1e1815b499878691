"""What all benchmarks of attention share: problems, random inputs, contenders that take turns."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple


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
QUERY_SIDE = ("fixed", "dynamic_query")


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


def reference(problem: Problem) -> Callable[..., Any]:
    """The model's plain form with the taps as arguments."""
    import jax.numpy as jnp

    from convattn_jax.model.attention import attend as plain
    from convattn_jax.model.score import Score

    scale = problem.head_size**-0.5
    ones = jnp.ones((problem.batch, problem.length), jnp.int32)

    def attend(q, k, v, fixed=None, dynamic_query=None, dynamic_key=None):
        dynamic_query, dynamic_key = (None if x is None else x[None] * scale for x in (dynamic_query, dynamic_key))
        return plain((q, k, v), Score(scale, fixed, dynamic_query, dynamic_key), ones, ones, 0.0, None)

    return attend


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
