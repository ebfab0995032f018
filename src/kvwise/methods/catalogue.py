"""Finds every method by scanning the folders of the six axes, the entry points of packages, and a user's files.

What `catalogue` finds depends on where it is asked: inside `using("my.py")` it knows the methods of that file too. That
is a context variable and no list that grows: it ends with its block, and two of them cannot mix.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isclass
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from kvwise.core.errors import StrategyError
from kvwise.core.method import Axis, Method
from kvwise.core.strategy import Strategy, parse_strategy
from kvwise.methods.own import is_method_of, read_methods

ENTRY_POINT_GROUP = "kvwise.methods"  # a user's package: name = "module:MethodClass"


class MethodCatalogue:
    """All known methods by name."""

    def __init__(self, kinds: Iterable[type[Method]]) -> None:
        self._kinds: dict[str, type[Method]] = {}
        for kind in kinds:
            taken = self._kinds.setdefault(kind.name, kind)
            if taken is not kind:
                raise StrategyError(f"two methods are called {kind.name!r}: {taken.__module__}, {kind.__module__}")

    def __iter__(self) -> Iterator[type[Method]]:
        return iter(sorted(self._kinds.values(), key=lambda k: (list(Axis).index(k.axis), not k.default, k.name)))

    def find(self, name: str) -> type[Method]:
        """The method called `name`; StrategyError naming the known ones if there is none."""
        if name not in self._kinds:
            near = difflib.get_close_matches(name, self._kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise StrategyError(f"unknown method {name!r}{hint} (known: {', '.join(sorted(self._kinds))})")
        return self._kinds[name]

    def default(self, axis: Axis) -> Method:
        """The answer `axis` has when nothing is named."""
        return next(kind() for kind in self._kinds.values() if kind.axis is axis and kind.default)

    def reading(self, *sources: str | Path) -> "MethodCatalogue":
        """This catalogue and the methods of files or modules; StrategyError in one line for what cannot join it."""
        known = self
        for source in sources:
            kinds = read_methods(source)
            for kind in kinds:
                known._admit(kind, str(source))
            known = MethodCatalogue([*known._kinds.values(), *kinds])
        return known

    def _admit(self, kind: type[Method], where: str) -> None:
        taken = self._kinds.get(kind.name, kind)
        if taken is not kind:
            raise StrategyError(
                f"{where}: a method of {taken.__module__} is called {kind.name!r} already: give yours another name"
            )
        if kind.default:
            raise StrategyError(f"{where}: {kind.name} says it is the default, and {kind.axis} has one: leave that out")
        seam = type(self.default(kind.axis)).__bases__[0]
        if not issubclass(kind, seam):
            raise StrategyError(f"{where}: {kind.name} answers {kind.axis}, so derive it from {seam.__name__}")


_in_force: ContextVar[MethodCatalogue | None] = ContextVar("kvwise_methods", default=None)


def parse(text: str, known: MethodCatalogue | None = None) -> Strategy:
    """Read a strategy such as `h2o(budget=0.2)` or `streaming(budget=0.1)+prefix` with all `known` methods."""
    return parse_strategy(text, catalogue() if known is None else known)


def catalogue() -> MethodCatalogue:
    """The methods that are known here: kvwise's own, those of installed packages, and those of `using` around it."""
    return _in_force.get() or installed()


@contextmanager
def using(*sources: str | Path) -> Iterator[MethodCatalogue]:
    """Inside, the methods of these files or modules are known too. A thread started inside begins without them."""
    token = _in_force.set(catalogue().reading(*sources))
    try:
        yield catalogue()
    finally:
        _in_force.reset(token)


@cache
def installed() -> MethodCatalogue:
    """kvwise's own methods and those of installed packages."""
    return MethodCatalogue([*built_in(), *(_load(point) for point in entry_points(group=ENTRY_POINT_GROUP))])


@cache
def built_in() -> MethodCatalogue:
    """kvwise's own methods, found in the folders of the axes."""
    return MethodCatalogue(kind for axis in Axis for kind in _scan(import_module(f"kvwise.methods.{axis.value}")))


def _load(point: EntryPoint) -> type[Method]:
    try:
        kind = point.load()
    except Exception as error:  # somebody's package: it may raise anything
        raise StrategyError(f"the entry point {point.name!r} ({point.value}) does not load: {error}") from error
    if not (isclass(kind) and issubclass(kind, Method)):
        raise StrategyError(f"the entry points {ENTRY_POINT_GROUP!r} name {kind!r}, which is no method")
    return kind


def _scan(package: ModuleType) -> list[type[Method]]:
    modules = [import_module(f"{package.__name__}.{info.name}") for info in iter_modules(package.__path__)]
    return [value for module in modules for value in vars(module).values() if is_method_of(value, module)]
