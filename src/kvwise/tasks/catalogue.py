"""Finds every task by scanning the folder of synthetic tasks, and the entry points of other packages."""

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from inspect import isclass
from pkgutil import iter_modules
from types import ModuleType

import kvwise.tasks.synthetic
from kvwise.core.errors import TaskError
from kvwise.core.options import read_call
from kvwise.tasks.base import Task

ENTRY_POINT_GROUP = "kvwise.tasks"  # a user's package: name = "module:TaskClass"


def tasks() -> dict[str, type[Task]]:
    """Name -> class of all known tasks, by name; TaskError if two have one name."""
    return dict(_known())


def find_task(name: str) -> type[Task]:
    """The task called `name`; TaskError naming the known ones if there is none."""
    known = _known()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TaskError(f"unknown task {name!r}{hint} (known: {', '.join(known)})")
    return known[name]


def parse_task(text: str) -> Task:
    """Read a task such as `recall` or `needle(depth=0.5)`. What `str(task)` prints parses back to the same task."""
    name, options = read_call(text, "task", TaskError)
    return find_task(name).build(options)


@cache
def _known() -> dict[str, type[Task]]:
    """The tasks of this process: kvwise's own and those of installed packages."""
    found: dict[str, type[Task]] = {}
    for kind in [*_scan(kvwise.tasks.synthetic), *(point.load() for point in entry_points(group=ENTRY_POINT_GROUP))]:
        if not (isclass(kind) and issubclass(kind, Task)):
            raise TaskError(f"the entry points {ENTRY_POINT_GROUP!r} name {kind!r}, which is no subclass of Task")
        taken = found.setdefault(kind.name, kind)
        if taken is not kind:
            raise TaskError(f"two tasks are called {kind.name!r}: {taken.__module__}, {kind.__module__}")
    return dict(sorted(found.items()))


def _scan(package: ModuleType) -> list[type[Task]]:
    modules = [import_module(f"{package.__name__}.{info.name}") for info in iter_modules(package.__path__)]
    return [value for module in modules for value in vars(module).values() if _is_task_of(value, module)]


def _is_task_of(value: object, module: ModuleType) -> bool:
    return isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__ and "name" in vars(value)
