"""What a retention method lets go lies on the host and is read by a selection: nothing is lost, all is counted."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.core.errors import CapacityError
from kvwise.core.output import HeadReport
from kvwise.methods.retention.base import DecodeView, Kept, PromptView
from kvwise.methods.retention.streaming import Streaming
from kvwise.methods.selection.topk import TopKIndex
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.dense_reference import Dense
from tests.methods.recall_spy import RecallSpy

Serve = Callable[..., Any]
Load = Callable[[str], Any]
Sets = list[list[set[int]]]  # positions by layer and head

RETENTION = [
    "h2o(budget=0.2)",
    "streaming(budget=0.3)",
    "snapkv(budget=0.2)",
    "window(budget=0.2)",
    "random(budget=0.2)",
]
MORE_RETENTION = ["h2o(budget=0.2, layers=pyramid)", "refreekv", "vlcache(budget=0.2)", "streaming(window=60)"]
EVERYTHING = [
    "topk(budget=1)",
    "quest(budget=1, page=4)",
    "clusterkv(budget=1, update=5)",
    "infinigen(budget=1, alpha=1000000000.0, ratio=1)",
]
SOME = ["topk(budget=0.3)", "quest(budget=0.4, page=4)", "clusterkv(budget=0.3, update=5, keep=0)", "infinigen(keep=2)"]


def require_all_empty(engine: Any) -> None:
    """Nothing is held on either side."""
    require_empty(engine)
    placement = engine.memory.placement
    placement._host.cache.check()
    assert placement._host.cache.usage().num_sequences == 0
    assert placement._tiers.staging.num_bytes == placement.index.num_bytes == 0


# -- nothing is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"max_num_batched_tokens": 24, "max_num_seqs": 4}, {"max_num_seqs": 3}], ids=["chunked", "whole"]
)
@pytest.mark.parametrize("selection", EVERYTHING)
def test_with_all_of_it_recalled_answers_are_those_of_full(
    serve: Serve, selection: str, settings: dict[str, Any]
) -> None:
    many = prompts(70, 33, 18, 49)
    expected = [o.token_ids for o in run(serve("llama-tiny"), many, greedy(12))]
    for retention in RETENTION + MORE_RETENTION:
        engine = serve("llama-tiny", f"{retention}+{selection}", **settings)
        outputs = run(engine, many, greedy(12))
        assert [o.token_ids for o in outputs] == expected, retention
        told = outputs[0].attestation
        assert told.tokens_dropped == 0
        assert told.tokens_demoted > 0 or retention == "refreekv"
        name = retention.partition("(")[0]
        assert told.did[name] == told.tokens_demoted
        assert (told.bytes_fetched > 0) == (told.tokens_fetched > 0)
        require_all_empty(engine)


@pytest.mark.parametrize("pair", ["h2o(budget=0.2)+topk(budget=1)", "window(budget=0.3)+clusterkv(budget=1, update=7)"])
def test_requests_that_are_preempted_or_share_a_prompt_read_their_own(serve: Serve, pair: str) -> None:
    many = prompts(60, 44, 52, 80)
    expected = [o.token_ids for o in run(serve("llama-tiny"), many, greedy(40))]
    engine = serve("llama-tiny", pair, blocks=14)
    names = [engine.add_request(prompt, greedy(40)) for prompt in many]
    for _ in range(12):
        engine.step()
    engine._scheduler.preempt(sequence_of(engine, names[1]))
    done = finish(engine)
    assert [done[name].token_ids for name in names] == expected
    assert engine.stats().num_preemptions > 0
    require_all_empty(engine)
    engine.add_request(many[0], greedy(20, n=3))
    assert [o.token_ids for o in finish(engine).values()] == [expected[0][:20]] * 3
    require_all_empty(engine)


def test_a_full_host_makes_room_as_a_full_device_does(serve: Serve) -> None:
    many = prompts(60, 60, 60)
    expected = [o.token_ids for o in run(serve("llama-tiny"), many, greedy(60))]
    layout = serve("llama-tiny").memory.layout
    engine = serve("llama-tiny", "window(budget=0.1)+topk(budget=1)", kv_offloading_bytes=14 * layout.block_bytes)
    assert [o.token_ids for o in run(engine, many, greedy(60))] == expected
    assert engine.stats().num_preemptions > 0
    require_all_empty(engine)
    with pytest.raises(CapacityError, match=r"300 tokens of host KV.*holds 224: raise kv_offloading_bytes"):
        engine.add_request(prompts(60)[0], greedy(240))


@pytest.mark.parametrize("strategy", ["topk(budget=1)", "h2o(budget=0.2)+clusterkv(budget=1, update=5)"])
def test_kernels_written_in_torch_do_the_same(serve: Serve, strategy: str) -> None:
    """Their writes are torch's own, which minds whose inference mode a tensor was made in."""
    many = prompts(40, 23)
    expected = [o.token_ids for o in run(serve("llama-tiny"), many, greedy(8))]
    outputs = run(serve("llama-tiny", strategy, kernels="reference"), many, greedy(8))
    assert [(o.error, o.token_ids) for o in outputs] == [(None, tokens) for tokens in expected]


def test_half_precision_and_shared_prefixes(serve: Serve) -> None:
    (first,) = prompts(64)
    many = [first + rest for rest in prompts(9, 30, seed=3)]
    expected = [o.token_ids for o in run(serve("llama-tiny", kv_cache_dtype="bfloat16"), many, greedy(10))]
    engine = serve("llama-tiny", "snapkv(budget=0.2)+quest(budget=1)+prefix", kv_cache_dtype="bfloat16")
    run(engine, [first], greedy(2))
    outputs = run(engine, many, greedy(10))
    assert [o.token_ids for o in outputs] == expected
    assert all(o.attestation.tokens_reused > 0 for o in outputs)


# -- what is read -----------------------------------------------------------------------------------------------


class DenseOver(Dense):
    """Dense attention in which each layer and KV head reads these positions only."""

    def __init__(self, loaded: Any) -> None:
        super().__init__(loaded)
        self.read: Sets | None = None

    def select(self, layer: int, logits: Tensor) -> Tensor:
        if self.read is None:
            return logits
        hidden = torch.ones(len(self.read[layer]), logits.shape[-1], dtype=torch.bool)
        for head, positions in enumerate(self.read[layer]):
            hidden[head, sorted(positions)] = False
        return logits.masked_fill(hidden.repeat_interleave(len(logits) // len(hidden), 0)[:, None], -torch.inf)


def sets(layers: Sequence[Sequence[Sequence[int]]]) -> Sets:
    return [[set(head) for head in layer] for layer in layers]


def union(kept: Sets, recalled: Sets, own: int) -> Sets:
    return [[a | b | {own} for a, b in zip(*layer, strict=True)] for layer in zip(kept, recalled, strict=True)]


def recalled_of(heads: list[list[HeadReport]]) -> list[list[list[int]]]:
    return [[head.recalled for head in layer] for layer in heads]


def steps_of(
    engine: Any, prompt: list[int], forced: list[int], note: Callable[[Any, Any], object] = lambda *_: None
) -> tuple[list[Tensor], list[Sets], list[Sets]]:
    """Logits behind the prompt and each forced token, and what each of those steps found on the device and fetched."""
    seen: list[Tensor] = []
    name = engine.add_request(
        prompt, greedy(len(forced), forced_tokens=forced, explain=True),
        observe=lambda index, step, logits: seen.append(logits.clone()),
    )  # fmt: skip
    kept: list[Sets] = []
    recalled: list[Sets] = []
    while engine.has_unfinished():
        sequence = sequence_of(engine, name)
        settled, placement = sequence.settled, engine.memory.placement
        if settled:
            kept.append(sets(placement.kept_positions(sequence)))
            require_a_place_for_each(placement, sequence)
            note(placement, sequence)
        outputs = engine.step()
        if settled:
            heads = placement.explain(sequence) if sequence.settled else outputs[0].attestation.heads
            assert all(head.recalled == sorted(set(head.recalled)) for layer in heads for head in layer)
            recalled.append(sets(recalled_of(heads)))
    return seen, kept, recalled


def require_a_place_for_each(placement: Any, sequence: Any) -> None:
    """Every token is in the pages or among those that have left, in every layer and head, and in one place only."""
    demoted = placement._demoted(sequence)
    for layer, heads in enumerate(placement.kept_positions(sequence)):
        for head, kept in enumerate(heads):
            gone = demoted.positions(layer)[head].tolist()
            assert sorted(kept + gone) == list(range(sequence.num_computed))


@pytest.mark.parametrize(
    ("retention", "selection"), [*zip(RETENTION, [*SOME, SOME[0]], strict=True), ("refreekv", SOME[1])]
)
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny", "3m"])
def test_attention_is_one_softmax_over_what_stays_and_what_is_recalled(
    serve: Serve, load: Load, model: str, retention: str, selection: str
) -> None:
    (prompt,), (forced,) = prompts(70), prompts(12, seed=5)
    engine = serve(model, f"{retention}+{selection}", max_num_batched_tokens=33, max_num_seqs=2)
    seen, kept, recalled = steps_of(engine, prompt, forced)
    dense = DenseOver(load(model))
    expected = [dense.step(prompt)]
    for i, token in enumerate(forced[:-1]):
        for mine, others in zip(kept[i], recalled[i], strict=True):
            assert all(not a & b for a, b in zip(mine, others, strict=True))
        dense.read = union(kept[i], recalled[i], 70 + i)
        expected.append(dense.step([token]))
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=3e-4, rtol=1e-4)
    require_all_empty(engine)


def test_h2o_lets_go_by_the_attention_that_is_shared_with_what_is_recalled(serve: Serve, load: Load) -> None:
    (prompt,), (forced,) = prompts(70), prompts(16, seed=5)
    views: list[DecodeView] = []
    engine = serve("3m", "h2o(budget=0.2)+topk(budget=0.5)")
    _, kept, recalled = steps_of(engine, prompt, forced, lambda p, s: views.append(p._pages._evictor._view([s])))
    dense = DenseOver(load("3m"))
    dense.step(prompt)
    mass = [dense.weights[layer].unflatten(0, (2, -1)).sum((1, 2)) for layer in range(6)]  # [H, T]
    for i, token in enumerate(forced[:-2]):
        now = 70 + i
        dense.read = union(kept[i], recalled[i], now)
        dense.step([token])
        for layer, head in product(range(6), range(2)):
            if not head:
                received = dense.weights[layer].unflatten(0, (2, -1)).sum((1, 2))
                mass[layer] = torch.nn.functional.pad(mass[layer], (0, 1)) + received
            (gone,) = (kept[i][layer][head] | {now}) - kept[i + 1][layer][head]
            others = [p for p in kept[i + 1][layer][head] if p <= now - 7]  # the seven latest stay in any case
            view, score = views[i + 1], mass[layer][head].tolist()
            used, at = view.used[0, layer, head], view.positions[0, layer, head]
            assert view.mass is not None
            torch.testing.assert_close(
                view.mass[0, layer, head][used], mass[layer][head][at[used].long()], atol=1e-4, rtol=1e-4
            )
            assert gone <= now - 7
            assert score[gone] <= min(score[p] for p in others) * (1 + 1e-4)


@pytest.mark.parametrize("retention", ["streaming(budget=0.3)", "window(budget=0.2)", "random(budget=0.2)"])
def test_methods_that_go_by_positions_keep_what_they_keep_alone(serve: Serve, retention: str) -> None:
    (prompt,), (forced,) = prompts(70), prompts(12, seed=5)
    engine = serve("3m", f"{retention}+quest")
    _, together, recalled = steps_of(engine, prompt, forced)
    alone = serve("3m", retention)
    name = alone.add_request(prompt, greedy(12, forced_tokens=forced))
    alone.step()
    for kept in together:
        assert sets(alone.memory.placement.kept_positions(sequence_of(alone, name))) == kept
        alone.step()
    for layer, head in product(range(2), range(2)):  # read in full: all that has left
        for i, kept in enumerate(together):
            assert recalled[i][layer][head] == set(range(70 + i)) - kept[layer][head]


def test_the_audit_knows_what_should_have_been_fetched(serve: Serve) -> None:
    engine = serve("gpt2-tiny", "window(budget=0.2)+topk(budget=0.2)", audit=True)  # a query head for each KV head
    (output,) = run(engine, prompts(70), greedy(10))
    told = output.attestation
    assert told.recall_hits == told.recall_total == told.tokens_fetched > 0
    assert told.fetch_candidates == sum(56 + i for i in range(9)) * engine.memory.layout.pages_per_block
    assert told.tokens_fetched == sum(int(0.2 * (56 + i)) for i in range(9)) * engine.memory.layout.pages_per_block


@pytest.mark.parametrize("strategy", ["topk(budget=0.2)", "quest(budget=0.3, page=4)", "infinigen"])
def test_recall_alone_explains_what_its_last_step_read(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    engine = serve("3m", strategy)
    spy = RecallSpy().watch(engine, monkeypatch)
    (output,) = run(engine, prompts(50), greedy(6, explain=True))
    heads = output.attestation.heads
    assert heads is not None
    num_full = engine.memory.placement._num_full_layers
    last = {read.layer: read.tokens.tolist() for read in spy.of(output.request_id)}
    assert sorted(last) == list(range(num_full, len(heads)))
    for layer, found in enumerate(heads):
        assert [head.recalled for head in found] == [sorted(tokens) for tokens in last.get(layer, [[]] * len(found))]
        assert [head.kept for head in found] == [list(range(55)) if layer < num_full else []] * len(found)


# -- bytes ------------------------------------------------------------------------------------------------------


def test_bytes_on_both_sides_are_those_computed_by_hand(serve: Serve) -> None:
    engine = serve("llama-tiny", "streaming(budget=0.3)+topk(budget=0.2, keep=0)", blocks=60)
    layout, placement = engine.memory.layout, engine.memory.placement
    name = engine.add_request(prompts(70)[0], greedy(40))
    engine.step()
    sequence = sequence_of(engine, name)
    pages = 2 * layout.pages_per_block  # 21 tokens and the next one: two pages a head
    assert sequence.attestation.bytes_freed == 5 * layout.block_bytes - pages * layout.page_bytes
    for step in range(30):
        gone = 49 + step
        assert sequence.num_computed == 70 + step
        usage = engine.memory.cache.usage()
        assert usage.num_pages_used == pages
        stats = engine.stats()
        # The block for a victim is there before the victim leaves.
        assert stats.kv_bytes["host"] == -(-gone // 16) * layout.block_bytes
        held = placement.index.rows[sequence.row]
        assert placement.index.num_bytes == sum(keys.stored.nbytes for keys in held.values())
        assert {keys.num_tokens for keys in held.values()} == {gone}
        assert stats.kv_bytes["device"] == pages * layout.page_bytes + placement.index.num_bytes + (
            placement._tiers.staged_bytes
        )
        engine.memory.cache.check()
        placement._host.cache.check()
        engine.step()
    told = sequence.attestation
    assert told.tokens_demoted == 79 * layout.pages_per_block
    assert placement._tiers._store_link.num_bytes == told.tokens_demoted * placement._tiers.row_bytes
    assert (
        told.bytes_fetched == told.tokens_fetched * placement._tiers.row_bytes == placement._tiers._fetch_link.num_bytes
    )
    finish(engine)
    require_all_empty(engine)


def test_staging_pages_are_lent_layer_by_layer(serve: Serve) -> None:
    """With nothing kept, one layer's rows at a time; with rows kept, every layer's, until the request ends."""
    for keep in (0, 1):
        engine = serve("3m", f"window(budget=0.2)+topk(budget=0.4, keep={keep})", blocks=60)
        layout, staging = engine.memory.layout, engine.memory.placement._tiers.staging
        engine.add_request(prompts(100)[0], greedy(5))
        engine.step()
        engine.step()
        each = layout.num_kv_heads * layout.num_blocks_for(int(0.4 * 80) + 1)
        assert len(staging.keys) - staging.num_free == keep * layout.num_layers * each
        assert len(staging.keys) <= (layout.num_layers if keep else 1) * each * (1 + keep)
        finish(engine)
        require_all_empty(engine)


def test_methods_that_keep_the_output_demote_the_prompt_only(serve: Serve) -> None:
    engine = serve("llama-tiny", "snapkv(budget=0.3)+topk")
    layout = engine.memory.layout
    (output,) = run(engine, prompts(70), greedy(40))
    assert output.attestation.tokens_demoted == 49 * layout.pages_per_block
    assert output.attestation.fetch_candidates == 39 * 49 * layout.pages_per_block


# -- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["build", "add", "choose"])
def test_an_index_that_fails_ends_its_request_only(serve: Serve, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    many = prompts(40, 50)
    expected = run(serve("llama-tiny", "window+topk"), many, greedy(8))
    true, rows = getattr(TopKIndex, method), []

    def fail(self: TopKIndex, layer: int, row: int, *rest: Any) -> Any:
        rows.append(row)
        if row == rows[0]:
            raise RuntimeError("the index is lost")
        return true(self, layer, row, *rest)

    monkeypatch.setattr(TopKIndex, method, fail)
    engine = serve("llama-tiny", "window+topk")
    outputs = run(engine, many, greedy(8))
    assert sum(o.error == "RuntimeError: the index is lost" for o in outputs) == 1
    assert all(mine.error or mine.token_ids == one.token_ids for mine, one in zip(outputs, expected, strict=True))
    require_all_empty(engine)


def test_heads_that_lose_unequally_are_refused_whatever_the_method_said(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Streaming.keep

    def ragged(self: Streaming, view: PromptView) -> Kept:
        kept = keep(self, view)
        mask = kept.mask.clone()
        mask[1, 0, 0] = False
        return replace(kept, mask=mask)

    monkeypatch.setattr(Streaming, "keep", ragged)
    engine = serve("llama-tiny", "streaming+topk")
    (output,) = run(engine, prompts(40), greedy(3))
    assert output.error == (
        "ValueError: different numbers of tokens leave the heads of layer 1: no selection can bring them back"
    )
    require_all_empty(engine)


def test_a_copy_to_the_host_that_fails_ends_the_requests_in_it(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    many = prompts(40, 50)
    expected = run(serve("llama-tiny", "window+topk"), many, greedy(8))
    engine = serve("llama-tiny", "window+topk")
    tiers = engine.memory.placement._tiers
    scatter = tiers.host_kernels.scatter

    def fail(*args: Any) -> None:
        raise OSError("the host's memory is gone")

    with monkeypatch.context() as patch:
        patch.setattr(tiers.host_kernels, "scatter", fail)
        lost = run(engine, many, greedy(8))
    assert [o.error for o in lost] == ["OSError: the host's memory is gone"] * 2
    require_all_empty(engine)
    monkeypatch.setattr(tiers.host_kernels, "scatter", scatter)
    assert [o.token_ids for o in run(engine, many, greedy(8))] == [o.token_ids for o in expected]
    require_all_empty(engine)
