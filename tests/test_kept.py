"""Traced programs: a second start doesn't trace its model, to the same bits, or traces as if none were kept."""

import logging
import math
import pickle
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absent_gpu import absent_gpu
from jax import export
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType

from convattn_jax import compiled, determinants, kept, main, pretrain, sharding
from convattn_jax.config import from_config
from convattn_jax.kept import Kept, Traceable
from convattn_jax.kernels.composite import composite_attention
from convattn_jax.program import PretrainConfig, Program, Steps, made_up_vocabulary
from convattn_jax.train import TrainState

HIT = "/jax/compilation_cache/cache_hits"
MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where programs are kept, by a process that began as a script; JAX's own settings are put back."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    monkeypatch.setattr(determinants, "BEGAN", math.inf)
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    kept.use(tmp_path)
    yield tmp_path / kept.FOLDER
    kept.use(None)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def traced(monkeypatch):
    """Names of what is exported, for which it is traced."""
    names, export = [], Traceable.export
    monkeypatch.setattr(Traceable, "export", lambda self: (names.append(self.function.__name__), export(self))[1])
    return names


class Line:
    """x -> factor x + noise(x)."""

    def __init__(self, factor: float, noise=jnp.sin):
        self.factor, self.noise = factor, noise

    def line(self):
        return Traceable(self.of, (jax.ShapeDtypeStruct((3,), np.float32),), donate=(0,))

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
    return Kept(make, factor, mesh=MESH).program("line", make.line)(jnp.arange(3.0)).tolist()


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


def test_a_second_start_traces_nothing_and_computes_the_same_bits(place, traced, monkeypatch):
    first = trained(place, seed=3)
    assert len(list(place.iterdir())) == 3
    assert sorted(traced) == ["_initial_state", "_train_step", "evaluation_sums"]
    with monkeypatch.context() as patch:
        for name in ("_initial_state", "_train_step"):
            patch.delattr(Steps, name)
        second, of_another_seed = trained(place, seed=3), trained(place, seed=4)
    assert len(traced) == 3
    kept.use(None)
    third = trained(place, seed=3)
    assert isinstance(second[0], TrainState)
    assert_same_bits(first, second)
    assert_same_bits(second, third)
    words = [np.asarray(run[0].params["encoder"]["embeddings"]["word"]) for run in (first, of_another_seed)]
    assert not np.array_equal(*words)


def test_the_front_door_keeps_programs_and_finds_them(place, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain._Run, "_finish", lambda self, state: {})  # pictures
    monkeypatch.setattr(compiled, "LEAST_SECONDS", 0.0)
    hits = []
    jax.monitoring.register_event_listener(hear := lambda event, **_: hits.append(event == HIT))
    tiny.write_corpus(tmp_path / "text.txt")
    config = tiny.write_config(tmp_path, model__layers=1, train__steps=2, train__eval_every=2, train__log_every=2)

    def run(name: str, cache: str) -> list[dict]:
        hits.clear()
        main.main(["main", f"--config={config}", f"--workdir={tmp_path / name}", f"--compile_cache={cache}"])
        return tiny.metrics(tmp_path / name)

    cache = tmp_path / "cache"
    first = run("first", str(cache))
    assert len(list((cache / compiled.processor() / kept.FOLDER).iterdir())) == len(traced) == 3
    assert run("second", str(cache)) == first
    assert len(traced) == 3
    assert sum(hits) >= 3, "what was traced once is also compiled once"
    assert kept._place is not None
    config.write_text(config.read_text() + "\n")
    assert run("third", str(cache)) == first
    assert len(traced) == 6, "the file of the configuration may have changed what code means"
    kept.use(compiled.keep(""))
    assert kept._place is None
    jax.monitoring.unregister_event_listener(hear)


def test_a_captured_value_is_a_part_of_the_name(place, traced):
    x = np.arange(3.0, dtype=np.float32)
    for factor in (2.0, 3.0, 3.0):
        assert line(factor) == (factor * x + np.sin(x)).tolist()
    assert len(list(place.iterdir())) == len(traced) == 2
    with pytest.raises(TypeError, match="cannot be kept"):
        Kept(Line, 2.0, jnp.cos, mesh=MESH)


def test_what_was_said_in_tracing_is_said_again(place, traced, caplog):
    for _ in range(2):
        caplog.clear()
        line(2.0, Warns)
        assert len(traced) == 1
        assert [(record.name, record.getMessage()) for record in caplog.records] == [
            ("convattn_jax.kernels", "no kernel of 2.0")
        ]


class Loads(Line):
    def of(self, x):
        sys.modules["loaded_late"] = types.SimpleNamespace(__file__=str(kept._place.folder.parent / "late.py"))
        return super().of(x)


def test_code_that_tracing_loads_is_in_no_name_and_so_nothing_is_kept(place, tmp_path, monkeypatch, caplog):
    (tmp_path / "late.py").write_text("constant = 1")
    monkeypatch.setitem(sys.modules, "loaded_late", types.SimpleNamespace())
    line(2.0, Loads)
    assert "late.py" in caplog.text
    assert list(place.iterdir()) == []
    line(2.0, Loads)
    assert len(list(place.iterdir())) == 1, "now it is loaded before"


@pytest.mark.parametrize("why", ["edited", "gone"])
def test_doubtful_code_keeps_nothing(place, monkeypatch, why):
    def gone():
        raise FileNotFoundError(2, "No such file")

    if why == "edited":
        monkeypatch.setattr(determinants, "BEGAN", 0)
    else:
        monkeypatch.setattr(determinants, "files", gone)
    assert line() == line()
    assert list(place.iterdir()) == []


def test_a_program_is_compiled_ahead_as_it_would_be(place, traced):
    expected = line()
    one = Kept(Line, 2.0, mesh=MESH)
    one.ahead("line")
    one.ahead("none of this name")
    assert one.program("line", Line.line)(jnp.arange(3.0)).tolist() == expected
    assert len(traced) == 1


def test_shapes_of_what_is_returned_are_told_without_tracing(place, traced):
    for _ in range(2):
        assert Kept(Line, 2.0, mesh=MESH).returns("line", Line.line) == jax.ShapeDtypeStruct((3,), np.float32)
    assert len(traced) == 1


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-9], lambda data: b"", lambda data: data[:40]])
def test_a_damaged_file_is_told_of_once_and_made_anew(place, caplog, damage):
    expected = line()
    [file] = place.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert line() == expected
    assert caplog.text.count("it is damaged") == len(caplog.records) == 1
    assert line() == expected
    assert len(caplog.records) == 1


def test_what_cannot_be_read_here_is_made_anew(place, caplog):
    expected = line()
    [file] = place.iterdir()
    whole = file.read_bytes()[kept.SEAL :]
    for content in (b"{}\n" + whole, b"no program", pickle.dumps(expected)):
        file.write_bytes(kept._seal(file, content) + content)
        assert line() == expected
    assert len(caplog.records) == 3
    file.write_bytes(kept._seal(file.with_name("other"), whole) + whole)
    assert line() == expected
    assert "it is damaged" in caplog.text, "a file under another's name"


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path, caplog):
    (tmp_path / kept.FOLDER).write_text("a file")
    kept.use(tmp_path)
    assert "traced programs are not kept" in caplog.text
    assert kept._place is None


@pytest.mark.parametrize(("name", "value"), [("default_backend", "tpu"), ("process_count", 2)])
def test_neither_untried_devices_nor_several_processes_keep_programs(place, monkeypatch, name, value):
    monkeypatch.setattr(jax, name, lambda: value)
    line()
    assert list(place.iterdir()) == []


def test_a_program_that_calls_back_to_python_is_not_kept(place, caplog):
    assert line(5.0, CallsBack) == [0.0, 5.0, 10.0]
    assert list(place.iterdir()) == []
    assert "is not kept" in caplog.text


def test_jax_lets_kernels_for_gpus_be_kept():
    rows = (jax.ShapeDtypeStruct((1, 64, 2, 16), np.float32),) * 3
    taps = jax.ShapeDtypeStruct((2, 5), np.float32)
    attend = jax.jit(lambda rows, taps: composite_attention(rows, fixed=taps))
    with absent_gpu():
        with pytest.raises(ValueError, match="triton"):
            export.export(attend, platforms=("cuda",))(rows, taps)
        written = export.export(attend, platforms=("cuda",), disabled_checks=kept.BY_VERSION)(rows, taps).serialize()
    assert "triton" in export.deserialize(written).mlir_module()


def test_traced_programs_are_pruned_with_the_others(tmp_path, place):
    line()
    compiled.prune(tmp_path, 0)
    assert list(place.iterdir()) == []


def test_seeds_give_the_keys_that_they_gave_as_python_numbers():
    for seed in (0, 1, 2**31, 2**32 - 1):
        drawn = jax.jit(lambda seed: jax.random.key_data(jax.random.key(seed)))(np.uint32(seed))
        np.testing.assert_array_equal(drawn, jax.random.key_data(jax.random.key(seed)))
