"""Values written as text, such as `needle(depth=0.5)`: reading them, checking their options, showing them again."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from kvwise.core.errors import UsageError

_CALL = re.compile(r"([a-z][a-z0-9_-]*)(?:\((.*)\))?")
_OPTION = re.compile(r"([a-z_][a-z0-9_]*)\s*=\s*([^\s,=()]+)")

# Annotation of an option -> what it accepts, and the word for it.
_WANTED: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a word"),
    "bool": ((bool,), "true or false"),
}
_OPTIONAL = " | None"


def read_call(text: str, what: str, error: type[UsageError]) -> tuple[str, dict[str, object]]:
    """The name and the options of `name(option=value, ...)`; `error` for a text that is no `what`, saying why."""
    match = _CALL.fullmatch(text.strip())
    if match is None:
        raise error(f"{text!r} is no {what}; write name or name(option=value, ...)")
    options: dict[str, object] = {}
    for item in (match[2] or "").split(","):
        if not item.strip():
            continue
        option = _OPTION.fullmatch(item.strip())
        if option is None:
            raise error(f"{match[1]}: {item.strip()!r} is no option; write option=value")
        if option[1] in options:
            raise error(f"{match[1]}: option {option[1]!r} is given twice")
        options[option[1]] = _read_value(option[2])
    return match[1], options


def check_options(name: str, kind: Any, options: Mapping[str, object], error: type[UsageError]) -> dict[str, object]:
    """`options` with the types that the fields of the dataclass `kind` have; `error` if one is unknown or unfit."""
    known = {field.name: field for field in fields(kind)}
    for option in options:
        if option not in known:
            raise error(f"{name} has no option {option!r}; its options: {', '.join(known) or 'none'}")
    return {option: _typed(name, option, value, known[option], error) for option, value in options.items()}


def show_call(name: str, value: Any) -> str:
    """`value`, a dataclass, as `read_call` reads it back; options that have their default are left out."""
    given = [
        f"{field.name}={show_value(getattr(value, field.name))}"
        for field in fields(value)
        if field.default is MISSING or getattr(value, field.name) != field.default
    ]
    return f"{name}({', '.join(given)})" if given else name


def show_value(value: object) -> str:
    """Short where that says it all: what is printed parses back to the same value."""
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _read_value(text: str) -> bool | int | float | str | None:
    if text in ("true", "false"):
        return text == "true"
    if text in ("none", "None"):
        return None
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text.strip("'\"")


def _typed(name: str, option: str, value: object, field: "Field[Any]", error: type[UsageError]) -> object:
    """The value as its option's type; `error` if it is of another."""
    # An annotation is a type, or its text where the module says `from __future__ import annotations`.
    annotation: Any = field.type
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if (wanted := _WANTED.get(text.removesuffix(_OPTIONAL))) is None:
        return value  # a type of the owner's own, which it checks itself
    accepts, word = wanted
    if value is None and text.endswith(_OPTIONAL):
        return None
    if not isinstance(value, accepts) or (isinstance(value, bool) and bool not in accepts):
        raise error(f"{name}: {option}={value!r} must be {word}")
    return float(value) if isinstance(value, int) and float in accepts else value
