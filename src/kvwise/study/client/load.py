"""Runs the load: every conversation begins at its time, whatever became of the others."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from kvwise.study.client.answer import Answer
from kvwise.study.client.prompts import Ask, Conversation, Message, Prompt

READY_BYTES = 256 << 20  # bodies made before the start; what is beyond is made on the way


@dataclass(slots=True)
class Sender:
    """How requests leave: makes bodies, and sends one with a session's name, filling in its answer."""

    body: Callable[[Prompt, int], bytes]
    send: Callable[[bytes, Answer, str | None], Awaitable[None]]
    is_chat: bool
    session: bool = False


@dataclass(slots=True)
class Outcome:
    """What a run brought: answers in the order in which they ended."""

    answers: list[Answer] = field(default_factory=list)
    duration_s: float = 0.0  # from the start to the last end
    started: float = 0.0  # on the clock of the answers
    num_planned: int = 0
    num_unfinished: int = 0  # under way when it was interrupted
    interrupted: bool = False


class Load:
    """One run of conversations; `cut_s` seconds after its start nothing more is sent.

    `max_concurrency` requests are under way at a time, others wait in a queue of the client's. A task's cancellation
    (Ctrl-C) ends a run early: what has ended until then is the outcome.
    """

    def __init__(
        self, conversations: Sequence[Conversation], sender: Sender, *, max_concurrency: int | None = None,
        cut_s: float | None = None, told: Callable[[Answer], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._conversations = conversations
        self._sender = sender
        self._slots = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        self._cut_s = cut_s
        self._told = told
        self._now = clock
        self._outcome = Outcome(num_planned=sum(len(talk.turns) for talk in conversations))
        self._bodies: dict[int, bytes] = {}

    async def run(self) -> Outcome:
        """Send everything and wait for all answers."""
        self._make_bodies()
        outcome = self._outcome
        outcome.started = start = self._now()
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._begin(start, tasks)
            if tasks:
                await asyncio.wait(tasks)
        except asyncio.CancelledError:
            _forget_cancellation()
            outcome.interrupted = True
            outcome.num_unfinished = await _cancel(tasks)
        outcome.duration_s = self._now() - start
        for task in tasks:
            if not task.cancelled():
                task.result()  # a fault of the client's own is raised, not lost
        return outcome

    def _make_bodies(self) -> None:
        """Of first turns, as many as fit: making one of a long prompt takes milliseconds that others would feel."""
        size = 0
        for talk in self._conversations:
            if size > READY_BYTES:
                break
            body = self._bodies[talk.index] = self._body(talk.turns[0], [])
            size += len(body)

    def _body(self, ask: Ask, history: list[tuple[str, str]]) -> bytes:
        prompt = ask.prompt()
        if history and isinstance(prompt, str):
            prompt = _messages(history, prompt) if self._sender.is_chat else _text(history, prompt)
        return self._sender.body(prompt, ask.max_tokens)

    async def _begin(self, start: float, tasks: list[asyncio.Task[None]]) -> None:
        for talk in self._conversations:
            body = self._bodies.pop(talk.index, None) or self._body(talk.turns[0], [])
            at = start + talk.at
            if self._cut_s is not None and talk.at > self._cut_s:
                return
            if (wait := at - self._now()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._converse(talk, body, at)))

    async def _converse(self, talk: Conversation, body: bytes, at: float) -> None:
        """The turns of one conversation, one after the other; it ends with the first that fails."""
        history: list[tuple[str, str]] = []
        session = f"kvwise-bench-{talk.index}" if self._sender.session else None
        for turn, ask in enumerate(talk.turns):
            if turn:
                body = self._body(ask, history)
                at = self._now() + talk.think_s
                await asyncio.sleep(talk.think_s)
            answer = Answer(talk.index, turn, ask.max_tokens, at, None if turn else ask.num_prompt)
            if not await self._one(body, answer, session) or turn + 1 == len(talk.turns):
                return
            history.append((str(ask.prompt()), answer.text))

    async def _one(self, body: bytes, answer: Answer, session: str | None) -> bool:
        """Send one request; whether another may follow."""
        queued = self._now()
        answer.send_delay_s = queued - answer.scheduled
        async with self._slots or nullcontext():
            answer.queue_s = self._now() - queued
            if self._cut_s is not None and self._now() > self._outcome.started + self._cut_s:
                return False
            await self._sender.send(body, answer, session)
        self._outcome.answers.append(answer)
        if self._told is not None:
            self._told(answer)
        return answer.ok


def _messages(history: Sequence[tuple[str, str]], prompt: str) -> list[Message]:
    before = [
        message
        for asked, answered in history
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    ]
    return [*before, {"role": "user", "content": prompt}]


def _text(history: Sequence[tuple[str, str]], prompt: str) -> str:
    return "".join(f"{asked}{answered}\n" for asked, answered in history) + prompt


def _forget_cancellation() -> None:
    """This task goes on: the outcome so far is still to be told."""
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


async def _cancel(tasks: list[asyncio.Task[None]]) -> int:
    left = [task for task in tasks if not task.done()]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return len(left)
