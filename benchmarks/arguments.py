"""The parser of every benchmark's options: the module's docstring as it stands, and each option with its default."""

import argparse


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


def sizes(text: str) -> list[tuple[int, ...]]:
    """The type of lists such as 256x128,64x512."""
    try:
        return [tuple(positive(size) for size in shape.split("x")) for shape in text.split(",")]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text} must be sizes such as 256x128,64x512: {error}") from error
