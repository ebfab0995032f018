"""Arenas: zeroed memory of the right shape and size, given back when it is gone."""

import gc
from pathlib import Path

import psutil
import pytest
import torch

from kvwise.core.layout import KVLayout
from kvwise.engine.placement.staging import Staging
from kvwise.tiers.arena import Arena, block_bytes
from kvwise.tiers.memory import allocate

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, element_bytes=4)


def test_shapes_and_bytes() -> None:
    arena = Arena(LAYOUT, 5, torch.float32, CPU, ("mass", "positions"))
    assert arena.keys.shape == arena.values.shape == (30, 16, 8)
    assert arena.columns["mass"].dtype is torch.float32
    assert arena.columns["positions"].dtype is torch.int32
    assert arena.num_bytes == 5 * block_bytes(LAYOUT, ("mass", "positions"))
    assert block_bytes(LAYOUT) == LAYOUT.block_bytes


def test_a_column_by_block_holds_a_token_of_all_heads_side_by_side() -> None:
    arena = Arena(LAYOUT, 2, torch.float32, CPU, ("positions",))
    arena.by_block("positions")[1, :, 3] = 7
    slots = arena.columns["positions"].nonzero().tolist()
    assert slots == [[page, 3] for page in range(6, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (700, 1000), (4 * 1024 * 1024,)])
def test_memory_is_zeroed_and_writable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    memory = allocate(shape, dtype, CPU)
    assert memory.shape == shape
    assert memory.dtype is dtype
    assert not memory.any()
    if memory.numel():
        memory[-1] = 1
        assert memory[-1].flatten()[-1] == 1


def test_large_memory_is_lazy_and_goes_back_to_the_system() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    size = 256 * 2**20
    memory = allocate((size // 4,), torch.float32, CPU)
    assert process.memory_info().rss - before < size // 4  # nothing is touched yet
    memory.fill_(1.0)
    assert process.memory_info().rss - before > size // 2
    del memory
    gc.collect()
    assert process.memory_info().rss - before < size // 4


def test_staging_lends_pages_by_number_and_forgets_its_memory_when_cleared() -> None:
    staging = Staging(LAYOUT, torch.float32, CPU)
    assert staging.num_bytes == 0
    first = staging.take(3)
    second = staging.take(5)
    assert len({*first.tolist(), *second.tolist()}) == 8
    held = staging.num_bytes
    assert held >= 8 * LAYOUT.page_bytes
    staging.give(first)
    again = staging.take(3)
    assert set(again.tolist()).isdisjoint(second.tolist())
    assert staging.num_bytes == held  # what was given back is lent again
    staging.give(again)
    staging.clear()
    assert staging.num_bytes == held  # five are lent still
    staging.give(second)
    staging.clear()
    assert staging.num_bytes == 0


def test_large_memory_gets_huge_pages_where_the_system_offers_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system offers no transparent huge pages")
    before = huge_kib()
    tensor = allocate((64 * 2**20,), torch.uint8, torch.device("cpu"))
    tensor.fill_(1)
    assert huge_kib() - before >= 32 * 1024


def huge_kib() -> int:
    """KiB of this process in huge pages."""
    line = next(x for x in Path("/proc/self/smaps_rollup").read_text().splitlines() if x.startswith("AnonHugePages"))
    return int(line.split()[1])
