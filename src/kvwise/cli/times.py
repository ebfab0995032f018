"""Times as people write them on the command line: durations such as `15m`, moments such as `2030-01-31T12:00`."""

import re
import time
from datetime import datetime
from math import inf, isfinite

from kvwise.core.errors import UsageError
from kvwise.core.sizes import parse_seconds

_UNITS = {"m": 60, "h": 3600, "d": 86400}


def parse_moment(text: str, option: str) -> float:
    """Read a moment to come, `2030-01-31`, `2030-01-31T12:00+02:00` or Unix seconds -> Unix seconds."""
    try:
        moment = float(text) if re.fullmatch(r"[0-9.]+", text) else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"{option} {text!r} is no moment; write 2030-01-31T12:00, or Unix seconds") from None
    if not isfinite(moment) or moment <= time.time():
        raise UsageError(f"{option} {text!r} is over; name a moment to come, or a duration with --for")
    return moment


def pinned_until(until: str | None, duration: str | None) -> float:
    """When pins given by `--until` or `--for` end, in Unix seconds; infinity: never."""
    if until is not None and duration is not None:
        raise UsageError("--until and --for both say when the pin ends: give one of them")
    if until is not None:
        return parse_moment(until, "--until")
    return inf if duration is None else time.time() + parse_seconds(duration, "--for")


def show_seconds(seconds: float) -> str:
    """A duration in its largest whole unit: `3d`; `never` for infinity, `over` for what has passed."""
    if seconds == inf:
        return "never"
    if seconds <= 0:
        return "over"
    unit = next((u for u in ("d", "h", "m") if seconds >= _UNITS[u]), "s")
    return f"{int(seconds / _UNITS.get(unit, 1))}{unit}"
