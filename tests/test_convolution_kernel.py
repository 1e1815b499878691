"""The depthwise-convolution kernel, its own body run by an interpreter, against the plain form; and who calls it."""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_gpu import absent_gpu

from benchmarks.convolution import WALKS, shifted
from convattn_jax.config import UserError
from convattn_jax.kernels.convolve import convolution_implementation, convolve_by
from convattn_jax.kernels.depthwise import BACKWARD, FORWARD, depthwise_convolutions, supports
from convattn_jax.kernels.depthwise_program import Walk
from convattn_jax.model.convolution import Kernel, convolve
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.operations import PLAIN
from convattn_jax.model.self_attention import SelfAttention

WHOLE = Walk(channels=8, warps=4, chunk=4, run=16, texts=2)  # a text in one run
ONE = Walk(channels=8, warps=4, chunk=1, run=32, texts=1)  # a window of 33 rows, one more than a word has bits
RUNS = Walk(channels=8, warps=4, chunk=2, run=4, texts=1)  # several, each computing its neighbours' gradient


def draw(T, D=8, radii=(1, 2), activations=(True, False), seed=0, dtype="float32"):
    """x, kernels, gradients of x elsewhere and of the outputs; packed segments, and padding that sees its text."""
    random = np.random.default_rng(seed)

    def normal(*shape, dtype="float32"):
        return jnp.asarray(random.standard_normal(shape), dtype)

    kernels = [Kernel(normal(2 * n + 1, D), normal(D), a) for n, a in zip(radii, activations, strict=True)]
    queries, keys = np.ones((2, T), np.int32), np.ones((2, T), np.int32)
    queries[0, T // 3 :] = 2
    queries[0, T // 3 + 1 :] = 3
    queries[0, T - 2 :] = 0
    keys[0] = queries[0]
    keys[1, T - T // 3 :] = 0
    segments = jnp.asarray(queries), jnp.asarray(keys)
    inputs = Inputs(segments[0], segments[0], segments[0], *segments)
    return normal(2, T, D, dtype=dtype), kernels, tuple(normal(2, T, D, dtype=dtype) for _ in (0, *radii)), inputs


def kernel(x, kernels, inputs, forward=RUNS, backward=RUNS):
    options = {"forward": forward, "backward": backward, "interpret": True}
    return depthwise_convolutions(x, kernels, inputs.query_segments, inputs.key_segments, **options)


def with_gradients(form, x, kernels, g, inputs, times=1):
    """x and outputs, and gradients of x and of every (taps, bias); a list of the results of several runs."""
    activations = [kernel.activation for kernel in kernels]

    @jax.jit
    def both(x, learned, g, inputs):
        def outputs(x, learned):
            x, outs = form(x, [Kernel(*p, a) for p, a in zip(learned, activations, strict=True)], inputs)
            return x, *outs

        out, pull = jax.vjp(outputs, x, learned)
        return out, pull(g)

    results = [both(x, [kernel[:2] for kernel in kernels], g, inputs) for _ in range(times)]
    return results if times > 1 else results[0]


def assert_close(ours, exact, tolerance):
    """Norm-wise, array by array."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(exact), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("T", "D", "radii", "activations", "forward", "backward"),
    [
        pytest.param(11, 12, (1, 2), (True, False), RUNS, RUNS, id="runs"),  # no block divides length or channels
        pytest.param(8, 8, (4, 1), (True, False), WHOLE, WHOLE, id="whole texts"),  # chunks' rows all exist or don't
        pytest.param(3, 8, (5,), (True,), RUNS, RUNS, id="beyond the length"),
        pytest.param(20, 8, (16,), (True,), ONE, ONE, id="more rows than bits", marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_form(T, D, radii, activations, forward, backward):
    case = draw(T, D, radii, activations)
    ours = with_gradients(functools.partial(kernel, forward=forward, backward=backward), *case)
    assert_close(ours, with_gradients(convolve, *case), 1e-6)


def test_the_benchmark_times_a_hand_written_gradient_that_is_right():
    case = draw(9)
    assert_close(with_gradients(shifted, *case), with_gradients(convolve, *case), 1e-6)


@pytest.mark.parametrize(("T", "radii", "walk"), [(11, (1, 2), RUNS), (8, (4, 0), WHOLE)], ids=["odd", "whole"])
def test_in_bfloat16_only_what_is_stored_is_rounded(T, radii, walk):
    x, kernels, g, inputs = draw(T, 12, radii, dtype="bfloat16")
    ours = with_gradients(functools.partial(kernel, forward=walk, backward=walk), x, kernels, g, inputs)
    exact = with_gradients(convolve, x.astype("float32"), kernels, tuple(y.astype("float32") for y in g), inputs)
    types = [[leaf.dtype.name for leaf in jax.tree.leaves(part)] for part in (ours[0], ours[1])]
    assert types == [["bfloat16"] * 3, ["bfloat16"] + ["float32"] * 4]
    assert_close(ours[0], exact[0], 2e-3)  # one rounding; the plain form: 4e-3
    assert_close(ours[1], exact[1], 3e-3)  # gelu's derivative and the result; the plain form: 7e-3
    assert_close(ours[1][1][1], exact[1][1][1], 1e-5)  # taps without gelu: none


def test_a_second_run_gives_the_same_bits():
    jax.tree.map(np.testing.assert_array_equal, *with_gradients(kernel, *draw(11, 12), times=2))


def test_vmap_of_the_gradient_is_the_gradient_of_each():
    cases = [draw(5, seed=seed, radii=(1,), activations=(True,)) for seed in range(2)]
    inputs = cases[0][3]

    def gradient(x, learned, g):
        def loss(x, learned):
            return (kernel(x, [Kernel(*learned, True)], inputs)[1][0] * g).sum()

        return jax.grad(loss, argnums=(0, 1))(x, learned)

    arrays = [(x, tuple(kernels[0][:2]), g[0]) for x, kernels, g, _ in cases]
    together = jax.jit(jax.vmap(gradient))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays))
    for number, one in enumerate(arrays):
        alone = jax.jit(gradient)(*one)
        assert_close(jax.tree.map(lambda leaf, number=number: leaf[number], together), alone, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers_for_gpus_as_it_walks_by_default(dtype):
    channels, radius = (256, 8) if dtype == "bfloat16" else (200, 2)
    x, f32 = jax.ShapeDtypeStruct((2, 100, channels), dtype), "float32"
    pair = jax.ShapeDtypeStruct((2 * radius + 1, channels), f32), jax.ShapeDtypeStruct((channels,), f32)

    def loss(x, learned):
        kernels = [Kernel(*pair, True) for pair in learned]
        ones = jnp.ones(x.shape[:2], jnp.int32)
        return sum(out.sum() for out in depthwise_convolutions(x, kernels, ones, ones)[1])

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    with absent_gpu():
        text = step.trace(x, [pair]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @__gpu$xla.gpu.triton") + text.count('custom_call @"__gpu$xla.gpu.triton"') == 2


def test_the_usual_walks_and_those_the_benchmark_tries_fit_together():
    for walk in (FORWARD, BACKWARD, *(Walk(*sizes) for walks in WALKS.values() for sizes in walks)):
        assert walk.run % walk.chunk == 0
        assert walk.channels & (walk.channels - 1) == 0


# --- who calls it ----------------------------------------------------------------------------------------------------

SEPARABLE = {"kind": "separable", "radius": 2}


def changes(**fields):
    return {f"{field}__{key}": value for field, kind in fields.items() for key, value in kind.items()}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"query_key": SEPARABLE, "value": SEPARABLE}, 3),
        ({"query_key": {**SEPARABLE, "half": True}}, 2),
        ({"value": {**SEPARABLE, "activation": False}}, 1),
        ({"value": {"kind": "grouped", "radius": 1}}, 0),
    ],
    ids=["q, k and v", "half of q and k", "v only", "none"],
)
def test_the_convolutions_of_all_projections_are_one_call(fields, count):
    seen = []

    def recording(x, kernels, inputs):
        seen.append([(kernel.taps.shape, kernel.activation) for kernel in kernels])
        return convolve(x, kernels, inputs)

    config = harness.tiny_config(**changes(**fields))
    inputs, x = harness.inputs_of((3, 2), length=6), jnp.ones((1, 6, config.width), config.dtype)
    layer = SelfAttention(config, PLAIN._replace(convolve=recording))
    jax.eval_shape(layer.init, jax.random.key(0), x, inputs, None, {})
    activation = fields.get("value", {}).get("activation", True)
    assert seen == ([[((5, config.width), activation)] * count] if count else [])


@pytest.mark.parametrize(
    ("radii", "dtype", "word"),
    [((17,), "bfloat16", "17 positions"), ((12, 12, 12), "bfloat16", "75 taps"), ((8,), "float16", "float16")],
)
def test_convolutions_it_cannot_take_come_with_the_reason(radii, dtype, word):
    assert word in supports(radii, dtype)


def test_the_choice_falls_back_and_a_forced_kernel_that_cannot_run_is_an_error():
    assert convolution_implementation("gpu", (8, 8, 8), "bfloat16") == "pallas_gpu"
    assert convolution_implementation("gpu", (8, 8, 8), "bfloat16", "plain") == "plain"
    assert convolution_implementation("gpu", (40,), "bfloat16") == "plain"
    assert convolution_implementation("cpu", (8,), "bfloat16") == "plain"
    assert convolution_implementation("tpu", (8,), "bfloat16", "pallas_tpu") == "plain"
    with pytest.raises(UserError, match=r"model.kernel=pallas_gpu .*40 positions.*auto"):
        convolution_implementation("gpu", (40,), "bfloat16", "pallas_gpu")
    x, kernels, _, inputs = draw(5)
    with pytest.raises(UserError, match="not on cpu"):
        convolve_by("pallas_gpu")(x, kernels, inputs)
    jax.tree.map(np.testing.assert_array_equal, convolve_by("auto")(x, kernels, inputs), convolve(x, kernels, inputs))
