"""The KV cache manager: decisions over block ids and page ids, no tensors.

`manager.CacheManager` is the only face the engine uses for the device pool. Beneath it: `identity` (keys), `pool`
(blocks and loose pages), `tables` (sequences), `prefix` (key -> block), `paging` (per-head page tables), `lifecycle`
(expiry, pins), `quotas`, `misses`, `events`, and `check` (the proof that nothing leaked).

`residency.TierIndex` is the book of each tier below. What a block is kept under, `terms`, is the same in all of them:
`ttl` and `scopes` say how it follows from a request, `sessions` who holds which keys over all tiers.
"""
