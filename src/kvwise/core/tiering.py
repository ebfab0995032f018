"""Tiers below the device as values: what is asked for, before anything is opened."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvwise.core.errors import UsageError
from kvwise.core.options import check_options, read_call
from kvwise.core.sizes import parse_bytes, show_bytes

KINDS = ("host", "disk", "redis", "object", "memory")
OFFLOADS = ("through", "back")
DEFAULT_SIZES = {"host": "1GiB", "disk": "16GiB", "redis": "4GiB", "object": "64GiB", "memory": "1GiB"}


@dataclass(frozen=True, slots=True)
class TierOptions:
    """The options of a tier as they are written: `disk(path=/var/cache/kv, size=20GiB, policy=s3fifo)`.

    `size` is the byte budget, `policy` the replacement policy. `path` is the folder of a disk tier, `url` the place of
    a redis or object tier.
    """

    size: str | None = None
    policy: str = "lru"
    path: str | None = None
    url: str | None = None


@dataclass(frozen=True, slots=True)
class TierSpec:
    """One tier: its kind (which is its name too), byte budget, replacement policy, and where it lies."""

    kind: str
    size_bytes: int
    policy: str = "lru"
    where: str = ""  # folder or URL

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"no tier is called {self.kind!r}; tiers: {', '.join(KINDS)}")
        if self.size_bytes <= 0:
            raise UsageError(f"tier {self.kind}: size {self.size_bytes} must be above 0 bytes")
        needs = {"disk": "path", "redis": "url", "object": "url"}.get(self.kind)
        if needs is not None and not self.where:
            raise UsageError(f"tier {self.kind} does not say where it lies: write {self.kind}({needs}=...)")
        if needs is None and self.where:
            raise UsageError(f"tier {self.kind} lies in memory: it has no path or url")

    def __str__(self) -> str:
        where = {"disk": f", path={self.where}", "redis": f", url={self.where}", "object": f", url={self.where}"}
        policy = "" if self.policy == "lru" else f", policy={self.policy}"
        return f"{self.kind}(size={show_bytes(self.size_bytes)}{policy}{where.get(self.kind, '')})"


def parse_tier(text: str) -> TierSpec:
    """Read `host(size=4GiB)` or `disk(path=/var/cache/kv, size=20GiB, policy=sieve)`; UsageError if it cannot be."""
    kind, given = read_call(text, "tier", UsageError)
    if kind not in KINDS:
        raise UsageError(f"no tier is called {kind!r}; tiers: {', '.join(KINDS)}")
    size = given.get("size")
    as_text: Mapping[str, object] = {**given, "size": str(size)} if size is not None else given
    checked = check_options(kind, TierOptions, as_text, UsageError)
    options = TierOptions(**checked)  # type: ignore[arg-type]
    if options.path is not None and options.url is not None:
        raise UsageError(f"tier {kind}: give a path or a url, not both")
    where = options.path if kind == "disk" else options.url
    if (options.path or options.url) and where is None:
        raise UsageError(f"tier {kind} has no option {'path' if options.path else 'url'!r}")
    return TierSpec(kind, parse_bytes(options.size or DEFAULT_SIZES[kind]), options.policy, where or "")
