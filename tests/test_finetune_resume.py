"""Fine-tuning that is stopped, killed or diverges within a task goes on from there."""

import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from tuned import CONFIG, PROBE, ROOT, assert_same, params_of, results_of, start

from convattn_jax import checkpoint
from convattn_jax.glue import finished, training, unfinished
from convattn_jax.glue.config import SEEDS


def test_seeds_that_are_stopped_or_killed_within_a_task_end_as_if_they_had_not_been(
    glue_home, probed, tmp_path, monkeypatch, capsys
):
    folder, train = tmp_path / "stopped", training.Trainer.train
    begun = []

    def interrupted(self, state, keys, schedule, batches, report, ends):
        begun.append((int(state.step[0]), len(keys)))

        def report_and_strike(step, losses, tokens):
            if step == strike:
                os.kill(os.getpid(), signal.SIGTERM) if len(begun) == 1 else die()
            report(step, losses, tokens)

        return train(self, state, keys, schedule, batches, report_and_strike, ends)

    def die():
        raise RuntimeError("killed")

    monkeypatch.setattr(training.Trainer, "train", interrupted)
    args = [*PROBE, f"--workdir={folder}"]
    strike = 3
    start(glue_home, *args)
    assert "word_order x 2 seeds stopped at step 3: the same command resumes" in capsys.readouterr().err
    strike = 6
    with pytest.raises(RuntimeError, match="killed"):
        start(glue_home, *args, "--config.glue.save_seconds=0")
    strike = 0
    save, saved = finished.save, []

    def second_fails(*what):
        if saved:
            die()
        saved.append(what)
        save(*what)

    monkeypatch.setattr(finished, "save", second_fails)
    with pytest.raises(RuntimeError, match="killed"):
        start(glue_home, *args)
    monkeypatch.setattr(finished, "save", save)
    start(glue_home, *args)
    assert begun[0] == (0, 2)
    assert begun[1] == (3, 2)
    assert begun[2][0] in (4, 5)  # one save may have been under way
    assert [count for _, count in begun] == [2, 2, 2, 2]  # also when one of the two was finished
    assert results_of(folder) == results_of(probed)
    kept = [{path.name for path in (at / "checkpoints" / "word_order").iterdir()} for at in (folder, probed)]
    assert kept[0] == kept[1]
    for seed in map(int, kept[0]):
        assert_same(*(params_of(glue_home, at, "word_order", seed) for at in (folder, probed)))
    assert not (folder / "unfinished").exists()


def test_a_loss_that_is_not_finite_stops_the_task_before_it_is_saved(glue_home, tmp_path, monkeypatch, capsys):
    step = training.Trainer._step_one

    def broken(self, state, batch, key, rate):
        state, value = step(self, state, batch, key, rate)
        return state, jnp.where(state.step == 2, jnp.nan, value)

    monkeypatch.setattr(training.Trainer, "_step_one", broken)
    with pytest.raises(SystemExit):
        start(glue_home, *PROBE, f"--workdir={tmp_path / 'nan'}", "--config.glue.save_seconds=0")
    assert "glue.tasks=word_order: the loss of seed 42 is not finite at step 2: choose" in capsys.readouterr().err
    assert checkpoint.newest_whole(tmp_path / "nan" / "unfinished" / "word_order" / "checkpoints") == 1


def test_groups_go_on_as_they_began():
    assert unfinished.groups([1, 2, 3], 2, []) == [[1, 2], [3]]
    assert unfinished.groups([2, 3], 3, [1, 2]) == [[1, 2], [3]]
    assert unfinished.groups([2, 3], 1, [1, 2]) == [[2], [3]]  # fewer together, as memory may demand
    assert unfinished.groups([3], 2, [1, 2]) == [[3]]
    assert unfinished.groups([], 2, [1, 2]) == []


def test_a_killed_run_goes_on_with_the_missing_seeds_and_takes_more(glue_home, probed, tmp_path, monkeypatch):
    folder, first = tmp_path / "killed", SEEDS[0]
    args = [*PROBE, "--config.glue.together=1", f"--workdir={folder}", f"--config.init_from={glue_home / 'run'}"]
    command = [sys.executable, "-m", "convattn_jax.main", CONFIG, *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    while not (folder / "tasks" / "word_order" / f"{first}.json").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "results.json").exists()

    (folder / "checkpoints" / "word_order" / str(SEEDS[1])).mkdir(
        exist_ok=True
    )  # as one killed while it saves leaves it
    trained = []
    train = training.Trainer.train

    def noted(self, state, keys, *rest):
        trained.append(len(keys))
        return train(self, state, keys, *rest)

    monkeypatch.setattr(training.Trainer, "train", noted)
    start(glue_home, *args, "--config.glue.seeds=3")
    assert trained == [1, 1]
    values = results_of(folder)["word_order"]["accuracy"]
    assert len(values) == 3
    assert values[:2] == results_of(probed)["word_order"]["accuracy"]  # where both seeds were one program
    best = SEEDS[values.index(max(values))]
    assert [path.name for path in (folder / "checkpoints" / "word_order").iterdir()] == [str(best)]
