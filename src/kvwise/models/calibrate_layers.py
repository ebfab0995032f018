"""Which layers may share KV: KVSharer's search over a loaded model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout, LayerMap
from kvwise.kernels import kernels_for
from kvwise.models.attention import BlockPart, StepBatch
from kvwise.models.hook import forward_model
from kvwise.models.loaded import LoadedModel
from kvwise.tasks.language import Language
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.token_language import TokenLanguage
from kvwise.tiers.arena import Arena

NUM_ROWS, ROW_TOKENS = 30, 64  # as in the paper
CONTEXT = 256  # tokens of the texts whose beginnings are taken: a shorter one may hold no fact


@dataclass(frozen=True, slots=True)
class Trial:
    """A pair that was tried: `similarity` is the cosine of the last hidden states with and without this sharing."""

    reader: int
    source: int
    distance: float
    similarity: float
    accepted: bool


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """The map that was found, and the trials that led to it, in their order."""

    layers: LayerMap
    trials: tuple[Trial, ...]


def calibrate_layers(
    loaded: LoadedModel, rows: Tensor, *, share: int, threshold: float, tell: Callable[[Trial], object] | None = None
) -> LayerCalibration:
    """Let up to `share` layers read an earlier one's KV: KVSharer, arXiv 2410.18517 section 3.

    `rows` int64 [N, T] are the sample. Pairs of layers whose KV, averaged over the rows, lies farthest apart
    (Euclidean) are tried first; a pair stays if the model's last hidden states keep a cosine above `threshold` with
    those of the model that shares nothing, averaged over the rows. A layer that is read and comes to read another
    itself takes its readers along. Distances are taken head by head and token by token, as in the released code.
    """
    most = loaded.num_layers - 1
    if not 1 <= share <= most:
        raise UsageError(f"share={share} layers cannot read another's KV: {loaded.name} has {most} after its first")
    if not -1 <= threshold < 1:
        raise UsageError(f"threshold={threshold} is no cosine to exceed: it must be at least -1 and below 1")
    alone = LayerMap.one_to_one(loaded.num_layers)
    wanted, arena = _run(loaded, rows, alone)
    distances = _distances(arena, rows.shape[0])
    del arena
    layers, trials, num_shared = alone, [], 0
    for reader, source in _farthest_first(distances):
        if not layers.stores(reader):
            continue
        attempt = _joined(layers, reader, source)
        hidden = _run(loaded, rows, attempt)[0]
        similarity = float(cosine_similarity(wanted, hidden, dim=-1).mean())
        trials.append(Trial(reader, source, float(distances[reader, source]), similarity, similarity > threshold))
        if tell is not None:
            tell(trials[-1])
        if trials[-1].accepted:
            layers, num_shared = attempt, num_shared + 1
        if num_shared == share:
            break
    return LayerCalibration(layers, tuple(trials))


def sample_rows(loaded: LoadedModel) -> Tensor:
    """30 rows of 64 tokens, int64: beginnings of contexts full of facts, in the model's own language or in English.

    Where the vocabulary carries neither, ids are drawn with a fixed seed.
    """
    num_tokens = min(ROW_TOKENS, loaded.max_model_len)
    if loaded.tokenizer.bos_token_id is None and not loaded.speaks_tokens and loaded.vocab_size < 259:
        drawn = torch.randint(loaded.vocab_size, (NUM_ROWS, num_tokens), generator=torch.Generator().manual_seed(0))
    else:
        language = _language(loaded)
        told = [Recall().episode(np.random.default_rng(seed), language, CONTEXT) for seed in range(NUM_ROWS)]
        drawn = torch.tensor([list(episode.context[:num_tokens]) for episode in told])
    return drawn.to(loaded.device)


def rows_of_text(loaded: LoadedModel, lines: list[str]) -> Tensor:
    """Up to 30 rows int64 [N, 64]: the beginnings of the lines that are long enough."""
    num_tokens = min(ROW_TOKENS, loaded.max_model_len)
    encoded = (loaded.tokenizer.encode(line) for line in lines if line.strip())
    rows = [tokens[:num_tokens] for tokens in encoded if len(tokens) >= num_tokens][:NUM_ROWS]
    if not rows:
        raise UsageError(f"none of {len(lines)} lines of text has the {num_tokens} tokens that a sample needs")
    return torch.tensor(rows, device=loaded.device)


def _language(loaded: LoadedModel) -> Language:
    if loaded.speaks_tokens:
        return TokenLanguage(loaded.vocab_size)
    tokenizer = loaded.tokenizer
    begin = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    return TextLanguage(lambda text: tokenizer.encode(text, add_special=False), tokenizer.decode, begin)


def _run(loaded: LoadedModel, rows: Tensor, layers: LayerMap) -> tuple[Tensor, Arena]:
    """Last hidden states float32 [N, T * hidden] under a map, and the KV: a block of the arena to a row."""
    num_rows, num_tokens = rows.shape
    layout = KVLayout(
        len(layers.stored), loaded.num_kv_heads, loaded.head_dim, num_tokens, loaded.dtype.itemsize, layers
    )
    arena = Arena(layout, num_rows, loaded.dtype, loaded.device)
    ends = torch.arange(num_rows + 1, dtype=torch.int32, device=loaded.device)
    part = BlockPart(
        slice(0, rows.numel()),
        kernels_for(loaded.device),
        arena,
        ends * num_tokens,
        ends[:-1, None].contiguous(),
        torch.full_like(ends[:-1], num_tokens),
        torch.arange(rows.numel(), device=loaded.device),
    )
    positions = torch.arange(num_tokens, device=loaded.device).repeat(num_rows)
    with _caught(loaded) as hidden:
        forward_model(loaded.model, rows.flatten(), positions, StepBatch([part], layers))
    return hidden[0].float().view(num_rows, -1), arena


@contextmanager
def _caught(loaded: LoadedModel) -> Iterator[list[Tensor]]:
    """What goes into the output head [T, hidden]; the head itself is given one row, as nobody asks it."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        caught.append(args[0][0])
        return (args[0][:, :1],)

    head: Any = loaded.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    hook = head.register_forward_pre_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()


def _distances(arena: Arena, num_rows: int) -> Tensor:
    """float32 [L, L]: the mean distance of two layers' keys and values, each averaged over the rows."""
    layout = arena.layout
    total = torch.zeros(layout.num_layers, layout.num_layers)
    for pages in (arena.keys, arena.values):
        shape = (num_rows, layout.num_layers, -1, layout.head_dim)
        mean = pages.view(shape).float().mean(0)  # [L, H * T, D]
        for layer in range(layout.num_layers):
            total[layer] += (mean - mean[layer]).norm(dim=-1).mean(-1).cpu() / 2
    return total


def _farthest_first(distances: Tensor) -> Iterator[tuple[int, int]]:
    """Pairs (reader, source), source < reader, by falling distance; of equals the lower layers first."""
    num_layers = len(distances)
    pairs = [(reader, source) for reader in range(num_layers) for source in range(reader)]
    return iter(sorted(pairs, key=lambda pair: -float(distances[pair])))


def _joined(layers: LayerMap, reader: int, source: int) -> LayerMap:
    """The map in which `reader`, and whoever reads it, reads what `source` reads."""
    target = layers.reads[source]
    return LayerMap(tuple(target if read == reader else read for read in layers.reads))
