"""A run as plain functions: sentences to vectors, [MASK] to words, text to attention maps."""

import contextlib
import dataclasses
import inspect
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from convattn_jax import attention_maps, checkpoint, fill_mask, inference, load_encoder, main, pretrain
from convattn_jax.config import UserError
from convattn_jax.model.inputs import from_mask

TEXT = "the old cat sat on the mat."


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs with checkpoints of their first parameters: with attention, and with a convolution in its place."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")

    def save_at_once(run):
        with contextlib.closing(checkpoint.Checkpoints(run.folder.checkpoints, keep=1)) as checkpoints:
            checkpoints.save(run.program.init(0))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain._Run, "complete", save_at_once)
        for name, changes in (
            ("run", {"model__layers": 1}),
            ("dynamic", {"model__layers": 1, "model__mixer": "dynamic", "model__scores": ()}),
        ):
            tiny.write_config(home, **changes)
            main.main(["main", f"--config={home / 'config.py'}", f"--workdir={home / name}"])
    return home


@pytest.fixture(scope="module")
def run(home):
    return home / "run"


@pytest.mark.parametrize(
    "call",
    [
        lambda run: inspect.unwrap(fill_mask)(run, None),  # beneath the checks of types that only tests have
        lambda run: inspect.unwrap(load_encoder(run))(["a cat", None]),
        lambda run: inspect.unwrap(attention_maps)(run, ["a cat"]),
    ],
)
def test_what_is_no_text_is_named(run, call):
    with pytest.raises(UserError, match=r"^(text|sentences)=.* must be "):
        call(run)


def test_a_folder_of_another_kind_or_without_its_tokenizer_is_named(run, tmp_path):
    (tmp_path / "config.json").write_text('{"task": "finetune", "init_from": "runs/first"}')
    with pytest.raises(UserError, match=r"is a fine-tuning folder, made from runs/first: name that run instead$"):
        fill_mask(tmp_path, "a [MASK]")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"copy/tokenizer.model is lost: restore it from a copy"):
        load_encoder(copy)


def test_attention_maps_are_those_of_the_model_without_padding(run):
    tokens, weights = attention_maps(run, TEXT)
    loaded = inference.load_run(run)
    ids = [loaded.tokenizer.cls, *loaded.tokenizer.encode([TEXT])[0].tolist(), loaded.tokenizer.sep]
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")
    assert len(tokens) == len(ids)
    assert "".join(tokens[1:-1]).replace("_", "") == TEXT.replace(" ", "")
    assert weights.shape == (1, 2, len(ids), len(ids))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    inputs = from_mask(jnp.asarray([ids]))
    apply = jax.jit(loaded.model.apply, static_argnums=2, static_argnames="method")
    encoded = apply({"params": loaded.params}, inputs, ("attention",), method="encode")
    np.testing.assert_allclose(weights, encoded.outputs["attention"][:, 0], rtol=1e-4, atol=1e-6)


def test_a_model_without_attention_has_no_layers_of_it(home):
    tokens, weights = attention_maps(home / "dynamic", TEXT)
    assert weights.shape == (0, 0, len(tokens), len(tokens))


def test_a_text_longer_than_the_position_tables_is_cut(run, monkeypatch):
    loaded = inference.load_run(run)
    config = dataclasses.replace(loaded.model.config, scores=("content", "tupe_absolute"))
    assert (config.positions, config.longest, loaded.model.config.longest) == ("none", 32, None)
    model = loaded.model.clone(config=config)
    bounded = loaded._replace(model=model, params=model.initial_params(jax.random.key(0)))
    monkeypatch.setattr(inference, "load_run", lambda path: bounded)
    long = " ".join([TEXT] * 20)
    assert len(attention_maps(run, long).tokens) == 32
    vectors = load_encoder(run)([long, long + " rain."])
    np.testing.assert_array_equal(*vectors)
    assert len(fill_mask(run, f"[MASK] {long}")) == 5


def test_a_mask_is_filled_by_words_in_the_order_of_their_probability(run):
    guesses = fill_mask(run, "the old [MASK] sat on the mat.", top=1000)
    probabilities = [guess.probability for guess in guesses]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-4)
    special = inference.load_run(run).tokenizer.special
    assert sum(p > 0 for p in probabilities) == (~special).sum()  # neither [SEP] nor rows that fill up the embedding
    assert fill_mask(run, "the old [MASK] sat on the mat.", top=2) == guesses[:2]


def test_several_masks_are_filled_each_for_itself(run):
    first, second = fill_mask(run, "the [MASK] cat sat on [MASK].")
    assert len(first) == len(second) == 5
    assert first != second


def test_a_text_without_a_mask_is_refused(run):
    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        fill_mask(run, TEXT)


def test_a_sentence_has_one_vector_whatever_stands_beside_it(run):
    encode = load_encoder(run, batch_size=2)
    texts = [TEXT, "rain.", "a bird sang and a dog ran under the tree by the pond with the cat and the fish."]
    vectors = encode(texts)
    assert vectors.shape == (3, 16)
    assert encode([]).shape == (0, 16)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(encode(text), vector, rtol=1e-4, atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-2)


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no run folder"):
        load_encoder(tmp_path)
