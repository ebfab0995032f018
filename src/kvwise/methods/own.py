"""Methods of one's own: read from a file or a module, and looked over before anything runs with them."""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module, util
from inspect import getdoc, isclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kvwise.core.errors import StrategyError
from kvwise.core.method import Axis, Method, Trait

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DROPS = frozenset({Trait.OWNS_PAGES, Trait.PRIVATE})


def read_methods(source: str | Path) -> list[type[Method]]:
    """The methods that a file (`my.py`) or a module that can be imported (`mine.methods`) defines.

    StrategyError in one line if it cannot be read, raises, defines none, or one of them is not sound. A file that has
    not changed since it was read gives the same classes again.
    """
    where = str(source)
    is_module = not where.endswith(".py") and not Path(where).exists() and _MODULE.fullmatch(where) is not None
    module = _import(where) if is_module else _run(Path(where))
    kinds = [kind for kind in vars(module).values() if is_method_of(kind, module)]
    if not kinds:
        raise StrategyError(f"{where} defines no method: a class derived from one of kvwise.methods, with a name")
    for kind in kinds:
        fault = next(faults(kind), None)
        if fault is not None:
            raise StrategyError(f"{where}: {kind.__name__} {fault}")
    return kinds


def is_method_of(value: object, module: ModuleType) -> bool:
    """Whether a module itself defines this class, and as a method: with a name of its own."""
    return (
        isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__ and "name" in vars(value)
    )


def faults(kind: type[Method]) -> Iterator[str]:
    """What keeps a class from being a method that others can rely on."""
    if "__dataclass_params__" not in vars(kind):
        yield "is no dataclass, so its options would be none: put @dataclass(frozen=True) above it"
    for word in ("name", "axis", "idea", "paper"):
        text = getattr(kind, word, None)
        if not isinstance(text, str) or not text or "\n" in text:
            yield f"must say its {word}, in one line"
    if _NAME.fullmatch(kind.name) is None:
        yield f"is called {kind.name!r}: a name is of small letters, digits, - and _, a letter first"
    if not isinstance(kind.traits, frozenset) or not all(isinstance(trait, Trait) for trait in kind.traits):
        yield "must have a frozenset of Trait as its traits"
    left = [name for name in dir(kind) if getattr(getattr(kind, name, None), "__isabstractmethod__", False)]
    if left:
        yield f"must define {', '.join(left)}"
    else:
        yield from _faults_of_default(kind)


def _faults_of_default(kind: type[Method]) -> Iterator[str]:
    try:
        method = kind()
    except Exception as error:  # somebody's code: it may raise anything
        yield f"cannot be made without options ({_said(error)}): give every option a default that is in range"
        return
    missing = sorted(trait.name for trait in needed_traits(method) - method.traits)
    if missing:
        yield f"must declare {', '.join(missing)} among its traits: pairs are judged by these alone"


def needed_traits(method: Any) -> frozenset[Trait]:
    """The traits that follow from what a method overrides and sets: to declare less would let pairs fail at work."""
    needed: set[Trait] = set()
    if method.axis is Axis.RETENTION and method.drops:
        needed |= _DROPS
        tells = {"needs_mass": Trait.NEEDS_EVERY_ROW, "merges": Trait.LIVES_ON}
        needed |= {trait for word, trait in tells.items() if getattr(method, word)}
        needed |= {Trait.NEEDS_LAST_ROWS} if method.observed_rows(1000) else set()
    if method.axis is Axis.SELECTION and not method.default:
        needed.add(Trait.RECALLS)
    if method.axis is Axis.ENCODING and method.observed_rows:
        needed.add(Trait.NEEDS_LAST_ROWS)
    return frozenset(needed)


def describe(kind: type[Method]) -> dict[str, Any]:
    """What there is to say of a method, as JSON values; `about` is its docstring."""
    return {
        "name": kind.name,
        "axis": kind.axis.value,
        "default": kind.default,
        "idea": kind.idea,
        "paper": kind.paper,
        "options": {option.name: option.default for option in fields(kind)},
        "types": {option.name: _type_name(option.type) for option in fields(kind)},
        "needs": {trait.name: trait.value for trait in Trait if trait in kind().traits},
        "about": getdoc(kind) or "",
        "module": kind.__module__,
    }


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


# -- files ------------------------------------------------------------------------------------------------------------


def _import(where: str) -> ModuleType:
    try:
        return import_module(where)
    except (Exception, SystemExit) as error:  # somebody's code: it may raise anything
        raise StrategyError(f"methods {where}: {_said(error)}; name a file such as my.py, or a module") from error


def _run(path: Path) -> ModuleType:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise StrategyError(f"methods {path}: {error.strerror}; name a file such as my.py, or a module") from error
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + code).hexdigest()[:12]
    name = f"kvwise_methods_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise StrategyError(f"methods {path}: no Python file; name one that ends in .py, or a module")
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # somebody's code: it may raise anything
        del sys.modules[name]
        raise StrategyError(f"{path}{_line(error, path)}: {_said(error)}") from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in the file: ", line 3"."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(said.split())}" if said else type(error).__name__
