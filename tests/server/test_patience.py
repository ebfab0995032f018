"""A deadline for each of many waits: as strict as a timer for each would be."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

import pytest

from kvwise.server.api.deadline import Patience


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_a_wait_ends_when_its_time_is_over_and_so_does_the_next() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        with closing(Patience(0.05)) as patience:
            for _ in range(3):
                began = loop.time()
                with pytest.raises(TimeoutError), patience:
                    await asyncio.sleep(10)
                assert 0.05 <= loop.time() - began < 5
            task = asyncio.current_task()
            assert task is not None
            assert not task.cancelling()

    run(test)


def test_each_wait_has_the_whole_time() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        with closing(Patience(0.2)) as patience:
            for _ in range(3):  # longer than the deadline in all, each one shorter
                with patience:
                    await asyncio.sleep(0.12)
            began = loop.time()
            with pytest.raises(TimeoutError), patience:
                await asyncio.sleep(10)
            assert loop.time() - began >= 0.2

    run(test)


def test_time_between_two_waits_does_not_count() -> None:
    async def test() -> None:
        with closing(Patience(0.05)) as patience:
            with patience:
                pass
            await asyncio.sleep(0.15)
            with patience:
                await asyncio.sleep(0.01)

    run(test)


def test_many_waits_have_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        loop, timers = asyncio.get_running_loop(), []
        call_at = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda *args, **more: timers.append(args[0]) or call_at(*args, **more))
        with closing(Patience(30)) as patience:
            for _ in range(100):
                with patience:
                    await asyncio.sleep(0)
        assert len(timers) == 1

    run(test)


@pytest.mark.parametrize("seconds", [None, 30.0])
def test_a_cancellation_by_others_stays_one(seconds: float | None) -> None:
    async def test() -> None:
        waiting = asyncio.create_task(_wait(seconds))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(test)


def test_so_does_one_that_comes_with_the_end_of_the_time() -> None:
    async def test() -> None:
        waiting = asyncio.create_task(_wait(0.02))
        await asyncio.sleep(0)
        time.sleep(0.05)  # the loop sees both at once
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert waiting.cancelling() == 1

    run(test)


async def _wait(seconds: float | None) -> None:
    with closing(Patience(seconds)) as patience, patience:
        await asyncio.sleep(10)


def test_without_a_deadline_nothing_ends_a_wait() -> None:
    async def test() -> None:
        with closing(Patience(None)) as patience, patience:
            await asyncio.sleep(0.05)

    run(test)


def test_no_timer_is_left_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        loop, timers = asyncio.get_running_loop(), []
        call_at = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda *args: timers.append(call_at(*args)) or timers[-1])
        with closing(Patience(30)) as patience, patience:
            pass
        assert [timer.cancelled() for timer in timers] == [True]

    run(test)
