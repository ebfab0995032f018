"""The query that a layer would make of another layer's input, before it runs (InfiniGen, section 4.2).

Residual streams change slowly from layer to layer, so what layer i would ask of layer i-1's input is close to
what it will ask. `QueryAhead` finds it for any architecture: it calls layer i's own attention module on that
input, with a batch that notes the query (projected, normed, rotated at the given positions) and stops the
module there.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from kvwise.models.gptneo import HookedSelfAttention
from kvwise.models.loaded import LoadedModel

Ask = Callable[[int, slice], Tensor]


@runtime_checkable
class AheadBatch(Protocol):
    """A batch that wants to know a layer's input before the layer attends."""

    def look_ahead(self, layer: int, ask: Ask) -> None:
        """The input of `layer` is known; `ask(other, rows)` is the query [n, Hq, D] `other` makes of it."""
        ...


class QueryAhead:
    """Tells a batch when a layer's input is known, and answers what other layers would ask of it.

    Works through public forward pre-hooks, placed by `attach` and taken away by `detach`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._modules = tuple(layer.module for layer in loaded.layers)
        config: Any = loaded.config.get_text_config()
        types = getattr(config, "layer_types", None)
        self._types: tuple[str, ...] | None = tuple(types) if types else None
        self._rotary = _typed_rotary(loaded.model)
        self._handles: list[Any] = []

    @classmethod
    def attach(cls, loaded: LoadedModel) -> Self:
        """Places the hooks: from now on batches with a `look_ahead` method are told before every layer."""
        ahead = cls(loaded)
        for layer, module in enumerate(ahead._modules):
            handle = module.register_forward_pre_hook(ahead._hook(layer), with_kwargs=True)
            ahead._handles.append(handle)
        return ahead

    def detach(self) -> None:
        """Takes the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def query(
        self, layer: int, hidden: Tensor, kwargs: dict[str, Any], *, source: int, rows: slice = slice(None)
    ) -> Tensor:
        """The queries [n, Hq, D] that `layer` makes of `hidden` [1, T, hidden], for the tokens in `rows`.

        `hidden` and `kwargs` are what the attention module of layer `source` was called with.
        """
        num_tokens = hidden.shape[1]
        given = {name: _take(value, num_tokens, rows) for name, value in kwargs.items()}
        if self._rotates_otherwise(source, layer):
            assert self._rotary is not None
            assert self._types is not None
            given["position_embeddings"] = self._rotary(hidden, given["position_ids"], self._types[layer])
        note = _Note()
        with torch.inference_mode(), suppress(_Noted):
            # Not module(...): our own hook must not see this call.
            self._modules[layer].forward(hidden[:, rows], **{**given, "batch": note})
        assert note.queries is not None
        return note.queries

    def _rotates_otherwise(self, source: int, layer: int) -> bool:
        """Whether two layers rotate by different bases (Gemma 3: local and global layers)."""
        if self._rotary is None or self._types is None:
            return False
        return self._types[source] != self._types[layer]

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            batch = kwargs["batch"] if "batch" in kwargs else _slot_batch(module)
            if not isinstance(batch, AheadBatch):
                return
            given = dict(kwargs)
            hidden = args[0] if args else given.pop("hidden_states")
            batch.look_ahead(layer, lambda other, rows: self.query(other, hidden, given, source=layer, rows=rows))

        return tell


def _slot_batch(module: nn.Module) -> object:
    """The batch of a module that gets it otherwise than by keyword (GPT-Neo)."""
    return module.slot.batch if isinstance(module, HookedSelfAttention) else None


class _Noted(Exception):
    """Ends a module's forward once its query is known."""


class _Note:
    """A batch that keeps the query and goes no further."""

    def __init__(self) -> None:
        self.queries: Tensor | None = None

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Notes the queries and stops."""
        self.queries = queries
        raise _Noted


def _take(value: Any, num_tokens: int, rows: slice) -> Any:
    """The part of an argument that belongs to `rows`: whatever has the token dimension second is cut."""
    if isinstance(value, tuple):
        return tuple(_take(one, num_tokens, rows) for one in value)
    if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == num_tokens:
        return value[:, rows]
    return value


def _typed_rotary(model: nn.Module) -> Callable[[Tensor, Tensor, str], tuple[Tensor, Tensor]] | None:
    """The model's rotary embedding, if it differs by layer type."""
    for module in model.modules():
        if "Rotary" in type(module).__name__ and "layer_type" in inspect.signature(module.forward).parameters:
            return module
    return None
