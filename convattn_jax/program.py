"""From the configuration of a pre-training run to its steps, placed on a mesh and not yet compiled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convattn_jax import checkpoint, compiled, optim, sharding, train
from convattn_jax.config import check
from convattn_jax.data.config import DataConfig, TokenizerConfig
from convattn_jax.data.examples import token_dtype
from convattn_jax.kept import Kept, Traceable
from convattn_jax.kernels.operations import operations_by
from convattn_jax.masking import MaskingConfig, Vocabulary
from convattn_jax.model.config import ModelConfig
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.objective import MaskedLanguageModelling, unigram_log_probabilities
from convattn_jax.resume import ResumeConfig
from convattn_jax.train import TrainState
from convattn_jax.watchdog import WatchdogConfig

PlainState = dict[str, Any]


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


class Steps:
    """Model, objective, optimizer and what becomes programs; `counts` are how often each id stands in the text.

    A program that it makes is a function of its arguments and of nothing else: by them it is kept and found again.
    """

    def __init__(self, c: PretrainConfig, vocabulary: Vocabulary, counts: np.ndarray, mesh: Mesh):
        self._c, self.mesh = c, mesh
        operations = sharding.shard_operations(operations_by(c.model.kernel), mesh)
        self.model = MaskedLM(c.model, len(counts), operations)
        unigram = unigram_log_probabilities(counts, vocabulary.special, self.model.vocab_rows)
        self.objective = MaskedLanguageModelling(self.model, vocabulary, c.data.layout, c.masking, unigram)
        self.schedule = optim.schedule(c.optimizer, c.train.steps)
        self.optimizer = optim.make_optimizer(c.optimizer, c.train.steps)
        self.rows, self.everywhere = NamedSharding(mesh, sharding.BATCH), NamedSharding(mesh, PartitionSpec())

    def init(self) -> Traceable:
        """seed -> the plain state before the first step, drawn where it belongs on the mesh."""
        seed, shardings, shapes = _a_number(np.uint32), plain(self._shardings), plain(self._like)
        return Traceable(self._initial_state, (seed,), shardings, shapes, within=compiled.drawing)

    def step(self) -> Traceable:
        """(plain state, rows, seed) -> (plain state, sums); it donates the state."""
        arguments = (plain(self._like), self._batch(), _a_number(np.uint32))
        out_shardings = (plain(self._shardings), self.everywhere)
        return Traceable(self._train_step, arguments, out_shardings, donate=(0,), options=compiled.options())

    def evaluation(self) -> Traceable:
        """(params, rows, index) -> sums."""
        arguments = (self._like.params, self._batch(), _a_number(np.int32))
        return Traceable(self.objective.evaluation_sums, arguments, self.everywhere, options=compiled.options())

    def opt_tree(self, params: Any) -> Any:
        """The structure of the optimizer's state for parameters, or their shapes."""
        return jax.tree.structure(jax.eval_shape(self.optimizer.init, params))

    @functools.cached_property
    def _shapes(self) -> TrainState:
        shapes = jax.eval_shape(self._initial_state, _a_number(np.uint32))
        return whole(shapes, self.opt_tree(shapes["params"]))

    @functools.cached_property
    def _shardings(self) -> TrainState:
        return sharding.tree_shardings(self._shapes, self.mesh)

    @functools.cached_property
    def _like(self) -> TrainState:
        return jax.tree.map(
            lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), self._shapes, self._shardings
        )

    def _batch(self) -> jax.ShapeDtypeStruct:
        shape = (self._c.train.batch_size, self._c.data.length)
        return jax.ShapeDtypeStruct(shape, token_dtype(self.model.vocab_size), sharding=self.rows)

    def _train_step(self, state: PlainState, rows: Array, seed: Array) -> tuple[PlainState, dict[str, Array]]:
        """The seed is an argument: runs that differ in it alone share one compiled program, and so a compile cache."""
        c = self._c.train
        step = train.make_train_step(self.objective, self.optimizer, seed, c.accumulate, c.skip_nonfinite > 0)
        new, sums = step(whole(state, self.opt_tree(state["params"])), rows)
        return plain(new), sums

    def _initial_state(self, seed: Array) -> PlainState:
        params = self.model.initial_params(jax.random.key(seed))
        if self._c.model.output_bias == "unigram":
            params["head"]["bias"] = jnp.asarray(self.objective.unigram)
        return plain(TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params)))


class Program:
    """The steps of a run, compiled or found compiled when they are first called."""

    def __init__(self, c: PretrainConfig, vocabulary: Vocabulary, counts: np.ndarray, mesh: Mesh):
        self.c, self.mesh = c, mesh
        self._kept = Kept(Steps, shared(c), vocabulary, counts, mesh, mesh=mesh)
        self._kept.ahead("step")
        self._steps = self._kept.made
        self.model, self.objective, self.schedule = self._steps.model, self._steps.objective, self._steps.schedule
        self.rows, self.everywhere = self._steps.rows, self._steps.everywhere
        like = self._kept.returns("init", Steps.init)
        self._opt_tree = self._steps.opt_tree(like["params"])
        self.like = whole(like, self._opt_tree)

    def init(self, seed: int) -> TrainState:
        """The state before the first step, drawn where it belongs on the mesh."""
        return whole(self._kept.program("init", Steps.init)(np.uint32(seed)), self._opt_tree)

    def train_step(self, state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Array]]:
        """The compiled step; it donates the state."""
        step = self._kept.program("step", Steps.step)
        new, sums = step(plain(state), rows, np.uint32(self.c.seed))
        return whole(new, self._opt_tree), sums

    def eval_step(self, params: Any, rows: Array, index: int) -> dict[str, Array]:
        """The compiled evaluation of the index-th batch."""
        return self._kept.program("evaluation", Steps.evaluation)(params, rows, np.int32(index))

    def lower(self) -> jax.stages.Lowered:
        """The train step (plain state, rows, seed), to be compiled ahead of time, from shapes alone."""
        return self._steps.step().lower()


def plain(state: TrainState) -> PlainState:
    """A state, or what has its form, in trees that can be kept: those of the optimizer are of optax's own kinds."""
    return {"step": state.step, "params": state.params, "opt_state": jax.tree.leaves(state.opt_state)}


def whole(state: PlainState, opt_tree: Any) -> TrainState:
    """The state whose plain form this is."""
    return TrainState(state["step"], state["params"], jax.tree.unflatten(opt_tree, state["opt_state"]))


def shared(c: PretrainConfig) -> PretrainConfig:
    """What programs may depend on: without a run's name and seed, and without where its host keeps its rows."""
    data = dataclasses.replace(c.data, cache_dir="", workers=1)
    return dataclasses.replace(c, name="", seed=0, data=data)


def _a_number(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype)


def made_up_vocabulary(size: int) -> Vocabulary:
    """A vocabulary without text: five special ids, and each other id a word."""
    special = np.arange(size) < 5
    return Vocabulary(mask=4, special=special, starts_word=~special)
