"""Which placement carries out a strategy, and the memory it works on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvwise.cache.identity import Identity
from kvwise.cache.manager import CacheManager
from kvwise.core.clock import Clock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import UnsupportedModel, UsageError
from kvwise.core.layout import KVLayout, LayerMap
from kvwise.core.method import Method
from kvwise.core.strategy import Strategy
from kvwise.engine.calibrate import calibrate, sample_blocks
from kvwise.engine.hierarchy.build import link_names, make_hierarchy, make_tiers
from kvwise.engine.hierarchy.hierarchy import Hierarchy
from kvwise.engine.hierarchy.loads import Loads
from kvwise.engine.hierarchy.tables import codec_with_tables
from kvwise.engine.hierarchy.tier import Tier
from kvwise.engine.placement.base import Placement
from kvwise.engine.placement.blocks import BlockPlacement
from kvwise.engine.placement.demote import DemotePlacement
from kvwise.engine.placement.heirs import Heir
from kvwise.engine.placement.host_pool import HostPool
from kvwise.engine.placement.pages import PagePlacement
from kvwise.engine.placement.recall import RecallPlacement
from kvwise.engine.placement.recall_fetch import Recall
from kvwise.engine.placement.recall_tiers import RecallTiers
from kvwise.engine.placement.strided import StridedPlacement
from kvwise.engine.sizing import kv_dtype, max_model_len, num_device_blocks, num_host_blocks
from kvwise.kernels import kernels_for
from kvwise.kernels.base import Kernels
from kvwise.methods.encoding.base import Encoding, EncodingShape
from kvwise.methods.loading.base import Loading
from kvwise.methods.retention.base import ResidualShape, Retention
from kvwise.methods.retention.strided import Strided
from kvwise.methods.selection.base import IndexShape, Selection
from kvwise.models.loaded import LoadedModel
from kvwise.models.rotation import Rotation, find_rotations
from kvwise.policies.lru import LRU
from kvwise.tiers.arena import Arena, block_bytes, packed_per_block
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.link import Link

LINKS = ("host:device", "device:host")


@dataclass(frozen=True, slots=True)
class Memory:
    """The device pool: ids, bytes, kernels, and who rearranges them."""

    layout: KVLayout
    cache: CacheManager
    arena: Arena
    kernels: Kernels
    placement: Placement
    loads: Loads | None = None  # the tiers below, if there are any

    @property
    def hierarchy(self) -> Hierarchy | None:
        """The tiers below the device."""
        return None if self.loads is None else self.loads.hierarchy


def make_memory(loaded: LoadedModel, strategy: Strategy, config: EngineConfig, clock: Clock) -> Memory:
    """Size and allocate the device pool, and whatever the strategy needs beside it."""
    _check_tiers(strategy, config)
    dtype = kv_dtype(loaded, config)
    retention, selection = strategy.retention, strategy.selection
    encoding, loading = strategy.encoding, strategy.loading
    assert isinstance(retention, Retention) and isinstance(selection, Selection)
    assert isinstance(encoding, Encoding) and isinstance(loading, Loading)
    shape = EncodingShape(
        loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, dtype, config.block_size, loaded.name, loaded.folder
    )
    layout = _layout(shape, encoding)
    page_format = encoding.page_format(shape)
    columns = _columns(retention)
    num_blocks = num_device_blocks(loaded, config, layout, block_bytes(layout, columns, page_format))
    arena = Arena(layout, num_blocks, dtype, loaded.device, columns, page_format)
    sharing = strategy.reuse.name == "prefix"
    kernels = kernels_for(loaded.device, config.kernels)
    tiers = make_tiers(config, layout, clock)
    codec = _codec(loaded, loading, layout, kernels, tiers, _identity(loaded, layout, dtype))
    identity = _identity(loaded, layout, dtype, codec)
    num_packed = 0 if page_format is None else packed_per_block(layout, page_format)
    cache = _manager(loaded, config, layout, num_blocks, clock, identity, sharing=sharing, packed_per_block=num_packed)
    placement: Placement
    if not selection.default:
        recall, host = _recall(loaded, selection, config, layout, dtype, clock, arena, kernels)
        if retention.drops:
            placement = DemotePlacement(
                recall,
                host,
                lambda demoter: _pages(loaded, retention, encoding, config, cache, arena, kernels, demoter),
            )
        else:
            placement = RecallPlacement(recall, cache, host)
    elif isinstance(retention, Strided) and retention.drops:
        placement = _strided(loaded, retention, config, cache, arena, kernels)
    elif retention.drops or page_format is not None:
        placement = _pages(loaded, retention, encoding, config, cache, arena, kernels)
    else:
        placement = BlockPlacement()
    loads = None if codec is None else _loads(loading, config, clock, cache, arena, codec, identity, tiers)
    return Memory(layout, cache, arena, kernels, placement, loads)


def _layout(shape: EncodingShape, encoding: Encoding) -> KVLayout:
    """Blocks of the layers that store KV."""
    layers = LayerMap(encoding.layer_map(shape))
    return KVLayout(
        len(layers.stored), shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype.itemsize, layers
    )


def _columns(retention: Retention) -> list[str]:
    """What must be known of each token beside its keys and values."""
    if not retention.drops:
        return []
    return ["positions", *(["mass"] if retention.needs_mass or retention.marks_rows else [])]


def _pages(
    loaded: LoadedModel, retention: Retention, encoding: Encoding, config: EngineConfig, cache: CacheManager,
    arena: Arena, kernels: Kernels, demoter: Heir | None = None,
) -> PagePlacement:  # fmt: skip
    layout = arena.layout
    shape = ResidualShape(
        config.max_num_seqs, layout.num_layers, loaded.num_query_heads, layout.num_kv_heads, layout.head_dim,
        loaded.device, loaded.name, loaded.folder, kernels,
    )  # fmt: skip
    residual = retention.residual(shape) if retention.drops else None
    layers = [loaded.layers[layer] for layer in layout.layers.stored]
    return PagePlacement(retention, encoding, cache, arena, kernels, layers, config.max_num_seqs, residual, demoter)


def _strided(
    loaded: LoadedModel, retention: Strided, config: EngineConfig, cache: CacheManager, arena: Arena, kernels: Kernels
) -> StridedPlacement:
    _refuse_windows(loaded, retention, config)
    rotations: list[Rotation] = []
    if retention.turns:
        try:
            found = find_rotations(loaded, kernels)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{error}: {retention.name} needs positions=original there") from error
        rotations = [found[layer] for layer in arena.layout.layers.stored]
    return StridedPlacement(retention, cache, arena, kernels, rotations, config.max_num_seqs)


def _check_tiers(strategy: Strategy, config: EngineConfig) -> None:
    """Links that exist, and tiers together with a method that uses them."""
    assert isinstance(strategy.loading, Loading)
    known = list(dict.fromkeys([*LINKS, *link_names(config.tiers)]))
    unknown = sorted(set(config.links) - set(known))
    if unknown:
        raise UsageError(f"no link is called {unknown[0]!r}; links: {', '.join(known)}")
    if config.tiers and strategy.loading.codec is None:
        raise UsageError(
            f"tiers are given, but {strategy.loading.name} loads nothing: name a loading method in the strategy, "
            f"such as {strategy}+load"
        )
    if not config.tiers and strategy.loading.codec is not None:
        raise UsageError(
            f"{strategy.loading.name} loads from tiers, and none is given: add one, such as host(size=1GiB)"
        )


def _codec(
    loaded: LoadedModel, loading: Loading, layout: KVLayout, kernels: Kernels, tiers: Sequence[Tier], native: Identity
) -> Codec | None:
    if loading.codec is None:
        return None
    return codec_with_tables(loading.codec, layout, native, tiers, lambda: sample_blocks(loaded, layout, kernels))


def _loads(
    loading: Loading, config: EngineConfig, clock: Clock, cache: CacheManager, arena: Arena, codec: Codec,
    identity: Identity, tiers: Sequence[Tier],
) -> Loads:  # fmt: skip
    hierarchy = make_hierarchy(config, tiers, codec, arena, cache, identity, clock)
    return Loads(
        loading, hierarchy, cache, arena, clock,
        step_tokens=config.max_num_batched_tokens, deadline_s=config.tier_deadline_s,
    )  # fmt: skip


def _identity(loaded: LoadedModel, layout: KVLayout, dtype: torch.dtype, codec: Codec | None = None) -> Identity:
    """What the bytes of a block depend on. KV that may have been through a lossy codec is another thing."""
    return Identity(
        model=loaded.name,
        revision=loaded.revision,
        dtype=f"{loaded.dtype}/{dtype}",
        block_size=layout.block_size,
        num_layers=layout.num_layers,
        layers=str(layout.layers),
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        positions="absolute",
        encoding="native" if codec is None or codec.lossless else "native, at rest as " + " or ".join(codec.levels),
    )


def _manager(
    loaded: LoadedModel, config: EngineConfig, layout: KVLayout, num_blocks: int, clock: Clock, identity: Identity,
    *, sharing: bool, packed_per_block: int = 0,
) -> CacheManager:  # fmt: skip
    return CacheManager(
        num_blocks=num_blocks,
        pages_per_block=layout.pages_per_block,
        block_size=layout.block_size,
        max_sequences=config.max_num_seqs,
        max_blocks_per_sequence=layout.num_blocks_for(max_model_len(loaded, config)),
        sharing=sharing,
        identity=identity,
        policy=LRU(num_blocks),
        clock=clock,
        packed_per_block=packed_per_block,
        quotas={t: max(1, limit // layout.block_bytes) for t, limit in config.tenant_quotas.items()} if sharing else {},
    )


def _refuse_windows(loaded: LoadedModel, method: Method, config: EngineConfig) -> None:
    """Some methods know of no sliding windows: they serve texts that do not outgrow them."""
    longest = max_model_len(loaded, config)
    windows = [layer.window for layer in loaded.layers if layer.window is not None and layer.window < longest]
    if windows:
        raise UnsupportedModel(
            f"{method.name} cannot serve {loaded.name} beyond its sliding window of {min(windows)} tokens: "
            f"set max_model_len to at most {min(windows)}, or use another strategy"
        )


def _recall(
    loaded: LoadedModel, selection: Selection, config: EngineConfig, layout: KVLayout, dtype: torch.dtype,
    clock: Clock, arena: Arena, kernels: Kernels,
) -> tuple[Recall, HostPool]:  # fmt: skip
    """A calibrated index, and the host's side."""
    _refuse_windows(loaded, selection, config)
    softcaps = tuple(layer.softcap for layer in loaded.layers)
    shape = IndexShape(
        layout.num_layers, loaded.num_query_heads, layout.num_kv_heads, layout.head_dim, loaded.device, softcaps
    )
    index = selection.index(shape)
    calibrate(loaded, index, layout, kernels)
    cpu = torch.device("cpu")
    num_blocks = num_host_blocks(loaded, config, layout, arena.num_blocks, block_bytes(layout))
    tiers = RecallTiers(
        arena,
        Arena(layout, num_blocks, dtype, cpu),
        kernels,
        # Transfers run beside the computation: they must not ask for the threads it uses.
        kernels_for(cpu, config.kernels if loaded.device == cpu else None, num_threads=1),
        fetch_link=Link("host:device", config.links.get("host:device")),
        store_link=Link("device:host", config.links.get("device:host")),
    )
    recall = Recall(selection, index, tiers, loaded.layers, config.audit)
    host_cache = _manager(loaded, config, layout, num_blocks, clock, _identity(loaded, layout, dtype), sharing=False)
    return recall, HostPool(host_cache, tiers, selection.kept_steps)
