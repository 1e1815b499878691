"""BERT for a label per text: encoder, pooler on the first token, linear head (Devlin et al. 2019, section 4.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from convattn_jax.model.dropout import dropout, seed_from_key
from convattn_jax.model.layers import Linear
from convattn_jax.model.task import TaskModel


class SequenceClassifier(TaskModel, kw_only=True):
    """logits = W_c dropout(tanh(W_p x_0 + b_p)) + b_c, (B, classes); one class is a regression's score."""

    classes: int

    def setup(self):
        """Names the three parts."""
        super().setup()
        width = self.config.width
        self.pooler = Linear((width,), (width,))
        self.classifier = Linear((width,), (self.classes,))

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B C"]:
        """One score per class; dropout is on iff there is an rng `dropout`."""
        seed = seed_from_key(self.make_rng("dropout")) if self.has_rng("dropout") else None
        pooled = dropout(jnp.tanh(self.pooler(hidden[:, :1])), self.config.dropout, seed)
        return self.classifier(pooled)[:, 0]


def widen(params: dict[str, Any], outputs: int) -> dict[str, Any]:
    """Parameters with a head of so many outputs, those beyond the head's own of zeros."""

    def wide(leaf: Any) -> Any:
        pad = jnp.pad if isinstance(leaf, Array) else np.pad
        return pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, outputs - leaf.shape[-1])])

    return {**params, "classifier": jax.tree.map(wide, params["classifier"])}


def narrow(params: dict[str, Any], outputs: int) -> dict[str, Any]:
    """Parameters with the first outputs of the head only."""
    return {**params, "classifier": jax.tree.map(lambda leaf: leaf[..., :outputs], params["classifier"])}
