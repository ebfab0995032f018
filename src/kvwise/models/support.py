"""The architectures kvwise is tested with, as data; docs/models.md is made of it.

`python -m kvwise.models.support > docs/models.md` makes it anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from kvwise.models.text import BOS, EOS, PAD

TINY_VOCAB = 320


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table. `tiny` holds what its tiny config sets beside the common shape."""

    model_type: str
    name: str
    positions: str
    window: str
    route: str
    notes: str
    tiny: Mapping[str, Any]


def _row(
    model_type: str, name: str, positions: str, window: str = "none", notes: str = "", **tiny: Any
) -> tuple[str, Architecture]:
    route = "adapter (its own attention table)" if model_type == "gpt_neo" else "attention interface"
    return model_type, Architecture(model_type, name, positions, window, route, notes, MappingProxyType(tiny))


_GPT2_SHAPE: dict[str, Any] = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512}
_NEO_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 4,
    "window_size": 8,
    "max_position_embeddings": 512,
}
_FULL, _ALTERNATE = ("full_attention",) * 4, ("sliding_attention", "full_attention") * 2

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    dict(
        [
            _row("llama", "Llama 1-3, TinyLlama, SmolLM", "rotary"),
            _row("mistral", "Mistral", "rotary", "all layers", sliding_window=8),
            _row("qwen2", "Qwen 1.5, 2, 2.5", "rotary", "some layers, if switched on", "bias on q, k, v"),
            _row("qwen3", "Qwen 3", "rotary", "some layers, if switched on", "RMS norm of q and k", head_dim=16),
            _row("gemma", "Gemma 1", "rotary", notes="scaled embeddings", head_dim=16),
            _row(
                "gemma2",
                "Gemma 2",
                "rotary",
                "every other layer",
                "softcap on scores and logits",
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=8,
                layer_types=list(_ALTERNATE),
            ),
            _row(
                "gemma3_text",
                "Gemma 3 (text)",
                "rotary, two bases",
                "five of six layers",
                "RMS norm of q and k",
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=8,
                layer_types=list(_ALTERNATE),
            ),
            _row("phi3", "Phi-3, Phi-4", "rotary", "all layers", "q, k, v in one projection", sliding_window=8),
            _row(
                "opt",
                "OPT",
                "learned (offset 2)",
                notes="queries scaled before the hook",
                ffn_dim=128,
                word_embed_proj_dim=64,
            ),
            _row("gpt2", "GPT-2", "learned", notes="q, k, v in one projection", **_GPT2_SHAPE),
            _row("gpt_neox", "GPT-NeoX, Pythia", "rotary (part of the head)", notes="parallel residual"),
            _row(
                "gpt_neo",
                "GPT-Neo",
                "learned",
                "every other layer (256)",
                "scores not scaled",
                attention_types=[[["global", "local"], 2]],
                **_NEO_SHAPE,
            ),
        ]
    )
)
_COMMON: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
)
# These spell the common shape in their own way, in full.
_OWN_SHAPE = ("gpt2", "gpt_neo")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of `model_type` with about 0.2 M parameters, the byte vocabulary and short windows."""
    row = ARCHITECTURES[model_type]
    common = {} if model_type in _OWN_SHAPE else _COMMON
    # Untied: a random model with tied embeddings repeats its last token.
    fields = {**common, **row.tiny, "vocab_size": TINY_VOCAB, "tie_word_embeddings": False}
    build: Any = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = build(**fields, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return config


_PAGE = """# Models

Every causal language model of transformers that takes its attention from the public attention interface can
be loaded. Each is probed when it is: refused, with a reason, where the hook does not see all that its
attention does (position biases, attention sinks, state-space layers, attention of its own). The architectures
below are tested: one flat pass of prefill and decode agrees with plain transformers. A small random
model of each is built by `random:<model type>-tiny`.

| model type | models | positions | sliding window | route | notes |
|---|---|---|---|---|---|
{rows}

Refused: encoder-decoders, quantised checkpoints, weights that come only as pickles, checkpoints that need
their own Python code (unless `--trust-remote-code`), and architectures other than GPT-Neo with an attention
table of their own: GPT-J, Falcon, BLOOM, MPT.

A trained model comes with the package: `builtin:recall`, a Qwen 2 of a few megabytes that looks things up in its
context ([how it was trained](builtin-model.md)). Any folder whose `config.json` says `"kvwise_language": "token"` is
taken to speak the same token language. Random weights of any shape: `random:3m`, `random:13m`, or a `config.json`.

This page is made by `python -m kvwise.models.support`; a test compares the two.
"""


def document() -> str:
    """The text of docs/models.md."""
    cells = (
        (f"`{row.model_type}`", row.name, row.positions, row.window, row.route, row.notes)
        for row in ARCHITECTURES.values()
    )
    return _PAGE.format(rows="\n".join(f"| {' | '.join(row)} |" for row in cells))


if __name__ == "__main__":
    print(document(), end="")
