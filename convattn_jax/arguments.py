"""The options of the commands beside `convattn_jax.main`, whose errors are lines that name the option."""

import argparse
import re
from typing import Any, NoReturn

from convattn_jax.config import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations and usage blocks: whatever is wrong is a `UserError`."""

    def __init__(self, module: str, **options: Any):
        self._known: list[str] = []
        super().__init__(f"python -m {module}", allow_abbrev=False, **options)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's."""
        self._known += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def near(self, name: str) -> str:
        """ ", did you mean --shard?" where an option is close to this one, else nothing."""
        return did_you_mean(name, self._known)

    def error(self, message: str) -> NoReturn:
        """What argparse has to say, as `option: what is wrong`, with the option that may be meant."""
        if found := re.match(r"unrecognized arguments: (--?[^\s=]+)?(\S*)", message):
            name, word = found.groups()
            is_option = f"{name} is no option{self.near(name or '')}"
            message = is_option if name else f"unexpected argument {word!r}"
        message = re.sub(r"^the following arguments are required: (.*)", r"\1: missing", message)
        raise UserError(f"{message.removeprefix('argument ')}; see --help")
