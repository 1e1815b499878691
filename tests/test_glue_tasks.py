"""The table of tasks and the recipes: complete, and the reference's numbers."""

import dataclasses

import pytest

from configs import glue
from convattn_jax.config import UserError, from_config
from convattn_jax.glue.config import GlueConfig
from convattn_jax.glue.metrics import CLASS_METRICS, SCORE_METRICS
from convattn_jax.glue.tasks import GLUE, GLUE_PRESETS, PRESETS, PROBES, TASKS, recipe, select, steps_for

TRAINED = GLUE[:9]


def test_the_tasks_stand_in_the_reference_order():
    assert GLUE == ("mnli", "cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte", "wnli", "ax")
    assert PROBES == ("word_order", "adjacent", "distance")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_consistent(task):
    assert len(task.texts) in (1, 2)
    if task.is_probe:
        assert not task.tests
    else:
        assert len(task.columns) == len(task.texts)
        assert all(file.name.endswith(".tsv") and file.rows > 0 for file in task.server.values())
    if task.predicted_by:
        assert task.labels == TASKS[task.predicted_by].labels
        assert not task.splits
    else:
        assert task.main in task.metrics
        assert set(task.metrics) <= set(SCORE_METRICS if task.is_regression else CLASS_METRICS)
    assert task.outputs == (len(task.labels) or 1)


def test_the_server_gets_eleven_files():
    files = [file.name for task in TASKS.values() for file in task.server.values()]
    main = {"CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "STS-B.tsv", "QNLI.tsv", "QQP.tsv", "RTE.tsv", "WNLI.tsv"}
    assert len(files) == 11
    assert set(files) == main | {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}


def test_three_tasks_start_from_mnli():
    assert [name for name, task in TASKS.items() if task.starts_from == "mnli"] == ["mrpc", "stsb", "rte"]
    assert {task.starts_from for task in TASKS.values()} == {"", "mnli"}


def test_every_preset_trains_every_task():
    for preset in GLUE_PRESETS:
        assert set(PRESETS[preset]) == set(TRAINED)
    assert set(PRESETS["probe"]) == set(PROBES)


def steps_of(name: str, preset: str, rows: int) -> int:
    return steps_for(TASKS[name], recipe(preset, TASKS[name]), rows)


def test_the_presets_are_the_reference_ones():
    assert [steps_of(name, "electra", TASKS[name].train_rows) for name in TRAINED] == [
        *(12121, 851, 6409, 343, 1836, 11200, 9835, 777, 100)
    ]
    assert steps_of("rte", "stable", 2490) == 20 * 155
    assert [recipe("electra", TASKS[name]).batch_size for name in ("mnli", "qqp", "rte")] == [128, 128, 32]
    assert [recipe("stable", TASKS[name]).batch_size for name in ("mnli", "qqp", "rte")] == [16, 16, 16]
    assert [recipe("electra", TASKS[name]).learning_rate for name in ("mnli", "qnli")] == [3e-4, 1e-4]
    assert {r.learning_rate for r in PRESETS["electra_base"].values()} == {1e-4}


def test_probes_are_trained_no_harder_than_the_tasks_of_glue():
    gentle = PRESETS["electra"]["cola"]
    for probe in PRESETS["probe"].values():
        assert probe.learning_rate <= gentle.learning_rate
        assert probe.batch_size >= gentle.batch_size
    assert {r.learning_rate for r in PRESETS["stable"].values()} == {2e-5}
    assert {r.warmup for preset in PRESETS.values() for r in preset.values()} == {0.1}
    assert {r.length for preset in GLUE_PRESETS for r in PRESETS[preset].values()} == {128}


def test_another_training_size_keeps_the_epochs():
    assert steps_of("mnli", "electra", TASKS["mnli"].train_rows // 4) == pytest.approx(12121 / 4, abs=1)
    assert steps_of("mnli", "electra", 1) == 1
    assert steps_of("word_order", "electra", 4432) == 8 * 139
    assert steps_of("word_order", "stable", 33) == 8 * 2
    with pytest.raises(UserError, match=r"glue.tasks=rte: there are no training rows"):
        steps_of("rte", "electra", 0)


def test_rate_and_epochs_are_the_preset_s_unless_they_are_set():
    asked = from_config(GlueConfig, glue.get_config().glue, "glue.")
    for name in ("rte", "word_order"):
        assert asked.recipe_of(TASKS[name]) == recipe("electra", TASKS[name])
        ours = dataclasses.replace(asked, learning_rate=7e-4, epochs=3).recipe_of(TASKS[name])
        assert ours.learning_rate == 7e-4
        assert steps_for(TASKS[name], ours, 100) == 3 * 4  # batches of 32
        assert dataclasses.replace(ours, learning_rate=0.0, steps=0, epochs=0) == dataclasses.replace(
            recipe("electra", TASKS[name]), learning_rate=0.0, steps=0, epochs=0
        )


def test_tasks_are_selected_by_name():
    assert [task.name for task in select(("rte", "cola", "rte"))] == ["cola", "rte"]
    with pytest.raises(
        UserError, match=r"glue.tasks='rtee' is unknown \(did you mean 'rte'\?\); known: mnli, cola, .*"
    ):
        select(("rtee",))
    with pytest.raises(UserError, match=r"glue.tasks is empty: name some of mnli"):
        select(())


def test_what_has_no_recipe_is_refused():
    with pytest.raises(UserError, match=r"glue.preset='probe' is unknown.*electra, electra_base, stable"):
        recipe("probe", TASKS["rte"])
    with pytest.raises(ValueError, match=r"ax is predicted by the model of mnli"):
        recipe("electra", TASKS["ax"])
