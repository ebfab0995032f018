"""Replay of a trace's prefixes against the book of one tier: exact hit counts of a policy, without a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from typing import Any

from kvwise.cache.residency import Entry, TierIndex
from kvwise.cache.terms import Terms
from kvwise.core.clock import VirtualClock
from kvwise.core.errors import PlanError, UsageError
from kvwise.study.traces import TraceRequest, read_trace

BELADY = "belady"
INFINITE = "infinite"
_HALF_A_TICK = 0.0005  # traces count whole milliseconds
_TOKENS_A_STEP = 16  # policies price depth in blocks of this many tokens


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What one replay counted. A *hit* block stands in the longest resident run at the start of its request.

    `num_operations`: look-ups (every block visited until the first miss) plus touches and insertions (every block of
    every request, once). `num_evicted` left for lack of room, `num_expired` for their TTL; `num_resident` are there at
    the end.
    """

    policy: str
    capacity_blocks: int | None
    ttl_s: float | None
    reverse: bool
    num_requests: int
    num_hit_requests: int
    num_blocks: int
    num_hit_blocks: int
    num_tokens: int
    num_hit_tokens: int
    num_evicted: int
    num_expired: int
    num_resident: int
    num_operations: int

    @property
    def token_hit_ratio(self) -> float:
        """Hit tokens over all prompt tokens; the partial last block of a prompt counts its own tokens."""
        return self.num_hit_tokens / self.num_tokens

    @property
    def num_found(self) -> int:
        """Blocks that were there when they were touched, with or without those before them; first to last >= hits."""
        return self.num_blocks - self.num_evicted - self.num_expired - self.num_resident

    def row(self) -> dict[str, Any]:
        """All fields and the token hit ratio."""
        return asdict(self) | {"token_hit_ratio": self.token_hit_ratio}


def replay(
    requests: Sequence[TraceRequest],
    policy: str,
    capacity_blocks: int | None,
    ttl_s: float | None = None,
    *,
    reverse: bool = False,
    block_size: int = 512,
) -> ReplayResult:
    """Replay `requests`, in the order of their times, against a tier of `capacity_blocks` (None: unbounded).

    Requests are atomic: look up, then insert or touch every block of the request, first to last (`reverse`: last to
    first). Every insertion makes its own room before the next, so an early one may push out a later block of the same
    request. A block is found until `ttl_s` seconds after its last touch, that moment included. UsageError: an unknown
    policy, a capacity below 1.
    """
    clock = VirtualClock()
    most = len({hash_id for request in requests for hash_id in request.hash_ids})
    limit = max(most, 1) if capacity_blocks is None else capacity_blocks
    index = TierIndex("replay", policy_name=policy, clock=clock, max_blocks=limit)
    entries = _entries(requests, ttl_s, block_size)
    hits = []
    for request in requests:
        clock.advance(max(request.arrival_s - clock.now(), 0.0))
        index.expire()
        blocks = [entries[hash_id] for hash_id in request.hash_ids]
        hits.append(index.find([entry.key for entry in blocks]))
        _visit(index, blocks[::-1] if reverse else blocks)
    name = INFINITE if capacity_blocks is None else policy
    left = (index.num_evicted, index.num_expired, len(index))
    return _result(name, capacity_blocks, ttl_s, reverse, requests, hits, left, block_size)


def belady(
    requests: Sequence[TraceRequest], capacity_blocks: int, *, deepest_first: bool = True, block_size: int = 512
) -> ReplayResult:
    """The bound: evict the block whose next request is farthest (Belady, IBM Systems Journal 5(2), 1966, "MIN").

    `num_found` is the most that any policy which inserts every block, first to last, can have, and so is more than it
    can have of hits. Of blocks with the same next request the deepest leaves first; that keeps prefixes whole, so that
    the hits reach that bound in practice. `deepest_first` False evicts the shallow ones first, as a MIN that knows no
    chains may: as many evictions in a large tier, but fewer hits, since a block without its parent is none.
    """
    uses = _next_uses(requests)
    sign = -1 if deepest_first else 1
    resident: dict[int, tuple[float, int]] = {}
    heap: list[tuple[float, int, int]] = []
    hits, num_evicted = [], 0
    for request, next_uses in zip(requests, uses, strict=True):
        hits.append(next((i for i, h in enumerate(request.hash_ids) if h not in resident), len(request.hash_ids)))
        for depth, (hash_id, next_use) in enumerate(zip(request.hash_ids, next_uses, strict=True)):
            if hash_id not in resident and len(resident) == capacity_blocks:
                _evict_farthest(resident, heap)
                num_evicted += 1
            resident[hash_id] = rank = (-next_use, sign * depth)
            heappush(heap, (*rank, hash_id))
    left = (num_evicted, 0, len(resident))
    return _result(BELADY, capacity_blocks, None, False, requests, hits, left, block_size)


def replay_file(
    path: Path,
    policies: Iterable[str],
    capacities: Iterable[int | None],
    ttls: Iterable[float | None] = (None,),
    *,
    block_size: int = 512,
) -> list[dict[str, Any]]:
    """Replay a Mooncake trace for every combination; one dict (`ReplayResult.row`) each.

    Capacity None is a tier without a limit: the policy does not matter, so it comes once a TTL, as "infinite". The
    policy "belady" is the bound, without TTL only. PlanError: a trace that cannot be read or has no prefixes.
    """
    requests = read_trace(path, block_size=block_size)
    if not any(request.hash_ids for request in requests):
        raise PlanError(f"{path} has no hash_ids, only lengths: a replay needs to know which prefixes are equal")
    names, limits, times = list(policies), list(dict.fromkeys(capacities)), list(ttls)
    results = [replay(requests, "lru", None, ttl, block_size=block_size) for ttl in times if None in limits]
    for capacity in (limit for limit in limits if limit is not None):
        if capacity < 1:
            raise UsageError(f"a capacity of {capacity} blocks: it must be 1 or more, or None for no limit")
        for name in names:
            if name == BELADY:
                results.append(belady(requests, capacity, block_size=block_size))
            else:
                results += [replay(requests, name, capacity, ttl, block_size=block_size) for ttl in times]
    return [result.row() for result in results]


def _entries(requests: Sequence[TraceRequest], ttl_s: float | None, block_size: int) -> Mapping[int, Entry]:
    """One entry a hash id, of one byte: the tier counts blocks."""
    terms = Terms() if ttl_s is None else Terms(idle_s=ttl_s + _HALF_A_TICK)
    steps = max(block_size // _TOKENS_A_STEP, 1)
    entries: dict[int, Entry] = {}
    for request in requests:
        for depth, hash_id in enumerate(request.hash_ids):
            if hash_id not in entries:
                entries[hash_id] = Entry(hash_id.to_bytes(32, "little"), 1, depth * steps, terms)
    return entries


def _visit(index: TierIndex, blocks: Sequence[Entry]) -> None:
    """Touch or insert `blocks` in order: resident runs in one call, absent ones in as few as give the same outcome."""
    keys = [entry.key for entry in blocks]
    start = 0
    while start < len(keys):
        stop = start + index.find(keys[start:])
        if stop > start:
            index.touch(keys[start:stop])
        else:
            stop = _end_of_absent(index, keys, start)
            index.reserve(blocks[start:stop])
            index.commit(keys[start:stop])
        start = stop


def _end_of_absent(index: TierIndex, keys: Sequence[bytes], start: int) -> int:
    """Where the run of absent keys that may be inserted at once ends: what there is room for, or one.

    A policy under which new blocks leave last may choose the victims of a whole run (as large as the tier) at once.
    """
    at_once = index.max_blocks if index.policy.newest_last else max(index.max_blocks - len(index), 1)
    stop = min(start + at_once, len(keys))
    return next((i for i in range(start + 1, stop) if index.get(keys[i]) is not None), stop)


def _next_uses(requests: Sequence[TraceRequest]) -> list[list[float]]:
    """For every block of every request: the number of the next request that has it, or infinity."""
    coming: dict[int, float] = {}
    uses: list[list[float]] = []
    for number in range(len(requests) - 1, -1, -1):
        hash_ids = requests[number].hash_ids
        uses.append([coming.get(hash_id, inf) for hash_id in hash_ids])
        coming.update(dict.fromkeys(hash_ids, number))
    return uses[::-1]


def _evict_farthest(resident: dict[int, tuple[float, int]], heap: list[tuple[float, int, int]]) -> None:
    while True:
        use, depth, hash_id = heappop(heap)
        if resident.get(hash_id) == (use, depth):  # else it was touched since
            del resident[hash_id]
            return


def _result(
    policy: str,
    capacity_blocks: int | None,
    ttl_s: float | None,
    reverse: bool,
    requests: Sequence[TraceRequest],
    hits: Sequence[int],
    left: tuple[int, int, int],
    block_size: int,
) -> ReplayResult:
    lengths = [len(request.hash_ids) for request in requests]
    looked_up = sum(min(hit + 1, length) for hit, length in zip(hits, lengths, strict=True))
    tokens = [min(hit * block_size, r.input_length) for hit, r in zip(hits, requests, strict=True)]
    return ReplayResult(
        policy=policy,
        capacity_blocks=capacity_blocks,
        ttl_s=ttl_s,
        reverse=reverse,
        num_requests=len(requests),
        num_hit_requests=sum(hit > 0 for hit in hits),
        num_blocks=sum(lengths),
        num_hit_blocks=sum(hits),
        num_tokens=sum(request.input_length for request in requests),
        num_hit_tokens=sum(tokens),
        num_evicted=left[0],
        num_expired=left[1],
        num_resident=left[2],
        num_operations=looked_up + sum(lengths),
    )
