"""What the tests of the fused kernels share: cases, the definition in float64, agreement with gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convattn_jax.model.dropout import keep_pairs

B, H = 2, 2
TAPS = ("fixed", "dynamic_query", "dynamic_key")
SEED = np.array([3, 99], np.uint32)


def draw(T, K=8, W=7, taps=TAPS, seed=0, dtype="float32"):
    """(q, k, v), taps, gradient of the output."""
    random = np.random.default_rng(seed)
    rows = [jnp.asarray(random.standard_normal((B, T, H, K)), dtype) for _ in range(4)]
    sizes = {"fixed": (H, W), "dynamic_query": (K, W), "dynamic_key": (H, K, W)}
    learned = {name: jnp.asarray(random.standard_normal(sizes[name]), jnp.float32) for name in taps}
    return tuple(rows[:3]), learned, rows[3]


def padded_and_packed(T):
    """Two packed sentences in the first row; padding in the second, whose first tokens form a segment of their own."""
    segments = np.ones((B, T), np.int32)
    segments[0, T // 3 :] = 2
    segments[1, : T // 4] = 5
    segments[1, T - T // 3 :] = 0
    return jnp.asarray(segments)


def plain(q, k, v, fixed=None, dynamic_query=None, dynamic_key=None, content=True, segments=None, rate=0.0, scale=0.4):
    """The definition, with arrays of T x T."""
    T = q.shape[1]
    distance = np.arange(T)[None] - np.arange(T)[:, None]
    scores = jnp.zeros((*q.shape[:1], H, T, T), q.dtype)

    def at(taps, distance):
        radius = taps.shape[-1] // 2
        index = np.broadcast_to(np.clip(distance, -radius, radius) + radius, scores.shape)
        return jnp.take_along_axis(jnp.broadcast_to(taps, (*scores.shape[:3], taps.shape[-1])), index, -1)

    def by_token(x, taps):
        return jnp.einsum("bthk,hkw->bhtw", x, jnp.broadcast_to(taps, (H, *taps.shape[-2:])))

    if content:
        scores += scale * jnp.einsum("bthk,bshk->bhts", q, k)
    if fixed is not None:
        scores += at(fixed[None, :, None], distance)
    if dynamic_query is not None:
        scores += scale * at(by_token(q, dynamic_query), distance)
    if dynamic_key is not None:
        scores += scale * at(by_token(k, dynamic_key), distance).swapaxes(2, 3)  # rows are keys until here
    seen = np.ones((1, 1, T, T), bool)
    if segments is not None:
        seen = ((segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None])[:, None]
    scores = jnp.where(seen, scores, -1e30)
    weights = jnp.where(seen, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    if rate:
        weights = jnp.where(keep_pairs(jnp.asarray(SEED), weights.shape, rate), weights / (1 - rate), 0)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


@functools.cache
def _program(function, options):
    """Compiled once for every test that asks for the same."""

    @jax.jit
    def run(rows, taps, g, segments):
        out, pull = jax.vjp(lambda rows, taps: function(*rows, **taps, segments=segments, **dict(options)), rows, taps)
        return out, pull(g)

    return run


def with_gradients(function, rows, taps, g, segments=None, **options):
    """Output, gradients of q, k, v and of the taps, as NumPy arrays."""
    run = _program(function, tuple(sorted(options.items())))
    return jax.tree.map(np.asarray, run(rows, taps, g, segments))


def assert_close(ours, exact, tolerance, slack=1e-6):
    """Norm-wise, tensor by tensor; `slack` for gradients that are exactly 0 and a sum of roundings in float32."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(exact), strict=True):
        difference = np.linalg.norm(np.asarray(a, np.float64) - b)
        assert difference <= tolerance * np.linalg.norm(b) + slack, jax.tree_util.keystr(path)


def check_against_float64(kernel, own, T, taps=TAPS, tolerance=1e-5, dtype="float32", K=8, W=7, slack=1e-6, **options):
    """Output and gradients of `kernel`, which agree with those of the definition; `own`: options it alone has."""
    rows, learned, g = draw(T, K, W, taps, dtype=dtype)
    ours = with_gradients(kernel, rows, learned, g, **own, **options)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (rows, learned, g))
        exact = with_gradients(plain, *wide, **options)
    assert_close(ours, exact, tolerance, slack)
    return ours
