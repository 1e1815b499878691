"""Caches in a bucket: prepared by one host, used by all, and never wrong without a word."""

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import tiny
from played_bucket import played  # noqa: F401  the fixture `bucket`

from convattn_jax.config import UserError, from_config
from convattn_jax.data import docstrings, rows, shared
from convattn_jax.data.config import DataConfig, TokenizerConfig

CACHE = "gs://bucket/some/cache"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes this process one on the host of that name, with a disk of its own."""

    def move(name):
        monkeypatch.setenv("HOME", str(tmp_path / name))
        return tmp_path / name / ".cache" / "convattn_jax" / "gs%3A%2F%2Fbucket%2Fsome%2Fcache"

    os.utime(tiny.write_corpus(tmp_path / "text.txt"), (0, 0))  # an old file, whose digest is remembered
    move("first")
    return move


@pytest.fixture
def prepare(tmp_path):
    """Prepares rows and returns them with what was said meanwhile, each phase once."""

    def prepared(cache=CACHE, **changes):
        config, said = tiny.config(tmp_path), {}
        data = dataclasses.replace(from_config(DataConfig, config.data, "data."), cache_dir=cache, **changes)
        tokenizer = from_config(TokenizerConfig, config.tokenizer, "tokenizer.")
        found = rows.prepare(data, tokenizer, 4, lambda what, done, total: said.setdefault(what.split(" gs:")[0], what))
        return found, said

    return prepared


def objects(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(one, other):
    np.testing.assert_array_equal(one.train.tokens, other.train.tokens)
    np.testing.assert_array_equal(one.heldout.tokens, other.heldout.tokens)
    np.testing.assert_array_equal(one.counts, other.counts)
    assert (one.fingerprint, one.tokenizer.digest) == (other.fingerprint, other.tokenizer.digest)


def test_what_one_host_prepared_another_copies(bucket, host, prepare, tmp_path):
    local, _ = prepare(cache=str(tmp_path / "local"))
    first, said = prepare()
    same(first, local)
    assert list(said) == ["reading text", "training the tokenizer", "uploading", "tokenizing"]
    left = objects(bucket / "some" / "cache")
    assert sorted(left) == [
        *(f"rows-{first.fingerprint}/{name}" for name in ("counts.npy", "heldout.bin", "manifest.json", "train.bin")),
        f"rows-{first.fingerprint}/whole.json",
        *(name for name in sorted(left) if name.startswith("tokenizer-")),
    ]
    home = host("second")
    second, said = prepare()
    same(second, first)
    assert list(said) == ["reading text", "copying"]
    assert isinstance(second.train.tokens.base, np.memmap)
    assert home in second.train.tokens.base.filename.parents
    assert objects(bucket / "some" / "cache") == left
    _, said = prepare()
    assert not said


def test_a_run_started_elsewhere_finds_its_rows(bucket, host, prepare, tmp_path):
    first, _ = prepare()
    (tmp_path / "text.txt").unlink()
    host("second")
    same(rows.reopen(CACHE, first.fingerprint, first.tokenizer), first)
    assert rows.reopen(CACHE, "0" * 24, first.tokenizer) is None


def test_the_docstrings_of_one_host_are_those_of_all(bucket, host, prepare, monkeypatch):
    monkeypatch.setattr(docstrings, "collect", lambda files, report: iter([["Returns a sum.", "Reads a file."]]))
    stored = docstrings.stored(CACHE, lambda *_: None).read_bytes()
    host("second")
    monkeypatch.setattr(docstrings, "collect", lambda files, report: iter([["Other packages."]]))
    assert docstrings.stored(CACHE, lambda *_: None).read_bytes() == stored


def flip(folder):
    content = bytearray((folder / "train.bin").read_bytes())
    content[5] ^= 1
    (folder / "train.bin").write_bytes(content)


def vouch(folder, name=None, **files):
    """A voucher that agrees with itself, of other files or another folder."""
    told = json.loads((folder / "whole.json").read_bytes())
    content = {"name": name or told["name"], "files": told["files"] | files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "whole.json").write_text(json.dumps({**content, "digest": digest}))


DAMAGES = {
    "flipped bit": (flip, "train.bin is changed"),
    "shorter": (lambda folder: (folder / "heldout.bin").write_bytes(b""), "heldout.bin is changed"),
    "lost": (lambda folder: (folder / "counts.npy").unlink(), "counts.npy is missing"),
    "cut voucher": (lambda folder: (folder / "whole.json").write_bytes(b'{"files": {'), "whole.json is unreadable"),
    "edited voucher": (
        lambda folder: (folder / "whole.json").write_bytes((folder / "whole.json").read_bytes().replace(b"8", b"9")),
        "whole.json is unreadable",
    ),
    "another folder's": (lambda folder: vouch(folder, name="rows-0"), "whole.json is unreadable"),
    "a way out": (
        lambda folder: vouch(folder, **{"../../out": {"size": 0, "sha256": hashlib.sha256().hexdigest()}}),
        "whole.json is unreadable",
    ),
    "no object": (lambda folder: (folder / "whole.json").write_bytes(b"[]"), "whole.json is unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_told_prepared_again_and_replaced(bucket, host, prepare, damage):
    first, _ = prepare()
    folder = bucket / "some" / "cache" / f"rows-{first.fingerprint}"
    whole = objects(folder)
    break_it, problem = DAMAGES[damage]
    break_it(folder)
    home = host("second")
    second, said = prepare()
    same(second, first)
    assert f"{CACHE}/rows-{first.fingerprint} is damaged ({problem}): it is prepared again" in said.values()
    assert objects(folder) == whole
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == sorted(
        path.name for path in folder.parent.iterdir()
    )


def test_what_was_uploaded_in_part_is_used_by_nobody(bucket, host, prepare, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(name, files):
        if name.startswith("rows-"):
            raise Killed
        return voucher(name, files)

    voucher = shared._voucher
    monkeypatch.setattr(shared, "_voucher", killed)
    with pytest.raises(Killed):
        prepare()
    monkeypatch.undo()
    half = next((bucket / "some" / "cache").glob("rows-*"))
    assert {path.name for path in half.iterdir()} == {"counts.npy", "heldout.bin", "manifest.json", "train.bin"}
    (half / "train.bin").write_bytes(b"half of it")
    host("second")
    second, said = prepare()
    assert "tokenizing" in said
    host("third")
    third, said = prepare()
    assert list(said) == ["reading text", "copying"]
    same(third, second)


def test_two_hosts_that_prepare_at_once_do_no_harm(bucket, host, prepare, monkeypatch):
    """The second prepares and uploads all of it between the first one's look into the bucket and its own upload."""
    found, inner = shared.found, []

    def slow(cache_dir, name, report):
        there = found(cache_dir, name, report)
        if name.startswith("rows-") and not inner:
            inner.append(None)
            host("second")
            inner.append(prepare()[0])
            host("first")
        return there

    monkeypatch.setattr(shared, "found", slow)
    first, _ = prepare()
    same(first, inner[1])
    host("third")
    third, said = prepare()
    assert "copying" in said
    same(third, first)


def test_a_bucket_that_takes_nothing_is_told_and_no_reason_to_stop(bucket, host, prepare, tmp_path):
    prepare()
    host("second")
    (tmp_path / "refused").touch()
    prepared, said = prepare(length=20)
    assert len(prepared.train.tokens) > 0
    assert "no storage.objects.create access" in next(line for line in said.values() if line.startswith("not kept"))


def test_a_cache_in_no_bucket_is_told_before_the_text_is_read(bucket, host, prepare):
    shutil.rmtree(bucket)
    with pytest.raises(UserError, match=r"data\.cache_dir=gs://bucket/some/cache: there is no bucket gs://bucket"):
        prepare(files=("nowhere.txt",))
