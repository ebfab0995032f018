"""One line of JSON for each request: what it was, how it went, how long it took. No text of it, unless asked for."""

import json
import logging
import queue
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, TextIO

from kvwise.server.record import RequestRecord

LOGGER = "kvwise.requests"
MAX_PROMPT_CHARS = 2000
_MAX_CHARS = 128  # of any other text in a line
_MAX_WAITING = 10_000  # lines that nobody has written yet
_CLOSE_S = 2.0


class RequestLog:
    """Writes lines to the logger `kvwise.requests` if somebody gave it a handler, else to stderr.

    A thread writes, so that a slow or full disk, or a pipe that nobody reads, holds no request up; what cannot be
    written is counted in `num_lost`, and that is all that happens. Users and sessions appear under pseudonyms that are
    the same for the life of the process.
    """

    def __init__(
        self, *, prompts: bool = False, stream: TextIO | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        self.num_lost = 0
        self._prompts = prompts
        self._stream = stream
        self._wall = wall
        self._secret = secrets.token_bytes(16)
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._write, name="kvwise-request-log", daemon=True)
        self._thread.start()

    def accepted(self, record: RequestRecord) -> None:
        """A line is written at the end only."""

    def tokens(self, record: RequestRecord, num_tokens: int, now: float) -> None:
        """Likewise."""

    def ended(self, record: RequestRecord) -> None:
        """Write the request's line; never raises, never waits."""
        try:
            self._lines.put_nowait(json.dumps(self.line(record)))
        except Exception:  # a log must not take a request with it, whatever is wrong
            self.num_lost += 1

    def line(self, record: RequestRecord) -> dict[str, Any]:
        """What is told of a request; times in seconds. None: it did not come so far."""
        first = min((one.first_token for one in record.metrics if one.first_token is not None), default=None)
        first = record.first_token if record.first_token is not None else first
        scheduled = min((m.first_scheduled for m in record.metrics if m.first_scheduled is not None), default=None)
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds"),
            "request_id": _cut(record.request_id),
            "route": _cut(record.route),
            "tenant": _cut(record.tenant),
            "model": _cut(record.model),
            "strategy": _cut(record.strategy),
            "stream": record.streams,
            "status": record.status,
            "error": record.error and _cut(record.error),
            "disconnected": record.disconnected,
            "finish_reasons": dict(Counter(map(str, record.finish_reasons))),
            "prompt_tokens": record.num_prompt,
            "cached_tokens": record.num_cached,
            "output_tokens": record.num_output,
            "dropped_tokens": sum(one.tokens_dropped for one in record.attestations),
            "preemptions": sum(one.num_preemptions for one in record.metrics),
            "queue_s": _since(record, scheduled),
            "ttft_s": _since(record, first),
            "duration_s": _since(record, record.finished),
            "user": self._pseudonym(record.user),
            "session": self._pseudonym(record.session),
        }
        if self._prompts:
            told["prompt"] = record.prompt[:MAX_PROMPT_CHARS]
        return told

    def close(self) -> None:
        """Write what is waiting, for at most two seconds, and end."""
        try:
            self._lines.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return  # the writer hangs; it is a daemon and goes with the process
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write_line(line)
            except Exception:  # a full disk, a closed pipe, a stream that is gone: the next line may fare better
                self.num_lost += 1

    def _write_line(self, line: str) -> None:
        logger = logging.getLogger(LOGGER)
        if self._stream is None and logger.handlers:
            logger.info("%s", line)
            return
        stream = self._stream or sys.stderr
        stream.write(line + "\n")
        stream.flush()

    def _pseudonym(self, name: str) -> str | None:
        return blake2b(name.encode("utf-8", "replace"), key=self._secret, digest_size=8).hexdigest() if name else None


def _since(record: RequestRecord, at: float | None) -> float | None:
    return None if at is None else round(at - record.arrival, 6)


def _cut(text: str) -> str:
    return str(text)[:_MAX_CHARS]
