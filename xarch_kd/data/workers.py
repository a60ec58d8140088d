"""Tokenization of batches in worker processes, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Final

from xarch_kd.data.long_text import LongText
from xarch_kd.data.tokenization import DocumentTokenizer, RawBatch, TokenizedPart
from xarch_kd.errors import DataError

# Batches, each of a mebibyte of characters, that are tokenized before processes are started: a second of work.
FIRST_BATCHES: Final = 4
# In one process, the tokenizer has threads of its own; a second thread makes arrays of the ids of a batch meanwhile.
THREADS: Final = 2
# Batches per process that are tokenized, or wait for it, while the next is read.
AHEAD: Final = 2
# Variable by which the threads of a fast tokenizer are switched off.
PARALLELISM: Final = "TOKENIZERS_PARALLELISM"


def available_processors() -> int:
    """Return the number of processors that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_processes() -> int:
    """Return the processes that tokenize a large text: one per processor, 1 where processes cannot be forked safely."""
    return available_processors() if sys.platform == "linux" else 1


def tokenized(
    documents: DocumentTokenizer, batches: Iterable[RawBatch | LongText], processes: int
) -> Iterator[TokenizedPart]:
    """Yield the parts of all documents in order; from the fifth batch on, `processes` processes tokenize.

    The parts do not depend on the number of processes. Long texts are tokenized in this process, as their pieces are
    still to be read. Raises DataError as `documents` does, and if a process ends before its batch is done.
    """
    batches = iter(batches)
    # A daemon may have no processes of its own.
    if multiprocessing.current_process().daemon:
        processes = 1
    first = batches if processes == 1 else itertools.islice(batches, FIRST_BATCHES)
    with ThreadPoolExecutor(THREADS) as threads:

        def submit(batch: RawBatch) -> Future[list[TokenizedPart]]:
            # A template has state while it renders, so one thread prepares all documents.
            ready = documents.prepare(batch)
            return threads.submit(lambda: list(documents.encode(ready)))

        yield from _in_order(documents, first, submit, ahead=THREADS + 1)
    following = next(batches, None)
    if following is None:
        return
    with _workers(documents, processes) as pool:
        rest = itertools.chain((following,), batches)
        try:
            yield from _in_order(documents, rest, lambda batch: pool.submit(_tokenize, batch), ahead=AHEAD * processes)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenizes text ended before its batch was done",
                found="it was killed, as the system does where memory is short",
                fix="data: {processes: 1}, or another number that fits into memory",
            ) from error


def _in_order(
    documents: DocumentTokenizer,
    batches: Iterable[RawBatch | LongText],
    submit: Callable[[RawBatch], Future[list[TokenizedPart]]],
    *,
    ahead: int,
) -> Iterator[TokenizedPart]:
    """Yield the parts of batches in order; up to `ahead` of them are tokenized while the next is read."""
    pending: deque[Future[list[TokenizedPart]]] = deque()
    for batch in batches:
        is_long = isinstance(batch, LongText)
        while len(pending) >= (1 if is_long else ahead):
            yield from pending.popleft().result()
        if isinstance(batch, LongText):
            # Its pieces are still to be read, before anything that follows.
            yield from documents.tokenize(batch)
        else:
            pending.append(submit(batch))
    while pending:
        yield from pending.popleft().result()


@contextmanager
def _workers(documents: DocumentTokenizer, processes: int) -> Iterator[ProcessPoolExecutor]:
    """Start processes that have `documents` already; on Linux as forks, which import nothing again."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(documents,))
    before = os.environ.get(PARALLELISM)
    # There is one process per processor. The tokenizer's threads do not exist in a fork, which would wait for them.
    os.environ[PARALLELISM] = "false"
    try:
        with warnings.catch_warnings():
            # Of a fork beside other threads: the workers use no lock that one of them may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            # The first call starts all processes.
            pool.submit(os.getpid).result()
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(documents: DocumentTokenizer) -> None:
    """Set up a worker: Ctrl-C is for the process that started it, with which it ends."""
    global _documents
    _documents = documents
    os.environ[PARALLELISM] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# Set in each worker when it starts.
_documents: DocumentTokenizer | None = None


def _tokenize(batch: RawBatch) -> list[TokenizedPart]:
    assert _documents is not None
    return list(_documents.tokenize(batch))
