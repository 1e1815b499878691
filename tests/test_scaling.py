"""The scaling benchmark at a toy size on two devices, one process each, and what it reads off a schedule."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import projection, scaling, scaling_worker, served, settings
from configs import base

ROOT = pathlib.Path(__file__).parent.parent

SCHEDULE = """
  %all-reduce-start.1 = (f32[8]{0}, f32[8]{0}) all-reduce-start(%a, %b), replica_groups={{0,1}}
  %f.1 = f32[8]{0} fusion(%c), kind=kLoop
  %async.2 = ((f32[8]), f32[4]) async-start(%d), calls=%scatter
  %f.2 = f32[8]{0} custom-call(%c), custom_call_target="gemm"
  %done = (f32[8]{0}, f32[8]{0}) all-reduce-done(%all-reduce-start.1)
  %done.2 = f32[4] async-done(%async.2)
"""


def test_kernels_beside_a_collective_are_counted():
    assert scaling_worker.overlaps(SCHEDULE) == [2, 1]


@pytest.mark.parametrize("devices", [[2], [1, 2]])
def test_each_device_by_itself_is_a_yardstick_whatever_is_asked_for(devices):
    found = scaling.contenders("base", ["data", "fsdp"], devices, ["default", "xla_a=true,xla_b=7"])
    assert [(one.mesh, one.devices) for one in found] == [*[("data", 1)] * 2, *[("data", 2)] * 2, *[("fsdp", 2)] * 2]
    assert [one.number for one in found] == [0, 1, 0, 0, 0, 0]
    assert found[3].options == {"xla_a": True, "xla_b": "7"}


def test_ratios_are_taken_within_a_turn_to_the_first_and_to_the_slowest_device():
    both = scaling_worker.Contender("base", "data", 2, "default")
    args = SimpleNamespace(rows=4, length=8, processes="each")
    found = scaling.record(both, {}, [2.0, 2.0], [[1.5, 1.9], [1.8, 1.7]], args)  # seconds: turns of each device
    assert found["speedup"] == [1.5, 1.9]
    assert found["speedup_of_slowest"] == [1.8, 1.9]
    assert found["tokens_per_second"] == [32, 32]


@pytest.mark.slow  # the benchmark of two processes; that they train as one does is in test_distributed.py
def test_the_benchmark_leaves_a_record_of_each_mesh(tmp_path):
    arguments = ["--devices=2", "--meshes=fsdp", "--sizes=tiny", "--rows=2", "--length=16", "--vocabulary=60"]
    arguments += ["--turns=2", "--steps=1"]
    shape = [f"--set=model.{text}" for text in ("layers=1", "width=16", "hidden=32", "embedding=8", "vocab_multiple=8")]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *arguments, *shape, f"--out={tmp_path}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [(r["mesh"], r["devices"], r["number"], len(r["step_ms"])) for r in records] == [
        ("data", 1, 0, 2),
        ("data", 1, 1, 2),
        ("fsdp", 2, 0, 2),
    ]
    kinds = [{row[0] for row in r["collectives"]} for r in records]
    assert (kinds[0], kinds[1], "all-gather" in kinds[2]) == (set(), set(), True)
    table = (tmp_path / "scaling.md").read_text()
    assert "| 1 (number 1) | data | default |" in table
    assert "| 2 | fsdp | default |" in table


def test_a_worker_that_has_died_is_left_out_when_it_is_asked():
    worker = served.Served("benchmarks.no_such_module", {}, later=True)
    worker.process.wait()
    worker.ask("0 1")
    with pytest.raises(served.LeftOutError, match="ended with status 1"):
        worker.answer()


@pytest.mark.parametrize(
    ("spec", "assignment", "said"),
    [
        ("configs/composite.py:hug", "model.layers=1", "size 'hug' is unknown"),
        ("configs/composite.py", "model.raduis=1", 'Did you mean "radius"'),
        ("configs/composite.py", "model.layers=one", "model.layers=one of configs/composite.py: invalid literal"),
    ],
)
def test_a_wrong_setting_of_a_benchmark_ends_it_with_one_line(spec, assignment, said):
    with pytest.raises(SystemExit) as ended:
        settings.configured(spec, [assignment])
    assert said in str(ended.value)
    assert "\n" not in str(ended.value)


def test_who_gives_no_answer_is_ended_and_left_out(tmp_path, monkeypatch):
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(served.sys, "executable", str(silent))
    worker = served.Served("anything", {}, patience=0.1, later=True)
    with pytest.raises(served.LeftOutError, match="no answer within"):
        worker.answer()
    assert worker.process.returncode == -signal.SIGABRT


def test_the_projection_in_the_documents_is_the_one_that_is_computed():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(projection.markdown()) in text
    assert f"u = {projection.utilisation():.1%}" in text


def test_rings_within_and_between_islands_add_up():
    machine = projection.Machine("toy", 8, 4, 1e12, inside=100.0, island=4, outside=10.0)
    inside, outside = 2 * 3 / 4 * 1000 / 100, 2 * 1 / 2 * (1000 / 4) / 10
    assert projection.all_reduce_seconds(machine, 1000) == pytest.approx((inside + outside) / projection.RATE)


def test_the_projected_models_are_those_of_the_configurations():
    for model in (projection.BASE, projection.LARGE):
        c = base.get_config(model.name).model
        assert (model.layers, model.width, model.hidden) == (c.layers, c.width, c.hidden)
