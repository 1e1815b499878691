"""Prepared rows: what they hold, that they are reused, and that no interruption leaves half a cache."""

import dataclasses
import io
import multiprocessing
import os
import signal

import numpy as np
import pytest

from convattn_jax.config import UserError
from convattn_jax.data import cache, parallel, rows
from convattn_jax.data.config import DataConfig, TokenizerConfig
from convattn_jax.data.corpora import Corpus
from convattn_jax.data.corpus import reduced
from convattn_jax.data.examples import LAYOUTS, Documents, RowFormat
from convattn_jax.data.tokenizer import Tokenizer

TRAIN = [
    document
    for i in range(12)
    for document in ([f"the first line of part {i}", "and a second one"], ["x"], [f"another document {i} " * 7])
]
HELDOUT = [["held out text", "of two lines"], ["more of it"]]


class Letters(Tokenizer):
    """A tokenizer whose tokens are characters."""

    def __init__(self, digest="letters", size=256):
        self.pad, self.unk, self.cls, self.sep, self.mask = range(5)
        self.size, self.digest = size, digest

    def __reduce__(self):
        return type(self), (self.digest, self.size)

    def encode(self, texts):
        return [np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32) for text in texts]


class Dying(Letters):
    """A tokenizer that ends its process."""

    def encode(self, texts):
        os._exit(1)


def corpus(train=TRAIN, heldout=HELDOUT, name="text"):
    """A corpus in memory."""
    size = sum(len(line) + 1 for document in train + heldout for line in document)
    return Corpus(name, size, lambda split: iter({"train": train, "heldout": heldout}[split]))


def unreadable(*args):
    raise AssertionError("the text was read")


def interrupted(split):
    yield TRAIN[0]
    raise KeyboardInterrupt


@pytest.fixture
def config(tmp_path):
    return DataConfig("text", ("a.txt",), (), 0.1, 1.0, "", "", "", "", "packed", 16, str(tmp_path / "cache"), 1)


@pytest.fixture
def prepare(monkeypatch):
    """`rows.prepare` of a corpus in memory with a tokenizer of characters."""

    def run(config, text=None, tokenizer=None, batch_size=2, report=rows.silent):
        monkeypatch.setattr(rows, "open_corpus", lambda config, report: text or corpus())
        monkeypatch.setattr(Tokenizer, "from_file", lambda path, normalization: tokenizer or Letters())
        return rows.prepare(config, TokenizerConfig("letters.model", 256, "none"), batch_size, report)

    return run


def folders(config):
    return sorted(os.listdir(config.cache_dir))


def folder_of(config, prepared):
    return os.path.join(config.cache_dir, f"rows-{prepared.fingerprint}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_the_layout_of_the_text(config, prepare, layout):
    prepared = prepare(dataclasses.replace(config, layout=layout))
    for split, text in (("train", TRAIN), ("heldout", HELDOUT)):
        documents = Documents.of([Letters().encode(lines) for lines in text])
        form = RowFormat(16, 0, 2, 3, np.dtype(np.uint16))
        found = getattr(prepared, split).tokens
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, np.concatenate(list(LAYOUTS[layout]([documents], form))))


def test_counts_are_those_of_the_train_text(config, prepare):
    characters = "".join(line for document in TRAIN for line in document)
    assert prepare(config).counts.tolist() == [characters.count(chr(i)) for i in range(256)]


def test_less_data_is_a_share_of_the_training_documents_alone(config, prepare):
    whole, half, tenth = (prepare(dataclasses.replace(config, fraction=share)) for share in (1.0, 0.5, 0.25))
    assert whole.counts.sum() > half.counts.sum() > tenth.counts.sum() > 0
    assert len({whole.fingerprint, half.fingerprint, tenth.fingerprint}) == 3
    np.testing.assert_array_equal(half.heldout.tokens, whole.heldout.tokens)
    assert half.tokenizer.digest == whole.tokenizer.digest


def test_a_smaller_share_lies_within_a_larger_one():
    documents = [[f"document {i}", "of two lines"] for i in range(400)]
    text = corpus(documents, heldout=documents)
    kept = {share: list(reduced(text, share).documents("train")) for share in (1.0, 0.5, 0.25)}
    assert list(reduced(text, 0.25).documents("heldout")) == documents
    assert kept[1.0] == documents
    assert [document for document in kept[0.5] if document in kept[0.25]] == kept[0.25]
    assert len(kept[0.5]) == pytest.approx(200, abs=40)
    assert len(kept[0.25]) == pytest.approx(100, abs=35)


def test_a_large_vocabulary_takes_four_bytes(config, prepare):
    assert prepare(config, tokenizer=Letters(size=70_000)).train.tokens.dtype == np.uint32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_do_not_depend_on_the_number_of_processes_or_the_size_of_tasks(config, prepare, monkeypatch, layout):
    config = dataclasses.replace(config, layout=layout)
    whole = prepare(config)
    monkeypatch.setattr(parallel, "TASK", 100)
    monkeypatch.setattr(parallel, "SERIAL", 0)
    for workers in (1, 2):
        found = prepare(dataclasses.replace(config, workers=workers, cache_dir=f"{config.cache_dir}{workers}"))
        assert found.fingerprint == whole.fingerprint
        np.testing.assert_array_equal(found.train.tokens, whole.train.tokens)
        np.testing.assert_array_equal(found.heldout.tokens, whole.heldout.tokens)
        np.testing.assert_array_equal(found.counts, whole.counts)


def test_progress_rises_to_its_total(config, prepare, monkeypatch):
    monkeypatch.setattr(parallel, "TASK", 100)
    seen = []
    prepare(config, report=lambda what, done, total: seen.append((done, total)))
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert len(set(done)) > 5
    assert seen[-1] == (corpus().size, corpus().size)
    assert all(total in (0, corpus().size) for _, total in seen)


def test_a_tokenizer_trained_on_text_files_is_shared_by_layouts_and_lengths(config, monkeypatch, tmp_path):
    lines = ["the quick brown fox", "jumps over the lazy dog", "and " * 20 + "so on"]
    (tmp_path / "train.txt").write_text("\n\n".join(["\n".join(lines)] * 9))
    (tmp_path / "heldout.txt").write_text("the lazy fox\nso on")
    files = {name: (str(tmp_path / f"{name}.txt"),) for name in ("train", "heldout")}
    config = dataclasses.replace(config, files=files["train"], heldout_files=files["heldout"])
    first = rows.prepare(config, TokenizerConfig("", 32, "none"), 2)
    assert first.tokenizer.decode(first.heldout.tokens[0]).startswith("the lazy fox")
    monkeypatch.setattr(rows.tokenizers, "train", unreadable)
    second = rows.prepare(dataclasses.replace(config, length=20), TokenizerConfig("", 32, "none"), 2)
    assert first.tokenizer.digest == second.tokenizer.digest
    assert sum(name.startswith("tokenizer-") for name in folders(config)) == 1


# --- the cache -----------------------------------------------------------------------------------------------------


def test_a_second_run_reuses_the_rows_without_reading_the_text(config, prepare):
    first = prepare(config)
    second = prepare(config, text=dataclasses.replace(corpus(), read=unreadable))
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    np.testing.assert_array_equal(first.counts, second.counts)
    assert folders(config) == [f"rows-{first.fingerprint}"]


def test_whatever_changes_the_rows_changes_their_fingerprint(config, prepare):
    prints = [
        prepare(config),
        prepare(dataclasses.replace(config, layout="pairs")),
        prepare(dataclasses.replace(config, length=17)),
        prepare(config, text=corpus(name="other text")),
        prepare(config, tokenizer=Letters("other tokenizer")),
    ]
    assert len({prepared.fingerprint for prepared in prints}) == len(prints)


def test_a_resumed_run_finds_its_rows_without_the_text(config, prepare):
    prepared = prepare(config)
    again = rows.reopen(config.cache_dir, prepared.fingerprint, Letters())
    assert again is not None
    np.testing.assert_array_equal(again.train.tokens, prepared.train.tokens)
    assert rows.reopen(config.cache_dir, "0" * 24, Letters()) is None


def test_rows_of_another_tokenizer_are_refused(config, prepare):
    prepared = prepare(config)
    with pytest.raises(UserError, match=f"tokenizer and cache don't match.*{prepared.fingerprint}.*delete"):
        rows.reopen(config.cache_dir, prepared.fingerprint, Letters("other tokenizer"))


def truncate(folder):
    os.truncate(os.path.join(folder, "train.bin"), 50)


def lose_the_manifest(folder):
    os.remove(os.path.join(folder, "manifest.json"))


def garble_the_manifest(folder):
    with open(os.path.join(folder, "manifest.json"), "w") as file:
        file.write("[1, 2]")


def lose_the_counts(folder):
    os.truncate(os.path.join(folder, "counts.npy"), 0)


def rename(folder):
    os.rename(folder, f"{folder}.0")
    os.mkdir(folder)
    for name in os.listdir(f"{folder}.0"):
        os.rename(f"{folder}.0/{name}", f"{folder}/{name}")
    manifest = os.path.join(folder, "manifest.json")
    with open(manifest) as file:
        text = file.read().replace('"fingerprint": "', '"fingerprint": "0')
    with open(manifest, "w") as file:
        file.write(text)


@pytest.mark.parametrize("damage", [truncate, lose_the_manifest, garble_the_manifest, lose_the_counts, rename])
def test_a_damaged_cache_is_refused_by_name(config, prepare, damage):
    prepared = prepare(config)
    damage(folder_of(config, prepared))
    with pytest.raises(UserError, match=f"data.cache_dir: .*rows-{prepared.fingerprint} is damaged.*delete"):
        prepare(config)


def test_an_interrupted_preparation_leaves_nothing(config, prepare):
    with pytest.raises(KeyboardInterrupt):
        prepare(config, text=dataclasses.replace(corpus(), read=interrupted))
    assert folders(config) == []


def begin_and_be_killed(folder):
    with cache.new_folder(folder) as partial:
        (partial / "train.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(config, prepare, tmp_path):
    killed = multiprocessing.get_context("spawn").Process(
        target=begin_and_be_killed, args=(tmp_path / "cache" / "rows-1",)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(folders(config)) == 1
    with cache.new_folder(tmp_path / "cache" / "rows-2") as living:
        prepared = prepare(config)
        assert folders(config) == sorted([f"rows-{prepared.fingerprint}", living.name])


def test_two_preparations_of_the_same_rows_at_once_both_end_well(config, prepare):
    inner = []

    def read(split):
        if not inner:
            inner.append(prepare(config))
        return corpus().read(split)

    outer = prepare(config, text=dataclasses.replace(corpus(), read=read))
    np.testing.assert_array_equal(outer.train.tokens, inner[0].train.tokens)
    assert folders(config) == [f"rows-{outer.fingerprint}"]


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_text_of_less_than_one_batch_is_refused(config, prepare):
    rows_there_are = len(prepare(config).train.tokens)
    prepare(config, batch_size=rows_there_are)
    with pytest.raises(UserError, match=f"train.batch_size={rows_there_are + 1}: .*only {rows_there_are} rows.*data"):
        prepare(config, batch_size=rows_there_are + 1)


def test_a_text_of_which_nothing_is_held_out_is_refused(config, prepare):
    with pytest.raises(UserError, match=r"data\.heldout_fraction=0\.1"):
        prepare(config, text=corpus(heldout=[]))


def test_a_cache_that_cannot_be_written_is_refused_before_the_text_is_read(config, prepare, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=r"data\.cache_dir=.*file"):
            prepare(
                dataclasses.replace(config, cache_dir=str(tmp_path / name)),
                text=dataclasses.replace(corpus(), read=unreadable),
            )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_one_line_and_leaves_nothing(config, prepare, monkeypatch):
    monkeypatch.setattr(rows, "_file", lambda path: io.FileIO("/dev/full", "w"))
    with pytest.raises(UserError, match=r"data\.cache_dir=.*No space left") as error:
        prepare(config)
    assert "\n" not in str(error.value)
    assert folders(config) == []


def test_a_worker_that_runs_the_script_again_ends_at_once(config, prepare, monkeypatch):
    """As long as it imports the script it was started from; it would wait for a lock that its parent holds."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match="begin the script with `if __name__ == '__main__':`"):
        prepare(config)
    assert not os.path.exists(config.cache_dir)


def test_a_process_that_dies_is_named(config, prepare, monkeypatch):
    monkeypatch.setattr(parallel, "SERIAL", 0)
    with pytest.raises(UserError, match=r"data\.workers=2: a tokenizing process died"):
        prepare(dataclasses.replace(config, workers=2), tokenizer=Dying())
    assert folders(config) == []
