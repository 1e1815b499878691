"""What the table-driven suites share: tiny inputs and configurations, and agreement with an oracle, gradients included.

Everything runs in float64 (`jax.enable_x64`), where code and oracle agree to 1e-9.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from reference import Row, attend, oracle, term_scores

from configs import base
from convattn_jax.config import from_config
from convattn_jax.model import attention
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.mixers import MIXERS
from convattn_jax.model.scores import TERMS
from convattn_jax.model.term import Surroundings, TermShape

TOLERANCE = 1e-9
BF16 = 0.03  # of the largest output
Tree = Any


def tiny_config(**changes: Any) -> ModelConfig:
    """One layer of width 8; changes as radius=3 or value__kind="separable"."""
    c = base.get_config("tiny").model
    c.update(scores=("content",), positions="none", taps_init="wide", layers=1, width=8, heads=2, hidden=8, embedding=8)
    c.update(vocab_multiple=8, max_length=16, radius=2, dtype="float32")
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (c[group] if group else c)[name] = value
    return model_config(c)


def model_config(c: ConfigDict) -> ModelConfig:
    return from_config(ModelConfig, c, "model.")


# --- inputs ---


def inputs_of(*rows: tuple[int, ...], length: int) -> Inputs:
    """Packed rows, each given as the lengths of its texts; what is left over is padding. Positions restart."""
    segments, positions = np.zeros((2, len(rows), length), np.int32)
    for b, texts in enumerate(rows):
        start = 0
        for number, size in enumerate(texts, start=1):
            segments[b, start : start + size] = number
            positions[b, start : start + size] = np.arange(size)
            start += size
        positions[b, start:] = np.arange(length - start) + 1
    ids = jnp.zeros((len(rows), length), jnp.int32)
    return Inputs(ids, ids, jnp.asarray(positions), jnp.asarray(segments), jnp.asarray(segments))


def rows_of(inputs: Inputs) -> list[Row]:
    return [
        Row(*(np.asarray(x) for x in row))
        for row in zip(inputs.positions, inputs.query_segments, inputs.key_segments, strict=True)
    ]


def packed_and_padded(first: int, length: int, blind: bool) -> Inputs:
    """A row of two texts, and a row of one text whose padding looks at it, as `from_mask` has it.

    `blind`: the first query of the second row belongs to a text of which there is no key.
    """
    inputs = inputs_of((first, length - first), (first + 1,), length=length)
    segments = inputs.query_segments.at[1].set(1)
    return inputs._replace(query_segments=segments.at[1, 0].set(99) if blind else segments)


def draw(shapes: Tree, seed: int = 0) -> Tree:
    """Normal float64 numbers in the shapes of a tree: no parameter is left at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)


# --- agreement ---


def close(ours: Any, theirs: Any, tolerance: float = TOLERANCE, message: str = "") -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), tolerance, tolerance, err_msg=message)


def derivatives(function: Callable[[Tree], np.ndarray], tree: Tree, weights: np.ndarray, seed: int = 1):
    """For each leaf (path, random direction, the derivative of sum(weights x function) along it), by complex steps."""
    leaves, structure = jax.tree.flatten(tree)
    directions = jax.tree.leaves(draw(tree, seed))
    for number, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        stepped = [leaf + 1e-30j * directions[i] if i == number else leaf for i, leaf in enumerate(leaves)]
        value = function(jax.tree.unflatten(structure, stepped))
        yield jax.tree_util.keystr(path), directions[number], float((value.imag / 1e-30 * weights).sum())


def agree(out: Any, gradients: Tree, function: Callable[[Tree], np.ndarray], tree: Tree, weights: np.ndarray) -> None:
    """`out` is function(tree); `gradients` are those of sum(weights x function)."""
    close(out, function(tree))
    ours = jax.tree.leaves(gradients)
    for gradient, (path, direction, expected) in zip(ours, derivatives(function, tree, weights), strict=True):
        close((gradient * direction).sum(), expected, message=f"the gradient of {path}")


# --- score terms ---


class Terms:
    """Attention with some terms: `run(tree, inputs, weights)` gives (scores and output, gradients).

    The tree holds q, k, v, each term's own parameters and those of what it shares; outputs are (B, H, T, S + K), the
    scores beside the attended values.
    """

    def __init__(self, names: tuple[str, ...], radius: int = 2, heads: int = 2, head_size: int = 4):
        self.shape = TermShape(heads, head_size, heads * head_size, radius, 16, "wide", names)
        self.run = jax.jit(self._run)

    def tree(self, inputs: Inputs, seed: int = 0) -> Tree:
        s, (batch, length) = self.shape, inputs.ids.shape
        qkv = {name: jax.ShapeDtypeStruct((batch, length, s.heads, s.head_size), jnp.float64) for name in "qkv"}
        return draw({**qkv, **jax.eval_shape(self._init, inputs)}, seed)

    def _init(self, inputs: Inputs) -> Tree:
        own, shared = {}, {}
        for name in self.shape.scores:
            row, made = TERMS[name], None
            if row.shared is not None:
                made, shared_params = row.shared[1](self.shape).init_with_output(jax.random.key(0), inputs)
                shared[name] = shared_params["params"]
            own[name] = row.module(self.shape).init(jax.random.key(0), Surroundings(inputs, made)).get("params", {})
        return {"own": own, "shared": shared}

    def _out(self, tree: Tree, inputs: Inputs) -> jax.Array:
        score = attention.Score()
        for name in self.shape.scores:
            row, made = TERMS[name], None
            if row.shared is not None:
                made = row.shared[1](self.shape).apply({"params": tree["shared"][name]}, inputs)
            score += row.module(self.shape).apply({"params": tree["own"][name]}, Surroundings(inputs, made))
        q, k, v = tree["q"], tree["k"], tree["v"]
        full = attention.scores(q, k, score)
        full = jnp.broadcast_to(full, (q.shape[0], q.shape[2], *full.shape[2:]))
        out = attention.attend((q, k, v), score, inputs.query_segments, inputs.key_segments, 0.0, None)
        return jnp.concatenate([full, out.swapaxes(1, 2)], axis=-1)

    def _run(self, tree: Tree, inputs: Inputs, weights: jax.Array) -> tuple[jax.Array, Tree]:
        def weighted(tree: Tree):
            out = self._out(tree, inputs)
            return (out * weights).sum(), out

        gradients, out = jax.grad(weighted, has_aux=True)(tree)
        return out, gradients

    def expected(self, inputs: Inputs, tree: Tree) -> np.ndarray:
        """What the oracles say."""
        out = []
        for b, row in enumerate(rows_of(inputs)):
            scores = term_scores(row, tree["q"][b], tree["k"][b], tree["own"], tree["shared"], self.shape)
            _, values = attend(row, scores, tree["v"][b])
            out.append(np.concatenate([scores, values.swapaxes(0, 1)], axis=-1))
        return np.array(out)

    def weights(self, inputs: Inputs) -> np.ndarray:
        batch, length = inputs.ids.shape
        return np.random.default_rng(5).normal(size=(batch, self.shape.heads, length, length + self.shape.head_size))


def check_terms(names: tuple[str, ...], length: int = 6, radius: int = 2) -> None:
    """Everything that holds for every choice of terms: the oracle, its gradients, padding, packing, blind queries."""
    with jax.enable_x64(True):
        terms = Terms(names, radius)
        first = length // 2
        packed = packed_and_padded(first, length, blind=True)
        tree, weights = terms.tree(packed), terms.weights(packed)
        out, gradients = terms.run(tree, packed, weights)
        agree(out, gradients, functools.partial(terms.expected, packed), tree, weights)
        values = np.asarray(out)[..., length:]
        assert np.all(values[1, :, 0] == 0), "a query that sees no key gives zeros"

        only_values = weights.copy()
        only_values[..., :length] = 0
        _, gradients = terms.run(tree, packed, only_values)
        assert np.all(np.asarray(gradients["q"])[1, 0] == 0), "a query that sees no key has no gradient"

        other = {**tree, **{name: tree[name].copy() for name in "qkv"}}
        for name in "qkv":
            other[name][0, first:] += 1  # another text of the row
            other[name][1, first + 1 :] += 1  # padding
        changed = np.asarray(terms.run(other, packed, weights)[0])[..., length:]
        close(changed[0, :, :first], values[0, :, :first], message="what stands in another text matters")
        close(changed[1, :, : first + 1], values[1, :, : first + 1], message="what stands in padding matters")

        alone = inputs_of((length - first,), (first + 1,), length=length)
        moved = {**tree, **{name: np.stack([np.roll(tree[name][0], -first, 0), tree[name][1]]) for name in "qkv"}}
        separate = np.asarray(terms.run(moved, alone, weights)[0])[..., length:]
        close(separate[0, :, : length - first], values[0, :, first:], message="a packed text differs from one alone")


# --- whole layers ---


class Layer:
    """The mixer of a configuration: `run(tree, inputs, weights)` gives (output (B, T, D), gradients)."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.run = jax.jit(self._run)
        self.out = jax.jit(self._out)

    def _shared_modules(self) -> dict:
        shape = self.config.term_shape()
        rows = [row.shared for name in self.config.scores if (row := TERMS[name]).shared is not None]
        return {name: module(shape) for name, module in dict(rows).items()}

    def tree(self, inputs: Inputs, seed: int = 0) -> Tree:
        """x, the layer's own parameters, those of what terms share."""
        x = jax.ShapeDtypeStruct((*inputs.ids.shape, self.config.width), jnp.float64)
        tree = draw({"x": x, **jax.eval_shape(self.init, jax.random.key(0), inputs, x)}, seed)
        return {"x": tree["x"], **jax.tree.map(lambda leaf: leaf / 2, {k: tree[k] for k in ("own", "shared")})}

    def init(self, key: jax.Array, inputs: Inputs, x: Any) -> Tree:
        """Fresh parameters: the layer's own, and what its terms share, by the name of what is shared."""
        made, shared = {}, {}
        for name, module in self._shared_modules().items():
            made[name], variables = module.init_with_output(key, inputs)
            shared[name] = variables["params"]
        return {"own": self._mixer().init(key, x, inputs, None, made)["params"], "shared": shared}

    def _mixer(self):
        return MIXERS[self.config.mixer].module(self.config)

    def _out(self, tree: Tree, inputs: Inputs) -> jax.Array:
        made = {
            name: module.apply({"params": tree["shared"][name]}, inputs)
            for name, module in self._shared_modules().items()
        }
        return self._mixer().apply({"params": tree["own"]}, tree["x"], inputs, None, made)[1]

    def _run(self, tree: Tree, inputs: Inputs, weights: jax.Array) -> tuple[jax.Array, Tree]:
        def weighted(tree: Tree):
            out = self._out(tree, inputs)
            return (out * weights).sum(), out

        gradients, out = jax.grad(weighted, has_aux=True)(tree)
        return out, gradients

    def expected(self, inputs: Inputs, tree: Tree) -> np.ndarray:
        """What the oracles say."""
        shared = {name: tree["shared"][TERMS[name].shared[0]] for name in self.config.scores if TERMS[name].shared}
        mixer = oracle("MIXERS", self.config.mixer)
        rows = zip(rows_of(inputs), tree["x"], strict=True)
        return np.array([mixer(row, x, tree["own"], shared, self.config) for row, x in rows])


def check_against_oracle(config: ModelConfig, inputs: Inputs) -> tuple[Layer, Tree, np.ndarray]:
    """A layer's output and every gradient are its oracle's; returns what further checks need."""
    with jax.enable_x64(True):
        layer = Layer(config)
        tree = layer.tree(inputs)
        weights = np.random.default_rng(5).normal(size=tree["x"].shape)
        out, gradients = layer.run(tree, inputs, weights)
        agree(out, gradients, functools.partial(layer.expected, inputs), tree, weights)
    return layer, tree, weights


def check_layer(config: ModelConfig, length: int = 6, excludes: bool = True) -> None:
    """Everything that holds for every layer: the oracle, its gradients, padding, packing, blind queries.

    `excludes=False` leaves out the blind query, for a layer that lets -10000 stand for exclusion.
    """
    first = length // 2
    packed = packed_and_padded(first, length, blind=excludes)
    layer, tree, weights = check_against_oracle(config, packed)
    with jax.enable_x64(True):
        out = layer.run(tree, packed, weights)[0]
        other = {**tree, "x": tree["x"].copy()}
        other["x"][0, first:] += 1  # another text of the row
        other["x"][1, first + 1 :] += 1  # padding
        changed = layer.run(other, packed, weights)[0]
        close(changed[0, :first], out[0, :first], message="what stands in another text matters")
        close(changed[1, : first + 1], out[1, : first + 1], message="what stands in padding matters")

        alone = inputs_of((length - first,), (first + 1,), length=length)
        moved = {**tree, "x": np.stack([np.roll(tree["x"][0], -first, 0), tree["x"][1]])}
        separate = layer.run(moved, alone, weights)[0]
        close(separate[0, : length - first], out[0, first:], message="a packed text differs from one alone")


def check_bfloat16(config: ModelConfig, length: int = 6) -> None:
    """A layer on bfloat16 activations is within `BF16` of the largest output in float64, and returns bfloat16."""
    layer = Layer(config)
    with jax.enable_x64(True):
        inputs = inputs_of((length,), (length - 1,), length=length)
        tree = layer.tree(inputs)
        exact = layer.expected(inputs, tree)
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    rough = layer.out({**tree, "x": tree["x"].astype(jnp.bfloat16)}, inputs)
    assert rough.dtype == jnp.bfloat16
    worst = np.abs(np.asarray(rough, np.float64) - exact).max() / np.abs(exact).max()
    assert worst < BF16, f"{worst:.4f} of the largest output"
