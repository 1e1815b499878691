"""Times whole training steps: masking, forward, backward, clipping, optimizer; peers take turns with ours.

    python -m benchmarks.step                                       # the demonstration: composite beside plain BERT
    python -m benchmarks.step --suite=base,small,base512,base2048,mixed --authors=PATH --out=results
    python -m benchmarks.step --configs=configs/composite.py:small,configs/composite.py:small@model.kernel=plain \
        --batch=1024 --length=128 --vocabulary=30004
    python -m benchmarks.step --profile=traces --steps=3            # where the device time goes, kernel by kernel

Contenders take turns, so that a machine that slows down slows all of them; a figure is the median over turns with the
lowest and highest beside it; compare by ratio within one call. Peers whose library is missing are left out. Writes
step.jsonl, step.md and step.png to --out. `benchmarks/suites.py` holds the suites and says what a specification is.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.arguments import documented, positive
from benchmarks.served import LeftOutError
from benchmarks.suites import HEADS, SUITES, Ratio, Spec, Suite

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU
MATRIX, MATRIX_SIZE = "matrix product", 8192


def main() -> None:
    """Runs the suites, prints their tables."""
    parser = documented(__doc__)
    parser.add_argument("--suite", default="demo", help=f"by commas: {', '.join(SUITES)}")
    parser.add_argument("--configs", help="instead: comma-separated FILE[:SIZE][@KEY=VALUE...], transformers:SIZE")
    parser.add_argument("--only", default="", help="rows of a suite whose names hold one of these words, by commas")
    parser.add_argument("--skip", default="", help="but not those whose names hold one of these")
    parser.add_argument("--authors", default="", metavar="PATH", help="a checkout of the paper's PyTorch code")
    parser.add_argument("--batch", type=positive, help="rows per step")
    parser.add_argument("--length", type=positive, help="tokens per row")
    parser.add_argument("--vocabulary", type=positive, help="ids")
    parser.add_argument("--steps", type=positive, default=5, help="steps per turn")
    parser.add_argument("--turns", type=positive, default=5, help="turns of each contender")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. model.dtype=float32")
    parser.add_argument("--profile", type=pathlib.Path, metavar="DIR", help="trace --steps steps of ours, no more")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    args = parser.parse_args()
    if args.profile:  # kernels inside of a CUDA graph don't say which operation they belong to
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

    records, tables = [], []
    for name in ["custom"] if args.configs else args.suite.split(","):
        if not args.configs and name not in SUITES:
            parser.error(f"--suite={name} is unknown; there are: {', '.join(SUITES)}")
        whole = None if args.configs else SUITES[name]
        suite = chosen(args, whole)
        if not suite.rows:
            rows = ", ".join(whole.rows) if whole else args.configs
            parser.error(f"--only={args.only} --skip={args.skip} leave no row of: {rows}")
        if args.profile:
            profile(suite, args)
            continue
        times, facts = measure(suite, args)
        found = [{"suite": name} | record for record in figures(suite, times, facts)]
        records += found
        tables.append(markdown(suite, found, facts["device"]))
        print("\n" + tables[-1], flush=True)
        if args.out:  # after every suite: what is measured stays
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "step.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            (args.out / "step.md").write_text("\n".join(tables))
            picture(records, args.out / "step.png")


def chosen(args: argparse.Namespace, suite: Suite | None) -> Suite:
    """A suite with the command line's own rows and shape."""
    if suite is None:
        suite = dataclasses.replace(SUITES["demo"], rows={spec: spec for spec in args.configs.split(",")}, ratios=())
    words = args.only.split(",")
    skipped = [word for word in args.skip.split(",") if word]
    rows = {name: spec for name, spec in suite.rows.items() if any(word in name for word in words)}
    rows = {name: spec for name, spec in rows.items() if not any(word in name for word in skipped)}
    shape = {name: getattr(args, name) for name in ("batch", "length", "vocabulary") if getattr(args, name)}
    return dataclasses.replace(suite, rows=rows, **shape)


def measure(suite: Suite, args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds a step of every contender in every turn, and what else is known of them."""
    import jax

    from benchmarks import ours, peers

    specs = {name: Spec.parse(text) for name, text in suite.rows.items()}
    padded = ours.rows_by_layout(suite)["pairs"]
    saved = peers.save_rows(padded)
    started: dict[str, peers.Peer] = {}

    def start_peer(name: str) -> None:
        try:
            started[name] = peers.Peer(peer_config(specs[name], suite, args, saved))
            print(f"{name}: {started[name].facts}", file=sys.stderr, flush=True)
        except LeftOutError as error:
            leave_out(name, error)

    try:
        # peers compile while ours are traced, and are done before ours compile: compilers of both time kernels; two
        # peers at a time, since each takes memory as if it were alone
        wanted = [n for n, spec in specs.items() if spec.peer and (spec.peer != "authors" or args.authors)]
        with ThreadPoolExecutor(2) as background:
            starting = [background.submit(start_peer, name) for name in wanted]
            mine = {name: spec for name, spec in specs.items() if not spec.peer}
            own = ours.steppers(mine, args.set, suite, leave_out, lambda: [start.result() for start in starting])
        started = {name: started[name] for name in wanted if name in started}
        runs = {name: stepper.run for name, stepper in own.items()} | {n: peer.run for n, peer in started.items()}
        if jax.default_backend() != "cpu":
            runs[MATRIX] = ours.matrix_product(MATRIX_SIZE)
        times = take_turns(runs, args.steps, args.turns)
    finally:
        for peer in started.values():
            peer.close()
        os.remove(saved)
    tokens = {n: s.tokens for n, s in own.items()} | dict.fromkeys(started, ours.tokens_of(padded))
    return times, {
        "device": f"{jax.devices()[0].device_kind}, JAX {jax.__version__}",
        "arithmetic": {name: stepper.arithmetic for name, stepper in own.items()},
        "temporary_bytes": {name: stepper.temporary_bytes for name, stepper in own.items()},
        "tokens": {n: statistics.fmean(t[i % len(t)] for i in range(args.steps)) for n, t in tokens.items()},
        "peers": {name: peer.facts for name, peer in started.items()},
    }


def take_turns(runs: Mapping[str, Callable[[int], float]], steps: int, turns: int) -> dict[str, list[float]]:
    """Seconds a step of every contender in every turn; who fails once, for want of memory say, has no row."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            if name not in times:
                continue
            try:
                run(1)  # so that nobody pays for whoever ran before
                times[name].append(run(steps) / steps)
            except Exception as error:
                leave_out(name, error)
                del times[name]
        if turn == 0:  # to get warm
            times = {name: [] for name in times}
    return times


def leave_out(name: str, error: Exception) -> None:
    """Says why a contender has no row."""
    lines = str(error).splitlines() or [""]
    print(f"{name}: left out, {type(error).__name__}: {lines[0][:300]}", file=sys.stderr, flush=True)


def peer_config(spec: Spec, suite: Suite, args: argparse.Namespace, rows: str) -> Any:
    """A peer of the size that configs/base.py calls so, with the same vocabulary rows as ours."""
    from benchmarks.peers import PeerConfig
    from benchmarks.settings import configured

    config = configured(f"configs/base.py:{spec.source.partition(':')[2] or 'base'}", [*args.set, *spec.assignments])
    m = config.model
    head = spec.options.get("head", "all")
    if head not in HEADS:
        raise SystemExit(f"head={head} is unknown; there are: {', '.join(HEADS)}")
    return PeerConfig(
        kind=spec.source.partition(":")[0], width=m.width, layers=m.layers, heads=m.heads, hidden=m.hidden,
        embedding=m.embedding, vocabulary=-(-suite.vocabulary // m.vocab_multiple) * m.vocab_multiple,
        length=suite.length, dropout=m.dropout, attention_dropout=m.attention_dropout, radius=m.radius,
        rate=config.masking.rate,
        dtype=m.dtype, rows=rows, path=args.authors, head=head,
        compile=spec.options.get("compile", "True"), sdpa=spec.options.get("sdpa", "auto"),
    )  # fmt: skip


def profile(suite: Suite, args: argparse.Namespace) -> None:
    """Traces some steps of each of ours and prints where the device time goes."""
    import jax

    from benchmarks import kernel_times, ours

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    specs = {name: spec for name, text in suite.rows.items() if not (spec := Spec.parse(text)).peer}
    for name, step in ours.steppers(specs, args.set, suite, leave_out).items():
        step.run(2)
        inside = args.profile / re.sub(r"[^\w.=]+", "-", name)
        inside.mkdir(parents=True, exist_ok=True)
        with jax.profiler.trace(str(inside), profiler_options=options):
            step.run(args.steps)
        (inside / "program.txt").write_text(step.program())
        (inside / "steps.txt").write_text(str(args.steps))
        print(f"\n{name}: {inside}\n{kernel_times.analyse(inside)}", flush=True)


# --- report ----------------------------------------------------------------------------------------------------------


def figures(suite: Suite, times: dict[str, list[float]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A record per contender and per ratio."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    rate = 10 * 2 * MATRIX_SIZE**3 / medians[MATRIX] if MATRIX in medians else None
    records = []
    for name, values in times.items():
        record: dict[str, Any] = {"contender": name, "device": facts["device"], "step_ms": [t * 1e3 for t in values]}
        if name == MATRIX:
            record["flops_per_second"] = rate
        else:
            record |= {"spec": suite.rows[name], "batch": suite.batch, "length": suite.length}
            record |= {"tokens": facts["tokens"][name], "tokens_per_second": facts["tokens"][name] / medians[name]}
            record |= facts["peers"].get(name, {})
        if name in facts["arithmetic"]:
            arithmetic = facts["arithmetic"][name]
            record |= {"arithmetic": arithmetic, "temporary_bytes": facts["temporary_bytes"][name]}
            record["of_matrix_rate"] = arithmetic / medians[name] / rate if rate else None
        records.append(record)
    for ratio in suite.ratios:
        value = quotient(ratio, medians, facts["tokens"])
        if value is not None:
            turns = [dict(zip(times, turn, strict=True)) for turn in zip(*times.values(), strict=True)]
            spread = [quotient(ratio, turn, facts["tokens"]) for turn in turns]
            records.append({"ratio": ratio.name, "value": value, "turns": spread})
    return records


def quotient(ratio: Ratio, seconds: Mapping[str, float], tokens: Mapping[str, float]) -> float | None:
    """The ratio, of those that ran; None where one side has nobody."""
    cost = {name: value / tokens[name] for name, value in seconds.items() if name in tokens} if ratio.speed else seconds
    of, to = ([cost[name] for name in side if name in cost] for side in (ratio.of, ratio.to))
    if not of or not to:
        return None
    return min(to) / min(of) if ratio.speed else min(of) / min(to)


def markdown(suite: Suite, records: list[dict[str, Any]], device: str) -> str:
    """The contenders, then the ratios."""
    lines = [
        f"{suite.batch} x {suite.length} tokens{suite.mixed * ', lengths as in Wikipedia, padding not counted'}, "
        f"vocabulary {suite.vocabulary:,}; {device}",
        "",
        "| | ms a step | tokens/s | model arithmetic / matrix rate |",
        "|---|---|---|---|",
    ]
    for record in records:
        if "ratio" in record:
            continue
        low, middle, high = min(record["step_ms"]), statistics.median(record["step_ms"]), max(record["step_ms"])
        cells = [record["contender"], f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        if record["contender"] == MATRIX:
            cells = [
                f"{MATRIX_SIZE}^3 bf16 product",
                f"{middle / 10:.3f}",
                "",
                f"{record['flops_per_second'] / 1e12:.0f} TFLOP/s",
            ]
        else:
            share = record.get("of_matrix_rate")
            cells += [f"{record['tokens_per_second']:,.0f}", f"{share:.3f}" if share else ""]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [record for record in records if "ratio" in record]
    if ratios:
        lines += ["", "| ratio | of the medians | within turns |", "|---|---|---|"]
        lines += [
            f"| {r['ratio']} | {r['value']:.3f} | {min(r['turns']):.3f} to {max(r['turns']):.3f} |" for r in ratios
        ]
    return "\n".join(lines) + "\n"


def picture(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Tokens a second of every contender, a panel per suite."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    rows = [record for record in records if "tokens_per_second" in record]
    suites = list(dict.fromkeys(record["suite"] for record in rows))
    counts = [sum(record["suite"] == suite for record in rows) for suite in suites]
    figure, axes = plt.subplots(
        len(suites), 1, figsize=(9, 0.8 * len(suites) + 0.3 * sum(counts)), layout="constrained", squeeze=False,
        height_ratios=counts,
    )  # fmt: skip
    for suite, axis in zip(suites, axes[:, 0], strict=True):
        here = [record for record in rows if record["suite"] == suite][::-1]
        speeds = [record["tokens_per_second"] for record in here]
        tokens = [record["tokens"] * 1e3 for record in here]
        slow = [v - n / max(r["step_ms"]) for v, n, r in zip(speeds, tokens, here, strict=True)]
        fast = [n / min(r["step_ms"]) - v for v, n, r in zip(speeds, tokens, here, strict=True)]
        colours = ["tab:gray" if Spec.parse(record["spec"]).peer else "tab:blue" for record in here]
        axis.barh([record["contender"] for record in here], speeds, xerr=[slow, fast], color=colours)
        axis.set(title=f"{suite}: {here[0]['batch']} x {here[0]['length']}", xlabel="tokens/s (gray: PyTorch)")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
