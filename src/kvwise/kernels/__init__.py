"""Attention over paged KV and the moves of its rows: sisters with one signature, picked by `kernels_for`."""

import functools
import importlib.util
import logging

import torch

from kvwise.core.errors import UsageError
from kvwise.kernels.base import Attention, Kernels, Sealed, Segment

__all__ = ["Attention", "Kernels", "Sealed", "Segment", "available_kernels", "kernels_for"]


def available_kernels(device: torch.device) -> list[str]:
    """Names of the kernel families that can run here, fastest first."""
    names: list[str] = []
    if device.type == "cpu" and importlib.util.find_spec("kvwise._native") is not None:
        from kvwise.kernels.cpu import instruction_sets

        names += [f"cpu-{name}" for name in instruction_sets()]
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        names.append("triton")
    return [*names, "reference"]


def kernels_for(device: torch.device, name: str | None = None, *, num_threads: int | None = None) -> Kernels:
    """The kernel family called ``name``, or the fastest one for ``device``.

    Names: ``reference`` (plain torch, anywhere), ``cpu-avx512``, ``cpu-avx2``, ``cpu-generic`` (native) and
    ``triton``. ``num_threads`` is for the native ones (None: as many as torch uses). Raises UsageError if the named
    family cannot run here.
    """
    available = available_kernels(device)
    if name is None:
        if device.type == "cpu" and available == ["reference"]:
            _say_slow_once()
        name = available[0]
    elif name not in available and name != "triton":
        raise UsageError(f"no kernels called {name!r} on {device}; available here: {', '.join(available)}")
    if name == "triton":
        from kvwise.kernels.triton import TritonKernels

        return TritonKernels()
    if name.startswith("cpu-"):
        from kvwise.kernels.cpu import CpuKernels

        return CpuKernels(name.removeprefix("cpu-"), num_threads)
    from kvwise.kernels.reference import ReferenceKernels

    return ReferenceKernels()


@functools.cache
def _say_slow_once() -> None:
    logging.getLogger(__name__).warning(
        "kvwise was installed without its native kernels (no C++ compiler?): the torch reference runs, correct but slow"
    )
