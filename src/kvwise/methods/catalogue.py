"""Finds every method by scanning the folders of the six axes, and the entry points of other packages."""

import difflib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isclass
from pkgutil import iter_modules
from types import ModuleType

from kvwise.core.errors import StrategyError
from kvwise.core.method import Axis, Method
from kvwise.core.strategy import Strategy, parse_strategy

ENTRY_POINT_GROUP = "kvwise.methods"  # a user's package: name = "module:MethodClass"


class MethodCatalogue:
    """All known methods by name."""

    def __init__(self, kinds: list[type[Method]]) -> None:
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


def parse(text: str) -> Strategy:
    """Read a strategy such as `h2o(budget=0.2)` or `streaming(budget=0.1)+prefix` with all known methods."""
    return parse_strategy(text, catalogue())


@cache
def catalogue() -> MethodCatalogue:
    """The catalogue of this process: kvwise's own methods and those of installed packages."""
    own = [kind for axis in Axis for kind in _scan(import_module(f"kvwise.methods.{axis.value}"))]
    return MethodCatalogue(own + [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)])


def _scan(package: ModuleType) -> list[type[Method]]:
    found = []
    for info in iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{info.name}")
        found += [v for v in vars(module).values() if _is_method_of(v, module)]
    return found


def _is_method_of(value: object, module: ModuleType) -> bool:
    return (
        isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__ and "name" in vars(value)
    )
