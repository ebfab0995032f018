"""Shows a selection method's index a sample prompt, so that it can learn about the model before any request."""

import numpy as np
import torch
from torch import Tensor

from kvwise.core.layout import KVLayout
from kvwise.kernels.base import Kernels
from kvwise.methods.selection.base import Index
from kvwise.models.attention import BlockPart, Observer, StepBatch
from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.token_language import TokenLanguage
from kvwise.tiers.arena import Arena

NUM_TOKENS = 512
SAMPLE = (
    "The keeper of the lighthouse wrote down, every evening, what had passed the point that day: two schooners bound "
    "south with timber, a mail packet late by six hours, one fishing boat that turned back before the weather did. He "
    "was not asked to do it. The harbour had its own books and its own clerks, and when a ship was missing nobody "
    "rowed out to the rock to look for it on paper. But the entries went on for thirty-one years, in the same hand, "
    "in ink that he mixed himself, and when the company that owned the light was sold and its lawyers came to count "
    "the lamps and the barrels of oil, they found the shelf of ledgers and asked what they were for. 'They are so "
    "that I know what I saw,' he said. 'A man alone remembers what he likes. Paper remembers what there was.' One of "
    "the lawyers, younger than the rest, took down a volume and read it standing until the boat was called. "
)


class _Calibrator:
    """An observer that hands what it sees to the index."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def observe(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """See the whole sample at once."""
        self._index.calibrate(layer, queries, keys)


def calibrate(loaded: LoadedModel, index: Index, layout: KVLayout, kernels: Kernels) -> None:
    """Prefill a sample of up to 512 tokens on a small arena of its own (the paper samples 2,048 tokens of PG-19)."""
    _prefill_sample(loaded, layout, kernels, _Calibrator(index))


def sample_blocks(loaded: LoadedModel, layout: KVLayout, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Keys and values [n, L, H, block_size, D] of the sample's full blocks, in CPU memory."""
    arena, num_tokens = _prefill_sample(loaded, layout, kernels, None)
    shape = (-1, layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_dim)
    full = num_tokens // layout.block_size
    return arena.keys.view(shape)[:full].cpu(), arena.values.view(shape)[:full].cpu()


def _prefill_sample(
    loaded: LoadedModel, layout: KVLayout, kernels: Kernels, observer: Observer | None
) -> tuple[Arena, int]:
    """An arena that holds the KV of the sample, and its tokens."""
    tokens = sample_tokens(loaded, min(NUM_TOKENS, loaded.max_model_len))
    device = loaded.device
    num_blocks = layout.num_blocks_for(len(tokens))
    arena = Arena(layout, num_blocks, loaded.dtype, device)
    positions = torch.arange(len(tokens), device=device)
    part = BlockPart(
        slice(0, len(tokens)),
        kernels,
        arena,
        torch.tensor([0, len(tokens)], dtype=torch.int32, device=device),
        torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
        torch.tensor([len(tokens)], dtype=torch.int32, device=device),
        positions,
        observer=observer,
    )
    no_logits = torch.empty(0, dtype=torch.int64, device=device)
    forward(loaded, torch.tensor(tokens, device=device), positions, StepBatch([part], layout.layers), no_logits)
    return arena, len(tokens)


def sample_tokens(loaded: LoadedModel, num_tokens: int) -> list[int]:
    """The sample as `num_tokens` tokens: text, or what is read and asked in the language of a model that has its own.

    Where the vocabulary carries neither, ids are drawn with a fixed seed.
    """
    if loaded.speaks_tokens:
        episode = Recall().episode(np.random.default_rng(0), TokenLanguage(loaded.vocab_size), max(64, num_tokens // 2))
        asked = [token for q in episode.questions for token in (*q.prompt, *q.answer)]
        once = [*episode.context, *asked]
        return (once * (num_tokens // len(once) + 1))[:num_tokens]
    if loaded.tokenizer.bos_token_id is None and loaded.vocab_size < 259:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(loaded.vocab_size, (num_tokens,), generator=generator).tolist()
    once = loaded.tokenizer.encode(SAMPLE)
    return (once * (num_tokens // len(once) + 1))[:num_tokens]
