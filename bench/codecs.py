"""Codecs on the KV of real models: bits a number, entropy of codes, error, speed, what CacheGen's distances gain.

    python bench/codecs.py                     # the trained built-in model, random:13m, and one of 8 KV heads x 128
    python bench/codecs.py --models builtin:recall --repeats 3

Codecs with distributions are profiled on one prompt (the one an engine profiles on) and measured on another, read from
the arena of an engine. "GB/s fp16" counts two bytes a number, "GB/s own" the model's dtype; one thread, best of the
repeats over all blocks. "entropy" is that of the quantised codes by themselves (order 0, keys and values apart): with
one distribution for all blocks of a layer, and with one for each block, as if tables cost nothing. "codes" is what they
take in the record: segments less scales and heads. "distance" is the rms of
x - anchor over that of x less its channel's mean, over the tokens that are no anchors: CacheGen's distances gain where
it is below 1, and are 1.41 for tokens that have nothing to do with each other.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvwise.core.config import EngineConfig
from kvwise.core.layout import KVLayout
from kvwise.core.params import SamplingParams
from kvwise.engine.calibrate import sample_blocks
from kvwise.engine.engine import Engine
from kvwise.kernels import kernels_for
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.token_language import TokenLanguage
from kvwise.tiers.codec.base import Codec
from kvwise.tiers.codec.cachegen_codes import GROUP
from kvwise.tiers.codec.catalogue import make_codec
from kvwise.tiers.codec.quantise import HEAD, Groups, floats, quantise
from machine import CPU, write_results

SEED = 1
NUM_TOKENS = 512
SPECS = ("raw", "int8", "int4", "int4z", "cachegen(levels=4)", "cachegen(levels=4,mode=released)")
# Eight KV heads of 128, as in 8B models; few layers and no trained weights.
WIDE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 4}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 1024}
WIDE |= {"vocab_size": 320, "max_position_embeddings": 4096, "bos_token_id": 256, "eos_token_id": 257}

Blocks = tuple[Tensor, Tensor]  # keys, values [n, L, H, block_size, D]
Row = dict[str, object]


def prompt_of(loaded: LoadedModel) -> list[int]:
    """Tokens that are not the ones profiled on."""
    rng = np.random.default_rng(SEED)
    if loaded.speaks_tokens:
        tokens = list(Recall().episode(rng, TokenLanguage(loaded.vocab_size), 2 * NUM_TOKENS).context)
        return [int(token) for token in tokens[:NUM_TOKENS]]
    text = Path(__file__).parent.parent.joinpath("README.md").read_text()
    return list(loaded.tokenizer.encode(text))[:NUM_TOKENS]


def engine_blocks(loaded: LoadedModel) -> Blocks:
    """The full blocks of one prompt as they lie in an engine's arena."""
    config = EngineConfig(kv_cache_memory_bytes=1 << 28, max_num_seqs=1)
    engine = Engine(loaded, parse("full"), config)
    try:
        prompt = prompt_of(loaded)
        name = engine.add_request(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        sequence = engine._requests[name][0]
        while sequence.num_computed < len(prompt):
            engine.step()
        memory, row = engine.memory, sequence.row
        shape = (-1, *(memory.layout.num_layers, memory.layout.num_kv_heads), *memory.arena.keys.shape[1:])
        blocks = torch.from_numpy(memory.cache.tables[row, : len(prompt) // memory.layout.block_size]).long()
        return memory.arena.keys.view(shape)[blocks].clone(), memory.arena.values.view(shape)[blocks].clone()
    finally:
        engine.close()


def model_named(name: str, folder: Path) -> LoadedModel:
    """A model by the name `load_model` knows, or `8x128`."""
    if name != "8x128":
        return load_model(name)
    folder.joinpath("config.json").write_text(json.dumps(WIDE))
    return load_model(str(folder / "config.json"))


def entropy(codes: np.ndarray) -> float:
    """Bits a code, order 0."""
    share = np.bincount(codes.reshape(-1)) / codes.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def int4_entropy(blocks: Blocks) -> tuple[float, float, float]:
    """Of int4's codes: bits with distributions of each layer, of each layer of a block; bits a number of the scales."""
    keys, values = blocks
    groups, found, single = Groups.of(keys.shape[2:], 32), [], []
    for layer in range(keys.shape[1]):
        grids = [quantise(floats(k[layer]), floats(v[layer]), groups, 15) for k, v in zip(keys, values, strict=True)]
        codes = np.stack([grid.codes for grid in grids])
        found += [entropy(codes[:, 0]), entropy(codes[:, 1])]
        single += [entropy(part) for block in codes for part in block]
    return (
        sum(found) / len(found),
        sum(single) / len(single),
        8 * (groups.grid_bytes + HEAD.size) / (2 * groups.num_codes),
    )


def distance(numbers: Tensor) -> float:
    """Rms of the distances to CacheGen's anchors, over that of the numbers less their channel's mean."""
    numbers = numbers.double()
    centred = numbers - numbers.mean((0, 3), keepdim=True)
    tokens = torch.arange(numbers.shape[3])
    rest = tokens[tokens % GROUP > 0]
    gaps = numbers[:, :, :, rest] - numbers[:, :, :, rest // GROUP * GROUP]
    return float((gaps.square().mean() / centred[:, :, :, rest].square().mean()).sqrt())


def measure(codec: Codec, level: int, blocks: Blocks, repeats: int) -> Row:
    """Size, error and speed of one level over all blocks."""
    keys, values = blocks
    out = torch.empty_like(keys), torch.empty_like(values)
    encode_s = decode_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        encoded = [codec.encode(k, v, level) for k, v in zip(keys, values, strict=True)]
        encode_s = min(encode_s, time.perf_counter() - start)
        segments = [[b"".join(pieces) for pieces in block] for block in encoded]
        start = time.perf_counter()
        for block, k, v in zip(segments, *out, strict=True):
            for layer, segment in enumerate(block):
                codec.decode(segment, layer, k[layer], v[layer], level)
        decode_s = min(decode_s, time.perf_counter() - start)
    count, error = keys.numel() + values.numel(), [_error(a, b) for a, b in zip(out, blocks, strict=True)]
    return {
        "codec": codec.levels[level],
        "bits": 8 * sum(len(segment) for block in segments for segment in block) / count,
        "key_error": error[0],
        "value_error": error[1],
        "encode_gbs_fp16": 2 * count / encode_s / 1e9,
        "decode_gbs_fp16": 2 * count / decode_s / 1e9,
        "encode_gbs_own": keys.itemsize * count / encode_s / 1e9,
        "decode_gbs_own": keys.itemsize * count / decode_s / 1e9,
    }


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def study(name: str, dtype: str, repeats: int, folder: Path) -> list[Row]:
    """All codecs on one model's KV, printed as it comes."""
    loaded = model_named(name, folder)
    layout = KVLayout(loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 16, loaded.dtype.itemsize)
    cast = getattr(torch, dtype)
    measured = tuple(tensor.to(cast) for tensor in engine_blocks(loaded))
    profiled = tuple(tensor.to(cast) for tensor in sample_blocks(loaded, layout, kernels_for(CPU)))
    blocks, sample = (measured[0], measured[1]), (profiled[0], profiled[1])
    layer_bits, block_bits, scale_bits = int4_entropy(blocks)
    gains = distance(blocks[0]), distance(blocks[1])
    shape = f"{layout.num_layers} layers, {layout.num_kv_heads} x {layout.head_dim}"
    print(f"\n{name} ({shape}, {dtype}, {len(blocks[0])} blocks)")
    print(f"distance / centred rms: keys {gains[0]:.2f}, values {gains[1]:.2f}; int4: scales {scale_bits:.2f} bits")
    print(f"{'':52}   bits  codes  entropy (block)   keys  values    enc    dec GB/s fp16")
    rows = []
    for spec in SPECS:
        sides = [make_codec(spec, layout=layout, sample=lambda: sample)]
        if spec == "int4z":
            sides.insert(0, make_codec(spec, layout=layout))
        for codec in sides:
            for level in range(len(codec.levels)):
                row = {"model": name, "dtype": dtype, **measure(codec, level, blocks, repeats)}
                if spec in ("int4", "int4z"):
                    row |= {
                        "codes_bits": float(str(row["bits"])) - scale_bits,
                        "entropy": layer_bits,
                        "block_entropy": block_bits,
                    }
                rows.append(row | {"key_distance": gains[0], "value_distance": gains[1]})
                show(row)
    return rows


def show(row: Row) -> None:
    """One line."""
    codes = " " * 22
    if "codes_bits" in row:
        codes = f"{row['codes_bits']:6.3f}  {row['entropy']:6.3f} ({row['block_entropy']:5.3f})"
    print(
        f"{row['codec']:52} {row['bits']:6.2f} {codes} {row['key_error']:6.4f}  {row['value_error']:6.4f} "
        f"{row['encode_gbs_fp16']:6.2f} {row['decode_gbs_fp16']:6.2f}"
    )


def main() -> None:
    """Measure and write bench/results/codecs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["builtin:recall", "random:13m", "8x128"])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "codecs.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name in arguments.models
            for dtype in arguments.dtypes
            for row in study(name, dtype, arguments.repeats, Path(folder))
        ]
    write_results(arguments.results, rows, seed=SEED, block_size=16)


if __name__ == "__main__":
    main()
