"""Settings of an engine; names are vLLM's where the thing is the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvwise.core.errors import UsageError
from kvwise.core.tiering import OFFLOADS, TierSpec

FCFS, PRIORITY = "fcfs", "priority"
KV_DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much memory and how large a step.

    `gpu_memory_utilization` is the share of the device's memory (on a CPU: of the machine's) that weights and KV
    may take together; `kv_cache_memory_bytes` overrides it. None: 0.92 on CUDA, 0.3 on a CPU, where the machine has
    other tenants, and never more than `max_num_seqs` requests of `max_model_len` tokens could fill.
    """

    device: str = "cpu"
    block_size: int = 16
    kv_cache_dtype: str = "auto"  # auto: the model's dtype
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    kv_offloading_bytes: int | None = None  # host tier; None: as large as the device pool times eight
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    enable_chunked_prefill: bool = True
    scheduling_policy: str = FCFS  # or priority: a request's number goes before its arrival, the smallest first
    tiers: Sequence[TierSpec] = ()  # below the device, fastest first
    offload: str = "through"  # blocks go down as soon as they are full; "back": when their request ends
    store_after: int = 1  # a block goes down the so-manyth time that a request uses it
    store_min_tokens: int = 0  # prompts shorter than this are not stored
    tier_deadline_s: float = 10.0  # a transfer that takes longer is given up, and its blocks are computed
    ttl_s: float | None = None  # how long KV may be found, unless a request or session says otherwise
    idle_ttl_s: float | None = None  # likewise, without being used
    session_idle_s: float = 86_400.0  # a session that nobody has opened by itself is closed when idle for so long
    tenant_quotas: Mapping[str, int] = field(default_factory=dict)  # tenant -> most bytes kept, in each tier
    links: Mapping[str, float] = field(default_factory=dict)  # "host:device" -> bytes per second
    compute_share: float = 1.0  # of the device's time; the rest is slept: a stand-in for other tenants, in studies
    kernels: str | None = None  # None: the best for the device
    check: bool = False  # prove the cache's conservation after every step
    audit: bool = False  # compare what a selection method fetches with an exact ranking (slow)

    def __post_init__(self) -> None:
        share = self.gpu_memory_utilization
        limits: tuple[tuple[str, bool, str], ...] = (
            ("block_size", self.block_size in (8, 16, 32, 64, 128), "8, 16, 32, 64 or 128"),
            ("kv_cache_dtype", self.kv_cache_dtype in KV_DTYPES, f"one of {', '.join(KV_DTYPES)}"),
            ("gpu_memory_utilization", share is None or 0 < share <= 1, "above 0, at most 1"),
            ("kv_cache_memory_bytes", _above_0(self.kv_cache_memory_bytes), "above 0"),
            ("kv_offloading_bytes", _above_0(self.kv_offloading_bytes), "above 0"),
            ("max_num_seqs", self.max_num_seqs >= 1, "at least 1"),
            ("max_num_batched_tokens", self.max_num_batched_tokens >= 1, "at least 1"),
            ("max_model_len", _above_0(self.max_model_len), "at least 1"),
            ("scheduling_policy", self.scheduling_policy in (FCFS, PRIORITY), f"{FCFS} or {PRIORITY}"),
            ("offload", self.offload in OFFLOADS, f"one of {', '.join(OFFLOADS)}"),
            ("store_after", self.store_after >= 1, "at least 1"),
            ("store_min_tokens", self.store_min_tokens >= 0, "0 or more"),
            ("tier_deadline_s", self.tier_deadline_s > 0, "above 0"),
            ("ttl_s", _above_0(self.ttl_s), "above 0"),
            ("idle_ttl_s", _above_0(self.idle_ttl_s), "above 0"),
            ("session_idle_s", self.session_idle_s > 0, "above 0"),
            ("tenant_quotas", all(n > 0 for n in self.tenant_quotas.values()), "bytes above 0"),
            ("compute_share", 0 < self.compute_share <= 1, "above 0, at most 1"),
            ("links", all(speed > 0 for speed in self.links.values()), "speeds above 0, in bytes per second"),
        )
        for name, ok, limit in limits:
            if not ok:
                raise UsageError(f"{name}={getattr(self, name)!r} is out of range: it must be {limit}")
        kinds = [tier.kind for tier in self.tiers]
        if len(set(kinds)) < len(kinds):
            raise UsageError(f"tiers name {max(kinds, key=kinds.count)!r} twice: give each kind once")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running request decodes one token a step"
            )


def _above_0(value: float | None) -> bool:
    return value is None or value > 0
