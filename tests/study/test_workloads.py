"""Workloads: shared prefixes where they should be, the same traffic for every strategy."""

from dataclasses import replace

import pytest

from kvwise.study.cells import Cell, CellKind, expand
from kvwise.study.workloads import cell_jobs, num_requests
from tests.study.conftest import make_plan


def cells(workload: str, extra: str = "") -> list[Cell]:
    text = f"""
[[block]]
name = "b"
strategies = ["full", "h2o(budget={{budget}})"]
budgets = [0.5, 0.2]
models = ["m"]
request_rates = [10.0]
context_lengths = [64]
memory = ["auto", "64MiB"]
quality = false
{extra}
[block.workload]
{workload}
[block.load]
duration_s = 2.0
max_requests = 18
"""
    return [c for c in expand(make_plan(text)) if c.kind is CellKind.LIVE]


@pytest.mark.parametrize("workload", ['kind = "chat"', 'kind = "document"', 'kind = "random"'])
def test_every_strategy_and_memory_gets_the_same_traffic(workload: str) -> None:
    traffic = [
        [(j.not_before, j.prompt.tolist(), j.output_tokens) for j in cell_jobs(c, seed=1, vocab_size=99)]
        for c in cells(workload)
    ]
    assert all(t == traffic[0] for t in traffic)
    assert len(traffic[0]) == 18
    assert all(0 <= t < 99 for _, prompt, _ in traffic[0] for t in prompt)


def test_repeats_and_seeds_change_the_traffic() -> None:
    first, second = cells('kind = "random"', "repeats = 2")[0], cells('kind = "random"', "repeats = 2")[-1]
    draws = [cell_jobs(c, seed=s, vocab_size=99)[0].prompt.tolist() for c, s in ((first, 0), (second, 0), (first, 1))]
    assert len({tuple(d) for d in draws}) == 3


@pytest.mark.parametrize("answers", ["forced", "drawn", "real"])
def test_a_turn_continues_its_session_behind_the_system_prompt(answers: str) -> None:
    jobs = cell_jobs(cells(f'kind = "chat"\nanswers = "{answers}"')[0], seed=0, vocab_size=99)
    system = jobs[0].prompt[:64].tolist()
    assert all(j.prompt[:64].tolist() == system for j in jobs)
    for job in jobs:
        assert (job.after is None) == (job.turn == 0)
        assert (job.forced is not None) == (answers == "forced")
        if job.after is None:
            continue
        before = jobs[job.after]
        assert (before.session, before.turn) == (job.session, job.turn - 1)
        history = len(before.prompt) + before.output_tokens
        assert job.prompt[: len(before.prompt)].tolist() == before.prompt.tolist()
        if before.forced is not None:
            assert job.prompt[len(before.prompt) : history].tolist() == before.forced.tolist()
        assert job.tail == (len(job.prompt) - history if answers == "real" else None)


def test_questions_share_their_document() -> None:
    jobs = cell_jobs(cells('kind = "document"\nquestions = 6')[0], seed=0, vocab_size=99)
    heads = {j.session: {tuple(i.prompt[:64]) for i in jobs if i.session == j.session} for j in jobs}
    assert len(heads) == 3
    assert all(len(h) == 1 for h in heads.values())


def test_random_prompts_have_the_context_length_or_are_cut_at_it() -> None:
    jobs = cell_jobs(cells('kind = "random"')[0], seed=0, vocab_size=99)
    assert {len(j.prompt) for j in jobs} == {64}
    drawn = cells('kind = "random"\ninput_tokens = { kind = "uniform", low = 10, high = 100 }')[0]
    lengths = [len(j.prompt) for j in cell_jobs(drawn, seed=0, vocab_size=99)]
    assert 10 <= min(lengths) < max(lengths) == 64


def test_length_pairs_stay_pairs(tmp_path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("input_tokens,output_tokens\n20,2\n30,3\n900,90\n")
    cell = cells(f'kind = "pairs"\nfile = "{path}"\nmax_output_tokens = 50')[0]
    jobs = cell_jobs(cell, seed=0, vocab_size=99)
    assert {(len(j.prompt), j.output_tokens) for j in jobs} == {(20, 2), (30, 3), (64, 50)}


def test_the_number_of_requests_follows_rate_and_duration_within_limits() -> None:
    load = cells('kind = "random"')[0].load
    assert load is not None
    assert [num_requests(r, load) for r in (1.0, 5.0, 1000.0, float("inf"), None)] == [8, 10, 18, 18, 18]


def test_few_sessions_are_open_at_a_time() -> None:
    cell = cells('kind = "chat"\nturns = 3\nopen_sessions = 2')[0]
    jobs = cell_jobs(replace(cell, rate=float("inf")), seed=0, vocab_size=99)
    last = {j.session: j.index for j in jobs}
    first = {j.session: j.index for j in reversed(jobs)}
    opened = [sum(first[s] <= i <= last[s] for s in last) for i in range(len(jobs))]
    assert max(opened) == 2
