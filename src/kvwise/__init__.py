"""kvwise: every published way to keep, drop, squeeze, place, reuse and reload KV, over one paged engine."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvwise.core.config import EngineConfig
    from kvwise.core.errors import KvwiseError, StrategyError, UsageError
    from kvwise.core.output import RequestOutput
    from kvwise.core.params import SamplingParams
    from kvwise.core.strategy import Strategy
    from kvwise.engine.engine import Engine
    from kvwise.engine.llm import LLM
    from kvwise.methods.catalogue import parse
    from kvwise.models.load import load_model

__version__ = "0.1.0"

# Name -> where it lives. Resolved on first use, so that `import kvwise` costs nothing and loads no torch.
_HOMES = {
    "LLM": "kvwise.engine.llm",
    "Engine": "kvwise.engine.engine",
    "EngineConfig": "kvwise.core.config",
    "KvwiseError": "kvwise.core.errors",
    "RequestOutput": "kvwise.core.output",
    "SamplingParams": "kvwise.core.params",
    "Strategy": "kvwise.core.strategy",
    "StrategyError": "kvwise.core.errors",
    "UsageError": "kvwise.core.errors",
    "load_model": "kvwise.models.load",
    "parse": "kvwise.methods.catalogue",
}

__all__ = [
    "LLM",
    "Engine",
    "EngineConfig",
    "KvwiseError",
    "RequestOutput",
    "SamplingParams",
    "Strategy",
    "StrategyError",
    "UsageError",
    "load_model",
    "parse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvwise' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
