"""The server's log: written by a thread, so that a full disk, a closed pipe or one that nobody reads harms nobody."""

import contextlib
import logging
import os
import queue
import sys
from collections.abc import Iterator
from logging.handlers import QueueHandler, QueueListener
from typing import TextIO

_MAX_WAITING = 10_000  # records that wait for the thread; more are dropped
_CLOSE_S = 2.0
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextlib.contextmanager
def logging_to(stream: TextIO | None = None) -> Iterator[None]:
    """Log kvwise's news and everybody's warnings to `stream`, or to standard error, until the block ends.

    For a process of its own: it changes how Python logs.
    """
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_WAITING)
    handler, writer = QueueHandler(waiting), logging.StreamHandler(stream)  # a full queue raises, and that is dropped
    writer.setFormatter(logging.Formatter(_FORMAT))
    listener = QueueListener(waiting, writer)
    root, ours = logging.getLogger(), logging.getLogger("kvwise")
    before = logging.raiseExceptions, ours.level
    logging.raiseExceptions = False  # what cannot be written is dropped without a word: there is nowhere to say it
    root.addHandler(handler)
    ours.setLevel(logging.INFO)
    listener.start()
    try:
        yield
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(queue.Full):
            listener.enqueue_sentinel()
        if listener._thread is not None:  # `stop` would wait for a writer that hangs
            listener._thread.join(_CLOSE_S)
        logging.raiseExceptions = before[0]
        ours.setLevel(before[1])


def let_go(*streams: TextIO) -> None:
    """Flush streams; one that cannot be written gets /dev/null, so that the interpreter ends without complaint."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    """Print a line, if anybody is there to read it."""
    try:
        print(line, flush=True)
    except OSError:
        let_go(sys.stdout)
