"""Loading a causal LM: from a folder, the Hugging Face hub, a config.json or by a `builtin:` or `random:` name."""

import logging
import re
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from kvwise.core.errors import UsageError
from kvwise.models import gptneo, hook, processors, random
from kvwise.models.builtin import BUILTIN, builtin_folders
from kvwise.models.checkpoint import Checkpoint, open_checkpoint
from kvwise.models.checksums import verify
from kvwise.models.config import one_line, read_config, speaks_tokens
from kvwise.models.loaded import LoadedModel
from kvwise.models.packed import pack
from kvwise.models.precision import choose_dtype
from kvwise.models.probe import probe, vocab_size
from kvwise.models.quiet import quiet
from kvwise.models.support import tiny_config, tiny_types
from kvwise.models.text import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, WordTokenizer

RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_log = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Loads the model `name` and hooks its attention.

    `name` is a folder, a hub id, a path to a config.json (random weights of that shape), `builtin:` and the name of a
    model that comes with the package, or `random:` and a name of `RANDOM_MODELS` or `<model_type>-tiny`. `seed` draws
    random weights. `dtype` is auto, float32, bfloat16 or float16; auto is the checkpoint's, but float32 for built-in
    models and where the device computes half precision slowly.

    Raises UsageError for what cannot be read, UnsupportedModel for what can be but cannot be served.
    """
    target = _device(device)
    if name.startswith(RANDOM):
        return _load_random(name, _random_config(name), dtype, target, seed)
    if name.startswith(BUILTIN):
        return _load_builtin(name, dtype, target)
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return _load_random(name, read_config(path), dtype, target, seed)
    folder, commit = (path, None) if path.is_dir() else _download(name, trust_remote_code)
    return _load_folder(name, folder, commit, dtype, target, trust_remote_code)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={name!r} cannot be used here ({one_line(error)}); cpu always can") from error
    return device


def _random_config(name: str) -> PreTrainedConfig:
    short = name.removeprefix(RANDOM)
    if short in random.RANDOM_MODELS:
        return random.RANDOM_MODELS[short]()
    if short.endswith("-tiny") and (model_type := tiny_types().get(short.removesuffix("-tiny"))):
        return tiny_config(model_type)
    known = ", ".join(random.RANDOM_MODELS)
    raise UsageError(f"no random model is called {short!r}: known are {known}, and <model type>-tiny of docs/models.md")


def _load_random(name: str, config: PreTrainedConfig, dtype: str, device: torch.device, seed: int) -> LoadedModel:
    chosen = choose_dtype(dtype, torch.float32, device)
    try:
        model = random.build(config, seed, check_size=lambda num: _check_fits(name, num, chosen, device))
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"no model can be built from the config of {name}: {one_line(error)}") from error
    model = _moved(model, device, chosen)
    processor, num_ids = processors.default_processor(config), vocab_size(model)
    tokenizer = ByteTokenizer(num_ids) if processor is None else processors.marked_tokenizer(config, num_ids)
    return _finish(name, random.revision(config, seed), model, tokenizer, processor)


def _load_builtin(name: str, dtype: str, device: torch.device) -> LoadedModel:
    """In float32 unless asked otherwise, whatever it is stored in: its answers are to be the same everywhere."""
    known = builtin_folders()
    short = name.removeprefix(BUILTIN)
    if short not in known:
        names = ", ".join(BUILTIN + folder for folder in known) or "none: reinstall kvwise"
        raise UsageError(f"no built-in model is called {short!r}; there is {names}")
    verify(known[short])
    return _load_folder(name, known[short], None, "float32" if dtype == "auto" else dtype, device, False)


def _load_folder(
    name: str, folder: Path, commit: str | None, dtype: str, device: torch.device, trust_remote_code: bool
) -> LoadedModel:
    config = read_config(folder / "config.json", trust_remote_code=trust_remote_code)
    checkpoint = open_checkpoint(folder)
    before = checkpoint.stamps()
    chosen = choose_dtype(dtype, getattr(config, "dtype", None) or torch.float32, device)
    _check_fits(name, checkpoint.num_elements, chosen, device)
    model = _moved(_read_weights(checkpoint, config, chosen, trust_remote_code), device, chosen)
    tokenizer = _tokenizer(checkpoint, model, trust_remote_code)
    processor = processors.folder_processor(folder, config)
    revision = commit or checkpoint.fingerprint()
    if checkpoint.stamps() != before:
        raise UsageError(f"{folder} changed while it was being loaded: load it again when it is complete")
    return _finish(name, revision, model, tokenizer, processor, folder)


def _read_weights(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    auto = processors.auto_class(config)
    try:
        with quiet():
            model, info = auto.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                attn_implementation=processors.plain_attention(config),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # building somebody's model from somebody's files: errors of any kind
        raise UsageError(f"{checkpoint.folder} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise UsageError(
            f"{checkpoint.folder} lacks {len(missing)} weights its config asks for, such as {missing[0]}:"
            " config and weights do not belong together"
        )
    ready: PreTrainedModel = model.eval()
    return ready


def _moved(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    untyped: Any = model
    moved: PreTrainedModel = untyped.to(device=device, dtype=dtype)
    return moved


def _download(name: str, trust_remote_code: bool) -> tuple[Path, str]:
    """A hub id's files (no pickles) -> folder and commit."""
    if not _HUB_ID.fullmatch(name):
        raise UsageError(f"there is no folder {name!r}, and it is not a hub id (owner/name)")
    patterns = [
        "*.json",
        "*.safetensors",
        "*.model",
        "*.txt",
        "*.jinja",
        *(["*.py"] if trust_remote_code else []),
    ]
    try:
        with quiet():
            folder = Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UsageError(
            f"there is no folder {name!r}, and the Hugging Face hub did not give it ({one_line(error)}):"
            " give the folder of a downloaded model, or random:13m to try without one"
        ) from error
    return folder, folder.name


def _tokenizer(checkpoint: Checkpoint, model: PreTrainedModel, trust_remote_code: bool) -> Tokenizer:
    num_ids = vocab_size(model)
    if not checkpoint.has_tokenizer:
        _log.warning("%s has no tokenizer: text is read and written as UTF-8 bytes", checkpoint.folder)
        takes_images = processors.takes_images(model.config)
        return processors.marked_tokenizer(model.config, num_ids) if takes_images else ByteTokenizer(num_ids)
    words = speaks_tokens(model.config)
    # For Qwen2's architecture AutoTokenizer takes Qwen2's class, whatever class the folder names.
    kind: Any = PreTrainedTokenizerFast if words else AutoTokenizer
    try:
        with quiet():
            inner = kind.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer files are parsed by several libraries
        raise UsageError(f"the tokenizer in {checkpoint.folder} cannot be read: {one_line(error)}") from error
    largest = max(inner.get_vocab().values(), default=-1)
    if largest >= num_ids:
        raise UsageError(
            f"the tokenizer in {checkpoint.folder} has ids up to {largest}, the model embeds {num_ids}:"
            " they do not belong together"
        )
    return WordTokenizer(inner) if words else HuggingFaceTokenizer(inner)


def _check_fits(name: str, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
    needed = num_elements * dtype.itemsize
    on_gpu = device.type == "cuda"
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > available:
        raise UsageError(
            f"{name} has {needed / 2**30:.1f} GiB of weights in {str(dtype).removeprefix('torch.')},"
            f" {device} has {available / 2**30:.1f} GiB free: take a smaller model or a shorter dtype"
        )


def _finish(
    name: str, revision: str, model: PreTrainedModel, tokenizer: Tokenizer, processor: Any = None,
    folder: Path | None = None,
) -> LoadedModel:  # fmt: skip
    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}.values()
    weight_bytes = sum(parameter.nbytes for parameter in parameters)
    num_parameters = sum(parameter.numel() for parameter in parameters)
    del parameters  # packing lets go of weights one by one
    vision = processors.make_vision(model, processor, tokenizer)
    layers = probe(model, lambda: _install(model), name, vision)
    config: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return LoadedModel(
        name=name,
        revision=revision,
        model=model,
        config=model.config,
        tokenizer=tokenizer,
        layers=layers,
        num_layers=len(layers),
        num_kv_heads=layers[0].num_kv_heads,
        num_query_heads=layers[0].num_query_heads,
        head_dim=layers[0].head_dim,
        vocab_size=int(head.weight.shape[0]),
        max_model_len=_max_model_len(config, name),
        eos_token_ids=_eos(model),
        weight_bytes=weight_bytes,
        num_parameters=num_parameters,
        dtype=model.dtype,
        device=model.device,
        keeps_rows=hook.keeps_rows(model),
        vision=vision,
        folder=folder,
    )


def _install(model: PreTrainedModel) -> None:
    hook.register()
    if model.config.model_type == "gpt_neo":
        gptneo.adapt(model)
    elif processors.takes_images(model.config):
        model.set_attn_implementation({"text_config": hook.ATTENTION})  # what sees keeps attention of its own
    else:
        model.set_attn_implementation(hook.ATTENTION)
    pack(model)  # the probe, which is about to run, proves these layers too


def _max_model_len(config: Any, name: str) -> int:
    length: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # These rotate every token of a pass by the longest position in it: exact only below the switch.
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if original is not None and original < length:
            _log.warning("%s: positions beyond %d change the rotation of earlier ones; it is the limit", name, original)
            length = int(original)
    return length


def _eos(model: PreTrainedModel) -> tuple[int, ...]:
    generation = model.generation_config
    found = generation.eos_token_id if generation is not None else None
    untyped: Any = model.config
    for config in (untyped, untyped.get_text_config()):
        found = getattr(config, "eos_token_id", None) if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)
