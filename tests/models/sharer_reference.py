"""KVSharer's search as its released notebook words it: one sentence at a time, dictionaries of layers."""

from typing import Any

import torch
from torch import Tensor


class OneSentence:
    """Full attention over one sentence; layers see the keys and values of the layer that the map names."""

    def __init__(self, reads: dict[int, int]) -> None:
        self.reads = reads
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        if self.reads[layer] == layer:
            self.kv[layer] = keys, values
        keys, values = self.kv[self.reads[layer]]
        group = queries.shape[1] // keys.shape[1]
        logits = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(group, 1)) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        distance = torch.arange(len(keys))[:, None] - torch.arange(len(keys))
        logits = logits.masked_fill((distance < 0) | (distance >= (window or 10**9)), -torch.inf)
        return torch.einsum("hqk,khd->qhd", logits.softmax(-1), values.repeat_interleave(group, 1))


def _last_hidden(loaded: Any, tokens: Tensor, batch: OneSentence) -> Tensor:
    """What goes into the output head."""
    caught: list[Tensor] = []
    head = loaded.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: caught.append(args[0][0].flatten()))
    with torch.inference_mode():
        positions = torch.arange(len(tokens))[None]
        loaded.model(input_ids=tokens[None], position_ids=positions, use_cache=False, batch=batch)
    hook.remove()
    return caught[0]


def _remapped(reads: dict[int, int]) -> dict[int, int]:
    done: dict[int, int] = {}
    for layer, source in reads.items():
        done[layer] = layer if layer == source else done[source]
    return done


def plain_search(loaded: Any, rows: Tensor, share: int, threshold: float) -> dict[int, int]:
    """The map found, layer by layer."""
    num_layers = loaded.num_layers
    alone = {layer: layer for layer in range(num_layers)}
    caches, wanted = [], []
    for row in rows:
        batch = OneSentence(alone)
        wanted.append(_last_hidden(loaded, row, batch))
        caches.append(batch.kv)
    mean = {
        layer: [sum(kv[layer][side] for kv in caches) / len(caches) for side in (0, 1)] for layer in range(num_layers)
    }
    apart = {}
    for i in range(num_layers):
        for j in range(i):
            both = [torch.norm(mean[i][side] - mean[j][side], p=2, dim=-1).mean().item() for side in (0, 1)]
            apart[i, j] = sum(both) / 2
    reads, shared = dict(alone), []
    for later, earlier in sorted(apart, key=lambda pair: apart[pair], reverse=True):
        if later in shared:
            continue
        attempt = _remapped({**reads, later: earlier})
        cosines = [
            torch.cosine_similarity(_last_hidden(loaded, row, OneSentence(attempt)), one, dim=0).item()
            for row, one in zip(rows, wanted, strict=True)
        ]
        if sum(cosines) / len(cosines) > threshold:
            reads = attempt
            shared.append(later)
        if len(shared) >= share:
            break
    return reads
