"""python -m convattn_jax.report sweeps/positions: one self-contained page, and the same tables as Markdown."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from convattn_jax.arguments import Parser
from convattn_jax.config import UserError

EXAMPLES = """\
  python -m convattn_jax.report sweeps/positions                    a sweep: report.html and report.md in its folder
  python -m convattn_jax.report runs/composite                      a run and what was fine-tuned from it: in its folder
  python -m convattn_jax.report runs/composite runs/bert --out=.    single runs; without --out: beside them
  python -m convattn_jax.report sweeps/* --baseline=fixed --sentence='The dog that ran was tired.'
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes report.html and report.md; what the user can mend is one line on stderr and exit status 2."""
    parser = Parser(
        "convattn_jax.report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="FOLDER", help="run folders, or folders that hold some")
    parser.add_argument("--baseline", default="", help="the variant that the others are compared with")
    parser.add_argument("--sentence", default="", help="whose attention maps are drawn")
    parser.add_argument("--out", default="", help="where the two files go")
    try:
        args = parser.parse_args(argv)
        for path in write(args.paths, args.baseline, args.sentence, args.out):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write(paths: Sequence[str], baseline: str = "", sentence: str = "", out: str = "") -> list[pathlib.Path]:
    """Makes both files; returns where they are.

    Raises:
      UserError: a path holds no run, the baseline is none of the variants, or the files cannot be written.
    """
    from convattn_jax.report import markdown, page, pictures, runs, tables
    from convattn_jax.sweep.table import SENTENCE

    c = runs.collect(paths, baseline, sentence)
    first = pathlib.Path(paths[0])
    beside = len(paths) > 1 and runs.is_run(first)  # of several runs
    folder = pathlib.Path(out) if out else first.parent if beside else first
    every = list(c.runs())
    title = f"{_count(len(c.variants), 'variant')}: {first.resolve().name}"
    unfinished = sum(bool(run.missing) for run in every)
    lead = [
        f"{_count(len(every), 'pre-training')} of {_count(len(c.variants), 'variant')}"
        + (f", compared with {c.baseline}." if c.baseline else "; no variant to compare them with was found.")
        + (f" Incomplete: {unfinished} (see below)." if unfinished else ""),
        *tables.notes(c),
    ]
    overview, missing = tables.overview(c), tables.missing(c)
    differences, winners = tables.differences(c), tables.winners(c)
    distances, lengths = tables.distances(c), tables.lengths(c)

    kept: list[tuple[str, list]] = [(overview.title, page.table(overview))]
    if missing.rows:
        kept.append((missing.title, page.table(missing, wrap=True)))
    gallery = pictures.losses(c)
    kept.append((gallery.title, page.gallery(gallery)))
    if differences.rows:
        content = page.gallery(pictures.differences(c)) + page.folded("All of them as a table", page.table(differences))
        kept.append((differences.title, content))
    if winners.rows:
        kept.append((winners.title, page.table(winners)))
    content = page.gallery(pictures.distances(c)) + (page.table(distances) if distances.rows else [])
    kept.append((distances.title, content))
    if lengths.rows:
        kept.append((lengths.title, page.table(lengths)))
    for gallery in (pictures.kernels(c), pictures.attention(c, c.sentence or SENTENCE)):
        kept.append((gallery.title, page.gallery(gallery)))

    texts = {
        "report.html": page.page(title, lead, kept),
        "report.md": markdown.document(title, lead, [overview, missing, differences, winners, distances, lengths]),
    }
    return [_written(folder / name, text) for name, text in texts.items()]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _written(path: pathlib.Path, text: str) -> pathlib.Path:
    from convattn_jax.data import corpus

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        corpus.write_atomically(path, text.encode(errors="replace"))
    except OSError as error:
        raise UserError(
            f"--out={path.parent}: {path.name} cannot be written ({error.strerror}); name another"
        ) from error
    return path


if __name__ == "__main__":
    main()
