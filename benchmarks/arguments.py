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
