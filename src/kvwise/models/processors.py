"""Which model types take images, and how their vision is put together from a folder or from a config alone."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvwise.core.errors import UsageError
from kvwise.models.config import VISION_TYPES, one_line
from kvwise.models.images import require_pillow
from kvwise.models.quiet import quiet
from kvwise.models.text import HuggingFaceTokenizer, MarkedByteTokenizer, Tokenizer
from kvwise.models.vision import Vision

_log = logging.getLogger(__name__)


def takes_images(config: PreTrainedConfig) -> bool:
    """Whether this is the config of a vision-language model that kvwise serves with images."""
    return config.model_type in VISION_TYPES


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds a model of this config."""
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def plain_attention(config: PreTrainedConfig) -> Any:
    """The attention a model is built with: eager, and a vision part's is fused, for it sees thousands of patches."""
    return {"": "eager", "text_config": "eager", "vision_config": "sdpa"} if takes_images(config) else "eager"


def folder_processor(folder: Path, config: PreTrainedConfig) -> Any:
    """The image processor of a folder; None, and a warning, if the model takes images and the folder has none."""
    if not takes_images(config):
        return None
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        _log.warning("%s has no preprocessor_config.json: it is served without images", folder)
        return None
    require_pillow()
    try:
        with quiet():
            return AutoImageProcessor.from_pretrained(folder, backend="pil")  # type: ignore[no-untyped-call]
    except Exception as error:  # read by a class that the folder names
        raise UsageError(f"the image processor in {folder} cannot be read: {one_line(error)}") from error


def default_processor(config: PreTrainedConfig) -> Any:
    """The image processor that belongs to a config's shapes, with the settings its family was published with."""
    if not takes_images(config):
        return None
    require_pillow()
    return _DEFAULTS[config.model_type](config)


def marked_tokenizer(config: PreTrainedConfig, num_ids: int) -> MarkedByteTokenizer:
    """A byte tokenizer that reads the marks of a model's images."""
    untyped: Any = config
    return MarkedByteTokenizer(num_ids, {f"<{name}>": token for name, token in _marks(untyped).items()})


def make_vision(model: PreTrainedModel, processor: Any, tokenizer: Tokenizer) -> Vision | None:
    """The vision of a model; None if it has none."""
    if processor is None:
        return None
    config: Any = model.config
    names = {name: _name(tokenizer, token) for name, token in _marks(config).items()}
    mark = names["image"]
    wrap = names.get("image_start", "") + mark + names.get("image_end", "")
    return Vision(model, processor, token=config.image_token_id, mark=mark, wrap=wrap)


def _marks(config: Any) -> dict[str, int]:
    """The tokens of an image's place and, where the model has them, of what stands around it."""
    marks = {"image": config.image_token_id}
    for name, key in (("image_start", "vision_start_token_id"), ("image_end", "vision_end_token_id")):
        token = getattr(config, key, None)
        if token is not None:
            marks[name] = token
    return marks


def _name(tokenizer: Tokenizer, token: int) -> str:
    if isinstance(tokenizer, MarkedByteTokenizer):
        return tokenizer.name(token)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    name: str = tokenizer.inner.convert_ids_to_tokens(token)
    return name


def _llava(config: Any) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _llava_next(config: Any) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    size = config.vision_config.image_size
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )


def _qwen(config: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    vision = config.vision_config
    area = (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels of one token
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * area, "longest_edge": 1280 * area},
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )


_DEFAULTS: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {"llava": _llava, "llava_next": _llava_next, "qwen2_vl": _qwen, "qwen2_5_vl": _qwen}
)
