"""The fused attention kernel, its own body run by an interpreter, against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from absent_gpu import absent_gpu
from kernel_cases import (
    SEED,
    TAPS,
    B,
    H,
    assert_close,
    draw,
    padded_and_packed,
    plain,
    with_gradients,
)

from convattn_jax.config import UserError
from convattn_jax.kernels import Call, implementation, supports
from convattn_jax.kernels.blocks import Blocks, Tile, choose
from convattn_jax.kernels.composite import composite_attention
from convattn_jax.model.dropout import keep_pairs

SMALL = Blocks(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))  # several tiles for 40 tokens
BY_KEYS = Blocks(Tile(16, 64, 4, 1), Tile(16, 64, 4, 1), None)  # all gradients in one walk over the queries
UNEVEN = Blocks(Tile(32, 16, 4, 1), Tile(16, 64, 4, 1), Tile(16, 32, 4, 1))  # whole rows of keys, two passes


def kernel(*rows, segments=None, rate=0.0, blocks=None, scale=0.4, seed=SEED, packed=False, **kwargs):
    options = {"dropout_rate": rate, "dropout_seed": jnp.asarray(seed) if rate else None, "scale": scale}
    segments = {"query_segments": segments, "key_segments": segments}
    rows = rows[0] if packed else rows
    return composite_attention(rows, **kwargs, **segments, **options, blocks=blocks, interpret=True)


def check_against_float64(*args, blocks=None, **options):
    return kernel_cases.check_against_float64(kernel, {"blocks": blocks}, *args, **options)


# The options go round the terms so that each subset is met with several tiles, whole rows, masks and dropout.
CASES = [
    ((), True, SMALL, 0.0),
    (("fixed",), False, SMALL, 0.2),
    (("dynamic_query",), False, UNEVEN, 0.0),
    (("dynamic_key",), True, UNEVEN, 0.2),
    (("fixed", "dynamic_query"), True, BY_KEYS, 0.0),
    (TAPS, True, SMALL, 0.2),
    (TAPS, True, None, 0.2),
    (TAPS, True, BY_KEYS, 0.2),
]
MORE_CASES = [
    (("fixed",), True, None, 0.0),
    (("dynamic_query",), True, SMALL, 0.2),
    (("fixed", "dynamic_query"), True, SMALL, 0.2),
    (("fixed", "dynamic_key"), False, None, 0.2),
    (("fixed",), False, BY_KEYS, 0.0),
    (("dynamic_key",), False, BY_KEYS, 0.2),
    (("dynamic_query",), True, BY_KEYS, 0.0),
]


@pytest.mark.parametrize(
    ("taps", "content", "blocks", "rate"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_CASES)],
)
def test_forward_and_gradients_match_the_definition(taps, content, blocks, rate):
    check_against_float64(40, taps, content=content, blocks=blocks, rate=rate, segments=padded_and_packed(40))


@pytest.mark.parametrize("T", [1, 17])
def test_lengths_that_no_tile_divides_read_no_slot_that_nobody_wrote(T):
    """The interpreter fills outputs with NaN, so a slot beyond the ends of a row that were read would show."""
    check_against_float64(T, blocks=SMALL if T > 1 else None)


def test_radius_beyond_the_length():
    check_against_float64(18, ("dynamic_query", "dynamic_key"), W=99, blocks=SMALL)


def test_radius_zero_is_a_bias_that_depends_on_the_key_only():
    check_against_float64(20, ("fixed", "dynamic_key"), W=1, blocks=SMALL)


@pytest.mark.parametrize(("T", "W"), [(100, 17), (70, 61)])
def test_one_walk_over_the_queries_folds_its_tile_where_the_band_is_narrow(T, W):
    """With 128 keys and a radius of 8 half of a tile is looked at, with one of 30 all of it."""
    blocks = Blocks(Tile(64, 128, 4, 1), Tile(16, 128, 4, 1), None)
    check_against_float64(T, ("fixed", "dynamic_query"), W=W, blocks=blocks, segments=padded_and_packed(T))


@pytest.mark.slow
def test_a_radius_that_takes_several_chunks_of_slots():
    check_against_float64(90, ("fixed", "dynamic_query"), W=81, blocks=UNEVEN)


def test_head_sizes_that_are_no_power_of_two():
    check_against_float64(20, ("dynamic_query", "dynamic_key"), K=24, blocks=SMALL)


def test_bfloat16_is_as_good_as_the_plain_form_in_bfloat16():
    ours = check_against_float64(40, tolerance=1e-2, dtype="bfloat16", blocks=SMALL, segments=padded_and_packed(40))
    rows, learned, g = draw(40, dtype="bfloat16")
    assert ours[0].dtype == rows[0].dtype
    assert all(gradient.dtype == np.float32 for gradient in ours[1][1].values())
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (rows, learned, g))
        exact = with_gradients(plain, *wide, segments=padded_and_packed(40))
    assert_close(ours[1][1], exact[1][1], 2e-3)  # taps, bands and delta are not rounded to bfloat16


SHARED = {"content": True, "rate": 0.2, "blocks": SMALL}  # the program of one of CASES


def test_queries_that_see_nothing_give_zero_and_have_no_gradient():
    T = 40
    segments = padded_and_packed(T)
    out, ((dq, dk, dv), _) = with_gradients(kernel, *draw(T), segments=segments, **SHARED)
    blind = np.asarray(segments) == 0
    assert blind.any()
    for array in (out, dq, dk, dv):
        assert (array[blind] == 0).all()
    assert (np.abs(out[~blind]).max(axis=(1, 2)) > 0).all()


def test_segments_of_one_side_only_are_refused():
    rows, learned, _ = draw(8, taps=())
    for side in ("query_segments", "key_segments"):
        with pytest.raises(ValueError, match="query_segments and key_segments come together"):
            composite_attention(rows, **learned, **{side: jnp.ones((B, 8), jnp.int32)}, interpret=True)


def test_a_row_of_padding_only():
    result = with_gradients(kernel, *draw(40), segments=jnp.zeros((B, 40), jnp.int32), **SHARED)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("blocks", [SMALL, None])
def test_dropout_draws_the_bits_of_the_plain_form(blocks):
    T, rate = 24, 0.3
    q = jnp.zeros((B, T, H, T))  # equal weights; v is the identity, so the output shows the mask
    v = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, H, T))
    out = jax.jit(functools.partial(kernel, rate=rate, blocks=blocks))(q, q, v)
    kept = keep_pairs(jnp.asarray(SEED), (B, H, T, T), rate)
    np.testing.assert_array_equal(out.transpose(0, 2, 1, 3) > 0, kept)
    np.testing.assert_allclose(np.unique(out), [0, 1 / T / (1 - rate)], rtol=1e-6)


def test_a_shard_draws_the_bits_of_its_rows_and_heads():
    rows, learned, _ = draw(20)
    whole = kernel(*rows, **learned, rate=0.3, blocks=SMALL)
    shard = [x[1:, :, 1:] for x in rows]
    learned = learned | {"fixed": learned["fixed"][1:], "dynamic_key": learned["dynamic_key"][1:]}
    part = kernel(*shard, **learned, rate=0.3, blocks=SMALL, rows=jnp.array([1]), heads=jnp.array([1]))
    np.testing.assert_array_equal(part, whole[1:, :, 1:])


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_vmap_of_the_gradient_is_the_gradient_of_each(packed):
    T = 20
    cases = [(*draw(T, taps=("dynamic_query",), seed=seed), jnp.asarray([seed, 7], jnp.uint32)) for seed in range(2)]
    if packed:
        cases = [((jnp.stack(rows, axis=3),), *rest) for rows, *rest in cases]

    def gradient(rows, learned, g, seed):
        def loss(rows, learned):
            options = {"rate": 0.2, "seed": seed, "blocks": SMALL, "segments": padded_and_packed(T), "packed": packed}
            return (kernel(*rows, **learned, **options) * g).sum()

        return jax.grad(loss, argnums=(0, 1))(rows, learned)

    together = jax.jit(jax.vmap(gradient))(*jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for number, case in enumerate(cases):
        alone = jax.jit(gradient)(*case)
        assert_close(jax.tree.map(lambda x, n=number: x[n], together), jax.tree.map(np.asarray, alone), 1e-6)


@pytest.mark.parametrize("blocks", [pytest.param(SMALL, marks=pytest.mark.slow), None])
def test_rows_side_by_side_in_one_array_have_one_gradient_of_the_same_bits(blocks):
    rows, learned, g = draw(40)
    options = SHARED | {"blocks": blocks, "segments": padded_and_packed(40)}
    out, (gradients, of_taps) = with_gradients(kernel, rows, learned, g, **options)
    packed = with_gradients(kernel, (jnp.stack(rows, axis=3),), learned, g, packed=True, **options)
    jax.tree.map(np.testing.assert_array_equal, packed, (out, ((np.stack(gradients, axis=3),), of_taps)))


def test_it_runs_inside_shard_map():
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    case = draw(40)

    def attend(*rows, segments, **learned):
        def part(q, k, v, segments, learned):
            return kernel(q, k, v, segments=segments, **learned, **SHARED)

        specs = (P("data"),) * 4
        return jax.shard_map(part, mesh=mesh, in_specs=(*specs, P()), out_specs=P("data"), check_vma=False)(
            *rows, segments, learned
        )

    segments = padded_and_packed(40)
    direct = with_gradients(kernel, *case, segments=segments, **SHARED)
    assert_close(with_gradients(attend, *case, segments=segments), direct, 1e-6)


def test_a_second_run_gives_the_same_bits():
    run = functools.partial(with_gradients, kernel, *draw(40), segments=padded_and_packed(40), **SHARED)
    jax.tree.map(np.testing.assert_array_equal, run(), run())


@pytest.mark.parametrize("length", [5, 128, 300])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_lowers_for_gpus_with_the_tiles_of_the_table(length, dtype):
    head_size = 64 if dtype == "bfloat16" else 40
    rows = (jax.ShapeDtypeStruct((1, length, H, head_size), dtype),) * 3
    taps = {name: jax.ShapeDtypeStruct((H, 17), "float32") for name in ("fixed",)}
    for name in ("dynamic_query", "dynamic_key"):
        taps[name] = jax.ShapeDtypeStruct((head_size, 17), "float32")
    segments = jnp.ones((1, length), jnp.int32)

    def loss(rows, taps):
        options = {"query_segments": segments, "key_segments": segments, "dropout_rate": 0.1}
        return composite_attention(rows, **taps, **options, dropout_seed=jnp.asarray(SEED)).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    with absent_gpu():
        text = step.trace(rows, taps).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @__gpu$xla.gpu.triton") + text.count('custom_call @"__gpu$xla.gpu.triton"') >= 2


def test_memory_grows_with_the_length_not_with_its_square():
    def largest(length):
        rows = (jax.ShapeDtypeStruct((1, length, 1, 16), "bfloat16"),) * 3
        taps = {"fixed": jax.ShapeDtypeStruct((1, 17), "float32")}
        step = jax.make_jaxpr(jax.grad(lambda rows, taps: composite_attention(rows, **taps).sum(), argnums=(0, 1)))
        return max(v.aval.size for eqn in step(rows, taps).eqns for v in eqn.outvars)

    assert largest(8192) <= 16 * largest(512)


def test_the_table_has_tiles_for_every_shape_it_supports():
    for length in (1, 16, 33, 64, 65, 128, 129, 5000):
        for head_size in range(8, 129, 8):
            for dtype in ("bfloat16", "float32"):
                for taps in (False, True):
                    assert supports(length, length, head_size, dtype) is None
                    blocks = choose(length, head_size, dtype, taps)
                    if blocks.dkv is None:
                        assert blocks.dq.keys >= length


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((8, 9, 64, "bfloat16"), "differ"),
        ((8, 8, 12, "bfloat16"), "12"),
        ((8, 8, 136, "bfloat16"), "136"),
        ((8, 8, 64, "float16"), "float16"),
    ],
)
def test_shapes_it_cannot_take_come_with_the_reason(shape, word):
    assert word in supports(*shape)


def test_the_choice_falls_back_once_and_a_forced_kernel_that_cannot_run_is_an_error(caplog):
    good = Call("gpu", 128, 128, 64, "bfloat16", dense=False, radius=8)
    assert implementation(good) == "pallas_gpu"
    assert implementation(good, "plain") == "plain"
    odd = good._replace(head_size=12)
    assert [implementation(odd), implementation(odd)] == ["plain", "plain"]
    assert [record.message for record in caplog.records if "head size 12" in record.message] != []
    assert len([record for record in caplog.records if "head size 12" in record.message]) == 1
    with pytest.raises(UserError, match=r"model.kernel=pallas_gpu .*head size 12.*auto"):
        implementation(odd, "pallas_gpu")
    with pytest.raises(UserError, match="choose from"):
        implementation(good, "cuda")
    assert implementation(good._replace(platform="cpu")) == "plain"
    assert implementation(good._replace(dense=True)) == "plain"
    assert implementation(good._replace(radius=65)) == "plain"
