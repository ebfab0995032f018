"""Reading and checking a model's config before anything is built from it."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvwise.core.errors import UnsupportedModel, UsageError
from kvwise.models.quiet import quiet

MAX_CONFIG_BYTES = 10_000_000
# Vision-language models that are served with images. Others load only if transformers knows them as text models too.
VISION_TYPES = frozenset({"llava", "llava_next", "qwen2_vl", "qwen2_5_vl"})
LANGUAGE_KEY, TOKEN_LANGUAGE = "kvwise_language", "token"

# Key of a config.json -> (smallest, largest) value taken for serious. One thing has several spellings.
_LAYERS, _WIDTH, _HEADS = (1, 1_000), (1, 200_000), (1, 4_096)
LIMITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), _LAYERS),
        **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), _WIDTH),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"), _HEADS),
        **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), (1, 2_000_000)),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), (1, 100_000_000)),
        "head_dim": (1, 4_096),
        "vocab_size": (1, 10_000_000),
        "sliding_window": (1, 100_000_000),
    }
)


def read_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config in the file `path`, checked; a new object, so that no other model shares it.

    Raises UsageError for a file that is no config, or has values that cannot be meant, and UnsupportedModel
    for a model kvwise cannot serve whatever its weights are.
    """
    raw = _read_json(path)
    _check_values(path, raw)
    model_type = _check_type(path, raw, trust_remote_code)
    try:
        with quiet():
            if model_type in CONFIG_MAPPING:
                config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(raw)
            else:
                config = AutoConfig.from_pretrained(path.parent, trust_remote_code=True)
    except Exception as error:  # config classes validate with errors of many kinds
        raise UsageError(f"{path} is not a valid {model_type} config: {one_line(error)}") from error
    return config


def speaks_tokens(config: PreTrainedConfig) -> bool:
    """Whether the config says that its model speaks the token language of kvwise's tasks."""
    return getattr(config, LANGUAGE_KEY, None) == TOKEN_LANGUAGE


def one_line(error: Exception) -> str:
    """The first line of an error of somebody else's."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path} does not exist: a model folder needs a config.json")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size} bytes; a config has at most {MAX_CONFIG_BYTES}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds a {type(raw).__name__}; a config is a JSON object")
    return raw


def _check_values(path: Path, raw: Mapping[str, Any]) -> None:
    if raw.get(LANGUAGE_KEY, TOKEN_LANGUAGE) != TOKEN_LANGUAGE:
        raise UsageError(
            f"{path}: {LANGUAGE_KEY}={raw[LANGUAGE_KEY]!r} is not known: it is {TOKEN_LANGUAGE!r} or absent"
        )
    for key, value in raw.items():
        if isinstance(value, dict) and key in ("text_config", "llm_config", "vision_config"):
            _check_values(path, value)
        if key not in LIMITS or value is None:
            continue
        smallest, largest = LIMITS[key]
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            raise UsageError(f"{path}: {key}={value!r} must be a whole number from {smallest} to {largest}")


def _check_type(path: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> str:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise UsageError(f"{path} names no model_type, so its architecture is unknown")
    if raw.get("is_encoder_decoder") is True:
        raise UnsupportedModel(f"{model_type!r} is an encoder-decoder; kvwise serves decoder-only models")
    if (quantization := raw.get("quantization_config")) is not None:
        kind = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"{path}: the weights are quantised ({kind}), which kvwise does not load: use the full checkpoint"
        )
    if model_type not in CONFIG_MAPPING and "auto_map" in raw and not trust_remote_code:
        raise UnsupportedModel(
            f"{path}: model type {model_type!r} needs the checkpoint's own Python code: read that code,"
            " then pass trust_remote_code=True (--trust-remote-code) to run it"
        )
    if model_type not in CONFIG_MAPPING and "auto_map" not in raw:
        raise UnsupportedModel(f"{path}: this version of transformers knows no model type {model_type!r}")
    served = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in VISION_TYPES
    if model_type in CONFIG_MAPPING and not served:
        raise UnsupportedModel(f"{path}: model type {model_type!r} has no causal language model in transformers")
    return model_type
