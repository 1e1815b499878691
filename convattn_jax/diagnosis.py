"""Where a number that is not finite came from: one training step again, with a look at everything in it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from convattn_jax.model.encoder import unstack_layers
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling
from convattn_jax.train import TrainState, first_bad, parts_of, step_keys


def unrolled(objective: MaskedLanguageModelling, params: Any) -> tuple[MaskedLanguageModelling, Any]:
    """The same model and parameters with each layer called for itself, so that a layer's output is at hand."""
    model = objective.model
    config = dataclasses.replace(model.config, loop="unroll", remat=False)
    if model.config.loop == "scan":
        params = {**params, "encoder": unstack_layers(params["encoder"])}
    return dataclasses.replace(objective, model=MaskedLM(config, model.vocab_size, model.operations)), params


def where(objective: MaskedLanguageModelling, state: TrainState, rows: Array, seed: int, accumulate: int) -> str:
    """What is the first in the step that follows `state` not to be finite: a parameter, an output, a gradient.

    Modules are taken in the order in which they end; -inf is let pass in them, for masks are made of it.
    """
    if bad := first_bad(state.params):
        return f"first in the parameter {bad}"
    objective, params = unrolled(objective, state.params)
    names: list[str] = []

    def loss(params: Any, part: Any, key: Array, weight: Array) -> tuple[Array, tuple[list[Array], Array]]:
        flags: list[Array] = []
        names.clear()

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            leaves = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            if context.method_name == "__call__" and context.module.path and leaves:
                names.append("/".join(context.module.path))
                flags.append(jnp.stack([(jnp.isnan(leaf) | jnp.isposinf(leaf)).any() for leaf in leaves]).any())
            return out

        with nn.intercept_methods(note), jax.disable_jit():  # flags of a layer can't leave a jit of its own
            sums = objective.sums(params, part, key)
        return sums["loss"] / jnp.maximum(weight, 1), (flags, sums["loss"])

    prepare_key, dropout_key = step_keys(seed, state.step)
    batch, weight = objective.prepare(prepare_key, rows)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    for part, key in parts_of(batch, dropout_key, accumulate):
        grads, (flags, total) = gradient(params, part, key, weight)
        bad = [name for name, flag in zip(names, jax.device_get(flags), strict=True) if flag]
        if bad:
            return f"first in the output of {bad[0]}"
        if not bool(jnp.isfinite(total)):
            return "first in the loss, of finite logits"
        if found := first_bad(grads):
            return f"first in the gradient of {found}, of a finite loss"
    return "not again when the step was repeated"
