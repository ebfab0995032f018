"""The start that makes recall learnable in minutes: one KV group of layer 0 begins as a previous-token head."""

from typing import Any

import torch

STRENGTH = 7.0


@torch.no_grad()
def previous_token_start(model: Any, strength: float = STRENGTH) -> None:
    """Set the biases of KV head 0 of layer 0, and of its query heads, so that a token attends to the one before it.

    Per rotary pair with frequency f the key bias is `strength * (1, 0)` and the query bias
    `strength * (cos f, -sin f)`: rotated by their positions, their product is largest at a distance of one token,
    whatever the tokens. It is an initialisation and nothing more; training may change it.
    """
    config = model.config
    attention = model.model.layers[0].self_attn
    dim, half = config.head_dim, config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    angles = theta ** (-torch.arange(half) / half)
    key = torch.cat([torch.ones(half), torch.zeros(half)]) * strength
    query = torch.cat([torch.cos(angles), -torch.sin(angles)]) * strength
    group = config.num_attention_heads // config.num_key_value_heads
    attention.k_proj.bias[:dim] = key
    attention.q_proj.bias[: group * dim] = query.repeat(group)
