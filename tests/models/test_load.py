"""Loading: what works gives the facts, what does not is refused in one line that names the way out."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from dense import DenseBatch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models as rust_models
from transformers import PreTrainedTokenizerFast

from kvwise.core.errors import UnsupportedModel, UsageError
from kvwise.models import load, precision
from kvwise.models.load import load_model
from kvwise.models.support import tiny_config
from kvwise.models.text import ByteTokenizer, HuggingFaceTokenizer

Save = Callable[..., Path]


def edit(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_model(str(name), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- what works ------------------------------------------------------------------------------------------------


def test_the_facts_of_a_model() -> None:
    loaded = load_model("random:3m")
    assert (loaded.num_layers, loaded.num_query_heads, loaded.num_kv_heads, loaded.head_dim) == (6, 6, 2, 32)
    assert loaded.vocab_size == 320
    assert loaded.max_model_len >= 16384
    assert loaded.eos_token_ids == (257,)
    assert loaded.weight_bytes == 4 * loaded.num_parameters
    assert loaded.dtype == torch.float32
    assert isinstance(loaded.tokenizer, ByteTokenizer)


@pytest.mark.parametrize("shard", ["1GB", "200KB"])
def test_a_folder_gives_the_model_that_was_saved(save: Save, shard: str) -> None:
    folder = save("qwen3", shard=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard == "200KB")
    prompt = {0: [1, 2, 3, 4]}
    expected = DenseBatch(1).step(load_model("random:qwen3-tiny"), prompt)
    assert torch.equal(DenseBatch(1).step(load_model(str(folder)), prompt), expected)


def test_the_revision_follows_every_byte_of_the_weights(save: Save) -> None:
    folder = save()
    first = load_model(str(folder)).revision
    assert load_model(str(folder)).revision == first
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][5, 5] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder)).revision != first


def test_a_config_file_gives_random_weights_by_seed(save: Save) -> None:
    path = save("gpt2") / "config.json"
    first, again, other = (load_model(str(path), seed=seed) for seed in (3, 3, 4))
    assert first.revision == again.revision != other.revision
    same = [torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(next(first.model.parameters()), next(other.model.parameters()))


def test_tied_weights_count_once(save: Save) -> None:
    folder = save("gpt2")
    untied = load_model(str(folder)).weight_bytes
    tied = load_model(str(edit(folder, tie_word_embeddings=True) / "config.json")).weight_bytes
    assert untied - tied == 4 * 320 * 64


def test_a_folder_with_a_tokenizer_uses_it(save: Save) -> None:
    folder = save()
    vocab = {f"w{i}": i for i in range(300)}
    inner = RustTokenizer(rust_models.WordLevel(vocab, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w1").save_pretrained(folder)
    assert isinstance(load_model(str(folder)).tokenizer, HuggingFaceTokenizer)


def test_a_folder_without_a_tokenizer_says_that_text_is_bytes(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(str(save()))
    assert loaded.tokenizer.encode("hi", add_special=False) == [104, 105]
    assert "no tokenizer" in caplog.text


def test_end_tokens_come_from_the_generation_config(save: Save) -> None:
    folder = save()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(str(folder)).eos_token_ids == (7, 9)


def test_a_hub_id_loads_the_files_the_hub_gives(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()
    monkeypatch.setattr(load, "snapshot_download", lambda name, allow_patterns: str(folder))
    loaded = load_model("someone/some-model")
    assert (loaded.name, loaded.revision) == ("someone/some-model", folder.name)


# -- number formats --------------------------------------------------------------------------------------------


def test_half_precision_weights_are_held_in_float32_where_the_cpu_is_slow_at_them(
    save: Save, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    folder = save(dtype=torch.bfloat16)
    loaded = load_model(str(folder))
    assert loaded.dtype == torch.float32
    assert [record.levelno for record in caplog.records if "float32" in record.message] == [logging.WARNING]
    assert "float32" in refusal(folder, dtype="bfloat16")


def test_half_precision_is_kept_where_the_cpu_is_fast_at_it(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    folder = save(dtype=torch.bfloat16)
    assert load_model(str(folder)).dtype == torch.bfloat16
    assert load_model(str(folder), dtype="float32").dtype == torch.float32
    assert not precision.computes_fast(torch.float16, torch.device("cpu"))


# -- what is refused -------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(load, "snapshot_download", offline)
    assert "no folder" in refusal(tmp_path / "absent")
    assert "hub" in refusal("someone/some-model")
    assert "13m" in refusal("random:14m")
    assert "does not exist" in refusal(tmp_path / "config.json")
    assert "config.json" in refusal(tmp_path)
    assert "cpu always can" in refusal("random:3m", device="tpu9")
    assert "bfloat16" in refusal("random:3m", dtype="float8")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"hidden_size": -64}, "hidden_size=-64"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"vocab_size": 1e400}, "vocab_size=inf"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": "novel"}, "novel"),
        ({"model_type": "novel", "auto_map": {"AutoConfig": "code.Config"}}, "trust_remote_code"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "clip"}, "clip"),
        ({"hidden_act": "no_such_function"}, "no_such_function"),
    ],
)
def test_configs_that_cannot_be_meant(save: Save, fields: dict[str, Any], said: str) -> None:
    folder = edit(save(), **fields)
    assert said in refusal(folder)
    assert said in refusal(folder / "config.json")


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[" * 100_000, b"null", b"\xff\xfe{\x00}\x00"])
def test_configs_that_are_none(save: Save, data: bytes) -> None:
    folder = save()
    (folder / "config.json").write_bytes(data)
    assert "config.json" in refusal(folder)


def test_weights_that_are_missing_or_not_safe(save: Save) -> None:
    folder = save(shard="200KB")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    good = index.read_text()
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", 7):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert repr(name) in refusal(folder)
    for text in ("", "[]", '{"weight_map": 1}', "{}"):
        index.write_text(text)
        assert "index" in refusal(folder)
    index.write_text(good)
    shards[-1].unlink()
    assert shards[-1].name in refusal(folder)
    index.unlink()
    for shard in shards[:-1]:
        shard.unlink()
    assert "no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickle" in refusal(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "pickle"])
def test_weights_that_are_no_safetensors(save: Save, damage: str) -> None:
    folder = save()
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {"truncated": data[:-100], "empty": b"", "header": b"\xff" * 8 + data[8:], "pickle": b"\x80\x04N."}[damage]
    )
    assert "safetensors" in refusal(folder)


def test_weights_of_another_model(save: Save) -> None:
    assert "lacks" in refusal(edit(save("llama"), num_hidden_layers=6))
    assert "cannot be loaded" in refusal(edit(save("qwen2"), intermediate_size=256))


def test_a_tokenizer_of_another_model(save: Save) -> None:
    folder = save()
    inner = RustTokenizer(rust_models.WordLevel({f"w{i}": i for i in range(500)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    assert "499" in refusal(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(folder)


def test_a_model_larger_than_the_memory(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    assert "GiB free" in refusal(folder)
    assert "GiB free" in refusal("random:160m")


def test_a_folder_that_changes_while_it_is_read(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save()
    real = load._read_weights

    def slowly(*args: Any) -> Any:
        model = real(*args)
        (folder / "model.safetensors").touch()
        return model

    monkeypatch.setattr(load, "_read_weights", slowly)
    assert "changed" in refusal(folder)


_SMALL = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gptj", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16}),
        ("falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}),
        ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
        (
            "jamba",
            {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"intermediate_size": 64, "num_experts": 2, "use_mamba_kernels": False},
        ),
        (
            "llama4_text",
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_local_experts": 2},
        ),
        (
            "gpt_oss",
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            | {"intermediate_size": 64, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
        ),
    ],
)
def test_attention_that_cannot_be_hooked(tmp_path: Path, model_type: str, fields: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type} | _SMALL | fields))
    with pytest.raises(UnsupportedModel, match="cannot be hooked"):
        load_model(str(path))


def test_a_model_that_does_not_even_run(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    moe = {"num_experts": 4, "num_experts_per_tok": 8, "hidden_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    path.write_text(json.dumps({"model_type": "qwen3_moe"} | _SMALL | moe | heads))
    with pytest.raises(UnsupportedModel, match="does not run"):
        load_model(str(path))


def test_rotation_that_switches_with_length_limits_the_length(tmp_path: Path) -> None:
    config = json.loads(tiny_config("phi3").to_json_string())
    factors = [1.0] * 8
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    }
    config["original_max_position_embeddings"] = 128
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert load_model(str(path)).max_model_len == 128


def test_loading_leaves_transformers_log_level_as_it_was() -> None:
    before = transformers.utils.logging.get_verbosity()
    load_model("random:llama-tiny")
    assert transformers.utils.logging.get_verbosity() == before


def test_random_weights_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from kvwise.models.load import load_model; m = load_model('random:gpt_neo-tiny', seed=5);"
        "print(hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in m.model.parameters())).hexdigest())"
    )
    here: dict[str, Any] = {}
    exec(code.replace("print(", "found = ("), here)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here["found"]
