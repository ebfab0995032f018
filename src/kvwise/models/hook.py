"""The hook into transformers: one attention function under one name, and the forward pass of a flat batch.

Nothing of transformers is patched: `register` makes `attention` known to the public `AttentionInterface`. A
model switched to it hands every layer's queries, keys and values (rotated, not repeated for GQA) to the
`batch` object that was given to `model(...)` as an extra keyword. The flat batch is one row [1, T] that holds
the new tokens of all sequences one after another; positions restart inside it, and causality is the batch's
business: under a name that has no mask function, transformers builds no mask.
"""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

if TYPE_CHECKING:
    from kvwise.models.loaded import LoadedModel

ATTENTION = "kvwise"


@dataclass(frozen=True, slots=True)
class Splice:
    """Rows int64 [n] of a flat batch that read `features` [n, hidden] instead of their token's embedding (images)."""

    rows: Tensor
    features: Tensor


class AttentionBatch(Protocol):
    """What the layers of one forward pass hand their attention to."""

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
        """Stores the new keys and values of `layer` and answers its queries.

        queries [T, Hq, D], keys and values [T, H, D] of the T new tokens, any strides with the last dimension
        contiguous. `window` w: a key is visible iff 0 <= query position - key position < w.
        Returns [T, Hq, D].
        """
        ...


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    batch: AttentionBatch,
    **ignored: object,
) -> tuple[Tensor, None]:
    """The function behind the name: query [1, Hq, T, D], key and value [1, H, T, D] -> [1, T, Hq, D].

    `ignored` takes what transformers passes to every implementation (position_ids and such); that nothing of
    weight hides in it is checked by the probe, which compares a hooked model with the plain one before it is
    accepted.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = batch.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out.unsqueeze(0), None


def register() -> None:
    """Makes the name `kvwise` known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(ATTENTION, attention)


def forward(
    loaded: "LoadedModel",
    tokens: Tensor,
    positions: Tensor,
    batch: AttentionBatch,
    logit_rows: Tensor,
    splice: Splice | None = None,
) -> Tensor:
    """Runs one flat batch: tokens and positions int64 [T], logit_rows int64 [R] -> logits float32 [R, V].

    Only the rows in `logit_rows` go through the output head; R may be 0. Positions are [3, T] where the model rotates
    by time, height and width. `splice` gives what image tokens show.
    """
    with torch.inference_mode():
        if loaded.keeps_rows:
            logits = _run(loaded.model, tokens, positions, batch, splice, logits_to_keep=logit_rows)
        else:
            logits = _run(loaded.model, tokens, positions, batch, splice)[logit_rows]
        return logits.float()


def keeps_rows(model: torch.nn.Module) -> bool:
    """Whether the model can compute logits of chosen rows only (all known architectures can)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def forward_model(
    model: torch.nn.Module, tokens: Tensor, positions: Tensor, batch: AttentionBatch, splice: Splice | None = None
) -> Tensor:
    """As `forward` for a bare module: logits float32 [T, V] of all rows."""
    with torch.inference_mode():
        return _run(model, tokens, positions, batch, splice).float()


def _run(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    batch: AttentionBatch,
    splice: Splice | None,
    logits_to_keep: Tensor | None = None,
) -> Tensor:
    rows = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
    place = positions[None] if positions.ndim == 1 else positions[:, None]
    if splice is None:
        inputs = {"input_ids": tokens[None]}
    else:
        embedded = model.get_input_embeddings()(tokens)
        inputs = {"inputs_embeds": embedded.index_copy(0, splice.rows, splice.features)[None]}
    out = model(**inputs, position_ids=place, use_cache=False, batch=batch, **rows)
    logits: Tensor = out.logits[0]
    return logits
