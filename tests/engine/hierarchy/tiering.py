"""Tiers under an engine, for tests: where they lie, stores that misbehave when told to, steps that wait for loads."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kvwise.core.output import RequestOutput
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.hierarchy import Hierarchy
from kvwise.engine.hierarchy.loads import Loads
from kvwise.engine.hierarchy.tier import Tier
from kvwise.tiers.base import Buffer, ByteStore, Extent, Fault, FaultKind
from tests.engine.runs import require_empty, run
from tests.tiers.redis_server import shared_server

KINDS = ("memory", "host", "disk", "redis", "object")
WITHIN_S = 20.0  # everything that a test waits for comes much sooner, or the test fails

Answers = list[memoryview | Fault]
Alter = Callable[[Extent, memoryview | Fault], memoryview | Fault]


def tier_text(kind: str, folder: Path, size: str = "4MiB") -> str:
    """A tier of this kind, empty unless `folder` (or the test's redis-server) holds one already."""
    where = {"disk": f", path={folder / 'disk'}", "object": ", url=memory://"}
    if kind == "redis":
        where["redis"] = f", url={shared_server().url}"
    return f"{kind}(size={size}{where.get(kind, '')})"


def hierarchy_of(engine: Engine) -> Hierarchy:
    """What is below the engine's device."""
    assert engine.memory.hierarchy is not None
    return engine.memory.hierarchy


def loads_of(engine: Engine) -> Loads:
    """Its loads."""
    assert engine.memory.loads is not None
    return engine.memory.loads


def leave_device(engine: Engine) -> None:
    """Everything is written down, nothing is left on the device."""
    assert hierarchy_of(engine).flush(WITHIN_S)
    engine.memory.cache.clear()
    check(engine)


def store(engine: Engine, many: Sequence[Sequence[int]], params: Any, **more: Any) -> list[RequestOutput]:
    """Serve prompts whose KV is below afterwards, and nowhere else."""
    outputs = run(engine, many, params, **more)
    leave_device(engine)
    return outputs


def check(engine: Engine) -> None:
    """The books of the device and of every tier are exact."""
    engine.memory.cache.check()
    for tier in hierarchy_of(engine).tiers:
        with tier._lock:  # transfers may still be under way
            tier.index.check()


def require_idle(engine: Engine) -> None:
    """No request, no transfer and no load holds anything; every count is exact."""
    hierarchy = hierarchy_of(engine)
    assert hierarchy.flush(WITHIN_S)
    for load in list(loads_of(engine)._leaving):
        with load.news:
            assert load.news.wait_for(lambda load=load: load.is_over, WITHIN_S)
    loads_of(engine).advance()
    assert not len(loads_of(engine))
    assert not loads_of(engine)._leaving
    assert hierarchy.num_room == hierarchy._most_held
    assert all(not tier.index._holds for tier in hierarchy.tiers)
    check(engine)
    require_empty(engine)


class Patient:
    """A meter under which a step ends only when every load under way has brought something more, or has ended.

    So a load is never outrun by computing, and chunks come between any two steps.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._seen: dict[Any, int] = {}

    def charge(self, num_tokens: int, context: int, seconds: float) -> None:
        """Wait for all loads."""
        if self.engine is None:
            return
        for load in list(loads_of(self.engine)._loads.values()):
            seen = self._seen.get(load, 0)
            with load.news:
                load.news.wait_for(lambda load=load, seen=seen: load.is_over or load.num_bytes > seen, WITHIN_S)
                self._seen[load] = load.num_bytes


class Unruly:
    """A store before another one. `alter` may change each answer of a read; gates hold reads and writes up.

    `reading` and `writing` are set once a call waits at its gate. `refusal` answers every write, `outage` everything.
    """

    def __init__(self, inner: ByteStore) -> None:
        self.name = inner.name
        self.persistent = inner.persistent
        self.wipes = inner.wipes
        self.inner = inner
        self.alter: Alter | None = None
        self.refusal: Fault | None = None
        self.outage: Fault | None = None
        self.read_gate = threading.Event()
        self.write_gate = threading.Event()
        self.reading = threading.Event()
        self.writing = threading.Event()
        self.num_reads = 0
        self.read_gate.set()
        self.write_gate.set()

    def read(self, extents: Sequence[Extent]) -> Answers:
        self.num_reads += 1
        self._pass(self.read_gate, self.reading)
        if self.outage is not None:
            return [self.outage] * len(extents)
        alter = self.alter
        found = self.inner.read(extents)
        if alter is None:
            return found
        return [alter(extent, view) for extent, view in zip(extents, found, strict=True)]

    def write(self, records: Sequence[tuple[bytes, Sequence[Buffer]]]) -> list[Fault | None]:
        self._pass(self.write_gate, self.writing)
        refusal = self.outage or self.refusal
        return self.inner.write(records) if refusal is None else [refusal] * len(records)

    def _pass(self, gate: threading.Event, arrived: threading.Event) -> None:
        if not gate.is_set():
            arrived.set()
            assert gate.wait(WITHIN_S)

    def delete(self, keys: Sequence[bytes], *, wipe: bool = False) -> list[Fault | None]:
        if self.outage is not None:
            return [self.outage] * len(keys)
        return self.inner.delete(keys, wipe=wipe)

    def scan(self) -> Iterator[memoryview]:
        return self.inner.scan()

    def num_bytes(self) -> int:
        return self.inner.num_bytes()

    def close(self) -> None:
        self.read_gate.set()
        self.write_gate.set()
        self.inner.close()


def rig(engine: Engine, index: int = 0) -> Unruly:
    """Put a store that can misbehave before the store of a tier."""
    tier: Tier = hierarchy_of(engine).tiers[index]
    tier.store = Unruly(tier.store)
    return tier.store


def flipped(at: int) -> Alter:
    """Answers with one bit flipped, in byte `at` (counted from the end if below 0)."""

    def alter(extent: Extent, view: memoryview | Fault) -> memoryview | Fault:
        if isinstance(view, Fault) or not -len(view) <= at < len(view):
            return view
        data = bytearray(view)
        data[at] ^= 16
        return memoryview(data)

    return alter


def cut_to(length: int) -> Alter:
    """Answers that end after `length` bytes."""
    return lambda extent, view: view if isinstance(view, Fault) else view[:length]


def failing(fault: Fault) -> Alter:
    """The same fault for everything."""
    return lambda extent, view: fault


BROKEN = Fault(FaultKind.IO_ERROR, "the test says so")
