"""The attention kernels for TPUs: their own bodies run by an interpreter, against the definition in float64, and their
lowering for TPUs, which needs none. What a TPU makes of them is not tested here.
"""

import functools
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from kernel_cases import (
    SEED,
    TAPS,
    B,
    H,
    assert_close,
    draw,
    padded_and_packed,
    with_gradients,
)

from convattn_jax.config import UserError
from convattn_jax.kernels import Call, attend, choice, implementation
from convattn_jax.kernels.tpu import attention, composite_attention, operands
from convattn_jax.model.dropout import keep_pairs
from convattn_jax.model.score import Score

EDGE = 16  # several tiles for 40 tokens; no TPU has such
INTERPRET = jax.default_backend() != "tpu"


def kernel(*qkv, segments=None, rate=0.0, edge=EDGE, scale=0.4, seed=SEED, **kwargs):
    options = {"dropout_rate": rate, "dropout_seed": jnp.asarray(seed) if rate else None, "scale": scale}
    segments = {"query_segments": segments, "key_segments": segments}
    return composite_attention(qkv, **kwargs, **segments, **options, edge=edge, interpret=INTERPRET)


def check_against_float64(*args, edge=EDGE, **options):
    return kernel_cases.check_against_float64(kernel, {"edge": edge}, *args, **options)


# --- values and gradients --------------------------------------------------------------------------------------------

# The options go round the terms so that each term is met alone, with others, without content, masked and dropped.
CASES = [
    ((), True, 0.0),
    (("fixed",), False, 0.2),
    (("dynamic_query",), True, 0.0),
    (("dynamic_key",), False, 0.2),
    (TAPS, True, 0.2),
]
SUBSETS = [taps for size in range(4) for taps in itertools.combinations(TAPS, size)]


@pytest.mark.parametrize(("taps", "content", "rate"), CASES)
def test_forward_and_gradients_match_the_definition(taps, content, rate):
    check_against_float64(40, taps, content=content, rate=rate, segments=padded_and_packed(40))


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize("content", [True, False])
@pytest.mark.parametrize("taps", SUBSETS)
def test_every_subset_of_terms_matches_the_definition(taps, content, rate):
    if taps or content:
        check_against_float64(40, taps, content=content, rate=rate, segments=padded_and_packed(40))


def test_one_tile_does_everything_in_one_backward_pass():
    """Without segments, though the tile is longer than the row; the band fills the strip."""
    check_against_float64(13, W=17, rate=0.2)


def test_a_tile_wider_than_the_strips_of_its_bands(monkeypatch):
    monkeypatch.setattr(operands, "LANES", 8)
    check_against_float64(20, W=9, segments=padded_and_packed(20))


@pytest.mark.slow
@pytest.mark.parametrize(("T", "W", "edge"), [(1, 7, None), (200, 129, None), (300, 17, 128), (300, 129, None)])
def test_agreement_on_tiles_as_large_as_those_of_a_tpu(T, W, edge):
    check_against_float64(T, W=W, edge=edge, rate=0.2, slack=1e-5, segments=padded_and_packed(T) if T > 1 else None)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"T": 1}, {"T": 17}, {"T": 20, "W": 1}, {"T": 6, "W": 99}, {"T": 20, "K": 24}])
def test_odd_shapes(options):
    check_against_float64(options["T"], slack=1e-5, **{name: options[name] for name in options if name != "T"})


def test_bfloat16_is_as_good_as_the_plain_form_in_bfloat16():
    case = {"dtype": "bfloat16", "segments": padded_and_packed(20)}
    ours = check_against_float64(20, tolerance=1e-2, **case)
    rows, learned, g = draw(20, dtype="bfloat16")
    assert ours[0].dtype == rows[0].dtype
    assert all(gradient.dtype == np.float32 for gradient in ours[1][1].values())
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (rows, learned, g))
        exact = with_gradients(kernel_cases.plain, *wide, segments=case["segments"])
    assert_close(ours[1][1], exact[1][1], 2e-3)  # slots, their gradient and delta are not rounded to bfloat16


def test_queries_that_see_nothing_give_zero_and_have_no_gradient():
    rows, learned, g = draw(40)
    padded = padded_and_packed(40)
    for segments in (padded, jnp.zeros_like(padded)):
        out, ((dq, dk, dv), taps) = with_gradients(kernel, rows, learned, g, segments=segments, rate=0.2)
        blind = np.asarray(segments) == 0
        assert blind.any()
        for array in (out, dq, dk, dv):
            assert (array[blind] == 0).all()
        assert (np.abs(out[~blind]).max(axis=(1, 2), initial=0) > 0).all()
        if blind.all():
            assert all((gradient == 0).all() for gradient in taps.values())


def test_segments_of_one_side_only_are_refused():
    qkv, learned, _ = draw(8, taps=())
    for side in ("query_segments", "key_segments"):
        with pytest.raises(ValueError, match="query_segments and key_segments come together"):
            composite_attention(qkv, **learned, **{side: jnp.ones((B, 8), jnp.int32)}, interpret=INTERPRET)


def test_each_slot_gets_one_element_of_the_scores_gradient_and_those_beyond_the_row_none():
    """dL/dscore, a slot and its partner at a time; nothing flows to slots whose partner isn't in [0, T)."""
    T, radius = 20, 3
    rows, learned, g = draw(T, W=2 * radius + 1, taps=("fixed", "dynamic_key"))
    g = jnp.pad(g.swapaxes(1, 2), ((0, 0), (0, 0), (0, 2 * EDGE - T), (0, 0)))

    @jax.jit
    def run(rows, learned, g):
        spec, arrays = attention.prepare(rows, **learned, edge=EDGE, interpret=True)
        return arrays, jax.vjp(functools.partial(attention._attention, spec), arrays)[1](g)[0]

    arrays, ours = jax.tree.map(np.asarray, run(rows, learned, g))

    i = np.arange(T)
    distance = i - i[:, None]
    query_index, key_index = np.clip(distance, -radius, radius) + radius, np.clip(-distance, -radius, radius) + radius
    q, k, v, g = (x[:, :, :T].astype(np.float64) for x in (arrays.q, arrays.k, arrays.v, np.asarray(g)))
    by_query = np.concatenate([arrays.query_slots[:, :, : 2 * radius], np.zeros((B, H, 1, 2 * EDGE))], axis=2)
    scores = q @ k.swapaxes(2, 3) + by_query[:, :, query_index, i[:, None]] + arrays.key_slots[:, :, key_index, i]
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    d_weights = g @ v.swapaxes(2, 3)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))

    for gradient, index, axis, last in (
        (ours.query_slots, query_index, 3, 2 * radius),
        (ours.key_slots, key_index, 2, 2 * radius + 1),
    ):
        expected = np.zeros(gradient.shape)
        for slot in range(last):
            expected[:, :, slot, :T] = np.where(index == slot, d_scores, 0).sum(axis)
        np.testing.assert_allclose(gradient, expected, atol=1e-5)
        for slot in range(1, 2 * radius):
            partner = np.arange(2 * EDGE) + slot - radius
            outside = (partner < 0) | (partner >= T) | (np.arange(2 * EDGE) >= T)
            assert (gradient[:, :, slot, outside] == 0).all()
            assert (gradient[:, :, slot, ~outside] != 0).all()


# --- dropout, vmap, repeats ------------------------------------------------------------------------------------------


def test_dropout_draws_the_bits_of_the_plain_form():
    T, rate = 24, 0.3
    q = jnp.zeros((B, T, H, T))  # equal weights; v is the identity, so the output shows the mask
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, H, T))

    @jax.jit
    def run(q, v):
        out, pull = jax.vjp(lambda v: kernel(q, q, v, rate=rate), v)
        return out, *pull(v)

    out, dv = run(q, v)
    kept = keep_pairs(jnp.asarray(SEED), (B, H, T, T), rate)
    np.testing.assert_array_equal(out.transpose(0, 2, 1, 3) > 0, kept)
    np.testing.assert_allclose(np.unique(out), [0, 1 / T / (1 - rate)], rtol=1e-6)
    # dv_j = sum_i P_ij dO_i shows the mask of the pass by keys
    np.testing.assert_array_equal(dv.transpose(0, 2, 3, 1) > 0, kept)


def test_a_shard_draws_the_bits_of_its_rows_and_heads():
    rows, learned, _ = draw(20)
    attend = jax.jit(functools.partial(kernel, rate=0.3))
    whole = attend(*rows, **learned)
    shard = [x[1:, :, 1:] for x in rows]
    learned = learned | {"fixed": learned["fixed"][1:], "dynamic_key": learned["dynamic_key"][1:]}
    part = attend(*shard, **learned, rows=jnp.array([1]), heads=jnp.array([1]))
    np.testing.assert_allclose(part, whole[1:, :, 1:], atol=1e-5)


def gradient_of(T, **options):
    def gradient(rows, learned, g, seed):
        def loss(rows, learned):
            return (kernel(*rows, **learned, rate=0.2, seed=seed, segments=padded_and_packed(T), **options) * g).sum()

        return jax.grad(loss, argnums=(0, 1))(rows, learned)

    return gradient


def test_vmap_of_the_gradient_is_the_gradient_of_each_and_each_repeats_bit_for_bit():
    T = 20
    cases = [(*draw(T, taps=("fixed",), seed=seed), jnp.asarray([seed, 7], jnp.uint32)) for seed in range(2)]
    gradient = jax.jit(gradient_of(T))
    together = jax.jit(jax.vmap(gradient))(*jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for number, case in enumerate(cases):
        alone = gradient(*case)
        assert_close(jax.tree.map(lambda x, n=number: x[n], together), jax.tree.map(np.asarray, alone), 1e-6)
        jax.tree.map(np.testing.assert_array_equal, alone, gradient(*case))


# --- lowering for TPUs -----------------------------------------------------------------------------------------------


def shapes(T, K, dtype, W=17):
    rows = (jax.ShapeDtypeStruct((1, T, H, K), dtype),) * 3
    sizes = {"fixed": (H, W), "dynamic_query": (K, W), "dynamic_key": (H, K, W)}
    return rows, {name: jax.ShapeDtypeStruct(size, "float32") for name, size in sizes.items()}


def loss(rows, taps):
    segments = jnp.ones(rows[0].shape[:2], jnp.int32)
    options = {"query_segments": segments, "key_segments": segments, "dropout_rate": 0.1}
    return composite_attention(rows, **taps, **options, dropout_seed=jnp.asarray(SEED)).astype(jnp.float32).sum()


def step(*case, **sharding):
    """The lowered gradient, for TPUs."""
    return jax.jit(jax.grad(loss, argnums=(0, 1)), **sharding).trace(*shapes(*case)).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize(("T", "kernels"), [(128, 2), (512, 2), (2048, 3)])
def test_it_lowers_for_tpus(T, K, dtype, kernels):
    assert step(T, K, dtype).as_text().count("@tpu_custom_call") == kernels


@pytest.mark.slow
@pytest.mark.parametrize("T", [5, 300, 640, 5000])
@pytest.mark.parametrize("K", [8, 40, 120])
@pytest.mark.parametrize("W", [1, 129])
def test_odd_shapes_lower_for_tpus(T, K, W):
    assert "@tpu_custom_call" in step(T, K, "bfloat16", W).as_text()


def test_vmap_of_the_gradient_lowers_for_tpus():
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), shapes(128, 64, "bfloat16"))
    lowered = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)))).trace(*many).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chips", "T", "K", "dtype", "W"),
    [
        ("v5e:2x2", 128, 64, "bfloat16", 17),
        ("v5e:2x2", 640, 64, "float32", 17),
        ("v5e:2x2", 2048, 128, "bfloat16", 129),
        ("v6e:2x2", 128, 64, "bfloat16", 17),
    ],
)
def test_the_compiler_for_tpus_takes_it(chips, T, K, dtype, W, monkeypatch):
    """Mosaic's own compiler, which needs no TPU: memory, layouts and what the instruction set offers."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc(chips, platform="tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    step(T, K, dtype, W, in_shardings=sharding, out_shardings=sharding).compile()


def test_memory_grows_with_the_length_not_with_its_square():
    def largest(length):
        traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes(length, 16, "bfloat16"))
        return max(v.aval.size for eqn in traced.eqns for v in eqn.outvars)

    assert largest(8192) <= 16 * largest(512)


# --- choice ----------------------------------------------------------------------------------------------------------


def test_the_choice_takes_it_on_tpus_and_says_why_an_old_one_cannot(caplog):
    good = Call("tpu", 128, 128, 64, "bfloat16", dense=False, radius=64)
    assert implementation(good) == "pallas_tpu"
    assert not caplog.records  # that the kernel for GPUs doesn't run here is no news
    assert implementation(good._replace(radius=65)) == "plain"
    assert implementation(good._replace(platform="tpu v4")) == "plain"
    assert "from v5 on, not on tpu v4" in caplog.text
    with pytest.raises(UserError, match=r"model\.kernel=pallas_tpu .* not on gpu"):
        implementation(good._replace(platform="gpu"), "pallas_tpu")


@pytest.mark.parametrize(("kind", "platform"), [("TPU v5 lite", "tpu"), ("TPU v4", "tpu v4"), ("TPU v6 lite", "tpu")])
def test_an_old_tpu_is_known_by_its_version(kind, platform, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"device_kind": kind})])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choice.default_platform() == platform


def test_attention_on_a_tpu_is_this_kernel_s(monkeypatch):
    monkeypatch.setattr(attend, "default_platform", lambda: "tpu")
    rows, taps = shapes(128, 64, "bfloat16")

    def call(rows, fixed, segments):
        score = Score(content=0.125, fixed=fixed)
        return attend.attend_by("auto")(rows, score, segments, segments, 0.0, None)

    traced = jax.jit(call).trace(rows, taps["fixed"], jax.ShapeDtypeStruct((1, 128), "int32"))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 1


def test_a_band_wider_than_a_register_is_refused():
    rows, learned, _ = draw(40, W=19)
    with pytest.raises(ValueError, match="taps reach 9 positions, more than 8"):
        kernel(*rows, **learned)


def test_it_loads_no_code_for_gpus():
    code = "import sys, convattn_jax.kernels.operations, convattn_jax.kernels.tpu; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "convattn_jax.kernels.tpu.backward" in loaded
    for name in ("convattn_jax.kernels.composite", "convattn_jax.kernels.tile", "jax.experimental.pallas.triton"):
        assert name not in loaded
