"""Several processes fine-tune as one does: they train one another's seeds on, one writes, and all stop together."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from processes import start
from test_finetune import CONFIG, params_of, write_glue
from test_glue_training import TOLERANCE

from convattn_jax import main
from convattn_jax.glue import finished, training
from convattn_jax.run import RunFolder

TASKS = ["--config.glue.tasks=mnli,rte,ax", "--config.glue.preset=stable", "--config.glue.length=16"]
STEPS, LATE = 40, 35

# Process 1 gets a SIGTERM at step 3 of RTE, the task of two classes. The service that spreads it looks once a second.
STOPPED = """
import os, signal, sys, time
from convattn_jax import main
from convattn_jax.glue import training

train = training.Trainer.train

def stopped(self, state, keys, outputs, schedule, batches, report, ends):
    def strike(step, losses, tokens):
        if (outputs, step) == (2, 3) and "--process=1" in sys.argv:
            os.kill(os.getpid(), signal.SIGTERM)
        if outputs == 2 and step > 2:
            time.sleep(0.1)
        report(step, losses, tokens)

    return train(self, state, keys, outputs, schedule, batches, strike, ends)

training.Trainer.train = stopped
main.main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a short run and GLUE files."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")
    tiny.write_config(home, model__layers=1, train__steps=1, train__eval_every=1)
    main.main(["main", f"--config={home / 'config.py'}", f"--workdir={home / 'run'}"])
    write_glue(home / "glue")
    return home


def arguments(home, folder, seeds, data_dir=None):
    places = [f"--config.init_from={home / 'run'}", f"--config.glue.data_dir={data_dir or home / 'glue'}"]
    return [
        CONFIG,
        *TASKS,
        *places,
        f"--config.glue.seeds={seeds}",
        f"--config.glue.epochs={STEPS}",
        f"--workdir={home / folder}",
    ]


def fine_tune(*args):
    main.main(["main", *args])


def assert_equal(home, found, expected, seeds):
    """What the seeds end with, and what is predicted, is the same but for rounding; and the same files are there."""
    assert {path.name for path in (home / found).iterdir()} == {path.name for path in (home / expected).iterdir()}
    assert not (home / found / "unfinished").exists()
    for task in ("mnli", "rte"):
        kept = [sorted(path.name for path in (home / at / "checkpoints" / task).iterdir()) for at in (found, expected)]
        assert kept[0] == kept[1]
        assert len(kept[0]) == (seeds if task == "mnli" else 1)
        for seed in map(int, kept[0]):
            both = [params_of(home, home / at, task, seed) for at in (found, expected)]
            for a, b in zip(*map(jax.tree.leaves, both), strict=True):
                np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=f"{task} {seed}")
    for task, split in (("mnli", "test_matched"), ("rte", "test"), ("ax", "test")):
        a, b = (finished.prediction(RunFolder(home / at), task, split) for at in (found, expected))
        assert (a["seed"], a["digest"]) == (b["seed"], b["digest"])
        np.testing.assert_allclose(a["logits"], b["logits"], rtol=1e-3, atol=1e-5)
    starts = [json.loads((home / found / "tasks" / "rte" / "42.json").read_text())["starts_from"]]
    assert starts == ["mnli"]


def train_and_hand_over(home, monkeypatch, capsys, count, seeds):
    """`count` processes are stopped within their second task, one goes on and is stopped, they finish."""
    together, alone = f"by {count}", f"{seeds} alone"
    fine_tune(*arguments(home, alone, seeds))
    ends = start(count, arguments(home, together, seeds), program=STOPPED)
    for ended in ends:
        assert ended.code == 0, ended.err
        assert f"rte x {seeds} seeds stopped at step " in ended.err
    assert f"mnli x {seeds} seeds: {STEPS} steps of 16 rows" in ends[0].out
    assert ends[1].out.replace("[Gloo]", "").count("mnli") == 0  # one of them speaks
    capsys.readouterr()

    train = training.Trainer.train

    def interrupted(self, state, keys, outputs, schedule, batches, report, ends):
        def strike(step, losses, tokens):
            if step == LATE:
                os.kill(os.getpid(), signal.SIGINT)
            report(step, losses, tokens)

        assert 3 <= int(state.step[0]) < LATE
        return train(self, state, keys, outputs, schedule, batches, strike, ends)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "train", interrupted)
        with pytest.raises(SystemExit):
            fine_tune(*arguments(home, together, seeds))
    assert f"rte x {seeds} seeds stopped at step {LATE}" in capsys.readouterr().err

    ends = start(count, arguments(home, together, seeds))
    for ended in ends:
        assert ended.code == 0, ended.err
    assert f"rte x {seeds} seeds: {STEPS} steps of 16 rows, from step {LATE} on" in ends[0].out
    assert_equal(home, together, alone, seeds)


def test_two_processes_and_one_hand_seeds_over_to_each_other(home, monkeypatch, capsys):
    train_and_hand_over(home, monkeypatch, capsys, 2, 2)


@pytest.mark.slow
def test_four_processes_share_the_rows_of_three_seeds(home, monkeypatch, capsys):
    train_and_hand_over(home, monkeypatch, capsys, 4, 3)


def test_other_rows_on_one_host_stop_all_before_anything_is_written(home, tmp_path):
    shutil.copytree(home / "glue", tmp_path / "glue")
    file = tmp_path / "glue" / "RTE" / "dev.tsv"
    file.write_text(file.read_text().replace("not_entailment", "entailment", 1))  # a label alone
    args = arguments(home, "never", 2, data_dir="glue")
    for ended in start(2, args, host_0=home, host_1=tmp_path):
        assert ended.code == 2
        [line] = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert "host 1 (" in line
        assert "has rows of rte=" in line
        assert line.endswith(": all hosts need the same")
    assert not list((home / "never").glob("*"))
