"""Options as dataclasses: a command's signature made of their fields, values from a file, and where each came from."""

import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kvwise.core.errors import UsageError

MAX_FILE_BYTES = 2**20
AMOUNTS = ("SIZE", "TIME")  # metavars of texts that are a number with a unit, or only a number
ORIGINS = {"COMMANDLINE": "command line", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}
Command = Callable[..., None]


def with_options(*groups: type) -> Callable[[Command], Command]:
    """Make a command's options of the fields of dataclasses: it is called with one object of each, then by name.

    A field's annotation is typer's, such as `Annotated[int, typer.Option(help=...)]`, its default the option's.
    """

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command).parameters.values())[len(groups) :]

        @wraps(command)
        def run(**given: Any) -> None:
            made = [group(**{field.name: given.pop(field.name) for field in fields(group)}) for group in groups]
            command(*made, **given)

        parameters = [parameter for group in groups for parameter in _parameters(group)]
        parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _parameters(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(group)
    ]  # fmt: skip


def origins(ctx: typer.Context, names: list[str]) -> dict[str, str]:
    """Where each option's value came from."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return {name: ORIGINS.get(source.name if source else "DEFAULT", "default") for name, source in sources.items()}


def reads_file(*groups: type) -> Callable[[typer.Context, Path | None], Path | None]:
    """The callback of an eager option that names a TOML file with defaults for the options of `groups`."""

    def callback(ctx: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not ctx.resilient_parsing:
            ctx.default_map = read_settings(path, *groups)
        return path

    return callback


def read_settings(path: Path, *groups: type) -> dict[str, Any]:
    """The settings of a TOML file, by option. UsageError in one line for a file that is not sound."""
    hints = {name: hint for group in groups for name, hint in get_type_hints(group, include_extras=True).items()}
    found = _read_toml(path)
    for name, value in found.items():
        if name not in hints:
            raise UsageError(f"{path}: unknown key {name!r}; known are {', '.join(sorted(hints))}")
        found[name] = _checked(path, name, value, hints[name])
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes are too many for settings: {MAX_FILE_BYTES} may be")
        if not path.is_file():
            raise UsageError(f"{path} is no file")
        text = path.read_bytes().decode()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is no UTF-8: save it as UTF-8") from error
    if text.startswith("\ufeff"):
        raise UsageError(f"{path}: begins with a byte order mark: save it as UTF-8 without one")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from error


def _checked(path: Path, name: str, value: Any, hint: Any) -> Any:
    """The value as its option takes it; UsageError if it is of another type."""
    kind, marks = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
    kinds = [one for one in get_args(kind) if one is not type(None)] if isinstance(kind, UnionType) else [kind]
    amount = any(getattr(mark, "metavar", None) in AMOUNTS for mark in marks)
    for one in kinds:
        if (fitting := _fitting(value, one, amount)) is not None:
            return fitting
    raise UsageError(f"{path}: {name} = {_shown(value)}: it must be {' or '.join(map(_word, kinds))}")


def _fitting(value: Any, kind: Any, amount: bool) -> Any:
    """The value for an option of `kind`; None if it does not fit. Nothing is converted but what means the same."""
    if get_origin(kind) is list:
        each = [_fitting(one, get_args(kind)[0], amount) for one in value] if isinstance(value, list) else [None]
        return None if None in each else each
    if kind in (str, Path) and isinstance(value, str):
        return value
    if kind is str and amount and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if type(value) is kind else None


def _word(kind: Any) -> str:
    if get_origin(kind) is list:
        return "a list of texts"
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a text")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def show_settings(settings: Mapping[str, Any], came_from: Mapping[str, str] | None, *, as_json: bool) -> str:
    """One line for each setting, as a file has it, and where it came from if that is given; or JSON."""
    if as_json:
        facts = {name: {"value": value, **({"origin": came_from[name]} if came_from else {})}
                 for name, value in settings.items()}  # fmt: skip
        return json.dumps(facts)
    lines = {
        name: f"{name} = {json.dumps(value)}" if value is not None else f"# {name} ="
        for name, value in settings.items()
    }
    if came_from is None:
        return "\n".join(lines.values())
    width = max(map(len, lines.values()))
    return "\n".join(f"{line:{width}}  # {came_from[name]}" for name, line in lines.items())
