import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from benchmarks import attention, convolution, lengths, ours, peers, served, start, step
from benchmarks.arguments import documented, positive, sizes
from benchmarks.settings import configured
from benchmarks.suites import COMPOSITE, HF, PLAIN, SUITES, Ratio, Spec, Suite
from convattn_jax.config import from_config
from convattn_jax.masking import MaskingConfig, Vocabulary
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling

PEER = peers.PeerConfig(
    kind="transformers", width=16, layers=1, heads=2, hidden=32, embedding=16, vocabulary=48, length=16, dropout=0.1,
    attention_dropout=0.1, radius=2, rate=0.15, dtype="float32", rows="",
)  # fmt: skip


@pytest.mark.parametrize("module", ["step", "attention", "kernel_times", "start"])
def test_help_needs_neither_jax_nor_torch(module):
    code = f"import sys; sys.modules.update(jax=None, torch=None); sys.argv = ['', '--help']; import benchmarks.{module} as m; m.main()"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_help_shows_the_defaults_worth_showing():
    parser = documented("Times things.\n\n    python -m this")
    parser.add_argument("--rows", type=int, default=256, help="per device")
    parser.add_argument("--out", default=None, help="folder for the results")
    parser.add_argument("--check", action="store_true", help="errors only")
    told = parser.format_help()
    assert "per device (default: 256)" in told
    assert told.count("default") == 1
    assert "\n\n    python -m this\n" in told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rounds=0"], "0 must be a whole number from 1 on"),
        (["--shapes=2x16,3xa"], "--shapes: a must be a whole number from 1 on"),
        (["--shapes=2x16,3"], "2x16,3 must be BATCHxLENGTH, or several by commas"),
        (["--shapes=2x3"], None),
    ],
)
def test_counts_and_sizes_are_read_or_refused(given, said, capsys):
    parser = documented("Times things.")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--shapes", type=sizes("batch", "length"), default="1x2,3x4")
    if said is None:
        assert parser.parse_args(given).shapes == [(2, 3)]
        assert parser.parse_args([]).shapes == [(1, 2), (3, 4)]
        return
    with pytest.raises(SystemExit):
        parser.parse_args(given)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", [attention, convolution], ids=["attention", "convolution"])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--check", "--check: this compiles the kernels for an NVIDIA GPU, and there is none"),
        ("--candidates", "--candidates: this compiles the kernels for an NVIDIA GPU, and there is none"),
        ("--contenders=nope", "--contenders=nope is in none of: "),
    ],
)
def test_what_cannot_be_timed_here_is_one_line(benchmark, option, said, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr("sys.argv", ["benchmark", option])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_configurations_that_exist_and_rows_that_are_theirs(name):
    suite = SUITES[name]
    for text in suite.rows.values():
        spec = Spec.parse(text)
        source = f"configs/base.py:{spec.source.partition(':')[2]}" if spec.peer else spec.source
        from_config(ModelConfig, configured(source, list(spec.assignments)).model)
    named = {row for ratio in suite.ratios for row in (*ratio.of, *ratio.to)}
    missing = named - set(suite.rows)
    assert all(row.startswith("authors'") for row in missing), missing


def test_model_arithmetic_of_bert_base():
    shape = from_config(ModelConfig, configured("configs/composite.py:base", []).model)
    flops = ours.model_arithmetic(shape, 30_080, 256, 128, 256 * 20)
    assert flops == pytest.approx(17.9e12, rel=0.01)


def test_ratios_take_the_fastest_of_each_side_and_skip_sides_without_anyone():
    seconds, tokens = {"a": 2.0, "b": 1.0, "c": 4.0}, {"a": 100, "b": 100, "c": 1000}
    assert step.quotient(Ratio("", ("c",), ("a", "b")), seconds, tokens) == 4
    assert step.quotient(Ratio("", ("b",), ("a", "c"), speed=True), seconds, tokens) == 0.4
    assert step.quotient(Ratio("", ("b",), ("gone",)), seconds, tokens) is None


def test_contenders_take_turns_and_one_that_fails_has_no_row(capsys):
    order = []

    def runner(name, seconds):
        def run(steps):
            order.append((name, steps))
            if name == "dies" and len(order) > 10:
                raise RuntimeError("no memory left")
            return seconds * steps

        return run

    times = step.take_turns({name: runner(name, x) for name, x in (("a", 0.5), ("dies", 1.0), ("b", 2.0))}, 3, 2)
    assert times == {"a": [0.5, 0.5], "b": [2.0, 2.0]}
    assert order[:6] == [("a", 1), ("a", 3), ("dies", 1), ("dies", 3), ("b", 1), ("b", 3)]
    assert "dies: left out, RuntimeError: no memory left" in capsys.readouterr().err


def test_the_report_holds_every_contender_and_ratio(tmp_path):
    rows = {COMPOSITE: "configs/composite.py", PLAIN: "configs/no_positions.py", HF: "transformers:tiny"}
    suite = Suite(2, 8, 64, rows, (Ratio("composite / plain", (COMPOSITE,), (PLAIN,)), Ratio("none", ("x",), (HF,))))
    times = {COMPOSITE: [0.2, 0.1, 0.3], PLAIN: [0.1, 0.1, 0.1], HF: [0.4, 0.4, 0.4], step.MATRIX: [0.01] * 3}
    facts = {"device": "chip", "arithmetic": {COMPOSITE: 4e13}, "temporary_bytes": {COMPOSITE: 7}, "peers": {}}
    facts["tokens"] = dict.fromkeys(rows, 16)
    records = [{"suite": "s"} | record for record in step.figures(suite, times, facts)]
    by_name = {record.get("contender", record.get("ratio")): record for record in records}
    assert by_name[COMPOSITE]["tokens_per_second"] == 80
    assert by_name[COMPOSITE]["of_matrix_rate"] == pytest.approx(4e13 / 0.2 / (10 * 2 * 8192**3 / 0.01))
    assert by_name["composite / plain"]["turns"] == pytest.approx([2, 1, 3])
    assert "none" not in by_name
    table = step.markdown(suite, records, "chip")
    assert "| composite | 200.00 (100.00 to 300.00) | 80 |" in table
    assert "| composite / plain | 2.000 | 1.000 to 3.000 |" in table
    step.picture(records, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 5000


def test_the_table_of_starts_holds_each_beside_the_cold_one():
    parts = {"imports": 2.0, "devices": 1.0, "tracing": 0.5, "lowering": 0.5, "compiling": 1.0}
    records = [{"start": "cold", "first_step": 40.0, "device": "chip", **parts}]
    records.append({**records[0], "start": "warm", "first_step": 6.0, "compiling": 0.25})
    table = start.markdown(records, 12.4)
    assert "chip; 12 MB" in table
    assert "| warm | 6.0 | 15% | 2.0 | 1.0 | 0.5 | 0.5 | 0.2 | 1.8 |" in table


def test_the_report_on_attention_compares_medians_and_draws_both_curves(tmp_path):
    ms = {
        "plain: cuDNN": 1.0,
        "plain: SDPA": 0.8,
        "composite: kernel": 1.2,
        "composite: FlexAttention, table by tap": 6.0,
    }
    spread = {"low": 0.5, "high": 9.0}
    records = [
        {"batch": 2, "length": t, "contender": name, "ms": t * x} | spread for name, x in ms.items() for t in (8, 16)
    ]
    table = attention.markdown(records)
    assert "| plain: SDPA | 6.400 (0.500 to 9.000) | 12.800 (0.500 to 9.000) |" in table
    assert "| composite kernel / plain by cuDNN through JAX | 1.20 | 1.20 |" in table
    assert "| composite kernel / the fastest plain attention | 1.50 | 1.50 |" in table
    assert "| FlexAttention, the faster form / composite kernel | 5.00 | 5.00 |" in table
    spaces = [{"memory": "composite: kernel", "length": t, "temporary_bytes": 100 * t} for t in (8, 16)]
    attention.picture(records, spaces, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 5000


def test_contenders_of_attention_that_cannot_run_are_left_out(monkeypatch, capsys):
    def missing(problem):
        raise RuntimeError("no such library")

    monkeypatch.setitem(attention.CONTENDERS, "gone", missing)
    records = attention.compare([(1, 16)], ["gone", "composite: plain form"], rounds=2)
    assert [record["contender"] for record in records] == ["composite: plain form"]
    assert 0 < records[0]["low"] <= records[0]["ms"] <= records[0]["high"]
    assert "gone: left out, no such library" in capsys.readouterr().err


def test_scoring_every_position_is_the_same_loss():
    model = MaskedLM(tiny.model_config(layers=1, scores=("content",)), 48)
    special = np.arange(48) < ours.SPECIAL
    parts = model, Vocabulary(4, special, ~special), "pairs", MaskingConfig(0.15, False), np.zeros(48, np.float32)
    rows = jnp.asarray(ours.random_rows(3, 16, 48)[0])
    params = jax.jit(model.initial_params)(jax.random.key(0))
    sums = []
    for objective in (MaskedLanguageModelling(*parts), ours.EveryPosition(*parts)):
        batch, weight = jax.jit(objective.prepare)(jax.random.key(1), rows)
        sums.append({**jax.jit(objective.sums)(params, batch, None), "prepared": weight})
    assert sums[0]["weight"] == sums[0]["prepared"] == 6
    assert sums[0]["tokens"] == 3 * 16
    for name, value in sums[0].items():
        np.testing.assert_allclose(sums[1][name], value, rtol=1e-5)


def test_who_makes_the_matrix_products_is_one_of_two(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = "configs/composite.py"
    assert ours.compiler_options(Spec.parse(config)) == {"xla_gpu_enable_triton_gemm": False}
    assert ours.compiler_options(Spec.parse(f"{config}@products=triton")) is None
    with pytest.raises(SystemExit, match=r"products=cutlass is unknown; there are: cublas, triton"):
        ours.compiler_options(Spec.parse(f"{config}@products=cutlass"))


def test_the_mix_of_lengths_is_the_same_texts_padded_and_packed():
    suite = Suite(4, 512, 5000, {}, mixed=True)
    rows = ours.rows_by_layout(suite)
    assert {layout: values.shape for layout, values in rows.items()} == dict.fromkeys(rows, (ours.BATCHES, 4, 512))
    padded, packed = (rows[layout].reshape(-1, 512) for layout in ("pairs", "packed"))
    assert (packed != 0).mean() > 0.99
    assert 0.05 < (padded != 0).mean() < 0.3  # the histogram's mean is 69 of 512
    drawn = lengths.draw(len(padded), 512, 0)
    assert ((padded != 0).sum(1) == drawn).all()
    assert (padded[:, 0] == 2).all()
    assert (padded[np.arange(len(padded)), drawn - 1] == 3).all()
    starts = np.flatnonzero(packed.ravel() == 2)
    assert np.diff(starts)[:5].tolist() == drawn[:5].tolist()
    assert (lengths.draw(1000, 64, 0) <= 64).all()


def test_a_histogram_counts_special_tokens_and_cuts():
    counts = lengths.histogram([1, 1, 600])
    assert counts.sum() == 3
    assert (counts[3], counts[512]) == (2, 1)


def test_peers_get_rows_with_the_asked_share_hidden():
    rows = ours.random_rows(4, 40, 200)
    rows[:, 1, 30:] = 0
    everywhere, masked = (peers.masked_batches(rows, 0.15, head)[0] for head in ("all", "masked"))
    scored = everywhere["labels"] != -100
    assert scored.sum(1).tolist() == [6, 4, 6, 6]  # 15 % of 37 and of 28 ordinary tokens
    assert (everywhere["input_ids"][scored] == peers.MASK).all()
    assert (everywhere["labels"][scored] == rows[0][scored]).all()
    assert (everywhere["input_ids"][~scored] == rows[0][~scored]).all()
    assert (everywhere["attention_mask"] == (rows[0] != 0)).all()
    for row, at, labels in zip(range(4), masked["positions"], masked["labels"], strict=True):
        assert set(at[labels != -100]) == set(np.flatnonzero(scored[row]))
        assert (labels[labels != -100] == rows[0][row, at[labels != -100]]).all()


def test_a_peer_whose_library_is_missing_says_so(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(served.LeftOutError, match="no torch here"):
        peers.Peer(PEER)


@pytest.mark.parametrize(("busy", "status"), [(False, 0), (True, 1)])
def test_a_contender_ends_with_who_started_it_even_when_it_is_busy(busy, status):
    work = "time.sleep(100)" if busy else "[print(line, end='', flush=True) for line in asked]"
    begin = "import time; from benchmarks.served import requests; asked = requests(); print('up', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{begin}; {work}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as far:
        assert far.stdin is not None
        assert far.stdout is not None
        assert far.stdout.readline() == "up\n"
        if not busy:
            far.stdin.write("3\n")
            far.stdin.flush()
            assert far.stdout.readline() == "3\n"
        far.stdin.close()
        assert far.wait(timeout=30) == status


def test_authors_code_that_is_not_at_the_path_is_an_error(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "authors", raising=False)
    with pytest.raises(ModuleNotFoundError, match="authors"):
        peers.authors_model(dataclasses.replace(PEER, kind="authors", path=str(tmp_path)), padding=False)
    del sys.modules["authors"]
