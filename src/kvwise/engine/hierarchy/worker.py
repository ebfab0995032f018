"""A worker: one thread for what must not hold up a step."""

import logging
import threading
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Worker:
    """Runs jobs one after another on a daemon thread, started with the first. A job that raises is logged and counted.

    A job that hangs holds up the jobs behind it and nothing else: `flush` and `close` take a deadline.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_failed = 0
        self._jobs: deque[Callable[[], None]] = deque()
        self._condition = threading.Condition()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._jobs) + self._busy

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; one that comes after `close` is dropped."""
        with self._condition:
            if self._closed:
                return
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"kvwise-{self.name}", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running; False if that takes longer than `timeout_s` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Take no more jobs, finish those there are; False if that takes longer than `timeout_s` seconds."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
            try:
                job()
            except Exception:
                self.num_failed += 1
                _log.exception("a job of the %s worker failed", self.name)
            finally:
                with self._condition:
                    self._busy = False
                    self._condition.notify_all()
