"""Deadlines: of work that may never end, such as a model's chat template, and of the many short waits of a stream."""

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")


class _TimeOver(BaseException):
    """Raised within the work; no `except Exception` of it may swallow that."""


async def within(seconds: float, work: Callable[[], _T]) -> _T:
    """What `work` returns or raises; TimeoutError if it takes longer. The event loop goes on meanwhile.

    Python code is stopped wherever it is, a loop without end too. Code that does not come back to Python, such as one
    call that builds a gigantic string, is left alone: the answer is the same, only its thread lives until it returns.
    """
    job = _Job(work, asyncio.get_running_loop())
    threading.Thread(target=job.run, name="kvwise-text", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(job.done)
    except (TimeoutError, asyncio.CancelledError):
        job.stop()
        raise


class _Job(Generic[_T]):
    def __init__(self, work: Callable[[], _T], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._loop = loop
        self._lock = threading.Lock()
        self._thread: int | None = None  # while there is something to stop
        self.done: asyncio.Future[_T] = loop.create_future()

    def run(self) -> None:
        """On the thread."""
        try:
            try:
                with self._lock:
                    self._thread = threading.get_ident()
                result = self._work()
                self._tell(lambda: self.done.set_result(result))
            except Exception as error:
                failure = error
                self._tell(lambda: self.done.set_exception(failure))
            with self._lock:
                self._thread = None
        except _TimeOver:
            return

    def stop(self) -> None:
        """On the event loop: nobody waits any longer."""
        self.done.cancel()
        with self._lock:
            if self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_TimeOver))

    def _tell(self, settle: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed under us: nobody waits
            self._loop.call_soon_threadsafe(lambda: None if self.done.done() else settle())


class Patience:
    """A deadline for each of many waits of one task, one after the other: `with patience: await ...`.

    TimeoutError if what is awaited takes longer than `seconds`; None: it may take for ever. As `asyncio.timeout`, but a
    wait costs two notes instead of a timer: one timer goes on through all of them. `close` ends it.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: tuple[asyncio.Task[object], int, float] | None = None  # who, cancelled how often, until when
        self._is_over = False

    def __enter__(self) -> Self:
        if self._seconds is None:
            return self
        task = asyncio.current_task()
        assert task is not None
        self._is_over = False
        until = self._loop.time() + self._seconds
        self._waiting = task, task.cancelling(), until
        if self._timer is None:
            self._timer = self._loop.call_at(until, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waiting is None:
            return
        (task, before, _), self._waiting = self._waiting, None
        # A cancellation of somebody else's that came beside ours stays one.
        if self._is_over and task.uncancel() <= before and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def close(self) -> None:
        """Nobody will wait any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """End the wait that has lasted too long; sleep until the one that has begun since must end."""
        self._timer = None
        if self._waiting is None:  # the next one sets the timer
            return
        task, _, until = self._waiting
        if self._loop.time() < until:
            self._timer = self._loop.call_at(until, self._look)
            return
        self._is_over = True
        task.cancel()
