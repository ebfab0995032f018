"""One line of JSON for each request: what it says, what it never says, and what a broken disk does to it: nothing."""

import errno
import io
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvwise.core.output import Attestation
from kvwise.server.observing.request_log import LOGGER, MAX_PROMPT_CHARS, RequestLog
from tests.server.telling import a_record, some_metrics


def lines(*records: Any, **options: Any) -> list[dict[str, Any]]:
    stream = io.StringIO()
    log = RequestLog(stream=stream, wall=lambda: 0.0, **options)
    for record in records:
        log.accepted(record)
        log.tokens(record, 1, 11.0)
        log.ended(record)
    log.close()
    assert log.num_lost == 0
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_how_a_request_went() -> None:
    record = a_record(
        metrics=[some_metrics(num_preemptions=2)], attestations=[Attestation("prefix", tokens_dropped=9)], num_cached=64
    )
    (line,) = lines(record)
    assert line == {
        "time": "1970-01-01T00:00:00.000+00:00", "request_id": "chatcmpl-1", "route": "/v1/chat/completions",
        "tenant": "acme", "model": "tiny", "strategy": "prefix", "stream": True, "status": 200, "error": None,
        "disconnected": False, "finish_reasons": {"stop": 1}, "prompt_tokens": 100, "cached_tokens": 64,
        "output_tokens": 3, "dropped_tokens": 9, "preemptions": 2, "queue_s": 0.1, "ttft_s": 0.5, "duration_s": 2.0,
        "user": None, "session": None,
    }  # fmt: skip


def test_a_refused_request_has_a_line_too() -> None:
    (line,) = lines(a_record(status=429, error="overloaded", metrics=[], first_token=None, finish_reasons=[]))
    assert (line["status"], line["error"], line["ttft_s"], line["queue_s"]) == (429, "overloaded", None, None)


def test_the_first_token_is_known_without_a_stream() -> None:
    (line,) = lines(a_record(streams=False, first_token=None))
    assert line["ttft_s"] == 0.5


def test_prompts_are_there_only_if_asked_for_and_cut() -> None:
    record = a_record(prompt="my secret " * 1000)
    (silent,), (told,) = lines(record), lines(record, prompts=True)
    assert "prompt" not in silent
    assert "secret" not in json.dumps(silent)
    assert told["prompt"] == ("my secret " * 1000)[:MAX_PROMPT_CHARS]


def test_users_and_sessions_have_pseudonyms() -> None:
    first, second, third = lines(
        a_record(user="ann@example.org", session="s-1"), a_record(user="ann@example.org"), a_record(user="bob\ud800")
    )
    assert "ann" not in json.dumps([first, second])
    assert first["user"] == second["user"] != third["user"]
    assert first["user"] != first["session"]
    (later,) = lines(a_record(user="ann@example.org"))
    assert later["user"] != first["user"]  # of another process: nobody can make a table of them


def test_a_hostile_id_makes_one_line() -> None:
    (line,) = lines(a_record(request_id='x\n{"status": 200}\r\x1b[2J' + "y" * 500, tenant="a\nb", error="e\nf"))
    assert line["status"] == 200
    assert len(line["request_id"]) == 128


def test_many_outputs_make_a_short_line() -> None:
    (line,) = lines(a_record(finish_reasons=["stop"] * 9000 + ["length"] * 1000))
    assert line["finish_reasons"] == {"stop": 9000, "length": 1000}


class Broken(io.StringIO):
    """Raises on the writes whose numbers are given."""

    def __init__(self, error: Exception, *bad: int) -> None:
        super().__init__()
        self.error = error
        self.bad = bad
        self.num_writes = 0

    def write(self, text: str) -> int:
        self.num_writes += 1
        if self.num_writes in self.bad:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space left"), BrokenPipeError(), ValueError("I/O operation on closed file")]
)
def test_what_cannot_be_written_is_counted_and_the_rest_is_written(error: Exception) -> None:
    stream = Broken(error, 1, 3)
    log = RequestLog(stream=stream)
    for i in range(4):
        log.ended(a_record(request_id=f"r{i}"))
    log.close()
    assert log.num_lost == 2
    assert [json.loads(line)["request_id"] for line in stream.getvalue().splitlines()] == ["r1", "r3"]


def test_a_closed_stderr_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", closed)
    log = RequestLog()
    log.ended(a_record())
    log.close()
    assert log.num_lost == 1
    monkeypatch.setattr("sys.stderr", None)  # a service without a console
    log = RequestLog()
    log.ended(a_record())
    log.close()
    assert log.num_lost == 1


def test_a_pipe_that_nobody_reads_holds_no_request_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwise.server.observing.request_log._MAX_WAITING", 10)
    monkeypatch.setattr("kvwise.server.observing.request_log._CLOSE_S", 0.01)
    gate, entered = threading.Event(), threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            entered.set()
            assert gate.wait(30)
            return super().write(text)

    stream = Stuck()
    log = RequestLog(stream=stream)
    log.ended(a_record())
    assert entered.wait(30)  # the writer hangs in the first line
    for _ in range(25):
        log.ended(a_record())
    assert log.num_lost == 15
    log.close()  # does not wait for ever
    gate.set()


def test_a_record_that_makes_no_sense_raises_nothing() -> None:
    log = RequestLog(stream=io.StringIO())
    log.ended(a_record(metrics=[None]))  # type: ignore[list-item]
    log.ended(a_record(status=object()))
    log.close()
    assert log.num_lost == 2


@pytest.fixture
def handler() -> Iterator[Any]:
    class Keeping(logging.Handler):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[str] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.told.append(record.getMessage())

    kept = Keeping()
    logger = logging.getLogger(LOGGER)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    yield kept
    logger.removeHandler(kept)
    logger.setLevel(level)
    logger.propagate = propagates


def test_a_handler_of_the_logger_gets_the_lines(handler: Any, capsys: pytest.CaptureFixture[str]) -> None:
    log = RequestLog()
    log.ended(a_record(request_id="100%s"))
    log.close()
    assert [json.loads(line)["request_id"] for line in handler.told] == ["100%s"]
    assert capsys.readouterr().err == ""


def test_without_a_handler_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log = RequestLog()
    log.ended(a_record())
    log.close()
    assert json.loads(capsys.readouterr().err)["request_id"] == "chatcmpl-1"
