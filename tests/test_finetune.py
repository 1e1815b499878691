"""Fine-tuning through the front door: what it leaves, that it goes on where it stopped, and the errors a user meets."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from convattn_jax import checkpoint, finetune, inference, main, pretrain
from convattn_jax.config import UserError
from convattn_jax.glue import finished, training, unfinished
from convattn_jax.glue.config import SEEDS
from convattn_jax.glue.task_run import classifier_of
from convattn_jax.glue.tasks import TASKS

ROOT = pathlib.Path(main.__file__).parent.parent
CONFIG = f"--config={ROOT / 'configs' / 'glue.py'}"
PROBE = ["--config.glue.tasks=word_order", "--config.glue.length=16"]
CHAIN = ["--config.glue.preset=stable", "--config.glue.length=16", "--config.glue.seeds=2"]
LABELS = ("entailment", "not_entailment", "neutral")


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]))


def write_glue(folder, rows=8):
    """MNLI, RTE, STS-B and AX in the original layout; the sentences are of the text that the run was trained on."""
    draw = random.Random(1)

    def pair():
        return [" ".join(draw.choices(tiny.WORDS.split(), k=4)) for _ in range(2)]

    names = {"MNLI": "gold_label", "RTE": "label", "STS-B": "score"}
    of = {"MNLI": ("contradiction", "entailment", "neutral"), "RTE": LABELS[:2], "STS-B": ("0.5", "2.0", "4.5")}
    stems = {"MNLI": ["dev_matched", "dev_mismatched"], "RTE": ["dev"], "STS-B": ["dev"]}
    for task, label in names.items():
        front = ["index", "sentence1", "sentence2"]
        for stem in ["train", *stems[task]]:
            labelled = [[i, *pair(), of[task][i % len(of[task])]] for i in range(rows)]
            write_tsv(folder / task / f"{stem}.tsv", [*front, label], labelled)
        for stem in [stem.replace("dev", "test") for stem in stems[task]]:
            write_tsv(folder / task / f"{stem}.tsv", front, [[i, *pair()] for i in range(rows)])
    write_tsv(
        folder / "AX" / "diagnostic.tsv", ["index", "sentence1", "sentence2"], [[i, *pair()] for i in range(rows)]
    )
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a run with a checkpoint of its first parameters, and GLUE files."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")
    tiny.write_config(home, model__layers=1, data__heldout_fraction=0.3)

    def save_at_once(run):
        with contextlib.closing(checkpoint.Checkpoints(run.folder.checkpoints, keep=1)) as checkpoints:
            checkpoints.save(run.program.init(0))
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain._Run, "complete", save_at_once)
        main.main(["main", f"--config={home / 'config.py'}", f"--workdir={home / 'run'}"])
    write_glue(home / "glue")
    return home


def start(home, *args):
    main.main(["main", CONFIG, f"--config.init_from={home / 'run'}", *args])


@pytest.fixture(scope="module")
def probed(home):
    """The run folder of a probe, two seeds; tests change a copy."""
    start(home, *PROBE)
    return home / "run-glue"


@pytest.fixture
def copy(probed, tmp_path):
    return shutil.copytree(probed, tmp_path / "copy")


@pytest.fixture(scope="module")
def chained(home):
    """MNLI, STS-B and RTE in one folder, two seeds."""
    folder = home / "chain"
    glue = f"--config.glue.data_dir={home / 'glue'}"
    start(home, *CHAIN, glue, "--config.glue.tasks=mnli,stsb,rte,ax", f"--workdir={folder}")
    return folder


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("something was trained")

    monkeypatch.setattr(training.Trainer, "train", refuse)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def params_of(home, folder, task, seed):
    run = inference.load_run(home / "run")
    model = classifier_of(run.model.config, run.tokenizer.size, TASKS[task].outputs)
    return checkpoint.load_params(
        folder / "checkpoints" / task, jax.eval_shape(model.initial_params, jax.random.key(0)), seed
    )


def assert_same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# --- what is left ---


def test_the_folder_beside_the_run_holds_the_results_and_nothing_more(home, probed):
    assert {path.name for path in probed.iterdir()} == {
        *("config.json", "starts.jsonl", "tokenizer.model", "tokenizer.json", "tasks", "checkpoints"),
        *("results.json", "statistics.json", "results.md", "results.png"),
    }
    table = results_of(probed)
    ended = [json.loads((probed / "tasks" / "word_order" / f"{seed}.json").read_text()) for seed in SEEDS[:2]]
    assert table == {"word_order": {"accuracy": [one["metrics"]["accuracy"] for one in ended]}}
    assert all(0 <= value <= 1 for value in table["word_order"]["accuracy"])
    assert {path.name for path in (probed / "tasks" / "word_order").iterdir()} == {f"{s}.json" for s in SEEDS[:2]}
    best = max(ended, key=lambda one: one["metrics"]["accuracy"])
    kept = [path.name for path in (probed / "checkpoints" / "word_order").iterdir()]
    assert kept == [str(SEEDS[ended.index(best)])]  # only the best seed's parameters are ever used


def test_the_best_seed_is_saved_first_so_that_no_other_is_written():
    two_sets = [(0.5, 0.9), (0.7, 0.2), (0.7, 0.3), (0.5, 0.9)]
    runs = [{"accuracy_matched": one, "accuracy_mismatched": two} for one, two in two_sets]
    assert finished.best_first(TASKS["mnli"], runs) == [2, 1, 0, 3]


def test_a_second_call_trains_nothing_and_writes_the_same(home, copy, probed, no_training):
    for name in ("results.json", "results.md", "statistics.json", "results.png"):
        (copy / name).unlink()
    start(home, *PROBE, f"--workdir={copy}")
    assert results_of(copy) == results_of(probed)
    assert (copy / "results.png").exists()
    assert (copy / "starts.jsonl").read_text() == (probed / "starts.jsonl").read_text()


def test_a_call_for_another_task_keeps_what_is_there(home, copy, probed, capsys):
    args = ["--config.glue.tasks=adjacent", "--config.glue.seeds=1", "--config.glue.length=16"]
    start(home, *args, f"--workdir={copy}")
    table = results_of(copy)
    assert table == results_of(probed) | {"adjacent": {"accuracy": [table["adjacent"]["accuracy"][0]]}}
    assert "| adjacent | accuracy |" in (copy / "results.md").read_text()
    assert str(copy / "results.json") in capsys.readouterr().out
    began = [json.loads(line)["tasks"] for line in (copy / "starts.jsonl").read_text().splitlines()]
    assert began == [["word_order"], ["adjacent"]]


def test_seeds_that_are_stopped_or_killed_within_a_task_end_as_if_they_had_not_been(
    home, probed, tmp_path, monkeypatch, capsys
):
    folder, train = tmp_path / "stopped", training.Trainer.train
    begun = []

    def interrupted(self, state, keys, outputs, schedule, batches, report, ends):
        begun.append((int(state.step[0]), len(keys)))

        def report_and_strike(step, losses, tokens):
            if step == strike:
                os.kill(os.getpid(), signal.SIGINT) if len(begun) == 1 else die()
            report(step, losses, tokens)

        return train(self, state, keys, outputs, schedule, batches, report_and_strike, ends)

    def die():
        raise RuntimeError("killed")

    monkeypatch.setattr(training.Trainer, "train", interrupted)
    args = [*PROBE, f"--workdir={folder}"]
    strike = 3
    with pytest.raises(SystemExit) as ended:
        start(home, *args)
    assert ended.value.code == 130
    assert "word_order x 2 seeds stopped at step 3: the same command resumes" in capsys.readouterr().err
    strike = 6
    with pytest.raises(RuntimeError, match="killed"):
        start(home, *args, "--config.glue.save_seconds=0")
    strike = 0
    save, saved = finished.save, []

    def second_fails(*what):
        if saved:
            die()
        saved.append(what)
        save(*what)

    monkeypatch.setattr(finished, "save", second_fails)
    with pytest.raises(RuntimeError, match="killed"):
        start(home, *args)
    monkeypatch.setattr(finished, "save", save)
    start(home, *args)
    assert begun[0] == (0, 2)
    assert begun[1] == (3, 2)
    assert begun[2][0] in (4, 5)  # one save may have been under way
    assert [count for _, count in begun] == [2, 2, 2, 2]  # also when one of the two was finished
    assert results_of(folder) == results_of(probed)
    kept = [{path.name for path in (at / "checkpoints" / "word_order").iterdir()} for at in (folder, probed)]
    assert kept[0] == kept[1]
    for seed in map(int, kept[0]):
        assert_same(*(params_of(home, at, "word_order", seed) for at in (folder, probed)))
    assert not (folder / "unfinished").exists()


def test_who_stops_at_the_last_step_of_some_seeds_keeps_them_and_trains_no_others(home, tmp_path, monkeypatch, capsys):
    folder, train = tmp_path / "stopped", training.Trainer.train

    def interrupted(self, state, keys, outputs, schedule, batches, report, ends):
        def report_and_strike(step, losses, tokens):
            if step == schedule.steps:
                os.kill(os.getpid(), signal.SIGINT)
            report(step, losses, tokens)

        return train(self, state, keys, outputs, schedule, batches, report_and_strike, ends)

    monkeypatch.setattr(training.Trainer, "train", interrupted)
    with pytest.raises(SystemExit) as ended:
        start(home, *PROBE, f"--workdir={folder}", "--config.glue.together=1")
    assert ended.value.code == 130
    assert "word_order x 1 seeds are finished, stopped there: the same command goes on" in capsys.readouterr().err
    assert [path.name for path in (folder / "tasks" / "word_order").iterdir()] == [f"{SEEDS[0]}.json"]
    assert not (folder / "unfinished").exists()


def test_a_loss_that_is_not_finite_stops_the_task_before_it_is_saved(home, tmp_path, monkeypatch, capsys):
    step = training.Trainer._step_one

    def broken(self, state, *rest, **model):
        state, value = step(self, state, *rest, **model)
        return state, jnp.where(state.step == 2, jnp.nan, value)

    monkeypatch.setattr(training.Trainer, "_step_one", broken)
    with pytest.raises(SystemExit):
        start(home, *PROBE, f"--workdir={tmp_path / 'nan'}", "--config.glue.save_seconds=0")
    assert "glue.tasks=word_order: the loss of seed 42 is not finite at step 2: choose" in capsys.readouterr().err
    assert checkpoint.newest_whole(tmp_path / "nan" / "unfinished" / "word_order" / "checkpoints") == 1


def test_groups_go_on_as_they_began():
    assert unfinished.groups([1, 2, 3], 2, []) == [[1, 2], [3]]
    assert unfinished.groups([2, 3], 3, [1, 2]) == [[1, 2], [3]]
    assert unfinished.groups([2, 3], 1, [1, 2]) == [[2], [3]]  # fewer together, as memory may demand
    assert unfinished.groups([3], 2, [1, 2]) == [[3]]
    assert unfinished.groups([], 2, [1, 2]) == []


def test_a_killed_run_goes_on_with_the_missing_seeds_and_takes_more(home, probed, tmp_path, monkeypatch):
    folder, first = tmp_path / "killed", SEEDS[0]
    args = [*PROBE, "--config.glue.together=1", f"--workdir={folder}", f"--config.init_from={home / 'run'}"]
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
    start(home, *args, "--config.glue.seeds=3")
    assert trained == [1, 1]
    values = results_of(folder)["word_order"]["accuracy"]
    assert len(values) == 3
    assert values[:2] == results_of(probed)["word_order"]["accuracy"]  # where both seeds were one program
    best = SEEDS[values.index(max(values))]
    assert [path.name for path in (folder / "checkpoints" / "word_order").iterdir()] == [str(best)]


# --- GLUE ---


def test_mnli_is_evaluated_on_both_sets_and_stsb_is_a_regression(chained):
    table = results_of(chained)
    assert {task: list(metrics) for task, metrics in table.items()} == {
        "mnli": ["accuracy_matched", "accuracy_mismatched"],
        "stsb": ["pearson", "spearman"],
        "rte": ["accuracy"],
    }
    assert all(len(values) == 2 for metrics in table.values() for values in metrics.values())


def test_rte_starts_from_the_mnli_encoder_of_the_same_seed(home, chained, monkeypatch):
    started = {}

    def kept(self, seeds, encoders, outputs):
        started.update(zip(seeds, encoders, strict=True))
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Trainer, "start", kept)
    glue = f"--config.glue.data_dir={home / 'glue'}"
    shutil.move(chained / "tasks" / "rte", chained / "rte")
    try:
        with pytest.raises(SystemExit):
            start(
                home,
                CHAIN[0],
                CHAIN[1],
                glue,
                "--config.glue.seeds=3",
                "--config.glue.tasks=rte",
                f"--workdir={chained}",
            )
    finally:
        shutil.move(chained / "rte", chained / "tasks" / "rte")
    assert list(started) == list(SEEDS[:3])
    for seed in SEEDS[:2]:
        assert_same(started[seed], params_of(home, chained, "mnli", seed)["encoder"])
    pretrained = inference.load_run(home / "run").params["encoder"]
    assert_same(started[SEEDS[2]], pretrained)  # MNLI has no third seed; the others start where they did
    kernels = [tree["layer_0"]["mlp_in"]["kernel"] for tree in started.values()]
    assert not any(np.array_equal(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    ended = [json.loads((chained / "tasks" / task / f"{SEEDS[0]}.json").read_text()) for task in ("rte", "mnli")]
    assert [one["starts_from"] for one in ended] == ["mnli", ""]


def test_the_submission_is_that_of_the_best_seed_and_marked_incomplete(home, chained):
    table = results_of(chained)
    with zipfile.ZipFile(chained / "submission-incomplete.zip") as archive:
        files = {name: archive.read(name).decode().splitlines() for name in archive.namelist()}
    assert set(files) == {"MNLI-m.tsv", "MNLI-mm.tsv", "STS-B.tsv", "RTE.tsv", "AX.tsv"}
    assert all(len(lines) == 9 for lines in files.values())
    best = int(np.argmax(table["rte"]["accuracy"]))
    saved = np.load(chained / "predictions" / "rte-test.npz")
    assert saved["seed"] == SEEDS[best]
    classify = finetune.load_classifier(chained, "rte")
    rows = [line.split("\t") for line in (home / "glue" / "RTE" / "test.tsv").read_text().splitlines()[1:]]
    expected = [f"{i}\t{label.label}" for i, label in enumerate(classify([tuple(row[1:]) for row in rows]))]
    assert files["RTE.tsv"] == ["index\tprediction", *expected]
    rows = [line.split("\t") for line in (home / "glue" / "AX" / "diagnostic.tsv").read_text().splitlines()[1:]]
    for model in ("mnli", "ax"):
        labels = finetune.load_classifier(chained, model)([tuple(row[1:]) for row in rows])
        assert files["AX.tsv"][1:] == [f"{i}\t{label.label}" for i, label in enumerate(labels)]


def test_test_files_that_come_later_are_predicted_without_training(home, chained, tmp_path, no_training):
    folder = shutil.copytree(chained, tmp_path / "later")
    before = (folder / "submission-incomplete.zip").read_bytes()
    shutil.rmtree(folder / "predictions")
    (folder / "submission-incomplete.zip").unlink()
    args = [*CHAIN, f"--config.glue.data_dir={home / 'glue'}", f"--workdir={folder}"]
    start(home, *args, "--config.glue.tasks=rte")
    with zipfile.ZipFile(folder / "submission-incomplete.zip") as archive:
        assert archive.namelist() == ["RTE.tsv"]
    start(home, *args, "--config.glue.tasks=mnli,stsb,ax")
    assert (folder / "submission-incomplete.zip").read_bytes() == before
    assert results_of(folder) == results_of(chained)


# --- use ---


def test_a_classifier_gives_labels_and_probabilities(chained):
    classify = finetune.load_classifier(chained, "mnli")
    pairs = [("the cat sat", "a dog ran on"), ("a fish swam", "the bird sang under the old tree"), ("rain", "sun")]
    found = classify(pairs)
    for one in found:
        assert list(one.probabilities) == list(TASKS["mnli"].labels)
        assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert one.label == max(one.probabilities, key=one.probabilities.__getitem__)
        assert one.score is None
    for one, again in zip(found, [classify([list(pair)])[0] for pair in pairs], strict=True):
        assert one.label == again.label
        assert list(one.probabilities.values()) == pytest.approx(list(again.probabilities.values()), rel=1e-4)
    assert classify([]) == []


def test_a_regression_gives_a_score(chained):
    (one,) = finetune.load_classifier(chained, "stsb")([("the cat sat", "a cat sat")])
    assert (one.label, one.probabilities) == (None, {})
    assert np.isfinite(one.score)


def test_a_single_sentence_is_read_as_it_stands(probed):
    classify = finetune.load_classifier(probed, "word_order")
    one, two = classify(["the cat sat on a mat", "sun and rain"])
    assert set(one.probabilities) == {"in_order", "swapped"}
    assert one.probabilities != two.probabilities


def test_what_a_classifier_does_not_understand_is_said(home, chained, probed, copy):
    classify = finetune.load_classifier(chained, "rte")
    for texts, message in (
        (["only one"], "rte wants 2 text(s) an example (sentence1, sentence2)"),
        ([3], "rte wants 2 text(s) an example (sentence1, sentence2), not 3"),
        ([("one", "two", "three")], "rte wants 2 text(s)"),
        ("one string", "rte wants a list of texts"),
    ):
        with pytest.raises(UserError) as caught:
            classify(texts)
        assert message in str(caught.value)
    for folder, task, message in (
        (probed, "rte", "has no finished run of rte: fine-tune it first"),
        (probed, "rtee", "task='rtee' is unknown"),
        (home / "run", "rte", "is no fine-tuning run"),
        (home / "nowhere", "rte", "is no fine-tuning run"),
    ):
        with pytest.raises(UserError) as caught:
            finetune.load_classifier(folder, task)
        assert message in str(caught.value)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tokenizer": "another"}))
    with pytest.raises(UserError, match="is not the tokenizer of this run"):
        finetune.load_classifier(copy, "word_order")


# --- errors ---


@pytest.fixture
def bad(home, tmp_path):
    """A copy of the run and of GLUE's files to damage."""
    shutil.copytree(home / "run", tmp_path / "run")
    shutil.copytree(home / "glue", tmp_path / "glue")
    (tmp_path / "empty").mkdir()
    return tmp_path


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_checkpoints(bad):
    shutil.rmtree(bad / "run" / "checkpoints")


def other_tokenizer(bad):
    change_json(bad / "run" / "data.json", tokenizer="another")


def torn_tokenizer(bad):
    change_json(bad / "run" / "tokenizer.json", digest="another")


def few_positions(bad):
    config = json.loads((bad / "run" / "config.json").read_text())
    config["model"] |= {"positions": "absolute", "max_length": 16}
    run = inference.load_run(bad / "run")
    (bad / "run" / "config.json").write_text(json.dumps(config))
    model = inference.MaskedLM(inference.from_config(inference.ModelConfig, config["model"], ""), run.tokenizer.size)
    shutil.rmtree(bad / "run" / "checkpoints")
    checkpoint.save_params(bad / "run" / "checkpoints", 0, jax.jit(model.initial_params)(jax.random.key(0)))


def finetuned(bad):
    (bad / "run-glue").mkdir()
    (bad / "run-glue" / "config.json").write_text('{"task": "finetune", "init_from": "run"}')


def lost_tokenizer(bad):
    (bad / "run" / "tokenizer.model").unlink()


def no_dev(bad):
    (bad / "glue" / "RTE" / "dev.tsv").unlink()


def no_train(bad):
    (bad / "glue" / "RTE" / "train.tsv").unlink()


def cut_off(bad):
    path = bad / "glue" / "RTE" / "train.tsv"
    path.write_text(path.read_text()[:-20])


def unchanged(bad):
    pass


RTE = ["--config.glue.tasks=rte", "--config.glue.data_dir=glue"]
ERRORS = {
    "no start": (unchanged, ["--config.init_from="], "init_from is empty: name a pre-training run"),
    "not there": (unchanged, ["--config.init_from=nowhere"], "init_from: nowhere is no run folder"),
    "empty": (unchanged, ["--config.init_from=empty"], "init_from: empty is no run folder"),
    "fine-tuning": (
        finetuned,
        ["--config.init_from=run-glue"],
        "init_from: run-glue is a fine-tuning folder, made from run: name that run",
    ),
    "lost tokenizer": (lost_tokenizer, [], "init_from: run/tokenizer.model is lost: restore it"),
    "no checkpoint": (no_checkpoints, [], "init_from: run/checkpoints holds no whole checkpoint"),
    "foreign tokenizer": (other_tokenizer, [], "init_from: run/tokenizer.model is not the tokenizer that its check"),
    "torn tokenizer": (torn_tokenizer, [], "init_from: run/tokenizer.json: belongs to another model"),
    "task": (unchanged, ["--config.glue.tasks=rtee"], "glue.tasks='rtee' is unknown (did you mean 'rte'?)"),
    "task beside all": (unchanged, ["--config.glue.tasks=all,rtee"], "glue.tasks='rtee' is unknown"),
    "no task": (unchanged, ["--config.glue.tasks="], "glue.tasks is empty"),
    "ax alone": (unchanged, [RTE[1], "--config.glue.tasks=ax"], "glue.tasks=ax is predicted by the model of mnli"),
    "preset": (unchanged, ["--config.glue.preset=elektra"], "glue.preset='elektra' is unknown (did you mean"),
    "rate": (unchanged, ["--config.glue.learning_rate=-1e-3"], "glue.learning_rate=-0.001 must be 0 (the preset's) or"),
    "epochs": (unchanged, ["--config.glue.epochs=-1"], "glue.epochs=-1 must be 0 (what the preset says) or more"),
    "source": (unchanged, ["--config.glue.source=csv"], "glue.source='csv' is unknown"),
    "seeds": (unchanged, ["--config.glue.seeds=11"], "glue.seeds=11 must lie in 0 .. 10"),
    "length": (unchanged, ["--config.glue.length=129"], "glue.length=129 must lie in 8 .. 128"),
    "together": (unchanged, ["--config.glue.together=-1"], "glue.together=-1 must be 0"),
    "no data_dir": (unchanged, ["--config.glue.tasks=rte"], "glue.data_dir is empty"),
    "data_dir": (unchanged, [RTE[0], "--config.glue.data_dir=nowhere"], "glue.data_dir=nowhere: is no folder"),
    "folder": (unchanged, [RTE[1], "--config.glue.tasks=cola"], "glue.data_dir=glue: has no folder CoLA"),
    "training file": (no_train, RTE, "glue/RTE/train.tsv is missing"),
    "dev file": (no_dev, RTE, "RTE/dev.tsv is missing"),
    "damaged file": (cut_off, RTE, "glue/RTE/train.tsv, line 9: "),
    "positions": (few_positions, [], "glue.length=128: the run of init_from has absolute positions for 16 tokens only"),
    "workdir": (unchanged, ["--workdir=run/config.json/deep"], "--workdir=run/config.json/deep cannot be written"),
    "workdir of another run": (unchanged, ["--workdir=run"], "run is the folder of another task, pretrain, not"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_before_anything_is_compiled_or_left(bad, capsys, monkeypatch, name):
    damage, args, message = ERRORS[name]
    damage(bad)
    monkeypatch.chdir(bad)
    monkeypatch.setattr(finetune, "Trainer", None)
    before = sorted(bad.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main.main(["main", CONFIG, "--config.init_from=run", *args])
    assert stopped.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ")
    assert written.count("\n") == 1
    assert message in written
    assert sorted(bad.rglob("*")) == before


def test_a_folder_is_of_one_start_and_one_recipe(home, copy, capsys):
    for args, message in (
        (["--config.glue.length=24"], "was made with glue.length=16, not 24"),
        (["--config.glue.preset=stable"], "was made with glue.preset=electra, not stable"),
        (["--config.glue.epochs=3"], "was made with glue.epochs=0, not 3"),
    ):
        with pytest.raises(SystemExit):
            start(home, *PROBE, f"--workdir={copy}", *args)
        assert message in capsys.readouterr().err
    before = json.loads((copy / "config.json").read_text())  # as it was before there were these keys
    older = {key: value for key, value in before["glue"].items() if key not in ("epochs", "learning_rate")}
    change_json(copy / "config.json", glue=older)
    with pytest.raises(SystemExit):
        start(home, *PROBE, f"--workdir={copy}", "--config.glue.learning_rate=1e-3")
    assert "was made with glue.learning_rate=0.0, not 0.001" in capsys.readouterr().err
    change_json(copy / "config.json", init_step=1)
    with pytest.raises(SystemExit):
        start(home, *PROBE, f"--workdir={copy}")
    said = f"copy was fine-tuned from step 1 of {home / 'run'}, which now stands at step 0: choose another --workdir"
    assert said in capsys.readouterr().err


def test_a_damaged_result_is_one_line(home, copy, capsys, no_training):
    result = copy / "tasks" / "word_order" / f"{SEEDS[0]}.json"
    result.write_text("{}")
    with pytest.raises(SystemExit):
        start(home, *PROBE, f"--workdir={copy}")
    said = f"error: {result} is damaged: delete it, and the same command trains this seed anew"
    assert " ".join(capsys.readouterr().err.split()) == said


def test_results_may_move_together_with_their_run_and_belong_to_no_other(home, copy, tmp_path, no_training, capsys):
    def go_on(place, **changes):
        run = shutil.copytree(home / "run", tmp_path / place / "run")
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))
        main.main(["main", CONFIG, f"--config.init_from={run}", *PROBE, f"--workdir={copy}"])
        return str(run)

    moved = go_on("moved")
    assert json.loads((copy / "config.json").read_text())["init_from"] == moved
    with pytest.raises(SystemExit):
        go_on("other", seed=5)
    assert f"was made with init_from={moved}, not " in capsys.readouterr().err


def test_a_start_that_has_not_ended_is_told_of(home, tmp_path, no_training, capsys):
    run = shutil.copytree(home / "run", tmp_path / "run")
    model = inference.load_run(run)
    checkpoint.save_params(run / "checkpoints", 2, model.params)
    with pytest.raises(AssertionError, match="something was trained"):
        main.main(["main", CONFIG, f"--config.init_from={run}", *PROBE])
    assert f"{run} has not ended: step 2 of 6 is the start" in " ".join(capsys.readouterr().out.split())
