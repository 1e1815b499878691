"""Runs in a bucket that a server on this machine holds, through gcsfs, TensorStore and Orbax as they are."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from bucket_server import serve
from etils import epath
from processes import free_port

pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 8
RUN, CACHE = "gs://bucket/runs/a", "gs://bucket/cache"


@pytest.fixture
def server():
    with serve("bucket") as server:
        yield server


@pytest.fixture
def objects(server):
    return server.buckets["bucket"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A text, a configuration, and a local run that nobody touched."""
    home = tmp_path_factory.mktemp("home")
    os.utime(tiny.write_corpus(home / "text.txt"), (0, 0))
    tiny.write_config(home, train__steps=STEPS, train__log_every=2, train__eval_every=4, model__layers=1)
    ended = subprocess.run(command(home, home / "local", home / "cache"), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return home


def command(home, run, cache, *more):
    line = [sys.executable, "-m", "convattn_jax.main", f"--config={home / 'config.py'}", f"--workdir={run}"]
    return [*line, f"--config.data.cache_dir={cache}", *more]


@pytest.fixture
def start(server, home, tmp_path):
    """Starts a process on the host of that name, which reaches the bucket."""

    def started(*more, run=RUN, cache=CACHE, host="first", line=None, **environment):
        environment = {**os.environ, **server.environment, "HOME": str(tmp_path / host), **environment}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(line or command(home, run, cache, *more), env=environment, **pipes)

    return started


def ended(process, code=0):
    """What a process has said."""
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code, said
    return said


def killed(process, objects, when):
    """Kills a process as soon as `when` holds of the names in the bucket."""
    while not any(map(when, objects.names())):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def fetched(objects, folder):
    """The run folder as files."""
    for name in objects.names("runs/a/"):
        path = folder / pathlib.PurePosixPath(name).relative_to("runs/a")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(objects.objects[name][0])
    return folder


def assert_same_end(objects, home, tmp_path):
    """The run in the bucket has the rows, summary and last state of the local one, bit for bit."""
    run, local = fetched(objects, tmp_path / "fetched"), home / "local"
    assert tiny.metrics(run) == tiny.metrics(local)
    found, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run, local))
    assert found["eval_loss"] == expected["eval_loss"]
    assert {path.name for path in run.iterdir()} - {"owner.json"} == {path.name for path in local.iterdir()} - {
        "events"
    }
    with ocp.StandardCheckpointer() as orbax:
        for item in ("params", "rest"):
            states = [orbax.restore(epath.Path(folder / "checkpoints" / str(STEPS) / item)) for folder in (run, local)]
            jax.tree.map(np.testing.assert_array_equal, *states)


def is_voucher(name):
    return name.startswith("runs/a/checkpoints/") and name.endswith("/manifest.json")


def is_array(name):
    """Of the second checkpoint: the first is whole or nearly so by then."""
    return name.startswith("runs/a/checkpoints/4/") and "/d/" in name


@pytest.mark.parametrize("when", [is_voucher, is_array])
def test_a_run_in_a_bucket_is_killed_goes_on_elsewhere_and_ends_like_a_local_one(start, objects, home, tmp_path, when):
    killed(start(), objects, when)
    said = ended(start(host="second"))
    assert "resumed from step" in said
    assert f"copying {CACHE}/rows-" in said
    assert "tokenizing" not in said
    assert_same_end(objects, home, tmp_path)
    assert "finished: checkpoint 8 and its files are whole" in ended(start(host="third"))


def test_damage_in_a_bucket_is_found_and_trained_anew(start, objects, home, tmp_path):
    ended(start())
    name = next(name for name in objects.names(f"runs/a/checkpoints/{STEPS}/params/") if "/d/" in name)
    content, _ = objects.objects[name]
    objects.put(name, content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    said = ended(start())
    assert f"checkpoint {STEPS} is damaged ({name.partition(f'/{STEPS}/')[2]} is changed): passed over" in said
    assert "resumed from step" in said
    assert_same_end(objects, home, tmp_path)


def test_fine_tuning_reads_and_writes_a_bucket(start, objects, home):
    objects.put("text/a.txt", (home / "text.txt").read_bytes())
    ended(start("--config.data.files=gs://bucket/text/*.txt", "--config.data.heldout_fraction=0.3"))
    probe = ["--config.glue.tasks=word_order", "--config.glue.length=16", "--config.glue.save_seconds=0"]
    line = [sys.executable, "-m", "convattn_jax.main", f"--config={ROOT / 'configs' / 'glue.py'}", *probe]
    said = ended(start(line=[*line, f"--config.init_from={RUN}"]))
    assert "Traceback" not in said
    assert objects.names("runs/a-glue/tasks/word_order/")
    assert {f"runs/a-glue/{name}" for name in ("results.json", "results.png")} <= set(objects.names("runs/a-glue/"))
    assert not objects.names("runs/a-glue/unfinished/")
    before = len(objects.written)
    ended(start(line=[*line, f"--config.init_from={RUN}"]))
    assert not [name for name in objects.written[before:] if name.startswith("runs/a-glue/checkpoints")]


def test_several_processes_train_in_a_bucket(start, objects, home, tmp_path):
    count = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", f"--coordinator=localhost:{free_port()}", "--processes=2")
    hosts = [start(*count, f"--process={i}", host=f"host {i}") for i in range(2)]
    first, second = [ended(process) for process in hosts]
    assert "tokenizing" in first
    assert "tokenizing" not in second
    assert all((tmp_path / f"host {i}").glob(".cache/convattn_jax/*/rows-*") for i in range(2))
    assert [row["step"] for row in tiny.metrics(fetched(objects, tmp_path / "run"))] == [2, 4, 6, 8]
    assert "finished: checkpoint 8 and its files are whole" in ended(start())


def test_no_listing_is_remembered_for_others_write_there_too(start, objects):
    looks = "from convattn_jax.data import bucket; folder = bucket.opened('gs://bucket/a'); "
    looks += "look = lambda: print(sorted(path.name for path in folder.iterdir()), flush=True); look(); input(); look()"
    objects.put("a/x", b"")
    process = start(line=[sys.executable, "-c", looks])
    assert process.stdout.readline() == "['x']\n"
    objects.put("a/y", b"")
    assert process.communicate("\n", timeout=60)[0] == "['x', 'y']\n"


def test_compiled_programs_are_found_in_a_bucket(start, objects):
    cache = "--compile_cache=gs://bucket/compiled"
    ended(start(cache))
    programs = objects.names("compiled/")
    assert programs
    objects.read.clear()
    ended(start(cache, run="gs://bucket/runs/b", host="second"))
    assert set(programs) <= objects.read


ERRORS = {
    "no bucket": ({"run": "gs://other/run"}, "--workdir=gs://other/run: there is no bucket gs://other"),
    "no bucket for the cache": (
        {"cache": "gs://other/c"},
        "data.cache_dir=gs://other/c: there is no bucket gs://other",
    ),
    "no library": ({"GCSFS": "no"}, f"--workdir={RUN} needs a library: pip install 'convattn_jax[gcs]'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_with_a_bucket_is_one_line(start, objects, case, tmp_path):
    (tmp_path / "gcsfs.py").write_text("raise ImportError('hidden')")
    changes, message = ERRORS[case]
    changes = dict(changes)
    if changes.pop("GCSFS", None):
        changes["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = ended(start(**changes), code=2)
    assert f"\nerror: {message}" in f"\n{said}"
    assert "Traceback" not in said
    assert not objects.names()


@pytest.mark.parametrize(("method", "status"), [("GET", 403), ("POST", 403), ("POST", 401)])
def test_a_bucket_that_refuses_is_one_line(start, objects, method, status):
    objects.refused = {method: status}
    said = ended(start(), code=2)
    assert f"error: --workdir={RUN} cannot be reached (" in said
    assert "does not have access" in said
    assert "Traceback" not in said
    assert not objects.names()
