"""Work that may never end, such as a model's chat template: on a thread of its own, stopped when its time is over."""

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

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
