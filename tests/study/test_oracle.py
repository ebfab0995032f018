"""The exam of a real engine against plain transformers: every answer, likelihood and divergence by itself."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch

from kvwise.models.quiet import quiet
from kvwise.models.random import build
from kvwise.models.support import tiny_config
from kvwise.study.exam import Answer, Sample, Sitting, task_sittings
from kvwise.study.measure import exam_memory
from kvwise.study.quality import Examined, Marked, Reference, examine, reference
from kvwise.study.workbench import Workbench
from kvwise.tasks.token_language import TokenLanguage
from tests.study.conftest import make_plan
from tests.study.fake import VOCAB

MODEL, CONTEXT = "random:qwen2-tiny", 128
PLAN = f"""
threads = 1
[[block]]
name = "oracle"
strategies = ["full"]
models = ["{MODEL}"]
[block.workload]
kind = "random"
"""


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(make_plan(PLAN))


@pytest.fixture(scope="module")
def plain() -> Any:
    """The same weights in transformers, with its own attention."""
    with quiet():
        return build(tiny_config("qwen2"), 0, check_size=lambda _: None)


def predicted(plain: Any, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each token."""
    with torch.inference_mode():
        return np.asarray(plain(torch.tensor([list(tokens)])).logits[0].double().log_softmax(-1).numpy())


def sit(protocol: str, plain: Any) -> list[Sitting]:
    """Two tasks, and an episode the model answers right: what it would say itself."""
    asked = task_sittings(("recall", "multi_value"), [protocol], TokenLanguage(VOCAB), CONTEXT, num_answers=8, seed=0)  # type: ignore[list-item]
    context = asked[0].context
    own: tuple[int, ...] = (5, 6)  # some question
    for _ in range(3):
        own += (int(predicted(plain, context + own)[-1].argmax()),)
    wrong = (*own[:4], (own[4] + 1) % VOCAB)
    right_and_wrong = (Sample(own, (Answer(0, 2, 5),)), Sample(wrong, (Answer(1, 2, 5),)))
    return [*asked[:3], *asked[-3:], Sitting("own", protocol, 0, context, right_and_wrong)]


def run(bench: Workbench, strategy: str, what: list[Sitting] | Reference) -> Any:
    asked = what if isinstance(what, list) else list(what.sittings)
    with closing(bench.engine(MODEL, strategy, exam_memory(asked, bench.facts(MODEL), 64))) as engine:
        return reference(engine, what) if isinstance(what, list) else examine(engine, what)


def oracle(plain: Any, examined: Examined) -> Iterator[tuple[Marked, np.ndarray, np.ndarray]]:
    """Every mark with the log-probabilities behind the tokens of its answer, and these tokens."""
    for mark in examined.marks:
        sample = next(s for s in mark.sitting.samples if mark.answer in s.answers)
        whole = mark.sitting.context + sample.forced
        start, stop = CONTEXT + mark.answer.start, CONTEXT + mark.answer.stop
        yield mark, predicted(plain, whole)[start - 1 : stop - 1], np.array(whole[start:stop])


@pytest.mark.parametrize("protocol", ["multi-turn", "multi-request"])
def test_the_full_cache_answers_as_transformers_does(bench: Workbench, plain: Any, protocol: str) -> None:
    full = run(bench, "full", sit(protocol, plain))
    seen = 0
    for mark, logs, tokens in oracle(plain, full.examined):
        assert mark.num_tokens == len(tokens)
        assert mark.right == bool((logs.argmax(-1) == tokens).all())
        assert mark.nll == pytest.approx(-logs[np.arange(len(tokens)), tokens].mean(), abs=1e-4)
        seen += 1
    assert seen > 20
    own = [m for m in full.examined.marks if m.sitting.task == "own"]
    assert [m.right for m in own] == [True, False]
    again = run(bench, "full+prefix", full)
    assert all(m.same == 1 for m in again.marks)
    assert max(m.kl for m in again.marks) < 1e-8


def test_a_window_answers_as_a_mask_in_transformers_does(bench: Workbench, plain: Any) -> None:
    """Compressed behind the context, blind to the question: later tokens see what was kept, and each other."""
    full = run(bench, "full", sit("multi-request", plain))
    kept = 32
    lossy = run(bench, f"window(budget={kept / CONTEXT})", full)
    for (mark, logs, tokens), (_, whole, _) in zip(
        oracle(_Windowed(plain, kept), lossy), oracle(plain, full.examined), strict=True
    ):
        assert mark.nll == pytest.approx(-logs[np.arange(len(tokens)), tokens].mean(), abs=1e-4)
        assert mark.kl == pytest.approx((np.exp(whole) * (whole - logs)).sum(-1).mean(), abs=1e-4)
        assert mark.same == (whole.argmax(-1) == logs.argmax(-1)).mean()
    assert max(m.kl for m in lossy.marks) > 1e-3


class _Windowed:
    """A model whose tokens behind the context see `kept` tokens before them, and themselves."""

    def __init__(self, plain: Any, kept: int) -> None:
        self._plain, self._kept = plain, kept

    def __call__(self, tokens: torch.Tensor) -> Any:
        i, j = torch.arange(tokens.shape[1])[:, None], torch.arange(tokens.shape[1])
        seen = (j <= i) & ((i < CONTEXT) | (j >= i - self._kept))
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        return self._plain(tokens, attention_mask=mask)


def test_bytes_per_token_are_the_pages_that_h2o_holds(bench: Workbench, plain: Any) -> None:
    (sitting, *_) = sit("multi-turn", plain)
    found = run(bench, "h2o(budget=0.3)", run(bench, "full", [sitting])).bytes_per_token
    held = int(0.3 * CONTEXT)  # per layer and head, at all times
    pages = -(-held // 16) * 4 * 2  # of 16 tokens, in 4 layers and 2 heads
    page_bytes = 16 * 16 * 2 * 4  # keys and values of 16 float32 each
    length = sitting.samples[0].num_tokens
    tokens = np.median([CONTEXT + done for done in range(length - 1)])
    assert found == pytest.approx({"device": pages * page_bytes / tokens}, rel=1e-3)


def test_all_strategies_sit_the_same_exam(bench: Workbench, plain: Any) -> None:
    full = run(bench, "full", sit("multi-turn", plain))
    for strategy in ("h2o(budget=0.2)", "streaming(budget=0.2)", "infinigen(budget=0.2)"):
        found = run(bench, strategy, full)
        assert [(m.sitting, m.answer) for m in found.marks] == [(m.sitting, m.answer) for m in full.examined.marks]
        assert [o.prompt_token_ids for o in found.outputs] == [o.prompt_token_ids for o in full.examined.outputs]
        assert [o.token_ids for o in found.outputs] == [o.token_ids for o in full.examined.outputs]
