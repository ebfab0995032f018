"""KVSharer: layers that read an earlier one's KV store nothing, and all else goes on as before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import StrategyError
from kvwise.methods.catalogue import parse
from kvwise.methods.encoding.base import EncodingShape
from kvwise.methods.encoding.kvsharer import KVSharer, sharing
from kvwise.models.hook import forward
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.dense_reference import Dense

Serve = Callable[..., Any]
Load = Callable[[str], Any]

MAP, READS = "1:0-3:2", [0, 0, 2, 2]
LENGTHS = (1, 15, 33, 70)
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 4}
UNCHUNKED = {"enable_chunked_prefill": False}
BOTH = pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])


class Shared(Dense):
    """Full matrices, where a layer may see the keys and values of another."""

    reads = READS

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, **more: Any) -> Tensor:
        source = self.reads[layer]
        if source == layer:
            return super().attend(layer, queries, keys, values, **more)
        # The source has its new tokens already: its KV without them, then those once more.
        held = self._kv[source]
        self._kv[source] = held[0][: -len(queries)], held[1][: -len(queries)]
        new_keys, new_values = held[0][-len(queries) :], held[1][-len(queries) :]
        return super().attend(source, queries, new_keys, new_values, **more)


# -- the option -------------------------------------------------------------------------------------------------


def shape_of(num_layers: int) -> EncodingShape:
    return EncodingShape(num_layers, 2, 16, torch.float32, 16, "a model", None)


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("3:1-5:2", [0, 1, 2, 1, 4, 2]),
        ("5:2-3:1", [0, 1, 2, 1, 4, 2]),
        ("5:3-3:1", [0, 1, 2, 1, 4, 1]),  # a chain
        ("1:0-2:1-3:2-4:3-5:4", [0, 0, 0, 0, 0, 0]),
    ],
)
def test_a_map_is_what_it_says_with_its_chains_followed(text: str, reads: list[int]) -> None:
    assert list(KVSharer(text).layer_map(shape_of(6))) == reads
    assert list(sharing(reads).layer_map(shape_of(6))) == reads


def test_a_map_prints_and_parses_back() -> None:
    strategy = parse("h2o(budget=0.5)+kvsharer(map=3:1-5:2)")
    assert str(strategy.encoding) == "kvsharer(map=3:1-5:2)"
    assert parse(str(strategy)) == strategy
    assert str(sharing([0, 1, 2])) == "kvsharer(map=all)"


@pytest.mark.parametrize(
    "text", ["3", "3:", "a:b", "3:1-", "-3:1", "3:1;5:2", "1:3", "2:2", "3:1-3:2", "rubbish", "1.5"]
)
def test_what_is_no_map_is_refused(text: str) -> None:
    with pytest.raises(StrategyError, match="map"):
        parse(f"kvsharer(map={text})")


def test_a_map_of_a_deeper_model_is_refused_with_the_way_out(serve: Serve) -> None:
    with pytest.raises(StrategyError, match="has layers 0 to 3 and no layer 5; calibrate a map for it with kvwise"):
        serve("llama-tiny", "kvsharer(map=3:1-5:2)")


def test_no_map_is_refused_with_the_way_out(serve: Serve) -> None:
    with pytest.raises(StrategyError, match="kvsharer needs a map of layers: find one with kvwise calibrate kvsharer"):
        serve("llama-tiny", "kvsharer")


# -- running ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("line", ["kvsharer(map=all)", "kvsharer(map=all)+prefix"])
def test_the_identity_is_full_to_the_token(serve: Serve, line: str, settings: dict[str, Any]) -> None:
    many = prompts(*LENGTHS)
    found = [o.token_ids for o in run(serve("llama-tiny", line, **settings), many, greedy(12))]
    assert found == [o.token_ids for o in run(serve("llama-tiny", "full"), many, greedy(12))]


@BOTH
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "mistral-tiny", "gemma2-tiny"])
def test_logits_equal_a_dense_computation_with_the_map(
    serve: Serve, load: Load, model: str, settings: dict[str, Any]
) -> None:
    """In a ragged batch, the prompt and every forced token of the output."""
    many, forced = prompts(*LENGTHS), prompts(*[10] * len(LENGTHS), seed=9)
    engine, seen = serve(model, f"kvsharer(map={MAP})", **settings), {}
    for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):

        def note(index: int, step: int, logits: Tensor, number: int = number) -> None:
            seen[number, step] = logits.clone()

        engine.add_request(prompt, greedy(10, forced_tokens=then), observe=note)
    finish(engine)
    require_empty(engine)
    for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):
        dense = Shared(load(model))
        for step in range(10):
            torch.testing.assert_close(
                seen[number, step], dense.step(prompt if step == 0 else [then[step - 1]]), rtol=1e-3, atol=1e-3
            )


def test_decoding_equals_prefill(load: Load) -> None:
    """The reference itself: logits of all rows at once are those of token by token."""
    loaded, tokens = load("llama-tiny"), prompts(30)[0]
    at_once = forward(loaded, torch.tensor(tokens), torch.arange(30), Shared(loaded), torch.arange(30))
    dense = Shared(loaded)
    one_by_one = torch.stack([dense.step([token]) for token in tokens])
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-4, atol=1e-4)
    alone = forward(loaded, torch.tensor(tokens), torch.arange(30), Dense(loaded), torch.arange(30))
    assert not torch.allclose(at_once, alone, atol=0.1)


def test_shared_layers_take_no_memory(serve: Serve) -> None:
    """The same bytes hold twice the tokens when half the layers store."""
    alone, shared = serve("llama-tiny", "full", blocks=8), serve("llama-tiny", f"kvsharer(map={MAP})", blocks=8)
    assert (alone.memory.arena.num_blocks, shared.memory.arena.num_blocks) == (8, 16)
    assert shared.memory.arena.num_bytes == alone.memory.arena.num_bytes
    assert shared.memory.layout.num_layers == 2
    shared.add_request(prompts(15 * 16)[0], greedy(8))
    finish(shared)
    require_empty(shared)


def test_prefixes_are_shared_under_one_map_only(serve: Serve, load: Load) -> None:
    prompt, engine = prompts(100)[0], serve("llama-tiny", f"kvsharer(map={MAP})+prefix")
    first, second = run(engine, [prompt], greedy(8))[0], run(engine, [prompt], greedy(8))[0]
    assert second.token_ids == first.token_ids
    assert second.metrics.num_cached_tokens == 96
    roots = {
        line: serve("llama-tiny", f"{line}+prefix").memory.cache.keys(torch.tensor(prompt).numpy()).chain[0]
        for line in ("full", "kvsharer(map=all)", f"kvsharer(map={MAP})", "kvsharer(map=1:0-2:0)")
    }
    assert roots["full"] == roots["kvsharer(map=all)"]
    assert len(set(roots.values())) == 3


@pytest.mark.parametrize("method", ["h2o(budget=0.4)", "snapkv(budget=0.4, observed=8)", "streaming(budget=0.4)"])
def test_retention_ranks_by_the_layers_that_store(serve: Serve, load: Load, method: str) -> None:
    """What is kept is told for the stored layers alone, each head within the budget, and requests end."""
    engine = serve("llama-tiny", f"{method}+kvsharer(map={MAP})", **CHUNKED)
    names = [engine.add_request(prompt, greedy(12)) for prompt in prompts(40, 64)]
    seen = 0
    while engine.has_unfinished():
        engine.step()
        for name in names:
            if name in engine._requests and (sequence := sequence_of(engine, name)).settled:
                kept = engine.memory.placement.kept_positions(sequence)
                assert len(kept) == 2
                assert all(len(head) < sequence.num_computed for layer in kept for head in layer)
                seen += 1
    assert seen > 10
    require_empty(engine)


def test_only_the_sources_own_scores_count(serve: Serve, load: Load) -> None:
    """H2O's mass of a stored layer is what its own rows gave, not those of the layer that reads along."""
    engine = serve("llama-tiny", f"h2o(budget=0.5)+kvsharer(map={MAP})", **UNCHUNKED)
    prompt, masses = prompts(40)[0], []
    settle = engine.memory.placement.settle

    def look(sequence: Any) -> bool:
        blocks = engine.memory.cache.tables[sequence.row, :3]
        masses.append(engine.memory.arena.by_block("mass")[blocks].transpose(0, 1).flatten(1)[:, :40].clone())
        return bool(settle(sequence))

    engine.memory.placement.settle = look
    engine.add_request(prompt, greedy(2))
    finish(engine)
    dense = ByLayer(load("llama-tiny"))
    dense.step(prompt)
    for place, layer in enumerate((0, 2)):
        wanted = dense.masses[layer].sum(1)  # [Hq, T]
        wanted = wanted.unflatten(0, (2, -1)).sum(1)
        torch.testing.assert_close(masses[0].view(2, 2, 40)[place], wanted, rtol=1e-4, atol=1e-4)


class ByLayer(Shared):
    """Keeps the probabilities of every layer of the model, which `weights` has by the layer that is read."""

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded)
        self.masses: dict[int, Tensor] = {}

    def attend(self, layer: int, *args: Any, **more: Any) -> Tensor:
        out = super().attend(layer, *args, **more)
        self.masses[layer] = self.weights[self.reads[layer]]
        return out


@pytest.mark.parametrize("loading", ["load", "layerwise", "cake"])
def test_tiers_hold_the_stored_layers(serve: Serve, loading: str) -> None:
    """What was demoted comes back, and answers are those of a pool that had room."""
    many = prompts(64, 64, 64)
    line = f"kvsharer(map={MAP})+prefix"
    wanted = [o.token_ids for o in run(serve("llama-tiny", line), many, greedy(6))]
    engine = serve("llama-tiny", f"{line}+{loading}", blocks=5, tiers=("host(size=4MiB)",), max_num_seqs=1)
    assert [o.token_ids for o in run(engine, many, greedy(6))] == wanted
    again = run(engine, many, greedy(6))
    assert [o.token_ids for o in again] == wanted
    assert any(o.metrics.load is not None for o in again)
    require_empty(engine)
