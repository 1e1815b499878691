"""The report's tables as Markdown."""

from collections.abc import Sequence

from convattn_jax.report.tables import Cell, Table

_SPECIAL = str.maketrans({letter: f"\\{letter}" for letter in "\\`*_[]<>|#&$~!"})


def document(title: str, lead: Sequence[str], tables: Sequence[Table]) -> str:
    """A heading, sentences, and the tables that have rows."""
    parts = [f"# {escaped(title)}", *map(escaped, lead)]
    for table in tables:
        if table.rows:
            parts += [f"## {escaped(table.title)}", escaped(table.about), _table(table)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = [" | ".join(map(escaped, table.columns)), "|".join("---" for _ in table.columns)]
    lines += [" | ".join(map(_cell, row)) for row in table.rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(cell: Cell) -> str:
    return f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)


def escaped(text: str) -> str:
    """Text that Markdown and HTML take for nothing but text."""
    return text.translate(_SPECIAL)
