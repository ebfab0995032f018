"""Clients that leave at a chosen moment of their request, seen from within the engine, and what is left of them."""

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from tests.engine.runs import require_empty
from tests.server.conftest import Served

PATIENCE_S = 30  # until a test that waits for something that never comes gives up


class Moment(IntEnum):
    """When a client leaves, in the order in which they come."""

    HEAD = 0  # in the midst of the head
    NO_BODY = 1  # the head is sent, nothing of the body
    HALF_BODY = 2
    SENT = 3  # at once, wherever the server is by then
    QUEUED = 4
    LOADING = 5
    PREFILL = 6  # some of its chunks are computed
    FIRST = 7  # with the first token
    DECODE = 8
    END = 9  # with the last token of some sample, before anybody has heard of it


@dataclass(slots=True)
class Visit:
    """One client. `exact`: the engine stands still until the server has noticed that it left."""

    number: int  # the request's seed, by which the engine's side knows it
    moment: Moment | None  # None: it stays
    body: dict[str, Any]
    path: str = "/v1/completions"
    exact: bool = False
    reset: bool = False  # the connection is reset, not closed
    left_at: Moment | None = None
    port: int = 0
    _socket: socket.socket | None = field(default=None, repr=False)

    def come(self, port: int) -> None:
        """Connect and send, as much as it wants."""
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        data = json.dumps(self.body | {"seed": self.number}).encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        ).encode()
        parts = {
            Moment.HEAD: head[: len(head) // 2],
            Moment.NO_BODY: head,
            Moment.HALF_BODY: head + data[: len(data) // 2],
        }
        whole = head + data
        self._socket.sendall(whole if self.moment is None else parts.get(self.moment, whole))
        if self.moment is not None and self.moment <= Moment.SENT:
            self.leave(self.moment)

    def leave(self, at: Moment) -> None:
        """Go, on any thread."""
        assert self._socket is not None
        self.left_at = at
        if self.reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def answer(self) -> tuple[int, Any]:
        """Status and document of the answer, of one that stays."""
        assert self._socket is not None
        with self._socket, self._socket.makefile("rb") as file:
            head, _, body = file.read().partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


class Doors:
    """Sees after each step of the engines who is where it wants to leave, and lets it go."""

    def __init__(self, served: Served) -> None:
        self.faults: list[str] = []  # what was wrong
        self.visits: dict[int, Visit] = {}
        self._service = served.service
        self._of: dict[str, Visit] = {}  # by the engine's request id
        self._aborted: set[str] = set()
        self._gone: dict[str, Visit] = {}  # must be without memory before the next step
        self._news = threading.Condition()
        self._watch_aborts()
        for lane in self._service._thread.lanes.values():
            self._watch_steps(lane.engine)

    def let_in(self, visit: Visit, port: int) -> None:
        """A client comes."""
        self.visits[visit.number] = visit
        visit.come(port)

    def wait_for_room(self, most: int) -> None:
        """Until fewer than `most` of those that want to leave are still there."""
        with self._news:
            assert self._news.wait_for(lambda: sum(_is_here(v) for v in self.visits.values()) < most, PATIENCE_S)

    def counts(self) -> Counter[Moment]:
        """How many have left at each moment."""
        return Counter(visit.left_at for visit in self.visits.values() if visit.left_at is not None)

    def _watch_aborts(self) -> None:
        abort = self._service._abort

        def noted(stream: Any) -> None:
            abort(stream)
            with self._news:
                self._aborted.add(stream.request_id)
                self._news.notify_all()

        self._service._abort = noted  # type: ignore[method-assign]

    def _watch_steps(self, engine: Engine) -> None:
        step = engine.step

        def watched() -> Any:
            self._require_gone(engine)
            outputs = step()
            ended = {output.request_id for output in outputs if output.finished}
            for name in ended:
                self._see(engine, name, Moment.END)
            for name, sequences in engine._requests.items():
                self._of.setdefault(name, self.visits.get(sequences[0].params.seed or 0))  # type: ignore[arg-type]
                if name not in ended:
                    self._see(engine, name, moment_of(engine, name))
            return outputs

        engine.step = watched  # type: ignore[method-assign]

    def _see(self, engine: Engine, name: str, now: Moment) -> None:
        visit = self._of.get(name)
        if visit is None or visit.moment is None or visit.left_at is not None or now < visit.moment:
            return
        if now is Moment.DECODE and engine._requests[name][0].num_outputs < 2 + visit.number % 4:
            return
        visit.leave(now)
        names = [other for other, whose in self._of.items() if whose is visit]
        with self._news:
            self._news.notify_all()
            if visit.exact and not self._news.wait_for(lambda: all(map(self._is_noticed, names)), PATIENCE_S):
                self.faults.append(f"nobody noticed that {visit} left")
            self._gone |= {other: visit for other in names if visit.exact}

    def _is_noticed(self, name: str) -> bool:
        stream = self._service._streams.get(name)
        return name in self._aborted or stream is None or stream[1].ended

    def _require_gone(self, engine: Engine) -> None:
        """A step begins: whoever had left before the last one ended holds nothing."""
        for name, visit in self._gone.items():
            held = [s for s in engine._requests.get(name, []) if s.row is not None or s in engine._scheduler.waiting]
            if held:
                self.faults.append(f"{visit} holds memory a step after it left")


def _is_here(visit: Visit) -> bool:
    return visit.moment is not None and visit.left_at is None


def moment_of(engine: Engine, name: str) -> Moment:
    """Where a request is between two steps."""
    first = engine._requests[name][0]
    if first.phase is Phase.FINISHED:
        return Moment.END
    if first.num_outputs:
        return Moment.FIRST if first.num_outputs == 1 else Moment.DECODE
    if first.phase is Phase.WAITING:
        return Moment.QUEUED
    loads = engine.memory.loads
    return Moment.LOADING if loads is not None and loads.of(first) is not None else Moment.PREFILL


async def tasks_besides(known: Sequence[Any]) -> set[Any]:
    """Tasks of the loop beside those known, once they have had all the time they may need to end."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while left := asyncio.all_tasks() - set(known) - {asyncio.current_task()}:
                await asyncio.sleep(0.001)
    except TimeoutError:
        return left
    return set()


def require_quiet(served: Served) -> None:
    """No request and no transfer of any engine holds anything, and every count is exact."""
    for lane in served.service._thread.lanes.values():
        served.on_loop(lambda name=lane.name: served.service.call(_require_quiet, name))
        assert lane._told == {}
        assert lane.num_waiting == (0, 0)


def _require_quiet(engine: Engine) -> None:
    assert not engine._requests
    assert engine.lifecycle.registry._requests == {}
    assert all(info.num_running == 0 for info in engine.lifecycle.sessions())
    engine.idle()
    loads, hierarchy = engine.memory.loads, engine.memory.hierarchy
    if loads is not None and hierarchy is not None:
        for load in list(loads._leaving):
            with load.news:
                assert load.news.wait_for(lambda load=load: load.is_over, PATIENCE_S)
        loads.advance()
        assert hierarchy.flush(PATIENCE_S)  # what was loaded may be on its way to a faster tier
        assert not len(loads)
        assert not loads._leaving
        for tier in hierarchy.tiers:
            assert not tier.index._holds
            tier.index.check()
    engine.memory.cache.check()
    require_empty(engine)
