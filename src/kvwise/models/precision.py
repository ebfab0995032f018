"""Which number format a device computes well."""

import logging
from collections.abc import Mapping
from types import MappingProxyType

import torch

from kvwise.core.errors import UsageError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
        **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
        **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    }
)

# Without one of these a CPU computes the format 100 times slower than float32 (AVX2: 0.6-1.0 GFLOP/s).
_INSTRUCTIONS: Mapping[torch.dtype, tuple[str, ...]] = MappingProxyType(
    {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
)
_log = logging.getLogger(__name__)


def choose_dtype(asked: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The format to compute in: `auto` is the checkpoint's where `device` is fast at it, else float32.

    Falling back to float32 is logged. A format asked for by name that the device is slow at is a UsageError.
    """
    if asked == "auto":
        if computes_fast(checkpoint, device):
            return checkpoint
        _log.warning("the weights are %s, which this CPU computes slowly: they are held in float32", _name(checkpoint))
        return torch.float32
    if asked not in DTYPES:
        raise UsageError(f"dtype={asked!r} is not known: use auto, float32, bfloat16 or float16")
    chosen = DTYPES[asked]
    if not computes_fast(chosen, device):
        raise UsageError(
            f"dtype={asked!r}: this CPU computes {_name(chosen)} about 100 times slower than float32:"
            " use float32 (the KV can still be stored in half precision)"
        )
    return chosen


def computes_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies matrices of `dtype` at least as fast as float32 ones."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if device.type != "cpu" or dtype is torch.float32:
        return True
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in _INSTRUCTIONS[dtype])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
