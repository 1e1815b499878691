"""What a trained model shows beyond its own summary, as small files in its run folder, `evaluations/`.

    python -m convattn_jax.evaluate --run=runs/composite --lengths=64,256 --sentence="The dog that ran was tired."

`length-256.json` holds the held-out loss on rows of 256 tokens; `attention-<digest>.npz` the attention maps of a
sentence. They are all that a report needs, so a run's checkpoints need not travel with it.
"""

import dataclasses
import hashlib
import io
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from convattn_jax import arguments, compiled, train
from convattn_jax.config import UserError, check, from_config
from convattn_jax.data import corpus
from convattn_jax.data.config import DataConfig
from convattn_jax.data.corpora import open_corpus
from convattn_jax.data.examples import LAYOUTS, RowFormat, token_dtype
from convattn_jax.data.parallel import tasks, tokenize
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.inference import AttentionMaps, Pretrained, attention_maps, load_run
from convattn_jax.kernels.operations import operations_by
from convattn_jax.masking import MaskingConfig, Vocabulary
from convattn_jax.objective import MaskedLanguageModelling
from convattn_jax.run import RunFolder

DESCRIPTION = "Held-out loss at other lengths and the attention maps of sentences, into the run folder."
FOLDER = "evaluations"
TOKENS = 16_384  # of a batch; masks are drawn by batch, so it is a part of what is measured
ROWS_OF_TOKENS = 1 << 20  # held-out tokens evaluated, at most
LONGEST_SENTENCE = 64  # tokens whose attention is kept


# --- held-out loss at a length -------------------------------------------------------------------------------------


def length_file(run: epath.PathLike, length: int) -> epath.Path:
    """Where the figures for a length stand."""
    return epath.Path(run) / FOLDER / f"length-{length}.json"


def check_length(length: int) -> None:
    """Raises a `UserError` unless rows can have so many tokens."""
    check(8 <= length <= TOKENS, f"lengths={length} must lie in 8 .. {TOKENS} tokens")


def at_length(run: Pretrained, length: int) -> dict[str, Any]:
    """Loss in nats per predicted token, perplexity and accuracy on held-out rows of `length` tokens.

    `applicable` is False, and there are no figures, where the model has positions that it was not trained for.
    """
    end = run.config["data"]["length"]  # of position tables the rest was never trained
    if run.model.config.longest is not None and length > end:
        return {"length": length, "applicable": False, "reason": f"its position tables were trained up to {end} tokens"}
    data = from_config(DataConfig, run.config["data"], "data.")
    rows = heldout_rows(data, run.tokenizer, length)
    size = max(1, TOKENS // length)
    wanted = min(len(rows), max(size, ROWS_OF_TOKENS // length))
    rows = rows[np.linspace(0, len(rows) - 1, wanted).astype(np.int64)]

    model = run.model.clone(operations=operations_by(run.model.config.kernel))
    masking = from_config(MaskingConfig, run.config["masking"], "masking.")
    no_unigram = np.zeros(model.vocab_rows, np.float32)
    objective = MaskedLanguageModelling(model, Vocabulary.of(run.tokenizer), data.layout, masking, no_unigram)
    padded = np.full((-(-len(rows) // size) * size, length), run.tokenizer.pad, rows.dtype)
    padded[: len(rows)] = rows
    batches = (jnp.asarray(padded[start : start + size]) for start in range(0, len(padded), size))
    sums = train.evaluate(jax.jit(objective.evaluation_sums), run.params, batches)
    loss = sums["loss"] / sums["weight"]
    return {
        "length": length,
        "applicable": True,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "accuracy": sums["accuracy"] / sums["weight"],
        "rows": len(rows),
        "predicted": int(sums["weight"]),
    }


def heldout_rows(data: DataConfig, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """The held-out text as rows of `length` tokens, (N, T)."""
    form = RowFormat(length, tokenizer.pad, tokenizer.cls, tokenizer.sep, token_dtype(tokenizer.size))
    text = tasks("heldout", open_corpus(data).documents("heldout"))
    results = (result.documents for result in tokenize(text, tokenizer, data.workers))
    return np.concatenate(list(LAYOUTS[data.layout](results, form)))


# --- attention -----------------------------------------------------------------------------------------------------


def attention_file(run: epath.PathLike, sentence: str) -> epath.Path:
    """Where a sentence's maps stand."""
    digest = hashlib.blake2b(sentence.encode(), digest_size=6).hexdigest()
    return epath.Path(run) / FOLDER / f"attention-{digest}.npz"


def save_attention(path: epath.PathLike, found: AttentionMaps) -> None:
    """Writes a sentence's maps, all or nothing."""
    content = io.BytesIO()
    np.savez_compressed(content, tokens=np.asarray(found.tokens, np.str_), maps=found.weights.astype(np.float16))
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    corpus.write_atomically(path, content.getvalue())


def load_attention(path: epath.PathLike) -> AttentionMaps:
    """What `save_attention` wrote; errors as of `numpy.load`."""
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return AttentionMaps([str(token) for token in arrays["tokens"]], np.asarray(arrays["maps"], np.float32))


# --- the command ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be evaluated."""

    lengths: tuple[int, ...]
    sentences: tuple[str, ...]

    def __post_init__(self):
        for length in self.lengths:
            check_length(length)

    def missing(self, run: epath.PathLike) -> "Wanted":
        """What a run folder does not have yet."""
        lengths = tuple(length for length in self.lengths if not length_file(run, length).exists())
        return Wanted(lengths, tuple(text for text in self.sentences if not attention_file(run, text).exists()))


def evaluate(path: epath.PathLike, wanted: Wanted) -> None:
    """Writes what is missing of `wanted`; nothing is computed twice."""
    folder, todo = RunFolder(path), wanted.missing(path)
    if not (todo.lengths or todo.sentences):
        return
    run = load_run(path)
    steps = run.config["train"]["steps"]
    if 0 < run.step < steps:  # step 0 is of a run that was imported
        print(f"{path} has not ended: step {run.step:,} of {steps:,} is evaluated", file=sys.stderr)
    for length in todo.lengths:
        found = at_length(run, length)
        folder.write(f"{FOLDER}/{length_file(path, length).stem}", found)
        print(f"length {length}: " + (f"loss {found['loss']:.4f}" if found["applicable"] else found["reason"]))
    for sentence in todo.sentences:
        save_attention(attention_file(path, sentence), attention_maps(run, sentence, LONGEST_SENTENCE))
        print(f"attention of {sentence!r}: {attention_file(path, sentence)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates a run; what the user can mend is one line on stderr and exit status 2."""
    parser = arguments.Parser("convattn_jax.evaluate", description=DESCRIPTION)
    parser.add_argument("--run", required=True, help="a pre-training run folder")
    parser.add_argument("--lengths", default="", help="tokens a row, with commas between them")
    parser.add_argument("--sentence", action="append", default=[], help="whose attention is kept; may be repeated")
    parser.add_argument("--compile_cache", metavar="DIR", help="of compiled programs, as of convattn_jax.main")
    try:
        args = parser.parse_args(argv)
        parts = [text for text in args.lengths.split(",") if text]
        numbers = all(text.isdecimal() for text in parts)
        check(numbers, f"--lengths={args.lengths} must be whole numbers with commas between them, such as 128,512")
        wanted = Wanted(tuple(map(int, parts)), tuple(args.sentence))
        check(bool(parts or args.sentence), "nothing to evaluate: give --lengths=128,512 or --sentence='...'")
        compiled.keep(args.compile_cache)
        evaluate(args.run, wanted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
