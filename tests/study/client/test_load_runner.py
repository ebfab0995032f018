"""Open loop: every request leaves at its time, whatever became of the others. In virtual time."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvwise.study.arrivals import arrival_times
from kvwise.study.client.answer import Answer
from kvwise.study.client.load import Load, Outcome, Sender
from kvwise.study.client.prompts import Ask, Conversation, Prompt

Virtual = Callable[[Callable[[Callable[[], float]], Any]], Any]


class Server:
    """Answers after so many seconds of virtual time; remembers when it was asked what."""

    def __init__(self, now: Callable[[], float], seconds: Callable[[int], float]) -> None:
        self.now, self.seconds = now, seconds
        self.asked: list[tuple[float, Any, str | None]] = []
        self.running = self.peak = 0
        self.fails: set[int] = set()

    async def send(self, body: bytes, answer: Answer, session: str | None) -> None:
        number = len(self.asked)
        answer.start = self.now()
        self.asked.append((answer.start, json.loads(body), session))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds(number))
        finally:
            self.running -= 1
        answer.text, answer.latency, answer.num_output = f"<{number}>", self.now() - answer.start, 1
        if number in self.fails:
            answer.fail("http_500", "500")


def body(prompt: Prompt, max_tokens: int) -> bytes:
    return json.dumps([prompt, max_tokens]).encode()


def talk(index: int, at: float, *texts: str, think_s: float = 0.0) -> Conversation:
    return Conversation(index, at, tuple(Ask((lambda t: lambda: t)(text), 1, 4) for text in texts), think_s)


def play(
    virtual: Virtual, talks: list[Conversation], seconds: Callable[[int], float], *, is_chat: bool = False,
    session: bool = False, fails: set[int] | None = None, stop_after: float | None = None, **options: Any,
) -> tuple[Outcome, Server]:  # fmt: skip
    async def whole(now: Callable[[], float]) -> tuple[Outcome, Server]:
        server = Server(now, seconds)
        server.fails = fails or set()
        load = Load(talks, Sender(body, server.send, is_chat, session), clock=now, **options)
        task = asyncio.create_task(load.run())
        if stop_after is not None:
            await asyncio.sleep(stop_after)
            task.cancel()
        return await task, server

    return virtual(whole)  # type: ignore[no-any-return]


def test_slow_answers_delay_no_request(virtual: Virtual) -> None:
    times = arrival_times(200, 50.0, 0.5, np.random.default_rng(3))
    talks = [talk(i, float(at), "p") for i, at in enumerate(times)]
    outcome, server = play(virtual, talks, lambda number: 1000.0)
    asked = np.array([at for at, _, _ in server.asked]) - outcome.started
    np.testing.assert_allclose(asked, times, atol=1e-6)
    assert max(a.send_delay_s for a in outcome.answers) < 1e-6
    assert server.peak == 200
    assert outcome.duration_s == pytest.approx(times[-1] + 1000.0)


def test_a_limit_of_concurrency_holds_and_the_wait_is_told(virtual: Virtual) -> None:
    talks = [talk(i, 0.0, "p") for i in range(10)]
    outcome, server = play(virtual, talks, lambda number: 2.0, max_concurrency=4)
    assert server.peak == 4
    assert outcome.duration_s == pytest.approx(6.0)
    assert sorted(round(a.queue_s, 6) for a in outcome.answers) == [0.0] * 4 + [2.0] * 4 + [4.0] * 2
    assert max(a.send_delay_s for a in outcome.answers) < 1e-6  # standing in the client's queue is no delay


def test_nothing_is_sent_after_the_duration(virtual: Virtual) -> None:
    talks = [talk(i, float(i), "p", "q") for i in range(10)]
    outcome, server = play(virtual, talks, lambda number: 1.5, cut_s=3.25)
    assert [round(at - outcome.started, 6) for at, _, _ in server.asked] == [0.0, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert len(outcome.answers) == 6
    waiting, _ = play(virtual, [talk(i, 0.0, "p") for i in range(9)], lambda n: 1.0, max_concurrency=1, cut_s=2.5)
    assert len(waiting.answers) == 3


def test_turns_follow_answers_and_carry_the_history(virtual: Virtual) -> None:
    outcome, server = play(virtual, [talk(0, 1.0, "a", "b", "c", think_s=5.0)], lambda number: 2.0)
    assert [at - outcome.started for at, _, _ in server.asked] == pytest.approx([1.0, 8.0, 15.0])
    assert [asked[0] for _, asked, _ in server.asked] == ["a", "a<0>\nb", "a<0>\nb<1>\nc"]
    assert [(a.turn, a.send_delay_s) for a in outcome.answers] == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_a_chat_grows_by_messages_and_names_its_session(virtual: Virtual) -> None:
    talks = [talk(7, 0.0, "a", "b"), talk(8, 0.5, "x")]
    _, server = play(virtual, talks, lambda number: 1.0, is_chat=True, session=True)
    assert server.asked[-1][1][0] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<0>"},
        {"role": "user", "content": "b"},
    ]
    assert [session for _, _, session in server.asked] == ["kvwise-bench-7", "kvwise-bench-8", "kvwise-bench-7"]


def test_a_conversation_ends_with_the_turn_that_fails(virtual: Virtual) -> None:
    outcome, server = play(virtual, [talk(0, 0.0, "a", "b", "c"), talk(1, 0.1, "x")], lambda n: 1.0, fails={0})
    assert len(server.asked) == 2
    assert [a.ok for a in outcome.answers] == [False, True]


def test_an_interrupted_run_keeps_what_has_ended(virtual: Virtual) -> None:
    talks = [talk(i, float(i), "p") for i in range(10)]
    outcome, server = play(virtual, talks, lambda number: 2.5, stop_after=5.75)
    assert outcome.interrupted
    assert (len(outcome.answers), outcome.num_unfinished, outcome.num_planned) == (4, 2, 10)
    assert outcome.duration_s == pytest.approx(5.75)
    assert server.running == 0


def test_an_interrupt_while_the_last_answers_come_is_no_loss(virtual: Virtual) -> None:
    outcome, _ = play(virtual, [talk(i, 0.0, "p") for i in range(3)], lambda n: 1.0 + n, stop_after=2.5)
    assert (len(outcome.answers), outcome.num_unfinished, outcome.interrupted) == (2, 1, True)


def test_a_fault_of_the_client_is_raised(virtual: Virtual) -> None:
    def boom(number: int) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        play(virtual, [talk(0, 0.0, "p")], boom)


def test_a_client_that_is_held_up_tells_by_how_much(virtual: Virtual) -> None:
    """Something blocks the loop for 3 s: the request due meanwhile is sent late, and says so."""

    async def whole(now: Callable[[], float]) -> Outcome:
        server = Server(now, lambda number: 0.5)
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, lambda: setattr(loop.jumping, "now", loop.jumping.now + 3))  # type: ignore[attr-defined]
        return await Load([talk(0, 1.0, "p")], Sender(body, server.send, False), clock=now).run()

    (answer,) = virtual(whole).answers
    assert answer.send_delay_s == pytest.approx(2.5)
