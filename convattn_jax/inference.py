"""A trained run as plain Python functions: sentences to vectors, [MASK] to words."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array

from convattn_jax import checkpoint
from convattn_jax.config import UserError, check, from_config
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.inputs import from_mask
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.run import RunFolder

MASK = "[MASK]"


class Pretrained(NamedTuple):
    """What a run folder holds: tokenizer, model, parameters, and the configuration they were made with."""

    tokenizer: Tokenizer
    model: MaskedLM
    params: Any
    config: dict[str, Any]
    step: int = 0  # that the parameters are of


def load_run(path: epath.PathLike) -> Pretrained:
    """Reads the newest whole checkpoint of a pre-training run.

    Raises:
      UserError: the path is no run folder, or holds no whole checkpoint.
    """
    folder = RunFolder(path)
    config = check_pretraining(path, folder.read("config"))
    tokenizer = Tokenizer.load(str(folder.path))
    model = MaskedLM(from_config(ModelConfig, config["model"], "model."), tokenizer.size)
    shapes = jax.eval_shape(model.initial_params, jax.random.key(0))
    step, params = checkpoint.newest_params(folder.checkpoints, shapes)
    return Pretrained(tokenizer, model, params, config, step)


def check_pretraining(path: epath.PathLike, config: dict[str, Any] | None) -> dict[str, Any]:
    """What a run folder's config.json holds.

    Raises:
      UserError: there is none, or it is a fine-tuning's.
    """
    if config is None:
        raise UserError(f"{path} is no run folder (it has no config.json): train one with convattn_jax.main")
    source = config.get("init_from")
    check(
        config.get("task") != "finetune", f"{path} is a fine-tuning folder, made from {source}: name that run instead"
    )
    return config


def load_encoder(path: epath.PathLike, batch_size: int = 32) -> Callable[[str | Sequence[str]], np.ndarray]:
    """A function from a sentence, or many, to vectors (D,) or (N, D): the mean of the last layer over the tokens."""
    run = load_run(path)

    @jax.jit
    def encode(params: Any, ids: Array, mask: Array) -> Array:
        encoded: Any = run.model.apply({"params": params}, from_mask(ids, mask), method="encode")
        weights = mask[..., None].astype(encoded.last.dtype)
        return ((encoded.last * weights).sum(1) / weights.sum(1)).astype(jnp.float32)

    def encoder(sentences: str | Sequence[str]) -> np.ndarray:
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        check(all(isinstance(text, str) for text in texts), f"sentences={sentences!r} must be strings")
        rows = _rows(run, run.tokenizer.encode(texts))
        vectors = [
            np.asarray(encode(run.params, *_pad(run, rows[start : start + batch_size])))[: len(rows) - start]
            for start in range(0, len(rows), batch_size)
        ]
        found = np.concatenate(vectors) if vectors else np.zeros((0, run.model.config.width), np.float32)
        return found[0] if isinstance(sentences, str) else found

    return encoder


class Guess(NamedTuple):
    """A word that may stand in a place, and how likely it is."""

    word: str
    probability: float


def fill_mask(path: epath.PathLike, text: str, top: int = 5) -> list[Guess] | list[list[Guess]]:
    """The `top` likeliest pieces for the [MASK] in a text; a list per [MASK] where there are several.

    Raises:
      UserError: the text has no [MASK].
    """
    check(isinstance(text, str), f"text={text!r} must be a string with {MASK} in it")
    run = load_run(path)
    parts = text.split(MASK)
    check(len(parts) > 1, f"text={text!r} has no {MASK}: put one where a word is to be guessed")
    encoded = run.tokenizer.encode(parts)
    ids = list(encoded[0])
    for part in encoded[1:]:
        ids += [run.tokenizer.mask, *part]
    rows, mask = _pad(run, _rows(run, [np.asarray(ids, np.int32)]))
    places = np.flatnonzero(np.asarray(rows[0]) == run.tokenizer.mask)
    check(
        len(places) == len(parts) - 1, f"text is longer than the model's {run.model.config.max_length} tokens: cut it"
    )

    predict: Any = jax.jit(run.model.apply)
    logits = predict({"params": run.params}, from_mask(rows, mask), jnp.asarray(places)[None])
    allowed = jnp.asarray(np.append(~run.tokenizer.special, np.zeros(logits.shape[-1] - run.tokenizer.size, bool)))
    probabilities = np.asarray(jax.nn.softmax(jnp.where(allowed, logits[0], -jnp.inf)))
    guesses = [
        [Guess(run.tokenizer.decode([index]), float(row[index])) for index in np.argsort(-row, kind="stable")[:top]]
        for row in probabilities
    ]
    return guesses[0] if len(guesses) == 1 else guesses


class AttentionMaps(NamedTuple):
    """Where the tokens of a text look: weights (L, H, T, T) of layers and heads, each query's row summing to 1.

    There are no layers where the model has a convolution in attention's place.
    """

    tokens: list[str]
    weights: np.ndarray


def attention_maps(run: epath.PathLike | Pretrained, text: str, longest: int | None = None) -> AttentionMaps:
    """The attention of every layer and head on a text, [CLS] and [SEP] around it, cut to `longest` tokens in all."""
    check(isinstance(text, str), f"text={text!r} must be a string")
    run = run if isinstance(run, Pretrained) else load_run(run)
    [row] = _rows(run, run.tokenizer.encode([text]), longest)
    ids, mask = _pad(run, [row])

    @jax.jit
    def encode(params: Any) -> dict[str, Array]:
        encoded: Any = run.model.apply({"params": params}, from_mask(ids, mask), ("attention",), method="encode")
        return encoded.outputs

    maps = encode(run.params).get("attention", jnp.zeros((0, 1, 0, *ids.shape[1:] * 2)))
    tokens = [run.tokenizer.piece(int(index)).replace("\u2581", " ").strip() or "_" for index in row]
    return AttentionMaps(tokens, np.asarray(maps[:, 0, :, : len(row), : len(row)], np.float32))


def _rows(run: Pretrained, texts: Sequence[np.ndarray], longest: int | None = None) -> list[np.ndarray]:
    """[CLS] text [SEP], cut to `longest` tokens and where the model's position tables end."""
    t, ends = run.tokenizer, [end for end in (longest, run.model.config.longest) if end is not None]
    room = min(ends) - 2 if ends else None
    return [np.concatenate([[t.cls], ids[:room], [t.sep]]).astype(np.int32) for ids in texts]


def _pad(run: Pretrained, rows: Sequence[np.ndarray]) -> tuple[Array, Array]:
    """(ids, mask), padded to a power of two, so that few shapes are ever compiled."""
    longest = max(len(row) for row in rows)
    length = 1 << (longest - 1).bit_length()
    if run.model.config.longest is not None:
        length = min(length, run.model.config.longest)
    count = 1 << (len(rows) - 1).bit_length()
    ids = np.full((count, length), run.tokenizer.pad, np.int32)
    mask = np.zeros((count, length), np.int32)
    mask[:, 0] = 1  # rows that fill up the batch have one visible token
    for row, text in enumerate(rows):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return jnp.asarray(ids), jnp.asarray(mask)
