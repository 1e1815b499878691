"""Whatever a program depends on gives it another digest; what it doesn't gives it the same."""

import dataclasses
import sys
import types

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh

from convattn_jax import compiled, determinants, sharding
from convattn_jax.config import from_config
from convattn_jax.masking import Vocabulary
from convattn_jax.program import PretrainConfig, made_up_vocabulary, shared


def arguments(folder, counts=None, vocabulary: Vocabulary | None = None, **changes):
    """Those of the steps of a tiny run."""
    c = from_config(PretrainConfig, tiny.config(folder, **changes))
    counts = np.ones(16, np.int64) if counts is None else counts
    return shared(c), vocabulary or made_up_vocabulary(16), counts, sharding.make_mesh(c.mesh)


def test_only_what_is_an_argument_of_programs_or_none_of_their_concern_may_differ(tmp_path):
    here = determinants.digest(arguments(tmp_path))
    same = {"seed": 7, "name": "another", "data__cache_dir": "elsewhere", "data__workers": 3}
    assert determinants.digest(arguments(tmp_path, **same)) == here
    for key, value in {
        "model__dropout": 0.2,
        "model__radius": 3,
        "model__dtype": "bfloat16",
        "masking__rate": 0.2,
        "optimizer__learning_rate": 0.01,
        "train__steps": 7,
        "train__batch_size": 8,
        "data__length": 8,
    }.items():
        assert determinants.digest(arguments(tmp_path, **{key: value})) != here, key


def test_an_array_that_differs_in_one_number_differs(tmp_path):
    here = determinants.digest(arguments(tmp_path))
    counts, vocabulary = np.ones(16, np.int64), made_up_vocabulary(16)
    counts[9] = 2
    assert determinants.digest(arguments(tmp_path, counts)) != here
    assert determinants.digest(arguments(tmp_path, np.ones(16, np.int32))) != here
    assert determinants.digest(arguments(tmp_path, np.ones((4, 4), np.int64))) != here
    special = vocabulary.special.copy()
    special[5] = True
    assert determinants.digest(arguments(tmp_path, vocabulary=dataclasses.replace(vocabulary, special=special))) != here
    assert determinants.digest(arguments(tmp_path, vocabulary=dataclasses.replace(vocabulary, mask=3))) != here


def test_every_field_of_what_programs_are_made_from_is_told(tmp_path):
    told = repr(determinants.described(arguments(tmp_path)))
    for cls in (PretrainConfig, Vocabulary):
        for field in dataclasses.fields(cls):
            assert f"('{field.name}', " in told


@pytest.mark.parametrize(
    "value", [lambda: 0, object(), np.array([None]), {1, 2}, jax.numpy.ones(2), AbstractMesh((), ())]
)
def test_what_cannot_be_told_in_full_is_refused(value):
    with pytest.raises(TypeError, match="cannot be kept"):
        determinants.digest((1.0, [value]))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the place of this one."""
    (tmp_path / "package" / "model").mkdir(parents=True)
    (tmp_path / "package" / "model" / "term.py").write_text("one")
    monkeypatch.setattr(determinants, "__file__", str(tmp_path / "package" / "determinants.py"))
    return tmp_path / "package"


def test_another_source_gives_another_digest(package, tmp_path, monkeypatch):
    config, module = tmp_path / "config.py", tmp_path / "mine.py"
    for path in (config, module):
        path.write_text("one")
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(__file__=str(module)))
    digests = [determinants.digest(1, str(config))]
    assert determinants.digest(1, str(config)) == digests[0]
    for path in (package / "model" / "term.py", package / "new.py", config, module):
        path.write_text("two")
        digests.append(determinants.digest(1, str(config)))
    assert len(set(digests)) == len(digests)


def test_another_setting_machine_or_version_gives_another_digest(monkeypatch, tmp_path):
    digests = [determinants.digest(1)]
    with jax.default_matmul_precision("highest"):
        digests.append(determinants.digest(1))
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        digests.append(determinants.digest(1))
    with jax.enable_x64(True):
        digests.append(determinants.digest(1))
    devices = jax.devices()
    for target, name, value in (
        (compiled, "options", lambda: {"xla_option": 1}),
        (determinants, "LIBRARIES", {**determinants.LIBRARIES, "jax": types.SimpleNamespace(__version__="0.0")}),
        (determinants, "_beside_jaxlib", lambda: tmp_path),
        (jax, "devices", lambda: devices * 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            digests.append(determinants.digest(1))
    for name in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "--another")
            digests.append(determinants.digest(1))
    assert len(set(digests)) == len(digests)
    assert determinants.digest(1) == digests[0]
    with jax.log_compiles():
        assert determinants.digest(1) == digests[0]
