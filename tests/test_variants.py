"""Every configuration trains, and the table of variants says what it is."""

import pathlib
import re
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from axes import choices, layer_changes
from ml_collections import ConfigDict

from configs import base
from convattn_jax import train, variants
from convattn_jax.config import load_config_file, parse
from convattn_jax.model.branches import BRANCHES
from convattn_jax.model.heads import cross_entropy
from convattn_jax.model.inputs import Inputs, from_mask
from convattn_jax.model.mixers import MIXERS
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.model.projections import PROJECTIONS
from convattn_jax.model.rotations import ROTATIONS
from convattn_jax.model.scores import TERMS

VOCABULARY = 8
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
VARIANTS = ["base", *variants.load("tiny")]


def shrunken(c: ConfigDict) -> ConfigDict:
    """One layer of width 16, whatever the size; the variant stays."""
    c = c.model
    c.update(layers=1, width=16, heads=2, hidden=16, embedding=16, vocab_multiple=8, max_length=16, dtype="float32")
    c.radius, c.query_key.radius, c.value.radius = min(c.radius, 4), 1, 1
    return c


class Memory:
    """An `Objective`: name every token of two fixed rows, one of them packed, one padded."""

    def __init__(self, model: MaskedLM):
        self.model = model

    def prepare(self, key: jax.Array, rows: jax.Array) -> tuple[Any, jax.Array]:
        inputs = harness.inputs_of((3, 5), (6,), length=8)._replace(ids=rows)
        return inputs, inputs.valid.sum()

    def sums(self, params: Any, batch: Inputs, key: jax.Array | None) -> dict[str, jax.Array]:
        logits: Any = self.model.apply({"params": params}, batch)
        return {"loss": (cross_entropy(logits, batch.ids) * batch.valid).sum(), "weight": batch.valid.sum()}


def losses(model: MaskedLM, steps: int = 4) -> list[float]:
    optimizer = optax.sgd(0.1)
    params = model.initial_params(jax.random.key(0))
    state = train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = jax.jit(train.make_train_step(Memory(model), optimizer, seed=0))
    rows = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, 8)), jnp.int32)
    out = []
    for _ in range(steps):
        state, sums = step(state, rows)
        assert np.isfinite(sums["gradient_norm"])
        out.append(float(sums["loss"] / sums["weight"]))
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_a_configuration_trains(name):
    config = shrunken(load_config_file(str(CONFIGS / f"{name}.py")))
    loss = losses(MaskedLM(harness.model_config(config), VOCABULARY))
    assert np.isfinite(loss).all()
    assert loss == sorted(loss, reverse=True)
    assert loss[-1] < loss[0] - 0.01


def named(choice):
    return " ".join(map(str, choice.values()))


# The first choices hold most pairs of axes; layers meet all of them in test_mixers.py.
@pytest.mark.parametrize(
    "choice",
    [pytest.param(c, id=named(c), marks=[pytest.mark.slow] if i >= 4 else []) for i, c in enumerate(choices())],
)
def test_any_combination_takes_a_step(choice):
    loss = losses(MaskedLM(harness.tiny_config(**layer_changes(choice)), VOCABULARY), steps=2)
    assert loss[1] < loss[0]


# --- every file ---


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "base"])
def test_a_configuration_is_named_and_described(name):
    text = (CONFIGS / f"{name}.py").read_text()
    for size in base.SIZES:
        config = parse(["main", f"--config={CONFIGS}/{name}.py:{size}"]).config
        assert config.name == base.name(name, size)
        harness.model_config(config.model)
    command = re.search(r"python -m convattn_jax.main --config=(\S+)", text)
    assert command is None or command[1] == f"configs/{name}.py"


def test_no_two_configurations_are_the_same_model():
    models = [load_config_file(str(CONFIGS / f"{name}.py")).model.to_json() for name in VARIANTS if name != "base"]
    assert len(set(models)) == len(models)


def test_every_row_of_every_table_is_in_some_configuration():
    models = [harness.model_config(load_config_file(str(CONFIGS / f"{name}.py")).model) for name in VARIANTS]
    used = {m.mixer for m in models} | {m.rotation for m in models} | {m.value.kind for m in models}
    used |= {m.query_key.kind for m in models} | {name for m in models for name in (*m.scores, *m.branches)}
    tables = set().union(TERMS, ROTATIONS, PROJECTIONS, BRANCHES, MIXERS)
    assert tables - used == {"convbert_reference"}  # only there to load checkpoints


@pytest.mark.parametrize("name", VARIANTS)
def test_one_mask_is_told_from_another_by_every_variant_but_the_one_without_positions(name):
    # Content alone cannot: equal tokens ask and answer alike. Nor can values that know their neighbours.
    model = MaskedLM(harness.model_config(shrunken(load_config_file(str(CONFIGS / f"{name}.py")))), VOCABULARY)
    mask, places = 4, jnp.array([[1, 4, 6]])
    ids = jnp.array([[2, 5, 6, 5, 7, 6, 5, 3]]).at[:, places[0]].set(mask)
    params = model.initial_params(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    moved = jax.tree.map(lambda leaf, key: leaf + 0.5 * jax.random.normal(key, leaf.shape), params, keys)
    logits: Any = model.apply({"params": moved}, from_mask(ids), places)
    apart = float(jnp.abs(logits[0, 1:, :VOCABULARY] - logits[0, 0, :VOCABULARY]).min(0).max())
    assert (apart == 0) == (name == "no_positions")


# --- the table of variants ---


@pytest.fixture(scope="module")
def rows() -> dict[str, variants.Variant]:
    return {row.name: row for row in variants.variants("tiny")}


def test_the_table_has_every_configuration_the_baseline_first(rows):
    assert next(iter(rows)) == variants.BASELINE
    assert set(rows) == set(VARIANTS) - {"base"}


def test_parameters_of_a_layer_are_those_of_the_equations(rows):
    D, H, K, W = 128, 2, 64, 17
    expected = {
        "no_positions": 0,
        "bert": 0,
        "composite": H * W + K * W,
        "composite_key": H * W + 2 * K * W,
        "fixed_only": H * W,
        "shaw_values": 2 * K * 33,
        "transformer_xl": D * H * K + 2 * H * K,
        "t5": 0,
        "deberta": 2 * D * H * K,
        "depthwise_values": D * W + D,
        "depthwise_branch_scaled": H * K * W + H * K + H,
        "dense_values": 2 * D * D,
        "no_query_key": H * W + K * W - 2 * (D * D + D),
        "lightweight": H * W - (D * D + D),
    }
    assert {name: rows[name].added for name in expected} == expected


def test_the_whole_model_counts_what_layers_share(rows):
    baseline = rows[variants.BASELINE].total
    assert rows["bert"].total - baseline == 512 * 128
    assert rows["t5"].total - baseline == 32 * 2
    assert rows["composite"].total - baseline == 3 * rows["composite"].added
    config = load_config_file(str(CONFIGS / "deberta.py"))
    params = jax.eval_shape(
        MaskedLM(harness.model_config(config.model), config.tokenizer.vocab_size).initial_params, jax.random.key(0)
    )
    assert rows["deberta"].total == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_equations_and_costs_are_put_together_from_the_tables(rows):
    assert rows["composite"].equation == "q_i.k_j/sqrt(K) + beta[c(j-i)] + q_i.w^Q[c(j-i)]/sqrt(K)"
    assert rows["composite"].cost == "2 B T^2 D + H T^2 + B T D W"
    assert rows["bert"].equation == "q_i.k_j/sqrt(K); x_t += p_t"
    assert rows["mixed_values"].equation == "q_i.k_j/sqrt(K); v = gelu(depthwise(x)) W in half of the heads; x_t += p_t"
    assert rows["no_query_key"].cost == "2 B T^2 D + H T^2 + B T D W - 2 B T D^2"


def test_costs_add_up():
    assert variants.add_up(["a b", "2 a b", "0", "a (b + c)", "1.5 c + d", "-c"]) == "3 a b + a (b + c) + 0.5 c + d"
    assert variants.add_up(["0", "0"]) == "0"


def test_what_a_fused_kernel_serves(rows):
    config = harness.model_config(load_config_file(str(CONFIGS / "t5.py")).model)
    assert variants.fused(config, 64)
    assert not variants.fused(config, 128), "127 taps to each side are too many"
    served = {name: row.fused for name, row in rows.items()}
    assert served["composite_key"]
    assert not any(served[name] for name in ("shaw_values", "tupe_absolute", "lightweight", "convbert"))


def test_the_command_prints_a_table_and_markdown(capsys, monkeypatch, rows):
    monkeypatch.setattr(variants, "variants", lambda size: list(rows.values()))
    variants.main(["--size=tiny"])
    table = capsys.readouterr().out
    assert "beta[c(j-i)]" in table, "brackets are no markup"
    assert "3 layers of width 128" in table
    variants.main(["--format=markdown", "--size=tiny"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns == {len(variants.COLUMNS) + 1}


def test_the_command_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        variants.main(["--help"])
    assert end.value.code == 0
    assert "--format" in capsys.readouterr().out
