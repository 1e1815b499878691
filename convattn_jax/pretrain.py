"""Masked language modelling: wires text, model and objective into `train.fit` and leaves a run folder."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from convattn_jax import (
    checkpoint,
    determinism,
    diagnosis,
    distributed,
    dryrun,
    events,
    interrupt,
    memory,
    origin,
    sharding,
    train,
)
from convattn_jax.account import KINDS, Account
from convattn_jax.config import Interrupted, check, flatten, from_config, to_plain
from convattn_jax.console import Console, duration
from convattn_jax.data import bucket, loader
from convattn_jax.data.rows import Prepared, Rows, prepare, reopen
from convattn_jax.data.tokenizer import Tokenizer
from convattn_jax.kernels.operations import operations_by
from convattn_jax.learned import learned_kernels, save_kernels
from convattn_jax.masking import Vocabulary
from convattn_jax.model.inputs import from_mask
from convattn_jax.model.mlm import MaskedLM
from convattn_jax.program import PretrainConfig, Program
from convattn_jax.run import RunFolder
from convattn_jax.taps import Kernel
from convattn_jax.train import TrainState
from convattn_jax.watchdog import Alive, watched

SHOWN = {"eval_loss", "eval_perplexity", "eval_accuracy", "unigram_loss", "parameters"}  # of a summary, at the end


def run(config: ml_collections.ConfigDict, workdir: str, console: Console | None = None) -> dict[str, Any]:
    """Trains, or goes on training, or checks what is finished; returns the summary, or what a dry run found."""
    if flatten(config).get("mesh.dry_run"):
        return dryrun.start(config)
    account = Account()
    distributed.check_same(distributed.code() | distributed.configuration(flatten(config)))
    first = distributed.first_process()
    with distributed.together():
        c = from_config(PretrainConfig, config)
        folder = RunFolder(workdir)
        mesh = sharding.make_mesh(c.mesh)
        check_kernels(c)
        check(
            not c.train.deterministic or jax.default_backend() != "gpu" or determinism.is_asked_for(),
            "train.deterministic: XLA must be told before it starts: call convattn_jax.determinism.ask_for(workdir) "
            "before jax is first used, or use the command line",
        )
        sharding.check_divides(mesh, c.train.batch_size, c.train.accumulate, c.model.heads)
        with bucket.explained("--workdir", workdir):
            changes = folder.check_belongs(to_plain(c)) if first else []
            if first:
                folder.check_writable()

    with console or Console(quiet=not first) as console, contextlib.ExitStack() as stack:
        prepared = None
        if bucket.in_a_bucket(c.data.cache_dir):  # the first process puts there what the others then find
            with distributed.together():
                prepared = find_rows(c, folder, console) if first else None
        with distributed.together():
            prepared = prepared or find_rows(c, folder, console)
            program = Program(c, Vocabulary.of(prepared.tokenizer), prepared.counts, mesh)
            checkpoint.check_room(folder.checkpoints, c.checkpoint.keep, program.like)
            folder.path.mkdir(parents=True, exist_ok=True)
            if c.train.deterministic:
                (folder.path / determinism.FOLDER).mkdir(exist_ok=True)
        distributed.check_same({"data": prepared.fingerprint, "tokenizer": prepared.tokenizer.digest})
        distributed.check_shared(folder.path)
        with distributed.together():
            if first:
                stack.enter_context(folder.lock())
                changes = folder.check_belongs(to_plain(c))  # once more: another may have begun it in the meantime
                _check_rows(folder, prepared)
            if first and folder.read("config") is None:
                prepared.tokenizer.save(str(folder.path))
                folder.write("data", {"fingerprint": prepared.fingerprint, "tokenizer": prepared.tokenizer.digest})
                folder.write("config", to_plain(c))  # last: what has a config.json is a run folder
            folder.adopt(to_plain(c), changes)
        return _Run(c, folder, prepared, program, console, account).complete()


def check_kernels(c: PretrainConfig) -> None:
    """Raises a `UserError` where `model.kernel` names what can't serve, before a folder is made: a trace finds out."""
    if c.model.kernel != "auto":
        model = MaskedLM(c.model, 32, operations_by(c.model.kernel))
        ids = jax.ShapeDtypeStruct((1, c.data.length), jnp.int32)
        jax.eval_shape(lambda key, ids: model.init(key, from_mask(ids)), jax.random.key(0), ids)


def find_rows(c: PretrainConfig, folder: RunFolder, console: Console) -> Prepared:
    """The token rows: those the run was started with, or freshly prepared ones.

    Raises:
      UserError: the rows the run was started with are gone and the text has changed since.
    """
    started_with = folder.started_with()
    if started_with is not None:
        tokenizer = Tokenizer.load(str(folder.path))
        check(
            tokenizer.digest == started_with.get("tokenizer"),
            f"{folder.path}/tokenizer.model is not the tokenizer of this run: restore it, or choose another --workdir",
        )
        rows = reopen(c.data.cache_dir, str(started_with.get("fingerprint")), tokenizer, console.report)
        if rows is not None:
            return rows
    prepared = prepare(c.data, c.tokenizer, c.train.batch_size, console.report)
    _check_rows(folder, prepared)
    return prepared


def _check_rows(folder: RunFolder, prepared: Prepared) -> None:
    """Raises a `UserError` if a run was started in the folder with other rows."""
    started_with = folder.started_with()
    check(
        started_with is None or started_with.get("fingerprint") == prepared.fingerprint,
        f"data: the text or its tokenizer has changed since {folder.path} was started: restore it, or choose another "
        "--workdir",
    )


class _Run:
    """One run: its compiled steps, its checkpoints, its files."""

    def __init__(
        self,
        c: PretrainConfig,
        folder: RunFolder,
        prepared: Prepared,
        program: Program,
        console: Console,
        account: Account,
    ):
        self.c, self.folder, self.prepared, self.program, self.console = c, folder, prepared, program, console
        self.account, self.mesh = account, program.mesh

    def complete(self) -> dict[str, Any]:
        """From whatever state the folder is in to the finished run."""
        steps = self.c.train.steps
        with (
            memory.explained(self._out_of_memory),
            interrupt.deferred() as stop,
            contextlib.closing(checkpoint.Checkpoints(self.folder.checkpoints, self.c.checkpoint.keep)) as checkpoints,
        ):
            saved = checkpoints.restore(self.program.like, self.console.message)
            if saved is None:
                saved = checkpoint.Saved(self.program.init(self.c.seed), {})
            elif int(saved.state.step) < steps:
                self.console.message(f"resumed from step {int(saved.state.step)}")
            step, further = int(saved.state.step), len(saved.notes.get("window", ()))
            check(
                step <= steps, f"train.steps={steps} lies before step {step}, where {self.folder.path} stands: raise it"
            )
            seconds, summary = distributed.from_first(functools.partial(self._logged, step, further))
            if step == steps and summary is not None and summary.get("step") == step and summary.keys() >= SHOWN:
                self.console.message(f"finished: checkpoint {steps} and its files are whole; nothing left to do")
                self._show(summary)
                return summary
            if seconds is not None:
                self.account.resume(saved.notes.get("account", {}), seconds)
            state = self._fit(saved, checkpoints, stop)
        self.account.charge("saving")
        if int(state.step) < steps:
            raise Interrupted(f"stopped at step {int(state.step)}: the same command resumes from there", stop.status)
        return self._finish(state)

    def _out_of_memory(self) -> str:
        c, needed = self.c.train, memory.need(self.program.lower)
        shards = sharding.row_parts(self.mesh)
        return memory.training_advice(c, self.c.model.remat, shards, needed, memory.capacity())

    def _logged(self, step: int, further: int) -> tuple[float | None, dict[str, Any] | None]:
        """Seconds that metrics.jsonl says were trained, and the summary; None where there is none.

        Then it ends with the last row up to a checkpoint's step, from which the checkpoint is `further` steps away.
        """
        before = self.folder.rows()
        rows = [row for row in before if row["step"] <= step]
        check(
            (int(rows[-1]["step"]) if rows else 0) + further == step and all("seconds" in row for row in before),
            f"{self.folder.metrics} has lost the rows up to step {step}, where the checkpoint stands: "
            "restore it, or choose another --workdir",
        )
        check(
            step < self.c.train.steps or (bool(rows) and rows[-1]["step"] == step and "eval_loss" in rows[-1]),
            f"train.steps={step} is where {self.folder.path} was stopped, before an evaluation: give it a step more",
        )
        self.folder.keep_rows(step)
        seconds = before[-1]["seconds"] if before else 0.0 if step else None
        return seconds, self.folder.read("summary")

    def _fit(
        self, saved: checkpoint.Saved, checkpoints: checkpoint.Checkpoints, stop: Callable[[int], bool]
    ) -> TrainState:
        c, started_at = self.c, int(saved.state.step)

        def record(row: dict[str, float | int]) -> None:
            step = int(row["step"])
            checkpoints.check()
            row["learning_rate"] = float(np.asarray(self.program.schedule(step - 1)))
            if distributed.first_process():
                self.folder.append(row)
                write_events(row)
            left = self.console.seconds_left(step, c.train.steps)
            self.console.training(
                step, c.train.steps, row["loss"], row.get("eval_loss"), row["tokens_per_second"], left
            )

        if distributed.first_process():
            self.folder.started({"step": started_at, **origin.facts()})
        self.console.message(f"compiling for {self.mesh.size} x {jax.devices()[0].device_kind}")
        with (
            watched(c.watchdog.frozen_seconds) as alive,
            events.recorder(self.folder.path / "events", started_at + 1, distributed.first_process()) as write_events,
            contextlib.closing(loader.prefetch(self._batch, started_at, c.train.steps)) as batches,
        ):
            try:
                return train.fit(
                    saved.state,
                    c.train,
                    train_step=self.program.train_step,
                    batches=batches,
                    evaluate=self._evaluate,
                    save=checkpoints.save,
                    save_seconds=c.checkpoint.every_seconds,
                    record=record,
                    account=self.account,
                    window=saved.notes.get("window", ()),
                    skipped=saved.notes.get("skipped", 0),
                    stop=stop,
                    alive=alive,
                )
            except train.NotFiniteError as error:
                raise train.NotFiniteError(
                    error.name, error.step, error.found or self._where(error, checkpoints, alive)
                ) from error

    def _batch(self, step: int) -> Array:
        """The rows of the step after `step` others."""
        c, size = self.c, self.c.train.batch_size
        read = functools.partial(loader.batch, self.prepared.train, c.seed, step, size)
        return sharding.global_batch(read, size, c.data.length, self.mesh)

    def _where(self, error: train.NotFiniteError, checkpoints: checkpoint.Checkpoints, alive: Alive) -> str:
        """Where in its step a figure stopped being finite, found by going there again from the last checkpoint."""
        checkpoints.wait()
        saved = checkpoints.restore(self.program.like)
        state = self.program.init(self.c.seed) if saved is None else saved.state
        first, last = int(state.step), error.step - 1
        self.console.message(
            f"{error.name} is not finite at step {error.step}: going there again to see where it began"
        )
        for step in range(first, last):
            state, sums = self.program.train_step(state, self._batch(step))
            jax.block_until_ready(sums)
            alive()
        alive(compiling=True)
        return diagnosis.where(self.program.objective, state, self._batch(last), self.c.seed, self.c.train.accumulate)

    def _evaluate(self, params: Any) -> dict[str, float]:
        """Held-out loss and its relatives, per predicted token, with the same masks every time."""
        sums = train.evaluate(self.program.eval_step, params, self._heldout_batches())
        loss, weight, masked = sums["loss"] / sums["weight"], sums["weight"], max(sums["mask_weight"], 1.0)
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700)),
            "eval_accuracy": sums["accuracy"] / weight,
            "unigram_loss": sums["unigram"] / weight,
            "eval_mask_loss": sums["mask_loss"] / masked,
            "unigram_mask_loss": sums["mask_unigram"] / masked,
        }

    def _heldout_batches(self) -> Iterator[Array]:
        """Each held-out row once; the last batch is filled with padding, which weighs nothing."""
        size = self.c.train.batch_size
        tokens = evaluated_rows(self.prepared.heldout, self.c.train.eval_rows)
        for start in range(0, len(tokens), size):
            rows = tokens[start : start + size]
            padding = np.full((size - len(rows), rows.shape[1]), self.prepared.tokenizer.pad, rows.dtype)
            filled = np.concatenate([rows, padding])
            yield sharding.global_batch(functools.partial(_slice, filled), size, filled.shape[1], self.mesh)

    def _finish(self, state: TrainState) -> dict[str, Any]:
        """Summary, pictures and the closing table."""
        sample = self.program.objective.inputs(jnp.asarray(evaluated_rows(self.prepared.heldout, 64)))
        kernels = learned_kernels(self.program.model, state.params, sample, self.program.everywhere)
        summary = distributed.from_first(lambda: self._leave(int(state.step), state.params, kernels))
        self._show(summary)
        return summary

    def _leave(self, step: int, params: Any, kernels: dict[str, Kernel]) -> dict[str, Any]:
        """Writes the pictures, and last the summary."""
        from convattn_jax import plots  # and matplotlib, which would delay every start

        rows = self.folder.rows()
        final = next(row for row in reversed(rows) if "eval_loss" in row)
        speeds = [row["tokens_per_second"] for row in rows if row["tokens_per_second"] > 0]
        summary = {
            "step": step,
            **{key: value for key, value in final.items() if key.startswith(("eval_", "unigram_"))},
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "tokens_per_second": float(np.median(speeds)) if speeds else 0.0,
            "train_seconds": rows[-1]["seconds"],
            "peak_memory": peak_memory(),
            "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}",
            "account": self.account.seconds,
        }
        plots.plot_losses(rows, self.folder.path / "loss.png", self.c.name, summary["unigram_loss"])
        plots.plot_kernels(kernels, self.folder.path / "kernels.png", self.c.name)
        save_kernels(kernels, self.folder.path / "kernels.npz")
        self.account.charge("evaluating")
        self.folder.write("summary", summary)
        return summary

    def _show(self, summary: dict[str, Any]) -> None:
        path = self.folder.path
        pictures = [(name, path / f"{name}.png") for name in ("loss", "kernels") if (path / f"{name}.png").exists()]
        gap = summary["unigram_loss"] - summary["eval_loss"]
        self.console.table(
            self.c.name,
            [
                ("held-out loss", f"{summary['eval_loss']:.3f} nat ({gap:.2f} under the unigram model)"),
                ("perplexity", f"{summary['eval_perplexity']:.1f}"),
                ("accuracy", f"{summary['eval_accuracy']:.1%}"),
                ("parameters", f"{summary['parameters']:,}"),
                ("run folder", path),
                ("checkpoint", path / "checkpoints" / str(summary["step"])),
                *pictures,
                *[(KINDS[kind], duration(seconds)) for kind, seconds in summary.get("account", {}).items()],
            ],
        )


def peak_memory() -> int | None:
    """The most bytes that a device of this host has held since the process began; None where it doesn't say (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def _slice(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    return rows[first : first + count]


def evaluated_rows(heldout: Rows, count: int) -> np.ndarray:
    """At most `count` held-out rows, spread evenly over the held-out text."""
    total = len(heldout.tokens)
    return heldout.tokens[np.linspace(0, total - 1, min(count, total)).astype(np.int64)]
