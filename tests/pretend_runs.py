"""Run folders as a sweep leaves them, made of made-up figures."""

import json
import pathlib

import numpy as np
import tiny

from convattn_jax.config import from_config, to_plain
from convattn_jax.evaluate import attention_file, save_attention
from convattn_jax.inference import AttentionMaps
from convattn_jax.learned import save_kernels
from convattn_jax.plots import Kernel
from convattn_jax.pretrain import PretrainConfig

SENTENCE = "the cat sat"
STEPS = 6


def write(path: pathlib.Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def config_of(name: str, seed: int, **changes) -> dict:
    return to_plain(from_config(PretrainConfig, tiny.config(pathlib.Path("nowhere"), name=name, seed=seed, **changes)))


def pretraining(folder: pathlib.Path, loss: float, seed: int = 0, kernels: bool = True, **changes) -> pathlib.Path:
    """A finished run."""
    write(folder / "config.json", config_of(folder.name, seed, **changes))
    write(folder / "data.json", {"fingerprint": "f", "tokenizer": "t"})
    rows = [{"step": s, "loss": loss + 6 / s, "eval_loss": loss + 5 / s - 5 / STEPS} for s in range(1, STEPS + 1)]
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    figures = {"eval_loss": loss, "parameters": 1234567, "tokens_per_second": 2.5e4, "peak_memory": 3_000_000_000}
    write(folder / "summary.json", {"step": STEPS, **figures, "hardware": "1 x cpu, JAX 0"})
    write(folder / "evaluations" / "length-32.json", {"length": 32, "applicable": True, "loss": loss + 0.5})
    taps = np.zeros((2, 2, 5))
    taps[:, 0, 1] = 2.0
    save_kernels(
        {"fixed": Kernel(taps), "dynamic_query": Kernel(-taps, taps)} if kernels else {}, folder / "kernels.npz"
    )
    maps = np.full((2, 2, 5, 5), 0.2, np.float32)
    found = AttentionMaps(["[CLS]", "the", "cat", "sat", "[SEP]"], maps)
    save_attention(attention_file(folder, SENTENCE), found)
    return folder


def finetuning(run: pathlib.Path, stage: str, results: dict, right=(0.9,) * 7) -> None:
    """Its results, and how many rows of each distance were right."""
    folder = run.with_name(f"{run.name}-{stage}")
    write(folder / "config.json", {"task": "finetune", "init_from": f"/elsewhere/{run.name}", "name": ""})
    write(folder / "results.json", results)
    for seed in range(len(next(iter(results.get("distance", {"": [0]}).values())))):
        counts = {str(d + 1): [100, round(100 * share)] for d, share in enumerate(right)}
        write(folder / "tasks" / "distance" / f"{seed}.json", {"by_label": {"validation": counts}})


def sweep(folder: pathlib.Path, losses: dict[str, list[float]], baseline: str = "absolute") -> pathlib.Path:
    """A finished sweep: variant -> its losses, one a seed."""
    jobs = {}
    for variant, values in losses.items():
        for seed, loss in enumerate(values):
            scores = ("content",) if variant == "absolute" else ("content", "fixed")
            run = pretraining(folder / f"{variant}-{seed}", loss, seed, model__scores=scores)
            score = 1 - loss / 10
            finetuning(
                run,
                "probes",
                {
                    "word_order": {"accuracy": [score, score + 0.02]},
                    "distance": {"pearson": [0.5, 0.6], "spearman": [0.7, 0.8]},
                },
                right=[score] * 7,
            )
            jobs[run.name] = {"variant": variant, "seed": seed, "stages": ["pretrain", "evaluate", "probes"]}
    plan = {"baseline": baseline, "sentence": SENTENCE, "variants": list(losses), "jobs": jobs}
    write(folder / "sweep.json", plan)
    return folder
