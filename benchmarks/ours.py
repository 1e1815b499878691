"""This project's training step as a contender: masking, forward, backward, clipping, AdamW."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import lengths
from benchmarks.settings import configured
from benchmarks.suites import PRODUCTS, Spec, Suite
from convattn_jax import compiled, optim, train
from convattn_jax.config import from_config
from convattn_jax.data.examples import LAYOUTS, token_dtype
from convattn_jax.kernels.operations import operations_by
from convattn_jax.masking import Masked, MaskingConfig, Vocabulary
from convattn_jax.model.attention import separate
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling

SPECIAL = 5  # ids 0 to 4: padding, unknown, [CLS], [SEP], [MASK]
BATCHES = 8  # different ones, used in turn


class Stepper(NamedTuple):
    """A training step that is compiled and has its state."""

    run: Callable[[int], float]  # some steps, waits for the last; seconds
    program: Callable[[], str]  # XLA's text of the compiled step
    arithmetic: float  # model FLOP of a step, see `model_arithmetic`
    tokens: list[int]  # of each batch, padding not counted; a run begins with the first
    temporary_bytes: int  # what a step holds beyond its arguments and results, as the compiler plans it


class EveryPosition(MaskedLanguageModelling):
    """The same loss with the vocabulary scored at every position, as most PyTorch code does."""

    def prepare(self, key: Array, rows: Array) -> tuple[Any, Array]:
        masked, weight = super().prepare(key, rows)
        here = jnp.arange(rows.shape[1])[None, :, None] == masked.positions[:, None, :]
        labels = jnp.where(here, masked.labels[:, None, :], 0).sum(-1)
        weights = jnp.where(here, masked.weights[:, None, :], 0).sum(-1)
        return Masked(masked.inputs, None, labels, weights, weights > 0), weight  # pyright: ignore[reportArgumentType]


def model_arithmetic(shape: ModelConfig, rows: int, batch: int, length: int, predicted: int) -> float:
    """6 tokens x encoder weights + 12 L B T^2 D + 6 predicted positions x head weights; recomputation doesn't count."""
    d, e = shape.width, shape.embedding
    weights = shape.layers * (4 * d * d + 2 * d * shape.hidden) + (d * e if e != d else 0)
    attention = 12 * shape.layers * batch * length**2 * d
    return 6.0 * batch * length * weights + attention + 6.0 * predicted * (d * e + e * rows)


def cudnn_attend(qkv, score, query_segments, key_segments, dropout_rate, seed, rows=None, heads=None) -> Array:
    """Plain attention by cuDNN in the place of the model's; it takes no mask, so rows must be full."""
    assert dropout_rate == 0, "cuDNN through JAX has no attention dropout: set model.attention_dropout=0.0"
    assert score.fixed is None, "cuDNN serves content attention only"
    return jax.nn.dot_product_attention(*separate(qkv), scale=score.content, implementation="cudnn")


def random_rows(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """(BATCHES, batch, length) full rows `[CLS] a [SEP] b [SEP]` of random ids."""
    rows = np.random.default_rng(0).integers(SPECIAL, vocabulary, (BATCHES, batch, length), token_dtype(vocabulary))
    rows[:, :, 0], rows[:, :, length // 2], rows[:, :, -1] = 2, 3, 3
    return rows


def rows_by_layout(suite: Suite) -> dict[str, np.ndarray]:
    """{layout: (BATCHES, B, T) ids}: full rows, or the suite's mix of lengths padded (`pairs`) and packed."""
    count, t, vocabulary = BATCHES * suite.batch, suite.length, suite.vocabulary
    if not suite.mixed:
        rows = random_rows(suite.batch, t, vocabulary)
        return dict.fromkeys(LAYOUTS, rows)
    padded = lengths.padded_rows(lengths.draw(count, t, 0), t, vocabulary, 1)
    enough = 2 * count * t // max(1, int(lengths.draw(1000, t, 0).mean()))
    packed = lengths.packed_rows(lengths.draw(enough, t, 0), t, vocabulary, 1)[:count]
    return {"pairs": padded.reshape(BATCHES, -1, t), "packed": packed.reshape(BATCHES, -1, t)}


def steppers(
    specs: dict[str, Spec],
    assignments: Sequence[str],
    suite: Suite,
    leave_out: Callable[[str, Exception], None],
    before_compiling: Callable[[], Any] = lambda: None,
) -> dict[str, Stepper]:
    """Contenders, traced and then compiled; one that fails is handed to leave_out(name, error).

    The first is compiled alone: XLA times the forms of each matrix product, which needs a quiet device, and remembers
    its choice, so that all contenders take the same one. The others are compiled side by side.
    """
    lowered, made, rows = {}, {}, rows_by_layout(suite)
    for name, spec in specs.items():
        try:
            lowered[name] = _lower(spec, assignments, rows, suite.vocabulary)
        except Exception as error:
            leave_out(name, error)
    before_compiling()
    with ThreadPoolExecutor(8) as pool:
        futures = {}
        for name, (start, step, *_) in lowered.items():
            first = not futures
            futures[name] = [pool.submit(start.compile), pool.submit(step.compile, compiler_options(specs[name]))]
            if first:
                wait(futures[name])
    for name, (start, step) in futures.items():
        try:
            made[name] = _stepper(start.result(), step.result(), *lowered[name][2:])
        except Exception as error:
            leave_out(name, error)
    return made


def compiler_options(spec: Spec) -> dict[str, Any] | None:
    """XLA's for one of ours."""
    products = spec.options.get("products", PRODUCTS[0])
    if products not in PRODUCTS:
        raise SystemExit(f"products={products} is unknown; there are: {', '.join(PRODUCTS)}")
    return compiled.options() if products == "cublas" else None


def _lower(
    spec: Spec, assignments: Sequence[str], rows_of: dict[str, np.ndarray], vocabulary: int
) -> tuple[Any, Any, float, np.ndarray]:
    config = configured(spec.source, [*assignments, *spec.assignments])
    rows = rows_of[config.data.layout]
    special = np.arange(vocabulary) < SPECIAL
    shape = from_config(ModelConfig, config.model, "model.")
    operations = operations_by(shape.kernel)
    if spec.options.get("attend") == "cudnn":
        operations = operations._replace(attend=cudnn_attend)
    model = MaskedLM(shape, vocabulary, operations)
    masking = from_config(MaskingConfig, config.masking, "masking.")
    every = spec.options.get("head") == "all"
    objective = (EveryPosition if every else MaskedLanguageModelling)(
        model, Vocabulary(4, special, ~special), config.data.layout, masking, np.zeros(model.vocab_rows, np.float32)
    )
    optimizer = optim.make_optimizer(from_config(optim.OptimizerConfig, config.optimizer, "optimizer."), 1000)

    def start(key: Array) -> train.TrainState:
        params = model.initial_params(key)
        return train.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    step = jax.jit(train.make_train_step(objective, optimizer, 0), donate_argnums=0)
    key = jax.random.key(0)
    one = jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype)
    _, batch, length = rows.shape
    predicted = batch * (length if every else masking.slots(length))
    arithmetic = model_arithmetic(shape, model.vocab_rows, batch, length, predicted)
    with compiled.drawing():
        first = jax.jit(start).lower(key)
    return first, step.lower(jax.eval_shape(start, key), one), arithmetic, rows


def _stepper(start: Any, step: Any, arithmetic: float, rows: np.ndarray) -> Stepper:
    state = start(jax.random.key(0))
    batches = [jax.device_put(part) for part in rows]

    def run(steps: int) -> float:
        nonlocal state
        sums = None
        began = time.perf_counter()
        for i in range(steps):
            state, sums = step(state, batches[i % len(batches)])
        jax.block_until_ready(sums)
        return time.perf_counter() - began

    temporary = step.memory_analysis().temp_size_in_bytes
    return Stepper(run, lambda: step.as_text() or "", arithmetic, tokens_of(rows), temporary)


def tokens_of(rows: np.ndarray) -> list[int]:
    """Tokens of each batch, padding not counted."""
    return (rows != lengths.PAD).sum((1, 2)).tolist()


def matrix_product(size: int) -> Callable[[int], float]:
    """A bf16 product of two random (size, size) matrices, ten to a step: the rate that arithmetic is held against."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(a, b))

    def run(steps: int) -> float:
        began = time.perf_counter()
        result = None
        for _ in range(10 * steps):
            result = multiply(a, b)
        jax.block_until_ready(result)
        return time.perf_counter() - began

    return run
