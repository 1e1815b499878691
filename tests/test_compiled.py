import os
import pathlib

import jax
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache
from played_bucket import played  # noqa: F401  the fixture `bucket`

from convattn_jax import compiled, sharding
from convattn_jax.config import UserError, from_config, parse
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.program import PretrainConfig, Program, made_up_vocabulary

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def settings():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory without an environment that says otherwise."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def kept(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_compiled_is_kept_in_the_home_directory_and_found_again(home, monkeypatch):
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    compiled.keep(None)
    jax.jit(lambda x: x * 3.25 + 1)(2.0).block_until_ready()
    files = kept(home / ".cache" / "convattn_jax" / "compiled" / compiled.processor())
    assert files
    stamps = {path: path.stat().st_mtime_ns for path in files}
    assert float(jax.jit(lambda x: x * 3.25 + 1)(2.0)) == 7.5
    assert {path: path.stat().st_mtime_ns for path in kept(home)} == stamps


def test_the_environment_comes_before_the_default_and_a_flag_before_both(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    before = jax.config.jax_compilation_cache_dir
    compiled.keep(None)
    assert jax.config.jax_compilation_cache_dir == before
    compiled.keep(str(tmp_path))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / compiled.processor())
    compiled.keep("")
    assert not jax.config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_written_is_an_error_only_where_it_was_asked_for(home, caplog):
    (home / ".cache").write_text("a file stands in the way")
    compiled.keep(None)
    assert "not kept" in caplog.text
    with pytest.raises(UserError, match=r"--compile_cache=.*cannot be written"):
        compiled.keep(str(home / ".cache"))


def test_what_is_compiled_is_kept_in_a_bucket(bucket, home, monkeypatch):
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match=r"--compile_cache=gs://b/.* there is no bucket gs://b: make it"):
        compiled.keep("gs://b/c")
    compiled.keep("gs://bucket/c")
    jax.jit(lambda x: x * 3.5 + 1)(2.0).block_until_ready()
    assert kept(bucket / "c" / compiled.processor())
    assert list(home.iterdir()) == [home / "bucket"]


def test_the_folder_keeps_what_was_used_last(tmp_path):
    for age, name in enumerate(["new", "older", "oldest"]):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "oldest", (2e9, 5e8))  # read since
    compiled.prune(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "oldest"]


def test_the_flag():
    assert parse(["main", "--config=configs/bert.py"]).compile_cache is None
    assert parse(["main", "--config=configs/bert.py", "--compile_cache="]).compile_cache == ""
    assert parse(["main", "--config=configs/bert.py", "--compile_cache=here"]).compile_cache == "here"


def test_steps_on_gpus_leave_matrix_products_to_cublas(monkeypatch):
    assert compiled.options() is None  # on a CPU, whose compiler is told nothing
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiled.options() == {"xla_gpu_enable_triton_gemm": False}


def test_a_training_step_is_compiled_with_these_options(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "options", lambda: {"xla_no_such_option": True})
    c = from_config(PretrainConfig, tiny.config(tmp_path))
    program = Program(c, made_up_vocabulary(16), np.ones(16, np.int64), sharding.make_mesh(c.mesh))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        program.lower().compile()


def test_initial_parameters_are_drawn_by_a_kernel_on_gpus_and_the_setting_is_put_back(monkeypatch, tmp_path):
    draw = jax.jit(lambda key: jax.random.normal(key, (8,)))
    key = jax.random.key(0)

    def kernels() -> int:
        return draw.trace(key).lower(lowering_platforms=("cuda",)).as_text().count("threefry2x32_ffi")

    assert kernels() == 0
    with compiled.drawing():
        assert kernels() == 1
    with pytest.raises(KeyError), compiled.drawing():
        raise KeyError
    assert kernels() == 0

    c = from_config(PretrainConfig, tiny.config(tmp_path))
    program = Program(c, made_up_vocabulary(16), np.ones(16, np.int64), sharding.make_mesh(c.mesh))
    counted, draw_all = [], MaskedLM.initial_params
    monkeypatch.setattr(MaskedLM, "initial_params", lambda *args: (counted.append(kernels()), draw_all(*args))[1])
    program._steps.init().lower()
    assert counted[-1] == 1
