"""GPT-Neo's adapter: its attention has a table of its own and does not take the hook.

Each layer's inner attention module is replaced by `HookedSelfAttention`, which reuses the same projections
and hands queries, keys and values to the hook. GPT-Neo's layers do not pass extra keywords down, so the
`batch` given to `model(...)` reaches them through a slot that all layers of one model share for the length of
one forward pass.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvwise.models.hook import ATTENTION, AttentionBatch, attention


class BatchSlot:
    """Holds the batch of the forward pass in progress."""

    def __init__(self) -> None:
        self.batch: AttentionBatch | None = None

    def fill(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Pre-hook of the model: takes `batch` out of the keywords."""
        self.batch = kwargs.pop("batch")
        return args, kwargs

    def clear(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        """Hook of the model, called also when the pass failed."""
        self.batch = None


class HookedSelfAttention(nn.Module):
    """GPT-Neo's self attention through the hook: global, or local over a window of 256 tokens; scale 1.0."""

    def __init__(self, inner: Any, slot: BatchSlot) -> None:
        super().__init__()
        self.layer_idx: int = inner.layer_id
        self.num_heads: int = inner.num_heads
        self.head_dim: int = inner.head_dim
        self.window: int | None = inner.config.window_size if inner.attention_type == "local" else None
        self.q_proj, self.k_proj, self.v_proj = inner.q_proj, inner.k_proj, inner.v_proj
        self.out_proj = inner.out_proj
        self.slot = slot

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: object = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        batch: AttentionBatch | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, hidden] -> ([1, T, hidden], None). `batch` overrides the slot's."""
        batch = self.slot.batch if batch is None else batch
        assert batch is not None, "the model was called without a batch"
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out, _ = attention(self, query, key, value, None, scaling=1.0, sliding_window=self.window, batch=batch)
        return self.out_proj(out.flatten(2)), None


def adapt(model: PreTrainedModel) -> None:
    """Replaces the inner attention of every layer of a GPT-Neo model."""
    slot = BatchSlot()
    base: Any = model.base_model
    for block in base.h:
        block.attn.attention = HookedSelfAttention(block.attn.attention, slot)
    # No layer reads the name any more, but the mask builder does: under ours it builds none.
    model.config._attn_implementation = ATTENTION
    model.register_forward_pre_hook(slot.fill, with_kwargs=True)
    model.register_forward_hook(slot.clear, always_call=True)
