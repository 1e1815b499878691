"""Compare attention, convolution and relative positions in pre-trained language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convattn_jax.finetune import load_classifier
    from convattn_jax.inference import attention_maps, fill_mask, load_encoder

__all__ = ["attention_maps", "fill_mask", "load_classifier", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Imports on first use: worker processes and `--help` need no jax."""
    if name in __all__:
        from convattn_jax import finetune, inference

        return getattr(finetune if name == "load_classifier" else inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
