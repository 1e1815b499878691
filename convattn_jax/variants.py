"""python -m convattn_jax.variants: the table of all variants in configs/, put together from the model's own tables."""

import collections
import dataclasses
import importlib
import inspect
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from rich.text import Text

import configs
from configs import base
from convattn_jax import arguments
from convattn_jax.config import UserError, from_config
from convattn_jax.kernels.choice import IMPLEMENTATIONS, Call
from convattn_jax.model.branches import BRANCHES
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.inputs import from_mask
from convattn_jax.model.mixers import MIXERS
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.model.projections import PROJECTIONS, ProjectionConfig
from convattn_jax.model.rotations import ROTATIONS
from convattn_jax.model.score import Score
from convattn_jax.model.scores import TERMS
from convattn_jax.model.term import Surroundings

BASELINE = "no_positions"
LEGEND = """\
score_ij is the sum of the terms; q, k, v are linear in the hidden states x unless an equation says otherwise.
Parameters are counted, those of a layer against {baseline}'s; the model has {layers} layers of width {width}.
Cost: multiply-adds of a layer's forward pass, beside its linear maps of B T D^2 each; what lacks one of them saves it.
B rows, T tokens, D width, H heads, K = D/H, W taps of the part in question, c(x) = clip(x, -n, n), W = 2n + 1.
"""
COLUMNS = ("variant", "equation", "parameters a layer", "whole model", "cost of a layer", "fused")
NUMBERS = COLUMNS[2:4]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table; `added` counts a layer's parameters against the baseline's, `total` the whole model's."""

    name: str
    equation: str
    added: int
    total: int
    cost: str
    fused: bool

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        fused = "yes" if self.fused else "no"
        return self.name, self.equation, f"{self.added:+,}", f"{self.total:,}", self.cost, fused


def load(size: str) -> dict[str, Any]:
    """The configurations that are variants of the model, by name: those that come in sizes."""
    found = {}
    for path in sorted(pathlib.Path(configs.__file__ or "").parent.glob("[!_]*.py")):
        get_config = getattr(importlib.import_module(f"configs.{path.stem}"), "get_config", None)
        if path.stem != "base" and get_config is not None and "size" in inspect.signature(get_config).parameters:
            found[path.stem] = get_config(size)
    return found


def variants(size: str) -> list[Variant]:
    """The table's rows, the baseline first."""
    loaded = load(size)
    counted = {name: parameters(_model(c), c.tokenizer.vocab_size) for name, c in loaded.items()}
    rows = []
    for name in sorted(loaded, key=lambda name: (name != BASELINE, name)):
        config, (layer, total) = _model(loaded[name]), counted[name]
        served = fused(config, loaded[name].data.length)
        rows.append(Variant(name, equation(config), layer - counted[BASELINE][0], total, cost(config), served))
    return rows


def _model(config: Any) -> ModelConfig:
    return from_config(ModelConfig, config.model, "model.")


def parameters(config: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """(of one layer, of the whole model), counted on a model that is never filled with numbers."""
    model = MaskedLM(dataclasses.replace(config, layers=1, loop="unroll"), vocab_size)
    shapes = jax.eval_shape(model.initial_params, jax.random.key(0))

    def count(tree) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    layer = count(shapes["encoder"]["layer_0"])
    return layer, count(shapes) + (config.layers - 1) * layer


def fused(config: ModelConfig, length: int) -> bool:
    """Whether a fused kernel serves the layers on a GPU, in training."""
    if config.mixer != "attention" or any(BRANCHES[name].needs_map for name in config.branches):
        return False
    *taps, dense = score_shapes(config, length)
    radius = max((array.shape[-1] // 2 for array in taps if array is not None), default=0)
    call = Call("gpu", length, length, config.head_size, "bfloat16", dense=dense is not None, radius=radius)
    return IMPLEMENTATIONS["pallas_gpu"](call) is None


def score_shapes(config: ModelConfig, length: int) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """The shapes of fixed, dynamic_query, dynamic_key and dense in the sum of a layer's terms."""
    shape, inputs, key = config.term_shape(), from_mask(jnp.zeros((1, length), jnp.int32)), jax.random.key(0)

    def build() -> tuple[jax.Array | None, ...]:
        total = Score()
        for row in (TERMS[name] for name in config.scores):
            made = None if row.shared is None else row.shared[1](shape).init_with_output(key, inputs)[0]
            total += row.module(shape).init_with_output(key, Surroundings(inputs, made))[0]
        return total.fixed, total.dynamic_query, total.dynamic_key, total.dense

    return jax.eval_shape(build)


# --- what the rows of the model's tables say, put together ---


def equation(config: ModelConfig) -> str:
    """The score (or what stands for attention), then what is done before and after it."""
    parts = [MIXERS[config.mixer].equation or " + ".join(TERMS[name].equation for name in config.scores)]
    parts.append(ROTATIONS[config.rotation].equation)
    parts += [_projection("q, k", config.query_key), _projection("v", config.value)]
    parts += [f"out_i += {BRANCHES[name].equation}" for name in config.branches]
    parts.append("x_t += p_t" if config.positions == "absolute" else "")
    return "; ".join(filter(None, parts))


def _projection(what: str, config: ProjectionConfig) -> str:
    if config.kind == "linear":
        return ""
    text = f"{what} = {PROJECTIONS[config.kind].equation}"
    if config.kind == "separable" and not config.activation:
        text += " without gelu"
    return text + " in half of the heads" if config.half else text


def cost(config: ModelConfig) -> str:
    """The sum of the rows' costs, equal monomials added up."""
    rows = [MIXERS[config.mixer], *(TERMS[name] for name in config.scores), ROTATIONS[config.rotation]]
    rows += [*(BRANCHES[name] for name in config.branches), *[PROJECTIONS[config.query_key.kind]] * 2]
    return add_up([row.cost for row in [*rows, PROJECTIONS[config.value.kind]]])


def add_up(costs: Sequence[str]) -> str:
    """'2 a + b' of 'a', 'b' and 'a'; what stands in parentheses is left alone."""
    total: dict[str, float] = collections.defaultdict(float)
    for monomial in (part for text in costs for part in re.split(r" \+ (?![^(]*\))", text)):
        sign, factor, rest = re.fullmatch(r"(-?)(\d+(?:\.\d+)? ?)?(.*)", monomial).groups()  # pyright: ignore[reportOptionalMemberAccess]
        if rest:
            total[rest] += float(sign + (factor or "1"))
    text = " + ".join(f"{factor:g} {rest}" for rest, factor in total.items() if factor)
    return re.sub(r"(?<![\d.])1 ", "", text).replace("+ -", "- ") or "0"


# --- print ---


def as_table(rows: Sequence[Variant]) -> rich.table.Table:
    """For a terminal."""
    table = rich.table.Table(header_style="bold", row_styles=("", "dim"))
    for name in COLUMNS:
        table.add_column(
            name, justify="right" if name in NUMBERS else "left", no_wrap=name != "equation", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.cells()))  # not markup: equations have brackets
    return table


def as_markdown(rows: Sequence[Variant]) -> str:
    """For a page."""
    lines = [COLUMNS, tuple("--:" if name in NUMBERS else "---" for name in COLUMNS)]
    for row in rows:
        name, formula, added, total, price, served = (cell.replace("|", r"\|") for cell in row.cells())
        lines.append((f"`{name}`", f"`{formula}`", added, total, f"`{price}`", served))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def names() -> str:
    """What each key of a configuration may name, term by term with its equation."""
    tables = {
        "model.scores": TERMS,
        "model.rotation": ROTATIONS,
        "model.branches": BRANCHES,
        "model.query_key.kind, model.value.kind": PROJECTIONS,
        "model.mixer": MIXERS,
    }
    lines = []
    for key, table in tables.items():
        lines.append(f"\n{key}")
        lines += [f"  {name:20} {row.equation or '(as it is)'}" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table; what the user can mend is one line on stderr and exit status 2."""
    parser = arguments.Parser("convattn_jax.variants", description=__doc__)
    parser.add_argument("--format", choices=("table", "markdown"), default="table", help="for a terminal or for a page")
    parser.add_argument("--size", choices=base.SIZES, default="base", help="the model whose parameters are counted")
    try:
        args = parser.parse_args(argv)
        rows = variants(args.size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    config: Any = base.get_config(args.size)
    legend = LEGEND.format(baseline=BASELINE, layers=config.model.layers, width=config.model.width)
    legend += "\n" + names()
    if args.format == "markdown":
        print(as_markdown(rows), legend, sep="\n\n", end="")
        return
    console = rich.console.Console(width=None if sys.stdout.isatty() else 180)
    console.print(as_table(rows))
    console.print(Text(legend), end="")


if __name__ == "__main__":
    main()
