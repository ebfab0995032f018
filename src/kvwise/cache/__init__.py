"""The KV cache manager: decisions over block ids and page ids, no tensors.

`manager.CacheManager` is the only face the engine uses. Beneath it: `identity` (keys), `pool` (blocks and
loose pages), `tables` (sequences), `prefix` (key -> block), `paging` (per-head page tables), `lifecycle`
(expiry, pins), `misses`, `events`, and `check` (the proof that nothing leaked).
"""
