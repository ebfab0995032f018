"""What this machine can do, measured, and what a step of a model cannot take less than."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from kvwise.models.loaded import LoadedModel
from kvwise.models.packed import PackedLinear, can_pack
from machine import ReadBandwidth

MATMUL_SIZE = 1536


@dataclass(frozen=True)
class Ceilings:
    """Read bandwidth in bytes/s and fp32 matmul rate in FLOP/s, both with the run's threads."""

    read: float
    matmul: float


def measure(num_threads: int, repeats: int = 7) -> Ceilings:
    """Reads of a large array, and MKL's or oneDNN's matmul: the best of `repeats`, as tenants only slow it down."""
    bandwidth = ReadBandwidth()
    read = bandwidth.num_bytes / _best(lambda: bandwidth.read(num_threads), repeats)
    a, b = torch.randn(MATMUL_SIZE, MATMUL_SIZE), torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    with torch.inference_mode():
        products: list[Callable[[], object]] = [lambda: torch.mm(a, b)]
        if can_pack():
            blocked = PackedLinear(b, None)
            products.append(lambda: blocked(a))
        matmul = 2 * MATMUL_SIZE**3 / min(_best(product, repeats) for product in products)
    return Ceilings(read, matmul)


def _best(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        call()
        times.append(perf_counter() - begin)
    return min(times)


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and floating-point operations that must be done, at least."""

    bytes: float
    flops: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The slower of the two at the measured ceilings: nothing can be faster than either."""
        return max(self.bytes / ceilings.read, self.flops / ceilings.matmul)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def decode_step(loaded: LoadedModel, batch: int, context: int, kv_element: int = 4) -> Work:
    """One token for each of `batch` sequences of `context` tokens: all weights but the embedding, and all KV."""
    layers, head = _parameters(loaded)
    kv = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * kv_element
    attention = 4 * loaded.num_layers * loaded.num_query_heads * loaded.head_dim
    flops = batch * (2 * (layers + head) + attention * context)
    return Work(4 * (layers + head) + batch * context * kv, flops)


def prefill(loaded: LoadedModel, num_tokens: int, cached: int = 0) -> Work:
    """A prompt's `num_tokens` new tokens behind `cached` ones, with logits of the last token only."""
    layers, head = _parameters(loaded)
    attention = 4 * loaded.num_layers * loaded.num_query_heads * loaded.head_dim
    pairs = num_tokens * cached + num_tokens * (num_tokens + 1) / 2
    return Work(4 * (layers + head), 2 * layers * num_tokens + 2 * head + attention * pairs)


def _parameters(loaded: LoadedModel) -> tuple[int, int]:
    """Weights that multiply every token, and weights of the output head."""
    head = loaded.model.get_output_embeddings().weight.numel()
    embedding = loaded.model.get_input_embeddings().weight.numel()
    return loaded.num_parameters - head - embedding, head
