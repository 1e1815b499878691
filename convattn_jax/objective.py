"""What pre-training minimises: the cross-entropy of masked tokens (Devlin et al. 2019, section 3.1)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from convattn_jax.masking import Masked, MaskingConfig, Vocabulary, mask_tokens
from convattn_jax.model import inputs as model_inputs
from convattn_jax.model.heads import cross_entropy
from convattn_jax.model.mlm import MaskedLM

EVALUATION_KEY = 20_21  # held-out masks are the same for every run, variant and seed


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelling:
    """An `Objective` of `train`, and its evaluation beside a model that knows word frequencies only."""

    model: MaskedLM
    vocabulary: Vocabulary
    layout: str
    masking: MaskingConfig
    unigram: np.ndarray  # (vocabulary rows,) log-probability of each id, context-free

    def inputs(self, rows: Array) -> model_inputs.Inputs:
        """What the encoder reads, of bare token rows."""
        v = self.vocabulary
        return model_inputs.LAYOUTS[self.layout](rows, pad=v.pad, cls=v.cls, sep=v.sep)

    def prepare(self, key: Array, rows: Array) -> tuple[Masked, Array]:
        """Masks the rows; the weight is the number of predicted tokens."""
        masked = mask_tokens(key, self.inputs(rows), self.vocabulary, self.masking)
        return masked, masked.weights.sum()

    def sums(self, params: Any, batch: Masked, key: Array | None) -> dict[str, Array]:
        """Loss in nats over the predicted tokens, and how many tokens are read; dropout iff there is a key."""
        logits = self._logits(params, batch, key)
        loss = (cross_entropy(logits, batch.labels) * batch.weights).sum()
        return {"loss": loss, "weight": batch.weights.sum(), "tokens": batch.inputs.valid.sum()}

    def evaluation_sums(self, params: Any, rows: Array, index: Array | int) -> dict[str, Array]:
        """Held-out figures of the index-th batch; `mask_*` over the slots that show [MASK], which give nothing away."""
        masked, weight = self.prepare(jax.random.fold_in(jax.random.key(EVALUATION_KEY), index), rows)
        logits = self._logits(params, masked, None)
        loss = cross_entropy(logits, masked.labels) * masked.weights
        unigram = -jnp.asarray(self.unigram)[masked.labels] * masked.weights
        hits = (logits.argmax(-1) == masked.labels) * masked.weights
        return {
            "weight": weight,
            "loss": loss.sum(),
            "accuracy": hits.sum(),
            "unigram": unigram.sum(),
            "mask_weight": masked.hidden.sum(),
            "mask_loss": (loss * masked.hidden).sum(),
            "mask_unigram": (unigram * masked.hidden).sum(),
        }

    def _logits(self, params: Any, batch: Masked, key: Array | None) -> Array:
        rngs = None if key is None else {"dropout": key}
        logits: Any = self.model.apply({"params": params}, batch.inputs, batch.positions, rngs=rngs)
        return logits


def unigram_log_probabilities(counts: np.ndarray, special: np.ndarray, rows: int) -> np.ndarray:
    """log p(id) of ordinary ids, add-one smoothed, as float32 (rows,); -inf's stand-in, -30, for all others."""
    log_p = np.full(rows, -30.0, np.float32)
    ordinary = ~special
    smoothed = counts[ordinary] + 1.0
    log_p[: len(counts)][ordinary] = np.log(smoothed / smoothed.sum())
    return log_p
