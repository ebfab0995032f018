"""Sizes, speeds and durations as people write them."""

import re
from math import inf

from kvwise.core.errors import UsageError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_bytes(text: str) -> int:
    """Read a size such as `512MiB`, `2GB`, `1.5g` or `1048576`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is no size; write a number with a unit, such as 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_link(text: str) -> tuple[str, float]:
    """Read a link throttle such as `host:device=12GB/s` or `host:disk=25Gbps` -> (link, bytes per second)."""
    match = re.fullmatch(r"([a-z]+:[a-z]+)=([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(b/s|bps)", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is no link; write link=speed, such as host:device=12GB/s or host:disk=25Gbps")
    # A lower-case b in "bps" is bits, as network links are sold; "B/s" is bytes.
    bits = 8 if match[4].lower() == "bps" else 1
    speed = float(match[2]) * _UNITS[match[3].lower()] / bits
    if speed <= 0:
        raise UsageError(f"link {match[1]}: speed {match[2]} must be above 0")
    return match[1], speed


def parse_seconds(text: str, option: str) -> float:
    """Read a duration such as `90`, `90s`, `15m`, `2h` or `7d` -> seconds, above 0; `option` is its name in errors."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)\s*", text)
    if match is None:
        raise UsageError(f"{option} {text!r} is no duration; write a number with a unit, such as 90s, 15m, 2h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds < inf:
        raise UsageError(f"{option} {text!r} must be more than 0 seconds")
    return seconds


def show_bytes(num_bytes: int) -> str:
    """A size that `parse_bytes` reads back exactly, in the largest unit that divides it: `4GiB`."""
    for unit, amount in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes and num_bytes % amount == 0:
            return f"{num_bytes // amount}{unit}"
    return str(num_bytes)
