"""Keys of a model that its variant makes no use of: who sets one believes that something has changed."""

import dataclasses
from collections.abc import Collection

import jax

from convattn_jax.config import UserError
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.mlm import MaskedLM

PROJECTIONS = ("query_key", "value")
USES = {"separable": ("radius", "activation"), "grouped": ("radius", "groups")}  # of a projection's kind; else nothing


def without_effect(config: ModelConfig, keys: Collection[str]) -> dict[str, str]:
    """Those of the keys ('model.radius', ...) that the model makes no use of, and what would have to be there."""
    found = {}
    if "model.radius" in keys and _has_no_radius(config):
        found["model.radius"] = "a term, branch or mixer with taps, such as model.scores=content,fixed"
    for name in PROJECTIONS:
        kind = getattr(config, name).kind
        for option in ("radius", "groups", "activation"):
            key = f"model.{name}.{option}"
            if key in keys and option not in USES.get(kind, ()):
                kinds = " or ".join(kind for kind, options in USES.items() if option in options)
                found[key] = f"model.{name}.kind={kinds}"
    return found


def check_effect(config: ModelConfig, keys: Collection[str]) -> None:
    """Raises a `UserError` where the model makes no use of one of the keys."""
    for key, needed in without_effect(config, keys).items():
        raise UserError(f"{key} has no effect on this model: leave it out, or choose {needed}")


def check_source(source: str, keys: Collection[str]) -> None:
    """Raises a `UserError` where one of the keys ('data.files', ...) belongs to another source of text."""
    for key in sorted(keys):
        _, _, name = key.partition("data.")
        owner = "tfds" if name.startswith("tfds_") else "text" if name in ("files", "heldout_files") else source
        if owner != source:
            raise UserError(
                f"{key} has no effect while data.source={source}: add --config.data.source={owner}, or leave it out"
            )


def check_tokenizer(model: str, keys: Collection[str]) -> None:
    """Raises a `UserError` where a size is given beside a tokenizer, which has one."""
    if model and "tokenizer.vocab_size" in keys:
        raise UserError(f"tokenizer.vocab_size has no effect beside tokenizer.model={model}: leave one of the two out")


def _has_no_radius(config: ModelConfig) -> bool:
    """Whether no parameter has another shape at another radius."""
    one_layer = dataclasses.replace(config, layers=1, loop="unroll")
    wider = dataclasses.replace(one_layer, radius=config.radius + 1)
    here, there = (jax.eval_shape(MaskedLM(c, 32).initial_params, jax.random.key(0)) for c in (one_layer, wider))
    return here == there
