"""Examining: logits are scored where the answers are, against the full cache's, and work that is not done is seen."""

from dataclasses import replace

import numpy as np
import pytest

from kvwise.core.errors import RequestError
from kvwise.core.output import RequestOutput
from kvwise.study.exam import Sitting, agreement_sittings, task_sittings
from kvwise.study.quality import divergence, examine, log_softmax, of_full_batches, reference
from tests.study.fake import LANGUAGE, VOCAB, FakeBench, FakeEngine

MODEL = "builtin:recall"


def engine(strategy: str) -> FakeEngine:
    return FakeBench().engine(MODEL, strategy, None)


def sit(*protocols: str) -> list[Sitting]:
    return task_sittings(("recall", "copy", "continuation"), protocols, LANGUAGE, 128, num_answers=20, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocols", [("multi-turn",), ("multi-request",), ("multi-turn", "multi-request")])
def test_a_strategy_that_changes_nothing_agrees_wholly(protocols: tuple[str, ...]) -> None:
    full = reference(engine("full"), sit(*protocols))
    same = examine(engine("full+prefix"), full)
    assert {m.sitting.protocol for m in same.marks} == set(protocols)
    assert all(m.same == 1 and m.kl == 0 for m in same.marks)
    assert [(m.right, m.nll) for m in same.marks] == [(m.right, m.nll) for m in full.examined.marks]
    assert sum(o.attestation.tokens_reused for o in same.outputs) > 0
    exact = [m.right for m in same.marks if m.sitting.task != "continuation"]
    assert np.mean([bool(r) for r in exact]) > 0.8
    assert all(m.right is None for m in same.marks if m.sitting.task == "continuation")


def test_every_figure_is_that_of_the_logits_behind_the_answer() -> None:
    sittings = sit("multi-turn")
    full, lossy = engine("full"), engine("h2o(budget=0.1)")
    examined = examine(lossy, reference(full, sittings))
    for mark in examined.marks[::7]:
        context, (sample,), answer = mark.sitting.context, mark.sitting.samples, mark.answer
        steps = range(answer.start, answer.stop)
        theirs, ours = ([e.logits(list(context), step, sample.forced[step]) for step in steps] for e in (full, lossy))
        said = [sample.forced[step] for step in steps]
        best = [int(row.argmax()) for row in ours]
        assert mark.right == (None if mark.sitting.task == "continuation" else best == said)
        assert mark.nll == pytest.approx(-np.mean([log_softmax(o)[t] for o, t in zip(ours, said, strict=True)]))
        assert mark.same == np.mean([int(t.argmax()) == b for t, b in zip(theirs, best, strict=True)])
        assert mark.kl == pytest.approx(np.mean([divergence(t, o) for t, o in zip(theirs, ours, strict=True)]))
    assert 0 < np.mean([m.same for m in examined.marks if m.same is not None]) < 1
    assert {o.attestation.did["h2o"] > 0 for o in examined.outputs} == {True}


def test_a_model_without_tasks_is_forced_onto_what_the_full_cache_said() -> None:
    bench = FakeBench()
    sittings = agreement_sittings(32, 3, 6, seed=0, vocab_size=VOCAB)
    full = reference(bench.engine("random:3m", "full", None), sittings)
    said = [o.token_ids for o in full.examined.outputs]
    assert all(len(tokens) == 6 for tokens in said)
    lossy = examine(bench.engine("random:3m", "h2o(budget=0.1)", None), full)
    assert [o.token_ids for o in lossy.outputs] == said
    assert len(lossy.marks) == 3
    assert all(m.right is None and m.nll is None and m.score is None for m in lossy.marks)
    assert 0 < np.mean([m.same for m in lossy.marks if m.same is not None]) < 1
    assert min(m.kl for m in lossy.marks if m.kl is not None) > 0


def test_the_divergence_is_that_of_the_softmax() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = (np.log(p) + 300).astype(np.float32)
    assert divergence(logits, np.log(q)) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-4)
    assert divergence(logits, np.log(p) - 500) == pytest.approx(0, abs=1e-4)


def test_bytes_per_token_are_those_of_steps_that_only_decode() -> None:
    class Metered(FakeEngine):
        def stats(self):  # type: ignore[no-untyped-def]
            tokens = sum(len(r.output.prompt_token_ids) + len(r.output.token_ids) - 1 for r in self.running)
            decoding = all(r.output.token_ids for r in self.running)
            # A tenth of the blocks is only cached.
            used = {"device": 40 * tokens + 10 * self.block_bytes if decoding else 1 << 40, "host": 3 * tokens}
            return replace(super().stats(), kv_bytes=used, blocks_cached=10)

    bench = FakeBench()
    metered = Metered(bench.clock, "full", 2e-6, bench.facts(MODEL), 1 << 20)
    found = reference(metered, sit("multi-turn")).examined.bytes_per_token
    assert found == pytest.approx({"device": 40, "host": 3}, rel=1e-3)


def test_steps_of_a_batch_that_is_not_full_say_nothing_of_bytes() -> None:
    # A window for all that ever ran at once, however few are left.
    assert of_full_batches([(64, 10.0), (63, 12.0), (60, 11.0), *[(2, 300.0)] * 10]) == 11.0
    assert of_full_batches([(1, 5.0)]) == 5.0


def test_an_engine_that_fails_or_shows_too_little_is_an_error() -> None:
    class Failing(FakeEngine):
        def step(self) -> list[RequestOutput]:
            return [replace(output, error="out of memory") for output in super().step()]

    class Blind(FakeEngine):
        def add_request(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().add_request(*args, **{**kwargs, "observe": None})

    bench = FakeBench()
    for kind, words in ((Failing, "out of memory"), (Blind, "did not show the logits")):
        with pytest.raises(RequestError, match=words):
            reference(kind(bench.clock, "full", 2e-6, bench.facts(MODEL), None), sit("multi-turn"))
