"""How many blocks the memory holds."""

import psutil
import torch

from kvwise.core.config import EngineConfig
from kvwise.core.errors import CapacityError, UsageError
from kvwise.core.layout import KVLayout
from kvwise.models.loaded import LoadedModel

SHARE_CUDA, SHARE_CPU = 0.92, 0.3  # of the device's memory: a CPU's has other tenants
HOST_PER_DEVICE = 8  # size of the host tier, in device pools, unless given
SHARE_HOST = 0.3  # of the machine's free memory, at most, unless given


def kv_dtype(loaded: LoadedModel, config: EngineConfig) -> torch.dtype:
    """The dtype KV is stored in."""
    if config.kv_cache_dtype == "auto":
        return loaded.dtype
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config.kv_cache_dtype]


def max_model_len(loaded: LoadedModel, config: EngineConfig) -> int:
    """Tokens a request may have, prompt and output; refused if the model's positions do not reach so far."""
    wanted = config.max_model_len
    if wanted is not None and wanted > loaded.max_model_len:
        raise UsageError(
            f"max_model_len={wanted} is more than the {loaded.max_model_len} positions {loaded.name} was made for"
        )
    return wanted or loaded.max_model_len


def num_device_blocks(loaded: LoadedModel, config: EngineConfig, layout: KVLayout, bytes_per_block: int) -> int:
    """Blocks of the device pool. A size that is asked for is kept to; the default stops where it would be useless."""
    if config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // bytes_per_block
        budget = config.kv_cache_memory_bytes
    else:
        budget = _free_bytes(loaded, config)
        useful = config.max_num_seqs * layout.num_blocks_for(max_model_len(loaded, config))
        num_blocks = budget // bytes_per_block
        if config.gpu_memory_utilization is None:
            num_blocks = min(num_blocks, useful)
    if num_blocks < 1:
        raise CapacityError(
            f"{max(budget, 0) / 2**20:.1f} MiB for KV is less than one block of {bytes_per_block / 2**20:.2f} MiB "
            f"({layout.block_size} tokens of {loaded.name}): raise kv_cache_memory_bytes or gpu_memory_utilization"
        )
    return int(num_blocks)


def num_host_blocks(
    loaded: LoadedModel, config: EngineConfig, layout: KVLayout, num_device: int, bytes_per_block: int
) -> int:
    """Blocks of the host tier."""
    if config.kv_offloading_bytes is not None:
        num_blocks = config.kv_offloading_bytes // bytes_per_block
    else:
        useful = config.max_num_seqs * layout.num_blocks_for(max_model_len(loaded, config))
        free = int(psutil.virtual_memory().available * SHARE_HOST) // bytes_per_block
        num_blocks = min(HOST_PER_DEVICE * num_device, useful, free)
    if num_blocks < 1:
        raise CapacityError(
            f"kv_offloading_bytes={config.kv_offloading_bytes} is less than one block of {bytes_per_block} bytes"
        )
    return int(num_blocks)


def _free_bytes(loaded: LoadedModel, config: EngineConfig) -> int:
    """Memory that weights and KV may take together, less the weights."""
    if loaded.device.type == "cuda":
        total = torch.cuda.mem_get_info(loaded.device)[1]
        share = config.gpu_memory_utilization or SHARE_CUDA
    else:
        total = psutil.virtual_memory().total
        share = config.gpu_memory_utilization or SHARE_CPU
    return int(total * share) - loaded.weight_bytes
