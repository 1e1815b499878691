"""From the configuration of a pre-training run to its steps, placed on a mesh and not yet compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convattn_jax import checkpoint, compiled, optim, sharding, train
from convattn_jax.config import check
from convattn_jax.data.config import DataConfig, TokenizerConfig
from convattn_jax.data.examples import token_dtype
from convattn_jax.kernels.operations import operations_by
from convattn_jax.masking import MaskingConfig, Vocabulary
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling, unigram_log_probabilities
from convattn_jax.resume import ResumeConfig
from convattn_jax.train import TrainState
from convattn_jax.watchdog import WatchdogConfig


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Everything a pre-training run is; `configs/base.py` documents each key."""

    task: str
    name: str
    seed: int
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    masking: MaskingConfig
    train: train.TrainConfig
    optimizer: optim.OptimizerConfig
    checkpoint: checkpoint.CheckpointConfig
    mesh: sharding.MeshConfig
    resume: ResumeConfig
    watchdog: WatchdogConfig

    def __post_init__(self):
        check(0 <= self.seed < 2**32, f"seed={self.seed} must lie in [0, 2**32)")
        check(
            self.model.longest is None or self.data.length <= self.model.longest,
            f"model.max_length={self.model.max_length} is below data.length={self.data.length}: raise it",
        )


class Program:
    """Model, objective, optimizer and the jitted steps; `counts` are how often each id stands in the text."""

    def __init__(self, c: PretrainConfig, vocabulary: Vocabulary, counts: np.ndarray, mesh: Mesh):
        self.c, self.mesh = c, mesh
        operations = sharding.shard_operations(operations_by(c.model.kernel), mesh)
        self.model = MaskedLM(c.model, len(counts), operations)
        unigram = unigram_log_probabilities(counts, vocabulary.special, self.model.vocab_rows)
        self.objective = MaskedLanguageModelling(self.model, vocabulary, c.data.layout, c.masking, unigram)
        self.schedule = optim.schedule(c.optimizer, c.train.steps)
        self.optimizer = optim.make_optimizer(c.optimizer, c.train.steps)

        shapes = jax.eval_shape(self._initial_state, jax.random.key(0))
        shardings = sharding.tree_shardings(shapes, mesh)
        self.rows, self.everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())
        self.like = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)
        self._init = jax.jit(self._initial_state, out_shardings=shardings)
        self._step = jax.jit(
            self._train_step,
            donate_argnums=0,
            in_shardings=(shardings, self.rows, None),
            out_shardings=(shardings, self.everywhere),
            compiler_options=compiled.options(),
        )
        self.eval_step = jax.jit(
            self.objective.evaluation_sums,
            in_shardings=(shardings.params, self.rows, None),
            out_shardings=self.everywhere,
            compiler_options=compiled.options(),
        )

    def init(self, key: Array) -> TrainState:
        """The state before the first step, drawn where it belongs on the mesh."""
        with compiled.drawing():
            return self._init(key)

    def train_step(self, state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        """The jitted step; it donates the state."""
        return self._step(state, rows, np.uint32(self.c.seed))

    def _train_step(self, state: TrainState, rows: Array, seed: Array) -> tuple[TrainState, dict[str, Array]]:
        """The seed is an argument: runs that differ in it alone share one compiled program, and so a compile cache."""
        c = self.c.train
        step = train.make_train_step(self.objective, self.optimizer, seed, c.accumulate, c.skip_nonfinite > 0)
        return step(state, rows)

    def _initial_state(self, key: Array) -> TrainState:
        params = self.model.initial_params(key)
        if self.c.model.output_bias == "unigram":
            params["head"]["bias"] = jnp.asarray(self.objective.unigram)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def lower(self) -> jax.stages.Lowered:
        """The train step (state, rows, seed), to be compiled ahead of time, from shapes alone."""
        shape = (self.c.train.batch_size, self.c.data.length)
        rows = jax.ShapeDtypeStruct(shape, token_dtype(self.model.vocab_size), sharding=self.rows)
        return self._step.lower(self.like, rows, jax.ShapeDtypeStruct((), np.uint32))


def made_up_vocabulary(size: int) -> Vocabulary:
    """A vocabulary without text: five special ids, and each other id a word."""
    special = np.arange(size) < 5
    return Vocabulary(mask=4, special=special, starts_word=~special)
