"""Sweeps: what is refused before anything runs, what is skipped, what a failure leaves, and the sweeps provided."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny

from convattn_jax import compiled, evaluate
from convattn_jax.config import UserError, from_config, parse, run_file
from convattn_jax.finetune import FinetuneConfig, settings_of
from convattn_jax.glue.config import SEEDS
from convattn_jax.run import RunFolder
from convattn_jax.sweep import Finetuning, Sweep, Variant, __main__, plan, runner
from convattn_jax.sweep.board import Board
from convattn_jax.sweep.plan import Job, Options, Stage

ROOT = pathlib.Path(__main__.__file__).parent.parent.parent
PROVIDED = sorted(path.stem for path in (ROOT / "configs" / "sweeps").glob("[!_]*.py"))


@pytest.fixture
def config(tmp_path):
    """A configuration file and the text it reads."""
    tiny.write_corpus(tmp_path / "text.txt")
    return str(tiny.write_config(tmp_path))


def sweep_of(config, *changes, **more):
    rows = [Variant(f"v{i}", config, change) for i, change in enumerate(changes or ({},))]
    return Sweep(tuple(rows), **{"baseline": "v0", "sentence": "", **more})


# --- the plan ---


def test_jobs_are_all_variants_with_their_first_seed_before_any_second(config, tmp_path):
    rows = (Variant("a", config), Variant("b", config, seeds=(5, 7)), Variant("c", config))
    jobs = plan.jobs(Sweep(rows, seeds=(0,), baseline="a"), tmp_path / "w", Options())
    assert [job.name for job in jobs] == ["a-0", "b-5", "c-0", "b-7"]
    jobs = plan.jobs(Sweep(rows, seeds=(0,), baseline="a"), tmp_path / "w", Options(only=("c", "b"), seeds=(1, 2)))
    assert [(job.variant, job.seed) for job in jobs] == [("b", 1), ("c", 1), ("b", 2), ("c", 2)]


def test_a_stage_is_the_command_with_the_changes_of_sweep_variant_and_command_line(config, tmp_path):
    sweep = sweep_of(config, {"model.scores": ("content", "fixed")}, changes={"train.steps": 9})
    (job,) = plan.jobs(sweep, tmp_path / "w", Options(config={"train.batch_size": "2"}))
    folder = tmp_path / "w" / "v0-0"
    assert job.stages[0].args == (
        *(f"--config={config}", f"--workdir={folder}", f"--compile_cache={tmp_path / 'w' / 'compiled'}"),
        "--config.train.steps=9",
        *(
            "--config.model.scores=content,fixed",
            "--config.name=v0-0",
            "--config.seed=0",
            "--config.train.batch_size=2",
        ),
    )
    assert job.steps == 9
    assert "python -m convattn_jax.main --config=" in plan.as_text(job)


def test_a_key_for_all_variants_goes_to_those_that_make_use_of_it(config, tmp_path):
    sweep = sweep_of(config, {"model.scores": ("content",)}, {}, changes={"model.value.radius": 3})
    jobs = plan.jobs(sweep, tmp_path / "w", Options(config={"model.radius": "4"}))
    given = [[arg for arg in job.stages[0].args if "radius" in arg] for job in jobs]
    assert given == [[], ["--config.model.radius=4"]]


def test_a_stage_is_done_when_all_that_it_leaves_is_there(config, tmp_path, monkeypatch):
    tasks = {"glue.tasks": ("word_order", "distance"), "glue.seeds": 2, "glue.length": 16}
    finetuning = Finetuning("probes", str(ROOT / "configs" / "glue.py"), tasks)
    sweep = sweep_of(config, finetunings=(finetuning,), lengths=(16, 32), sentence="a cat's")
    (job,) = plan.jobs(sweep, tmp_path / "w", Options())
    run, probes = tmp_path / "w" / "v0-0", tmp_path / "w" / "v0-0-probes"

    def left():
        return [stage.name for stage in job.open_stages()]

    asked = []
    monkeypatch.setattr(evaluate, "evaluate", lambda path, wanted: asked.append((path, wanted)))
    monkeypatch.setattr(compiled, "keep", asked.append)
    evaluate.main(list(job.stages[1].args))
    assert asked == [str(tmp_path / "w" / "compiled"), (str(run), evaluate.Wanted((16, 32), ("a cat's",)))]
    assert f"--compile_cache={asked[0]}" in job.stages[2].args

    (run / "checkpoints" / "6").mkdir(parents=True)
    assert left() == ["pretrain", "evaluate", "probes"]
    (run / "summary.json").write_text('{"step": 5}')
    assert left() == ["pretrain", "evaluate", "probes"]
    (run / "summary.json").write_text('{"step": 6}')
    assert left() == ["evaluate", "probes"]
    (run / "evaluations").mkdir()
    for path in (evaluate.length_file(run, 16), evaluate.attention_file(run, "a cat's")):
        path.touch()
    assert left() == ["evaluate", "probes"]
    evaluate.length_file(run, 32).touch()
    assert left() == ["probes"]
    for task in ("word_order", "distance"):
        (probes / "tasks" / task).mkdir(parents=True)
        for seed in SEEDS[:2]:
            (probes / "tasks" / task / f"{seed}.json").touch()
    (probes / "results.json").write_text('{"word_order": {}}')
    assert left() == ["probes"]
    (probes / "results.json").write_text('{"word_order": {}, "distance": {}}')
    assert left() == []
    (probes / "tasks" / "distance" / f"{SEEDS[1]}.json").unlink()
    assert left() == ["probes"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.radios": 3}, "v1-0: --config.model.radios is no key"),
        ({"model.radius": 0}, "v1-0: model.radius=0 must be at least 1"),
        ({"model.scores": ("content",), "model.radius": 3}, "v1-0: model.radius has no effect on this model"),
        ({"data.files": ("nowhere.txt",)}, "v1-0: data.files: nowhere.txt is not there"),
        (
            {"data.source": "docstrings", "data.files": ("a.txt",)},
            "v1-0: data.files has no effect while data.source=docstrings",
        ),
        ({"data.fraction": 0.0}, "v1-0: data.fraction=0.0 must lie above 0"),
    ],
)
def test_an_invalid_entry_is_refused_by_name_and_nothing_is_left(config, tmp_path, changes, said):
    with pytest.raises(UserError) as refused:
        plan.jobs(sweep_of(config, {}, changes), tmp_path / "w", Options())
    assert str(refused.value).startswith(said)
    assert not (tmp_path / "w").exists()


def test_a_fine_tuning_that_cannot_work_is_refused_before_pre_training(config, tmp_path):
    glue = str(ROOT / "configs" / "glue.py")
    tasks = {"glue.tasks": ("rte",), "glue.data_dir": str(tmp_path)}
    (tmp_path / "RTE").mkdir()
    for changes, rows, said in (
        ({**tasks, "glue.data_dir": str(tmp_path / "RTE")}, {}, "has no folder RTE"),
        (tasks, {}, "train.tsv is missing; rte needs it"),
        ({"glue.tasks": ("distanse",)}, {}, "glue.tasks='distanse' is unknown"),
        ({}, {"model.positions": "absolute"}, "set glue.length=32"),
    ):
        with pytest.raises(UserError, match="v0-0: ") as refused:
            plan.jobs(sweep_of(config, rows, finetunings=(Finetuning("f", glue, changes),)), tmp_path, Options())
        assert said in str(refused.value)


def test_a_wrong_key_of_fine_tuning_is_named_as_it_was_written(config, tmp_path):
    glue = str(ROOT / "configs" / "glue.py")
    sweep = sweep_of(config, {}, finetunings=(Finetuning("f", glue, {}),))
    with pytest.raises(UserError, match=r"v0-0: --finetune.glue.rats is no key .*--finetune.glue"):
        plan.jobs(sweep, tmp_path, Options(finetune={"glue.rats": "1"}))


def test_a_run_folder_of_other_settings_is_refused_at_once(config, tmp_path):
    (tmp_path / "v0-0").mkdir()
    (job,) = plan.jobs(sweep_of(config), tmp_path, Options())
    (tmp_path / "v0-0" / "config.json").write_text(json.dumps({"seed": 4}))
    with pytest.raises(UserError, match=r"v0-0: .* was made with"):
        plan.jobs(sweep_of(config), tmp_path, Options())
    assert job.seed == 0


def test_fine_tunings_with_other_settings_are_refused_at_once(config, tmp_path):
    sweep = sweep_of(config, finetunings=(Finetuning("f", str(ROOT / "configs" / "glue.py"), {}),))
    options = {"glue.tasks": "word_order", "glue.length": "16"}
    plan.jobs(sweep, tmp_path, Options(finetune=options))
    folder = tmp_path / "v0-0-f"
    folder.mkdir()
    made = parse(
        ["finetune", f"--config={ROOT / 'configs' / 'glue.py'}", "--config.init_from=r", "--config.glue.length=16"]
    )
    settings = settings_of(from_config(FinetuneConfig, made.config)) | {"init_from": "before-it-was-moved/v0-0"}
    (folder / "config.json").write_text(
        json.dumps(settings | {"model": {"width": 8}, "tokenizer": "t", "init_step": 3})
    )
    plan.jobs(sweep, tmp_path, Options(finetune={**options, "glue.tasks": "distance", "glue.seeds": "3"}))
    with pytest.raises(UserError, match=r"v0-0: .*v0-0-f was made with glue.length=16, not 24"):
        plan.jobs(sweep, tmp_path, Options(finetune={**options, "glue.length": "24"}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(only=("v9",)), "--only=v9 is no variant of this sweep; there are: v0, v1"),
        (Options(config={"seed": "3"}), "--config.seed: a sweep sets this itself"),
        (Options(config={"model.radius": "3"}), "--config.model.radius is what the variants of this sweep differ in"),
        (Options(finetune={"init_from": "x"}), "--finetune.init_from: a sweep sets this itself"),
        (Options(finetune={"glue.seeds": "2"}), "--finetune.glue.seeds: this sweep has no fine-tunings: leave it out"),
        (
            Options(config={"model.value.radius": "3"}),
            "--config.model.value.radius has no effect on v0, v1: leave it out, or choose model.value.kind=",
        ),
    ],
)
def test_the_command_line_cannot_undo_the_comparison(config, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        plan.jobs(sweep_of(config, {}, {"model.radius": 1}), tmp_path, options)


def test_a_sweep_names_its_rows_once_and_a_baseline_among_them():
    row = Variant("a", "a.py")
    for given, said in (
        ({"variants": ()}, "variants: the sweep has none"),
        ({"variants": (row, row), "baseline": "a"}, "the name a stands there twice"),
        ({"variants": (row,), "baseline": "b"}, "baseline='b' is unknown"),
        ({"variants": (Variant("../a", ""),), "baseline": "../a"}, "letters that a folder's lacks"),
        (
            {"variants": (row,), "baseline": "a", "finetunings": (Finetuning("pretrain", ""),)},
            "pretrain stands there twice",
        ),
        ({"variants": (row,), "lengths": (0,)}, r"lengths=\(0,\) must be whole numbers from 1 on"),
        ({"variants": (row,), "seeds": (0, 0)}, r"seeds=\(0, 0\) names a number twice"),
    ):
        with pytest.raises(UserError, match=said):
            Sweep(**given)
    assert Sweep((row, Variant("absolute", "a.py"))).baseline == "absolute"
    assert Sweep((row,)).baseline == "a"


def test_a_plan_keeps_the_jobs_of_other_sweeps_in_the_folder(config, tmp_path):
    for name in ("a", "b"):
        sweep = Sweep((Variant(name, config),), baseline=name)
        plan.write_plan(sweep, plan.jobs(sweep, tmp_path, Options()), tmp_path)
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["variants"] == ["b", "a"]
    assert list(written["jobs"]) == ["a-0", "b-0"]
    assert written["jobs"]["a-0"] == {"variant": "a", "seed": 0, "stages": ["pretrain", "evaluate"]}


# --- running, with stages that train nothing ---

STAGE = """
import json, pathlib, signal, sys, time
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
print("began", flush=True)
with open(folder.parent / "calls", "a") as calls:
    calls.write(f"{folder.name} {what}\\n")
if what == "fail":
    print("error: data.files: it is gone", flush=True); sys.exit(2)
if what == "crash":
    import os; os.kill(os.getpid(), signal.SIGKILL)
if what == "interrupted":
    sys.exit(130)
if what == "quit":
    sys.exit(0)
if what == "wait":
    folder.mkdir(exist_ok=True); (folder / "data.json").touch(); (folder / "waiting").touch(); time.sleep(60)
if what == "meet":
    import os
    folder.mkdir(exist_ok=True)
    (folder / "devices").write_text(os.environ["CUDA_VISIBLE_DEVICES"] + os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"])
    first = not list(folder.parent.glob("*/data.json"))
    if first:
        time.sleep(0.3)  # the others are not to begin before there is data
        alone = len(list(folder.parent.glob("*/devices"))) == 1
        (folder / "data.json").write_text(str(alone))
    else:
        (folder / "data.json").touch()
    while len(list(folder.parent.glob("*/data.json"))) < 2:
        time.sleep(0.01)
folder.mkdir(exist_ok=True)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": 2.0, "eval_loss": 1.25}) + "\\n")
(folder / what).touch()
(folder / "checkpoints" / "3").mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Jobs whose stages are `pretend_stage.py`; each is done when its file is there."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "pretend_stage.py").write_text(STAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    work = tmp_path / "work"
    work.mkdir()

    def job(name, *whats):
        folder = work / name
        stages = tuple(
            Stage(what, "pretend_stage", (str(folder), what), folder, (folder / what).exists) for what in whats
        )
        return Job(name, 0, folder, 3, stages)

    return job


def run(jobs, work):
    with Board([job.name for job in jobs]) as board:
        failed, elsewhere = runner.run_jobs(jobs, work, board)
        assert not elsewhere
        return failed


def status(work, name):
    return json.loads((work / "status" / f"{name}.json").read_text())


def test_failures_are_marked_and_the_others_go_on(pretend, tmp_path, capsys):
    work = tmp_path / "work"
    jobs = [pretend("a", "fail", "never"), pretend("b", "crash"), pretend("c", "quit"), pretend("d", "one", "two")]
    assert run(jobs, work) == ["a", "b", "c"]
    assert status(work, "a")["state"] == "failed"
    assert status(work, "a")["error"].startswith("data.files: it is gone (exit status 2; ")
    assert status(work, "b")["error"].startswith("began (signal SIGKILL; ")
    assert status(work, "c")["error"].startswith("began (exit status 0; ")  # it ended without what it was to leave
    assert status(work, "d")["state"] == "done"
    assert (work / "calls").read_text().split() == ["a", "fail", "b", "crash", "c", "quit", "d", "one", "d", "two"]
    assert (work / "logs" / "d-one.log").read_text() == "began\n"
    said = capsys.readouterr().out
    assert "1 of 4 runs done" in said
    assert "1.250" in said


def test_what_is_done_is_skipped_and_a_failed_run_is_tried_again(pretend, tmp_path):
    work = tmp_path / "work"
    assert run([pretend("a", "one", "fail")], work) == ["a"]
    (work / "a" / "fail").touch()  # now it is done
    (work / "calls").unlink()
    assert run([pretend("a", "one", "fail", "two")], work) == []
    assert (work / "calls").read_text().split() == ["a", "two"]
    (work / "calls").unlink()
    assert run([pretend("a", "one", "fail", "two")], work) == []
    assert not (work / "calls").exists()


def test_pre_training_is_done_again_where_a_later_stage_misses_its_checkpoint(pretend, tmp_path):
    work = tmp_path / "work"
    run([pretend("a", "one")], work)
    (work / "a" / "checkpoints" / "3").rmdir()
    assert [stage.name for stage in pretend("a", "one").open_stages()] == []
    assert [stage.name for stage in pretend("a", "one", "two").open_stages()] == ["one", "two"]
    (work / "a" / "checkpoints" / "1").mkdir()  # where it was stopped when it was done again
    assert [stage.name for stage in pretend("a", "one", "two").open_stages()] == ["one", "two"]
    assert run([pretend("a", "one", "two")], work) == []
    assert (work / "calls").read_text().split() == ["a", "one", "a", "one", "a", "two"]


def test_a_failure_that_was_mended_by_hand_is_none_any_more(pretend, tmp_path):
    work = tmp_path / "work"
    assert run([pretend("a", "fail")], work) == ["a"]
    (work / "a").mkdir()
    (work / "a" / "fail").touch()
    assert run([pretend("a", "fail")], work) == []
    assert status(work, "a")["state"] == "done"


def test_a_stage_that_was_interrupted_ends_the_sweep(pretend, tmp_path, file, monkeypatch, capsys):
    jobs = [pretend("a", "interrupted"), pretend("b", "never")]
    monkeypatch.setattr(plan, "jobs", lambda *_: jobs)
    assert command(file, f"--workdir={tmp_path / 'work'}") == 130
    assert "interrupted: the same command goes on" in capsys.readouterr().err
    assert status(tmp_path / "work", "a") == {"state": "stopped", "stage": "interrupted", "error": "", "seconds": 0.0}
    assert (tmp_path / "work" / "calls").read_text().split() == ["a", "interrupted"]


def test_a_run_that_another_process_is_at_work_on_is_left_alone(pretend, tmp_path, capsys):
    work = tmp_path / "work"
    jobs = [pretend("a", "one"), pretend("b", "one")]
    (work / "a").mkdir()
    with RunFolder(work / "a").lock(), Board(["a", "b"]) as board:
        assert runner.run_jobs(jobs, work, board) == ([], ["a"])
    assert not (work / "status" / "a.json").exists()  # it is the other one's to write
    assert status(work, "b")["state"] == "done"
    assert "at work in another process" in capsys.readouterr().out
    assert run(jobs, work) == []
    assert status(work, "a")["state"] == "done"


def test_runs_at_once_begin_when_the_first_has_its_data_and_each_gets_a_device(pretend, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    jobs, work = [pretend("a", "meet"), pretend("b", "meet"), pretend("c", "fail")], tmp_path / "work"
    with Board(["a", "b", "c"]) as board:
        assert runner.run_jobs(jobs, work, board, at_once=2) == (["c"], [])  # a and b wait for each other
    assert (work / "a" / "data.json").read_text() == "True"
    assert [(work / name / "devices").read_text() for name in "ab"] == ["5false", "7false"]


@pytest.mark.parametrize("names", ["a", "ab"])
def test_sigterm_ends_the_stages_and_says_so(names, pretend, tmp_path):
    work = tmp_path / "work"
    script = (
        "import os, pathlib, threading, time, signal\n"
        "from convattn_jax.sweep import runner\nfrom convattn_jax.sweep.board import Board\n"
        "from convattn_jax.sweep.plan import Job, Stage\n"
        f"work = pathlib.Path({str(work)!r})\n"
        "def job(name):\n"
        "    stage = Stage('wait', 'pretend_stage', (str(work / name), 'wait'), work, lambda: False)\n"
        "    return Job(name, 0, work / name, 3, (stage,))\n"
        "try:\n"
        f"    with Board({names!r}) as board, runner.stopping_on_sigterm():\n"
        f"        runner.run_jobs(list(map(job, {names!r})), work, board, len({names!r}))\n"
        "except runner.Stopped:\n"
        "    print('stopped')\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    process = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    )
    while not all((work / name / "waiting").exists() for name in names):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said.rstrip().endswith("stopped")
    assert [status(work, name)["state"] for name in names] == ["stopped"] * len(names)


# --- the command ---


def command(*args):
    with pytest.raises(SystemExit) as ended:
        __main__.main(list(args))
    return ended.value.code


@pytest.fixture
def file(config, tmp_path):
    """A sweep file."""
    path = tmp_path / "pair.py"
    path.write_text(
        "from convattn_jax.sweep import Sweep, Variant\n"
        f"def get_sweep():\n    rows = [Variant(name, {config!r}) for name in ('a', 'b', 'c')]\n"
        "    return Sweep(tuple(rows), baseline='a', sentence='')\n"
    )
    return f"--sweep={path}"


def test_shards_share_the_jobs_and_one_plan(file, tmp_path, monkeypatch, capsys):
    ran = []

    def pretend_to_run(jobs, workdir, board, at_once):
        ran.append([job.name for job in jobs])
        return [], []

    monkeypatch.setattr(runner, "run_jobs", pretend_to_run)
    for shard in ("1/2", "2/2"):
        assert command(file, f"--workdir={tmp_path / 'w'}", f"--shard={shard}") == 0
    assert ran == [["a-0", "c-0"], ["b-0"]]
    written = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert list(written["jobs"]) == ["a-0", "b-0", "c-0"]
    assert written["baseline"] == "a"
    monkeypatch.setattr(runner, "run_jobs", lambda *_: (["a-1"], []))
    assert command(file, f"--workdir={tmp_path / 'w'}", "--only=a", "--seeds=1") == 1  # some failed
    assert list(json.loads((tmp_path / "w" / "sweep.json").read_text())["jobs"]) == ["a-0", "b-0", "c-0", "a-1"]
    assert "1 of 1 runs failed: a-1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("seeds=1", "seeds=1 must be a tuple, with a comma"),
        ("seeds=[1, 2]", "seeds must be a tuple"),
        ("lengths=('x',)", "lengths=('x',) must be whole numbers from 1 on"),
        ("changes=3", "changes=3 must name keys with their values"),
    ],
)
def test_what_a_sweep_file_says_wrongly_is_one_line(given, said, tmp_path):
    path = tmp_path / "pair.py"
    path.write_text(
        "from convattn_jax.sweep import Sweep, Variant\n"
        f"def get_sweep():\n    return Sweep((Variant('a', 'a.py'),), {given})\n"
    )
    code = "import sys; from convattn_jax.sweep import __main__; __main__.main(sys.argv[1:])"  # without types checked
    done = subprocess.run([sys.executable, "-c", code, f"--sweep={path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_part_without_runs_says_so(file, tmp_path, capsys):
    assert command(file, f"--workdir={tmp_path / 'w'}", "--shard=4/5") == 0
    assert capsys.readouterr().out == "--shard=4/5: this part has no runs, there are 3 in all\n"


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("--lst", "--lst is no option (did you mean '--list'?)"),
        ("--sweep=configs/bert.py", "the file has no get_sweep(): it is one for --config"),
        ("--shard=3/2", "--shard=3/2 must be I/N"),
        ("--at_once=0", "--at_once=0 must be a whole number of runs"),
        ("--seeds=1,x", "--seeds=1,x must be whole numbers"),
        ("--seeds=1,1", "--seeds=1,1 names a seed twice"),
        ("--workdir=gs://b/w", "--workdir=gs://b/w: a sweep keeps its books on a disk: name a local folder"),
        ("--steps=3", "--steps=3 is no option"),
        ("--config.train.steps", "--config.train.steps has no value"),
        ("--sweep=configs/sweeps/nothing.py", "no such file; there are: configs/sweeps/"),
        ("--only=,", "--only= is no variant of this sweep; there are: "),
        ("--workdir=README.md/w", "--workdir=README.md/w cannot be written: "),
    ],
)
def test_what_is_typed_wrong_is_one_line(file, arg, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command(file, arg) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", PROVIDED)
def test_a_provided_sweep_is_valid_at_every_size(name, tmp_path):
    for folder in ("CoLA", "SST-2", "MRPC", "STS-B", "RTE", "WNLI"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tsv").touch()
    tiny.write_corpus(tmp_path / "text.txt")
    for size in ("tiny", "small", "large"):
        sweep = run_file("sweep", f"{ROOT / 'configs' / 'sweeps' / name}.py:{size}", Sweep)
        text = {"data.source": "text", "data.files": str(tmp_path / "text.txt")}
        given = {"glue.data_dir": str(tmp_path)} if sweep.finetunings else {}
        assert plan.jobs(sweep, tmp_path / "w", Options(config=text, finetune=given))


def test_the_provided_sweeps_are_those_promised():
    def names(name):
        return [v.name for v in run_file("sweep", f"{ROOT / 'configs' / 'sweeps' / name}.py", Sweep).variants]

    assert names("positions") == ["absolute", "none", "shaw", "t5", "rope", "alibi", "fixed", "dynamic", "composite"]
    assert names("radius")[1:] == [f"composite_r{radius}" for radius in (2, 4, 8, 16, 32)]
    assert len(set(names("terms")[1:])) == 8
    assert all(name.startswith("content") for name in names("terms")[1:])
    bases, places = ({name.split("+")[part] for name in names("convolutions")[2:]} for part in (0, 1))
    assert bases == set(names("convolutions")[:2]) == {"absolute", "composite"}
    assert len(places) == 5
    assert len(names("convolutions")) == 2 + 2 * 5
