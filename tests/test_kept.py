"""Whole programs: a second start uses them without tracing, to the same bits, or compiles as if there were none."""

import logging
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache

from convattn_jax import compiled, kept, main, pretrain, sharding
from convattn_jax.config import from_config
from convattn_jax.kept import Kept
from convattn_jax.program import PretrainConfig, Program, made_up_vocabulary
from convattn_jax.train import TrainState

TRACED = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture
def place(tmp_path):
    """A folder where programs are kept, with none in JAX's own cache."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compiled.keep("")
    compilation_cache.reset_cache()
    kept.use(tmp_path)
    yield tmp_path / kept.FOLDER
    kept.use(None)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def told():
    """What JAX's monitoring is told."""
    events = []

    def add(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(add)
    yield events
    jax.monitoring.unregister_event_duration_listener(add)


class Line:
    """x -> factor x + noise(x)."""

    def __init__(self, factor: float, noise=jnp.sin):
        self.factor, self.noise = factor, noise

    def lower(self):
        return jax.jit(self.of, donate_argnums=0).lower(jax.ShapeDtypeStruct((3,), np.float32))

    def of(self, x):
        return self.factor * x + self.noise(x)


class Warns(Line):
    def of(self, x):
        logging.getLogger("convattn_jax.kernels").warning("no kernel of %s", self.factor)
        return super().of(x)


class CallsBack(Line):
    def of(self, x):
        return jax.pure_callback(lambda x: np.asarray(x) * self.factor, x, x)


def line(factor: float = 2.0, make=Line) -> list[float]:
    program = Kept(make, factor, devices=jax.devices()).program("line", make.lower)
    return program(jnp.arange(3.0)).tolist()


def trained(folder, **changes):
    """State, sums and held-out sums of a tiny run after two steps."""
    c = from_config(PretrainConfig, tiny.config(folder, model__layers=1, **changes))
    program = Program(c, made_up_vocabulary(40), np.arange(40), sharding.make_mesh(c.mesh))
    shape = (c.train.batch_size, c.data.length)
    rows = np.random.default_rng(0).integers(5, 40, shape).astype(np.uint16)
    batch = sharding.global_batch(lambda first, count: rows[first : first + count], *shape, program.mesh)
    state = program.init(c.seed)
    for _ in range(2):
        before, (state, sums) = state, program.train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "the state is donated"
    return state, sums, program.eval_step(state.params, batch, 1), program.like


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.sharding == y.sharding
        if isinstance(x, jax.Array):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_second_start_traces_nothing_and_computes_the_same_bits(place, told):
    first = trained(place, seed=3)
    assert len(list(place.iterdir())) == 4  # the shapes of the state and three programs
    assert TRACED in told
    told.clear()
    second, of_another_seed = trained(place, seed=3), trained(place, seed=4)
    assert TRACED not in told
    assert told.count(kept.WAITED) == 6
    kept.use(None)
    third = trained(place, seed=3)
    assert TRACED in told
    assert isinstance(second[0], TrainState)
    assert_same_bits(first, second)
    assert_same_bits(second, third)
    words = [np.asarray(run[0].params["encoder"]["embeddings"]["word"]) for run in (first, of_another_seed)]
    assert not np.array_equal(*words)


def test_a_deterministic_run_keeps_none_for_it_keeps_what_xla_chose(place):
    c = from_config(PretrainConfig, tiny.config(place, train__deterministic=True))
    Program(c, made_up_vocabulary(40), np.arange(40), sharding.make_mesh(c.mesh))
    assert list(place.iterdir()) == []


def test_the_front_door_keeps_programs_and_finds_them(place, told, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain._Run, "_finish", lambda self, state: {})  # pictures
    tiny.write_corpus(tmp_path / "text.txt")
    config = tiny.write_config(tmp_path, model__layers=1, train__steps=2, train__eval_every=2, train__log_every=2)

    def run(name: str, cache: str) -> list[dict]:
        told.clear()
        main.main(["main", f"--config={config}", f"--workdir={tmp_path / name}", f"--compile_cache={cache}"])
        return tiny.metrics(tmp_path / name)

    cache = tmp_path / "cache"
    first = run("first", str(cache))
    assert len(list((cache / compiled.processor() / kept.FOLDER).iterdir())) == 4
    assert run("second", str(cache)) == first
    assert told.count(kept.WAITED) == 3
    assert kept._place is not None
    assert kept._place.config_file == str(config)
    run("second", "")
    assert kept._place is None


def test_a_captured_value_is_a_part_of_the_name(place, told):
    x = np.arange(3.0, dtype=np.float32)
    for factor in (2.0, 3.0):
        assert line(factor) == (factor * x + np.sin(x)).tolist()
    assert len(list(place.iterdir())) == 2
    told.clear()
    assert line(3.0) == (3 * x + np.sin(x)).tolist()
    assert TRACED not in told
    with pytest.raises(TypeError, match="cannot be kept"):
        Kept(Line, 2.0, jnp.cos, devices=jax.devices())


def test_what_was_said_in_tracing_is_said_again(place, told, caplog):
    for start in range(2):
        caplog.clear()
        told.clear()
        line(2.0, Warns)
        assert (TRACED in told) == (start == 0)
        assert [(record.name, record.getMessage()) for record in caplog.records] == [
            ("convattn_jax.kernels", "no kernel of 2.0")
        ]


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-9], lambda data: b"", lambda data: data[:40]])
def test_a_damaged_file_is_told_of_once_and_made_anew(place, caplog, damage):
    expected = line()
    [file] = place.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert line() == expected
    assert caplog.text.count("it is damaged") == len(caplog.records) == 1
    assert line() == expected
    assert len(caplog.records) == 1


def test_what_cannot_be_loaded_here_is_made_anew(place, caplog):
    expected = line()
    [file] = place.iterdir()
    for content in (pickle.dumps(([], (b"no program", None, None))), b"no pickle"):
        file.write_bytes(kept._seal(file, content) + content)
        assert line() == expected
    assert len(caplog.records) == 2
    file.write_bytes(kept._seal(file.with_name("other"), content) + content)
    assert line() == expected
    assert "it is damaged" in caplog.text, "a file under another's name"


def test_a_folder_that_others_can_write_is_not_used(tmp_path, place, caplog):
    line()
    for path in (place, *place.iterdir()):
        assert not path.stat().st_mode & 0o022
    os.chmod(place, 0o770)
    kept.use(tmp_path)
    assert "others can write" in caplog.text
    line(3.0)
    assert len(list(place.iterdir())) == 1


@pytest.mark.parametrize(("name", "value"), [("default_backend", "tpu"), ("process_count", 2)])
def test_neither_untried_devices_nor_several_processes_keep_programs(place, monkeypatch, name, value):
    monkeypatch.setattr(jax, name, lambda: value)
    line()
    assert list(place.iterdir()) == []


def test_a_program_that_calls_back_to_python_is_not_kept(place, caplog):
    assert line(5.0, CallsBack) == [0.0, 5.0, 10.0]
    assert list(place.iterdir()) == []
    assert "is not kept" in caplog.text


def test_what_jax_found_in_its_own_cache_is_not_written_again(place, tmp_path):
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    expected = line()
    [file] = place.iterdir()
    file.write_bytes(b"")
    assert line() == expected
    assert list(place.iterdir()) == [], "a damaged file is told of once"


def test_whole_programs_are_pruned_with_the_others(tmp_path, place):
    line()
    compiled.prune(tmp_path, 0)
    assert list(place.iterdir()) == []


def test_seeds_give_the_keys_that_they_gave_as_python_numbers():
    for seed in (0, 1, 2**31, 2**32 - 1):
        drawn = jax.jit(lambda seed: jax.random.key_data(jax.random.key(seed)))(np.uint32(seed))
        np.testing.assert_array_equal(drawn, jax.random.key_data(jax.random.key(seed)))
