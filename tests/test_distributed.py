"""Several processes are one run: they find each other, compute what one computes, and stop together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from processes import ROOT, free_port, start

from convattn_jax import distributed, main
from convattn_jax.config import Cluster, UserError

STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text, a configuration file and a cache."""
    home = tmp_path_factory.mktemp("home")
    tiny.write_corpus(home / "text.txt")
    tiny.write_config(home, train__steps=STEPS, train__eval_every=2, train__eval_rows=6, model__layers=1)
    return home


def arguments(home, run, *more):
    return [f"--config={home / 'config.py'}", f"--workdir={home / run}", *more]


@pytest.fixture(scope="module")
def alone(home):
    """The run folder of one process."""
    main.main(["main", *arguments(home, "alone")])
    return home / "alone"


def assert_same_curve(run, alone):
    """All logged figures agree to 1e-4, which is the order of sums and nothing else: six digits are usual."""
    found, expected = tiny.metrics(run), tiny.metrics(alone)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} at step {a['step']}")


def back_to(run, step):
    """Takes a run back to its checkpoint of a step."""
    later = [path for path in (run / "checkpoints").iterdir() if int(path.name) > step]
    assert later
    for path in later:
        shutil.rmtree(path)
    (run / "summary.json").unlink()


def train_and_hand_over(home, alone, count):
    """`count` processes train, one goes on from their checkpoint, and they from its."""
    name = f"by {count}"
    run = home / name
    for ended in start(count, arguments(home, name, "--config.mesh.data=1", "--config.mesh.fsdp=-1")):
        assert ended.code == 0, ended.err
    assert_same_curve(run, alone)
    assert {path.name for path in run.iterdir()} == {path.name for path in alone.iterdir()}
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (run, alone))
    assert summary["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)

    back_to(run, STEPS - 1)
    main.main(["main", *arguments(home, name)])
    assert_same_curve(run, alone)

    back_to(run, STEPS - 1)  # `tensor` spans the processes: two of them read the same rows
    ends = start(count, arguments(home, name, "--config.mesh.tensor=2"))
    for ended in ends:
        assert ended.code == 0, ended.err
    assert f"resumed from step {STEPS - 1}" in ends[0].out
    assert "step" not in ends[1].out
    assert_same_curve(run, alone)


def test_two_processes_train_as_one_does_and_each_goes_on_from_the_others_checkpoint(home, alone):
    train_and_hand_over(home, alone, 2)


@pytest.mark.slow
def test_four_processes_train_as_one_does_and_each_goes_on_from_the_others_checkpoint(home, alone):
    train_and_hand_over(home, alone, 4)


def test_all_stop_with_one_line_when_one_has_another_configuration(home):
    ends = start(2, arguments(home, "never"), {1: ["--config.train.steps=7"]})
    for ended in ends:
        assert ended.code == 2
        assert [line for line in ended.err.splitlines() if line.startswith("error: ")] == [
            line for line in ended.err.splitlines() if "host 1 (" in line and "has train.steps=7, host 0 (" in line
        ]
        assert "error: " in ended.err
    assert not (home / "never").exists()


# --- what is said between hosts, with a second host played by the test ---


@pytest.fixture
def second(monkeypatch):
    """A function that sets what a second host says to the i-th question, given what the first says."""

    def play(*answers):
        left = list(answers)

        def gather(text):
            answer = left.pop(0)
            return [text, answer(text) if callable(answer) else answer]

        monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
        monkeypatch.setattr(distributed, "gather", gather)

    return play


def test_facts_that_agree_are_no_matter(second):
    second(lambda text: text)
    distributed.check_same({"data": "abc", "seed": 0})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"seed": "1", "jax": "'2'"}, r"^host 1 \(b\) has seed=1, host 0 .* has 0: all hosts need the same$"),
        ({"seed": "0"}, "has jax=nothing, host 0 .* has '2'"),
        ({"seed": "0", "jax": "'2'", "a.py": "'ff'"}, "has a.py='ff', host 0 .* has nothing"),
    ],
)
def test_the_host_and_what_differs_are_named(second, facts, message):
    second(json.dumps(["host 1 (b)", facts]))
    with pytest.raises(UserError, match=message):
        distributed.check_same({"seed": 0, "jax": "2"})


def test_what_fails_on_one_host_fails_on_all(second):
    second(json.dumps(["host 1 (b)", "data.files: none.txt is not there"]))
    with pytest.raises(UserError, match=r"^host 1 \(b\): data\.files: none\.txt is not there$"), distributed.together():
        pass


def test_what_fails_here_is_told_to_the_others(second):
    told = []
    second(lambda text: told.append(json.loads(text)) or json.dumps(["host 1 (b)", ""]))
    with pytest.raises(UserError, match=r"^host 0 .*: KeyError: 'x'$"), distributed.together():
        {}["x"]
    assert told[0][1] == "KeyError: 'x'"


def test_a_folder_of_ones_own_is_found_out(second, tmp_path):
    same = json.dumps(["host 1 (b)", ""])
    second(same, "null", same, json.dumps(["host 1 (b)", "--workdir=run is another folder than host 0's"]))
    with pytest.raises(UserError, match="is another folder than host 0's"):
        distributed.check_shared(epath.Path(tmp_path))
    assert not tmp_path.exists()  # it was empty


def test_the_code_is_known_by_its_files_and_libraries():
    facts = distributed.code()
    assert {"convattn_jax/train.py", "convattn_jax/data/rows.py", "jax", "optax"} <= facts.keys()


def test_each_host_may_have_its_own_cache():
    assert distributed.configuration({"seed": 0, "data.cache_dir": "/a", "data.files": ("a",)}) == {
        "seed": 0,
        "data.files": ["a"],
    }


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "method"),
    [
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "2"}, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # an allocation's shell: no task of a step
        ({"OMPI_MCA_orte_hnp_uri": "1;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "1"}, "k8s"),
        ({"KUBERNETES_SERVICE_HOST": "a"}, None),  # a notebook's pod
    ],
)
def test_a_launcher_is_known_by_its_environment(monkeypatch, environment, method):
    monkeypatch.setattr(distributed, "_has_tpu", lambda: False)
    assert distributed.detected(environment) == method


def test_a_cloud_tpu_is_known_by_its_devices(monkeypatch):
    monkeypatch.setattr(distributed, "_has_tpu", lambda: True)
    assert distributed.detected({"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "1"}) == "tpu"
    assert distributed.detected({"TPU_SKIP_MDS_QUERY": "1"}) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), "--coordinator, --processes and --process go together"),
        (("", 2, 0), "--coordinator, --processes and --process go together"),
        (("host", 2, 0), "--coordinator=host must be host:port"),
        (("host:0", 2, 0), "--coordinator=host:0 must be host:port, with a port from 1 to 65535"),
        (("host:65536", 2, 0), "--coordinator=host:65536 must be host:port"),
        (("host:1", 2, 2), r"--process=2 must lie in \[0, 2\)"),
    ],
)
def test_senseless_flags_are_errors(flags, message):
    with pytest.raises(UserError, match=message):
        Cluster(*flags)


def test_a_process_that_reaches_nobody_says_so(monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED:\n nobody there")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", unreachable)
    with pytest.raises(
        UserError, match=r"^--coordinator=a:1: .*\(DEADLINE_EXCEEDED: nobody there\): start all of them, with"
    ):
        distributed.start(Cluster("a:1", 2, 0))


def test_a_port_that_another_run_listens_on_is_refused():
    with socket.create_server(("localhost", 0)) as taken:
        where = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^--coordinator={where}: Address already in use: .* name another port"):
            distributed.start(Cluster(where, 2, 0))
    distributed.check_port(where)


@pytest.mark.parametrize(
    ("this", "told", "message"),
    [
        (0, {"1": "2", "2": "2"}, r"^process 0 was told --processes=3, process 1 --processes=2: all need the same$"),
        (2, {"0": "2"}, r"^process 2 was told --processes=3, process 0 --processes=2: all need the same$"),
    ],
)
def test_processes_that_were_told_different_numbers_find_out(monkeypatch, this, told, message):
    class Store:
        def key_value_set(self, key, value):
            assert (key, value) == (f"convattn/processes/{this}", "3")

        def blocking_key_value_get(self, key, _):
            return told[key.removeprefix("convattn/processes/")]

    monkeypatch.setattr(distributed.runtime.global_state, "client", Store())
    monkeypatch.setattr(distributed.jax, "process_index", lambda: this)
    with pytest.raises(UserError, match=message):
        distributed._check_count(3)


IMPATIENT = """
import sys
from convattn_jax import distributed, main
distributed.QUIET_SECONDS, distributed.JOIN_SECONDS = 0.1, float(sys.argv.pop())
main.main()
"""


@pytest.mark.parametrize(
    ("process", "signum", "code", "last"),
    [
        (0, signal.SIGTERM, 0, "stopped by SIGTERM: the same command goes on from here"),
        (1, signal.SIGINT, 130, "interrupted: the same command resumes from the last checkpoint"),
        (
            0,
            None,
            2,
            "error: --coordinator={where}: the others have not all come within 0.2 seconds: start all",
        ),
        (
            1,
            None,
            2,
            "error: --coordinator={where}: the others have not all come within 0.2 seconds: start all",
        ),
    ],
)
def test_who_waits_for_others_can_be_stopped_and_gives_up(home, process, signum, code, last):
    """Within JAX's runtime no signal would reach it, and after five minutes it would abort with 78 lines of stacks."""
    where = f"localhost:{free_port()}"
    others = [f"--coordinator={where}", "--processes=2", f"--process={process}"]
    waiting = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *arguments(home, "never"), *others, "60" if signum else "0.2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stderr is not None
        first = waiting.stderr.readline()
        if signum:
            waiting.send_signal(signum)
        rest = waiting.communicate(timeout=60)[1]
    finally:
        waiting.kill()
    assert first.startswith(f"--coordinator={where}: waiting for the other processes, ")
    assert rest.startswith(last.format(where=where))
    assert rest.count("\n") == 1
    assert waiting.returncode == code
    assert not (home / "never").exists()


@pytest.mark.parametrize("reason", [AssertionError(""), RuntimeError("Unable to initialize backend 'cuda':\n none")])
def test_a_device_that_is_not_there_is_one_line(monkeypatch, reason):
    def missing():
        raise reason

    monkeypatch.setattr(distributed.jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    said = r"^JAX_PLATFORMS=cuda: JAX finds no such device \(.{9,}\): install .*, or unset"
    with pytest.raises(UserError, match=said):
        distributed.check_devices()


def _reserved(monkeypatch, put=jax.device_put):
    """What was put where, and what its thread raised, of a process with GPUs (here CPUs that are called so)."""
    placed, errors = [], []
    monkeypatch.setattr(distributed.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(distributed.jax, "device_put", lambda *args: placed.extend(put(*args)))
    monkeypatch.setattr(threading, "excepthook", errors.append)
    distributed.reserve_memory()
    for thread in threading.enumerate():
        if thread.name == "reserve-memory":
            thread.join()
    return placed, errors


def test_every_gpu_of_a_process_reserves_its_memory_while_the_host_has_other_work(monkeypatch):
    placed, errors = _reserved(monkeypatch)
    assert [array.device for array in placed] == jax.local_devices()
    assert errors == []


def test_a_gpu_without_free_memory_is_left_to_the_run_to_explain(monkeypatch):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    assert _reserved(monkeypatch, full) == ([], [])


def test_a_process_alone_joins_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "detected", lambda environment: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    distributed.start(Cluster())
    assert distributed.gather("x") == ["x"]
    assert distributed.from_first(lambda: 3) == 3
