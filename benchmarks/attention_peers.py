"""PyTorch's attention as contenders of `benchmarks.attention`: SDPA's kernels, and FlexAttention's composite."""

from collections.abc import Callable
from typing import Any

from benchmarks.attention_problem import QUERY_SIDE, RATE, Contender, Problem

# pyright: reportMissingImports=false

SDPA = {"flash": "FLASH_ATTENTION", "cuDNN": "CUDNN_ATTENTION"}
# FlexAttention's, the first that compiles: by itself it may ask for more shared memory than there is, for the taps
FLEX: tuple[dict[str, int], ...] = ({}, {"fwd_num_stages": 2}, {"fwd_num_stages": 1}, {"num_stages": 1})


def contender(attend: Callable[..., Any], problem: Problem, taps: tuple[str, ...] = ()) -> Contender:
    """Forward and backward of `attend(q, k, v, *taps)` on rows (B, H, T, K) that lie in memory as (B, T, H, K)."""
    import torch

    b, t, h, k, n = problem

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_()

    rows = [normal(b, t, h, k) for _ in range(3)]
    sizes = {"fixed": (h, 2 * n + 1), "dynamic_query": (k, 2 * n + 1)}
    learned = [normal(*sizes[name], dtype=torch.float32) for name in taps]
    g = torch.randn_like(rows[0]).transpose(1, 2)

    def run():
        return torch.autograd.grad(attend(*(x.transpose(1, 2) for x in rows), *learned), rows + learned, g)

    return Contender(run, lambda _: torch.cuda.synchronize())


def sdpa(problem: Problem, kernel: str = "", rate: float = 0.0) -> Contender:
    """Plain attention by one of PyTorch's kernels, or by its own choice."""
    import contextlib

    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q, k, v):
        forced = sdpa_kernel(getattr(SDPBackend, SDPA[kernel])) if kernel else contextlib.nullcontext()
        with forced:
            return scaled_dot_product_attention(q, k, v, dropout_p=rate)

    return contender(attend, problem)


def flex(problem: Problem, by_tap: bool) -> Contender:
    """FlexAttention's composite: the taps of every query as a table, looked up by score_mod.

    The table has the taps of a query side by side, or (`by_tap`) one tap of all queries side by side.
    """
    for options in FLEX:
        try:
            found = flex_with(problem, by_tap, options)
            found.wait(found.run())
            return found
        except RuntimeError:
            if options == FLEX[-1]:
                raise
    raise AssertionError


def flex_with(problem: Problem, by_tap: bool, options: dict[str, int]) -> Contender:
    """The same with given options of the kernel."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    radius = problem.radius

    def attend(q, k, v, fixed, dynamic_query):
        taps = (q.float() @ dynamic_query) * problem.head_size**-0.5 + fixed[None, :, None]
        if by_tap:
            taps = taps.transpose(2, 3).contiguous()

        def score_mod(score, b, h, i, j):
            tap = torch.clamp(j - i, -radius, radius) + radius
            return score + (taps[b, h, tap, i] if by_tap else taps[b, h, i, tap])

        return flex_attention(q, k, v, score_mod=score_mod, kernel_options=dict(options))

    return contender(torch.compile(attend, dynamic=False), problem, QUERY_SIDE)


def sdpa_by(kernel: str = "", rate: float = 0.0) -> Callable[[Problem], Contender]:
    """`sdpa` with its options given."""
    return lambda problem: sdpa(problem, kernel, rate)


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "plain: SDPA": sdpa_by(),
    "plain: SDPA, flash": sdpa_by("flash"),
    "plain: SDPA, cuDNN": sdpa_by("cuDNN"),
    f"plain: SDPA, dropout {RATE}": sdpa_by(rate=RATE),
    "composite: FlexAttention, table by query": lambda problem: flex(problem, by_tap=False),
    "composite: FlexAttention, table by tap": lambda problem: flex(problem, by_tap=True),
}
