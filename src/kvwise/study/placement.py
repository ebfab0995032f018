"""Where KV lies below the device in a cell: tiers, throttled links, and how long it is kept."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kvwise.core.errors import PlanError, UsageError
from kvwise.core.options import read_call
from kvwise.core.sizes import parse_link
from kvwise.core.tiering import TierSpec, parse_tier

NEVER = "never"  # the time to live of what has none, as a plan writes it


@dataclass(frozen=True, slots=True)
class Placement:
    """One place on the axes of placement. A strategy without a loading method has no tiers, wherever it stands.

    `tiers` are texts such as `host(size=256MiB)`, fastest first; `links` are (link, speed) as a plan writes them, on
    top of the whole plan's; None: kept for good.
    """

    tiers: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    ttl_s: float | None = None
    idle_ttl_s: float | None = None

    @property
    def tiers_text(self) -> str:
        """The tiers as shown; empty: none."""
        return " + ".join(self.tiers)

    @property
    def links_text(self) -> str:
        """The throttled links as shown; empty: none."""
        return ", ".join(f"{name} {speed}" for name, speed in self.links)

    def words(self) -> list[str]:
        """What is not as usual, in words."""
        return placement_words(self.tiers_text, self.links_text, self.ttl_s, self.idle_ttl_s)


NOWHERE = Placement()


def placement_words(tiers: str, links: str, ttl_s: float | None, idle_ttl_s: float | None) -> list[str]:
    """The parts of a placement that are not as usual, in words."""
    parts = [brief(tiers), f"{links} (throttled)" if links else ""]
    parts += [f"TTL {ttl_s:g} s" if ttl_s is not None else "", f"idle TTL {idle_ttl_s:g} s" if idle_ttl_s else ""]
    return [part for part in parts if part]


def brief(tiers: str) -> str:
    """Tiers as short as they can be told apart: `host 256MiB + disk 1GiB`."""
    return re.sub(r"[a-z]+=", "", tiers).replace("(", " ").replace(")", "").replace(",", "")


def link_table(links: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, float]:
    """Links with their speeds as written -> bytes per second. UsageError if one is no speed."""
    return dict(parse_link(f"{name}={speed}") for name, speed in dict(links).items())


def tier_spec(text: str, folder: Path) -> TierSpec:
    """Read a tier of a plan; a disk tier that does not say where it lies, lies in `folder`."""
    kind, given = read_call(text, "tier", UsageError)
    if kind != "disk" or "path" in given:
        return parse_tier(text)
    options = text.strip().removeprefix("disk").strip("()").strip()
    return replace(parse_tier(f"disk(path=here{', ' if options else ''}{options})"), where=str(folder))


def check_tiers(tiers: Iterable[str]) -> None:
    """PlanError if a tier cannot be read or a kind is named twice."""
    try:
        kinds = [tier_spec(text, Path("folder")).kind for text in tiers]
    except UsageError as error:
        raise PlanError(f"tiers: {error}") from error
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise PlanError(f"tiers name {kind!r} twice in one list: give each kind once")
