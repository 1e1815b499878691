import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from configs.glue import get_config
from convattn_jax import finetune, main, memory, train
from convattn_jax.config import UserError, from_config
from convattn_jax.glue.config import GlueConfig
from convattn_jax.train import TrainConfig

GIB = 2**30
FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes"


def training(batch_size, accumulate=1):
    values = {**tiny.config(pathlib.Path()).train, "batch_size": batch_size, "accumulate": accumulate}
    return from_config(TrainConfig, values)


def advice(config, held, temporary, limit, shards=1, remat=False):
    return memory.training_advice(config, remat, shards, memory.Need(held * GIB, temporary * GIB), limit * GIB)


def test_the_advice_is_the_least_accumulation_that_fits():
    text = advice(training(96), held=5, temporary=90, limit=40)  # 33 GiB of room: 90/3 fits, 90/2 does not
    assert "a step needs about 95.0 GiB of 40.0 GiB" in text
    assert "set train.accumulate=3 (now 1), or lower train.batch_size, or set model.remat=True" in text
    assert "train.accumulate=6 (now 2)" in advice(training(96, 2), 5, 90, 40)
    assert "train.accumulate=4 (now 1)" in advice(training(64), 5, 90, 40)  # 3 does not divide 64


def test_the_advice_keeps_what_the_devices_can_share():
    text = advice(training(12), held=1, temporary=60, limit=30, shards=4, remat=True)
    assert "train.accumulate=3 (now 1)" in text
    assert "remat" not in text
    assert "accumulate" not in advice(training(8), 1, 60, 30, shards=8)  # a row on each device is the least


def test_what_does_not_fit_although_it_should_is_split_once_more():
    assert "train.accumulate=2 (now 1)" in advice(training(8), held=1, temporary=2, limit=30)
    assert "train.accumulate=2 (now 1)" in memory.training_advice(training(8), False, 1, None, None)


def test_only_a_full_device_is_explained():
    with pytest.raises(UserError, match="lower it"), memory.explained(lambda: "lower it"):
        raise jax.errors.JaxRuntimeError(FULL)
    for other in ("INTERNAL: unknown", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded"):
        with pytest.raises(jax.errors.JaxRuntimeError), memory.explained(lambda: "lower it"):
            raise jax.errors.JaxRuntimeError(other)


def test_the_need_of_a_step_is_the_compilers():
    def lower():
        return jax.jit(lambda x: (x @ x.T).sum()).lower(jax.ShapeDtypeStruct((64, 8), jnp.float32))

    needed = memory.need(lower)
    assert needed is not None
    assert needed.held == 64 * 8 * 4 + 4


def test_a_run_that_does_not_fit_ends_with_one_line(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError(FULL)

    monkeypatch.setattr(train, "fit", full)
    tiny.write_corpus(tmp_path / "text.txt", documents=20)
    tiny.write_config(tmp_path, model__layers=1)
    with pytest.raises(SystemExit) as ended:
        main.main(["main", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: train.batch_size=4: out of memory on \w+; a step needs about 0.0 GiB", said)
    assert "set train.accumulate=2 (now 1)" in said


def test_fine_tuning_names_its_own_setting():
    glue = from_config(GlueConfig, get_config().glue)
    assert re.match(r"glue.together=0: out of memory on \w+: set glue.together=1", finetune.out_of_memory(glue))
