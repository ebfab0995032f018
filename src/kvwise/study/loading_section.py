"""The `[[loading]]` tables of a plan: the time to the first token of a request whose prefix is stored below."""

import re
from typing import Annotated

from pydantic import Field

from kvwise.core.errors import PlanError, UsageError
from kvwise.core.sizes import parse_link
from kvwise.study.placement import check_tiers
from kvwise.study.quality_section import Context
from kvwise.study.strict import Strict

COMPUTE = "compute"  # measured in every cell: what the others are held against
LOAD = "load"
BASE = "full+prefix"
Share = Annotated[float, Field(gt=0, le=1)]


class Mixed(Strict):
    """Short requests that arrive together with the long one: `requests` of `low` to `high` tokens each."""

    requests: int = Field(ge=1, le=1000)
    low: int = Field(ge=1)
    high: int = Field(ge=1)


class Loading(Strict):
    """One request whose prefix lies in a tier and not on the device, over length x bandwidth x share of the device.

    A bandwidth is a speed ("20MB/s") or a multiple of the break-even ("0.3x"): the speed at which loading the longest
    prefix takes as long as computing it with the whole device, as measured on the spot. With a compute share below 1
    a step has that share of `step_tokens`, and is drawn out to what a full step takes: the rest of the budget belongs
    to others (Cake, arXiv 2410.03065, section 5).
    """

    name: str = Field(min_length=1, max_length=64)
    models: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(default=(LOAD, "cake"), min_length=1)
    tier: str = "host(size=256MiB)"
    context_lengths: tuple[Context, ...] = Field(default=(512, 1024, 2048), min_length=1)
    bandwidths: tuple[str, ...] = Field(default=("0.3x", "1x", "3x"), min_length=1)
    compute_shares: tuple[Share, ...] = Field(default=(1.0,), min_length=1)
    step_tokens: int = Field(default=128, ge=8)
    repeats: int = Field(default=3, ge=1, le=100)
    mixed: Mixed | None = None

    @property
    def strategies(self) -> dict[str, str]:
        """Method -> strategy, computing first."""
        return {COMPUTE: BASE} | {method: f"{BASE}+{method}" for method in self.methods}


def read_bandwidth(text: str) -> tuple[float, bool]:
    """(1.5, True) for "1.5x" of the break-even, (bytes per second, False) for "20MB/s". PlanError if it is neither."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)x", text.strip())
    try:
        value = parse_link(f"a:b={text}")[1] if match is None else float(match[1])
    except UsageError:
        raise PlanError(
            f"bandwidth {text!r} is none; write a speed such as 20MB/s, or 0.5x of the break-even"
        ) from None
    if value <= 0:
        raise PlanError(f"bandwidth {text!r} must be above 0")
    return value, match is not None


def check_loading(block: Loading) -> None:
    """What types cannot say; PlanError naming the key."""
    for axis in ("models", "methods", "context_lengths", "bandwidths", "compute_shares"):
        values = getattr(block, axis)
        if len(set(values)) < len(values):
            raise PlanError(f"{axis} names {max(values, key=values.count)!r} twice")
    if COMPUTE in block.methods:
        raise PlanError(f"methods names {COMPUTE!r}, which is always measured: take it out")
    check_tiers([block.tier])
    for text in block.bandwidths:
        read_bandwidth(text)
    small = min(block.compute_shares) * block.step_tokens
    if small < 1:
        raise PlanError(f"step_tokens={block.step_tokens} times a share of {min(block.compute_shares):g} is no token")
    if block.mixed is not None and block.mixed.low > block.mixed.high:
        raise PlanError(f"mixed.low={block.mixed.low} is above mixed.high={block.mixed.high}; swap them")
