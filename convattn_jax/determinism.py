"""The same bits again on a GPU: `train.deterministic`, for which XLA must be told before it starts.

XLA then leaves out operations whose sums come in any order (atomics), and the choices of its autotuner, which measures
and so may choose otherwise the next time, are kept in the run folder. Imports no JAX: the environment comes first.
"""

import os
import pathlib

EXCLUDED = "--xla_gpu_exclude_nondeterministic_ops=true"
TUNED = "--xla_gpu_per_fusion_autotune_cache_dir="
FOLDER = "autotuned"  # of the run folder


def ask_for(workdir: str) -> None:
    """Tells XLA, by the environment, before JAX starts."""
    folder = (pathlib.Path.cwd() / workdir / FOLDER).absolute()
    os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), EXCLUDED, f"{TUNED}{folder}"]))


def is_asked_for() -> bool:
    """Whether XLA was told."""
    return EXCLUDED in os.environ.get("XLA_FLAGS", "")
