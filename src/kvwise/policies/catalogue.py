"""Finds the replacement policies: every file of this folder, and what other packages register."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

import kvwise.policies
from kvwise.core.errors import UsageError
from kvwise.policies.base import ReplacementPolicy

ENTRY_POINTS = "kvwise.policies"
_NO_POLICIES = frozenset({"base", "catalogue", "queues"})


def policies() -> Mapping[str, type[ReplacementPolicy]]:
    """Name -> class, from `policies/*.py` and the entry-point group `kvwise.policies` (own files win)."""
    found: dict[str, type[ReplacementPolicy]] = {e.name: e.load() for e in entry_points(group=ENTRY_POINTS)}
    for module in iter_modules(kvwise.policies.__path__):
        if module.name not in _NO_POLICIES:
            found[module.name] = _class_of(module.name)
    return dict(sorted(found.items()))


def make_policy(name: str, num_blocks: int) -> ReplacementPolicy:
    """An empty policy by name over `num_blocks` blocks; UsageError if there is none of that name."""
    known = policies()
    if name not in known:
        raise UsageError(f"unknown replacement policy {name!r}: choose one of {', '.join(known)}")
    return known[name](num_blocks)


def _class_of(module_name: str) -> type[ReplacementPolicy]:
    module = import_module(f"kvwise.policies.{module_name}")
    for value in vars(module).values():
        if isinstance(value, type) and getattr(value, "name", "") == module_name:
            return value
    raise UsageError(f"policies/{module_name}.py defines no class with name = {module_name!r}")
