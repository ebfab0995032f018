"""Settings of an engine; names are vLLM's where the thing is the same."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvwise.core.errors import UsageError

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
    links: Mapping[str, float] = field(default_factory=dict)  # "host:device" -> bytes per second
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
            ("links", all(speed > 0 for speed in self.links.values()), "speeds above 0, in bytes per second"),
        )
        for name, ok, limit in limits:
            if not ok:
                raise UsageError(f"{name}={getattr(self, name)!r} is out of range: it must be {limit}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: each running request decodes one token a step"
            )


def _above_0(value: int | None) -> bool:
    return value is None or value > 0


_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_bytes(text: str) -> int:
    """Read a size such as `512MiB`, `2GB`, `1.5g` or `1048576`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is no size; write a number with a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_link(text: str) -> tuple[str, float]:
    """Read a link throttle such as `host:device=12GB/s` or `host:disk=25Gbps` -> (link, bytes per second)."""
    match = re.fullmatch(r"([a-z]+:[a-z]+)=([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(b/s|bps)", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no link; write link=speed, such as host:device=12GB/s or host:disk=25Gbps")
    # A lower-case b in "bps" is bits, as network links are sold; "B/s" is bytes.
    bits = 8 if match[4].lower() == "bps" else 1
    speed = float(match[2]) * _UNITS[match[3].lower()] / bits
    if speed <= 0:
        raise UsageError(f"link {match[1]}: speed {match[2]} must be above 0")
    return match[1], speed
