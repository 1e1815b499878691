"""Many runs from one table, every variant under equal conditions: python -m convattn_jax.sweep."""

from convattn_jax.sweep.table import Finetuning, Sweep, Variant

__all__ = ["Finetuning", "Sweep", "Variant"]
