"""python -m convattn_jax.sweep --sweep=configs/sweeps/positions.py: every run of a comparison."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from convattn_jax.arguments import Parser
from convattn_jax.config import BY_KEYBOARD, UserError, check, run_file
from convattn_jax.data.bucket import in_a_bucket

EPILOG = """\
  --sweep=configs/sweeps/positions.py:small   the size is passed on to every configuration
  --config.train.steps=6200                   any key of pre-training, for every run
  --finetune.glue.data_dir=glue               any key of fine-tuning, for every run
  --at_once=4                                 four runs at a time, which may share a GPU that one alone leaves idle
The same command again goes on where it stopped. Exit status: 0 if all runs are done, 1 if some failed, 2 if an entry
is invalid (then none was started), 130 after Ctrl-C. A run that another process is at work on is left alone (1).
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a sweep, or prints its commands."""
    try:
        parser = _parser()
        args, rest = parser.parse_known_args(argv)
        config, finetune = _overrides(rest, parser)
        sys.exit(_run(args, config, finetune))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(BY_KEYBOARD)


def _run(args: argparse.Namespace, config: dict[str, str], finetune: dict[str, str]) -> int:
    from convattn_jax.sweep.table import Sweep

    sweep = run_file("sweep", args.sweep, Sweep)
    check(
        not in_a_bucket(args.workdir),
        f"--workdir={args.workdir}: a sweep keeps its books on a disk: name a local folder",
    )
    part, parts = _shard(args.shard)
    at_once = args.at_once
    check(at_once.isdecimal() and int(at_once) > 0, f"--at_once={at_once} must be a whole number of runs, such as 4")
    seeds = _numbers(args.seeds)

    from convattn_jax.run import RunFolder
    from convattn_jax.sweep import plan, runner  # and jax, now that the command line is known to be good
    from convattn_jax.sweep.board import Board

    only = tuple(args.only.split(",")) if args.only else ()
    stem = pathlib.Path(args.sweep.partition(":")[0]).stem
    workdir = pathlib.Path(args.workdir or f"sweeps/{stem}")
    jobs = plan.jobs(sweep, workdir, plan.Options(only, seeds, config, finetune))
    RunFolder(workdir).check_writable()
    mine = jobs[part - 1 :: parts]
    if not mine:
        print(f"--shard={args.shard}: this part has no runs, there are {len(jobs)} in all")
        return 0
    if args.list:
        print("\n".join(plan.as_text(job) for job in mine))
        return 0
    plan.write_plan(sweep, jobs, workdir)
    try:
        with Board([job.name for job in mine]) as board, runner.stopping_on_sigterm():
            failed, elsewhere = runner.run_jobs(mine, workdir, board, int(at_once))
    except runner.Stopped:
        print("stopped by SIGTERM: the same command goes on where it stopped", file=sys.stderr)
        return 143
    if failed:
        print(f"error: {len(failed)} of {len(mine)} runs failed: {', '.join(failed)}", file=sys.stderr)
    if elsewhere:
        print(
            f"at work in another process: {', '.join(elsewhere)}; once that has ended, the same command goes on there",
            file=sys.stderr,
        )
    print(f"report: python -m convattn_jax.report {workdir}")
    return 1 if failed or elsewhere else 0


def _parser() -> Parser:
    parser = Parser(
        "convattn_jax.sweep",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sweep", required=True, metavar="FILE[:SIZE]", help="the table of runs")
    parser.add_argument("--workdir", default="", help="holds all run folders; sweeps/NAME unless given")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts, one a machine or device")
    parser.add_argument("--at_once", default="1", metavar="N", help="runs at a time, one a GPU if you name the GPUs")
    parser.add_argument("--seeds", default="", help="such as 0,1,2, in place of the sweep's own")
    parser.add_argument("--only", default="", help="variants, with commas between them")
    parser.add_argument("--list", action="store_true", help="check all entries, print their commands, run nothing")
    return parser


def _overrides(rest: Sequence[str], parser: Parser) -> tuple[dict[str, str], dict[str, str]]:
    """--config.KEY=VALUE and --finetune.KEY=VALUE."""
    found: dict[str, dict[str, str]] = {"config": {}, "finetune": {}}
    for arg in rest:
        name, equals, value = arg.removeprefix("--").partition("=")
        group, dot, key = name.partition(".")
        known = arg.startswith("--") and dot and group in found
        near = parser.near(f"--{name}")
        check(
            bool(known),
            f"{arg} is no option{near}; there are --config.KEY=VALUE and --finetune.KEY=VALUE, and see --help",
        )
        check(bool(equals), f"--{name} has no value: write --{name}=VALUE")
        found[group][key] = value
    return found["config"], found["finetune"]


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    good = bool(slash) and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)
    check(good, f"--shard={text} must be I/N with 1 <= I <= N, such as 1/3")
    return int(part), int(parts)


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part for part in text.split(",") if part]
    check(all(part.isdecimal() for part in parts), f"--seeds={text} must be whole numbers with commas between them")
    seeds = tuple(int(part) for part in parts)
    check(len(set(seeds)) == len(seeds), f"--seeds={text} names a seed twice")
    return seeds


if __name__ == "__main__":
    main()
