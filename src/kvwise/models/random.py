"""Models with random weights: by name, or from any config.json; they make every test and study run offline.

Weights are drawn so that greedy output is neither constant nor a coin toss: projections keep the variance of
their input, queries and keys are drawn wider so that attention is peaked (a token's heavy hitters matter, and
evicting them shows), and the output head is wide enough that the best token leads clearly.
"""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kvwise.models.processors import auto_class, plain_attention
from kvwise.models.quiet import quiet
from kvwise.models.text import BOS, EOS, NUM_BYTES, PAD

BYTE_VOCAB = 320  # 256 bytes, 3 specials, padded to a multiple of 64
MAX_POSITIONS = 32768
DRAW = 1  # version of the drawing below: a part of every random model's revision

# Standard deviations, relative to 1/sqrt(fan_in) except for the embeddings.
_QUERY_KEY = frozenset({"q_proj", "k_proj", "qkv_proj", "query_key_value", "c_attn"})
_QUERY_KEY_GAIN = 1.7
_HEAD_GAIN = 4.0
_BIAS_STD = 0.1
_UNPRINTABLE = 0.3


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ff: int, vocab: int = BYTE_VOCAB) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ff,
        vocab_size=vocab,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def _gpt_neo(hidden: int, layers: int, heads: int, ff: int, positions: int = 4096) -> GPTNeoConfig:
    return GPTNeoConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=ff,
        attention_types=[[["global", "local"], layers // 2]],
        vocab_size=BYTE_VOCAB,
        max_position_embeddings=positions,
        tie_word_embeddings=False,  # tied and random, a model repeats its last token
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


# Name -> config. The number of parameters is within 10 % of the name. `100m-bench` is bench/engine.py's.
RANDOM_MODELS: Mapping[str, Callable[[], PreTrainedConfig]] = MappingProxyType(
    {
        "3m": lambda: _llama(hidden=192, layers=6, heads=6, kv_heads=2, ff=640),
        "13m": lambda: _llama(hidden=384, layers=8, heads=6, kv_heads=2, ff=1024),
        "60m": lambda: _llama(hidden=640, layers=12, heads=10, kv_heads=2, ff=2048),
        "160m": lambda: _llama(hidden=1024, layers=14, heads=16, kv_heads=4, ff=2816),
        "100m-bench": lambda: _llama(hidden=768, layers=12, heads=12, kv_heads=4, ff=2048, vocab=16384),
        "gpt-neo-13m": lambda: _gpt_neo(hidden=384, layers=6, heads=6, ff=1792, positions=2048),
    }
)


def build(config: PreTrainedConfig, seed: int, check_size: Callable[[int], None]) -> PreTrainedModel:
    """A float32 model of `config` on the CPU with weights drawn from `seed`: the same in every process.

    `check_size` is given the number of parameters before memory is taken, and may raise.
    """
    auto = auto_class(config)
    with quiet():
        with torch.device("meta"):
            shell = auto.from_config(config)
        check_size(shell.num_parameters())
        # Norms are left out: transformers gives them their neutral value, which is not always 1.
        weights = _draw_all(shell, torch.Generator().manual_seed(seed))
        built = type(shell).from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.float32, attn_implementation=plain_attention(config)
        )
    model: PreTrainedModel = built.eval()
    return model


def revision(config: PreTrainedConfig, seed: int) -> str:
    """Names the weights that `build` draws."""
    text = f"{DRAW}\n{seed}\n{config.to_json_string(use_diff=False)}"
    return f"random-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _draw_all(shell: PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    embedding: Any = shell.get_input_embeddings()
    head: Any = shell.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = head.weight is embedding.weight
    width = embedding.weight.shape[1]
    token_std = _HEAD_GAIN * width**-0.5 if tied else 1.0
    if hasattr(embedding, "embed_scale"):  # Gemma multiplies embeddings by sqrt(width)
        token_std *= width**-0.5
    query_key_gain = _query_key_gain(shell.config)
    weights = {}
    for path, module in shell.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if (parameter.ndim < 2 and name == "weight") or (module is head and tied):
                continue
            weight = torch.empty(parameter.shape).normal_(generator=generator)
            if name == "bias":
                weight *= _BIAS_STD
            elif parameter.ndim < 2:  # a token of its own: a class token, the end of a row of an image
                weight *= token_std
            elif module is embedding:
                weight = _shape_bytes(weight * token_std) if tied else weight * token_std
            elif module is head:
                weight = _shape_bytes(weight * _HEAD_GAIN * parameter.shape[1] ** -0.5)
            elif isinstance(module, nn.Embedding):  # learned positions: a token says more than its place
                weight *= token_std / 2
            else:
                gain = query_key_gain if path.rsplit(".", 1)[-1] in _QUERY_KEY else 1.0
                weight *= gain * _fan_in(module, parameter) ** -0.5
            weights[f"{path}.{name}" if path else name] = weight
    return weights


def _query_key_gain(config: PreTrainedConfig) -> float:
    """Scores get a standard deviation of the gain squared. GPT-Neo does not divide them by sqrt(head_dim)."""
    if config.model_type == "gpt_neo":
        return float(_QUERY_KEY_GAIN * (config.hidden_size / config.num_attention_heads) ** -0.25)
    return _QUERY_KEY_GAIN


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    return weight.shape[0] if isinstance(module, Conv1D) else weight[0].numel()  # of a convolution, all it covers


def _shape_bytes(rows: Tensor) -> Tensor:
    """Output rows [V, hidden] of the byte vocabulary: text prefers printable ASCII, other ids never lead.

    With a zero row a token's logit is 0, far below a wide head's best. Other vocabularies stay as drawn.
    """
    if rows.shape[0] == BYTE_VOCAB:
        rows[NUM_BYTES:] = 0.0
        rows[:32] *= _UNPRINTABLE
        rows[127:NUM_BYTES] *= _UNPRINTABLE
    return rows
