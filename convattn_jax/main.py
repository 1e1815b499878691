"""python -m convattn_jax.main --config=configs/composite.py: flags -> configuration -> the task; nothing else."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from convattn_jax import determinism, full_disk, stopping
from convattn_jax.config import (
    BY_KEYBOARD,
    AloneError,
    Command,
    Interrupted,
    UserError,
    check_choice,
    flatten,
    from_config,
    parse,
)
from convattn_jax.data import bucket

TASKS = {"pretrain": "convattn_jax.pretrain", "finetune": "convattn_jax.finetune"}
HELP = """usage: python -m convattn_jax.main --config=FILE[:SIZE] [--workdir=DIR] [--config.KEY=VALUE ...]

  --config=configs/composite.py         what to train; SIZE is tiny (default), small, base or large
  --config=configs/glue.py              fine-tune the run --config.init_from=runs/composite
  --workdir=runs/NAME                   the run folder; the same command again resumes what is there
  --compile_cache=DIR                   of compiled programs, ~/.cache/convattn_jax/compiled; empty: none are kept
  --config.train.steps=100              any key of the configuration; configs/base.py documents them
  --config.model.scores=content,fixed   a list: values with commas between them

Several processes as one run: under SLURM (srun), Open MPI, an indexed Kubernetes job or on a Cloud TPU slice start the
same line in each, and they find each other. Elsewhere say who is who; a GPU each: JAX_LOCAL_DEVICE_IDS=0, 1, ...

  --coordinator=HOST:PORT               where process 0 listens
  --processes=N --process=I             how many there are, and which this is, from 0
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the task a command line asks for; what the user can mend is one line on stderr and exit status 2."""
    by_itself, argv = argv is None, list(sys.argv if argv is None else argv)
    if any(arg in ("--help", "-h") for arg in argv[1:]):
        print(HELP, end="")
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    full_disk.tell_once()
    workdir = ""
    try:
        with stopping.listening(loading=by_itself) as listener:
            command = parse(argv)
            workdir = command.workdir
            task = str(command.config.task)
            check_choice("task", task, TASKS)
            if flatten(command.config).get("train.deterministic"):
                determinism.ask_for(command.workdir)
            module = importlib.import_module(TASKS[task])  # and jax, now that the command line is known to be good
            from convattn_jax import compiled, distributed, kept

            listener.loading = False
            kept.use(compiled.keep(command.compile_cache), command.file, command.size)
            watchdog: Any = command.config.get("watchdog") or {"killed_seconds": 100}  # who lacks it is told below
            if not _is_dry_run(command):  # which needs neither the other processes nor devices
                distributed.start(command.cluster, watchdog["killed_seconds"])
                distributed.check_devices()
                distributed.reserve_memory()
            with bucket.explained("--workdir", command.workdir):
                if task == "pretrain":
                    _check_effect(command)
                module.run(command.config, command.workdir)
    except AloneError as error:
        _line(error)
        sys.stdout.flush()
        os._exit(1)  # not 2: there is nothing to mend, and launchers start it again
    except UserError as error:
        sys.exit(_line(error))
    except OSError as error:
        reason = full_disk.reason(error)
        if reason is None:
            raise
        where = error.filename or workdir or "the run folder"  # what is written to an open file has no name
        sys.exit(_line(UserError(f"--workdir: {reason} ({where}): make room; the same command goes on from there")))
    except Interrupted as stopped:  # whole and resumable, as asked for
        print(stopped, file=sys.stderr)
        if stopped.status:
            sys.exit(stopped.status)
    except KeyboardInterrupt:
        print(stopping.BY_CTRL_C, file=sys.stderr)
        sys.exit(BY_KEYBOARD)


def _is_dry_run(command: Command) -> bool:
    return bool(flatten(command.config).get("mesh.dry_run"))


def _check_effect(command: Command) -> None:
    from convattn_jax.effect import check_effect, check_source, check_tokenizer
    from convattn_jax.model.config import ModelConfig
    from convattn_jax.run import RunFolder

    with bucket.patience("--workdir", command.workdir):
        begun = not _is_dry_run(command) and RunFolder(command.workdir).read("config") is not None
    if not begun:  # what has begun goes on as it began
        config: Any = command.config
        check_source(config.data.source, command.given)
        check_tokenizer(config.tokenizer.model, command.given)
        check_effect(from_config(ModelConfig, config.model, "model."), command.given)


def _line(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    main()
