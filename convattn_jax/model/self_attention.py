"""The attention of a layer as a module: projections, rotation, the score's terms, attention, branches.

B batch, T position, D width, H heads, K head size.
"""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.model.attention import attention_map, drop, dynamic_taps, separate, weighted_values
from convattn_jax.model.branches import BRANCHES
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.dropout import Seed
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import Linear
from convattn_jax.model.operations import PLAIN, Operations
from convattn_jax.model.projections import project, projection
from convattn_jax.model.rotations import ROTATIONS, no_rotation
from convattn_jax.model.score import Score
from convattn_jax.model.scores import TERMS
from convattn_jax.model.term import Surroundings, TermShape


class SelfAttention(nn.Module):
    """Projections, rotation, the score's terms, attention, branches, output projection; and what was asked for."""

    config: ModelConfig
    operations: Operations = PLAIN

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        inputs: Inputs,
        seed: Seed | None,
        shared: Mapping[str, Any],
        outputs: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], dict[str, Array]]:
        """x, for what else reads it (see `Convolve`), the layer's output, and by name those of `outputs` that it has.

        Args:
          shared: what the terms of all layers share, by the names of `TERMS`' rows: position embeddings, say.
          outputs: attention, dynamic_query, dynamic_key. A map of attention is made of arrays (B, H, T, T), whatever
            `operations` holds: so too where a branch needs one.
        """
        c = self.config
        heads, shape = (c.heads, c.head_size), c.term_shape()
        kinds = {"query": c.query_key, "key": c.query_key, "value": c.value}
        projections = [projection(kind, c.width, heads, name) for name, kind in kinds.items()]
        x, qkv = project(projections, x, inputs, self.operations.convolve)
        rotate = ROTATIONS[c.rotation].function
        if rotate is not no_rotation:
            q, k, v = separate(qkv)
            qkv = rotate(q, inputs.positions), rotate(k, inputs.positions), v
        q, k, v = separate(qkv)
        score = sum((_term(name, shape)(_surroundings(name, inputs, shared)) for name in c.scores), Score())

        asked: dict[str, Array] = {}
        if "dynamic_query" in outputs and score.dynamic_query is not None:
            asked["dynamic_query"] = dynamic_taps(q, score.dynamic_query)
        if "dynamic_key" in outputs and score.dynamic_key is not None:
            asked["dynamic_key"] = dynamic_taps(k, score.dynamic_key)
        segments, alpha = (inputs.query_segments, inputs.key_segments), None
        if "attention" in outputs or any(BRANCHES[name].needs_map for name in c.branches):
            alpha = attention_map(q, k, score, *segments)
            if "attention" in outputs:
                asked["attention"] = alpha
            alpha = drop(alpha, c.attention_dropout, seed)
            out = weighted_values(alpha, v)
        else:
            out = self.operations.attend(qkv, score, *segments, c.attention_dropout, seed)
        for name in c.branches:
            out += BRANCHES[name].module(shape, name=name)(v, alpha, inputs)
        return x, Linear(heads, (c.width,), name="output")(out), asked


def _term(name: str, shape: TermShape) -> nn.Module:
    return TERMS[name].module(shape, name=name)


def _surroundings(name: str, inputs: Inputs, shared: Mapping[str, Any]) -> Surroundings:
    row = TERMS[name].shared
    return Surroundings(inputs, None if row is None else shared[row[0]])
