"""The base of every table of a plan: frozen, no unknown keys, no silent conversions, no NaN; faults as one line."""

import difflib
import json
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kvwise.core.errors import PlanError


class Strict(BaseModel):
    """A frozen table that refuses unknown keys."""

    ADDED: ClassVar[tuple[str, ...]] = ()  # keys that came after the first plans were recorded

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def facts(self) -> dict[str, Any]:
        """The table as JSON values, without later keys that say nothing: so that old ids and hashes stay the same."""
        fields = type(self).model_fields
        silent = {key for key in self.ADDED if getattr(self, key) == fields[key].default}
        return self.model_dump(mode="json", exclude=silent)


Table = TypeVar("Table", bound=Strict)


def read_table(data: dict[str, Any], table: type[Table], where: str) -> Table:
    """Make `table` from parsed TOML; PlanError in one line, naming `where`, the key, the value and the way out."""
    _refuse_unknown(data, table, where, "")
    try:
        # Through JSON, since strict mode then still takes lists as tuples and whole numbers as floats.
        return table.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise _one_line(error, data, where) from error
    except TypeError as error:
        raise PlanError(f"{where}: dates and times have no place in a plan ({error})") from error


def _refuse_unknown(data: dict[str, Any], table: type[BaseModel], where: str, path: str) -> None:
    for key, value in data.items():
        label = f"{path}.{key}" if path else key
        if key not in table.model_fields:
            known = sorted(table.model_fields)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"{where}: unknown key {label!r}{hint} (known here: {', '.join(known)})")
        inner = _tables(table.model_fields[key].annotation)
        for name, item in _dicts(value, label):
            matching = [t for t in inner if _fits(t, item)]
            if matching:
                _refuse_unknown(item, matching[0], where, name)


def _dicts(value: Any, label: str) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        return [(label, value)]
    if isinstance(value, list):
        return [(f"{label}[{i}]", v) for i, v in enumerate(value, start=1) if isinstance(v, dict)]
    return []


def _fits(table: type[BaseModel], data: dict[str, Any]) -> bool:
    kind = table.model_fields.get("kind")
    return kind is None or data.get("kind") in getattr(kind.annotation, "__args__", ())


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """Every table type inside an annotation such as `tuple[A | B, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [t for part in getattr(annotation, "__args__", ()) for t in _tables(part)]


def _one_line(error: ValidationError, data: Any, where: str) -> PlanError:
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "missing":
        return PlanError(f"{where}: key {_path(data, (*fault['loc'][:-1],), fault['loc'][-1])!r} is missing")
    text = repr(fault["input"])
    value = text if len(text) <= 60 else text[:57] + "..."
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return PlanError(f"{where}: {_path(data, fault['loc'])} = {value}: {message}")


def _path(data: Any, location: tuple[int | str, ...], last: int | str | None = None) -> str:
    """The location as keys of the file; pydantic also puts the names of union members into it, which are dropped."""
    text = ""
    for part in location:
        if isinstance(data, list) and isinstance(part, int):
            text, data = f"{text}[{part + 1}]", data[part]
        elif isinstance(data, dict) and part in data:
            text, data = f"{text}.{part}" if text else str(part), data[part]
    return text if last is None else f"{text}.{last}" if text else str(last)
