"""The convolution kernels a model has learned, ready to be drawn."""

import io
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import Sharding

from convattn_jax import taps
from convattn_jax.data import corpus
from convattn_jax.model.inputs import Inputs
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.taps import Kernel

DYNAMIC = ("dynamic_query", "dynamic_key")
SPREAD = "_spread"


def learned_kernels(model: MaskedLM, params: Any, inputs: Inputs, placed: Sharding | None = None) -> dict[str, Kernel]:
    """Per term with taps: (L, H, W) logits, centred; of dynamic terms mean and spread over the tokens of `inputs`.

    Parameters that other processes hold parts of need `placed`, a sharding that puts a whole array on every device.
    """

    def read(params: Any) -> tuple[Array | None, dict[str, Array]]:
        encoded: Any = model.apply({"params": params}, inputs, DYNAMIC, method="encode")
        fixed = fixed_taps(params["encoder"]) if "fixed" in model.config.scores else None
        return fixed, encoded.outputs

    fixed, outputs = jax.jit(read, out_shardings=placed)(params)
    kernels = {} if fixed is None else {"fixed": Kernel(taps.centred(np.asarray(fixed)), None)}
    valid = np.asarray(inputs.valid)
    for name, values in outputs.items():
        tokens = taps.centred(np.asarray(values).transpose(1, 3, 0, 2, 4)[valid])  # (tokens, L, H, W)
        kernels[name] = Kernel(tokens.mean(0), tokens.std(0))
    return kernels


def save_kernels(kernels: Mapping[str, Kernel], path: epath.PathLike) -> None:
    """Writes the taps, `TERM` and `TERM_spread`, as NumPy's .npz, all or nothing."""
    arrays = {name: kernel.mean for name, kernel in kernels.items()}
    arrays |= {f"{name}{SPREAD}": kernel.spread for name, kernel in kernels.items() if kernel.spread is not None}
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(array, np.float32) for name, array in arrays.items()})  # pyright: ignore[reportArgumentType]
    corpus.write_atomically(path, content.getvalue())


def load_kernels(path: epath.PathLike) -> dict[str, Kernel]:
    """What `save_kernels` wrote.

    Raises:
      OSError, ValueError: it is not there, or damaged.
    """
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        found = dict(arrays)
    return {name: Kernel(found[name], found.get(f"{name}{SPREAD}")) for name in found if not name.endswith(SPREAD)}


def fixed_taps(encoder: dict) -> Array:
    """beta of all layers, (L, H, W), of unrolled or scanned parameters."""
    if "layers" in encoder:
        return encoder["layers"]["attention"]["fixed"]["taps"]
    layers = sorted((name for name in encoder if name.startswith("layer_")), key=lambda name: int(name[6:]))
    return jnp.stack([encoder[name]["attention"]["fixed"]["taps"] for name in layers])
