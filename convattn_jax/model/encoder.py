"""The encoder: embeddings, then post-norm Transformer layers (Devlin et al. 2019), unrolled or scanned."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.config import check_choice
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.dropout import Seed, dropout, seed_from_key
from convattn_jax.model.embedding import lookup
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.layers import LayerNorm, Linear, gelu, kernel_init
from convattn_jax.model.mixers import MIXERS
from convattn_jax.model.operations import PLAIN, Operations
from convattn_jax.model.scores import TERMS

OUTPUTS = ("hidden", "attention", "dynamic_query", "dynamic_key")


class Encoded(NamedTuple):
    """The last layer's hidden states and, by name, what else was asked for, stacked over layers.

    hidden (L+1, B, T, D), the embeddings first; attention (L, B, H, T, S), before dropout; dynamic_query
    (L, B, H, T, W) and dynamic_key (L, B, H, S, W), each token's kernel in logit units, where the scores have the term.
    """

    last: Float[Array, "B T D"]
    outputs: dict[str, Array]


class Embeddings(nn.Module):
    """Token, segment and absolute-position embeddings, normalised, projected to the encoder's width."""

    config: ModelConfig
    vocab_rows: int
    operations: Operations = PLAIN

    @nn.compact
    def __call__(self, inputs: Inputs, seed: Seed | None) -> Float[Array, "B T D"]:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        word = self.param("word", kernel_init, (self.vocab_rows, c.embedding))
        types = self.param("type", kernel_init, (2, c.embedding)).astype(dtype)
        x = lookup(self.operations.gather(word), inputs.ids, dtype, self.operations.add_by_ids)
        if c.positions == "absolute":
            table = self.param("position", kernel_init, (c.max_length, c.embedding))
            x += lookup(table, inputs.positions, dtype, self.operations.add_by_ids)
        x += jnp.where(inputs.types[..., None] == 1, types[1], types[0])
        x = dropout(LayerNorm(c.embedding, name="norm")(x), c.dropout, seed)
        x = self.operations.hold(x)
        return x if c.embedding == c.width else Linear((c.embedding,), (c.width,), name="project")(x)


class Block(nn.Module):
    """One layer: x = LN(x + attention(x)); x = LN(x + W_2 gelu(W_1 x)). Returns (x, named outputs)."""

    config: ModelConfig
    operations: Operations
    outputs: tuple[str, ...]

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], seed: Array | None, inputs: Inputs, shared: Mapping[str, Any]
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        c = self.config
        seeds = (None, None, None) if seed is None else tuple(seed)
        mixer = MIXERS[c.mixer].module(c, self.operations, name="attention")
        x, out, asked = mixer(x, inputs, seeds[0], shared, self.outputs)
        add_norm = self.operations.add_norm
        x = LayerNorm(c.width, add_norm, name="attention_norm")(x, out, c.dropout, seeds[1])
        hidden = gelu(Linear((c.width,), (c.hidden,), name="mlp_in")(x))
        out = Linear((c.hidden,), (c.width,), name="mlp_out")(hidden)
        x = LayerNorm(c.width, add_norm, name="mlp_norm")(x, out, c.dropout, seeds[2])
        if "hidden" in self.outputs:
            asked = {**asked, "hidden": x}
        return x, asked


class Encoder(nn.Module):
    """Inputs -> hidden states. Dropout is on iff there is an rng `dropout`; `outputs` names what else to return."""

    config: ModelConfig
    vocab_rows: int
    operations: Operations = PLAIN

    @nn.compact
    def __call__(self, inputs: Inputs, outputs: tuple[str, ...] = ()) -> Encoded:
        c = self.config
        for name in outputs:
            check_choice("outputs", name, OUTPUTS)
        seeds = None
        if self.has_rng("dropout"):  # one word pair per place, equal whether layers are unrolled or scanned
            key = self.make_rng("dropout")
            seeds = jax.vmap(seed_from_key)(jax.random.split(key, 3 * c.layers + 1))
        per_layer = None if seeds is None else seeds[1:].reshape(c.layers, 3, 2)
        x = Embeddings(c, self.vocab_rows, self.operations, name="embeddings")(
            inputs, None if seeds is None else seeds[0]
        )

        shared_modules = dict(row.shared for name in c.scores if (row := TERMS[name]).shared is not None)
        shared = {name: module(c.term_shape(), name=name)(inputs) for name, module in shared_modules.items()}

        first = x
        block = nn.remat(Block, prevent_cse=c.loop == "unroll") if c.remat else Block
        if c.loop == "scan":
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0 if per_layer is not None else nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.layers,
            )
            x, stacked = layers(c, self.operations, outputs, name="layers")(x, per_layer, inputs, shared)
        else:
            asked, block = [], nn.jit(block)  # traced and lowered once for all layers; the compiler sees it unrolled
            for i in range(c.layers):
                seed = None if per_layer is None else per_layer[i]
                x, named = block(c, self.operations, outputs, name=f"layer_{i}")(x, seed, inputs, shared)
                asked.append(named)
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *asked)
        if "hidden" in outputs:
            stacked = {**stacked, "hidden": jnp.concatenate([first[None], stacked["hidden"]])}
        return Encoded(x, stacked)


def stack_layers(params: dict) -> dict:
    """Parameters of unrolled layers (layer_0, layer_1, ...) as those of scanned ones (layers, with a leading axis)."""
    names = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name[6:]))
    rest = {name: value for name, value in params.items() if name not in names}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def unstack_layers(params: dict) -> dict:
    """The inverse of `stack_layers`."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**rest, **{f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)}}
