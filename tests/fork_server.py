"""Starts runs fast, for the long suite: one process has imported everything and forks for each command.

JAX is imported but no device has been touched, so a fork is as good as a fresh process, without its two seconds.
"""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


class ForkServer:
    """Runs command lines of the program in processes that can be killed."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def _ask(self, question):
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, args: list[str], log: pathlib.Path) -> int:
        """The process id of a run whose output goes to the end of a file."""
        return self._ask({"start": args, "log": str(log)})

    def ended(self, process: int) -> int | None:
        """The exit status of a process, negative for a signal, or None while it runs."""
        return self._ask({"ended": process})

    def close(self) -> None:
        """Ends the server."""
        self._server.kill()
        self._server.communicate()


def _run(args: list[str], log: str) -> None:
    """In the child: the program, as if it had been started from a shell."""
    from convattn_jax import main

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    try:
        main.main(["main", *args])
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import convattn_jax.finetune
    import convattn_jax.pretrain  # noqa: F401  all that a run imports

    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            answer = os.fork()
            if answer == 0:
                _run(asked["start"], asked["log"])
        else:
            process, status = os.waitpid(asked["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if process else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
