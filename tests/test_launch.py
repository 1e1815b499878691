"""launch/: what each script asks of gcloud, kubectl, docker, SLURM and this machine, and what it does if they fail."""

import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from stage import ARGUMENTS, LAUNCH, ROOT, TPU, Stage, wait_for

SCRIPTS = ("local.sh", "slurm.sbatch", "tpu_vm.sh", "gke.sh")
GKE = {"IMAGE": "registry/convattn@sha256:1", "TYPE": "tpu-v6e-slice", "TOPOLOGY": "4x4"}
OUTSIDE = ("gcloud", "kubectl", "docker", "sbatch", "srun", "squeue")


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_setting_and_does_nothing(stage, script):
    said = stage.run(script, "--help")
    assert said.returncode == 0
    settings = set(re.findall(r"\$\{([A-Z][A-Z_]+)[:+}-]", (LAUNCH / script).read_text()))
    for name in {"--dry-run", "ARGUMENTS", *(s for s in settings if not s.startswith(("SLURM_", "TMPDIR")))}:
        assert re.search(rf"(?<!\w){name}(?!\w)", said.stdout), name
    assert all(len(line) <= 120 for line in said.stdout.splitlines())
    assert not stage.calls()


STEPS = {
    "tpu create": ("tpu_vm.sh", ["create"], TPU | {"SPOT": "yes", "PROJECT": "mine"}),
    "tpu create at once": ("tpu_vm.sh", ["create"], TPU | {"QUEUED": "no", "NAME": "other"}),
    "tpu wait": ("tpu_vm.sh", ["wait"], TPU),
    "tpu copy": ("tpu_vm.sh", ["copy"], TPU),
    "tpu install": ("tpu_vm.sh", ["install"], TPU),
    "tpu run": ("tpu_vm.sh", ["run", *ARGUMENTS], TPU),
    "tpu log": ("tpu_vm.sh", ["log"], TPU),
    "tpu delete": ("tpu_vm.sh", ["delete"], TPU),
    "gke build": ("gke.sh", ["build"], GKE),
    "gke run": ("gke.sh", ["run", *ARGUMENTS], GKE),
    "gke log": ("gke.sh", ["log"], GKE),
    "gke delete": ("gke.sh", ["delete"], GKE),
    "slurm": ("slurm.sbatch", ARGUMENTS, {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_dry_run_runs_nothing_and_prints_what_can_be_pasted(stage, name):
    script, words, settings = STEPS[name]

    def begin():
        stage.forget()
        stage.plan(kubectl_get=["Completed"])
        for path in stage.folder.glob("worker*"):
            shutil.rmtree(path)
        for home in ("worker0", "worker1") if script == "tpu_vm.sh" and words[0] != "create" else ():
            shutil.copytree(stage.folder / "image", stage.folder / home)
            (stage.folder / home / "convattn_jax").mkdir()
            (stage.folder / home / "convattn_jax" / "run.log").touch()
            (stage.folder / home / "convattn_jax" / "run.status").write_text("0\n")
            (stage.folder / home / "convattn_jax" / "run.pid").write_text("4194305\n")  # above any process
        (stage.folder / "slice").unlink(missing_ok=True)
        if words[0] != "create":
            (stage.folder / "slice").write_text("ACTIVE")

    begin()
    printed = stage.run(script, "--dry-run", *words, cwd=ROOT, **settings)
    assert printed.returncode == 0, printed.stderr
    assert not stage.calls()

    stage.run(script, *words, cwd=ROOT, **settings)
    real = stage.calls(*OUTSIDE)
    begin()
    stage.run(["bash", "-c", printed.stdout], cwd=ROOT, **settings)
    assert stage.calls(*OUTSIDE) == real
    assert real


@pytest.mark.parametrize("option", ["--dry-run", "--help"])
@pytest.mark.parametrize("name", [*STEPS, "local", "slurm submission"])
def test_an_option_holds_wherever_it_stands(stage, name, option):
    """Or else `tpu_vm.sh delete --dry-run` would delete."""
    outside_a_job = {"local": ("local.sh", ARGUMENTS, {}), "slurm submission": ("slurm.sbatch", ARGUMENTS, {})}
    script, words, settings = (STEPS | outside_a_job)[name]
    first, last = (stage.run(script, *line, cwd=ROOT, **settings) for line in ([option, *words], [*words, option]))
    assert (last.returncode, last.stdout) == (0, first.stdout)
    assert not stage.calls()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_one_line(stage, script):
    said = stage.run(script)
    assert (said.returncode, said.stdout) == (2, "")
    assert re.fullmatch(r"error: .*see --help\)\n", said.stderr)
    assert not stage.calls()


@pytest.mark.parametrize(
    ("script", "words", "settings", "message"),
    [
        ("tpu_vm.sh", ["train"], {}, "ZONE is not set"),
        ("tpu_vm.sh", ["create"], {"ZONE": "z"}, "TYPE is not set"),
        ("tpu_vm.sh", ["launch"], TPU, "launch is no step"),
        ("tpu_vm.sh", ["train", "--config=x", "--workdir=runs/x"], TPU | {"SPOT": "yes"}, "--workdir is not on gs://"),
        (
            "tpu_vm.sh",
            ["train", "--config=x"],
            TPU | {"SPOT": "no"},
            "--workdir is not on gs://: the hosts of v5litepod-16",
        ),
        ("gke.sh", ["run", *ARGUMENTS], {"IMAGE": "i", "TYPE": "t"}, "TOPOLOGY is not set"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"TOPOLOGY": "16"}, "TOPOLOGY=16 is none"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"CHIPS": "5"}, "TOPOLOGY=4x4 has 16 chips"),
        ("gke.sh", ["run", "--config=x", "--workdir=runs/x"], GKE, "--workdir is not on gs://"),
        ("gke.sh", ["apply"], GKE, "apply is no step"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"CHIPS": "0"}, "CHIPS=0 must be a whole number from 1 on"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"SPOT": "true"}, "SPOT=true must be yes or no"),
        ("tpu_vm.sh", ["create"], TPU | {"QUEUED": "1"}, "QUEUED=1 must be yes or no"),
        ("tpu_vm.sh", ["log"], TPU | {"WORKER": "all"}, "WORKER=all must be a whole number from 0 on"),
        ("local.sh", ["--config=x"], {"PROCESSES": "abc"}, "PROCESSES=abc must be a whole number from 1 on"),
        ("local.sh", ["--config=x"], {"DEVICES": "08"}, "DEVICES=08 must be a whole number from 1 on"),
        ("local.sh", ["--config=x"], {"PORT": "99999"}, "PORT=99999 is above 65535"),
        ("local.sh", ["--dryrun", "--config=x"], {}, "--dryrun is no option; did you mean --dry-run?"),
        ("local.sh", ["--config=x"], {"EXTRAS": "cuda]"}, "EXTRAS=cuda] has a character that no name has"),
        ("local.sh", ["--workdir=x"], {}, "what is to be run?"),
        ("slurm.sbatch", ["--workdir=x"], {}, "what is to be run?"),
        ("slurm.sbatch", ["--config=x"], {"NODES": "two"}, "NODES=two must be a whole number from 1 on"),
        ("tpu_vm.sh", ["train"], TPU, "what is to be run?"),
        ("tpu_vm.sh", ["run", "--config=", "--config.seed=1"], TPU, "what is to be run?"),
        ("tpu_vm.sh", ["delete", "other"], TPU, "delete takes no arguments, such as other"),
        ("tpu_vm.sh", ["create"], TPU | {"NAME": "my slice"}, "NAME=my slice has a character that no name has"),
        ("gke.sh", ["run", "--workdir=gs://b/x"], GKE, "what is to be run?"),
        ("gke.sh", ["delete", "--yes"], GKE, "delete takes no arguments, such as --yes"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"TOPOLOGY": "08x4"}, "TOPOLOGY=08x4 is none"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"TOPOLOGY": "0x4"}, "TOPOLOGY=0x4 is none"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"NAME": "Mine"}, "NAME=Mine must be of small letters"),
        ("gke.sh", ["run", *ARGUMENTS], GKE | {"IMAGE": 'a"b'}, 'IMAGE=a"b has a character that no name has'),
    ],
)
def test_wrong_settings_are_one_line_before_anything_is_asked_for(stage, script, words, settings, message):
    said = stage.run(script, *words, **settings)
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: {message}")
    assert said.stderr.count("\n") == 1
    assert not stage.calls()


# --- SLURM ---


def test_slurm_gets_one_process_a_gpu_time_to_save_and_leave_to_queue_again():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["signal"] == "TERM@90"
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert not any(line.startswith("#SBATCH") for line in lines[len(options) + 1 :])  # SLURM reads the first block


def test_outside_a_job_it_submits_itself(stage):
    assert stage.run("slurm.sbatch", *ARGUMENTS, NODES="2", GPUS="4").returncode == 0
    shape = ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"]
    expected = ("sbatch", f"--chdir={ROOT}", *shape, str(LAUNCH / "slurm.sbatch"), *ARGUMENTS)
    assert stage.calls() == [expected]


def test_a_refused_submission_fails(stage):
    stage.plan(sbatch=[1])
    assert stage.run("slurm.sbatch", *ARGUMENTS).returncode == 1


@pytest.mark.parametrize(
    ("left", "ran", "again"),
    [("1:29", 180, True), ("0:00", 9000, True), ("0:30", 100, False), ("3:00", 180, False), ("1-02:10:00", 180, False)],
)
def test_a_job_whose_time_is_up_queues_again_unless_that_was_at_once(stage, left, ran, again):
    stage.plan(squeue=[left])
    copy = shutil.copy(LAUNCH / "slurm.sbatch", stage.folder / "slurm_script")  # as SLURM does
    assert stage.run([copy], *ARGUMENTS, cwd=ROOT, SLURM_JOB_ID="7", SECONDS=str(ran)).returncode == 0
    srun = ("srun", "--kill-on-bad-exit=1", "python", "-m", "convattn_jax.main", *ARGUMENTS)
    assert stage.calls("srun") == [srun]
    assert stage.calls("scontrol") == ([("scontrol", "requeue", "7")] if again else [])


def test_a_job_submitted_elsewhere_says_so(stage):
    copy = shutil.copy(LAUNCH / "slurm.sbatch", stage.folder / "slurm_script")
    said = stage.run([copy], *ARGUMENTS, SLURM_JOB_ID="7")
    assert said.returncode == 2
    assert said.stderr.startswith("error: submit it in the repository's folder")
    assert not stage.calls()


def test_a_run_that_fails_fails_the_job_and_is_not_queued_again(stage):
    stage.plan(srun=[2], squeue=["0:30"])
    assert stage.run("slurm.sbatch", *ARGUMENTS, cwd=ROOT, SLURM_JOB_ID="7").returncode == 2
    assert not stage.calls("scontrol")


# --- Kubernetes ---


def jobset(stage, *words, **settings):
    said = stage.run("gke.sh", "run", *words, **(GKE | settings))
    assert said.returncode == 0, said.stderr
    assert stage.calls() == [("kubectl", "apply", "--namespace=default", "--filename=-")]
    return yaml.safe_load((stage.folder / "stdin").read_text())


def test_a_jobset_has_a_pod_for_each_host_and_the_arguments_unchanged(stage):
    manifest = jobset(stage, *ARGUMENTS, NAME="mine")
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "mine"
    [slice_] = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16 // 4
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    labels = {"cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice", "cloud.google.com/gke-tpu-topology": "4x4"}
    assert pod["nodeSelector"] == labels
    [container] = pod["containers"]
    assert container["args"] == ARGUMENTS
    assert container["image"] == GKE["IMAGE"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_preempted_pods_start_again_without_counting_as_failures(stage):
    manifest = jobset(stage, *ARGUMENTS, SPOT="yes", RESTARTS="5", TOPOLOGY="2x2x4")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert job["parallelism"] == 4


def container_command():
    text = (LAUNCH / "jobset.yaml").read_text()
    return [*yaml.safe_load(re.sub("@[A-Z_]+@", "1", text.replace("@SPOT@", "")))["spec"]["replicatedJobs"][0][
        "template"
    ]["spec"]["template"]["spec"]["containers"][0]["command"], *ARGUMENTS]  # fmt: skip


@pytest.mark.parametrize("status", [0, 3])
def test_a_pod_ends_as_its_run_does(stage, status):
    stage.plan(runs=[status])
    assert stage.run(container_command()).returncode == status
    assert stage.calls() == [("python", "-m", "convattn_jax.main", *ARGUMENTS)]


def test_a_pod_told_to_stop_lets_the_run_save_and_does_not_count_as_finished(stage):
    stage.plan(runs=["wait"])
    pod = subprocess.Popen(container_command(), env=stage.environment({}), cwd=stage.folder, stdout=subprocess.DEVNULL)
    wait_for(stage.folder / "waiting")
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(30) == 143
    assert (stage.folder / "saved").read_text() == "saved\n"


@pytest.mark.parametrize(("end", "status"), [("Completed", 0), ("Failed", 1)])
def test_the_log_is_followed_through_restarts_until_the_jobset_ends(stage, end, status):
    stage.plan(kubectl_logs=[1, "step 1", "step 2"], kubectl_get=["", "", end])
    said = stage.run("gke.sh", "log", NAME="mine")
    assert said.returncode == status
    assert said.stdout == "step 1\nstep 2\n"
    selector = "--selector=jobset.sigs.k8s.io/jobset-name=mine,batch.kubernetes.io/job-completion-index=0"
    assert sum(selector in call for call in stage.calls("kubectl")) == 3


def test_a_jobset_that_is_gone_ends_the_log(stage):
    stage.plan(kubectl_get=[1])
    assert stage.run("gke.sh", "log").returncode == 1


def test_the_image_holds_the_code_that_is_copied_to_tpu_vms():
    copied = {word for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
              for word in line.split()[1:-1]}  # fmt: skip
    tar = next(line for line in (LAUNCH / "tpu_vm.sh").read_text().splitlines() if "tar -czf" in line)
    sent = {word for word in shlex.split(tar) if (ROOT / word).exists()} - {"run"}
    assert copied == sent == {"pyproject.toml", "README.md", "LICENSE", "convattn_jax", "configs"}


# --- this machine ---


@pytest.fixture
def clone(stage):
    """A clone of the launch scripts whose .venv is installed."""
    shutil.copytree(LAUNCH, stage.folder / "clone" / "launch")
    (stage.folder / "clone" / ".venv" / "bin").mkdir(parents=True)
    (stage.folder / "clone" / ".venv" / "installed").touch()
    (stage.folder / "clone" / ".venv" / "bin" / "python").symlink_to(stage.folder / "bin" / "python")
    return stage.folder / "clone" / "launch" / "local.sh"


def test_a_fresh_clone_is_installed_once_for_all_that_is_asked_for(stage, clone):
    (clone.parent.parent / ".venv" / "installed").unlink()
    run = ("python", "-m", "convattn_jax.main", *ARGUMENTS)
    for extras in ("", "cuda,gcs"):
        stage.forget()
        for _ in range(2):
            assert stage.run([clone], *ARGUMENTS, EXTRAS=extras).returncode == 0
        venv, pip, *runs = stage.calls()
        assert venv == ("python3", "-m", "venv", ".venv")
        what = f".[{extras}]" if extras else "."
        assert pip == ("python", "-m", "pip", "install", "--quiet", "--editable", what)
        assert runs == [run, run]


def test_a_link_to_a_script_finds_the_rest(stage, clone):
    link = stage.folder / "run-it"
    link.symlink_to(clone)
    assert stage.run([link], *ARGUMENTS).returncode == 0
    assert stage.calls() == [("python", "-m", "convattn_jax.main", *ARGUMENTS)]


def test_a_failed_run_fails(stage, clone):
    stage.plan(runs=[2])
    assert stage.run([clone], *ARGUMENTS).returncode == 2


def test_several_processes_are_told_who_they_are_and_one_that_fails_fails_all(stage, clone):
    stage.plan(runs=[0, 5, 0])
    said = stage.run([clone], *ARGUMENTS, PROCESSES="3", PORT="999")
    assert said.returncode == 5
    words = ["-m", "convattn_jax.main", *ARGUMENTS, "--coordinator=localhost:999", "--processes=3"]
    assert sorted(stage.calls("python")) == [("python", *words, f"--process={i}") for i in range(3)]


def test_each_run_meets_at_a_port_of_its_own(stage, clone):
    for _ in range(2):
        assert stage.run([clone], *ARGUMENTS, PROCESSES="2").returncode == 0
    ports = [
        word.rpartition(":")[2] for call in stage.calls("python") for word in call if word.startswith("--coordinator=")
    ]
    assert len(ports) == 4
    assert all(20_000 <= int(port) < 32_000 for port in ports)
    assert len(set(ports)) == 2  # but for one time in 12,000


def test_processes_that_wait_for_one_that_has_failed_are_stopped(stage, clone):
    stage.plan(runs=["wait", 2])
    assert stage.run([clone], *ARGUMENTS, PROCESSES="2").returncode == 2
    assert 50 <= stage.calls("sleep").count(("sleep", "0.2")) < 500  # it had ten seconds to end by itself
    assert (stage.folder / "saved").read_text() == "saved\n"


def test_processes_told_to_stop_all_save(stage, clone):
    stage.plan(runs=["wait", "wait"])
    started = subprocess.Popen(
        [clone, *ARGUMENTS], env=stage.environment({"PROCESSES": "2"}), stdout=subprocess.DEVNULL
    )
    wait_for(stage.folder / "waiting")
    while (stage.folder / "plan" / "runs").exists():
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 0
    assert (stage.folder / "saved").read_text() == 2 * "saved\n"


def test_after_ctrl_c_the_processes_are_waited_for(stage, clone):
    """A terminal sends it to all of them: here to the script alone, which does not end before they do."""
    stage.plan(runs=["wait", "wait"])
    environment = stage.environment({"PROCESSES": "2"})
    started = subprocess.Popen([clone, *ARGUMENTS], env=environment, stdout=subprocess.DEVNULL)
    wait_for(stage.folder / "waiting")
    while (stage.folder / "plan" / "runs").exists():
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(0.5)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == 0
    assert (stage.folder / "saved").read_text() == 2 * "saved\n"


def test_local_dry_run_sets_up_virtual_devices(stage, clone):
    said = stage.run([clone], "--dry-run", "--config=x", DEVICES="4")
    expected = "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 .venv/bin/python"
    assert f"{expected} -m convattn_jax.main --config=x\n" in said.stdout
    assert not stage.calls()
