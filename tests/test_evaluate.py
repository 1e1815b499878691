"""Evaluation of a trained run at other lengths, and the attention maps of a sentence."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tiny

from convattn_jax import evaluate
from convattn_jax.config import from_config, to_plain
from convattn_jax.data.config import DataConfig
from convattn_jax.data.rows import prepare
from convattn_jax.inference import Pretrained, attention_maps
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.pretrain import PretrainConfig


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(evaluate, "TOKENS", 256)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt", documents=200)
    return home


@pytest.fixture(scope="module")
def trained(home):
    """A function from model changes to a run of fresh parameters."""

    def make(**changes):
        changes = {"layers": 1, "scores": ("content", "fixed"), **changes}
        c = from_config(PretrainConfig, tiny.config(home, **{f"model__{key}": v for key, v in changes.items()}))
        tokenizer = prepare(c.data, c.tokenizer, 4).tokenizer
        model = MaskedLM(c.model, tokenizer.size)
        return Pretrained(tokenizer, model, model.initial_params(jax.random.key(0)), to_plain(c))

    return make


def test_the_loss_at_a_length_is_that_of_all_heldout_text_in_such_rows(trained):
    run = trained()
    short, long = (evaluate.at_length(run, length) for length in (16, 32))
    assert short["rows"] > long["rows"] > 4
    for found in (short, long):
        assert found["applicable"]
        assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
        # of rows without padding 15 % are predicted; untrained, a model knows nothing
        assert found["predicted"] == pytest.approx(0.15 * found["rows"] * found["length"], rel=0.2)
        assert found["loss"] == pytest.approx(np.log(run.tokenizer.size), abs=0.3)
    assert evaluate.at_length(run, 16) == short  # the masks are the same each time


def test_rows_of_another_length_hold_the_same_text(home, trained):
    run = trained()
    data = from_config(DataConfig, run.config["data"])
    special = run.tokenizer.special
    texts = [rows[~special[rows]] for rows in (evaluate.heldout_rows(data, run.tokenizer, n) for n in (16, 32))]
    np.testing.assert_array_equal(*texts)
    np.testing.assert_array_equal(
        evaluate.heldout_rows(data, run.tokenizer, 16),
        prepare(data, from_config(PretrainConfig, tiny.config(home)).tokenizer, 4).heldout.tokens,
    )


def test_absolute_positions_end_where_they_were_trained(trained):
    run = trained(positions="absolute")
    assert evaluate.at_length(run, 16)["applicable"]
    found = evaluate.at_length(run, 32)
    assert not found["applicable"]
    assert found["reason"] == "its position tables were trained up to 16 tokens"
    assert "loss" not in found


def test_attention_maps_are_of_the_sentence_and_sum_to_one(trained, tmp_path):
    run = trained()
    found = attention_maps(run, "the cat sat")
    assert found.tokens[0] == "[CLS]"
    assert found.tokens[-1] == "[SEP]"
    assert "".join(found.tokens[1:-1]).replace("_", "") == "thecatsat"
    size = len(found.tokens)
    assert found.weights.shape == (1, 2, size, size)
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)
    evaluate.save_attention(tmp_path / "a.npz", found)
    again = evaluate.load_attention(tmp_path / "a.npz")
    assert again.tokens == found.tokens
    np.testing.assert_allclose(again.weights, found.weights, atol=1e-3)


def test_a_model_without_attention_has_no_maps(trained):
    found = attention_maps(trained(mixer="lightweight", scores=()), "the cat sat")
    assert found.weights.shape == (0, 0, len(found.tokens), len(found.tokens))


def test_a_long_sentence_is_cut(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_run", lambda path: trained())
    sentence = "the cat sat on the mat " * 40
    evaluate.main([f"--run={tmp_path}", f"--sentence={sentence}"])
    kept = evaluate.load_attention(evaluate.attention_file(tmp_path, sentence))
    assert len(kept.tokens) == evaluate.LONGEST_SENTENCE
    assert (kept.tokens[0], kept.tokens[-1]) == ("[CLS]", "[SEP]")


def test_compiled_programs_are_kept_where_it_is_said(monkeypatch):
    kept = []
    monkeypatch.setattr(evaluate.compiled, "keep", kept.append)
    monkeypatch.setattr(evaluate, "evaluate", lambda path, wanted: kept.append(path))
    evaluate.main(["--run=run", "--sentence=a cat", "--compile_cache=here"])
    assert kept == ["here", "run"]


def test_what_is_there_is_not_computed_again(trained, tmp_path, monkeypatch, capsys):
    run = trained()
    loaded = []
    monkeypatch.setattr(evaluate, "load_run", lambda path: loaded.append(path) or run)
    args = [f"--run={tmp_path}", "--lengths=16", "--sentence=the cat"]
    evaluate.main(args)
    figures = json.loads((tmp_path / "evaluations" / "length-16.json").read_text())
    assert figures["length"] == 16
    assert evaluate.attention_file(tmp_path, "the cat").exists()
    assert f"loss {figures['loss']:.4f}" in capsys.readouterr().out
    evaluate.main(args)
    assert len(loaded) == 1
    evaluate.main([*args, "--sentence=a dog"])
    assert len(loaded) == 2


def test_an_unfinished_run_is_evaluated_and_called_so(trained, tmp_path, monkeypatch, capsys):
    for step, said in ((0, ""), (2, f"{tmp_path} has not ended: step 2 of 6 is evaluated\n"), (6, "")):
        run = trained()._replace(step=step)
        monkeypatch.setattr(evaluate, "load_run", lambda path, run=run: run)
        evaluate.main([f"--run={tmp_path}", f"--sentence=the cat {step}"])
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--lengths=16"], "is no run folder"),
        (["--lengths=4"], "lengths=4 must lie in 8 .. 256"),
        (["--lengths=x"], "must be whole numbers"),
        ([], "nothing to evaluate"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(args, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main([f"--run={tmp_path / 'run'}", *args])
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert said in written
    assert written.count("\n") == 1
    assert not pathlib.Path(tmp_path / "run").exists()
