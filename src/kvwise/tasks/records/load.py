"""The way in: `load_records(kind, path)`."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from kvwise.core.errors import TaskError
from kvwise.tasks.records.base import RecordSet
from kvwise.tasks.records.longbench import load_longbench
from kvwise.tasks.records.ruler import load_ruler
from kvwise.tasks.records.scbench import load_scbench

LOADERS: Mapping[str, Callable[[str | Path, int | None], RecordSet]] = MappingProxyType(
    {"ruler": load_ruler, "longbench": load_longbench, "scbench": load_scbench}
)


def load_records(kind: str, path: str | Path, limit: int | None = None) -> RecordSet:
    """The first `limit` records (None: all) of a local file of `kind` "ruler", "longbench" or "scbench".

    TaskError for an unknown kind and for whatever is wrong with the file, with its line and field.
    """
    if kind not in LOADERS:
        near = difflib.get_close_matches(kind, LOADERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"unknown kind of records {kind!r}{hint} (known: {', '.join(LOADERS)})")
    return LOADERS[kind](path, limit)
