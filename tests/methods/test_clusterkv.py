"""ClusterKV: clusters and choice against numpy, what every layer reads on a running model, rows laid by cluster."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvwise.core.errors import StrategyError
from kvwise.methods.catalogue import parse
from kvwise.methods.selection.base import IndexShape
from kvwise.methods.selection.clusterkv import ClusterIndex, ClusterKV
from kvwise.methods.selection.kmeans import kmeans, nearest
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.recall_spy import RecallSpy, full_run_kv, require_rows
from tests.methods.selection_reference import DenseReading, ReferenceClusterKV, plain_kmeans

Serve = Callable[..., Any]
Load = Callable[[str], Any]
HEADS, DIM = 2, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- clusters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "iterations"), [(1, 20), (7, 1), (7, 20), (50, 20), (60, 3)])
def test_kmeans_equals_numpy(num: int, iterations: int) -> None:
    keys = random(3, 50, DIM, seed=num)
    centroids, labels = kmeans(keys, num, iterations, seed=4)
    for head in range(3):
        expected, clusters = plain_kmeans(keys[head].double().numpy(), num, iterations, 4)
        np.testing.assert_allclose(centroids[head], expected, atol=1e-5)
        assert [(labels[head] == c).nonzero().flatten().tolist() for c in range(len(clusters))] == clusters


def test_a_cluster_points_one_way_whatever_the_length_of_its_keys() -> None:
    ways = torch.nn.functional.normalize(random(4, DIM), dim=-1)
    of = torch.arange(80) % 4
    keys = (ways[of] + 0.05 * random(80, DIM, seed=1)) * torch.linspace(0.1, 9, 80)[:, None]
    _, labels = kmeans(keys[None], 4, 20, seed=4)
    assert len({(int(a), int(b)) for a, b in zip(of, labels[0], strict=True)}) == 4


def test_a_cluster_that_lost_its_keys_stays() -> None:
    keys = torch.ones(1, 6, 2)
    centroids, labels = kmeans(keys, 3, 20, seed=0)
    assert labels.tolist() == [[0] * 6]
    assert centroids.shape == (1, 3, 2)
    assert torch.isfinite(centroids).all()


def test_many_keys_are_compared_chunk_by_chunk() -> None:
    keys, centroids = random(1, 9000, 4), random(1, 5, 4, seed=1)
    cosines = torch.nn.functional.cosine_similarity(keys[:, :, None], centroids[:, None], dim=-1)
    assert torch.equal(nearest(keys, centroids), cosines.argmax(-1))


# -- the method alone -------------------------------------------------------------------------------------------


def make_index(method: ClusterKV, group: int, keys: Tensor) -> ClusterIndex:
    index = method.index(IndexShape(1, HEADS * group, HEADS, DIM, torch.device("cpu")))
    index.observe(0, 5, torch.empty(0), keys[:3])
    index.build(0, 5, keys)
    return index


METHODS = [
    ClusterKV(budget=0.3, nlist=9),
    ClusterKV(budget=0.9, tokens=40, sink=5),
    ClusterKV(budget=0.1, sink=100, update=6, new_clusters=2),
    ClusterKV(budget=1, update=10, nlist=3),
]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_choice_equals_numpy_also_when_windows_become_clusters(method: ClusterKV, group: int) -> None:
    num_prompt, num_added = 200, 25
    keys = random(num_prompt + num_added, HEADS, DIM)
    index = make_index(method, group, keys[:num_prompt])
    plain = [ReferenceClusterKV(method, keys[:num_prompt, h].double().numpy()) for h in range(HEADS)]
    for i, key in enumerate(keys[num_prompt:]):
        index.add(0, 5, key)
        query = random(HEADS * group, DIM, seed=i)
        found = index.choose(0, 5, query, 0.7, num_prompt + i)
        for h in range(HEADS):
            plain[h].add(key[h].double().numpy())
            expected = plain[h].choose(query.view(HEADS, group, DIM)[h].double().numpy() * 0.7)
            assert found[h].tolist() == expected  # in the same order: a cluster's members stand together
        assert found.shape[1] == method.most(index.rows[5][0].num_indexed) + index.rows[5][0].num_window - 1


def test_how_many_clusters() -> None:
    def num(method: ClusterKV, num_tokens: int) -> int:
        return make_index(method, 1, random(num_tokens, HEADS, DIM)).rows[5][0].centroids.shape[1]

    assert num(ClusterKV(), 1600) == 20  # L / 80
    assert num(ClusterKV(), 200) == num(ClusterKV(new_clusters=8), 639) == 8
    assert num(ClusterKV(nlist=33), 200) == 33
    assert num(ClusterKV(budget=1), 20) == 8
    assert num(ClusterKV(), 3) == 3  # no more than keys


def test_the_order_puts_each_cluster_in_one_run() -> None:
    method = ClusterKV(nlist=6, update=10, new_clusters=3)
    keys = random(111, HEADS, DIM)
    index = make_index(method, 1, keys[:100])
    order = index.order(0, 5, 0)
    held = index.rows[5][0]
    assert order is not None
    assert [sorted(row) for row in order.tolist()] == [list(range(100))] * HEADS
    assert order[:, : held.sink].tolist() == [list(range(held.sink))] * HEADS
    labels = nearest(keys[held.sink : 100].transpose(0, 1), held.centroids)
    for h in range(HEADS):
        in_order = labels[h][order[h, held.sink :] - held.sink]
        assert torch.equal(in_order, in_order.sort().values)
        assert torch.equal(in_order.bincount(minlength=6), held.sizes[h].long())
    for key in keys[100:110]:
        index.add(0, 5, key)
        assert index.order(0, 5, 100) is None
    index.add(0, 5, keys[110])
    more = index.order(0, 5, 100)
    assert more is not None
    assert [sorted(row) for row in more.tolist()] == [list(range(100, 110))] * HEADS
    assert index.order(0, 5, 110) is None


def test_bytes_are_counted_and_forgotten() -> None:
    index = make_index(ClusterKV(nlist=6), 1, random(100, HEADS, DIM))
    assert index.num_bytes == HEADS * (6 * DIM * 4 + 6 * 4 + 90 * 4)
    index.add(0, 5, random(HEADS, DIM))
    assert index.num_bytes == HEADS * (6 * DIM * 4 + 6 * 4 + 90 * 4 + 64 * DIM * 4)
    index.drop(5)
    index.drop(5)
    assert index.num_bytes == 0


def test_the_first_two_layers_are_full_but_never_all() -> None:
    assert [ClusterKV().full_layers(n) for n in (1, 2, 3, 32)] == [0, 1, 2, 2]
    assert [parse("infinigen").selection.full_layers(n) for n in (1, 2, 32)] == [1, 1, 1]  # it guesses from a layer
    assert [parse("topk").selection.full_layers(n) for n in (1, 32)] == [0, 0]


@pytest.mark.parametrize(
    "text", ["tokens=0", "nlist=0", "iterations=0", "update=0", "new_clusters=0", "sink=-1", "keep=-1", "seed=-1"]
)
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(StrategyError, match=f"clusterkv: {text} is out of range"):
        parse(f"clusterkv({text})")


# -- on a running engine ----------------------------------------------------------------------------------------

ARMS = [
    "clusterkv(budget=0.3)",
    "clusterkv(budget=0.5, tokens=14, sink=3, nlist=4, update=4, new_clusters=2, keep=0)",
    "clusterkv(budget=0.2, sink=2, update=3, keep=2)",
]


@pytest.mark.parametrize("settings", [{"max_num_batched_tokens": 11, "max_num_seqs": 4}, {}], ids=["chunked", "whole"])
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("strategy", ARMS)
def test_every_layer_and_head_reads_what_the_card_says(
    serve: Serve, load: Load, monkeypatch: pytest.MonkeyPatch, model: str, strategy: str, settings: dict[str, Any]
) -> None:
    many, forced = prompts(70, 33, 19), prompts(12, 12, 12, seed=5)
    method = parse(strategy).selection
    engine = serve(model, strategy, audit=True, **settings)
    spy = RecallSpy().watch(engine, monkeypatch)
    seen: dict[str, list[Tensor]] = {}
    for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):
        rows = seen.setdefault(f"r{number}", [])
        engine.add_request(
            prompt, greedy(12, forced_tokens=then), request_id=f"r{number}",
            observe=lambda index, step, logits, rows=rows: rows.append(logits.clone()),
        )  # fmt: skip
    outputs = finish(engine)
    num_full = method.full_layers(engine.memory.layout.num_layers)
    for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):
        dense = DenseReading(load(model), lambda keys: ReferenceClusterKV(method, keys), num_full)
        expected, reads = [dense.step(prompt)], iter(spy.of(f"r{number}"))
        for token in then[:-1]:
            expected.append(dense.step([token]))
            for layer, heads in sorted(dense.chosen.items()):
                read = next(reads)
                assert read.layer == layer
                assert [sorted(row) for row in read.tokens.tolist()] == [sorted(row) for row in heads]
        torch.testing.assert_close(torch.stack(seen[f"r{number}"]), torch.stack(expected), atol=2e-4, rtol=1e-4)
        told = outputs[f"r{number}"].attestation
        assert told.tokens_fetched == sum(read.tokens.numel() for read in spy.of(f"r{number}"))
        assert 0 < told.recall_hits <= told.recall_total == told.tokens_fetched
    require_empty(engine)


@pytest.mark.parametrize("strategy", ARMS)
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny"])
def test_rows_on_the_device_are_those_of_their_tokens(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str, strategy: str
) -> None:
    (prompt,) = prompts(75)
    keys, values = full_run_kv(serve, model, prompt)
    engine = serve(model, strategy)
    spy = RecallSpy().watch(engine, monkeypatch)
    (output,) = run(engine, [prompt], greedy(14))
    assert require_rows(spy, output.request_id, keys, values) > 0


def test_on_the_host_a_cluster_is_one_run(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts(75)
    keys, _ = full_run_kv(serve, "llama-tiny", prompt)
    engine = serve("llama-tiny", "clusterkv(nlist=5, sink=3, update=6, new_clusters=2)")
    name = engine.add_request(prompt, greedy(20))
    for _ in range(3):
        engine.step()
    placement, layout = engine.memory.placement, engine.memory.layout
    sequence = sequence_of(engine, name)
    rows = placement._held[sequence].rows
    heads = np.arange(layout.num_kv_heads)[:, None].repeat(75, 1)
    for layer in (2, 3):
        order = placement.index.order(layer, sequence.row, 0)
        places = np.arange(75)[None].repeat(layout.num_kv_heads, 0)
        lying = placement._tiers.host_keys(torch.from_numpy(rows._slots_at(layer, heads, places).ravel()))
        expected = keys[layer].gather(1, order[..., None].expand(-1, -1, keys.shape[-1]))
        assert torch.equal(lying.view(expected.shape), expected)
    while rows.num_ordered(2) == 75:
        engine.step()
    assert rows.num_ordered(2) == rows.num_ordered(3) == 81
    finish(engine)
    require_empty(engine)


def test_only_the_full_layers_stay_on_the_device(serve: Serve) -> None:
    engine = serve("llama-tiny", "clusterkv", blocks=40, max_num_batched_tokens=64, max_num_seqs=2)
    layout = engine.memory.layout
    engine.add_request(prompts(100)[0], greedy(20), request_id="a")
    engine.step()
    assert engine.memory.cache.usage().num_pages_held == 7 * layout.pages_per_block
    engine.step()
    assert sequence_of(engine, "a").settled
    assert engine.memory.cache.usage().num_pages_held == 7 * 2 * layout.num_kv_heads
    engine.step()
    stats, placement = engine.stats(), engine.memory.placement
    # 20 of 100 tokens and the newest are on the device: two pages for each head of the layers that recall.
    assert placement._tiers.staged_bytes >= 2 * 2 * layout.num_kv_heads * layout.page_bytes
    lent = len(placement._tiers.staging.keys) - placement._tiers.staging.num_free
    assert lent == 2 * 2 * layout.num_kv_heads
    held = engine.memory.cache.usage().num_pages_held * layout.page_bytes
    assert stats.kv_bytes["device"] == held + placement.index.num_bytes + placement._tiers.staged_bytes
    finish(engine)
    assert placement.index.num_bytes == placement._tiers.staged_bytes == 0
    require_empty(engine)
