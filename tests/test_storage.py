"""A run folder in a bucket, played by a folder behind the path layer: objects appear whole and never grow."""

import json
import pathlib

import numpy as np
import pytest
import tiny
from etils.epath import testing

from convattn_jax import evaluate, events, plots
from convattn_jax.config import UserError
from convattn_jax.data import corpus
from convattn_jax.data import tokenizer as tokenizers
from convattn_jax.glue import finished, results, submission
from convattn_jax.glue.config import SEEDS
from convattn_jax.inference import AttentionMaps
from convattn_jax.learned import load_kernels, save_kernels
from convattn_jax.resume import Change
from convattn_jax.run import RunFolder
from convattn_jax.taps import Kernel

RUN = "gs://bucket/runs/composite"


@pytest.fixture
def bucket(tmp_path):
    """Where the objects of gs://bucket lie; what a bucket cannot do fails."""

    def here(path):
        return str(path).replace("gs://", f"{tmp_path}/")

    def of(original, path, **options):
        return original(here(path), **options)

    def open_whole(original, path, mode):
        assert "a" not in mode, "objects cannot be extended"
        return original(here(path), mode)

    def never(original, path, dst):
        raise AssertionError("a rename in a bucket copies: a reader sees the parts")

    same = dict.fromkeys(("exists", "isdir", "listdir", "makedirs", "mkdir", "remove", "rmtree", "stat"), of)
    with testing.mock_epath(**same, open=open_whole, rename=never, replace=never):
        yield tmp_path / "bucket"


def test_a_run_folder_keeps_its_figures_in_a_bucket(bucket):
    folder = RunFolder(RUN)
    folder.check_writable()
    folder.check_belongs({"seed": 0})
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():  # which a bucket cannot give
        folder.write("config", {"seed": 0})
        for step in (1, 2, 3):
            folder.append({"step": step, "loss": 1 / step})
        for seed in (1, 2):
            folder.adopt({"seed": seed}, [Change("seed", seed - 1, seed)])
    changed = (bucket / "runs/composite/changes.jsonl").read_text().splitlines()
    assert len(changed) == 2
    assert folder.read("config") is not None
    assert folder.keep_rows(2) == folder.rows() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    kept = [json.loads(line)["step"] for line in (bucket / "runs/composite/metrics.jsonl").read_text().splitlines()]
    assert kept == [1, 2]


def test_tokenizer_kernels_and_pictures_go_to_a_bucket(bucket, tmp_path):
    folder = RunFolder(RUN).path
    folder.mkdir(parents=True, exist_ok=True)
    lines = tiny.write_corpus(tmp_path / "text.txt").read_text().split("\n")
    trained = tokenizers.train(filter(None, lines), 48, "reference")
    trained.save(str(folder))
    assert tokenizers.Tokenizer.load(str(folder)).digest == trained.digest
    kernels = {"fixed": Kernel(np.zeros((1, 2, 5), np.float32), None)}
    save_kernels(kernels, folder / "kernels.npz")
    np.testing.assert_array_equal(load_kernels(folder / "kernels.npz")["fixed"].mean, kernels["fixed"].mean)
    plots.plot_kernels(kernels, folder / "kernels.png", "composite")
    assert (bucket / "runs/composite/kernels.png").read_bytes().startswith(b"\x89PNG")
    with events.recorder(folder / "events", 1, True) as write:
        write({"step": 1, "loss": 1.0})
    assert not (bucket / "runs/composite/events").exists()


def test_what_fine_tuning_leaves_goes_to_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(RUN)
    idx, logits = np.arange(2), np.zeros((2, 2), np.float32)
    folder.write(f"tasks/rte/{SEEDS[0]}", {"metrics": {"accuracy": 0.5}})
    (folder.path / "predictions").mkdir()
    finished.save_prediction(folder, "rte", "test", SEEDS[0], "digest", idx, logits)
    predictions = finished.predictions(folder)
    np.testing.assert_array_equal(predictions["rte"]["test"][0], idx)
    assert str(submission.write(folder.path, predictions).path) == f"{RUN}/submission-incomplete.zip"
    results.write(folder.path, finished.table(folder))
    assert results.load(folder.path) == {"rte": {"accuracy": [0.5]}}
    left = {str(path.relative_to(bucket / "runs/composite")) for path in bucket.rglob("*.*")}
    written = {"submission-incomplete.zip", "results.json", "statistics.json", "results.md", "results.png"}
    assert left == {f"tasks/rte/{SEEDS[0]}.json", "predictions/rte-test.npz", *written}
    assert list(tmp_path.iterdir()) == [tmp_path / "bucket"]


def test_attention_maps_go_to_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = evaluate.attention_file(RUN, "the cat sat")
    evaluate.save_attention(path, AttentionMaps(["the"], np.ones((1, 1, 1, 1), np.float32)))
    assert evaluate.load_attention(path).tokens == ["the"]
    assert list(tmp_path.iterdir()) == [tmp_path / "bucket"]


def test_a_cache_in_a_bucket_is_refused_before_a_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.cache_dir=gs://b/c: token rows are mapped into memory"):
        corpus.cache_folder("gs://b/c")
    assert not list(pathlib.Path().iterdir())
