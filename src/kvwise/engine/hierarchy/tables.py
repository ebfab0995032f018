"""Tables of codecs that profile a model: kept beside the records they are needed for, so that a restart reads them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from kvwise.cache.identity import Identity
from kvwise.core.layout import KVLayout
from kvwise.engine.hierarchy.tier import Tier
from kvwise.tiers.base import Extent, Fault
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.catalogue import make_codec
from kvwise.tiers.record import Header, open_record, seal

_CODEC = "tables"


@runtime_checkable
class HasTables(Protocol):
    """A codec whose bytes mean nothing without tables it has profiled."""

    def tables(self) -> bytes:
        """All of them, as `make_codec(..., tables=)` reads them back."""
        ...


def codec_with_tables(
    spec: str, layout: KVLayout, native: Identity, tiers: Sequence[Tier],
    sample: Callable[[], tuple[Tensor, Tensor]],
) -> Codec:  # fmt: skip
    """The codec `spec` for one model: with the tables a persistent tier has for it, else profiled.

    Profiling again might round differently on another machine, and every record would be foreign then.
    """
    root = native.root()
    key = hashlib.sha256(b"kvwise tables" + root + spec.encode()).digest()
    keeping = [tier for tier in tiers if tier.store.persistent]
    for tier in keeping:
        view = tier.store.read([Extent(key)])[0]
        found = view if isinstance(view, Fault) else open_record(view, key, root, _CODEC)
        if not isinstance(found, Fault):
            try:
                return make_codec(spec, layout=layout, tables=bytes(found[1][0]))
            except ValueError:
                continue  # of another version of the codec
    codec = make_codec(spec, layout=layout, sample=sample)
    if isinstance(codec, HasTables):
        header = Header(key, root, root, _CODEC, num_tokens=0, depth=0, stored_at=0.0)
        record = seal(header, [[codec.tables()]])
        for tier in keeping:
            tier.store.write([(key, record)])
    return codec
