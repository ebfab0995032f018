"""The async bridge: streams, room, aborts, draining, switching."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import CapacityError, InvariantError, RequestError, UsageError
from kvwise.core.output import FinishReason, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.engine.llm import LLM
from kvwise.engine.service import EngineService, Generate, Overloaded, ServiceLimits, State, Unavailable
from kvwise.engine.stream import Stream
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel

CONFIG = EngineConfig(kv_cache_memory_bytes=2**24, max_num_seqs=4, max_num_batched_tokens=64, check=True)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=900, ignore_eos=True)
PROMPT = list(range(40, 120))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("random:3m")


@asynccontextmanager
async def serving(
    loaded: LoadedModel, *strategies: str, limits: ServiceLimits | None = None, config: EngineConfig = CONFIG,
    clock: VirtualClock | None = None,
) -> AsyncIterator[EngineService]:  # fmt: skip
    chosen = [parse(name) for name in strategies or ("prefix",)]
    service = EngineService(loaded, chosen, config, limits or ServiceLimits(), clock)
    await service.start()
    service.ready()
    try:
        yield service
    finally:
        await service.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def plain(loaded: LoadedModel, prompt: list[int], params: SamplingParams = GREEDY) -> list[int]:
    with LLM(loaded, "full", kv_cache_memory_bytes=2**24) as llm:
        return llm.generate([prompt], params)[0].token_ids


async def held_blocks(service: EngineService) -> int:
    def count(engine: Engine) -> int:
        engine.memory.cache.check()
        usage = engine.memory.cache.usage()
        return usage.num_referenced + usage.num_broken

    return await service.call(count)


def test_streams_carry_what_the_engine_generates(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            stream = service.submit(Generate(PROMPT, GREEDY, "a"))
            pieces = [news async for news in stream]
            tokens = [token for news in pieces for token in news.token_ids]
            assert tokens == plain(loaded, PROMPT)
            assert "".join(news.text for news in pieces) == loaded.tokenizer.decode(tokens)
            last = pieces[-1]
            assert last.finish_reason is FinishReason.LENGTH
            assert last.metrics is not None
            assert last.metrics.num_cached_tokens == 0
            assert last.metrics.num_keyed_tokens == 80
            assert service.streams() == []

    run(test)


def test_samples_and_their_logprobs_are_told_apart(loaded: LoadedModel) -> None:
    async def test() -> None:
        params = SamplingParams(max_tokens=6, n=3, temperature=1.0, seed=1, logprobs=2, ignore_eos=True)
        async with serving(loaded) as service:
            samples = await service.submit(Generate(PROMPT, params, "a")).whole()
            assert [news.index for news in samples] == [0, 1, 2]
            assert all(len(news.logprobs) == len(news.token_ids) == 6 for news in samples)
            for news in samples:
                assert [one.token_id for one in news.logprobs] == news.token_ids

    run(test)


def test_a_first_token_is_told_before_those_of_requests_that_run(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            told: list[str] = []

            async def read(name: str, stream: Stream) -> None:
                async for _ in stream:
                    told.append(name)

            readers = [asyncio.create_task(read("running", service.submit(Generate(PROMPT, LONG, "running"))))]
            while not told:
                await asyncio.sleep(0.01)
            held, go_on = threading.Event(), threading.Event()

            def hold(engine: Engine) -> None:
                held.set()
                assert go_on.wait(30)

            holding = asyncio.create_task(service.call(hold))
            assert await asyncio.to_thread(held.wait, 30)
            await asyncio.sleep(0.05)  # what came before has been read
            readers.append(asyncio.create_task(read("new", service.submit(Generate(PROMPT[:8], GREEDY, "new")))))
            await asyncio.sleep(0.05)
            told.clear()
            go_on.set()
            while len(told) < 2:
                await asyncio.sleep(0.01)
            assert told[:2] == ["new", "running"]
            await holding
            for stream in service.streams():
                stream.abort()
            await asyncio.gather(*readers)

    run(test)


async def noted(service: EngineService, note: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each step noted before it begins."""

    def watch(engine: Engine) -> None:
        step = engine.step

        def noted_step() -> list[RequestOutput]:
            note()
            return step()

        monkeypatch.setattr(engine, "step", noted_step)

    await service.call(watch)


def test_the_next_step_lets_a_first_token_go_first(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwise.engine.service._STEP_SHARE", math.inf)
    monkeypatch.setattr("kvwise.engine.service._MOMENT_S", 30.0)

    async def test() -> None:
        async with serving(loaded) as service:
            seen: list[str] = []
            await noted(service, lambda: seen.append("step"), monkeypatch)
            for number in range(5):
                seen.clear()
                stream = service.submit(Generate(PROMPT[number : number + 40], GREEDY, f"{number}"))
                await stream.begun()
                seen.append("read")
                await stream.whole()
                assert seen.index("read") == 1
                assert seen.count("step") > 2

    run(test)


def test_steps_go_on_while_the_loop_is_busy(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            steps: list[None] = []
            await noted(service, lambda: steps.append(None), monkeypatch)
            stream = service.submit(Generate(PROMPT, GREEDY, "a"))
            give_up = time.monotonic() + 30
            while len(steps) < GREEDY.max_tokens and time.monotonic() < give_up:
                time.sleep(0.01)  # the loop stands still: nobody takes the first token
            assert len(steps) >= GREEDY.max_tokens
            await stream.whole()

    run(test)


def test_news_that_nobody_takes_are_merged(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            stream = service.submit(Generate(PROMPT, GREEDY, "a"))
            while not stream.ended:
                await asyncio.sleep(0.01)  # without a pause the engine would hardly get to run on a busy machine
            pieces = [news async for news in stream]
            assert len(pieces) == 1
            assert pieces[0].token_ids == plain(loaded, PROMPT)
            assert pieces[0].text == loaded.tokenizer.decode(pieces[0].token_ids)

    run(test)


def test_an_abort_frees_everything_in_any_phase(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            for num_news in range(4):
                streams = [service.submit(Generate([n, *PROMPT * 5], LONG, f"{num_news}-{n}")) for n in range(6)]
                news = aiter(streams[0])
                for _ in range(num_news):
                    await anext(news)
                for stream in streams:
                    stream.abort()
                for stream in streams:
                    (news,) = await stream.whole()
                    assert news.finish_reason is FinishReason.ABORT
                assert await held_blocks(service) == 0
            tokens = (await service.submit(Generate(PROMPT, GREEDY, "after")).whole())[0].token_ids
            assert tokens == plain(loaded, PROMPT)

    run(test)


def test_a_stream_that_nobody_reads_is_aborted(loaded: LoadedModel) -> None:
    async def test() -> None:
        clock = VirtualClock()
        async with serving(loaded, limits=ServiceLimits(slow_reader_s=5), clock=clock) as service:
            stream = service.submit(Generate(PROMPT, LONG, "a"))
            await stream.begun()
            clock.advance(6)
            (news,) = await _ended(stream)
            assert news.finish_reason is FinishReason.ABORT
            assert await held_blocks(service) == 0

    run(test)


async def _ended(stream: Any) -> list[Any]:
    while not stream.ended:
        await asyncio.sleep(0)
    return list(await stream.whole())


def test_no_more_wait_than_may(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded, limits=ServiceLimits(max_waiting=2)) as service:
            gate = asyncio.create_task(service.call(lambda engine: block.result()))
            streams = [service.submit(Generate([n, *PROMPT], GREEDY, f"{n}")) for n in range(2)]
            assert service.num_waiting == (2, 2 * 81)
            with pytest.raises(Overloaded, match="2 requests are waiting") as error:
                service.submit(Generate(PROMPT, GREEDY, "more"))
            assert 0.5 <= error.value.retry_after_s <= 60
            block.set_result(None)
            await gate
            for stream in streams:
                await stream.whole()
            assert service.num_waiting == (0, 0)
            await service.submit(Generate(PROMPT, GREEDY, "more")).whole()

        async with serving(loaded, limits=ServiceLimits(max_waiting_tokens=100)) as service:
            again.set_result(None)
            service.submit(Generate(PROMPT * 2, GREEDY, "a prompt alone may be as long as it likes"))

    block: Future[None] = Future()
    again: Future[None] = Future()
    run(test)


def test_what_can_never_be_served_is_refused_at_once(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            with pytest.raises(CapacityError):
                service.submit(Generate(PROMPT, SamplingParams(max_tokens=10**6), "a"))
            with pytest.raises(UsageError, match="not served here"):
                service.submit(Generate(PROMPT, GREEDY, "a", strategy="h2o"))
            stream = service.submit(Generate(PROMPT, GREEDY, "a"))
            with pytest.raises(UsageError, match="in use"):
                service.submit(Generate(PROMPT, GREEDY, "a"))
            await stream.whole()
            late = service.submit(Generate(PROMPT, GREEDY, "b", priority=3))
            with pytest.raises(UsageError, match="priority"):
                await late.whole()
            assert service.streams() == []

    run(test)


def test_each_strategy_has_its_engine(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded, "prefix", "streaming(budget=0.3)") as service:
            assert service.strategies == ["prefix", "streaming(budget=0.3)"]
            names = [None, "full+prefix", "streaming(budget=0.3)"]
            streams = [service.submit(Generate(PROMPT, GREEDY, f"{i}", strategy=n)) for i, n in enumerate(names)]
            ends = [(await stream.whole())[0].attestation for stream in streams]
            assert [end.strategy for end in ends] == ["prefix", "prefix", "streaming(budget=0.3)"]
            assert ends[2].tokens_dropped > 0

    run(test)


def test_the_strategy_is_switched_once_requests_have_ended(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            stream = service.submit(Generate(PROMPT, LONG, "a"))
            await stream.begun()
            with pytest.raises(RequestError, match="1 requests have not ended"):
                await service.switch(parse("h2o"), 0.0)
            assert service.strategies == ["prefix"]
            switching = asyncio.create_task(service.switch(parse("h2o"), 60))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="switching"):
                service.submit(Generate(PROMPT, GREEDY, "b"))
            stream.abort()
            await switching
            assert service.strategies == ["h2o"]
            assert service.health is State.READY
            (news,) = await service.submit(Generate(PROMPT, GREEDY, "c")).whole()
            assert news.attestation is not None
            assert news.attestation.strategy == "h2o"

    run(test)


def test_a_strategy_that_cannot_be_made_leaves_the_old_one(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            with pytest.raises(UsageError, match="trained"):
                await service.switch(parse("less"), 60)
            assert service.strategies == ["prefix"]
            assert (await service.submit(Generate(PROMPT, GREEDY, "a")).whole())[0].token_ids == plain(loaded, PROMPT)

    run(test)


def test_draining_waits_for_what_runs_and_aborts_what_does_not_end(loaded: LoadedModel) -> None:
    async def test() -> None:
        async with serving(loaded) as service:
            stream = service.submit(Generate(PROMPT, GREEDY, "a"))
            assert await service.drain(60)
            assert (await stream.whole())[0].finish_reason is FinishReason.LENGTH
            with pytest.raises(Unavailable, match="draining"):
                service.submit(Generate(PROMPT, GREEDY, "b"))
        async with serving(loaded) as service:
            stream = service.submit(Generate(PROMPT, LONG, "a"))
            assert not await service.drain(0.0)
            assert (await stream.whole())[0].finish_reason is FinishReason.ABORT

    run(test)


@pytest.mark.parametrize(("error", "health"), [(RuntimeError, State.READY), (InvariantError, State.BROKEN)])
def test_a_step_that_raises_fails_its_requests_and_no_more(
    loaded: LoadedModel, error: type[Exception], health: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(loaded, "prefix", "streaming(budget=0.3)") as service:
            other = service.submit(Generate(PROMPT, LONG, "other", strategy="streaming(budget=0.3)"))
            broken = await service.call(lambda engine: engine)
            real = broken._scheduler.schedule

            def fail() -> list[Any]:
                monkeypatch.setattr(broken._scheduler, "schedule", real)
                raise error("no")

            monkeypatch.setattr(broken._scheduler, "schedule", fail)
            (news,) = await service.submit(Generate(PROMPT, GREEDY, "a")).whole()
            assert news.finish_reason is FinishReason.ERROR
            assert news.error == f"{error.__name__}: no"
            assert service.health is health
            assert await held_blocks(service) == 0
            assert not other.ended

    run(test)


def test_a_step_that_hangs_is_noticed(loaded: LoadedModel) -> None:
    async def test() -> None:
        clock = VirtualClock()
        async with serving(loaded, limits=ServiceLimits(watchdog_s=10), clock=clock) as service:
            hang, hangs = asyncio.Event(), asyncio.Event()
            loop = asyncio.get_running_loop()

            engine = await service.call(lambda engine: engine)
            real = engine._scheduler.schedule

            def slow() -> Any:
                loop.call_soon_threadsafe(hangs.set)
                asyncio.run_coroutine_threadsafe(hang.wait(), loop).result()
                engine._scheduler.schedule = real
                return real()

            engine._scheduler.schedule = slow
            stream = service.submit(Generate(PROMPT, GREEDY, "a"))
            await hangs.wait()
            assert service.health is State.READY
            clock.advance(11)
            assert service.health is State.STUCK
            with pytest.raises(Unavailable, match="stuck"):
                service.submit(Generate(PROMPT, GREEDY, "b"))
            hang.set()
            assert (await stream.whole())[0].token_ids == plain(loaded, PROMPT)
            assert service.health is State.READY

    run(test)


def test_the_urgent_go_first(loaded: LoadedModel) -> None:
    async def test() -> None:
        config = EngineConfig(kv_cache_memory_bytes=2**24, max_num_seqs=1, scheduling_policy="priority", check=True)
        async with serving(loaded, config=config) as service:
            first = service.submit(Generate(PROMPT, LONG, "first"))
            await first.begun()
            order: list[str] = []

            async def end(name: str, priority: int) -> None:
                await service.submit(Generate(PROMPT, GREEDY, name, priority=priority)).whole()
                order.append(name)

            waiting = [asyncio.create_task(end(*each)) for each in (("b", 5), ("c", 1), ("d", 5), ("a", -2))]
            await asyncio.sleep(0)
            first.abort()
            await asyncio.gather(*waiting)
            assert order == ["a", "c", "b", "d"]

    run(test)


def test_only_what_may_be_shared_is(loaded: LoadedModel) -> None:
    async def test() -> None:
        async def cached(name: str, **given: Any) -> int:
            (news,) = await service.submit(Generate(PROMPT, GREEDY, name, **given)).whole()
            assert news.metrics is not None
            return news.metrics.num_cached_tokens

        async with serving(loaded) as service:
            assert await cached("a", num_shareable=40) == 0
            assert await cached("b") == 32
            assert await cached("c", num_shareable=0) == 0
            assert await cached("d") == 64
            assert await cached("e", cache_salt="x") == 0
            assert await cached("f", cache_salt="x") == 64
            assert await cached("g", cache_salt="y", tenant="t") == 0
            assert await cached("h", cache_salt="x", tenant="t") == 0

    run(test)
