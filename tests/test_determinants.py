"""Whatever a program depends on gives it another digest; what it doesn't gives it the same."""

import dataclasses
import pathlib
import subprocess
import sys
import time
import types

import flax
import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh

from convattn_jax import compiled, determinants, sharding
from convattn_jax.config import from_config
from convattn_jax.masking import Vocabulary
from convattn_jax.program import PretrainConfig, made_up_vocabulary, shared

ROOT = pathlib.Path(__file__).parent.parent


def digest(value, *facts: str) -> str:
    return determinants.digest(value, determinants.files(), *facts)


def arguments(folder, counts=None, vocabulary: Vocabulary | None = None, **changes):
    """Those of the steps of a tiny run."""
    c = from_config(PretrainConfig, tiny.config(folder, **changes))
    counts = np.ones(16, np.int64) if counts is None else counts
    return shared(c), vocabulary or made_up_vocabulary(16), counts, sharding.make_mesh(c.mesh)


def test_only_what_is_an_argument_of_programs_or_none_of_their_concern_may_differ(tmp_path):
    here = digest(arguments(tmp_path))
    same = {"seed": 7, "name": "another", "data__cache_dir": "elsewhere", "data__workers": 3}
    assert digest(arguments(tmp_path, **same)) == here
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
        assert digest(arguments(tmp_path, **{key: value})) != here, key


def test_an_array_that_differs_in_one_number_differs(tmp_path):
    here = digest(arguments(tmp_path))
    counts, vocabulary = np.ones(16, np.int64), made_up_vocabulary(16)
    counts[9] = 2
    assert digest(arguments(tmp_path, counts)) != here
    assert digest(arguments(tmp_path, np.ones(16, np.int32))) != here
    assert digest(arguments(tmp_path, np.ones((4, 4), np.int64))) != here
    special = vocabulary.special.copy()
    special[5] = True
    assert digest(arguments(tmp_path, vocabulary=dataclasses.replace(vocabulary, special=special))) != here
    assert digest(arguments(tmp_path, vocabulary=dataclasses.replace(vocabulary, mask=3))) != here


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
        digest((1.0, [value]))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in the place of this one."""
    (tmp_path / "package" / "model").mkdir(parents=True)
    (tmp_path / "package" / "model" / "term.py").write_text("one")
    monkeypatch.setattr(determinants, "__file__", str(tmp_path / "package" / "determinants.py"))
    return tmp_path / "package"


def test_another_source_gives_another_digest(package, tmp_path, monkeypatch):
    module = tmp_path / "mine.py"
    module.write_text("one")
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(__file__=str(module)))
    (package / ".#term.py").symlink_to("somebody@somewhere")  # as an editor leaves it
    digests = [digest(1)]
    assert digest(1) == digests[0]
    for path in (package / "model" / "term.py", package / "new.py", module):
        path.write_text("two")
        digests.append(digest(1))
    digests += [digest(1, "tiny"), digest(1, "base")]
    assert len(set(digests)) == len(digests)


def test_code_that_may_not_be_what_its_files_hold_is_doubted(tmp_path, monkeypatch):
    file = tmp_path / "term.py"
    file.write_text("one")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    assert "term.py has changed" in (determinants.doubt([str(file)]) or "")
    monkeypatch.setattr(determinants, "BEGAN", file.stat().st_ctime + 1)
    assert determinants.doubt([str(file)]) is None
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert "interactively" in (determinants.doubt([]) or "")


def test_a_process_knows_when_it_began():
    program = "import time; at = time.time(); from convattn_jax import determinants as d; print(at - d.BEGAN)"
    started = time.time()
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert -0.05 < float(told.stdout) < time.time() - started


def test_another_setting_machine_or_version_gives_another_digest(monkeypatch, tmp_path):
    digests = [digest(1)]
    with jax.default_matmul_precision("highest"):
        digests.append(digest(1))
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        digests.append(digest(1))
    with jax.enable_x64(True):
        digests.append(digest(1))
    devices = jax.devices()
    (tmp_path / "made_up-1.0.dist-info").mkdir()
    for target, name, value in (
        (compiled, "options", lambda: {"xla_option": 1}),
        (determinants, "LIBRARIES", {**determinants.LIBRARIES, "jax": types.SimpleNamespace(__version__="0.0")}),
        (sys, "path", [str(tmp_path), *sys.path]),
        (jax, "devices", lambda: devices * 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            digests.append(digest(1))
    with monkeypatch.context() as patch:
        patch.setitem(flax.config._values, "flax_fix_rng_separator", not flax.config.flax_fix_rng_separator)
        digests.append(digest(1))
    for name in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "FLAX_PROFILE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "--another")
            digests.append(digest(1))
    assert len(set(digests)) == len(digests)
    assert digest(1) == digests[0]
    with jax.log_compiles():
        assert digest(1) == digests[0]
