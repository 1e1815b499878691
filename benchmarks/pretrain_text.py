"""Pre-trains a variant on text files: a short scan of the learning rate, then one long run at the best.

    python -m benchmarks.pretrain_text --files='wiki_train.txt.xz,books_train.txt.xz' \
        --heldout='wiki_heldout.txt.xz,books_heldout.txt.xz' --out=runs/text

Each run is an ordinary run folder below --out; `results.json` there says what was tried and what came out.
"""

import json
import pathlib

import jax

from benchmarks.arguments import documented
from benchmarks.settings import configured
from convattn_jax import pretrain
from convattn_jax.console import Console


def main() -> None:
    """Runs the scan and the long run."""
    parser = documented(__doc__)
    parser.add_argument("--config", default="configs/composite.py:small")
    parser.add_argument("--files", required=True, help="comma-separated text files or globs")
    parser.add_argument("--heldout", required=True, help="comma-separated held-out text files or globs")
    parser.add_argument("--out", default="runs/text")
    parser.add_argument("--tokenizer", default="", help="a SentencePiece model; left out, one is trained")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3", help="learning rates of the scan")
    parser.add_argument("--scan-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=6_200)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.dtype=float32")
    args = parser.parse_args()

    out = pathlib.Path(args.out)
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "scan": {}}

    def train(name: str, rate: float, steps: int) -> dict:
        config = configured(args.config, args.set)
        config.name = name
        config.data.source = "text"
        config.data.files = tuple(args.files.split(","))
        config.data.heldout_files = tuple(args.heldout.split(","))
        config.data.cache_dir = str(out / "cache")
        config.tokenizer.model = args.tokenizer
        config.optimizer.learning_rate = rate
        config.train.steps = steps
        config.train.eval_every = max(100, steps // 1000 * 100)
        return pretrain.run(config, str(out / name), Console())

    for rate in (float(text) for text in args.rates.split(",")):
        results["scan"][rate] = train(f"rate-{rate:g}", rate, args.scan_steps)
        (out / "results.json").write_text(json.dumps(results, indent=2))
    best = min(results["scan"], key=lambda rate: results["scan"][rate]["eval_loss"])
    results["best_rate"] = best
    results["long"] = train("long", best, args.steps)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results["long"], indent=2))


if __name__ == "__main__":
    main()
