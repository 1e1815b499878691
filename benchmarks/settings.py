"""KEY=VALUE arguments of the benchmarks, onto a configuration."""

from typing import Any

from convattn_jax.config import UserError, load_config_file


def configured(spec: str, assignments: list[str]) -> Any:
    """The configuration FILE[:SIZE] with values overridden; each keeps the type it had.

    Ends the program with one line where there is no such file, size, key or value.
    """
    try:
        config: Any = load_config_file(spec)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        *groups, leaf = key.split(".")
        target: Any = config
        try:
            for group in groups:
                target = target[group]
            kind = type(target[leaf])
            target[leaf] = (
                tuple(value.split(",")) if kind is tuple else value == "True" if kind is bool else kind(value)
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error.args[0] if error.args else error).split())
            raise SystemExit(f"error: {assignment} of {spec}: {reason}") from error
    return config
