"""Fine-tuning a toy model on four devices: a program that test_glue_training.py starts with what one device found."""

import functools
import sys

import jax
import numpy as np
import test_glue_training as toy
import tiny

from convattn_jax.collectives import collectives
from convattn_jax.glue.training import Trainer
from convattn_jax.kernels import attend, choice
from convattn_jax.kernels.composite import composite_attention
from convattn_jax.model.classifier import SequenceClassifier
from convattn_jax.model.operations import PLAIN


def fused(*args):
    """The attention of GPUs, the kernel's body run on the CPU."""
    with choice.compiling_for("gpu"):
        return attend.attend_by("pallas_gpu")(*args)


attend._fused = lambda name: functools.partial(composite_attention, interpret=True)

# seeds, attention, and how many seeds and rows of a batch of four each device has
CASES = [
    ((42, 97, 834, 622), PLAIN.attend, 1, 4),
    ((42, 97), PLAIN.attend, 1, 2),
    ((42, 97, 834), PLAIN.attend, 3, 1),
    ((42, 97), fused, 1, 2),
]


def main(path: str) -> None:
    """Raises where four devices disagree with one; the file holds its logits, parameters and mean gradients."""
    assert jax.device_count() == 4
    one = np.load(path)
    for seeds, attention, seeds_each, rows_each in CASES:
        operations = PLAIN._replace(attend=functools.partial(noted, attention, seen := set()))
        trainer = Trainer(SequenceClassifier(tiny.model_config(layers=1), toy.SIZE, operations, classes=3))
        state, _ = toy.train(trainer, seeds, [toy.fresh_encoder(trainer.model)])
        shards = state.params["classifier"]["kernel"].addressable_shards
        assert [shard.data.shape[0] for shard in shards] == [seeds_each] * 4
        assert rows_each in seen, seen
        text = trainer.prepare_step(len(seeds), 4, 16, now=True).result().as_text()
        sent = sum(one.bytes for one in collectives(text) if one.group > 1)
        assert (sent < 100) == (rows_each == 4), sent  # seeds apart tell nothing but their losses
        common = min(len(seeds), 3)
        # Adam divides by a gradient's size: near 0 two forms of attention end apart there, but not in their gradients
        exact = {"params": (state.params, toy.TOLERANCE)} if attention is PLAIN.attend else {}
        for name, (tree, tolerance) in (exact | {"mean": (state.opt_state[1].mu, toy.OF_MEANS)}).items():
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                np.testing.assert_allclose(one[f"{name}{i}"][:common], leaf[:common], **tolerance, err_msg=name)
        found = trainer.predict(state.params, toy.texts(6), [16], 4, toy.PAD)
        np.testing.assert_allclose(one["logits"][:common], found[:common], rtol=1e-3, atol=1e-5)
        of_last = trainer.params_of(state.params, common - 1, 3)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(of_last), strict=True):
            np.testing.assert_array_equal(a[common - 1], b)


def noted(attention, seen, qkv, *rest):
    """Attention that notes for how many rows it was asked."""
    seen.add(jax.tree.leaves(qkv)[0].shape[0])
    return attention(qkv, *rest)


if __name__ == "__main__":
    main(sys.argv[1])
