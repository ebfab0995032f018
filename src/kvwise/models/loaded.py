"""A model ready to be served: the module with its attention hooked, and the facts the engine needs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvwise.models.config import speaks_tokens
from kvwise.models.text import Tokenizer
from kvwise.models.vision import Vision


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer's attention module was seen to do when the model was probed."""

    module: nn.Module
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A causal LM, perhaps with eyes, whose attention goes to the `batch` of `models.hook.forward`.

    Made by `load_model`. `revision` names config and weights: equal revisions mean equal KV for equal tokens
    (with `name` and `dtype` it is the model's part of a block's identity). `weight_bytes` counts tied weights
    once.
    """

    name: str
    revision: str
    model: PreTrainedModel
    config: PreTrainedConfig
    tokenizer: Tokenizer
    layers: tuple[LayerAttention, ...]
    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    num_parameters: int
    dtype: torch.dtype
    device: torch.device
    keeps_rows: bool  # the model's forward takes `logits_to_keep`
    vision: Vision | None = None  # None: it reads text only
    folder: Path | None = None  # where its files lie; None: it was made from a config

    @property
    def speaks_tokens(self) -> bool:
        """Whether the model was trained on the token language of `vocab_size` ids (`tasks.token_language`)."""
        return speaks_tokens(self.config)


def layer_modules(loaded: LoadedModel) -> list[nn.Module]:
    """The attention modules in layer order: those that called the hook."""
    return [layer.module for layer in loaded.layers]
