"""Promises of sessions: closing frees nothing, purging names exactly what no other live owner holds."""

import numpy as np
import pytest

from kvwise.cache.sessions import Sessions
from kvwise.cache.ttl import Ttl
from kvwise.core.errors import UsageError

A, B, C, D = (bytes([i]) * 32 for i in range(4))


@pytest.fixture
def sessions(clock):
    return Sessions(clock)


def is_open(sessions):
    return {info.session: info.is_open for info in sessions.sessions()}


def test_a_purge_names_what_only_it_holds(sessions):
    sessions.open("s")
    sessions.open("t")
    sessions.use("s", [A, B, C])
    sessions.use("t", [B])
    assert sessions.purge_list("s") == ([A, C], [B])
    sessions.close("t")
    assert sessions.purge_list("s") == ([A, B, C], [])


def test_closing_keeps_the_keys_for_a_purge_and_for_others(sessions):
    sessions.open("s")
    sessions.use("s", [A])
    sessions.close("s")
    sessions.close("s")
    assert is_open(sessions) == {"s": False}
    assert sessions.purge_list("s") == ([A], [])
    sessions.open("t")
    sessions.use("t", [A])
    assert sessions.purge_list("s") == ([], [A])
    assert sessions.purge_list("t") == ([A], [])


def test_running_requests_shield_their_keys_until_they_end(sessions):
    sessions.open("s")
    sessions.use("s", [A, B])
    sessions.running("r1", [A])
    sessions.running("r2", [A, B])
    sessions.running("r2", [A])
    assert sessions.purge_list("s") == ([B], [A])
    sessions.ended("r1")
    assert sessions.purge_list("s") == ([B], [A])
    sessions.ended("r2")
    sessions.ended("r2")
    assert sessions.purge_list("s") == ([A, B], [])


def test_its_own_running_request_does_not_shield_a_session(sessions):
    sessions.open("s")
    sessions.open("t")
    for session in ("s", "t"):
        sessions.use(session, [A])
    sessions.running("r", [A, B], "s")
    sessions.use("s", [B])
    sessions.close("t")
    assert sessions.purge_list("s") == ([A, B], [])
    assert sessions.purge_list("t") == ([], [A])


def test_pins_shield_until_their_deadline(sessions, clock):
    sessions.open("s")
    sessions.use("s", [A, B, C])
    sessions.pin([A, B], until=5.0)
    sessions.pin([A], until=2.0)
    sessions.pin([C])
    sessions.unpin([B, D])
    assert sessions.purge_list("s") == ([B], [A, C])
    clock.advance(5.0)
    assert sessions.purge_list("s") == ([A, B], [C])


def test_forgotten_keys_are_nobodys(sessions):
    sessions.open("s")
    sessions.open("t")
    sessions.use("s", [A, B])
    sessions.use("t", [A])
    sessions.forget([A, D])
    assert sessions.purge_list("s") == ([B], [])
    assert [info.num_keys for info in sessions.sessions()] == [1, 0]


@pytest.mark.parametrize("call", ["close", "purge_list", "tenant_of"])
def test_an_unknown_session_is_named(sessions, call):
    with pytest.raises(UsageError, match="unknown session 'who'"):
        getattr(sessions, call)("who")
    with pytest.raises(UsageError, match="unknown session 'who'"):
        sessions.use("who", [A])


def test_a_name_belongs_to_one_tenant(sessions):
    sessions.open("s", "acme")
    sessions.close("s")
    with pytest.raises(UsageError, match="another tenant"):
        sessions.open("s", "evil")
    sessions.open("s", "acme")
    assert sessions.tenant_of("s") == "acme"
    with pytest.raises(UsageError, match="not empty"):
        sessions.open("")


def test_an_idle_session_closes_by_itself_and_use_keeps_it_open(sessions, clock):
    sessions.open("s", ttl=Ttl(idle_s=5.0))
    sessions.open("t", ttl=Ttl(absolute_s=6.0))
    clock.advance(4.0)
    sessions.use("s", [A])
    clock.advance(2.0)
    assert is_open(sessions) == {"s": True, "t": False}
    clock.advance(3.0)
    assert is_open(sessions) == {"s": False, "t": False}
    assert sessions.purge_list("s") == ([A], [])
    sessions.use("s", [B])
    assert is_open(sessions)["s"] is False, "only open opens"
    assert sessions.purge_list("s") == ([A, B], [])


def test_a_session_does_not_fall_idle_while_its_request_runs(sessions, clock):
    sessions.open("s", ttl=Ttl(idle_s=5.0))
    sessions.running("r", [A], "s")
    clock.advance(60.0)
    assert is_open(sessions) == {"s": True}
    sessions.ended("r")
    clock.advance(4.0)
    assert is_open(sessions) == {"s": True}
    clock.advance(1.0)
    assert is_open(sessions) == {"s": False}


def test_only_so_many_closed_sessions_are_remembered(clock):
    sessions = Sessions(clock, max_closed=2)
    for name in "abc":
        sessions.open(name)
        sessions.use(name, [A])
        sessions.close(name)
    assert list(is_open(sessions)) == ["b", "c"]
    assert sessions._holders == {A: {"b", "c"}}
    sessions.open("b")
    sessions.open("d")
    sessions.close("d")
    assert list(is_open(sessions)) == ["b", "c", "d"]


def test_random_operations_against_plain_sets(clock):
    rng = np.random.default_rng(11)
    sessions = Sessions(clock)
    names, requests, keys = "abc", "xyz", [bytes([i]) * 32 for i in range(6)]
    opened: dict[str, bool] = {}
    used: dict[str, set[bytes]] = {name: set() for name in names}
    runs: dict[str, tuple[str, set[bytes]]] = {}
    pins: dict[bytes, float] = {}
    for _ in range(3000):
        name, request = str(rng.choice(list(names))), str(rng.choice(list(requests)))
        some = [keys[i] for i in rng.permutation(6)[: rng.integers(1, 4)]]
        action = rng.integers(9)
        if action == 0:
            sessions.open(name)
            opened[name] = True
        elif action == 1 and name in opened:
            sessions.close(name)
            opened[name] = False
        elif action in (2, 3) and name in opened:
            sessions.use(name, some)
            used[name] |= set(some)
        elif action == 4:
            owner = name if name in opened else ""
            sessions.running(request, some, owner)
            runs[request] = (owner, set(some))
        elif action == 5:
            sessions.ended(request)
            runs.pop(request, None)
        elif action == 6:
            until = clock.now() + 3.0
            sessions.pin(some, until)
            pins.update(dict.fromkeys(some, until))
        elif action == 7:
            clock.advance(1.0)
        else:
            sessions.forget(some[:1])
            for mine in used.values():
                mine.discard(some[0])
            pins.pop(some[0], None)
        for name in opened:
            others = [used[other] for other in opened if other != name and opened[other]]
            others += [held for owner, held in runs.values() if owner != name]
            others.append({key for key, until in pins.items() if until > clock.now()})
            live = set().union(*others)
            purge, shared = sessions.purge_list(name)
            assert (set(purge), set(shared)) == (used[name] - live, used[name] & live)
            assert len(purge) + len(shared) == len(used[name])


def test_no_more_are_open_than_may_be(clock):
    registry = Sessions(clock, max_closed=3, max_open=4)
    for number in range(4):
        registry.open(f"s{number}")
        clock.advance(1)
    registry.use("s0", [b"k"])
    registry.running("r", [b"q"], "s1")
    registry.open("s4")
    assert [info.session for info in registry.sessions() if info.is_open] == ["s0", "s1", "s3", "s4"]
    assert not registry.is_open("s2")
    assert registry.is_open("s1")
    assert not registry.is_open("nobody")
