"""The parser of every benchmark's options: the module's docstring as it stands, and each option with its default."""

import argparse
from collections.abc import Callable, Iterable


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help
        if told and action.default not in (None, "", False, [], argparse.SUPPRESS) and "%(default)" not in told:
            told += " (default: %(default)s)"
        return told


def documented(docstring: str | None) -> argparse.ArgumentParser:
    """Without options yet."""
    return argparse.ArgumentParser(description=docstring, formatter_class=_Help)


def positive(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number from 1 on")
    return int(text)


def sizes(*names: str) -> Callable[[str], list[tuple[int, ...]]]:
    """The type of lists such as 256x128,64x512, of sizes with these names."""

    def parse(text: str) -> list[tuple[int, ...]]:
        shapes = [shape.split("x") for shape in text.split(",")]
        if any(len(shape) != len(names) for shape in shapes):
            one = "x".join(name.upper() for name in names)
            raise argparse.ArgumentTypeError(f"{text} must be {one}, or several by commas")
        return [tuple(map(positive, shape)) for shape in shapes]

    return parse


def chosen(parser: argparse.ArgumentParser, words: str, names: Iterable[str]) -> list[str]:
    """The contenders whose names hold one of these words, by commas; an error where none does."""
    names = list(names)
    found = [name for name in names if any(word in name for word in words.split(","))]
    if not found:
        parser.error(f"--contenders={words} is in none of: {', '.join(names)}")
    return found


def need_gpu(parser: argparse.ArgumentParser, option: str) -> None:
    """An error on a machine without a GPU, for an option that compiles its kernels."""
    import jax

    if jax.default_backend() != "gpu":
        parser.error(f"{option}: this compiles the kernels for an NVIDIA GPU, and there is none")
