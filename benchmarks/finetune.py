"""Times fine-tuning steps: ten seeds as one program against one after the other, rows in buckets against padded ones.

    python -m benchmarks.finetune --data_dir=glue                       # the original TSV files; the small model
    python -m benchmarks.finetune --data_dir=glue --config=configs/composite.py --tasks=rte --seeds=3 --steps=10

The model starts at random, which costs what a trained one costs; rows are the tasks' own, tokenised with pieces trained
on them. The three ways take turns, over the same batches of the first epoch; making the batches on the host counts,
drawing the heads does not, nor compilation, which is shown beside it. Compare by ratio within one call.
"""

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.arguments import documented, positive
from benchmarks.settings import configured
from convattn_jax.config import from_config
from convattn_jax.data import tokenizer as tokenizers
from convattn_jax.glue import examples
from convattn_jax.glue.batches import join, stack
from convattn_jax.glue.config import SEEDS
from convattn_jax.glue.data import Texts
from convattn_jax.glue.sources import SOURCES
from convattn_jax.glue.task_run import classifier_of, edges_to, lengths_of
from convattn_jax.glue.tasks import OUTPUTS, Recipe, Task, recipe, select
from convattn_jax.glue.training import Schedule, Trainer
from convattn_jax.model.config import ModelConfig


class Bench(NamedTuple):
    """One task's rows, and how they are trained."""

    trainer: Trainer
    encoder: Any
    task: Task
    texts: Texts
    recipe: Recipe
    pad: int

    def train(self, seeds: Sequence[int], edges: Sequence[int], steps: int) -> float:
        """Seconds of the first steps of the first epoch, batches included, as `TaskRun` makes them."""
        size = self.recipe.batch_size
        state, keys = jax.block_until_ready(self.trainer.start(seeds, [self.encoder], self.task.outputs))
        began = time.perf_counter()
        plans = [examples.epoch_batches(lengths_of(self.texts), size, edges, self.task.name, 0, seed) for seed in seeds]
        parts = list(zip(*plans, strict=True))[:steps]
        rows = join(self.texts.rows)
        made = (stack(rows, self.texts.labels, part, size, self.pad) for part in parts)
        schedule = Schedule(len(parts), self.recipe.learning_rate, 1)
        jax.block_until_ready(self.trainer.train(state, keys, self.task.outputs, schedule, made, lambda *row: None))
        return time.perf_counter() - began


def measure(bench: Bench, seeds: Sequence[int], steps: int, turns: int) -> tuple[float, dict[str, list[float]]]:
    """(seconds of compiling, seconds of every turn by way)."""
    lengths, size = lengths_of(bench.texts), bench.recipe.batch_size
    buckets, padded = edges_to(bench.recipe.length), [bench.recipe.length]
    ways = {"together": ([seeds], buckets), "one by one": ([(s,) for s in seeds], buckets), "padded": ([seeds], padded)}
    began = time.perf_counter()
    programs = [
        bench.trainer.prepare_step(len(groups[0]), size, length)
        for groups, edges in ways.values()
        for length in examples.lengths_met(lengths, size, edges)
    ]
    for program in programs:
        program.result()
    for groups, edges in ways.values():
        bench.train(groups[0], edges, 1)
    compiling, seconds = time.perf_counter() - began, {name: [] for name in ways}
    for _ in range(turns):
        for name, (groups, edges) in ways.items():
            seconds[name].append(sum(bench.train(group, edges, steps) for group in groups))
    return compiling, seconds


def main() -> None:
    """Prints a table, and writes JSON lines."""
    parser = documented(__doc__)
    parser.add_argument("--data_dir", required=True, help="the folder of GLUE's TSV files")
    parser.add_argument("--config", default="configs/composite.py:small")
    parser.add_argument("--tasks", default="rte,mrpc,cola", help="tasks of GLUE")
    parser.add_argument("--seeds", type=positive, default=10)
    parser.add_argument("--steps", type=positive, default=40, help="steps of each way and turn")
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--vocabulary", type=positive, default=30_004, help="rows of the embedding")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.kernel=plain")
    parser.add_argument("--json", help="a file for the figures as JSON lines")
    args = parser.parse_args()

    config = from_config(ModelConfig, configured(args.config, args.set).model, "model.")
    tasks = select(args.tasks.split(","))
    splits = {task.name: SOURCES["tsv"](args.data_dir, task)["train"] for task in tasks}
    lines = [text for split in splits.values() for row in split.texts for text in row]
    tokenizer = tokenizers.train(lines, 4000, "reference")
    trainer = Trainer(classifier_of(config, args.vocabulary, OUTPUTS))
    encoder = jax.jit(trainer.model.initial_params)(jax.random.key(0))["encoder"]
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, {args.config}, {args.seeds} seeds, {args.steps} steps, {args.turns} turns")

    for task in tasks:
        split, chosen = splits[task.name], recipe("electra", task)
        texts = Texts(examples.encode(tokenizer, split.texts, chosen.length), split.labels, split.idx)
        bench = Bench(trainer, encoder, task, texts, chosen, tokenizer.pad)
        compiling, seconds = measure(bench, SEEDS[: args.seeds], args.steps, args.turns)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        print(f"{task.name}: compiled in {compiling:.0f} s, {lengths_of(texts).mean():.0f} tokens a row")
        for name, times in seconds.items():
            print(f"  {name:18} {medians[name]:8.3f} s ({min(times):.3f} to {max(times):.3f})", end="")
            print(f"  x {medians[name] / medians['together']:.2f}")
        if args.json:
            line = {
                "task": task.name, "device": device, "jax": jax.__version__, "config": args.config, "set": args.set,
                "seeds": args.seeds, "steps": args.steps, "seconds": seconds, "compile_s": compiling,
            }  # fmt: skip
            with open(args.json, "a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
