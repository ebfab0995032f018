"""Agreement: forced answers, and a divergence that is the textbook's."""

import numpy as np
import pytest

from kvwise.study.measure import quality_prompts
from kvwise.study.quality import agreement, divergence, reference
from tests.study.fake import VOCAB, FakeBench


def test_a_strategy_that_changes_nothing_agrees_wholly() -> None:
    bench = FakeBench()
    prompts = quality_prompts(32, 3, seed=0, vocab_size=VOCAB)
    full = reference(bench.engine("random:3m", "full", None), prompts, 6)
    same = agreement(bench.engine("random:3m", "full+prefix", None), full)
    assert all(s.all() and len(s) == 6 for s in same.same)
    assert np.concatenate(same.kl).max() == 0
    assert sum(o.attestation.tokens_reused for o in same.outputs) > 0


def test_a_lossy_strategy_is_forced_onto_the_same_answer_and_differs_in_logits() -> None:
    bench = FakeBench()
    prompts = quality_prompts(32, 3, seed=0, vocab_size=VOCAB)
    full = reference(bench.engine("random:3m", "full", None), prompts, 6)
    lossy = agreement(bench.engine("random:3m", "h2o(budget=0.1)", None), full)
    assert [o.token_ids for o in lossy.outputs] == [t.tolist() for t in full.tokens]
    assert 0 < np.mean(np.concatenate(lossy.same)) < 1
    assert np.concatenate(lossy.kl).min() > 0


def test_the_divergence_is_that_of_the_softmax() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    logits = np.log(np.stack([p, p])).astype(np.float32) + np.array([[3.0], [-500.0]], dtype=np.float32)
    expected = float((p * np.log(p / q)).sum())
    assert divergence(logits, np.log(np.stack([q, p]))) == pytest.approx([expected, 0.0], abs=1e-4)


def test_prompts_share_their_first_half_only() -> None:
    prompts = quality_prompts(20, 3, seed=0, vocab_size=1000)
    assert len({tuple(p[:10]) for p in prompts}) == 1
    assert len({tuple(p[10:]) for p in prompts}) == 3
