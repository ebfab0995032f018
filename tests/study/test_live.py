"""The live loop on a virtual clock: arrivals in time, concurrency held, cells cut, nothing lost."""

import numpy as np
import pytest

from kvwise.study.live import Drive, Pace, drive, warm_up
from kvwise.study.workloads import Job
from tests.study.fake import FakeBench, FakeEngine


def job(index: int, at: float = 0.0, **more: object) -> Job:
    prompt = np.arange(40) + index
    return Job(index, at, prompt, 4, index, **more)  # type: ignore[arg-type]


def run(jobs: list[Job], bench: FakeBench | None = None, **pace: object) -> tuple[Drive, FakeEngine, FakeBench]:
    bench = bench or FakeBench()
    bench.clock.advance(100.0)  # the engine's clock starts anywhere
    engine = bench.engine("random:3m", "full+prefix", None)
    given = Pace(bench.clock, bench.sleep, bench.resident_bytes, **pace)  # type: ignore[arg-type]
    return drive(engine, jobs, given), engine, bench


def test_requests_arrive_when_due_and_all_are_answered() -> None:
    out, _, bench = run([job(0, 0.5), job(1, 0.2), job(2, 3.0)])
    assert out.sent == {0: 0.5, 1: 0.2, 2: 3.0}
    assert {i: len(o.token_ids) for i, o in out.outputs.items()} == {0: 4, 1: 4, 2: 4}
    assert not out.cut
    assert out.outputs[2].metrics.arrival == pytest.approx(103.0)
    assert out.outputs[2].metrics.token_times[0] >= 103.0
    assert bench.slept > 2.5
    assert 3.0 < out.duration < 3.2


def test_an_open_loop_counts_waiting_as_latency_and_a_closed_loop_does_not() -> None:
    slow = FakeBench(speed=1e-3)
    out, _, _ = run([job(0), job(1, 0.001)], slow, limit_s=100)
    assert out.sent[1] == 0.001
    out, _, _ = run([job(0), job(1)], FakeBench(speed=1e-3), concurrency=1, open_loop=False, limit_s=100)
    ended = out.outputs[0].metrics.token_times[-1] - out.start
    assert out.sent[1] == pytest.approx(ended)


def test_never_more_than_the_concurrency_run() -> None:
    out, engine, _ = run([job(i) for i in range(9)], concurrency=3, open_loop=False, sample_every_s=0.0)
    assert max(s.stats.num_running + s.stats.num_waiting for s in out.samples) == 3
    assert len(out.outputs) == 9
    assert not engine.has_unfinished()


def test_a_turn_waits_for_the_one_before_and_for_thought() -> None:
    jobs = [job(0), job(1, 0.0, after=0, think_s=0.5), job(2, 5.0, after=1)]
    out, _, _ = run(jobs)
    ended = out.outputs[0].metrics.token_times[-1] - out.start
    assert out.sent[1] == pytest.approx(ended + 0.5)
    assert out.sent[2] == 5.0


def test_the_next_prompt_holds_the_real_answer_when_asked_to() -> None:
    jobs = [job(0), Job(1, 0.0, np.arange(60), 4, 0, turn=1, after=0, tail=3)]
    out, _, _ = run(jobs)
    first = out.outputs[0]
    assert out.outputs[1].prompt_token_ids == [*first.prompt_token_ids, *first.token_ids, 57, 58, 59]


def test_forced_answers_are_given() -> None:
    out, _, _ = run([job(0, forced=np.array([9, 8, 7, 6]))])
    assert out.outputs[0].token_ids == [9, 8, 7, 6]


def test_a_cell_is_cut_at_its_limit_and_says_so() -> None:
    out, engine, _ = run([job(0), job(1, 0.2), job(2, 9.0)], FakeBench(speed=2e-3), limit_s=1.0)
    assert out.cut
    assert 2 not in out.sent
    assert not engine.has_unfinished()
    assert {str(o.finish_reason) for o in out.outputs.values()} <= {"abort", "length"}
    assert out.duration == pytest.approx(1.0, abs=0.5)


def test_the_limit_also_ends_a_wait() -> None:
    out, _, _ = run([job(0), job(1, 50.0)], limit_s=1.0)
    assert out.cut
    assert out.duration == pytest.approx(1.0, abs=1e-3)


def test_peaks_see_every_step_and_curves_are_thinned() -> None:
    out, _, _ = run([job(i, 0.002 * i) for i in range(20)], sample_every_s=1.0)
    assert len(out.samples) <= 2
    dense, _, _ = run([job(i, 0.002 * i) for i in range(20)], sample_every_s=0.0)
    assert out.peak_bytes == dense.peak_bytes
    assert out.peak_bytes["device"] == max(s.stats.kv_bytes["device"] for s in dense.samples) > 0
    assert 0 < out.byte_seconds["device"] / out.duration < out.peak_bytes["device"]


def test_warm_up_leaves_nothing_behind() -> None:
    bench = FakeBench()
    engine = bench.engine("random:3m", "full", None)
    warm_up(engine, [np.arange(10), np.arange(12)])
    assert not engine.has_unfinished()
    assert engine.steps > 0
