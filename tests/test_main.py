"""The errors a user meets: exit status 2, one line that names field and remedy, soon, and nothing left behind."""

import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import tiny

from convattn_jax import main

ROOT = pathlib.Path(main.__file__).parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a text and a configuration file, and the working directory."""
    tiny.write_corpus(tmp_path / "text.txt")
    tiny.write_config(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("déjà vu\n\n".encode("latin-1") * 9)
    (tmp_path / "short.txt").write_text("a cat sat.\n\n" * 3)
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(args, capsys):
    """The one line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as stopped:
        main.main(["main", *args])
    assert stopped.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ")
    assert written.count("\n") == 1
    return written


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "cache" not in path.parts)


CONFIG, RUN = "--config=config.py", "--workdir=runs/test"
ERRORS = {
    "unknown key": (["--config.model.raduis=4"], "did you mean --config.model.radius?"),
    "unknown variant": (
        ["--config.model.scores=content,fixd"],
        "model.scores='fixd' is unknown (did you mean 'fixed'?)",
    ),
    "unknown positions": (["--config.model.positions=absolut"], "model.positions='absolut' is unknown"),
    "radius without taps": (
        ["--config.model.scores=content", "--config.model.radius=4"],
        "model.radius has no effect on this model: leave it out, or choose a term, branch or mixer with taps",
    ),
    "radius of a linear value": (
        ["--config.model.value.radius=4"],
        "model.value.radius has no effect on this model: leave it out, or choose model.value.kind=separable or grouped",
    ),
    "files of another source": (
        ["--config.data.source=docstrings", "--config.data.files=empty.txt"],
        "data.files has no effect while data.source=docstrings: add --config.data.source=text, or leave it out",
    ),
    "heads": (["--config.model.heads=3"], "model.heads=3 does not divide model.width=16: choose a divisor"),
    "radius": (["--config.model.radius=0"], "model.radius=0 must be at least 1"),
    "dropout": (["--config.model.dropout=1.0"], "model.dropout=1.0 must lie in [0, 1)"),
    "positions too few": (
        ["--config.model.positions=absolute", "--config.model.max_length=8"],
        "model.max_length=8 is below data.length=16: raise it",
    ),
    "rows of a position table too few": (
        ["--config.model.scores=content,tupe_absolute", "--config.model.max_length=8"],
        "model.max_length=8 is below data.length=16: raise it",
    ),
    "accumulation": (["--config.train.accumulate=3"], "train.accumulate=3 does not divide train.batch_size=4"),
    "rhythm": (["--config.train.log_every=2"], "train.eval_every=3 must be a multiple of train.log_every=2"),
    "learning rate": (["--config.optimizer.learning_rate=0"], "optimizer.learning_rate=0.0 must be positive"),
    "masking": (["--config.masking.rate=1.5"], "masking.rate=1.5 must lie between 0 and 1"),
    "seed": (["--config.seed=-1"], "seed=-1 must lie in [0, 2**32)"),
    "mesh": (["--config.mesh.tensor=7"], "mesh.tensor=7"),
    "no text": (["--config.data.files="], "data.files is empty: name your text"),
    "empty corpus": (["--config.data.files=empty.txt"], "data.files: there is no text in empty.txt"),
    "missing file": (["--config.data.files=none.txt"], "data.files: none.txt is not there"),
    "unreadable file": (["--config.data.files=runs.txt"], "data.files: runs.txt is a folder: name its files"),
    "invalid UTF-8": (["--config.data.files=latin.txt"], "latin.txt is not UTF-8 in line 1"),
    "small corpus": (["--config.train.batch_size=4096"], "train.batch_size=4096: the train text makes only"),
    "vocabulary": (["--config.tokenizer.vocab_size=5000"], "tokenizer.vocab_size=5000: the corpus supports at most"),
    "tokenizer": (["--config.tokenizer.model=none.model"], "tokenizer.model: none.model cannot be read"),
    "size of a tokenizer": (
        ["--config.tokenizer.model=my.model", "--config.tokenizer.vocab_size=64"],
        "tokenizer.vocab_size has no effect beside tokenizer.model=my.model: leave one of the two out",
    ),
    "no home": (["--config.data.cache_dir=~nobody-by-this-name/cache"], "there is no home directory: set HOME"),
    "cache": (["--config.data.cache_dir=file/cache"], "data.cache_dir=file/cache: cannot be written"),
    "run folder": (["--workdir=file/run"], "--workdir=file/run cannot be written"),
    "run folder without permission": (["--workdir=/proc/run"], "--workdir=/proc/run cannot be written"),
    "cache without permission": (["--config.data.cache_dir=/proc/cache"], "data.cache_dir=/proc/cache: cannot be"),
    "steps": (["--config.train.steps=0"], "train.steps=0 must be at least 1"),
    "batch": (["--config.train.batch_size=0"], "train.batch_size=0 must be at least 1"),
    "updates left out": (["--config.train.skip_nonfinite=-1"], "train.skip_nonfinite=-1 must be 0 or more"),
    "interval": (["--config.checkpoint.every_seconds=-1"], "checkpoint.every_seconds=-1.0 must be 0 or more"),
    "checkpoints kept": (["--config.checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1"),
    "patience": (["--config.watchdog.frozen_seconds=0"], "watchdog.frozen_seconds=0 must be at least 1"),
    "change": (["--config.resume.allow=seed"], "resume.allow=seed cannot be changed in a run that has begun"),
    "layout": (["--config.data.layout=pears"], "data.layout='pears' is unknown (did you mean 'pairs'?)"),
    "source": (["--config.data.source=web"], "data.source='web' is unknown"),
    "kernel": (["--config.model.kernel=fast"], "model.kernel='fast' is unknown"),
    "kernel of another device": (["--config.model.kernel=pallas_gpu"], "model.kernel=pallas_gpu can't serve this"),
    "dtype": (["--config.model.dtype=float61"], "model.dtype='float61' is unknown"),
    "mixer": (["--config.model.mixer=atention"], "model.mixer='atention' is unknown (did you mean 'attention'?)"),
    "clip": (["--config.optimizer.clip=0"], "optimizer.clip=0.0 must be positive"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_leaves_nothing(home, capsys, name):
    args, message = ERRORS[name]
    (home / "runs.txt").mkdir()
    before = contents(home)
    assert message in error_of([CONFIG, *([] if "--workdir" in args[0] else [RUN]), *args], capsys)
    assert contents(home) == before
    assert not list(home.glob("cache/*.partial-*"))


def test_a_disk_without_room_for_the_checkpoints_is_one_line_and_leaves_nothing(home, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    before = contents(home)
    assert "runs/test/checkpoints has room for 1.00kB, and 4 checkpoints" in error_of([CONFIG, RUN], capsys)
    assert contents(home) == before


def test_a_run_folder_is_of_one_configuration_and_one_tokenizer(home, capsys, monkeypatch):
    folder = home / "runs" / "test"

    def stop(run):
        raise KeyboardInterrupt

    monkeypatch.setattr("convattn_jax.pretrain._Run.complete", stop)  # before anything is trained
    with pytest.raises(SystemExit) as stopped:
        main.main(["main", CONFIG, RUN])
    assert stopped.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert error_of([CONFIG, RUN, "--config.model.radius=3"], capsys) == (
        "error: runs/test was made with model.radius=2, not 3: give that value, or another --workdir\n"
    )
    assert "seed=0, not 1" in error_of([CONFIG, RUN, "--config.seed=1"], capsys)

    mine = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(mine[:-1])
    assert "tokenizer.model" in error_of([CONFIG, RUN], capsys)

    main_config = home / "config.py"
    other = main_config.read_text().replace("**{}", "**{'tokenizer__vocab_size': 44}")
    assert other != main_config.read_text()
    (home / "other.py").write_text(other)
    with pytest.raises(SystemExit):
        main.main(["main", "--config=other.py", "--workdir=runs/other"])
    capsys.readouterr()
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).write_bytes((home / "runs" / "other" / name).read_bytes())
    assert "tokenizer.model is not the tokenizer of this run: restore it" in error_of([CONFIG, RUN], capsys)


def test_a_full_disk_is_one_line_and_another_failure_is_not_hidden(home, capsys, monkeypatch):
    for name, said in ((("runs/test/metrics.jsonl",), "runs/test/metrics.jsonl"), ((), "runs/test")):

        def full(run, name=name):
            raise OSError(28, "No space left on device", *name)

        monkeypatch.setattr("convattn_jax.pretrain._Run.complete", full)
        told = error_of([CONFIG, RUN], capsys)
        assert told.startswith(f"error: --workdir: No space left on device ({said}): make room")

    def broken(run):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("convattn_jax.pretrain._Run.complete", broken)
    with pytest.raises(OSError, match="Invalid"):
        main.main(["main", CONFIG, RUN])


def command(*args):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "convattn_jax.main", *args], capture_output=True, text=True, cwd=ROOT, env=environment
    )


def test_the_command_itself_ends_with_status_2_and_no_traceback(tmp_path):
    ended = command("--config=configs/composite.py:huge", f"--workdir={tmp_path / 'run'}")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "error: size 'huge' is unknown; known: tiny, small, base, large (as in configs/composite.py:small)\n"
    )
    assert not list(tmp_path.iterdir())


def test_the_command_without_a_configuration_lists_those_there_are():
    ended = command()
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --config=FILE is missing; there are: ")
    assert "configs/composite.py" in ended.stderr


def test_help_needs_no_configuration(capsys):
    main.main(["main", "--help"])
    assert "--config=FILE[:SIZE]" in capsys.readouterr().out


def test_a_run_starts_without_loading_what_it_needs_later(tmp_path):
    code = """if True:
        import sys
        from etils import epath
        from convattn_jax import checkpoint, events, pretrain
        checkpoints = checkpoint.Checkpoints(sys.argv[1] + "/checkpoints", 1)
        with events.recorder(epath.Path(sys.argv[1]) / "events", 1, True):
            assert checkpoints.restore(None) is None
        checkpoints.close()
        print({"matplotlib", "orbax.checkpoint", "tensorboardX"} & {*sys.modules})
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr
