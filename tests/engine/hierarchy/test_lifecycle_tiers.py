"""How long KV is kept and how it is forgotten, from the device down to the lowest tier, on a clock of our own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvwise.cache.misses import RemovalReason
from kvwise.cache.scopes import Scope
from kvwise.cache.ttl import Ttl
from kvwise.core.clock import VirtualClock
from kvwise.core.errors import UsageError
from kvwise.core.output import RequestOutput
from kvwise.engine.hierarchy.hierarchy import Hierarchy
from kvwise.engine.hierarchy.names import Deadlines
from kvwise.engine.lifecycle import Owner, PurgeReport
from kvwise.tiers.base import Extent
from tests.engine.hierarchy.tiering import (
    WITHIN_S,
    check,
    hierarchy_of,
    leave_device,
    require_idle,
    rig,
    store,
    tier_text,
)
from tests.engine.runs import finish, greedy, prompts, run

Serve = Callable[..., Any]

(PROMPT, OTHER) = prompts(100, 70)
LOADED, OTHER_LOADED = 96, 64
BLOCKS = 6
BLOCK_BYTES = 2 * 4 * 2 * 16 * 16 * 4
TICK = 1e-6


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(100.0)


@pytest.fixture
def start(serve: Serve, clock: VirtualClock) -> Serve:
    """`start(...)`: llama-tiny over one tier, or those that are given."""

    def make(method: str = "load", tiers: Any = ("memory(size=4MiB)",), **settings: Any) -> Any:
        return serve("llama-tiny", f"full+prefix+{method}", tiers=tiers, clock=clock, **settings)

    return make


def ask(engine: Any, prompt: list[int] = PROMPT, **more: Any) -> RequestOutput:
    (output,) = run(engine, [prompt], greedy(2), **more)
    return output


def came(output: RequestOutput) -> tuple[int, int]:
    """Tokens that the device had, and tokens that came from below."""
    return output.attestation.tokens_reused, output.attestation.tokens_loaded


def three(folder: Path) -> list[str]:
    return ["host(size=1MiB)", tier_text("disk", folder), "memory(size=4MiB)"]


# -- expiry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "memory", "host", "disk", "redis", "object"])
@pytest.mark.parametrize("ttl", [Ttl(absolute_s=10.0), Ttl(idle_s=10.0)], ids=["absolute", "idle"])
def test_nothing_is_served_one_tick_after_its_expiry(
    start: Serve, clock: VirtualClock, tmp_path: Path, kind: str, ttl: Ttl
) -> None:
    for late in (False, True):
        tier = tier_text(kind if kind != "device" else "memory", tmp_path / str(late))
        engine = start(tiers=[tier])
        if kind == "device":
            ask(engine, ttl=ttl)
            assert hierarchy_of(engine).flush()
            rig(engine).alter = lambda extent, view: view
        else:
            store(engine, [PROMPT], greedy(2), ttl=ttl, salt=f"{kind} {ttl} {late}")
        clock.advance(10.0 - TICK + (TICK if late else 0.0))
        output = ask(engine, **({} if kind == "device" else {"salt": f"{kind} {ttl} {late}"}))
        if late:
            assert came(output) == (0, 0)
            assert "expired" in str(output.metrics.miss)
            assert engine.memory.hierarchy.tiers[0].num_loaded == 0
        else:
            assert sum(came(output)) == LOADED
            assert (came(output)[0] > 0) == (kind == "device")
        require_idle(engine)


def test_a_hit_slides_idle_time_in_every_tier_and_no_absolute_one(
    start: Serve, clock: VirtualClock, tmp_path: Path
) -> None:
    engine = start(tiers=three(tmp_path))
    store(engine, [PROMPT], greedy(2), ttl=Ttl(idle_s=10.0))
    store(engine, [OTHER], greedy(2), ttl=Ttl(absolute_s=25.0, idle_s=10.0))
    for _ in range(3):  # at 8, 16 and 24 s
        clock.advance(8.0)
        assert came(ask(engine)) == (0, LOADED)
        assert came(ask(engine, OTHER)) == (0, OTHER_LOADED)
        leave_device(engine)
    clock.advance(1.0)  # at 25 s
    output = ask(engine, OTHER)
    assert came(output) == (0, 0)
    assert "expired" in str(output.metrics.miss)
    leave_device(engine)
    clock.advance(6.9)
    assert came(ask(engine)) == (0, LOADED)
    leave_device(engine)
    clock.advance(10.0)
    assert came(ask(engine)) == (0, 0)
    require_idle(engine)


def test_a_hit_on_the_device_keeps_the_tiers_from_thinking_it_idle(start: Serve, clock: VirtualClock) -> None:
    engine = start()
    ask(engine, ttl=Ttl(idle_s=10.0))
    for _ in range(3):
        clock.advance(8.0)
        assert came(ask(engine)) == (LOADED, 0)
    leave_device(engine)
    assert came(ask(engine)) == (0, LOADED)


def test_what_comes_back_keeps_the_rest_of_its_time(start: Serve, clock: VirtualClock) -> None:
    engine = start()
    store(engine, [PROMPT], greedy(2), ttl=Ttl(absolute_s=10.0))
    clock.advance(9.0)
    assert came(ask(engine)) == (0, LOADED)  # asked without a time to live: that is not its own
    clock.advance(0.9)
    assert came(ask(engine)) == (LOADED, 0)
    clock.advance(0.1)
    assert came(ask(engine)) == (0, 0)


@pytest.mark.parametrize("first", ["computed", "loaded"])
def test_what_goes_down_for_somebody_else_keeps_its_own_time(
    start: Serve, clock: VirtualClock, tmp_path: Path, first: str
) -> None:
    """A later request finds the blocks on the device and is the one that stores them."""
    engine = start(tiers=three(tmp_path), store_after=1 if first == "loaded" else 2)
    host, disk, _memory = hierarchy_of(engine).tiers
    ask(engine, ttl=Ttl(absolute_s=10.0))
    if first == "loaded":
        leave_device(engine)
        for tier in (host, disk):
            tier.remove(tier.keys_where(), RemovalReason.EVICTED, wipe=False)
    else:
        assert below(engine, PROMPT) == 0
    clock.advance(5.0)
    assert sum(came(ask(engine))) == LOADED  # without a time to live of its own
    leave_device(engine)
    assert len(disk.index) == BLOCKS
    clock.advance(4.9)
    assert below(engine, PROMPT) == BLOCKS
    clock.advance(0.1)
    assert below(engine, PROMPT) == 0


def test_a_block_pushed_down_is_no_younger_for_it(start: Serve, clock: VirtualClock, tmp_path: Path) -> None:
    engine = start(tiers=["host(size=112KiB)", tier_text("disk", tmp_path)], offload="back")
    store(engine, [PROMPT], greedy(2), ttl=Ttl(idle_s=10.0))
    clock.advance(8.0)
    store(engine, prompts(100, seed=4), greedy(2))
    _host, disk = hierarchy_of(engine).tiers
    assert len(disk.index) == BLOCKS
    clock.advance(1.9)
    assert below(engine, PROMPT) == BLOCKS
    clock.advance(0.1)
    assert below(engine, PROMPT) == 0


@pytest.mark.parametrize("method", ["load", "cake(chunk=32)", "layerwise"])
@pytest.mark.parametrize("gone", ["expired", "evicted, then expired"])
def test_what_expires_on_its_way_up_is_not_served(start: Serve, clock: VirtualClock, method: str, gone: str) -> None:
    """Between look-up and arrival; also where the tier's book forgot the deadline with the entry."""
    engine = start(method)
    expected = ask(start("load")).token_ids
    store(engine, [PROMPT], greedy(2), ttl=Ttl(absolute_s=10.0))
    unruly = rig(engine)
    unruly.read_gate.clear()
    clock.advance(9.0)
    engine.add_request(PROMPT, greedy(2), request_id="a")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    clock.advance(1.0)
    done = {}
    if gone != "expired":
        done = {o.request_id: o for o in engine.step() if o.finished}  # the books are swept
        assert len(hierarchy_of(engine).tiers[0].index) == 0
    unruly.read_gate.set()
    output = (done | finish(engine))["a"]
    assert output.token_ids == expected
    assert came(output) == (0, 0)
    if not method.startswith("cake"):
        assert "expired" in str(output.metrics.miss)
    assert hierarchy_of(engine).flush()
    require_idle(engine)


def test_an_expired_block_leaves_its_bytes_behind_nowhere(start: Serve, clock: VirtualClock, tmp_path: Path) -> None:
    engine = start(tiers=[tier_text("disk", tmp_path)])
    store(engine, [PROMPT], greedy(2), ttl=Ttl(absolute_s=10.0))
    before = _holding(tmp_path, engine)
    assert before
    clock.advance(10.0)
    engine.step()
    assert hierarchy_of(engine).flush()
    assert len(hierarchy_of(engine).tiers[0].index) == 0
    assert not _holding(tmp_path, engine)
    assert engine.stats().tiers["disk"].num_expired == BLOCKS


def _holding(folder: Path, engine: Any) -> bool:
    """Whether any file still holds the key of the prompt's first block."""
    key = engine.lifecycle.keys(PROMPT).chain[0]
    return any(key in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_most_specific_time_to_live_holds(start: Serve, clock: VirtualClock) -> None:
    engine = start(ttl_s=50.0)
    life = engine.lifecycle
    life.set_tenant_ttl("t", Ttl(absolute_s=40.0))
    life.open_session("s", tenant="t", ttl=Ttl(absolute_s=30.0))
    life.open_session("long", tenant="t", ttl=Ttl(absolute_s=1000.0))
    cases: list[tuple[float, dict[str, Any]]] = [
        (50.0, {}),
        (40.0, {"salt": "t"}),
        (30.0, {"salt": "t", "session": "s", "scope": Scope.SESSION}),
        (20.0, {"salt": "t", "session": "s", "scope": Scope.SESSION, "ttl": Ttl(absolute_s=20.0)}),
        (40.0, {"salt": "t", "session": "long", "scope": Scope.SESSION}),  # a tenant's is a maximum too
        (40.0, {"salt": "t", "ttl": Ttl(absolute_s=90.0)}),
        (90.0, {"salt": "u", "ttl": Ttl(absolute_s=90.0)}),
    ]
    for seconds, owner in cases:
        life.open_session("s", tenant="t", ttl=Ttl(absolute_s=30.0))
        store(engine, [PROMPT], greedy(2), **owner)
        clock.advance(seconds - 1.0)
        again = {name: value for name, value in owner.items() if name != "ttl"}
        keys = life.keys(
            PROMPT, Owner(owner.get("salt", ""), owner.get("session", ""), owner.get("scope", Scope.TENANT))
        )
        assert len(hierarchy_of(engine).find(keys.chain)) == BLOCKS, owner
        clock.advance(1.0)
        assert came(ask(engine, **again)) == (0, 0), owner
        leave_device(engine)
        life.purge_all()


def test_a_restart_goes_on_with_the_time_that_is_left(
    start: Serve, clock: VirtualClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deadlines at rest are of the wall clock; the injected clock may start anywhere."""
    wall = [1.7e9]
    begin = Deadlines.start
    monkeypatch.setattr(Deadlines, "start", lambda clock: begin(clock, lambda: wall[0]))
    tier = tier_text("disk", tmp_path)
    with start(tiers=[tier]) as engine:
        store(engine, [PROMPT], greedy(2), ttl=Ttl(absolute_s=10.0))
        store(engine, [OTHER], greedy(2), ttl=Ttl(idle_s=10.0))
    wall[0] += 8.0
    clock.advance(5000.0)
    with start(tiers=[tier]) as engine:
        assert came(ask(engine)) == (0, LOADED)
        assert came(ask(engine, OTHER)) == (0, OTHER_LOADED)
        leave_device(engine)
        clock.advance(2.0)
        assert came(ask(engine)) == (0, 0)
    wall[0] += 20.0
    with start(tiers=[tier]) as engine:
        assert len(hierarchy_of(engine).find(engine.lifecycle.keys(OTHER).chain)) == 0


# -- sessions and purging ---------------------------------------------------------------------------------------


def of(session: str, salt: str = "") -> dict[str, Any]:
    return {"session": session, "salt": salt}


NOBODY = Owner()


def below(engine: Any, prompt: list[int], owner: Owner = NOBODY) -> int:
    return len(hierarchy_of(engine).find(engine.lifecycle.keys(prompt, owner).chain))


def reported(report: PurgeReport) -> dict[str, int]:
    return {tier.tier: tier.num_blocks for tier in report.tiers}


def test_close_keeps_and_purge_forgets(start: Serve, tmp_path: Path) -> None:
    engine = start(tiers=["host(size=1MiB)", tier_text("disk", tmp_path)])
    ask(engine, **of("s"))
    engine.lifecycle.close_session("s")
    assert came(ask(engine)) == (LOADED, 0)
    leave_device(engine)
    assert came(ask(engine)) == (0, LOADED)
    report = engine.purge_session("s")
    assert reported(report) == {"device": BLOCKS, "host": BLOCKS, "disk": BLOCKS}
    assert report.num_shared == report.num_in_use == 0
    output = ask(engine)
    assert came(output) == (0, 0)
    assert "purged" in str(output.metrics.miss)
    require_idle(engine)


def test_a_purge_overwrites_the_bytes_of_every_tier(start: Serve, tmp_path: Path) -> None:
    engine = start(tiers=three(tmp_path))
    ask(engine, **of("s"))
    hierarchy = hierarchy_of(engine)
    assert hierarchy.flush()
    device = engine.memory.arena.keys.view(engine.memory.arena.num_blocks, -1)
    index = engine.memory.cache._store.index
    blocks = [index.find(key) for key in engine.lifecycle.keys(PROMPT).chain]
    samples = [device[block].numpy().tobytes()[:256] for block in blocks]
    assert all(any(sample) for sample in samples)
    host, _disk, memory = hierarchy.tiers
    views = [memoryview(record) for record in memory.store._records.values()]

    def anywhere() -> dict[str, bool]:
        files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        places = {"host": bytes(host.store._memory), "disk": files, "memory": b"".join(views)}
        return {name: any(sample in data for sample in samples) for name, data in places.items()}

    assert anywhere() == {"host": True, "disk": True, "memory": True}
    report = engine.purge_session("s")
    assert reported(report) == {"device": BLOCKS, "host": BLOCKS, "disk": BLOCKS, "memory": BLOCKS}
    assert all(tier.overwritten for tier in report.tiers)
    assert report.tiers[0].num_bytes == BLOCKS * BLOCK_BYTES
    assert all(tier.num_bytes > BLOCKS * BLOCK_BYTES for tier in report.tiers[1:])  # and their headers
    assert anywhere() == {"host": False, "disk": False, "memory": False}
    everything = device.numpy().tobytes()
    assert not any(sample in everything for sample in samples)
    assert not any(any(view) for view in views)
    for tier in hierarchy.tiers:
        assert len(tier.index) == 0
        assert tier.stats().num_bytes == 0
    check(engine)


def test_a_purge_frees_no_block_that_another_live_owner_holds(start: Serve) -> None:
    engine = start(max_num_batched_tokens=32, max_num_seqs=4)
    shared, mine, theirs = prompts(48, 40, 40, seed=3)
    ask(engine, shared + mine, **of("s"))
    ask(engine, shared + theirs, **of("t"))
    report = engine.purge_session("s")
    assert report.num_shared == 3
    assert reported(report) == {"device": 2, "memory": 2}
    assert came(ask(engine, shared + theirs)) == (80, 0)
    leave_device(engine)
    assert came(ask(engine, shared + theirs)) == (0, 80)
    assert came(ask(engine, shared + mine)) == (48, 0)
    require_idle(engine)


def test_a_purge_leaves_what_a_running_request_of_another_owner_uses(start: Serve) -> None:
    engine = start(max_num_batched_tokens=32, max_num_seqs=4)
    expected = run(start(), [PROMPT], greedy(30))[0].token_ids
    ask(engine, **of("s"))
    engine.add_request(PROMPT, greedy(30), request_id="runs")
    engine.step()
    engine.step()
    report = engine.purge_session("s")
    assert report.num_shared == BLOCKS
    assert report.num_blocks == 0
    assert finish(engine)["runs"].token_ids == expected
    report = engine.purge_session("s")
    assert reported(report) == {"device": BLOCKS, "memory": BLOCKS}
    require_idle(engine)


def test_a_purge_leaves_other_tenants_and_pins_alone(start: Serve) -> None:
    engine = start()
    ask(engine, **of("s", "a"))
    ask(engine, **of("t", "b"))
    ask(engine, OTHER, **of("s", "a"))
    assert engine.lifecycle.pin(OTHER, Owner("a")) == 4
    assert hierarchy_of(engine).flush()
    report = engine.purge_session("s")
    assert reported(report) == {"device": BLOCKS, "memory": BLOCKS}
    assert report.num_shared == 4
    assert came(ask(engine, salt="b")) == (LOADED, 0)
    assert came(ask(engine, OTHER, salt="a")) == (OTHER_LOADED, 0)
    assert came(ask(engine, salt="a")) == (0, 0)
    with pytest.raises(UsageError, match="another tenant"):
        ask(engine, **of("s", "b"))
    with pytest.raises(UsageError, match="unknown session 'nobody'"):
        engine.purge_session("nobody")


def test_a_purge_ends_the_sessions_own_requests(start: Serve) -> None:
    engine = start(max_num_batched_tokens=32, max_num_seqs=4)
    engine.add_request(PROMPT, greedy(30), request_id="runs", **of("s"))
    for _ in range(4):
        engine.step()
    report = engine.purge_session("s")
    assert report.num_in_use == 0
    assert reported(report)["device"] == reported(report)["memory"] == BLOCKS
    finish(engine)
    assert below(engine, PROMPT) == 0
    assert came(ask(engine)) == (0, 0)
    require_idle(engine)


def test_a_purge_of_blocks_on_their_way_down(start: Serve) -> None:
    """Those under way are waited for; behind a tier that hangs, none arrives later."""
    engine = start()
    unruly = rig(engine)
    unruly.write_gate.clear()
    ask(engine, **of("s"))
    assert unruly.writing.wait(WITHIN_S)
    hierarchy_of(engine).flush = lambda timeout_s=0.0: Hierarchy.flush(hierarchy_of(engine), 0.01)  # impatient
    engine.purge_session("s")
    assert below(engine, PROMPT) == 0
    unruly.write_gate.set()
    assert Hierarchy.flush(hierarchy_of(engine), WITHIN_S)
    assert below(engine, PROMPT) == 0
    assert len(hierarchy_of(engine).tiers[0].index) == 0
    assert unruly.inner.num_bytes() == 0
    ask(engine)  # and what is stored after the purge is stored
    assert Hierarchy.flush(hierarchy_of(engine), WITHIN_S)
    assert below(engine, PROMPT) == BLOCKS


def test_a_purge_of_blocks_on_their_way_from_tier_to_tier(start: Serve, tmp_path: Path) -> None:
    """They have left the book above and are not in that below: nothing but the purge itself tells of them."""
    engine = start(tiers=["host(size=112KiB)", tier_text("disk", tmp_path)], offload="back")
    store(engine, [PROMPT], greedy(2), **of("s"))
    hierarchy, unruly = hierarchy_of(engine), rig(engine)
    unruly.read_gate.clear()
    ask(engine, prompts(100, seed=4)[0])
    assert unruly.reading.wait(WITHIN_S)
    hierarchy.flush = lambda timeout_s=0.0: Hierarchy.flush(hierarchy, 0.01)
    engine.purge_session("s")
    unruly.read_gate.set()
    assert Hierarchy.flush(hierarchy, WITHIN_S)
    keys = engine.lifecycle.keys(PROMPT).chain
    assert not any(tier.has(key) for tier in hierarchy.tiers for key in keys)
    check(engine)


@pytest.mark.parametrize("method", ["load", "cake(chunk=32)", "layerwise"])
@pytest.mark.parametrize("what", ["prefix", "tenant", "all"])
def test_a_purge_while_a_request_loads(start: Serve, tmp_path: Path, method: str, what: str) -> None:
    """The request goes on; what it loads is neither found nor promoted afterwards."""
    engine = start(method, tiers=["host(size=1MiB)", tier_text("disk", tmp_path)])
    expected = ask(engine, salt="t").token_ids
    leave_device(engine)
    owner = Owner("t")
    hierarchy = hierarchy_of(engine)
    host = hierarchy.tiers[0]
    host.remove(host.keys_where(), RemovalReason.EVICTED, wipe=False)
    unruly = rig(engine, 1)
    unruly.read_gate.clear()
    engine.add_request(PROMPT, greedy(2), salt="t", request_id="a")
    engine.step()
    assert unruly.reading.wait(WITHIN_S)
    read = unruly.inner.read
    keys = [entry.key for entry in hierarchy.tiers[1].index.entries()]
    views = {key: memoryview(bytes(read([Extent(key)])[0])) for key in keys}  # they were on their way already
    unruly.inner.read = lambda extents: [views[e.key][e.start : e.stop] for e in extents]
    hierarchy.flush = lambda timeout_s=0.0: Hierarchy.flush(hierarchy, 0.01)  # the look-ahead hangs too
    purge = {
        "prefix": lambda: engine.lifecycle.purge_prefix(PROMPT, owner),
        "tenant": lambda: engine.lifecycle.purge_tenant("t"),
        "all": engine.lifecycle.purge_all,
    }
    report = purge[what]()
    assert reported(report)["disk"] == BLOCKS
    unruly.read_gate.set()
    done = finish(engine)
    del hierarchy.flush
    assert done["a"].token_ids == expected
    require_idle(engine)
    assert below(engine, PROMPT, owner) == 0
    assert engine.memory.cache.num_resident(engine.lifecycle.keys(PROMPT, owner)) == 0


@pytest.mark.parametrize("offload", ["through", "back"])
def test_a_purge_of_a_running_requests_blocks_lasts(start: Serve, offload: str) -> None:
    """They cannot be found any more, and go when the request does: not down to a tier."""
    engine = start(offload=offload, max_num_batched_tokens=128, max_num_seqs=4)
    engine.add_request(PROMPT, greedy(4), request_id="a")
    engine.step()
    engine.step()
    report = engine.lifecycle.purge_prefix(PROMPT)
    assert report.num_in_use == BLOCKS
    finish(engine)
    assert hierarchy_of(engine).flush()
    assert below(engine, PROMPT) == 0
    assert came(ask(engine)) == (0, 0)
    require_idle(engine)


@pytest.mark.parametrize("where", ["device", "below"])
def test_purges_of_tenant_prefix_and_all(start: Serve, where: str) -> None:
    engine = start()
    for salt in ("a", "b"):
        for prompt in (PROMPT, OTHER):
            ask(engine, prompt, salt=salt)
    assert hierarchy_of(engine).flush()
    if where == "below":
        leave_device(engine)
    on_device = where == "device"

    report = engine.lifecycle.purge_prefix(OTHER, Owner("a"))
    assert reported(report) == {"device": 4 * on_device, "memory": 4}
    report = engine.lifecycle.purge_tenant("a")
    assert reported(report) == {"device": BLOCKS * on_device, "memory": BLOCKS}
    for prompt in (PROMPT, OTHER):
        assert came(ask(engine, prompt, salt="a")) == (0, 0)
        assert sum(came(ask(engine, prompt, salt="b"))) == len(prompt) // 16 * 16
    report = engine.lifecycle.purge_all()
    assert reported(report)["memory"] == 2 * (BLOCKS + 4)
    assert len(hierarchy_of(engine).tiers[0].index) == 0
    assert came(ask(engine, salt="b")) == (0, 0)
    require_idle(engine)


# -- pins, warmth, quotas ---------------------------------------------------------------------------------------


def test_pins_survive_pressure_in_every_tier(start: Serve, tmp_path: Path) -> None:
    engine = start(tiers=["host(size=160KiB)", "disk(size=256KiB, path=" + str(tmp_path / "d") + ")"], blocks=16)
    ask(engine)
    assert hierarchy_of(engine).flush()
    assert engine.lifecycle.pin(PROMPT) == BLOCKS
    for prompt in prompts(*[90] * 12, seed=4):
        ask(engine, prompt)
    tiers = engine.stats().tiers
    assert tiers["host"].num_evicted > 0
    assert tiers["disk"].num_evicted > 0
    assert came(ask(engine)) == (LOADED, 0)
    leave_device(engine)
    host, disk = hierarchy_of(engine).tiers
    keys = engine.lifecycle.keys(PROMPT).chain
    assert host.find(keys) == disk.find(keys) == BLOCKS
    assert came(ask(engine)) == (0, LOADED)
    engine.lifecycle.unpin(PROMPT)
    for prompt in prompts(*[90] * 12, seed=5):
        ask(engine, prompt)
    assert came(ask(engine)) == (0, 0)
    require_idle(engine)


def test_a_warm_prompt_is_computed_kept_and_ready(start: Serve) -> None:
    engine = start(blocks=16)
    life = engine.lifecycle
    name = engine.warm(PROMPT, pin=True)
    assert not life.ready
    output = finish(engine)[name]
    assert output.token_ids == []
    assert output.error is None
    assert output.attestation.tokens_computed == len(PROMPT)
    assert life.ready
    for prompt in prompts(*[90] * 4, seed=4):
        ask(engine, prompt)
    assert came(ask(engine)) == (LOADED, 0)
    leave_device(engine)  # not what eviction would do: pins stand against that
    assert life.ready  # it is below
    assert came(ask(engine)) == (0, LOADED)
    require_idle(engine)


def test_a_tenant_keeps_to_its_quota_and_pushes_out_nobody(start: Serve) -> None:
    engine = start(tenant_quotas={"small": 4 * (BLOCK_BYTES + 2048)})
    ask(engine, PROMPT, salt="big")
    many = prompts(*[60] * 4, seed=6)
    for prompt in many:
        ask(engine, prompt, salt="small")
    assert hierarchy_of(engine).flush()
    tier = hierarchy_of(engine).tiers[0]
    tags = [entry.terms.tenant for entry in tier.index.entries()]
    assert len(set(tags)) == 2
    counts = {tag: tags.count(tag) for tag in tags}
    assert sorted(counts.values()) == [4, BLOCKS]
    leave_device(engine)
    assert came(ask(engine, PROMPT, salt="big")) == (0, LOADED)
    assert sum(came(ask(engine, many[-1], salt="small"))) > 0
    assert came(ask(engine, many[0], salt="small")) == (0, 0)


# -- why a look-up went no further --------------------------------------------------------------------------------


def test_every_miss_has_its_reason(start: Serve, serve: Serve, clock: VirtualClock, tmp_path: Path) -> None:
    engine = start(tiers=["memory(size=400KiB)"])

    def why(prompt: list[int] = PROMPT, **more: Any) -> str:
        return str(ask(engine, prompt, **more).metrics.miss).split(": ", 1)[1]

    assert why() == "never stored"
    assert why() == "block boundary"
    leave_device(engine)
    assert why() == "block boundary"
    leave_device(engine)
    assert why(salt="other") in ("other salt", "never stored")  # the device forgot it
    ask(engine, OTHER)
    assert why(OTHER, salt="other") == "other salt"
    engine.lifecycle.purge_all()
    assert why().startswith("purged at ")
    engine.lifecycle.purge_all()
    store(engine, [PROMPT], greedy(2), ttl=Ttl(absolute_s=1.0))
    clock.advance(1.0)
    assert why().startswith("expired")
    leave_device(engine)
    engine.lifecycle.purge_all()
    store(engine, [PROMPT], greedy(2))
    for prompt in prompts(*[300] * 3, seed=8):
        store(engine, [prompt], greedy(2))
    assert why().startswith("evicted by lru at ")
    declines = start("load(min_tokens=1000)")
    store(declines, [PROMPT], greedy(2))
    assert str(ask(declines).metrics.miss) == "block 0: load declined"


def test_another_model_in_the_same_folder_is_told(start: Serve, serve: Serve, tmp_path: Path) -> None:
    tier = tier_text("disk", tmp_path)
    with start(tiers=[tier]) as engine:
        store(engine, [PROMPT], greedy(2))
    with serve("mistral-tiny", "full+prefix+load", tiers=[tier]) as other:
        assert str(ask(other).metrics.miss) == "block 0: other model or dtype"
