"""BERT for masked language modelling: the encoder and its head as one model."""

from jax import Array
from jaxtyping import Float, Int

from convattn_jax.model.heads import MLMHead, take_positions
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.task import TaskModel


class MaskedLM(TaskModel):
    """Encoder and tied head: logits (B, T, V) over the embedding's rows."""

    def setup(self):
        """Names the two parts."""
        super().setup()
        self.head = MLMHead(self.config.width, self.vocab_size)

    def logits(self, hidden: Float[Array, "B P D"]) -> Float[Array, "B P V"]:
        """One score per row of the embedding."""
        word = self.encoder.get_variable("params", "embeddings")["word"]
        return self.head(hidden, self.operations.gather(word))

    def __call__(self, inputs: Inputs, positions: Int[Array, "B P"] | None = None) -> Float[Array, "B P V"]:
        """Logits at the given positions, or at all of them."""
        hidden = self.encode(inputs).last
        return self.logits(hidden if positions is None else take_positions(hidden, positions))
