"""Events are cut out of a stream wherever it is split; answers are read from them with the times of their bytes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwise.core.errors import RequestError
from kvwise.study.client.answer import Answer, AnswerReader, BadAnswer
from kvwise.study.client.sse import MAX_EVENT, EventReader
from tests.study.client.fake_server import DONE, Reply, stream

WIRE = (
    b': keep-alive\n\ndata: {"a": 1}\n\nevent: x\ndata:two\ndata: lines\nid: 3\n\n\n\n'
    b"data: \xe2\x82\xac\r\n\r\ndata: last\r\rdata: x\r\ndata: y\r\n\r\ndata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", "€".encode(), b"last", b"x\ny", b"[DONE]"]


@pytest.mark.parametrize("place", range(len(WIRE) + 1))
def test_a_stream_split_anywhere_has_the_same_events(place: int) -> None:
    reader = EventReader()
    assert reader.feed(WIRE[:place]) + reader.feed(WIRE[place:]) == EVENTS


def test_a_stream_of_single_bytes_has_the_same_events() -> None:
    reader = EventReader()
    assert [event for byte in WIRE for event in reader.feed(bytes([byte]))] == EVENTS


@given(st.lists(st.integers(0, len(WIRE)), max_size=8))
def test_a_stream_split_many_times_has_the_same_events(places: list[int]) -> None:
    reader, found, before = EventReader(), list[bytes](), 0
    for place in [*sorted(places), len(WIRE)]:
        found += reader.feed(WIRE[before:place])
        before = place
    assert found == EVENTS


def test_an_event_without_end_is_refused() -> None:
    reader = EventReader()
    reader.feed(b"data: " + b"x" * (MAX_EVENT - 6))
    with pytest.raises(RequestError, match=str(MAX_EVENT)):
        reader.feed(b"x")


def read(pieces: list[tuple[bytes, float]], *, is_chat: bool, start: float = 10.0) -> Answer:
    answer = Answer(0, 0, 8, scheduled=start, start=start)
    reader = AnswerReader(answer, is_chat=is_chat)
    for data, now in pieces:
        reader.feed(data, now)
    reader.end()
    return answer


def lines(is_chat: bool, reply: Reply) -> list[bytes]:
    return [piece + b"\n\n" for piece in stream(reply, is_chat=is_chat).split(b"\n\n")[:-1]]


def test_times_are_those_of_the_bytes_of_each_token() -> None:
    pieces = lines(False, Reply(("a", "", "c")))  # a token may have no text yet
    answer = read(list(zip(pieces, (10.5, 10.7, 11.0, 11.0, 11.2, 11.2), strict=True)), is_chat=False)
    assert answer.ttft == 0.5
    assert answer.itls == pytest.approx([0.2, 0.3])
    assert answer.latency == 1.0
    assert answer.tpot == pytest.approx((1.0 - 0.5) / (3 - 1))
    assert (answer.text, answer.finish_reason, answer.num_output) == ("ac", "length", 3)
    assert (answer.num_prompt, answer.num_cached, answer.counted) == (7, 2, False)


def test_the_chunk_that_opens_a_chat_is_no_token() -> None:
    pieces = lines(True, Reply(("a", "b")))
    times = (10.1, 10.5, 10.7, 10.9, 10.9, 10.9)  # role, a, b, end, usage, [DONE]
    answer = read(list(zip(pieces, times, strict=True)), is_chat=True)
    assert answer.ttft == 0.5
    assert answer.itls == pytest.approx([0.2])
    assert answer.latency == pytest.approx(0.9)  # the end is when the server says so
    assert answer.text == "ab"


@pytest.mark.parametrize("is_chat", [False, True])
def test_an_answer_split_at_every_byte_is_the_same(is_chat: bool) -> None:
    whole = stream(Reply(("ä", "€", "z")), is_chat=is_chat)
    for place in range(len(whole) + 1):
        answer = read([(whole[:place], 11.0), (whole[place:], 12.0)], is_chat=is_chat)
        assert (answer.text, answer.num_output, answer.finish_reason) == ("ä€z", 3, "length")
        assert len(answer.itls) == 2
        assert answer.ttft + sum(answer.itls) <= answer.latency <= 2.0


def test_without_usage_tokens_are_chunks() -> None:
    answer = read([(stream(Reply(("a", "b"), usage=False), is_chat=False), 11.0)], is_chat=False)
    assert (answer.num_output, answer.counted, answer.num_prompt) == (2, True, None)


def test_an_answer_that_is_only_an_end_has_a_first_token_time() -> None:
    answer = read([(stream(Reply((), finish="stop"), is_chat=True), 10.25)], is_chat=True)
    assert (answer.ttft, answer.latency, answer.itls, answer.tpot) == (0.25, 0.25, [], 0.0)


def _chunk(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"data: not json\n\n", "bad_answer"),
        (b"data: 3\n\n", "bad_answer"),
        (_chunk({"choices": [3]}), "bad_answer"),
        (_chunk({"choices": [{"text": 3, "finish_reason": None}]}), "bad_answer"),
        (_chunk({"choices": [], "usage": {"prompt_tokens": 3}}), "bad_answer"),
        (_chunk({"error": {"message": "engine died"}}), "stream_error"),
        (_chunk({"choices": [{"text": "a", "finish_reason": None}]}), "incomplete"),
        (_chunk({"choices": [{"text": "a", "finish_reason": None}]}) + DONE, "incomplete"),
        (_chunk({"choices": [{"text": "a", "finish_reason": "error"}]}) + DONE, "failed_generation"),
        (DONE, "empty"),
        (b"", "empty"),
    ],
)
def test_what_is_no_answer_is_told_by_kind(data: bytes, kind: str) -> None:
    with pytest.raises(BadAnswer) as caught:
        read([(data, 11.0)], is_chat=False)
    assert caught.value.kind == kind
