"""The encoder: one function however it is compiled, of any length, blind to padding and to other documents."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from convattn_jax.config import UserError
from convattn_jax.model import encoder as encoder_module
from convattn_jax.model.attention import separate
from convattn_jax.model.encoder import stack_layers, unstack_layers
from convattn_jax.model.inputs import from_mask, from_packed
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.model.operations import PLAIN

VOCABULARY = 20
PAD, CLS, SEP = 0, 1, 2
ALL = ("content", "fixed", "dynamic_query", "dynamic_key")
IDS = jnp.asarray(np.random.default_rng(0).integers(3, VOCABULARY, (2, 12)))
KEY = jax.random.key(7)


def model(**changes):
    return MaskedLM(tiny.model_config(**{"scores": ALL, "taps_init": "wide", **changes}), VOCABULARY)


@functools.cache
def params(**changes):
    """Parameters far from their small initial values, so that every part matters."""
    fresh = jax.jit(model(**changes).initial_params)(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@functools.cache
def compiled(outputs, **changes):
    m = model(**changes)

    @jax.jit
    def encode(variables, inputs, dropout_key):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return m.apply({"params": variables}, inputs, outputs, method="encode", rngs=rngs)

    return encode


def encode(inputs, outputs=(), dropout_key=None, **changes):
    changes = {"layers": 1, **changes}
    return compiled(outputs, **changes)(params(**changes), inputs, dropout_key)


def loss_and_gradient(loop, remat, dropout_key=KEY):
    """Loss, gradient (as of unrolled layers) and named outputs."""
    variables = params()
    if loop == "scan":
        variables = {**variables, "encoder": stack_layers(variables["encoder"])}
    m = model(loop=loop, remat=remat)

    @jax.jit
    def run(variables):
        def loss(variables):
            encoded = m.apply(
                {"params": variables},
                from_mask(IDS),
                ("hidden", "attention", "dynamic_query", "dynamic_key"),
                method="encode",
                rngs=None if dropout_key is None else {"dropout": dropout_key},
            )
            return jnp.square(encoded.last - 1).mean(), encoded.outputs

        return jax.value_and_grad(loss, has_aux=True)(variables)

    (value, outputs), gradient = run(variables)
    if loop == "scan":
        gradient = {**gradient, "encoder": unstack_layers(gradient["encoder"])}
    return value, outputs, gradient


@functools.cache
def plain():
    return loss_and_gradient("unroll", False)


@pytest.mark.parametrize(("loop", "remat"), [("scan", False), ("unroll", True), ("scan", True)])
def test_scanned_and_rematerialised_layers_equal_plain_ones_with_dropout(loop, remat):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain(), loss_and_gradient(loop, remat)
    )


def test_dropout_is_on_with_a_key_and_a_function_of_it():
    without = encode(from_mask(IDS)).last

    def dropped(seed):
        return encode(from_mask(IDS), dropout_key=jax.random.key(seed)).last

    assert np.array_equal(dropped(0), dropped(0))
    assert not np.allclose(dropped(0), dropped(1))
    assert not np.allclose(dropped(0), without)


def test_initial_parameters_are_the_same_numbers_scanned_and_unrolled():
    scanned, unrolled = (jax.jit(model(loop=loop).initial_params)(KEY) for loop in ("scan", "unroll"))
    jax.tree.map(np.testing.assert_array_equal, {**scanned, "encoder": unstack_layers(scanned["encoder"])}, unrolled)


def test_named_outputs_have_the_documented_shapes():
    outputs = plain()[1]
    B, T, L, H, D, W = *IDS.shape, 2, 2, 16, 5
    assert {name: value.shape for name, value in outputs.items()} == {
        "hidden": (L + 1, B, T, D),
        "attention": (L, B, H, T, T),
        "dynamic_query": (L, B, H, T, W),
        "dynamic_key": (L, B, H, T, W),
    }
    np.testing.assert_allclose(outputs["attention"].sum(-1), 1, rtol=1e-5)


def test_asking_for_outputs_changes_nothing_and_absent_terms_give_none():
    encoded = encode(from_mask(IDS), ("attention", "hidden"))
    np.testing.assert_allclose(encoded.last, encode(from_mask(IDS)).last, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(encoded.outputs["hidden"][-1], encoded.last)
    assert set(encode(from_mask(IDS), ("dynamic_query", "attention"), scores=("content",)).outputs) == {"attention"}


def test_an_unknown_output_is_an_error():
    with pytest.raises(UserError, match="'atention' is unknown"):
        encode(from_mask(IDS), ("atention",))


@pytest.mark.parametrize("length", [1, 67])
def test_any_length_without_position_embeddings(length):
    assert encode(from_mask(jnp.ones((1, length), jnp.int32))).last.shape == (1, length, 16)


def test_position_embeddings_end_at_the_longest_length():
    ids = jnp.ones((1, 33), jnp.int32)
    assert encode(from_mask(ids[:, :32]), positions="absolute").last.shape == (1, 32, 16)
    with pytest.raises(UserError, match=r"model\.max_length=32: 33 tokens have no absolute position"):
        encode(from_mask(ids), positions="absolute")


def test_padding_and_what_stands_in_it_change_nothing():
    alone = encode(from_mask(IDS)).last
    for filler in (0, 5):
        padded = jnp.pad(IDS, ((0, 0), (0, 4)), constant_values=filler)
        mask = jnp.arange(16)[None] < jnp.full((2, 1), 12)
        found = encode(from_mask(padded, mask)).last
        np.testing.assert_allclose(found[:, :12], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["absolute", "none"])
def test_packed_documents_do_not_see_each_other(positions):
    def packed(*documents):
        ids = [token for document in documents for token in (CLS, *document, SEP)]
        ids += [PAD] * (11 - len(ids))
        inputs = from_packed(jnp.asarray([ids]), pad=PAD, cls=CLS, sep=SEP)
        return encode(inputs, positions=positions).last[0]

    first, second = [3, 4, 5], [6, 7, 8, 9]
    both = packed(first, second)
    np.testing.assert_allclose(both[:5], packed(first)[:5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[5:], packed(second)[:6], rtol=1e-4, atol=1e-5)  # wherever it stands in the row


def test_order_matters_to_positions_and_convolutions_only():
    reverse = IDS[:, ::-1]
    bag, bert, composite = (("content",), "none"), (("content",), "absolute"), (ALL, "none")
    for (scores, positions), blind in ((bag, True), (bert, False), (composite, False)):
        changes = {"scores": scores, "positions": positions}
        there, back = encode(from_mask(IDS), **changes).last, encode(from_mask(reverse), **changes).last[:, ::-1]
        assert np.allclose(there, back, rtol=1e-4, atol=1e-5) == blind


def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients():
    rows = jnp.asarray([[CLS, 5, SEP, PAD, PAD], [PAD] * 5])
    inputs = from_packed(rows, pad=PAD, cls=CLS, sep=SEP)
    attention = encode(inputs, ("attention",)).outputs["attention"]
    sums = np.zeros((1, 2, 2, 5))
    sums[:, 0, :, :3] = 1
    np.testing.assert_allclose(attention.sum(-1), sums, rtol=1e-5)
    assert not attention[..., 3:].any()
    run, variables = compiled((), layers=1), params(layers=1)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(run(p, inputs, None).last).sum()))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_half_precision_is_close_to_single_and_keeps_float32_parameters():
    fresh = model(layers=1).initial_params(KEY)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(fresh)} == {"float32"}

    def run(dtype):
        m = compiled((), layers=1, dtype=dtype)
        return jax.jit(jax.value_and_grad(lambda p: m(p, from_mask(IDS), None).last[0, 0, 0]))(fresh)

    (value, gradient), (half, half_gradient) = run("float32"), run("bfloat16")
    assert half.dtype == jnp.bfloat16
    assert float(half) == pytest.approx(float(value), abs=0.05)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(half_gradient), strict=True):
        assert b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 0.06 * np.linalg.norm(a) + 1e-2


def test_the_head_predicts_at_the_positions_and_never_a_surplus_row():
    positions = jnp.asarray([[3, 0], [11, 11]])
    predict = jax.jit(model(layers=1).apply)
    everywhere = predict({"params": params(layers=1)}, from_mask(IDS))
    there = predict({"params": params(layers=1)}, from_mask(IDS), positions)
    assert everywhere.shape == (2, 12, 24)  # 20 ids in rows by the 8
    np.testing.assert_allclose(there, jnp.take_along_axis(everywhere, positions[..., None], 1), rtol=1e-4, atol=1e-4)
    probabilities = jax.nn.softmax(everywhere)
    assert not probabilities[..., VOCABULARY:].any()
    np.testing.assert_allclose(probabilities[..., :VOCABULARY].sum(-1), 1, rtol=1e-5)


def test_no_two_places_share_a_dropout_seed(monkeypatch):
    seen = []

    def recorded(x, rate, seed):
        if seed is not None:
            seen.append(tuple(np.asarray(seed).tolist()))
        return x

    def recording_attend(qkv, score, query_segments, key_segments, rate, seed):
        return recorded(separate(qkv)[2], rate, seed)

    def recording_add_norm(x, out, scale, bias, rate, seed):
        return x + recorded(out, rate, seed)

    monkeypatch.setattr(encoder_module, "dropout", recorded)
    operations = PLAIN._replace(attend=recording_attend, add_norm=recording_add_norm)
    recording = MaskedLM(tiny.model_config(layers=2), VOCABULARY, operations)
    variables = {"params": recording.initial_params(jax.random.key(0))}
    with jax.disable_jit():  # seeds are read, layer by layer
        recording.apply(variables, from_mask(IDS), rngs={"dropout": KEY})
    assert len(seen) == 1 + 3 * 2  # the embeddings, and of each layer attention, its output and the feed-forward's
    assert len(set(seen)) == len(seen)
