"""The architectures kvwise is tested with, as data; docs/models.md is made of it.

`python -m kvwise.models.support > docs/models.md` makes it anew.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from kvwise.models.images import MAX_PIXELS
from kvwise.models.text import BOS, EOS, PAD
from kvwise.models.vision import FEATURE_BYTES

TINY_VOCAB = 320
IMAGE, IMAGE_START, IMAGE_END, VIDEO = 259, 260, 261, 262  # placeholders of tiny models that take images


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
_PATCHES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 3,
    "image_size": 28,
    "patch_size": 7,
    **_PATCHES,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True, slots=True)
class VisionArchitecture:
    """One row of the table of models that take images; `text`, `vision` and `tiny` make its tiny config."""

    model_type: str
    name: str
    tokens: str
    rotation: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tiny: Mapping[str, Any]


def _sees(
    model_type: str, name: str, tokens: str, rotation: str, text: dict[str, Any], vision: dict[str, Any], **tiny: Any
) -> tuple[str, VisionArchitecture]:
    return model_type, VisionArchitecture(model_type, name, tokens, rotation, text, vision, MappingProxyType(tiny))


_LLAMA = {"model_type": "llama"}
_QWEN_TOKENS = {"vision_start_token_id": IMAGE_START, "vision_end_token_id": IMAGE_END, "video_token_id": VIDEO}
VISION_ARCHITECTURES: Mapping[str, VisionArchitecture] = MappingProxyType(
    dict(
        [
            _sees("llava", "LLaVA 1.5", "the same for every image", "by index", _LLAMA, _CLIP),
            _sees(
                "llava_next",
                "LLaVA 1.6 (NeXT)",
                "by size: the whole and its tiles",
                "by index",
                _LLAMA,
                _CLIP,
                image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
            ),
            _sees(
                "qwen2_vl",
                "Qwen2-VL",
                "by size",
                "by time, height and width",
                {"rope_parameters": _ROPE},
                {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
                **_QWEN_TOKENS,
            ),
            _sees(
                "qwen2_5_vl",
                "Qwen2.5-VL",
                "by size",
                "by time, height and width",
                {"rope_parameters": _ROPE},
                {
                    **_QWEN_VISION,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "out_hidden_size": 64,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
                **_QWEN_TOKENS,
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
_TOKENS: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": TINY_VOCAB,
        "tie_word_embeddings": False,  # tied and random, a model repeats its last token
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
)
# These spell the common shape in their own way, in full.
_OWN_SHAPE = ("gpt2", "gpt_neo")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of `model_type` with about 0.2 M parameters, the byte vocabulary and short windows."""
    build: Any = CONFIG_MAPPING[model_type]
    common = {} if model_type in _OWN_SHAPE else _COMMON
    config: PreTrainedConfig
    if model_type in VISION_ARCHITECTURES:
        row = VISION_ARCHITECTURES[model_type]
        text = {**common, **_TOKENS, **row.text}
        # These build the parts in place: another config must not share them.
        parts = deepcopy({"text_config": text, "vision_config": dict(row.vision), **row.tiny})
        config = build(**parts, image_token_id=IMAGE, tie_word_embeddings=False)
    else:
        config = build(**{**common, **ARCHITECTURES[model_type].tiny, **_TOKENS})
    return config


def tiny_types() -> dict[str, str]:
    """What stands before `-tiny` in the name of a random model -> model type; underscores may be left out."""
    types = [*ARCHITECTURES, *VISION_ARCHITECTURES]
    return {**{name.replace("_", ""): name for name in types}, **{name: name for name in types}}


_PAGE = """# Models

Every causal language model of transformers that takes its attention from the public attention interface can
be loaded. Each is probed when it is: refused, with a reason, where the hook does not see all that its
attention does (position biases, attention sinks, state-space layers, attention of its own). The architectures
below are tested: one flat pass of prefill and decode agrees with plain transformers. A small random
model of each is built by `random:<model type>-tiny` (underscores may be left out).

| model type | models | positions | sliding window | route | notes |
|---|---|---|---|---|---|
{rows}

Refused: encoder-decoders, quantised checkpoints, weights that come only as pickles, checkpoints that need
their own Python code (unless `--trust-remote-code`), and architectures other than GPT-Neo with an attention
table of their own: GPT-J, Falcon, BLOOM, MPT.

A trained model comes with the package: `builtin:recall`, a Qwen 2 of a few megabytes that looks things up in its
context ([how it was trained](builtin-model.md)). Any folder whose `config.json` says `"kvwise_language": "token"` is
taken to speak the same token language. Random weights of any shape: `random:3m`, `random:13m`, or a `config.json`.

## Models that take images

| model type | models | tokens of an image | rotation |
|---|---|---|---|
{seeing}

Greedy answers about images are those of transformers' `generate` in float32: with none, one and several images, in a
batch, in chunks that cut an image anywhere, behind a prefix hit, after preemption and forked into samples. The hook is
on the language part only; what sees keeps attention of its own.

```python
llm = LLM("path/to/llava")
llm.generate("USER: <image>\\nWhat is this? ASSISTANT:", images=["cat.png"])  # paths, PIL images or uint8 arrays
llm.generate([a, b], images=[["cat.png", "dog.png"], []])  # for several prompts, a list for each
```

On the command line, `kvwise generate --image cat.png --image dog.png` gives all images to every prompt. A prompt has
one placeholder for each of its images (`<image>`, or `<|vision_start|><|image_pad|><|vision_end|>` for Qwen's); a text
without any gets them in front, token ids must have them, one for each image or all the tokens that the images take.
An image is read when the request is added, so its file may go; it may have at most {max_pixels:,} pixels. Its features
are computed when a step first needs them, which a prefix hit may make needless, and the last {feature_mib} MiB of them
are kept. The keys of the blocks that an image reaches into name what the model sees of it: the same image shares KV,
another one behind the same placeholders does not. A folder without `preprocessor_config.json` is served as text only;
video is not read. Named prompt caches hold text; `Engine.keys` gives the keys by which a prompt with images is pinned
or purged. Pillow reads the images (`pip install 'kvwise[vision]'`); torchvision is not needed.

This page is made by `python -m kvwise.models.support`; a test compares the two.
"""


def document() -> str:
    """The text of docs/models.md."""
    cells = (
        (f"`{row.model_type}`", row.name, row.positions, row.window, row.route, row.notes)
        for row in ARCHITECTURES.values()
    )
    seeing = ((f"`{row.model_type}`", row.name, row.tokens, row.rotation) for row in VISION_ARCHITECTURES.values())
    return _PAGE.format(rows=_rows(cells), seeing=_rows(seeing), max_pixels=MAX_PIXELS, feature_mib=FEATURE_BYTES >> 20)


def _rows(cells: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    print(document(), end="")
