"""A fake server, and an event loop whose time passes only when everybody sleeps."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tests.study.client.fake_server import FakeServer


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting it moves the clock on."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio in virtual time."""

    def __init__(self) -> None:
        self.jumping = _JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


@pytest.fixture
def virtual() -> Iterator[Callable[[Callable[[Callable[[], float]], Coroutine[Any, Any, Any]]], Any]]:
    """`virtual(lambda now: coroutine)`: run to its end in virtual time, in no time."""
    loop = VirtualLoop()
    yield lambda make: loop.run_until_complete(make(loop.time))
    loop.close()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer().running() as fake:
        yield fake
