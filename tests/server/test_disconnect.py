"""A client that leaves, or does not read, frees its blocks within a step: in every phase, streaming or not."""

import asyncio
import random
from typing import Any

import pytest

from kvwise.core.params import SamplingParams
from kvwise.engine.llm import LLM
from kvwise.server.context import Server
from tests.server.asgi import Asked, pace, running, settled

PATH = "/v1/completions"
LONG, SHORT = [7] * 200, [65, 66, 67]


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.ends: list[Any] = []
        self.num_accepted = self.num_tokens = 0

    def accepted(self, record: Any) -> None:
        self.num_accepted += 1

    def tokens(self, record: Any, num_tokens: int, now: float) -> None:
        self.num_tokens += num_tokens

    def ended(self, record: Any) -> None:
        assert record.finished is not None
        self.ends.append(record)


def listen(server: Server) -> Heard:
    server.observers.append(heard := Heard())
    return heard


def ask(app: Any, prompt: Any, **fields: Any) -> Asked:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 50, "temperature": 0, "ignore_eos": True, **fields}
    return Asked(app, PATH, body)


async def queued(server: Server, number: int) -> None:
    """Until so many requests are with the engine."""
    async with asyncio.timeout(30):
        while len(server.service.streams()) < number:
            await asyncio.sleep(0)


def require_quiet(server: Server, heard: Heard, *, num_left: int) -> None:
    assert sum(record.disconnected for record in heard.ends) == num_left
    assert all(record.error == "client_disconnected" for record in heard.ends if record.disconnected)
    assert all(quota.num_running == 0 for quota in server.tenants._quotas.values())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [SHORT, [SHORT, LONG]])
def test_leaving_while_it_waits(make: Any, stream: bool, prompt: Any) -> None:
    async def main() -> None:
        server = make(max_num_seqs=1)
        heard = listen(server)
        async with running(server) as app:
            steps = await pace(server)
            first = ask(app, SHORT)
            await queued(server, 1)
            steps.allow(3)
            waits = ask(app, prompt, stream=stream)
            await queued(server, 2 if prompt is SHORT else 3)
            steps.allow(2)
            waits.leave()
            await waits.done()
            assert waits.status in (0, 499)  # nobody was there to read it
            assert len(server.service.streams()) == 1
            steps.allow(float("inf"))
            await first.done()
            assert first.json["usage"]["completion_tokens"] == 50
            await settled(server)
            require_quiet(server, heard, num_left=1)
            assert all(
                m.first_scheduled is None for record in heard.ends if record.disconnected for m in record.metrics
            )

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("prompt", "num_steps"), [(LONG, 3), (SHORT, 5), ([SHORT, LONG], 5)])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_while_it_runs(make: Any, stream: bool, prompt: Any, num_steps: int, n: int) -> None:
    """200 tokens, 32 a step, are in prefill after 3 steps; 3 tokens are in decode after 5."""

    async def main() -> None:
        server = make(max_num_seqs=8, max_num_batched_tokens=32)
        heard = listen(server)
        async with running(server) as app:
            steps = await pace(server)
            asked = ask(app, prompt, stream=stream, n=n)
            await queued(server, 2 if prompt not in (LONG, SHORT) else 1)
            steps.allow(num_steps)
            if prompt is not LONG and stream:
                await asked.until(lambda one: len(one.events) > n)
            asked.leave()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            before = max(num_steps, steps.taken)
            steps.allow(1)
            await asked.done()
            await settled(server)  # would wait for ever if another step were needed
            assert steps.taken <= before + 1
            require_quiet(server, heard, num_left=1)
            assert heard.num_accepted == 1

    asyncio.run(main())


def test_after_random_leaves_the_answer_is_the_same(make: Any, tiny: Any) -> None:
    async def main() -> dict[str, Any]:
        server, dice = make(max_num_seqs=4, max_num_batched_tokens=48), random.Random(7)
        heard = listen(server)
        async with running(server) as app:
            asked = []
            for _ in range(40):
                prompt = [dice.randrange(250) for _ in range(dice.choice([3, 40, 150]))]
                asked.append(ask(app, prompt, stream=dice.random() < 0.5, n=dice.choice([1, 1, 2]), max_tokens=20))
                for _ in range(dice.randrange(300)):
                    await asyncio.sleep(0)
                dice.choice(asked).leave()
            for one in asked:
                one.leave()
            for one in asked:
                await one.done()
            await settled(server)
            assert len(heard.ends) == 40
            last = ask(app, SHORT)
            await last.done()
            return last.json

    answer = asyncio.run(main())
    with LLM(tiny, "full+prefix", kv_cache_memory_bytes=2**24) as llm:
        expected = llm.generate([SHORT], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert answer["choices"][0]["text"] == expected.text


def test_a_reader_that_takes_nothing_is_cut_off(make: Any) -> None:
    async def main() -> None:
        server = make(settings={"slow_reader_s": 0.05})
        heard = listen(server)
        async with running(server) as app:
            asked = ask(app, SHORT, stream=True, max_tokens=2000)
            await asked.until(lambda one: len(one.events) > 1)
            asked.reads.clear()
            await asked.done()
            await settled(server)
            assert not asked.complete  # so that the client does not take it for a whole answer
            assert [record.error for record in heard.ends] == ["slow_reader"]
            assert server.tenants._quotas[""].num_running == 0

    asyncio.run(main())


def test_a_drain_that_takes_too_long_is_an_error_in_every_answer(make: Any) -> None:
    async def main() -> None:
        server = make()
        async with running(server) as app:
            steps = await pace(server)
            whole = ask(app, SHORT)
            stream = ask(app, SHORT, stream=True)
            await queued(server, 2)
            steps.allow(5)
            await stream.until(lambda one: bool(one.events))
            drained = asyncio.create_task(server.service.drain(0.0))
            await drained
            steps.allow(float("inf"))
            await whole.done()
            await stream.done()
            assert whole.status == 503
            assert whole.json["error"]["code"] == "request_aborted"
            assert stream.complete
            assert stream.events[-1]["error"]["code"] == "request_aborted"
            await settled(server)

    asyncio.run(main())


def test_a_batch_is_queued_whole_or_not_at_all(make: Any) -> None:
    from kvwise.engine.service import ServiceLimits

    async def main() -> None:
        server = make(limits=ServiceLimits(max_waiting=3))
        heard = listen(server)
        async with running(server) as app:
            steps = await pace(server)
            batch = ask(app, [SHORT] * 5)
            await batch.done()
            assert batch.status == 429
            assert heard.num_accepted == 0
            assert [record.status for record in heard.ends] == [429]
            steps.allow(1)  # the two that were queued are gone within it
            await settled(server)
            assert server.tenants._quotas[""].num_running == 0

    asyncio.run(main())
