"""What became of one request: its times, tokens and end; and the reader that makes it of a stream's bytes."""

import json
from dataclasses import dataclass, field
from typing import Any

from kvwise.core.errors import RequestError
from kvwise.study.client.sse import EventReader

_FAILED_ENDS = ("error", "abort")
REFUSALS = (429, 503)


class BadAnswer(RequestError):
    """What the server said is no answer; `kind` says in a word why."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class Answer:
    """One request. Times are seconds of `time.perf_counter`, and durations seconds from `start`."""

    conversation: int
    turn: int
    max_tokens: int
    scheduled: float
    said_prompt: int | None = None  # prompt tokens as the data set says
    send_delay_s: float = 0.0  # from its scheduled time until it was about to be sent, or stood in the queue
    queue_s: float = 0.0  # while as many as may run were running
    start: float = 0.0
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0  # until the last token
    num_prompt: int | None = None  # as the server's usage says
    num_cached: int | None = None  # likewise
    num_output: int = 0
    counted: bool = False  # num_output is the number of chunks: the server told no usage
    text: str = ""
    finish_reason: str | None = None
    kind: str | None = None  # of the error; None: completed
    error: str = ""
    status: int | None = None
    decision_s: float | None = None  # until a refusal was there
    retry_after_s: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return self.kind is None

    @property
    def refused(self) -> bool:
        """Whether the server had no room for it."""
        return self.status in REFUSALS

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 with fewer than two, as in vLLM."""
        return (self.latency - self.ttft) / (self.num_output - 1) if self.num_output > 1 else 0.0

    def fail(self, kind: str, error: str) -> None:
        """Note what went wrong, in one line."""
        self.kind, self.error = kind, " ".join(error.split())[:500]


class AnswerReader:
    """Fills an answer from the bytes of its stream, each told with the moment at which it came."""

    def __init__(self, answer: Answer, *, is_chat: bool) -> None:
        self._answer = answer
        self._is_chat = is_chat
        self._events = EventReader()
        self._texts: list[str] = []
        self._num_chunks = 0
        self._last: float | None = None  # when the last token came
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        """Take in bytes. BadAnswer if they are not what OpenAI's API streams."""
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self._done = True
                continue
            try:
                self._take(json.loads(event.decode()), now)
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                raise BadAnswer("bad_answer", f"no chunk of a completion: {event[:100]!r} ({error})") from error

    def _take(self, chunk: dict[str, Any], now: float) -> None:
        if chunk.get("error"):
            error = chunk["error"]
            raise BadAnswer("stream_error", str(error.get("message", error) if isinstance(error, dict) else error))
        if usage := chunk.get("usage"):
            self._take_usage(usage)
        for choice in chunk.get("choices") or ():
            self._take_choice(choice, now)

    def _take_usage(self, usage: dict[str, Any]) -> None:
        answer = self._answer
        answer.num_output = int(usage["completion_tokens"])
        if (prompt := usage.get("prompt_tokens")) is not None:
            answer.num_prompt = int(prompt)
        if details := usage.get("prompt_tokens_details"):
            answer.num_cached = int(details.get("cached_tokens") or 0)

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        answer, end = self._answer, choice.get("finish_reason")
        if self._is_chat:
            delta = choice.get("delta") or {}
            text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
            opening = "role" in delta
        else:
            text, opening = choice.get("text") or "", False
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}")
        if end is not None:
            answer.finish_reason = str(end)
        # A token may have no text (half a character); the chunk that opens a chat or only ends an answer is no token.
        if text or (end is None and not opening):
            self._texts.append(text)
            self._num_chunks += 1
            if self._last is not None:
                answer.itls.append(now - self._last)
            self._last = now
            self._note(now)
        elif end is not None:
            self._note(now)

    def _note(self, now: float) -> None:
        answer = self._answer
        answer.latency = now - answer.start
        if not answer.ttft:
            answer.ttft = answer.latency

    def end(self) -> None:
        """The stream is over. BadAnswer if it ended early, or without a token."""
        answer = self._answer
        answer.text = "".join(self._texts)
        if not answer.num_output:
            answer.num_output, answer.counted = self._num_chunks, True
        if not answer.latency:
            raise BadAnswer("empty", "the stream had no token")
        if answer.finish_reason is None:
            told = "without a finish reason" if self._done else "before its end"
            raise BadAnswer("incomplete", f"the stream ended {told}, after {self._num_chunks} chunks")
        if answer.finish_reason in _FAILED_ENDS:
            raise BadAnswer("failed_generation", f"the answer ended by {answer.finish_reason}")
