"""Three hundred clients leave, in all phases of their requests: the books stay exact and nothing of them is left."""

import asyncio
import logging
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kvwise.core.params import SamplingParams
from kvwise.core.tiering import parse_tier
from kvwise.engine.hierarchy.load import Load
from kvwise.engine.llm import LLM
from kvwise.models.loaded import LoadedModel
from kvwise.tiers.base import FaultKind
from tests.engine.hierarchy.tiering import Unruly, leave_device, rig
from tests.server.asgi import post
from tests.server.conftest import Served, make_server, serving
from tests.server.leaving import PATIENCE_S, Doors, Moment, Visit, require_quiet, tasks_besides
from tests.server.telling import read, until

STRATEGIES = ("prefix+cake(chunk=32)", "streaming(budget=0.5)+prefix+load", "int8+prefix+layerwise")
TIERS = ("host(size=512KiB)", "memory(size=4MiB)")
NUM_ABORTS, NUM_STAYING, NUM_AT_ONCE = 300, 50, 24
GREEDY = {"model": "tiny", "temperature": 0, "ignore_eos": True}
FRESH = list(range(50, 140))


def server(tiny: LoadedModel) -> Any:
    """Three strategies side by side, with little memory each, and tiers below."""
    return make_server(
        tiny, strategies=STRATEGIES, tiers=[parse_tier(one) for one in TIERS], kv_cache_memory_bytes=3 * 2**21,
        max_num_seqs=3, max_num_batched_tokens=48,
    )  # fmt: skip


def visits(dice: random.Random) -> Iterator[Visit]:
    """Those that leave and those that stay, in any order. Prompts begin alike, so that KV is found and loaded."""
    moments: list[Moment | None] = [list(Moment)[n % len(Moment)] for n in range(NUM_ABORTS)] + [None] * NUM_STAYING
    dice.shuffle(moments)
    common = [[dice.randrange(250) for _ in range(160)] for _ in range(12)]

    def prompt(moment: Moment | None) -> list[int]:
        long = moment in (Moment.LOADING, Moment.PREFILL)
        return dice.choice(common)[: 160 if long else dice.choice([3, 40, 100])] + [
            dice.randrange(250) for _ in range(9)
        ]

    for number, moment in enumerate(moments, 1):
        body: dict[str, Any] = {**GREEDY, "max_tokens": dice.randint(3, 12), "strategy": dice.choice(STRATEGIES)}
        if moment is not None:
            body |= {"stream": dice.random() < 0.6, "n": dice.choice([1, 1, 1, 3]), "temperature": dice.choice([0, 1])}
        if dice.random() < 0.3:
            body["session_id"] = f"talk-{dice.randrange(4)}"
        visit = Visit(number, moment, body, exact=dice.random() < 0.5, reset=dice.random() < 0.3)
        if moment is not None and dice.random() < 0.2:
            visit.path = "/v1/chat/completions"
            text = bytes(65 + token % 26 for token in prompt(moment)).decode()
            body["messages"] = [{"role": "user", "content": text}]
        else:
            several = moment is not None and dice.random() < 0.15
            body["prompt"] = [prompt(moment) for _ in range(3)] if several else prompt(moment)
        yield visit


def sessions(served: Served) -> list[Any]:
    """(name, keys, requests) of every session of every engine."""
    found = []
    for name in served.service.strategies:
        infos = served.on_loop(lambda name=name: served.service.call(lambda e: e.lifecycle.sessions(), name))
        found += [(name, info.session, info.num_keys, info.num_running) for info in infos]
    return found


def require_told(served: Served, num_left: int) -> None:
    """The figures say that some have left, and that nothing of them is left."""
    sums: Counter[str] = Counter()
    with httpx.Client(verify=False, trust_env=False, base_url=served.url) as client:

        def at_rest() -> bool:
            sums.clear()
            for name, value in read(client.get("/metrics").content).items():
                sums[name.partition("{")[0]] += value  # type: ignore[assignment]
            return sums["kvwise:num_requests_running"] == sums["kvwise:num_requests_waiting"] == 0

        asyncio.run(until(at_rest))  # the page may be half a second old
    assert sums["kvwise:request_disconnected_total"] >= num_left
    assert sums["kvwise:kv_leaked_blocks"] == 0


async def all_tasks() -> set[Any]:
    """Those of the server without requests."""
    return asyncio.all_tasks()


def require_right(tiny: LoadedModel, answers: list[tuple[Visit, Any]]) -> None:
    """Those that stayed got what they would have got alone."""
    assert len(answers) >= 10
    with LLM(tiny, "full", kv_cache_memory_bytes=2**22) as llm:
        for visit, answer in answers:
            params = SamplingParams(max_tokens=visit.body["max_tokens"], ignore_eos=True)
            assert answer["choices"][0]["text"] == llm.generate([visit.body["prompt"]], params)[0].text


def require_right_after(tiny: LoadedModel, served: Served) -> None:
    """The next greedy answer under each strategy is that of a clean engine."""
    for strategy in STRATEGIES:
        body = GREEDY | {"prompt": FRESH, "max_tokens": 20, "strategy": strategy}
        answer = post(served.url + "/v1/completions", body).json()
        tiers = [parse_tier(one) for one in TIERS]
        with LLM(tiny, strategy, kv_cache_memory_bytes=2**21, tiers=tiers) as llm:
            (expected,) = llm.generate([FRESH], SamplingParams(max_tokens=20, ignore_eos=True))
        assert answer["choices"][0]["text"] == expected.text


# -- F27: leaving while KV is being loaded ------------------------------------------------------------------------

STORED = list(range(100, 250))
NUM_BLOCKS = (len(STORED) - 1) // 16


@pytest.fixture
def loading(tiny: LoadedModel) -> Iterator[tuple[Served, Unruly]]:
    """A server whose tier holds STORED, which the device does not, and answers only once its gate is open."""
    held = make_server(
        tiny, strategies=("prefix+load",), tiers=[parse_tier("memory(size=4MiB)")], max_num_seqs=8,
        max_num_batched_tokens=48, tier_deadline_s=0.2, kv_cache_memory_bytes=2**21,
    )  # fmt: skip
    with serving(held) as served:
        assert post(served.url + "/v1/completions", GREEDY | {"prompt": STORED, "max_tokens": 4}).status_code == 200
        served.on_loop(lambda: served.service.call(leave_device))
        unruly = served.on_loop(lambda: served.service.call(rig))
        unruly.read_gate.clear()
        yield served, unruly


def leave_while_loading(served: Served, unruly: Unruly, *, stream: bool) -> None:
    """A client comes, and goes when its load has begun."""
    doors = Doors(served)
    body = GREEDY | {"prompt": STORED, "max_tokens": 4, "stream": stream}
    visit = Visit(1, Moment.LOADING, body, exact=True)
    doors.let_in(visit, served.port)
    doors.wait_for_room(1)
    assert visit.left_at is Moment.LOADING
    assert unruly.reading.wait(PATIENCE_S)


def num_referenced(served: Served) -> int:
    """Blocks that something holds."""

    def look(engine: Any) -> int:
        engine.memory.cache.check()
        return int(engine.memory.cache.usage().num_referenced)

    return served.on_loop(lambda: served.service.call(look))


def require_answer(tiny: LoadedModel, served: Served, prompt: list[int]) -> None:
    answer = post(served.url + "/v1/completions", GREEDY | {"prompt": prompt, "max_tokens": 4}).json()
    with LLM(tiny, "full", kv_cache_memory_bytes=2**22) as llm:
        (expected,) = llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
    assert answer["choices"][0]["text"] == expected.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_load_that_ends_after_its_client_has_left_frees_its_blocks_once(
    tiny: LoadedModel, loading: tuple[Served, Unruly], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Nor does it help to be told twice that it has ended."""
    served, unruly = loading
    end = Load.end

    def twice(self: Load) -> None:
        end(self)
        end(self)

    monkeypatch.setattr(Load, "end", twice)
    leave_while_loading(served, unruly, stream=stream)
    require_answer(tiny, served, FRESH)  # others go on meanwhile
    assert num_referenced(served) == NUM_BLOCKS
    unruly.read_gate.set()
    require_quiet(served)
    require_answer(tiny, served, STORED)
    require_quiet(served)


def test_a_load_that_never_ends_keeps_its_blocks_and_nobody_waits_for_it(
    tiny: LoadedModel, loading: tuple[Served, Unruly]
) -> None:
    served, unruly = loading
    leave_while_loading(served, unruly, stream=True)
    for _ in range(2):
        require_answer(tiny, served, STORED)  # the tier hangs: it is computed
        require_answer(tiny, served, FRESH)
    assert served.service.streams() == []
    assert served.on_loop(lambda: served.service.call(lambda e: len(e.memory.loads._leaving))) >= 1
    assert num_referenced(served) % NUM_BLOCKS == 0
    require_told(served, num_left=1)
    unruly.read_gate.set()
    require_quiet(served)


# -- the storm ----------------------------------------------------------------------------------------------------


def test_a_storm_of_clients_that_leave(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    with serving(server(tiny)) as served:
        idle = served.on_loop(all_tasks)
        doors = Doors(served)
        everybody = list(visits(random.Random(11)))
        for visit in everybody:
            doors.wait_for_room(NUM_AT_ONCE)
            doors.let_in(visit, served.port)
        doors.wait_for_room(1)
        staying = [visit for visit in everybody if visit.moment is None]
        answers = [(visit, *visit.answer()) for visit in staying]

        assert doors.faults == []
        assert served.on_loop(lambda: tasks_besides(idle)) == set()
        assert served.service.streams() == []
        require_quiet(served)
        assert all(quota.num_running == 0 for quota in served.server.tenants._quotas.values())
        counts = doors.counts()
        assert sum(counts.values()) == NUM_ABORTS
        assert min(counts[moment] for moment in Moment) >= 10, counts
        assert {status for _, status, _ in answers} == {200}
        require_right(tiny, [(v, a) for v, _, a in answers if v.body["strategy"] == STRATEGIES[0]])

        before = sessions(served)
        assert {name for _, name, _, _ in before} >= {f"talk-{n}" for n in range(4)}
        require_right_after(tiny, served)
        assert sessions(served) == before  # nothing of those that left goes on growing
        require_told(served, num_left=NUM_ABORTS // 3)
    # A tier may say, once, that a record has left between look-up and read: that is a miss like others. Nothing else.
    told = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert [line for line in told if not re.match(rf"tier \w+: {FaultKind.MISSING}\b", line)] == []
