"""Options of a model and its engine, as of `LLM` and EngineConfig; names and meanings are vLLM's where it has them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from kvwise.core.config import FCFS, EngineConfig
from kvwise.core.sizes import parse_bytes, parse_link, parse_seconds
from kvwise.core.tiering import parse_tier

if TYPE_CHECKING:
    from kvwise.models.loaded import LoadedModel

MODEL, MEMORY, TIERS = "Model", "Memory", "Tiers below the device"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded and served."""

    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL)] = "auto"
    device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=MODEL)] = "cpu"
    seed: Annotated[int, typer.Option(help="Draws the weights of random: models.", rich_help_panel=MODEL)] = 0
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", rich_help_panel=MODEL)] = False
    max_model_len: Annotated[int | None, typer.Option(help="Tokens a request may have.", rich_help_panel=MODEL)] = None
    kernels: Annotated[
        str | None, typer.Option(help="Kernel family; default: the fastest here.", rich_help_panel=MODEL)
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(help="Share of memory for weights and KV, on a CPU too.", rich_help_panel=MEMORY),
    ] = None
    kv_cache_memory_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of the KV pool, such as 512MiB.", rich_help_panel=MEMORY)
    ] = None
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.", rich_help_panel=MEMORY)] = (
        "auto"
    )
    block_size: Annotated[int, typer.Option(help="Tokens per block.", rich_help_panel=MEMORY)] = 16
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.", rich_help_panel=MEMORY)] = 64
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens per step.", rich_help_panel=MEMORY)] = 512
    enable_chunked_prefill: Annotated[bool, typer.Option(rich_help_panel=MEMORY)] = True
    scheduling_policy: Annotated[str, typer.Option(help="fcfs or priority.", rich_help_panel=MEMORY)] = FCFS
    kv_offloading_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of the host tier, such as 4GiB.", rich_help_panel=TIERS)
    ] = None
    tier: Annotated[
        list[str] | None,
        typer.Option(help="Below the device, such as 'disk(path=/var/cache/kvwise)'.", rich_help_panel=TIERS),
    ] = None
    offload: Annotated[str, typer.Option(help="through or back.", rich_help_panel=TIERS)] = "through"
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long KV may be found: 15m, 2h.", rich_help_panel=TIERS)
    ] = None
    idle_ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="Likewise, without being used.", rich_help_panel=TIERS)
    ] = None
    link: Annotated[
        list[str] | None, typer.Option(help="Throttle, such as host:device=12GB/s.", rich_help_panel=TIERS)
    ] = None

    def config(self) -> EngineConfig:
        """As the engine takes them; UsageError for what is out of range."""
        return EngineConfig(
            device=self.device,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=parse_bytes(self.kv_cache_memory_bytes) if self.kv_cache_memory_bytes else None,
            kv_offloading_bytes=parse_bytes(self.kv_offloading_size) if self.kv_offloading_size else None,
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            enable_chunked_prefill=self.enable_chunked_prefill,
            scheduling_policy=self.scheduling_policy,
            tiers=[parse_tier(text) for text in self.tier or ()],
            offload=self.offload,
            ttl_s=parse_seconds(self.ttl, "--ttl") if self.ttl else None,
            idle_ttl_s=parse_seconds(self.idle_ttl, "--idle-ttl") if self.idle_ttl else None,
            links=dict(parse_link(text) for text in self.link or ()),
            kernels=self.kernels,
        )

    def load(self, model: str) -> "LoadedModel":
        """Load the model; this imports torch."""
        from kvwise.models.load import load_model

        return load_model(
            model, dtype=self.dtype, device=self.device, seed=self.seed, trust_remote_code=self.trust_remote_code
        )
