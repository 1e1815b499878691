"""What every model with a task shares: an encoder, a head on it, fresh parameters."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from convattn_jax.config import check
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.encoder import Encoded, Encoder, stack_layers
from convattn_jax.model.inputs import Inputs, from_mask
from convattn_jax.model.operations import PLAIN, Operations


class TaskModel(nn.Module):
    """An encoder and what stands on it. `vocab_size` counts the ids there are; the embedding has a few rows more."""

    config: ModelConfig
    vocab_size: int
    operations: Operations = PLAIN

    def setup(self):
        """Names the encoder; a task adds its head."""
        self.encoder = Encoder(self.config, self.vocab_rows, self.operations)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: the vocabulary, rounded up for the matrix units."""
        return -(-self.vocab_size // self.config.vocab_multiple) * self.config.vocab_multiple

    @nn.nowrap
    def initial_params(self, key: Array) -> dict[str, Any]:
        """Fresh parameters: the same numbers for unrolled and scanned layers."""
        unrolled = dataclasses.replace(self.config, loop="unroll", remat=False)
        inputs = from_mask(jnp.zeros((1, min(8, self.config.max_length)), jnp.int32))
        params: Any = self.clone(config=unrolled, parent=None).init(key, inputs)["params"]
        if self.config.loop == "scan":
            params = {**params, "encoder": stack_layers(params["encoder"])}
        return params

    def encode(self, inputs: Inputs, outputs: tuple[str, ...] = ()) -> Encoded:
        """Hidden states, and by name what else is asked for (see `Encoded`)."""
        c, length = self.config, inputs.ids.shape[1]
        check(
            c.longest is None or length <= c.longest,
            f"model.max_length={c.max_length}: {length} tokens have no absolute position; raise it, or choose a "
            "variant without absolute positions",
        )
        return self.encoder(inputs, outputs)

    def logits(self, hidden: Float[Array, "B T D"]) -> Array:
        """The head's answer to the last layer's hidden states."""
        raise NotImplementedError

    def explain(self, inputs: Inputs, outputs: tuple[str, ...]) -> tuple[Array, dict[str, Array]]:
        """Logits, and by name what else is asked for (see `Encoded`)."""
        encoded = self.encode(inputs, outputs)
        return self.logits(encoded.last), encoded.outputs

    def __call__(self, inputs: Inputs) -> Array:
        """Logits."""
        return self.logits(self.encode(inputs).last)
