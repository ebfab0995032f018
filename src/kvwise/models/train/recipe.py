"""What is trained, on what, and for how long."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Qwen2Config


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of Qwen2's architecture: heads of `head_dim`, tied embeddings, float32."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    head_dim: int = 32

    def config(self) -> Qwen2Config:
        """The configuration plain `transformers` builds the model from."""
        build: Any = Qwen2Config  # takes more than it declares
        config: Qwen2Config = build(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
        )
        return config


@dataclass(frozen=True, slots=True)
class Recipe:
    """A shape and its training.

    `num_tokens` ends it, whatever has been reached. `stages` are context lengths; the next one begins once recall is
    `advance_at` right on the present one, and `replay` of the steps go back to one of the stages so far. `mix` gives
    each kind of row its share.
    """

    shape: Shape
    num_tokens: int
    stages: tuple[int, ...]
    tokens_per_step: int = 12_288
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    warm_up_steps: int = 60
    advance_at: float = 0.95
    replay: float = 0.3
    filler_weight: float = 0.3
    # The last of several assignments is hard to find, so there is much of it.
    mix: dict[str, float] = field(
        default_factory=lambda: {
            "recall": 0.20,
            "multi_value": 0.10,
            "tracking": 0.10,
            "forgetting": 0.25,
            "counting": 0.10,
            "copy": 0.10,
            "repeat": 0.15,
        }
    )


RECIPES = {
    # Learns in minutes on two cores.
    "small": Recipe(
        Shape(2, 128, 4, 2, 256, 512, 1024 + 512),
        num_tokens=12_000_000,
        stages=(64, 128, 256, 512, 1024),
    ),
    # Twice the layers and twice the reach, still without a GPU.
    "medium": Recipe(
        Shape(4, 128, 4, 2, 256, 1024, 2048 + 1024),
        num_tokens=16_000_000,
        stages=(64, 128, 256, 512, 1024, 2048),
    ),
    "base": Recipe(
        Shape(4, 256, 8, 2, 704, 1024, 2048 + 1024),
        num_tokens=25_000_000,
        stages=(64, 128, 256, 512, 1024, 2048),
        learning_rate=2e-3,
    ),
}
