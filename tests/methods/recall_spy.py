"""Sees what a running engine's layers read of the KV on the host, as it lies on the device when they read it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.engine.engine import Engine
from kvwise.engine.placement.recall_fetch import Fetch
from kvwise.engine.placement.recall_part import RecallPart
from tests.engine.runs import greedy, sequence_of
from tests.methods.dense_reference import Dense

Serve = Callable[..., Any]


@dataclass
class Read:
    """What one request read in one layer of one step: tokens named int64 [H, n], and KV rows [H, n, D] by slot."""

    name: str
    layer: int
    tokens: Tensor
    in_slots: Tensor  # int64 [H, n]: which of the tokens each slot is said to hold
    keys: Tensor
    values: Tensor


@dataclass
class RecallSpy:
    """All reads of an engine, and the KV of every token it decoded."""

    reads: list[Read] = field(default_factory=list)
    new: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # request, layer -> [H, D]

    def watch(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> "RecallSpy":
        tiers = engine.memory.placement._tiers
        segment, store = Fetch.segment, RecallPart._store_new

        def note_read(fetch: Fetch, *args: Any) -> Any:
            for one, chosen, staged in zip(fetch.asked, fetch.chosen, fetch.staged, strict=True):
                size = tiers.layout.block_size
                slot = np.arange(staged.num_read)
                slots = torch.from_numpy(staged.pages[:, slot // size] * size + slot % size)
                rows = [arena.flatten(0, 1)[slots].clone() for arena in (tiers.staging.keys, tiers.staging.values)]
                said = one.rows._shelves[fetch.layer]._rows[:, : staged.num_read]
                self.reads.append(
                    Read(
                        one.sequence.request_id, fetch.layer, torch.from_numpy(chosen), torch.from_numpy(said.copy()),
                        *rows,
                    )
                )  # fmt: skip
            return segment(fetch, *args)

        def note_new(part: RecallPart, layer: int, keys: Tensor, values: Tensor) -> None:
            for i, one in enumerate(part._asked):
                pair = keys[i].clone(), values[i].clone()
                self.new.setdefault((one.sequence.request_id, layer), []).append(pair)
            store(part, layer, keys, values)

        monkeypatch.setattr(RecallPart, "_store_new", note_new)
        monkeypatch.setattr(Fetch, "segment", note_read)
        return self

    def of(self, name: str) -> list[Read]:
        """The reads of one request, step by step and layer by layer."""
        return [read for read in self.reads if read.name == name]


def require_rows(spy: RecallSpy, name: str, keys: Tensor, values: Tensor) -> int:
    """Every slot held its token's KV; prompt K and V [L, H, T, D]. Returns how many rows were of decoded tokens."""
    num_prompt, num_new = keys.shape[2], 0
    for read in spy.of(name):
        assert [set(row) for row in read.in_slots.tolist()] == [set(row) for row in read.tokens.tolist()]
        for head, tokens in enumerate(read.in_slots.tolist()):
            for slot, token in enumerate(tokens):
                if token < num_prompt:
                    true = keys[read.layer, head, token], values[read.layer, head, token]
                else:
                    true = tuple(rows[head] for rows in spy.new[name, read.layer][token - num_prompt])
                    num_new += 1
                assert torch.equal(read.keys[head, slot], true[0])
                assert torch.equal(read.values[head, slot], true[1])
    return num_new


def full_run_kv(serve: Serve, model: str, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """K and V [L, H, T, D] of a prompt, from an engine that keeps everything."""
    engine = serve(model, "full")
    name = engine.add_request(prompt, greedy(2))
    engine.step()
    layout, row = engine.memory.layout, sequence_of(engine, name).row
    tokens = torch.arange(len(prompt))
    blocks = torch.from_numpy(engine.memory.cache.tables[row].astype(np.int64))[tokens // 16]
    pages = blocks[None, :] * layout.pages_per_block + torch.arange(layout.pages_per_block)[:, None]
    found = [
        arena[pages, tokens % 16].view(layout.num_layers, layout.num_kv_heads, len(prompt), -1).clone()
        for arena in (engine.memory.arena.keys, engine.memory.arena.values)
    ]
    return found[0], found[1]


class DenseOverChosen(Dense):
    """Dense attention in which a layer reads only the tokens that were fetched for it (int64 [H, n]) and the newest."""

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded)
        self.chosen: dict[int, Tensor] = {}

    def select(self, layer: int, logits: Tensor) -> Tensor:
        if layer not in self.chosen:
            return logits
        chosen = self.chosen[layer].repeat_interleave(len(logits) // len(self.chosen[layer]), 0)
        hidden = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen[:, None], False)
        hidden[..., -1] = False
        return logits.masked_fill(hidden, -torch.inf)
