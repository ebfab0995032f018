"""Looking a prompt up in the prefix index, and saying why the run of hits ended."""

import numpy as np

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.misses import Miss, MissReason
from kvwise.cache.store import BlockStore
from kvwise.cache.values import Match
from kvwise.policies.base import Blocks


def find_match(store: BlockStore, keys: PrefixKeys, num_tokens: int, block_size: int) -> Match:
    """Longest resident run of a prompt of `num_tokens` tokens that leaves one to compute. Changes nothing.

    A block that is due to expire, though not swept yet, ends the run.
    """
    limit = min(len(keys), (num_tokens - 1) // block_size)
    blocks = np.array(store.index.run(keys.chain, limit), np.int64)
    fresh = _num_unexpired(store, blocks)
    expired = fresh < len(blocks)
    blocks = blocks[:fresh]
    num_pending = store.index.num_announced(keys.chain[fresh:limit]) if fresh < limit else 0
    miss = Miss(MissReason.EXPIRED, fresh) if expired else _explain(store, keys, fresh, limit, num_pending > 0)
    return Match(blocks, fresh * block_size, num_pending * block_size, miss, store.index.generation)


def num_found(store: BlockStore, keys: PrefixKeys, limit: int) -> int:
    """Length of the leading run of `keys`, at most `limit`, that is resident and not expired."""
    return _num_unexpired(store, np.array(store.index.run(keys.chain, limit), np.int64))


def no_match(store: BlockStore) -> Match:
    """The answer when sharing is off."""
    return Match(np.zeros(0, np.int64), 0, 0, Miss(MissReason.SHARING_OFF, 0), store.index.generation)


def stands(store: BlockStore, match: Match, keys: PrefixKeys) -> bool:
    """Whether every matched block still holds its key."""
    if match.generation == store.index.generation:
        return True
    held = [store.index.key(block) for block in match.blocks.tolist()]
    return held == keys.chain[: len(held)]


def _num_unexpired(store: BlockStore, blocks: Blocks) -> int:
    if store.lifecycle.expiry.soonest > (now := store.clock.now()):
        return len(blocks)
    late = np.flatnonzero(store.lifecycle.expiry.at[blocks] <= now)
    return int(late[0]) if len(late) else len(blocks)


def _explain(store: BlockStore, keys: PrefixKeys, found: int, limit: int, pending: bool) -> Miss:
    if found == limit:
        return Miss(MissReason.BLOCK_BOUNDARY, found)
    if pending:
        return Miss(MissReason.PENDING, found)
    departed = store.ledger.explain(keys.chain[found], found, store.policy.name)
    if departed is not None:
        return departed
    if found == 0 and store.index.stored_under_other_salt(keys):
        return Miss(MissReason.OTHER_SALT, 0)
    if found == 0 and keys.bare_probe in store.foreign:
        return Miss(MissReason.OTHER_MODEL, 0)
    return Miss(MissReason.NEVER_STORED, found)
