"""The same bits again on a GPU: `train.deterministic`, for which XLA must be told before it starts.

XLA then leaves out operations whose sums come in any order (atomics), and the choices of its autotuner, which measures
and so may choose otherwise the next time, are kept in the run folder. Imports no JAX: the environment comes first.
"""

import os
import pathlib

from convattn_jax.config import check
from convattn_jax.data import bucket

EXCLUDED = "--xla_gpu_exclude_nondeterministic_ops=true"
TUNED = "--xla_gpu_per_fusion_autotune_cache_dir="
FOLDER = "autotuned"  # of the run folder


def ask_for(workdir: str) -> None:
    """Tells XLA, by the environment, before JAX starts.

    Raises:
      UserError: the run folder is one that XLA_FLAGS cannot name.
    """
    why = f"train.deterministic: XLA keeps its choices in --workdir={workdir}, but XLA_FLAGS"
    check(not bucket.in_a_bucket(workdir), f"{why} can name no bucket: choose a local folder")
    folder = (pathlib.Path.cwd() / workdir / FOLDER).absolute()
    check(len(str(folder).split()) == 1, f"{why} can't hold whitespace ({folder.parent}): choose another folder")
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), EXCLUDED, f"{TUNED}{folder}"]))


def is_asked_for() -> bool:
    """Whether XLA was told both: what to leave out, and where to keep its choices."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return EXCLUDED in flags and any(flag.startswith(TUNED) for flag in flags)
