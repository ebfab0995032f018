"""Finds the codecs: every file of this folder with a class of its name, and what other packages register."""

from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Any

import kvwise.tiers.codec
from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout
from kvwise.core.options import check_options, read_call
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.sample import Sample

ENTRY_POINTS = "kvwise.codecs"


def codecs() -> Mapping[str, type[Any]]:
    """Name -> class, from `tiers/codec/*.py` and the entry-point group `kvwise.codecs` (own files win).

    A file of the folder without a class whose `name` is the file's is a helper.
    """
    found: dict[str, type[Any]] = {e.name: e.load() for e in entry_points(group=ENTRY_POINTS)}
    for module in iter_modules(kvwise.tiers.codec.__path__):
        found |= _class_of(module.name)
    return dict(sorted(found.items()))


def make_codec(spec_text: str, *, layout: KVLayout, sample: Sample | None = None, tables: bytes | None = None) -> Codec:
    """The codec that `name` or `name(option=value, ...)` asks for, for blocks of `layout`.

    `sample` gives blocks to profile, asked only by codecs with distributions of their own; `tables`, what such a
    codec's `tables()` wrote earlier, takes its place. UsageError if there is no codec of that name, for an unknown or
    unfit option, and where a codec needs one of the two and has neither; ValueError for tables that are not its own.

    A codec is a dataclass of its options, or has `Options` and makes itself by `build` and `from_tables`.
    """
    name, given, kind = _read(spec_text)
    if not hasattr(kind, "Options"):
        if given and not is_dataclass(kind):
            raise UsageError(f"{name} has no option {next(iter(given))!r}; its options: none")
        codec: Codec = kind(**(check_options(name, kind, given, UsageError) if given else {}))
        return codec
    options = kind.Options(**check_options(name, kind.Options, given, UsageError))
    calibrated: Codec = kind.build(options, layout, sample) if tables is None else kind.from_tables(tables, options)
    return calibrated


def is_lossless(spec_text: str) -> bool:
    """Whether what the codec reads back is what was written, bit for bit. UsageError if there is none of that name."""
    lossless: bool = _read(spec_text)[2].lossless
    return lossless


def _read(spec_text: str) -> tuple[str, dict[str, object], type[Any]]:
    """Name, options and class."""
    name, given = read_call(spec_text, "codec", UsageError)
    known = codecs()
    if name not in known:
        raise UsageError(f"unknown codec {name!r}: choose one of {', '.join(known)}")
    return name, given, known[name]


def _class_of(module_name: str) -> dict[str, type[Any]]:
    """The codec that a file of the folder defines, by name; nothing for a helper."""
    module = import_module(f"kvwise.tiers.codec.{module_name}")
    for value in vars(module).values():
        if isinstance(value, type) and getattr(value, "name", "") == module_name:
            return {module_name: value}
    return {}
