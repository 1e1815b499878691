"""A run folder in a bucket, played by a folder behind the path layer."""

import json
import time

import numpy as np
import pytest
import tiny
from etils import epath
from played_bucket import played  # noqa: F401  the fixture `bucket`

from convattn_jax import checkpoint, evaluate, events, plots, run
from convattn_jax.config import UserError
from convattn_jax.data import textfiles
from convattn_jax.data import tokenizer as tokenizers
from convattn_jax.data.bucket import explained, patience
from convattn_jax.glue import finished, results, submission
from convattn_jax.glue.config import SEEDS
from convattn_jax.inference import AttentionMaps
from convattn_jax.learned import load_kernels, save_kernels
from convattn_jax.resume import Change
from convattn_jax.run import RunFolder
from convattn_jax.taps import Kernel

RUN = "gs://bucket/runs/composite"


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


def test_a_path_in_a_bucket_stays_one(bucket, tmp_path):
    (bucket / "text").mkdir()
    tiny.write_corpus(bucket / "text" / "a.txt")
    for pattern in ("gs://bucket/text/a.txt", "gs://bucket/text/*.txt"):
        assert list(map(str, textfiles.find([pattern], "data.files"))) == ["gs://bucket/text/a.txt"]
    assert str(checkpoint.Checkpoints(f"{RUN}/checkpoints", 1)._path(3)) == f"{RUN}/checkpoints/3"


def test_who_comes_last_takes_a_run_folder_over(bucket, monkeypatch):
    monkeypatch.setattr(run, "LOOKS", -1.0)
    first, second = RunFolder(RUN), RunFolder(RUN)
    with first.lock():
        first.append({"step": 1})
        with second.lock():
            second.append({"step": 2})
            for write in (lambda: first.append({"step": 2}), lambda: first.write("summary", {})):
                with pytest.raises(UserError, match=rf"{RUN} was taken over by process \d+ on .*: end one of the two"):
                    write()
            second.append({"step": 3})
    assert [row["step"] for row in second.rows()] == [1, 2, 3]
    assert second.read("summary") is None


def test_a_bucket_that_is_not_there_or_cannot_be_reached_is_one_line(bucket, tmp_path):
    with pytest.raises(UserError, match=r"--workdir=gs://other/run: there is no bucket gs://other: make it"):
        RunFolder("gs://other/run").check_writable()
    (tmp_path / "refused").touch()
    with pytest.raises(
        UserError, match=rf"--workdir={RUN} cannot be reached \(Forbidden: no storage.*\): check the network, log in \("
    ):
        RunFolder(RUN).check_writable()
    with pytest.raises(UserError, match=r"--workdir=ftp://b/run: buckets are gs:// or s3://"), reach("ftp://b/run"):
        pass
    for nameless in ("gs://", "gs:///run"):
        with pytest.raises(UserError, match=rf"^--workdir={nameless} names no bucket: write gs://BUCKET/FOLDER"):
            reach(nameless).__enter__()
    with pytest.raises(UserError, match=r"needs a library: pip install 'convattn_jax\[gcs\]' \(no gcsfs\)"), reach(RUN):
        raise ImportError("no gcsfs")
    with (
        pytest.raises(UserError, match=r"cannot be reached \(Forbidden: by whom\): check the network, log in"),
        reach(RUN),
    ):
        raise OSError("Forbidden:\nby whom")
    with pytest.raises(ZeroDivisionError), reach(RUN):  # a mistake of the program's own
        raise ZeroDivisionError
    with pytest.raises(OSError, match="on a disk"), reach("runs/local"):
        raise OSError("on a disk")


def test_a_save_that_a_bucket_did_not_take_is_told_once():
    said = UserError(f"--workdir={RUN} cannot be reached (no route): check the network")
    assert checkpoint.unwritten(epath.Path(RUN), said) is said
    assert str(checkpoint.unwritten(epath.Path(RUN), ValueError("PERMISSION_DENIED"))).startswith(
        f"--workdir: no checkpoint could be written to {RUN} (PERMISSION_DENIED): check the network, log in"
    )


def reach(path):
    return explained("--workdir", path)


def test_a_bucket_that_takes_its_time_is_told(monkeypatch, capsys):
    monkeypatch.setattr("convattn_jax.data.bucket.SILENCE", 0.01)
    with patience("--workdir", RUN):
        for _ in range(1000):
            time.sleep(0.01)
            if said := capsys.readouterr().err:
                break
    assert said == f"--workdir={RUN}: waiting for an answer\n"
    with patience("--workdir", "runs/local"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
