"""What may change when a run is resumed, what may not and why, and that old run folders stay readable."""

import json

import pytest

from configs import base
from convattn_jax import resume
from convattn_jax.config import UserError, flatten, from_config, to_plain
from convattn_jax.pretrain import PretrainConfig
from convattn_jax.resume import ADDED, CHANGEABLE, FREE, ResumeConfig, changes, completed
from convattn_jax.run import RunFolder

# What a config.json of the first version held. A key that comes later stands in resume.ADDED.
FIRST_KEYS = {
    "": "task name seed",
    "data": (
        "source files heldout_files heldout_fraction tfds_name tfds_split tfds_feature tfds_data_dir "
        "layout length cache_dir workers"
    ),
    "tokenizer": "model vocab_size normalization",
    "model": (
        "mixer scores rotation branches positions radius taps_init layers width heads head_size hidden "
        "embedding max_length dropout attention_dropout vocab_multiple output_bias dtype kernel loop "
        "remat"
    ),
    "model.query_key": "kind radius groups activation half",
    "model.value": "kind radius groups activation half",
    "masking": "rate whole_words",
    "train": "steps batch_size accumulate log_every eval_every eval_rows",
    "optimizer": "learning_rate warmup b1 b2 eps weight_decay clip",
    "checkpoint": "every_seconds keep",
    "mesh": "data fsdp tensor",
}
FIRST = {f"{group}.{key}".lstrip(".") for group, keys in FIRST_KEYS.items() for key in keys.split()}


def config(**values):
    """Today's configuration as config.json holds it, with other values: train__steps=3."""
    c = base.get_config("tiny")
    for name, value in values.items():
        group, _, key = name.partition("__")
        (c[group] if key else c)[key or name] = value
    return to_plain(from_config(PretrainConfig, c))


def test_every_key_is_of_the_first_version_or_has_the_value_it_had_before_it_came():
    now, later = flatten(config()), [key for key in ADDED if not key.startswith("glue.")]
    assert set(now) - FIRST == set(later)
    for key in later:
        if not key.startswith(FREE):
            assert now[key] == ADDED[key]


def test_a_folder_made_before_a_key_came_belongs_to_the_same_run():
    old = {key: value for key, value in config().items() if key not in ("resume", "watchdog")}
    for group in ("train", "data", "mesh"):
        old[group] = {key: value for key, value in old[group].items() if f"{group}.{key}" not in ADDED}
    assert set(flatten(old)) == FIRST
    stored = completed(json.loads(json.dumps(old)))
    assert changes(stored, config(), "run") == []
    assert from_config(PretrainConfig, stored) == from_config(PretrainConfig, config())
    with pytest.raises(UserError, match=r"run was made with train\.skip_nonfinite=0, not 1"):
        changes(stored, config(train__skip_nonfinite=1), "run")


def test_parts_of_a_configuration_are_completed_where_they_stand():
    assert completed({"task": "finetune", "model": {"radius": 2}}) == {"task": "finetune", "model": {"radius": 2}}
    assert completed({"task": "finetune", "glue": {"seeds": 2}})["glue"]["epochs"] == 0
    pretraining = completed({"task": "pretrain", "train": 3})
    assert pretraining["train"] == 3
    assert "glue" not in pretraining


def test_a_difference_is_taken_on_purpose_only():
    with pytest.raises(UserError) as error:
        changes(config(), config(train__steps=900), "run")
    assert str(error.value) == (
        "run was made with train.steps=800, not 900: give that value, change it on purpose with "
        "--config.resume.allow=train.steps, or another --workdir"
    )
    (change,) = changes(config(), config(train__steps=900, resume__allow=("train.steps",)), "run")
    assert change == resume.Change("train.steps", 800, 900)
    with pytest.raises(UserError, match=r"made with optimizer\.clip=1\.0, not 2\.0"):
        changes(config(), config(optimizer__clip=2.0, resume__allow=("train.steps",)), "run")
    assert changes(config(), config(resume__allow=("train.steps",), name="other"), "run") == []


def test_a_configuration_without_the_key_is_not_told_of_it():
    with pytest.raises(UserError) as error:
        changes({"model": {"kernel": "plain"}}, {"model": {"kernel": "auto"}}, "run-glue")
    assert str(error.value) == (
        "run-glue was made with model.kernel=plain, not auto: give that value, or another --workdir"
    )


@pytest.mark.parametrize("key", sorted({key for key in FIRST | set(ADDED) if not key.startswith(FREE)}))
def test_each_key_can_be_changed_or_it_is_said_why_not(key):
    if key in CHANGEABLE:
        assert ResumeConfig((key,)).allow == (key,)
        return
    with pytest.raises(UserError, match=f"^resume.allow={key} cannot be changed in a run that has begun: ..*workdir"):
        ResumeConfig((key,))


def test_what_may_change_exists_and_what_may_not_has_a_reason_of_its_own():
    known = set(flatten(config()))
    assert set(CHANGEABLE) <= known
    for key in ("seed", "train.batch_size", "data.length", "tokenizer.vocab_size", "model.radius", "masking.rate"):
        with pytest.raises(UserError) as error:
            ResumeConfig((key,))
        assert resume.FIXED[""] not in str(error.value)


def test_a_changed_folder_says_what_it_was(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write("config", config())
    now = config(train__steps=900, resume__allow=("train.steps",))
    folder.adopt(now, folder.check_belongs(now))
    assert json.loads((tmp_path / "changes.jsonl").read_text()) == {"key": "train.steps", "before": 800, "now": 900}
    assert folder.check_belongs(now) == []
    folder.adopt(now, [])
    assert len((tmp_path / "changes.jsonl").read_text().splitlines()) == 1
