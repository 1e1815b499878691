"""A corpus that every installation has: the English prose in the docstrings of installed Python packages.

Sources are parsed with `ast` and never imported. What stays of a docstring is decided in `prose`.
"""

import ast
import concurrent.futures
import gc
import gzip
import importlib.util
import multiprocessing
import os
import pathlib
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence

from convattn_jax.data import cache, shared
from convattn_jax.data.corpus import Document, Report
from convattn_jax.data.prose import paragraphs

FOLDER, FILE_NAME = "docstrings-v1", "docstrings.txt.gz"
# The standard library and what installing this project brings along; the order is the order of the documents.
PACKAGES = (
    "absl", "attr", "contourpy", "dateutil", "docstring_parser", "einops", "etils", "flax", "fsspec", "google.protobuf",
    "humanize", "jax", "jaxtyping", "markdown_it", "matplotlib", "ml_collections", "numpy", "opt_einsum", "optax",
    "orbax", "packaging", "PIL", "prometheus_client", "psutil", "pyarrow", "pyparsing", "requests", "rich", "scipy",
    "simple_parsing", "simplejson", "tqdm", "treescope", "urllib3", "wrapt",
)  # fmt: skip
_SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"}
_MODULE = re.compile(r"(?!test_|conftest)\w+(?<!_test)\.py")
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def module_files() -> list[str]:
    """The paths of all modules, the standard library first, then `PACKAGES`, each in sorted order."""
    roots = [sysconfig.get_paths()["stdlib"]]
    for package in PACKAGES:
        roots += _folders(package)
    return [path for root in roots for path in _python_files(root)]


def read_module(path: str) -> list[str]:
    """The prose of one module's docstrings, in the order of the source; nothing for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(pathlib.Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return [text for docstring in _docstrings(tree) for text in paragraphs(docstring)]


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a module and of its classes and functions, and those handed to NumPy's `add_newdoc`."""
    docstring = ast.get_docstring(node, clean=False)  # pyright: ignore[reportArgumentType]
    if docstring:
        yield docstring
    for child in node.body:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(child, _DEFINITIONS):
            yield from _docstrings(child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            name = getattr(child.value.func, "id", getattr(child.value.func, "attr", ""))
            if name in ("add_newdoc", "add_docstring"):
                for part in ast.walk(child.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value:
                        yield part.value


def _python_files(root: str) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        yield from (os.path.join(folder, name) for name in sorted(files) if _MODULE.fullmatch(name))


def _folders(package: str) -> list[str]:
    """Where a package lies, found without importing it; a dotted name's parent is only looked into."""
    top, *rest = package.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    locations = (spec.submodule_search_locations if spec else None) or []
    return sorted({os.path.join(location, *rest) for location in locations})


def stored(cache_dir: str, report: Report) -> pathlib.Path:
    """The corpus as a text file in the cache folder, collected there on first use.

    Upgrading a package afterwards leaves the text of a run as it was.
    """

    def make(folder: pathlib.Path) -> None:
        text = "\n\n".join("\n".join(document) for document in collect(module_files(), report)) + "\n"
        with cache.errors(folder.parent):
            (folder / FILE_NAME).write_bytes(gzip.compress(text.encode(), mtime=0))

    return shared.obtain(cache_dir, FOLDER, make, report) / FILE_NAME


def collect(files: Sequence[str], report: Report, processes: int = 2) -> Iterator[Document]:
    """The prose of each module as a document, every paragraph at its first occurrence only, two of them at least."""
    context = multiprocessing.get_context("spawn")
    seen: set[str] = set()
    # Syntax trees have no cycles, and looking for some takes a sixth of the time.
    with concurrent.futures.ProcessPoolExecutor(processes, context, initializer=gc.disable) as pool:
        for done, found in enumerate(pool.map(read_module, files, chunksize=32), 1):
            new = [text for text in dict.fromkeys(found) if text.lower() not in seen]
            seen.update(text.lower() for text in new)
            if len(new) > 1:
                yield new
            report("collecting docstrings", done, len(files))
