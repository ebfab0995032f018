"""The live view: who may watch and what they see, pictures shared by all, changes that add up, no text of requests."""

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.params import SamplingParams
from kvwise.core.tiering import parse_tier
from kvwise.engine.service import Generate
from kvwise.engine.serving import Moved
from kvwise.methods.catalogue import parse
from kvwise.server.context import Server
from kvwise.server.errors import ApiError
from kvwise.server.live import feed as live_feed
from kvwise.server.live import routes as live
from kvwise.server.live.feed import BYE, MOST_VIEWERS, Feed
from kvwise.server.live.figures import BIN_S, NUM_BINS, LiveFigures
from kvwise.server.live.look import holders
from kvwise.server.live.map import encode, encode_change
from kvwise.server.live.routes import _FILES, FeedAnswer
from kvwise.server.live.snapshot import Rates, ended, misses
from kvwise.server.tenancy.keys_edit import add_key
from tests.server.asgi import PATIENCE_S, pace
from tests.server.conftest import MODEL, Served
from tests.server.telling import a_record, ask, some_metrics, started

Make = Callable[..., Server]
SECRET = "nobody but me may read this sentence, "
PROMPT = SECRET * 3
ADMIN_KEY = "the-key-of-the-administration-1234"


def decode(runs: str, before: np.ndarray | None, number: int) -> np.ndarray:
    """As the page does."""
    held, at = np.zeros(number, np.uint8) if before is None else before.copy(), 0
    for letter, count in re.findall(r"([a-h.])(\d*)", runs):
        length = int(count or 1)
        if letter != ".":
            held[at : at + length] = ord(letter) - ord("a")
        at += length
    assert at == number
    return held


def parsed(event: bytes) -> tuple[str, dict[str, Any]]:
    """Kind and data of an event."""
    head, _, rest = event.decode().partition("\n")
    return head.removeprefix("event: "), json.loads(rest.partition("data: ")[2])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "TICK_S", 0.005)


def feed_of(server: Server) -> Feed:
    figures = LiveFigures(server.service.clock, {one.name: one.id for one in server.tenants.tenants})
    server.observers.append(figures)
    return Feed(server, figures)


async def first_event(url: str, headers: dict[str, str] | None = None) -> tuple[str, dict[str, Any]]:
    async with httpx.AsyncClient() as client, client.stream("GET", f"{url}/live/events", headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = ""
        async for part in answer.aiter_text():
            text += part
            if "\n\n" in text:
                return parsed(text.partition("\n\n")[0].encode())
    raise AssertionError("the feed ended")


# -- the map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_maps_and_changes_come_back_as_they_were(seed: int) -> None:
    draw = np.random.default_rng(seed)
    before = np.repeat(draw.integers(0, 8, 400), draw.integers(1, 9, 400)).astype(np.uint8)
    after = before.copy()
    after[draw.integers(0, len(after), 30)] = draw.integers(0, 8, 30)
    assert np.array_equal(decode(encode(before), None, len(before)), before)
    assert np.array_equal(decode(encode_change(before, after), before, len(before)), after)
    assert encode_change(before, before.copy()) == ""


def test_a_large_pool_costs_little() -> None:
    number = 100_000
    held = np.zeros(number, np.uint8)
    assert encode(held) == f"a{number}"
    after = held.copy()
    after[500:520] = 4
    assert encode_change(held, after) == f".500e20.{number - 520}"
    noise = np.random.default_rng(0).integers(0, 8, number).astype(np.uint8)
    assert len(encode(noise)) <= number
    assert np.array_equal(decode(encode(noise), None, number), noise)


# -- the page ---------------------------------------------------------------------------------------------------


def test_the_page_is_open_and_needs_nothing_from_elsewhere(serve_http: Callable[..., Served]) -> None:
    served = serve_http(api_keys=["sk-one"])
    for name in _FILES:
        answer = httpx.get(served.url + ("/" if name == "live.html" else f"/live/{name}"))
        assert answer.status_code == 200, name
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", answer.text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
    html = files("kvwise.server.live").joinpath("live.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    script = "".join(files("kvwise.server.live").joinpath(name).read_text() for name in _FILES if name.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage.*key\b", script)


def test_without_the_live_view_there_is_nothing(serve_http: Callable[..., Served]) -> None:
    served = serve_http(settings={"live": False})
    for path in ("/", "/live/live.js", "/live/events", "/live/blocks"):
        assert httpx.get(served.url + path).status_code == 404


# -- who may watch ----------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Any) -> dict[str, Any]:
    """Settings with two tenants, and their keys."""
    file = tmp_path / "keys.toml"
    return {"file": file, "a": add_key(file, "acme"), "b": add_key(file, "bolt")}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_feed_asks_for_the_key_there_is(serve_http: Callable[..., Served], keys: Any, tmp_path: Any) -> None:
    admin = tmp_path / "admin"
    admin.write_text(ADMIN_KEY)
    admin.chmod(0o600)
    with_admin = serve_http(settings={"keys_file": keys["file"], "admin_key_file": admin})
    for headers in ({}, bearer("wrong"), bearer(keys["a"])):
        answer = httpx.get(with_admin.url + "/live/events", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert asyncio.run(first_event(with_admin.url, bearer(ADMIN_KEY)))[0] == "whole"
    with_keys = serve_http(settings={"keys_file": keys["file"]})
    assert httpx.get(with_keys.url + "/live/events").status_code == 401
    assert asyncio.run(first_event(with_keys.url, bearer(keys["b"])))[0] == "whole"
    assert asyncio.run(first_event(serve_http().url))[1]["state"] == "ready"


def test_a_tenant_sees_its_own_requests_only(serve_http: Callable[..., Served], keys: Any) -> None:
    served = serve_http(settings={"keys_file": keys["file"]})
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
    for key in ("a", "b", "b"):
        answer = httpx.post(served.url + "/v1/completions", json=body, headers=bearer(keys[key]), timeout=60)
        assert answer.status_code == 200
    _, mine = asyncio.run(first_event(served.url, bearer(keys["a"])))
    _, theirs = asyncio.run(first_event(served.url, bearer(keys["b"])))
    assert [one["tenant"] for one in mine["recent"]] == ["acme"]
    assert [one["tenant"] for one in theirs["recent"]] == ["bolt", "bolt"]
    assert theirs["recent"][0]["cached"] > 0
    assert mine["recent"][0]["cached"] == 0


def test_running_requests_of_others_are_only_counted(make: Make, keys: Any, quick: None) -> None:
    async def main() -> None:
        server = make(settings={"keys_file": keys["file"]})
        ids = [tenant.id for tenant in server.tenants.tenants]
        async with started(server) as service:
            steps = await pace(server)
            feed = feed_of(server)
            for number, tenant in enumerate(ids):
                service.submit(Generate(list(range(40)), SamplingParams(max_tokens=8), f"r{number}", tenant=tenant))
            told = []
            for audience in (ids[0], None):
                viewer = feed.join(audience)
                events = viewer.events(PATIENCE_S)
                _, data = parsed(await anext(events))
                told.append(([row["tenant"] for row in data["requests"]], data["counts"]["others"]))
                await events.aclose()
                feed.leave(viewer)
            steps.allow(10**9)
            assert told == [(["acme"], 1), (["acme", "bolt"], 0)]

    asyncio.run(main())


# -- the feed ---------------------------------------------------------------------------------------------------


def test_viewers_share_pictures_and_none_are_made_without_them(make: Make, quick: None) -> None:
    async def main() -> None:
        server = make()
        async with started(server):
            feed = feed_of(server)
            assert feed.num_made == 0
            viewers = [feed.join(None) for _ in range(3)]
            readers = [one.events(PATIENCE_S) for one in viewers]
            seen = []
            for _ in range(4):
                seen.append({await anext(reader) for reader in readers})
            assert all(len(events) == 1 for events in seen)  # the very same bytes
            assert feed.num_made == 4
            assert "kvwise-live" in {task.get_name() for task in asyncio.all_tasks()}
            for reader, viewer in zip(readers, viewers, strict=True):
                await reader.aclose()
                feed.leave(viewer)
            made = feed.num_made
            for _ in range(50):
                await server.service.call(lambda engine: None)
            assert feed.num_made == made
            assert feed.num_viewers == 0
            assert "kvwise-live" not in {task.get_name() for task in asyncio.all_tasks()}

    asyncio.run(main())


def test_changes_add_up_to_the_whole(make: Make, quick: None) -> None:
    async def main() -> None:
        server = make(strategies=("full+prefix", "h2o(budget=0.5)"))
        async with started(server), asyncio.timeout(PATIENCE_S):
            feed = feed_of(server)
            viewer = feed.join(None)
            events = viewer.events(PATIENCE_S)
            kind, known = parsed(await anext(events))
            assert kind == "whole"
            maps = {name: decode(runs, None, n) for name, (n, runs) in known["maps"].items()}
            assert set(maps) == {"prefix", "h2o(budget=0.5)"}
            asked = asyncio.create_task(ask(server, list(range(1, 100)), strategy="prefix"))
            first = {name: held.copy() for name, held in maps.items()}
            while not asked.done() or np.array_equal(maps["prefix"], first["prefix"]):
                kind, news = parsed(await anext(events))
                assert kind == "change"
                for name, (n, runs) in news.pop("maps", {}).items():
                    maps[name] = decode(runs, maps[name], n)
                known |= news
            await asked
            other = feed.join(None)
            kind, whole = parsed(feed.next_for(other) or b"")
            assert kind == "whole"
            while viewer.seen < other.seen:
                _, news = parsed(await anext(events))
                for name, (n, runs) in news.pop("maps", {}).items():
                    maps[name] = decode(runs, maps[name], n)
                known |= news
            for name, (n, runs) in whole.pop("maps").items():
                assert np.array_equal(maps[name], decode(runs, None, n))
            for section in ("state", "strategies", "engines", "requests", "counts", "recent", "about", "now"):
                assert known[section] == whole[section]
            feed.leave(viewer)
            feed.leave(other)
            await events.aclose()

    asyncio.run(main())


def test_who_is_late_gets_a_whole_picture(make: Make, quick: None) -> None:
    async def main() -> None:
        async with started(server := make()):
            feed = feed_of(server)
            slow, fast = feed.join(None), feed.join(None)
            events = fast.events(PATIENCE_S)
            kinds = [parsed(await anext(events))[0], parsed(feed.next_for(slow) or b"")[0]]
            for _ in range(3):
                await anext(events)
            kinds.append(parsed(feed.next_for(slow) or b"")[0])
            assert kinds == ["whole", "whole", "whole"]
            feed.leave(slow)
            feed.leave(fast)
            await events.aclose()

    asyncio.run(main())


def test_viewers_are_bounded(make: Make) -> None:
    async def main() -> None:
        async with started(server := make()):
            feed = feed_of(server)
            viewers = [feed.join(None) for _ in range(MOST_VIEWERS)]
            with pytest.raises(ApiError) as refused:
                feed.join(None)
            assert refused.value.status == 503
            assert refused.value.headers["Retry-After"]
            feed.leave(viewers.pop())
            feed.leave(feed.join(None))
            for viewer in viewers:
                feed.leave(viewer)

    asyncio.run(main())


def test_a_viewer_that_reads_nothing_is_dropped(make: Make, quick: None) -> None:
    async def main() -> None:
        async with started(server := make()):
            feed = feed_of(server)
            never = asyncio.Event()

            async def send(message: Any) -> None:
                if message["type"] == "http.response.body":
                    await never.wait()

            async def receive() -> Any:
                await never.wait()

            async with asyncio.timeout(PATIENCE_S):
                await FeedAnswer(feed, None, 1.0, 0.02)({"type": "http"}, receive, send)
            assert feed.num_viewers == 0

    asyncio.run(main())


def test_who_leaves_is_noticed(make: Make, quick: None) -> None:
    async def main() -> None:
        async with started(server := make()):
            feed = feed_of(server)
            sent, left = asyncio.Event(), asyncio.Event()

            async def send(message: Any) -> None:
                if message.get("body"):
                    sent.set()

            async def receive() -> Any:
                await left.wait()
                return {"type": "http.disconnect"}

            answer = asyncio.create_task(FeedAnswer(feed, None, 1.0, 1.0)({"type": "http"}, receive, send))
            async with asyncio.timeout(PATIENCE_S):
                await sent.wait()
                assert feed.num_viewers == 1
                left.set()
                await answer
            assert feed.num_viewers == 0

    asyncio.run(main())


def test_it_tells_of_a_switch_of_a_drain_and_of_the_end(make: Make, quick: None) -> None:
    async def main() -> None:
        server = make()
        async with started(server) as service:
            feed = feed_of(server)
            viewer = feed.join(None)
            events = viewer.events(PATIENCE_S)

            async def until(holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
                async with asyncio.timeout(PATIENCE_S):
                    while True:
                        _, news = parsed(await anext(events))
                        if holds(news):
                            return news

            await until(lambda news: "maps" in news)
            await service.switch(parse("h2o(budget=0.5)"), 5)
            assert await until(lambda news: news.get("strategies") == ["h2o(budget=0.5)"])
            assert await service.drain(5)
            assert await until(lambda news: news.get("state") == "draining")
            await service.close()
            async with asyncio.timeout(PATIENCE_S):
                last = [event async for event in events]
            assert last[-1] == BYE
            feed.leave(viewer)

    asyncio.run(main())


def test_an_engine_that_hangs_does_not_stop_the_pictures(make: Make, quick: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(live_feed, "_LOOK_S", 0.005)

    async def main() -> None:
        server = make()
        async with started(server) as service:
            steps = await pace(server)
            service.submit(Generate(list(range(40)), SamplingParams(max_tokens=4), "hung"))
            feed = feed_of(server)
            viewer = feed.join(None)
            events = viewer.events(PATIENCE_S)
            async with asyncio.timeout(PATIENCE_S):
                _, data = parsed(await anext(events))
                for _ in range(3):
                    await anext(events)
            feed.leave(viewer)
            await events.aclose()
            steps.allow(10**9)
            assert [row["id"] for row in data["requests"]] == ["hung"]

    asyncio.run(main())


# -- what it never says -----------------------------------------------------------------------------------------


def test_no_text_no_salt_and_no_key_is_in_the_feed(serve_http: Callable[..., Served], keys: Any) -> None:
    served = serve_http(settings={"keys_file": keys["file"], "log_prompts": True})
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "user": "user-77", "session_id": "session-88"}
    answer = httpx.post(served.url + "/v1/completions", json=body, headers=bearer(keys["a"]), timeout=60).json()
    _, data = asyncio.run(first_event(served.url, bearer(keys["a"])))
    text = json.dumps(data)
    assert [one["id"] for one in data["recent"]] == [answer["id"]]  # as it begins with while it runs
    forbidden = [SECRET.strip(), keys["a"], "user-77", "session-88", answer["choices"][0]["text"]]
    forbidden += [tenant.id for tenant in served.server.tenants.tenants]
    assert [one for one in forbidden if one in text] == []


def test_what_others_have_stored_is_no_reason() -> None:
    assert misses({"other salt": 2, "never stored": 3, "evicted": 1, "expired": 0}) == {"never stored": 5, "evicted": 1}
    figures = LiveFigures(VirtualClock(), {"acme": "x"})
    figures.ended(a_record(metrics=[some_metrics(miss="block 3: other salt at 4.000 s")]))
    figures.ended(a_record(metrics=[some_metrics(miss="block 3: evicted by lru at 4.000 s")]))
    assert [ended(one, 4)["miss"] for one in figures.ended_ones] == ["never stored", "evicted"]


# -- figures ----------------------------------------------------------------------------------------------------


def test_times_and_speeds_of_the_last_minutes() -> None:
    clock = VirtualClock()
    clock.advance(1000.0)
    figures = LiveFigures(clock, {})
    for _ in range(20):
        record = a_record(arrival=clock.now(), num_prompt=100, num_cached=60)
        clock.advance(0.4)
        figures.tokens(record, 1, clock.now())
        clock.advance(0.05)
        figures.tokens(record, 1, clock.now())
        figures.ended(record)
    now = figures.bins.now()
    assert now["ttft"] == pytest.approx([0.4, 0.4], rel=0.06)
    assert now["tpot"] == pytest.approx([0.05, 0.05], rel=0.06)
    assert now["hit_ratio"] == 0.6
    assert now["ended"] == 20
    assert now["output_per_s"] == pytest.approx(2 / 0.45, rel=0.15)
    figures.ended(a_record(strategy="", error="overloaded", status=429))
    assert figures.bins.now()["refused"] == 1
    assert len(figures.ended_ones) == 20
    clock.advance(NUM_BINS * BIN_S)
    figures.bins.advance(clock.now())
    assert figures.bins.now()["ttft"] == [None, None]
    assert len(figures.bins.rows(0)) == NUM_BINS - 1
    assert all(row[0] is None and row[4] == 0 for row in figures.bins.rows(0))


def test_whole_answers_tell_the_engines_times() -> None:
    figures = LiveFigures(clock := VirtualClock(), {})
    clock.advance(12.0)
    record = a_record(streams=False)
    figures.tokens(record, 3, clock.now())
    figures.ended(record)
    now = figures.bins.now()
    assert now["ttft"][0] == pytest.approx(0.5, rel=0.06)
    assert now["tpot"][0] == pytest.approx(0.75, rel=0.06)


def test_bandwidth_is_that_of_the_last_snapshots(make: Make) -> None:
    (snapshot,) = make().service.snapshots
    rates = Rates()
    rates.note([replace(snapshot, at=10.0, moved={"host": Moved(100, 0)})])
    rates.note([replace(snapshot, at=12.0, moved={"host": Moved(2100, 500)})])
    assert rates.of("prefix", "host") == (1000.0, 250.0)
    assert rates.of("prefix", "disk") == (0.0, 0.0)


def test_who_holds_a_block(make: Make) -> None:
    def work(engine: Any) -> tuple[list[list[str]], list[str]]:
        engine.add_request(list(range(64)), SamplingParams(max_tokens=30, ignore_eos=True), request_id="r0")
        engine.step()
        (one,) = engine.first_samples()
        own = engine.memory.cache.tables[one.row, : engine.memory.cache.num_blocks[one.row]].tolist()
        other = next(block for block in range(100) if block not in own)
        found = [holders(engine, own[0]), holders(engine, own[-1])], holders(engine, other)
        engine.abort("r0")
        return found

    async def main() -> None:
        async with started(server := make()) as service:
            assert await service.call(work) == ([["r0"], ["r0"]], [])
            assert await service.call(lambda engine: holders(engine, 0)) == []
            assert server.service.health == "ready"

    asyncio.run(main())


def test_holders_are_named_to_their_tenant(
    serve_http: Callable[..., Served], keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve_http(settings={"keys_file": keys["file"]})
    one, other = (tenant.id for tenant in served.server.tenants.tenants)
    monkeypatch.setattr(live, "holders", lambda engine, block: ["r0", "r2"])
    running = [SimpleNamespace(request_id="r0", tenant=one), SimpleNamespace(request_id="r2", tenant=other)]
    monkeypatch.setattr(served.service, "streams", lambda: running)
    where = f"{served.url}/live/holders?strategy=prefix&block=0"
    assert httpx.get(where, headers=bearer(keys["a"])).json() == {"requests": ["r0"], "others": 1}
    assert httpx.get(where, headers=bearer(keys["b"])).json() == {"requests": ["r2"], "others": 1}
    assert httpx.get(where).status_code == 401
    assert httpx.get(where + "x", headers=bearer(keys["a"])).status_code == 400


# -- where a prompt's blocks are --------------------------------------------------------------------------------


def test_blocks_of_a_prompt_before_and_after(serve_http: Callable[..., Served]) -> None:
    served = serve_http(strategies=("full+prefix+load",), tiers=[parse_tier("host(size=16MiB)")])

    def runs(**more: Any) -> list[tuple[str, int]]:
        answer = httpx.post(served.url + "/live/blocks", json={"prompt": PROMPT, **more}, timeout=60)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["blocks"] == sum(run["blocks"] for run in found["runs"]) == found["tokens"] // found["block_size"]
        return [(run["place"], run["blocks"]) for run in found["runs"]]

    ((nowhere, blocks),) = runs()
    assert nowhere == "none"
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
    assert httpx.post(served.url + "/v1/completions", json=body, timeout=60).status_code == 200
    assert runs() == [("device", blocks)]
    assert runs(cache_salt="mine alone") == [("none", blocks)]

    def forget(engine: Any) -> None:
        engine.memory.hierarchy.flush()
        engine.memory.cache.clear()

    served.on_loop(lambda: served.service.call(forget))
    assert runs() == [("host", blocks)]


def test_blocks_are_told_to_their_tenant_only(serve_http: Callable[..., Served], keys: Any) -> None:
    served = serve_http(settings={"keys_file": keys["file"]})
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 2}
    httpx.post(served.url + "/v1/completions", json=body, headers=bearer(keys["a"]), timeout=60)
    places = {}
    for name in ("a", "b"):
        answer = httpx.post(served.url + "/live/blocks", json={"prompt": PROMPT}, headers=bearer(keys[name]))
        places[name] = [run["place"] for run in answer.json()["runs"]]
    assert places == {"a": ["device"], "b": ["none"]}
    assert httpx.post(served.url + "/live/blocks", json={"prompt": PROMPT}).status_code == 401


@pytest.mark.parametrize(
    "body",
    [{}, {"prompt": ""}, {"prompt": []}, {"prompt": [10**6]}, {"prompt": "x", "strategy": "nothing"},
     {"prompt": "x", "more": 1}, {"prompt": 7}, {"prompt": [1.5]}, {"prompt": "x", "cache_salt": ""}],
)  # fmt: skip
def test_questions_that_make_no_sense_are_refused(served: Served, body: dict[str, Any]) -> None:
    answer = httpx.post(served.url + "/live/blocks", json=body)
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
