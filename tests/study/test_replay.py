"""Replay: exact counts against a naive cache, the bound against all choices of victims, published golden counts."""

import json
import os
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kvwise.cache.residency import Entry, Reservation, TierIndex
from kvwise.core.errors import PlanError, UsageError
from kvwise.policies.catalogue import make_policy, policies
from kvwise.study.replay import BELADY, belady, replay, replay_file
from kvwise.study.traces import TraceRequest, read_trace
from tests.policies.driver import Cache

BLOCK = 32


def chats(seed: int, num_requests: int = 120) -> list[TraceRequest]:
    """Conversations over shared system prompts: each turn asks with all before it; ids name whole prefixes."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(1_000_000))
    roots = [[next(fresh) for _ in range(rng.integers(1, 6))] for _ in range(3)]
    open_chats: list[list[int]] = []
    requests, now = [], 0
    for _ in range(num_requests):
        now += int(rng.integers(0, 4)) * 1000
        if not open_chats or rng.random() < 0.3:
            open_chats.append(list(roots[rng.integers(3)]))
        chat = open_chats[int(rng.integers(len(open_chats)))]
        chat += [next(fresh) for _ in range(rng.integers(0, 5))]
        tail = int(rng.integers(1, BLOCK))
        hash_ids = (*chat, next(fresh))  # a partial last block of its own
        requests.append(TraceRequest(now / 1000, len(chat) * BLOCK + tail, 1, hash_ids))
    return requests


class NaiveCache:
    """Lists and dictionaries; an expired block stays until pushed out or touched, but is not found."""

    def __init__(self, policy: str, capacity: int | None, ttl_s: float | None):
        self.policy, self.capacity, self.ttl_s = policy, capacity, ttl_s
        self.order: list[int] = []  # first to leave first, where frequency does not matter
        self.count: dict[int, int] = {}
        self.touched: dict[int, float] = {}
        self.num_found = 0

    def alive(self, block: int, now: float) -> bool:
        return block in self.touched and (
            self.ttl_s is None or round((now - self.touched[block]) * 1000) <= 1000 * self.ttl_s
        )

    def visit(self, block: int, now: float) -> None:
        self.num_found += self.alive(block, now)
        if block not in self.touched:
            if len(self.order) == self.capacity:
                gone = min(self.order, key=self.count.__getitem__) if self.policy == "lfu" else self.order[0]
                self.order.remove(gone)
                del self.count[gone], self.touched[gone]
            self.order.append(block)
            self.count[block] = 0
        elif self.policy != "fifo":
            self.order.remove(block)
            self.order.append(block)
        self.count[block] += 1
        self.touched[block] = now


def naive_hits(requests: Sequence[TraceRequest], book: NaiveCache, reverse: bool = False) -> list[int]:
    hits = []
    for r in requests:
        found = [book.alive(block, r.arrival_s) for block in r.hash_ids]
        hits.append([*found, False].index(False))
        for block in r.hash_ids[::-1] if reverse else r.hash_ids:
            book.visit(block, r.arrival_s)
    return hits


def tokens(requests: Sequence[TraceRequest], hits: Sequence[int]) -> int:
    return sum(min(hit * BLOCK, r.input_length) for hit, r in zip(hits, requests, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("policy", ["lru", "fifo", "lfu"])
@pytest.mark.parametrize("capacity", [1, 3, 8, 20, 60, 150])
def test_counts_equal_those_of_a_naive_cache(policy: str, capacity: int, reverse: bool) -> None:
    for seed in range(2):
        requests, book = chats(seed), NaiveCache(policy, capacity, None)
        hits = naive_hits(requests, book, reverse)
        result = replay(requests, policy, capacity, reverse=reverse, block_size=BLOCK)
        assert (result.num_hit_blocks, result.num_hit_tokens) == (sum(hits), tokens(requests, hits))
        assert result.num_hit_requests == sum(hit > 0 for hit in hits)
        assert result.num_resident == len(book.order)


@pytest.mark.parametrize("policy", sorted(set(policies()) - {"lru", "fifo", "lfu"}))
@pytest.mark.parametrize("capacity", [1, 3, 20, 60])
def test_every_policy_sees_its_blocks_one_by_one(policy: str, capacity: int) -> None:
    requests = chats(5)
    depths = {block: 2048 * depth for r in requests for depth, block in enumerate(r.hash_ids)}
    book = Cache(make_policy(policy, capacity), capacity, depths.__getitem__)
    hits = []
    for r in requests:
        hits.append([*(block in book.block_of for block in r.hash_ids), False].index(False))
        for block in r.hash_ids:
            book.access(block)
    result = replay(requests, policy, capacity, block_size=16 * 2048)  # policies count depth in blocks of 16 tokens
    assert result.num_hit_blocks == sum(hits)


@pytest.mark.parametrize("capacity", [None, 20, 60])
@pytest.mark.parametrize("ttl_s", [1, 4, 20])
def test_a_ttl_slides_with_every_touch(capacity: int | None, ttl_s: float) -> None:
    for seed in range(3):
        requests = chats(seed)
        book = NaiveCache("lru", capacity, ttl_s)
        hits = naive_hits(requests, book)
        result = replay(requests, "lru", capacity, ttl_s, block_size=BLOCK)
        assert (result.num_hit_blocks, result.num_hit_tokens) == (sum(hits), tokens(requests, hits))
        assert result.num_expired > 0 or capacity is not None
        assert result.num_found == book.num_found
        assert result.num_resident == sum(book.alive(block, requests[-1].arrival_s) for block in book.order)


def test_the_last_moment_of_a_ttl_is_a_hit_and_the_next_millisecond_is_none() -> None:
    at = [TraceRequest(t, BLOCK, 1, (7,)) for t in (0.3, 60.3, 120.301, 120.301)]
    assert replay(at, "lru", None, 60, block_size=BLOCK).num_hit_blocks == 2
    assert replay(at[:2], "lru", 5, 60, block_size=BLOCK).num_hit_blocks == 1


def test_what_expired_by_the_last_request_is_gone_in_the_end() -> None:
    result = replay([TraceRequest(t, 1, 1, ids) for t, ids in ((0, (0, 1)), (50, (2,)), (100, (2,)))], "lru", 9, 60)
    assert (result.num_hit_blocks, result.num_expired, result.num_resident) == (1, 2, 1)


def test_a_partial_last_block_counts_its_own_tokens() -> None:
    twice = [TraceRequest(t, BLOCK + 5, 1, (0, 1)) for t in range(2)]
    assert replay(twice, "lru", 2, block_size=BLOCK).num_hit_tokens == BLOCK + 5
    assert belady(twice, 2, block_size=BLOCK).num_hit_tokens == BLOCK + 5


def test_operations_are_look_ups_up_to_the_first_miss_and_one_visit_a_block() -> None:
    requests = [TraceRequest(t, 3 * BLOCK, 1, ids) for t, ids in enumerate([(0, 1, 2), (0, 1, 3), (0, 1, 3)])]
    result = replay(requests, "lru", 10, block_size=BLOCK)
    assert result.num_operations == (1 + 3) + (3 + 3) + (3 + 3)
    assert result.row()["token_hit_ratio"] == pytest.approx(5 / 9)


@pytest.mark.parametrize(("policy", "num_calls"), [("lru", 2), ("fifo", 2), ("lfu", 1 + 40)])
def test_a_run_is_one_call_where_the_policy_allows(
    policy: str, num_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    reserve = TierIndex.reserve

    def counted(index: TierIndex, entries: Sequence[Entry]) -> Reservation:
        sizes.append(len(entries))
        return reserve(index, entries)

    monkeypatch.setattr(TierIndex, "reserve", counted)
    requests = [TraceRequest(t, 40 * BLOCK, 1, tuple(range(40 * t, 40 * t + 40))) for t in range(2)]
    replay(requests, policy, 40, block_size=BLOCK)
    assert len(sizes) == num_calls
    assert sum(sizes) == 80


def most_hits(requests: Sequence[TraceRequest], capacity: int) -> int:
    """Over all choices of victims; every block is inserted, first to last."""

    @cache
    def best(number: int, index: int, resident: frozenset[int]) -> int:
        if number == len(requests):
            return 0
        hash_ids = requests[number].hash_ids
        found = [*(block in resident for block in hash_ids), False].index(False) if index == 0 else 0
        if index == len(hash_ids):
            return best(number + 1, 0, resident)
        block = hash_ids[index]
        if block in resident or len(resident) < capacity:
            return found + best(number, index + 1, resident | {block})
        return found + max(best(number, index + 1, resident - {gone} | {block}) for gone in resident)

    return best(0, 0, frozenset())


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_victims_hits_more_than_belady_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chains = [(0, 1, 2), (0, 1, 3), (0, 4), (5, 6), (5, 6, 7)]
    requests = [TraceRequest(t, 1, 1, chains[rng.integers(5)]) for t in range(9)]
    for capacity in (1, 2, 3, 4, 5):
        bound, most = belady(requests, capacity), most_hits(requests, capacity)
        assert bound.num_hit_blocks <= most <= bound.num_found
        if capacity > 3:  # longer than any chain
            assert bound.num_hit_blocks == most


@pytest.mark.parametrize("policy", sorted(policies()))
def test_no_policy_beats_the_bound(policy: str) -> None:
    requests = chats(9)
    results = [(replay(requests, policy, c, block_size=BLOCK), belady(requests, c, block_size=BLOCK)) for c in (5, 40)]
    for mine, bound in results:
        assert 0 < mine.num_hit_blocks <= mine.num_found <= bound.num_found
        assert mine.num_hit_blocks <= bound.num_hit_blocks


def test_belady_without_chains_evicts_no_less_and_hits_less() -> None:
    requests = chats(3)
    deep, shallow = belady(requests, 40), belady(requests, 40, deepest_first=False)
    assert deep.num_evicted <= shallow.num_evicted
    assert deep.num_hit_blocks > shallow.num_hit_blocks


def write_trace(path: Path) -> Path:
    rows = [
        {"timestamp": r.arrival_s * 1000, "input_length": r.input_length, "output_length": 1, "hash_ids": r.hash_ids}
        for r in chats(1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_gives_one_row_for_every_combination(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "chats.jsonl")
    rows = replay_file(path, ["lru", "sieve", BELADY], [None, 8, 60], [None, 4], block_size=BLOCK)
    named = [(row["policy"], row["capacity_blocks"], row["ttl_s"]) for row in rows]
    assert named[:2] == [("infinite", None, None), ("infinite", None, 4)]
    assert named[2:7] == [("lru", 8, None), ("lru", 8, 4), ("sieve", 8, None), ("sieve", 8, 4), ("belady", 8, None)]
    assert len(rows) == 12
    assert [row["policy"] for row in replay_file(path, ["fifo"], [8], block_size=BLOCK)] == ["fifo"]
    assert all(a["token_hit_ratio"] >= b["token_hit_ratio"] for a, b in pairwise(rows[:2]))
    assert rows == replay_file(path, ["lru", "sieve", BELADY], [None, 8, 60], [None, 4], block_size=BLOCK)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "chats.jsonl")
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("arrival_s,input_tokens,output_tokens\n0,10,3\n")
    with pytest.raises(PlanError, match="has no hash_ids, only lengths"):
        replay_file(lengths, ["lru"], [10])
    with pytest.raises(UsageError, match="capacity of 0 blocks"):
        replay_file(path, [BELADY], [0], block_size=BLOCK)
    with pytest.raises(UsageError, match="unknown replacement policy 'mru'"):
        replay_file(path, ["mru"], [10], block_size=BLOCK)


def golden_folder() -> Path:
    folder = os.environ.get("KVWISE_TRACES")
    if folder is None or not (Path(folder) / "golden_sample.json").is_file():
        pytest.skip("KVWISE_TRACES names no folder with traces and their golden_sample.json")
    return Path(folder)


@pytest.mark.parametrize("policy", ["infinite", "lru", "fifo", "lfu", BELADY])
def test_published_traces_give_the_golden_counts(policy: str) -> None:
    folder = golden_folder()
    for name, wanted in json.loads((folder / "golden_sample.json").read_text()).items():
        golden = {key: w for key, w in wanted.items() if w.get("policy") == policy}
        requests = read_trace(folder / name) if golden else []
        for key, w in golden.items():
            if policy == BELADY:
                result = belady(requests, w["capacity"], deepest_first=False)
            else:
                known = "lru" if policy == "infinite" else policy
                result = replay(requests, known, w["capacity"], w["ttl_s"], reverse=w["touch"] == "reverse")
            counts = (result.num_hit_blocks, result.num_hit_tokens)
            assert counts == (w["hit_blocks"], w["hit_tokens"]), f"{name} {key}"
            assert result.num_hit_requests / result.num_requests == pytest.approx(w["request_hit_ratio"], abs=1e-6)
            if w["ttl_s"] is None:  # there an expired block stays until it is pushed out; here it leaves
                assert (result.num_evicted, result.num_resident) == (w["evictions"], w["resident_blocks_end"])
