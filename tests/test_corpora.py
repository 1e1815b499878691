"""Corpora: which documents come out of files, data sets and docstrings, in which split, and the errors on the way."""

import argparse
import dataclasses
import gzip
import json
import logging
import lzma
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from convattn_jax.config import UserError
from convattn_jax.data import config as data_config
from convattn_jax.data import corpora, corpus, docstrings, prose, textfiles
from convattn_jax.data.corpora import open_corpus


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    return tmp_path / "text"


@pytest.fixture
def config(tmp_path, folder):
    return data_config.DataConfig(
        source="text",
        files=(str(folder / "*"),),
        heldout_files=(),
        heldout_fraction=0.5,
        fraction=1.0,
        tfds_name="tiny_prose",
        tfds_split="train",
        tfds_feature="text",
        tfds_data_dir=str(tmp_path / "tfds"),
        layout="packed",
        length=32,
        cache_dir=str(tmp_path / "cache"),
        workers=1,
    )


def with_files(config, *files, heldout=()):
    return dataclasses.replace(config, files=tuple(map(str, files)), heldout_files=tuple(map(str, heldout)))


def prose_documents(count):
    return [[f"Title {i}", f"Ünïcode sentence {i}."] for i in range(count)]


def as_text(documents):
    return "\n\n".join("\n".join(document) for document in documents) + "\n"


def everything(opened):
    return sorted(list(opened.documents("train")) + list(opened.documents("heldout")))


def zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


def test_the_table_has_the_sources_of_the_configuration():
    assert tuple(corpora.SOURCES) == data_config.SOURCES


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".txt", bytes), (".txt.gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_plain_and_compressed_files_give_the_same_documents(config, folder, suffix, pack):
    (folder / f"a{suffix}").write_bytes(pack(as_text(prose_documents(40)).encode()))
    assert everything(open_corpus(config)) == sorted(prose_documents(40))


def test_archives_of_several_parts_are_read_to_the_end(config, folder):
    halves = [as_text(prose_documents(40)[i : i + 20]).encode() + b"\n" for i in (0, 20)]
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)):
        path = folder / f"a{suffix}"
        path.write_bytes(b"".join(map(pack, halves)))
        assert everything(open_corpus(with_files(config, path))) == sorted(prose_documents(40))


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
def test_each_line_of_jsonl_is_a_document(config, folder, suffix, pack):
    lines = [json.dumps({"id": i, "text": "\n".join(document)}) for i, document in enumerate(prose_documents(40))]
    (folder / f"a{suffix}").write_bytes(pack("\n".join(lines).encode()))
    assert everything(open_corpus(config)) == sorted(prose_documents(40))


def test_blank_lines_and_ends_of_files_end_documents(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf\n one \r\ntwo\n \t \n\n\nthree\n")
    (folder / "b.txt").write_bytes(b"four")
    (folder / "c.txt").write_bytes(b"")
    files = textfiles.find([str(folder / "*.txt")], "data.files")
    assert list(textfiles._documents(files, "data.files")) == [["one", "two"], ["three"], ["four"]]


def test_lines_do_not_depend_on_where_the_file_is_cut_into_chunks():
    content = "eins zwei\n\ndréi\nvier fünf sechs\n\n\nsieben".encode()
    whole = list(enumerate(content.split(b"\n"), 1))
    for size in range(1, len(content) + 2):
        chunks = [content[i : i + size] for i in range(0, len(content), size)]
        assert list(textfiles._lines(iter(chunks), None)) == whole


def test_overlong_documents_and_lines_come_in_parts_that_lose_nothing(monkeypatch):
    monkeypatch.setattr(corpus, "_LONGEST", 10)
    assert list(corpus.to_documents("aaaa\nbbbb\ncccc\n" + "d" * 25)) == [
        ["aaaa", "bbbb"],
        ["cccc"],
        ["d" * 10],
        ["d" * 10],
        ["d" * 5],
    ]
    parts = list(textfiles._lines(iter([b"one two ", b"three fo", b"ur\nfive"]), 6))
    assert parts == [(1, b"one two"), (1, b"three"), (1, b"four"), (2, b"five")]


def test_a_file_without_blank_lines_is_passed_on_piece_by_piece(config, folder, monkeypatch):
    monkeypatch.setattr(textfiles, "_CHUNK", 200)
    lines = [f"sentence number {i}" for i in range(200)]
    (folder / "a.txt").write_text("\n".join(lines))
    opened = open_corpus(config)
    documents = everything(opened)
    assert max(len(document) for document in documents) < 20
    assert sorted(line for document in documents for line in document) == sorted(lines)


def test_the_split_goes_by_document_not_by_place(config, folder):
    documents = prose_documents(2000)
    (folder / "a.txt").write_text(as_text(documents))
    (folder / "b.txt").write_text(as_text(documents[::-1]))
    tenth = dataclasses.replace(config, heldout_fraction=0.1)
    forward = list(open_corpus(with_files(tenth, folder / "a.txt")).documents("heldout"))
    backward = list(open_corpus(with_files(tenth, folder / "b.txt")).documents("heldout"))
    assert 120 < len(forward) < 280
    assert forward == backward[::-1]
    train = list(open_corpus(with_files(tenth, folder / "a.txt")).documents("train"))
    assert sorted(train + forward) == sorted(documents)


def test_held_out_files_are_the_held_out_split(config, folder):
    (folder / "a.txt").write_text("train one\n\ntrain two")
    (folder / "b.txt").write_text("held out")
    opened = open_corpus(with_files(config, folder / "a.txt", heldout=[folder / "b.txt"]))
    assert list(opened.documents("train")) == [["train one"], ["train two"]]
    assert list(opened.documents("heldout")) == [["held out"]]
    assert opened.size == (folder / "a.txt").stat().st_size + (folder / "b.txt").stat().st_size


def test_patterns_overlap_without_reading_a_file_twice(folder):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (folder / name).write_text("x")
    found = textfiles.find([str(folder / "*"), str(folder / "b.txt"), f"{folder}/../text/a.txt"], "data.files")
    assert [path.name for path in found] == ["a.txt", "b.txt", "c.jsonl"]


def test_equal_text_and_settings_mean_an_equal_fingerprint(config, folder):
    (folder / "a.txt").write_text(as_text(prose_documents(20)))
    (folder / "b.txt").write_text(as_text(prose_documents(21)))
    (folder / "copy.txt").write_bytes((folder / "a.txt").read_bytes())

    def fingerprint(*files, **changes):
        return open_corpus(dataclasses.replace(with_files(config, *files), **changes)).fingerprint

    a = fingerprint(folder / "a.txt")
    assert a == fingerprint(folder / "copy.txt") == fingerprint(folder / "a.txt", length=64, tfds_name="other")
    different = {
        a,
        fingerprint(folder / "b.txt"),
        fingerprint(folder / "a.txt", folder / "b.txt"),
        fingerprint(folder / "b.txt", folder / "copy.txt"),
        fingerprint(folder / "a.txt", heldout_fraction=0.25),
        fingerprint(folder / "a.txt", heldout_files=(str(folder / "b.txt"),)),
    }
    assert len(different) == 6


def test_unchanged_files_are_not_read_again_and_changed_ones_are(config, folder, monkeypatch):
    path = folder / "a.txt"
    path.write_text(as_text(prose_documents(20)))
    os.utime(path, ns=(10**18, 10**18))
    first = open_corpus(config).fingerprint
    read = []
    real = textfiles._digest
    monkeypatch.setattr(textfiles, "_digest", lambda name, *rest: read.append(name) or real(name, *rest))
    assert open_corpus(config).fingerprint == first
    assert read == []
    path.write_text(as_text(prose_documents(20)).replace("Title 7", "Title X"))
    assert open_corpus(config).fingerprint != first
    assert read == [str(path)]
    (folder.parent / "cache" / "digests.json").write_text("{broken")
    open_corpus(config)
    assert len(read) == 2


def test_progress_is_reported_in_bytes(config, folder):
    (folder / "a.txt").write_text(as_text(prose_documents(20)))
    seen = []
    size = open_corpus(config, lambda *report: seen.append(report)).size
    assert seen[-1] == ("reading text", size, size)


# --- what a user can get wrong -------------------------------------------------------------------------------------


def fails(config, *parts):
    """The one line of the error that opening and reading the corpus ends in."""
    with pytest.raises(UserError) as caught:
        everything(open_corpus(config))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_a_missing_file_an_empty_pattern_and_a_folder_are_named(config, folder):
    fails(with_files(config, folder / "no.txt"), "data.files: ", "no.txt is not there")
    fails(with_files(config, folder / "*.txt"), "data.files: no file matches", "*.txt")
    fails(with_files(config, folder), "data.files: ", "is a folder", "/*.txt")
    (folder / "a.txt").write_text("x")
    fails(with_files(config, folder / "a.txt", heldout=[folder / "no"]), "data.heldout_files: ", "is not there")


def test_a_file_in_both_splits_is_refused(config, folder):
    (folder / "a.txt").write_text("x")
    fails(with_files(config, folder / "*", heldout=[folder / "a.txt"]), "data.heldout_files: ", "also in data.files")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.tar.gz", "a.json.xz", "a.zip"])
def test_an_unknown_suffix_lists_the_known_ones(config, folder, name):
    (folder / name).write_text("x")
    fails(config, "data.files: ", name, ".txt and .jsonl", ".zst")


@pytest.mark.parametrize(("before", "line"), [(b"", 1), (b"fine\n\n\nalso fine\nand ", 5)])
def test_invalid_utf8_is_found_with_its_line(config, folder, before, line):
    (folder / "a.txt").write_bytes(before + b"caf\xe9\nmore\n")
    fails(config, "data.files: ", "a.txt is not UTF-8", f"line {line} ")


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)], ids=["gz", "xz", "zst"]
)
def test_a_broken_archive_is_an_error_not_a_short_corpus(config, folder, suffix, pack):
    packed = pack(np.random.default_rng(0).integers(97, 123, 50_000, np.uint8).tobytes().replace(b"q", b"\n\n"))
    for content in (packed[:-200], b"not an archive at all, just text"):
        (folder / f"a.txt{suffix}").write_bytes(content)
        fails(config, "data.files: ", f"a.txt{suffix} is broken or cut short")


@pytest.mark.parametrize("line", ["not json", "[1]", '"text"', '{"body": "x"}', '{"text": 3}'])
def test_a_jsonl_line_without_text_is_named(config, folder, line):
    (folder / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    fails(config, "data.files: ", "a.jsonl, line 3,")


def test_zst_without_zstandard_names_the_extra(config, folder, monkeypatch):
    (folder / "a.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    fails(config, "data.files: ", "pip install 'convattn_jax[zstd]'")


def test_a_corpus_without_text_or_with_an_empty_split_is_an_error(config, folder):
    (folder / "a.txt").write_text(" \n\n \n")
    fails(config, f"data.files: there is no text in {folder}/*")
    (folder / "a.txt").write_text("a single document")
    fails(config, "data.heldout_fraction=0.5 leaves no ", "document")
    (folder / "b.txt").write_text("\n")
    fails(
        with_files(config, folder / "a.txt", heldout=[folder / "b.txt"]),
        f"data.heldout_files: there is no text in {folder}/b.txt",
    )
    fails(
        with_files(config, folder / "b.txt", heldout=[folder / "a.txt"]),
        f"data.files: there is no text in {folder}/b.txt",
    )


def test_an_unwritable_cache_folder_is_named(config, folder):
    (folder / "a.txt").write_text(as_text(prose_documents(20)))
    fails(dataclasses.replace(config, cache_dir=str(folder / "a.txt" / "cache")), "data.cache_dir=", "another folder")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("disk full")

    path = tmp_path / "file"
    corpus.write_atomically(path, b"first")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        corpus.write_atomically(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


# --- docstrings ----------------------------------------------------------------------------------------------------

DOCSTRING = """Return the weighted mean of the values in a list.

    The weights are taken from :class:`~stats.Weights` objects and **must** not all
    be zero; see `the manual <https://example.org>`_ for what happens if they are.

    For example::

        mean = weighted(values, weights)

        This stands in a literal block and is not to be read.

    Parameters
    ----------
    values : array_like
        The numbers that the mean is taken of. These may be given
        in any order.
    weights : array_like, optional
        shape

    Notes
    -----
    - The first item of this list is a sentence.
    - The second one is a sentence as well, over
      two lines.

    Here the mean is taken of two numbers.
    >>> weighted([1, 2], [1, 1])
    This line is a part of what the doctest prints.

    ```
    This is what stands in a fence, and it is code.

    This is in the fence as well, and is not to be read.

    ```

    ======= =========================================
    Name    Use
    ======= =========================================
    This    It is used for this in most of the cases.
    ======= =========================================

    .. math:: x = y

        This belongs to the formula and is not to be read.

    The last paragraph is read as well. For instance:

    This Is a Heading With Many Words in it.
    ----------------------------------------

    References
    ----------
    The book of all the means that there are in the world.
"""


def test_prose_of_a_docstring_is_its_sentences_without_code_tables_and_markup():
    assert prose.paragraphs(DOCSTRING) == [
        "Return the weighted mean of the values in a list.",
        "The weights are taken from stats.Weights objects and must not all be zero; see the manual for what happens "
        "if they are.",
        "The numbers that the mean is taken of. These may be given in any order.",
        "The first item of this list is a sentence.",
        "The second one is a sentence as well, over two lines.",
        "Here the mean is taken of two numbers.",
        "The last paragraph is read as well.",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The name of the file to be read.", True),
        ("the name of the file to be read.", False),
        ("The name of the file to be read", False),
        ("Too short.", False),
        ("F(x) = {a: b} | [c] <d> is the sum of the parts.", False),
        ("Alpha beta gamma delta epsilon zeta.", False),
        ("XXX This should be done by the caller.", False),
    ],
)
def test_what_counts_as_prose(text, expected):
    assert prose.is_prose(text) is expected


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "package"
    (root / "tests").mkdir(parents=True)
    first = '"""This is the first line of a module."""\nraise SystemExit("imported")\n'
    first += 'class A:\n  "\\d is an escape that does not exist in the language."\n'
    (root / "a.py").write_text(first + '  def f():\n    """This is the help of a method here."""\n')
    (root / "b.py").write_text('"""This is the first line of a module."""\nf = 1\n')
    (root / "broken.py").write_text("def f(:\n")
    (root / "tests" / "c.py").write_text('"""This is in a folder of tests only."""\n')
    (root / "test_d.py").write_text('"""This is in a file of tests only."""\n')
    return root


def test_modules_are_parsed_not_imported_and_those_that_do_not_parse_skipped(package):
    files = list(docstrings._python_files(str(package)))
    assert [os.path.relpath(path, package) for path in files] == ["a.py", "b.py", "broken.py"]
    assert [docstrings.read_module(path) for path in files] == [
        ["This is the first line of a module.", "This is the help of a method here."],
        ["This is the first line of a module."],
        [],
    ]


def test_paragraphs_come_once_and_modules_with_a_single_one_not_at_all(package, tmp_path):
    (package / "e.py").write_text(
        '"""This is the first line of a module.\n\nThis one is of the module alone."""\n'
        'def f():\n  """This is the help of a function here."""\n'
    )
    (package / "g.py").write_text('"""This is all that there is to say about it."""\n')
    files = list(docstrings._python_files(str(package)))
    assert list(docstrings.collect(files, corpora.silent)) == [
        ["This is the first line of a module.", "This is the help of a method here."],
        ["This one is of the module alone.", "This is the help of a function here."],
    ]


def test_the_corpus_is_stored_on_first_use_and_stays(config, package, monkeypatch):
    for i in range(20):
        words = "".join(f'def f{j}():\n  "This is help number {i} of the function {j}."\n' for j in "abc")
        (package / f"m{i}.py").write_text(words)
    monkeypatch.setattr(docstrings, "module_files", lambda: list(docstrings._python_files(str(package))))
    config = dataclasses.replace(config, source="docstrings", files=())
    first = open_corpus(config)
    assert len(everything(first)) == 21
    stored = (package.parent / "cache" / "docstrings-v1" / "docstrings.txt.gz").read_bytes()
    (package / "m0.py").write_text("")
    assert open_corpus(config).fingerprint == first.fingerprint
    shutil.rmtree(package.parent / "cache" / "docstrings-v1")
    assert open_corpus(config).fingerprint != first.fingerprint
    assert stored[4:8] == bytes(4)  # no time stamp in the archive: equal text, equal bytes


def test_the_installed_packages_are_found_without_importing_them():
    files = docstrings.module_files()
    assert len(files) == len(set(files)) > 1000
    assert files == docstrings.module_files()
    assert any(path.endswith(os.path.join("optax", "_src", "base.py")) for path in files)
    assert not any(f"{os.sep}tests{os.sep}" in path for path in files)
    missing = [name for name in docstrings.PACKAGES if not docstrings._folders(name)]
    assert missing == []


def test_reading_docstrings_imports_no_jax():
    code = "import sys, convattn_jax.data.corpora; print({'jax', 'tensorflow_datasets'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_docstrings_of_a_module_of_the_standard_library_are_read():
    found = docstrings.read_module(argparse.__file__)
    assert len(found) > 5
    assert any("command-line" in text for text in found)


# --- TFDS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    pytest.importorskip("array_record")
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()

    class TinyProse(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "id": tfds.features.Scalar(np.int32), "by": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(700), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i, document in enumerate(prose_documents(count)):
                yield i, {"text": "\n\n".join(document) + "\n", "id": i, "by": f"author {i}"}

    root = tmp_path_factory.mktemp("tfds")
    TinyProse(data_dir=root / "good", file_format="array_record").download_and_prepare()
    TinyProse(data_dir=root / "parquet", file_format="parquet").download_and_prepare()
    yield root
    logging.getLogger("absl").handlers.clear()


@pytest.fixture
def tfds_config(config, data_sets):
    return dataclasses.replace(config, source="tfds", files=(), tfds_data_dir=str(data_sets / "good"))


def test_each_example_of_a_data_set_is_a_document(tfds_config):
    opened = open_corpus(tfds_config)
    assert everything(opened) == sorted(prose_documents(700))
    assert list(opened.documents("train")) == list(opened.documents("train"))
    assert opened.size > 700 * 20
    assert "tensorflow" not in sys.modules


def test_the_fingerprint_of_a_data_set_knows_split_and_feature(tfds_config):
    fingerprints = [
        open_corpus(dataclasses.replace(tfds_config, **changes)).fingerprint
        for changes in ({}, {}, {"tfds_split": "train[:50%]"}, {"tfds_feature": "by"}, {"heldout_fraction": 0.25})
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 4


def test_what_is_wrong_with_a_data_set_is_named(tfds_config, data_sets):
    def changed(**changes):
        return dataclasses.replace(tfds_config, **changes)

    fails(changed(tfds_name="lm1bb"), "data.tfds_name=lm1bb: no such data set", "did you mean lm1b?")
    fails(changed(tfds_split="valid"), "data.tfds_split=valid: ", "train")
    fails(changed(tfds_feature="body"), "data.tfds_feature=body: ", "text, by")
    fails(changed(tfds_feature="id"), "data.tfds_feature=id: ")
    fails(changed(tfds_data_dir=str(data_sets / "parquet")), "data.tfds_name=tiny_prose: ", "array_record")
