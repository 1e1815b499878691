"""A whole run through the front door on a small text: what it leaves, and that no interruption changes it."""

import contextlib
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath

from convattn_jax import checkpoint, main, pretrain
from convattn_jax.account import KINDS
from convattn_jax.data import loader

STEPS, WINDOW = 12, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a configuration file and a cache."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")
    tiny.write_config(home, train__steps=STEPS, train__log_every=WINDOW, train__eval_every=4)
    return home


def start(home, workdir):
    main.main(["main", f"--config={home / 'config.py'}", f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def run(home):
    """The run folder of an uninterrupted run; tests change a copy."""
    start(home, home / "run")
    return home / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "moved")


def state(run, step=STEPS):
    orbax = ocp.StandardCheckpointer()
    folder = epath.Path(run) / "checkpoints" / str(step)
    found = [orbax.restore(folder / item) for item in ("params", "rest")]
    orbax.close()
    return found


def starts(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]


def assert_same_run(a, b):
    """Parameters, optimizer state and every logged figure but times are bit-identical."""
    x, y = state(a), state(b)
    assert jax.tree.structure(x) == jax.tree.structure(y)
    assert all(np.array_equal(p, q) for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    assert tiny.metrics(a) == tiny.metrics(b)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (a, b))
    for summary in (ours, theirs):
        del summary["tokens_per_second"], summary["train_seconds"], summary["account"]
    assert ours == theirs


def test_the_run_folder_holds_what_a_person_looks_for(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.json", "data.json", "starts.jsonl", "metrics.jsonl", "summary.json"),
        *("loss.png", "kernels.png", "kernels.npz", "tokenizer.model", "tokenizer.json", "checkpoints", "events"),
    }
    assert json.loads((run / "config.json").read_text())["model"]["scores"] == ["content", "fixed", "dynamic_query"]
    summary = json.loads((run / "summary.json").read_text())
    expected = "step eval_loss eval_perplexity eval_accuracy unigram_loss parameters tokens_per_second train_seconds"
    assert {*expected.split(), "peak_memory"} <= set(summary)
    assert summary["step"] == STEPS
    assert summary["eval_perplexity"] == pytest.approx(np.exp(summary["eval_loss"]))
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(state(run)[0]))
    assert checkpoint.newest_whole(run / "checkpoints") == STEPS


def test_each_step_is_logged_once_and_evaluations_are_of_held_out_text(run):
    rows = tiny.metrics(run)
    assert [row["step"] for row in rows] == list(range(WINDOW, STEPS + 1, WINDOW))
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    assert len({row["unigram_loss"] for row in rows if "unigram_loss" in row}) == 1  # the same masks each time


def test_a_finished_run_started_again_says_so_and_changes_nothing(home, copy, run, capsys):
    start(home, copy)
    said = capsys.readouterr().out
    assert f"finished: checkpoint {STEPS} and its files are whole" in said
    assert str(copy) in said
    assert_same_run(copy, run)
    assert [row["step"] for row in starts(copy)] == [0]


def test_a_finished_run_with_a_damaged_checkpoint_is_finished_again(home, copy, run, capsys):
    next((copy / "checkpoints" / str(STEPS) / "params" / "d").iterdir()).write_bytes(b"damaged")
    start(home, copy)
    said = capsys.readouterr().out
    assert f"checkpoint {STEPS} is damaged" in said
    assert f"resumed from step {STEPS - WINDOW}" in said
    assert_same_run(copy, run)


@pytest.mark.parametrize("left", [None, {"step": STEPS - WINDOW, "eval_loss": 9.0}], ids=["none", "a shorter run's"])
def test_a_run_that_ended_before_its_summary_gets_one(home, copy, run, left):
    summary = json.loads((copy / "summary.json").read_text())
    for name in ("summary.json", "loss.png", "kernels.png"):
        (copy / name).unlink()
    if left:
        (copy / "summary.json").write_text(json.dumps({**summary, **left}))
    start(home, copy)
    assert_same_run(copy, run)
    assert (copy / "kernels.png").exists()


def test_a_run_goes_on_without_its_text_as_long_as_the_rows_are_there(home, copy, run):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    (home / "text.txt").rename(home / "elsewhere.txt")
    try:
        start(home, copy)
    finally:
        (home / "elsewhere.txt").rename(home / "text.txt")
    assert_same_run(copy, run)


def test_a_killed_run_moved_and_started_again_ends_like_one_never_interrupted(home, run, tmp_path, capsys):
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "convattn_jax.main", f"--config={home / 'config.py'}", f"--workdir={killed}"]
    draw = random.Random(os.urandom(8))
    for sign, wait in (("*orbax-checkpoint-tmp*", 0), ("*/manifest.json", draw.uniform(0, 0.2))):
        before = set(killed.glob(f"checkpoints/{sign}"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=pathlib.Path(tiny.__file__).parent.parent)
        while not set(killed.glob(f"checkpoints/{sign}")) - before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)  # the first time within a save
        process.wait()

    moved = killed.rename(tmp_path / "moved")
    start(home, moved)
    said = capsys.readouterr().out
    assert re.search(r"resumed from step \d|finished:", said)
    assert_same_run(moved, run)
    assert not list(moved.glob("checkpoints/*tmp*"))


def test_a_run_stopped_by_a_signal_saves_at_that_step_and_ends_like_one_never_interrupted(
    home, run, tmp_path, capsys, monkeypatch
):
    stopped, batch = tmp_path / "stopped", loader.batch

    def signalled(due, number, rows, seed, step, *rest):
        if step == due:
            os.kill(os.getpid(), number)
        return batch(rows, seed, step, *rest)

    for due, number, status in ((3, signal.SIGTERM, 0), (8, signal.SIGINT, 130)):
        monkeypatch.setattr(loader, "batch", functools.partial(signalled, due, number))
        with pytest.raises(SystemExit) if status else contextlib.nullcontext() as ended:
            start(home, stopped)
        assert ended is None or ended.value.code == status
        said = capsys.readouterr().err
        step = int(said.partition("stopped at step ")[2].partition(":")[0])
        assert due - 3 <= step <= due + 1  # batches are made ahead of their steps
        assert checkpoint.newest_whole(stopped / "checkpoints") == step
    monkeypatch.undo()
    start(home, stopped)
    assert f"resumed from step {step}" in capsys.readouterr().out
    assert_same_run(stopped, run)
    began = starts(stopped)
    assert [row["step"] for row in began][::2] == [0, step]
    assert len({row["code"] for row in began}) == 1
    account = json.loads((stopped / "summary.json").read_text())["account"]
    assert account["lost"] > 0
    assert set(account) == set(KINDS)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_when_there_is_room(home, copy, run):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    (copy / "summary.json").unlink()
    args = [f"--config={home / 'config.py'}", f"--workdir={copy}", "--compile_cache="]  # whose files may be as large
    limited = ["sh", "-c", 'ulimit -f 48; exec "$@"', "sh"]  # no file grows beyond 24 KiB: parts of a state do
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(tiny.__file__).parent.parent)}
    command = [*limited, sys.executable, "-m", "convattn_jax.main", *args]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = f"error: --workdir: no checkpoint could be written to {copy}/checkpoints (File too large): make room there\n"
    assert (ended.returncode, ended.stderr) == (2, said)
    start(home, copy)
    assert_same_run(copy, run)


def test_a_run_that_diverges_says_where_and_goes_on_with_a_lower_rate(home, tmp_path, capsys):
    args = ["main", f"--config={home / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=6"]
    with pytest.raises(SystemExit) as stopped:
        main.main([*args, "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup=0.7"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.match(
        r"error: (loss|gradient_norm) is not finite at step 3 \(first in the output of encoder/.*\): low", said
    )
    assert checkpoint.newest_whole(tmp_path / "run" / "checkpoints") == 2
    lower = ["--config.optimizer.learning_rate=1e-3", "--config.optimizer.warmup=0.7"]
    with pytest.raises(SystemExit):
        main.main([*args, *lower])
    assert "with --config.resume.allow=optimizer.learning_rate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(
            [*args[:-1], *lower, "--config.resume.allow=optimizer.learning_rate,train.steps", "--config.train.steps=1"]
        )
    assert "train.steps=1 lies before step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["", '{"step": 1, "los\n', '{"step": 12}\n'], ids=["empty", "cut", "a row of nothing"]
)
def test_rows_that_were_lost_are_missed(home, copy, capsys, damage):
    whole = (copy / "metrics.jsonl").read_text()
    damaged = damage + (whole if damage else "")
    (copy / "metrics.jsonl").write_text(damaged)
    with pytest.raises(SystemExit) as stopped:
        start(home, copy)
    assert stopped.value.code == 2
    assert f"has lost the rows up to step {STEPS}" in capsys.readouterr().err
    assert (copy / "metrics.jsonl").read_text() == damaged, "what is to be restored is left as it is"


def test_a_run_cannot_end_where_it_was_stopped_unless_it_was_evaluated_there(home, copy, capsys):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    at = STEPS - WINDOW
    rows = [{key: value for key, value in row.items() if key != "eval_loss"} for row in rows if row["step"] <= at]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shorter = [f"--config.train.steps={at}", "--config.resume.allow=train.steps"]
    with pytest.raises(SystemExit) as stopped:
        main.main(["main", f"--config={home / 'config.py'}", f"--workdir={copy}", *shorter])
    assert stopped.value.code == 2
    assert f"train.steps={at} is where {copy} was stopped, before an evaluation" in capsys.readouterr().err


def test_a_folder_that_another_begins_while_text_is_prepared_is_left_to_it(home, run, tmp_path, capsys, monkeypatch):
    find_rows = pretrain.find_rows

    def meanwhile(*args):
        found = find_rows(*args)
        shutil.copytree(run, tmp_path / "run")
        return found

    monkeypatch.setattr(pretrain, "find_rows", meanwhile)
    with pytest.raises(SystemExit) as stopped:
        main.main(["main", f"--config={home / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--config.seed=1"])
    assert stopped.value.code == 2
    assert "was made with seed=0, not 1" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "run")) == sorted(os.listdir(run))
