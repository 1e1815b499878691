"""launch/tpu_vm.sh from asking for a slice to the end of the run: preempted, stopped, failing, disconnected."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
from stage import ARGUMENTS, LAUNCH, ROOT, TPU, Stage, wait_for


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_a_slice_is_asked_for_waited_for_and_trains_on_every_worker(stage):
    stage.plan(slices=["WAITING_FOR_RESOURCES PROVISIONING ACTIVE"])
    said = stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU, SPOT="yes")
    assert said.returncode == 0, said.stderr
    assert "training" in said.stdout
    create = stage.calls("gcloud")[1]
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(create)
    assert stage.verbs()[:5] == ["queued-resources list", "queued-resources create", *3 * ["queued-resources list"]]
    assert stage.calls("python") == 2 * [("python", "-m", "convattn_jax.main", *ARGUMENTS)]
    for worker in ("worker0", "worker1"):
        code = stage.folder / worker / "convattn_jax"
        assert (code / "convattn_jax" / "main.py").read_text() == (ROOT / "convattn_jax" / "main.py").read_text()
        assert (code / "configs" / "base.py").exists()
        assert not list(code.rglob("__pycache__"))
    installs = [call for call in stage.calls("uv") if "install" in call]
    assert [call[-1] for call in installs] == 2 * [".[tpu,gcs]"]
    assert "queued-resources delete" not in stage.verbs()  # its disks may hold the run


def test_a_preempted_slice_is_deleted_asked_for_again_and_the_same_command_resumes(stage):
    stage.plan(runs=["preempted", 0])
    said = stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU, SPOT="yes")
    assert said.returncode == 0, said.stderr
    assert "preempted; going on from the last checkpoint" in said.stderr
    verbs = [verb for verb in stage.verbs() if verb.startswith("queued") and not verb.endswith("list")]
    assert verbs == ["queued-resources create", "queued-resources delete", "queued-resources create"]
    assert stage.calls("python") == 4 * [("python", "-m", "convattn_jax.main", *ARGUMENTS)]


def test_a_slice_preempted_before_it_trains_is_asked_for_again(stage):
    stage.plan(slices=["PROVISIONING SUSPENDING SUSPENDED", "ACTIVE"])
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU).returncode == 0
    assert stage.verbs().count("queued-resources create") == 2


def test_a_preempted_vm_made_at_once_is_made_again(stage):
    (stage.folder / "slice").write_text("PREEMPTED")
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU, QUEUED="no").returncode == 0
    assert [v for v in stage.verbs() if v in ("tpu-vm create", "tpu-vm delete")] == ["tpu-vm delete", "tpu-vm create"]
    assert not any("queued" in verb for verb in stage.verbs())


@pytest.mark.parametrize("ends", ["stopped", "1"])
def test_a_run_that_is_stopped_or_fails_starts_again_on_the_same_slice(stage, ends):
    stage.plan(runs=[ends, 0])
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU).returncode == 0
    assert stage.verbs().count("queued-resources create") == 1
    assert len(stage.calls("python")) == 4


def test_a_run_that_fails_again_and_again_ends_the_script_with_its_status(stage):
    stage.plan(runs=[7, 7, 7])
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU, RESTARTS="1").returncode == 7
    assert len(stage.calls("python")) == 4
    assert stage.verbs().count("queued-resources create") == 1


def test_what_the_user_has_to_mend_ends_the_script_at_once(stage):
    stage.plan(runs=[2])
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU).returncode == 2
    assert len(stage.calls("python")) == 2


def test_a_slice_that_will_never_come_ends_the_script(stage):
    stage.plan(slices=["WAITING_FOR_RESOURCES FAILED"])
    said = stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU)
    assert said.returncode == 1
    assert "convattn is FAILED" in said.stderr
    assert not any(verb in ("tpu-vm scp", "queued-resources delete") for verb in stage.verbs())


def test_a_copy_that_fails_installs_and_starts_nothing(stage):
    stage.plan(connections=["fine", "lost"])  # `progress` comes through, scp does not
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU, RESTARTS="0").returncode == 1
    assert not stage.calls("uv", "python")


def test_an_archive_that_fails_is_not_sent(stage):
    settings = TPU | {"TMPDIR": "/nowhere", "RESTARTS": "0"}
    assert stage.run("tpu_vm.sh", "train", *ARGUMENTS, **settings).returncode != 0
    assert "tpu-vm scp" not in stage.verbs()


@pytest.mark.parametrize("queued", ["yes", "no"])
def test_a_lost_connection_is_made_again_and_starts_nothing_twice(stage, queued):
    # progress, scp, unpacking, installing, starting come through; the log and what became of the run do not
    stage.plan(connections=[*5 * ["fine"], "lost", "lost"])
    said = stage.run("tpu_vm.sh", "train", *ARGUMENTS, **TPU, QUEUED=queued)
    assert said.returncode == 0, said.stderr
    assert "the connection was lost; following again" in said.stderr
    assert len(stage.calls("python")) == 2


def test_typed_again_it_follows_the_run_that_is_at_work(stage):
    stage.plan(runs=["wait"])
    for step in (["create"], ["wait"], ["copy"], ["install"], ["run", *ARGUMENTS]):
        assert stage.run("tpu_vm.sh", *step, **TPU).returncode == 0
    trainer = wait_for(stage.folder / "waiting")
    while len(stage.calls("python")) < 2:
        time.sleep(0.01)
    stage.forget()
    again = subprocess.Popen(
        [LAUNCH / "tpu_vm.sh", "train", *ARGUMENTS], env=stage.environment(TPU), stdout=subprocess.PIPE, text=True
    )
    assert again.stdout is not None
    assert again.stdout.readline() == "training\n"
    os.kill(int(trainer), signal.SIGTERM)
    assert again.wait(30) == 0
    again.stdout.close()
    assert not stage.calls("python")
    assert not any(verb in ("tpu-vm scp", "queued-resources create") for verb in stage.verbs())


def test_a_start_ends_what_is_left_of_a_run_before(stage):
    stage.plan(runs=["wait", 0])
    for step in (["create"], ["wait"], ["copy"], ["install"], ["run", *ARGUMENTS]):
        assert stage.run("tpu_vm.sh", *step, **TPU).returncode == 0
    trainer = wait_for(stage.folder / "waiting")
    assert stage.run("tpu_vm.sh", "run", *ARGUMENTS, **TPU).returncode == 0
    wait_for(stage.folder / "worker0" / "convattn_jax" / "run.status")
    assert ended(trainer)


def ended(process):
    try:
        return pathlib.Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
