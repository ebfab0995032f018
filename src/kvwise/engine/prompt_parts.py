"""What saving and loading of prompt caches share: headers, deadlines, room in memory."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kvwise.cache.identity import PrefixKeys
from kvwise.cache.terms import Terms
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.device import DeviceBlocks
from kvwise.engine.hierarchy.names import Deadlines, tag
from kvwise.engine.lifecycle import Owner
from kvwise.engine.prompt_file import Link
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.raw import Raw
from kvwise.tiers.record import Header, record_bytes

RAW = cast(Codec, Raw())
AT_ONCE = 32  # blocks


def block_header(engine: Engine, link: Link, terms: Terms, owner: Owner, deadlines: Deadlines) -> Header:
    """The header of a block's record, for the file or for a tier of one codec level."""
    stored_at, expires_at, idle_s = deadlines.header_times(terms)
    return Header(
        key=link.key,
        parent=link.parent,
        identity=engine.memory.cache.identity.root(),
        codec=RAW.levels[0],
        num_tokens=engine.memory.layout.block_size,
        depth=link.depth,
        stored_at=stored_at,
        expires_at=expires_at,
        idle_s=idle_s,
        tenant=tag(owner.tenant),
        session=tag(owner.session),
    )


def prefix_keys(engine: Engine, root: bytes, chain: list[bytes], tokens: Sequence[int] | None = None) -> PrefixKeys:
    """A chain as a prompt would have it."""
    cache = engine.memory.cache
    if tokens is not None:  # the probes of the first block tell later misses of other salts why
        whole = cache.keys(np.array(tokens, np.int64))
        return PrefixKeys(root, whole.unsalted_root, chain, whole.probe, whole.bare_probe)
    return PrefixKeys(root, cache.identity.root(), chain, chain[0])


def deadlines_of(engine: Engine) -> Deadlines:
    """Between the engine's clock and the wall's."""
    hierarchy = engine.memory.hierarchy
    return Deadlines.start(engine.clock) if hierarchy is None else hierarchy.deadlines


def device_of(engine: Engine) -> DeviceBlocks:
    """The blocks of the device pool."""
    hierarchy = engine.memory.hierarchy
    return DeviceBlocks(engine.memory.arena) if hierarchy is None else hierarchy.device


def room_for(engine: Engine, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values [n, L, H, block_size, D] in CPU memory, for blocks on their way."""
    layout, arena = engine.memory.layout, engine.memory.arena
    shape = (num_blocks, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return torch.empty(shape, dtype=arena.keys.dtype), torch.empty(shape, dtype=arena.values.dtype)


def size_of_record(engine: Engine) -> int:
    """Bytes of one raw record."""
    layout = engine.memory.layout
    return record_bytes([layout.block_bytes // layout.num_layers] * layout.num_layers)
