"""Rows kept on the device are not fetched again: counted by an independent simulator, at the link, and in memory."""

from collections.abc import Callable
from typing import Any

import pytest

from kvwise.engine.placement.recall_tiers import RecallTiers
from kvwise.methods.selection.clusterkv import ClusterIndex
from kvwise.methods.selection.topk import TopKIndex
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.recall_spy import RecallSpy

Serve = Callable[..., Any]

STRATEGIES = [
    "topk(budget=0.2, keep={keep})",
    "infinigen(budget=0.3, keep={keep})",
    "clusterkv(budget=0.3, update=5, keep={keep})",
    "quest(budget=0.4, page=4, keep={keep})",
]


def simulated_hits(spy: RecallSpy, name: str, num_prompt: int, keep: int) -> int:
    """Of what a request read, what one of its last `keep` steps had read in the same layer and head, or made."""
    past: dict[int, list[list[set[int]]]] = {}
    hits = 0
    for read in spy.of(name):
        steps = past.setdefault(read.layer, [])
        own = num_prompt + len(steps)
        heads = [set(row) for row in read.tokens.tolist()]
        for h, wanted in enumerate(heads):
            there: set[int] = set()
            for step in steps[-keep:] if keep else []:
                there |= step[h]
            hits += len(wanted & there)
        steps.append([tokens | {own} for tokens in heads])
    return hits


@pytest.mark.parametrize("keep", [0, 1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_hits_are_those_of_a_simulator(serve: Serve, monkeypatch: pytest.MonkeyPatch, strategy: str, keep: int) -> None:
    many = prompts(70, 33, 18)
    engine = serve("llama-tiny", strategy.format(keep=keep), max_num_batched_tokens=40, max_num_seqs=3)
    spy = RecallSpy().watch(engine, monkeypatch)
    outputs = run(engine, many, [greedy(14), greedy(9), greedy(20)])
    tiers, moved = engine.memory.placement._tiers, 0
    for prompt, output in zip(many, outputs, strict=True):
        told = output.attestation
        assert told.tokens_recalled_cached == simulated_hits(spy, output.request_id, len(prompt), keep)
        assert (told.tokens_recalled_cached > 0) == (keep > 0)
        assert told.bytes_fetched == (told.tokens_fetched - told.tokens_recalled_cached) * tiers.row_bytes
        moved += told.bytes_fetched
    assert tiers._fetch_link.num_bytes == moved  # no other bytes went over the link
    require_empty(engine)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_kept_changes_no_answer(serve: Serve, strategy: str) -> None:
    many = prompts(70, 33, 18)
    answers = [run(serve("llama-tiny", strategy.format(keep=keep)), many, greedy(14, logprobs=1)) for keep in (0, 1, 4)]
    for fetched, *kept in zip(*answers, strict=True):
        for other in kept:
            assert other.token_ids == fetched.token_ids
            assert other.attestation.tokens_fetched == fetched.attestation.tokens_fetched


def test_staging_pages_are_lent_to_those_that_run(serve: Serve) -> None:
    """With nothing kept, two layers' rows at most; with rows kept, every layer's of every running request."""
    for keep in (0, 1):
        engine = serve("llama-tiny", f"topk(budget=0.2, keep={keep})")
        names = [engine.add_request(p, greedy(n)) for p, n in zip(prompts(70, 70), (6, 12), strict=True)]
        staging, layout = engine.memory.placement._tiers.staging, engine.memory.layout
        engine.step()
        engine.step()
        each = layout.num_kv_heads * layout.num_blocks_for(int(0.2 * 70) + 1)  # of one layer and request
        assert len(staging.keys) - staging.num_free == keep * 2 * layout.num_layers * each
        assert 2 * each <= len(staging.keys) <= 2 * layout.num_layers * each * (1 + keep)
        while names[0] in engine._requests:
            engine.step()
        assert len(staging.keys) - staging.num_free == keep * layout.num_layers * each
        finish(engine)
        assert staging.num_bytes == 0
        require_empty(engine)


def test_a_request_that_is_aborted_or_preempted_gives_its_pages_back(serve: Serve) -> None:
    engine = serve("llama-tiny", "clusterkv(budget=0.5, keep=2)")
    names = [engine.add_request(p, greedy(30)) for p in prompts(40, 50, 60)]
    for _ in range(5):
        engine.step()
    engine.abort(names[0])
    engine._scheduler.preempt(sequence_of(engine, names[1]))
    finish(engine)
    assert engine.memory.placement._tiers.staging.num_bytes == 0
    require_empty(engine)


def test_a_token_named_twice_fails_its_request_only(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    many = prompts(40, 50)
    expected = run(serve("llama-tiny", "topk"), many, greedy(8))
    choose = TopKIndex.choose
    bad: list[int] = []

    def twice(self: TopKIndex, layer: int, row: int, *rest: Any) -> Any:
        found = choose(self, layer, row, *rest)
        return found[:, :1].expand(-1, 2) if row in bad else found

    monkeypatch.setattr(TopKIndex, "choose", twice)
    engine = serve("llama-tiny", "topk")
    names = [engine.add_request(p, greedy(8)) for p in many]
    engine.step()
    bad.append(sequence_of(engine, names[0]).row)
    done = finish(engine)
    assert done[names[0]].error == "ValueError: topk named a token twice"
    assert done[names[1]].token_ids == expected[1].token_ids
    require_empty(engine)


@pytest.mark.parametrize("wrong", ["twice", "outside"])
def test_an_order_that_loses_rows_fails_its_request_only(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    many = prompts(40, 50)
    expected = run(serve("llama-tiny", "clusterkv"), many, greedy(8))
    order = ClusterIndex.order

    def broken(self: ClusterIndex, layer: int, row: int, first: int) -> Any:
        found = order(self, layer, row, first)
        if found is not None and found.shape[1] == 40:
            found = found.clone()
            found[:, 0] = found[:, 1] if wrong == "twice" else 99
        return found

    monkeypatch.setattr(ClusterIndex, "order", broken)
    engine = serve("llama-tiny", "clusterkv")
    bad, good = run(engine, many, greedy(8))
    assert bad.error == "ValueError: the order of rows 0 to 39 names one twice or none of them"
    assert good.token_ids == expected[1].token_ids
    require_empty(engine)


def test_a_transfer_that_fails_ends_its_step_and_no_other(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    many = prompts(40, 50)
    expected = run(serve("llama-tiny", "quest"), many, greedy(8))
    engine = serve("llama-tiny", "quest")
    names = [engine.add_request(p, greedy(8)) for p in many]
    engine.step()
    tiers = engine.memory.placement._tiers
    gather = tiers.host_kernels.gather

    def fail(*args: Any) -> Any:
        raise OSError("the host's memory is gone")

    monkeypatch.setattr(tiers.host_kernels, "gather", fail)
    ended = {output.request_id: output.error for output in engine.step()}
    assert ended == dict.fromkeys(names, "OSError: the host's memory is gone")
    monkeypatch.setattr(tiers.host_kernels, "gather", gather)
    again = run(engine, many, greedy(8))
    assert [o.token_ids for o in again] == [o.token_ids for o in expected]
    require_empty(engine)


def test_clusters_are_fetched_in_longer_runs_than_as_they_came(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(strategy: str) -> tuple[int, int]:
        engine = serve("3m", strategy, blocks=600)
        (output,) = run(engine, prompts(1200), greedy(4))
        tiers: RecallTiers = engine.memory.placement._tiers
        return tiers.num_runs, output.attestation.bytes_fetched

    laid, as_much = runs("clusterkv(keep=0)")
    monkeypatch.setattr(ClusterIndex, "order", lambda *args: None)
    scattered, bytes_scattered = runs("clusterkv(keep=0)")
    assert as_much == bytes_scattered
    print(f"rows of one fetch in {laid} runs by cluster, {scattered} as they came")  # shown by pytest -s
    assert laid < scattered / 3


def test_forks_lay_out_their_own_host_rows(serve: Serve) -> None:
    (prompt,) = prompts(50)
    apart = run(serve("llama-tiny", "clusterkv", max_num_seqs=1), [prompt] * 3, greedy(6))
    engine = serve("llama-tiny", "clusterkv")
    engine.add_request(prompt, greedy(6, n=3))
    done = finish(engine)
    assert [o.token_ids for o in done.values()] == [o.token_ids for o in apart]
    require_empty(engine)
