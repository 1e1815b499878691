"""Text to tokens in several processes: in order, with a bounded amount of text in flight."""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from convattn_jax.config import UserError, check
from convattn_jax.data.corpus import Document, Split
from convattn_jax.data.examples import Documents, token_dtype
from convattn_jax.data.tokenizer import Tokenizer

TASK = 1 << 20  # characters tokenised at a time
SERIAL = 16  # so many tasks are done here: it takes as long to start processes


@dataclasses.dataclass(frozen=True)
class Task:
    """Some text of one split."""

    split: Split
    documents: list[Document]


@dataclasses.dataclass(frozen=True)
class Result:
    """The tokens of a task, and how many characters (ends of line included) they stand for."""

    split: Split
    documents: Documents
    characters: int


def check_guarded() -> None:
    """Ends a worker in which an unguarded script runs once more: it would wait for the cache that its parent makes.

    Raises:
      UserError: the process is one that `multiprocessing` has just spawned, still importing the script.
    """
    importing = getattr(multiprocessing.current_process(), "_inheriting", False)  # what the library asks itself, too
    check(not importing, "data.workers: begin the script with `if __name__ == '__main__':`, or set data.workers=1")


def tasks(split: Split, documents: Iterable[Document]) -> Iterator[Task]:
    """Groups documents by about `TASK` characters."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += _characters(document)
        if size >= TASK:
            yield Task(split, group)
            group, size = [], 0
    if group:
        yield Task(split, group)


def tokenize(work: Iterable[Task], tokenizer: Tokenizer, workers: int) -> Generator[Result, None, None]:
    """The result of each task, in order, from `workers` processes (0: one per core); little text needs none.

    Raises:
      UserError: a process died.
    """
    work = iter(work)
    head = list(itertools.islice(work, SERIAL + 1))
    workers = workers or os.cpu_count() or 1
    if len(head) <= SERIAL or workers == 1:
        yield from (_tokenize(tokenizer, task) for task in itertools.chain(head, work))
        return
    context = multiprocessing.get_context("spawn")
    # not as an argument: a process that ends at its start, before it has read all of those, leaves its parent writing
    tokenizers = context.Queue()
    for _ in range(workers):
        tokenizers.put(tokenizer)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizers,))
    try:
        yield from _in_order(pool, itertools.chain(head, work), ahead=2 * workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"data.workers={workers}: a tokenizing process died (out of memory, or a script whose start is not guarded "
            "by `if __name__ == '__main__'`); use fewer, or 1 for none"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        tokenizers.cancel_join_thread()
        tokenizers.close()


def _in_order(pool: ProcessPoolExecutor, work: Iterable[Task], ahead: int) -> Iterator[Result]:
    waiting: collections.deque[Future[Result]] = collections.deque()
    for task in work:
        waiting.append(pool.submit(_work, task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _characters(document: Document) -> int:
    return sum(map(len, document)) + len(document)


def _tokenize(tokenizer: Tokenizer, task: Task) -> Result:
    encoded = iter(tokenizer.encode([line for document in task.documents for line in document]))
    joined = Documents.of([next(encoded) for _ in document] for document in task.documents)
    narrow = dataclasses.replace(joined, tokens=joined.tokens.astype(token_dtype(tokenizer.size)))
    return Result(task.split, narrow, sum(map(_characters, task.documents)))


# --- in a worker process -------------------------------------------------------------------------------------------

_tokenizer: Tokenizer


def _start_worker(tokenizers: "multiprocessing.Queue[Tokenizer]") -> None:
    global _tokenizer
    _tokenizer = tokenizers.get()
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all processes; the parent ends these
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task) -> Result:
    return _tokenize(_tokenizer, task)
