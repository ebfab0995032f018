"""On the built-in trained model methods keep and answer what transformers' own attention says they must.

The references know nothing of the engine: numpy over the attention probabilities of an eager transformers model, or
that model run with a mask per layer and head that hides what a method has dropped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvwise.models
from kvwise.tasks.base import Episode
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.token_language import TokenLanguage
from tests.engine.runs import finish, greedy, require_empty, sequence_of
from tests.methods.random_reference import plain_kept as plain_random
from tests.methods.snapkv_reference import plain_observed, plain_pooled

NAME = "builtin:recall"
FOLDER = Path(kvwise.models.__file__).parent / "builtin" / "recall"
TIE = 1e-3  # logits closer than this may be ordered by rounding

Serve = Callable[..., Any]


@dataclass(frozen=True)
class Trained:
    """The model twice: as the engine serves it, and as transformers has it."""

    loaded: Any
    plain: Any

    def episodes(self, length: int, count: int) -> list[Episode]:
        """Recall episodes."""
        rng, language = np.random.default_rng(5), TokenLanguage(self.loaded.vocab_size)
        return [Recall().episode(rng, language, length) for _ in range(count)]

    def attention(self, episode: Episode) -> np.ndarray[Any, Any]:
        """Probabilities [L, H, G, T, T] of an episode's context."""
        with torch.inference_mode():
            found = self.plain(torch.tensor([episode.context]), output_attentions=True).attentions
        return torch.cat(found).unflatten(1, (self.loaded.num_kv_heads, -1)).double().numpy()


@pytest.fixture(scope="module")
def trained() -> Trained:
    if not (FOLDER / "model.safetensors").is_file():
        pytest.skip(f"{NAME} is not part of this installation: its weights are missing")
    from kvwise.models.load import load_model

    plain = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager", dtype=torch.float32).eval()
    return Trained(load_model(NAME), plain)


# -- what is kept -----------------------------------------------------------------------------------------------


def require_kept(kept: list[int], score: np.ndarray[Any, Any], always: Sequence[int], capacity: int) -> None:
    """`kept` are the tokens `always` and the best of the others by `score`, but for ties that rounding decides."""
    assert len(kept) == len(set(kept)) == capacity
    assert set(always) <= set(kept)
    others = np.setdiff1d(np.arange(len(score)), always)
    num = capacity - len(always)
    threshold = np.sort(score[others])[-num]
    rounding = 1e-4 * threshold
    assert set(others[score[others] > threshold + rounding]) <= set(kept)
    assert (score[np.setdiff1d(kept, always)] >= threshold - rounding).all()


def kept_after_prefill(serve: Serve, trained: Trained, strategy: str, episode: Episode) -> list[list[list[int]]]:
    engine = serve(trained.loaded, strategy, blocks=200, max_num_batched_tokens=96)
    engine.add_request(episode.context, greedy(2), request_id="a")
    while not sequence_of(engine, "a").settled:
        engine.step()
    kept: list[list[list[int]]] = engine.memory.placement.kept_positions(sequence_of(engine, "a"))
    finish(engine)
    require_empty(engine)
    return kept


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("budget", [0.06, 0.25, 0.5])
def test_h2o_keeps_the_heavy_hitters_of_transformers_attention(
    serve: Serve, trained: Trained, budget: float, normalised: bool
) -> None:
    strategy = f"h2o(budget={budget}, normalised={str(normalised).lower()})"
    for episode in trained.episodes(256, 3):
        kept = kept_after_prefill(serve, trained, strategy, episode)
        mass = trained.attention(episode).sum((2, 3))  # [L, H, T]: over query heads and rows
        score = mass / np.arange(256, 0, -1) if normalised else mass
        capacity = int(256 * budget)
        recent = range(256 - capacity // 2, 256)
        for layer, head in np.ndindex(score.shape[:2]):
            require_kept(kept[layer][head], score[layer, head], recent, capacity)


@pytest.mark.parametrize("budget", [0.06, 0.25, 0.5])
def test_snapkv_keeps_what_the_last_rows_of_transformers_attention_vote_for(
    serve: Serve, trained: Trained, budget: float
) -> None:
    for episode in trained.episodes(256, 3):
        kept = kept_after_prefill(serve, trained, f"snapkv(budget={budget})", episode)
        rows = plain_observed(256, budget, 32)
        votes = trained.attention(episode)[..., -rows:, :].sum((2, 3))
        for layer, head in np.ndindex(votes.shape[:2]):
            pooled = plain_pooled(votes[layer, head, :-rows], 5)
            score = np.concatenate([pooled, np.zeros(rows)])
            require_kept(kept[layer][head], score, range(256 - rows, 256), int(256 * budget))


# -- what is answered -------------------------------------------------------------------------------------------


def answers(serve: Serve, trained: Trained, strategy: str, episodes: Sequence[Episode]) -> list[list[int]]:
    """By episode and question, what the engine answers when each question is asked of the compressed context."""
    engine = serve(trained.loaded, strategy, blocks=2000, max_num_seqs=64)
    found = [[-1] * len(e.questions) for e in episodes]
    for number, episode in enumerate(episodes):

        def note(index: int, step: int, logits: Tensor, number: int = number) -> None:
            if step == len(episodes[number].questions[index].prompt):
                found[number][index] = int(logits.argmax())

        params = [greedy(len(q.prompt) + 1, forced_tokens=[*q.prompt, *q.answer]) for q in episode.questions]
        engine.add_request(episode.context, params, observe=note)
    assert all(output.error is None for output in finish(engine).values())
    require_empty(engine)
    return found


def right(found: list[list[int]], episodes: Sequence[Episode]) -> np.ndarray[Any, Any]:
    """bool [answers]."""
    wanted = [question.answer[0] for episode in episodes for question in episode.questions]
    return np.array([answer for row in found for answer in row]) == np.array(wanted)


class Masked:
    """Runs the plain model so that each KV head of each layer sees only what is `visible` [L, H, T, T]."""

    def __init__(self, trained: Trained, visible: Tensor) -> None:
        group = trained.loaded.num_query_heads // trained.loaded.num_kv_heads
        hidden = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf).repeat_interleave(group, 1)
        self._masks = hidden
        self._model = trained.plain

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [Q, V] of the last of tokens [Q, T]."""
        handles = [
            layer.self_attn.register_forward_pre_hook(self._hook(mask), with_kwargs=True)
            for layer, mask in zip(self._model.model.layers, self._masks, strict=True)
        ]
        try:
            with torch.inference_mode():
                found: Tensor = self._model(tokens, logits_to_keep=1).logits[:, 0]
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _hook(self, mask: Tensor) -> Callable[..., Any]:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask[None]})


def random_visible(trained: Trained, length: int, total: int, budget: float) -> Tensor:
    """bool [L, H, T, T]: a prompt sees all of its past, a later token what was kept when it came, and itself."""
    layers, heads = trained.loaded.num_layers, trained.loaded.num_kv_heads
    visible = torch.ones(layers, heads, total, total, dtype=torch.bool).tril()
    visible[:, :, length:] = False
    for layer, head, row in np.ndindex(layers, heads, total - length):
        now = length + row
        visible[layer, head, now, [*plain_random(3, layer, head, now, int(length * budget), 8), now]] = True
    return visible


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_random_answers_as_transformers_does_when_the_dropped_are_masked(
    serve: Serve, trained: Trained, budget: float
) -> None:
    """The same answer to every question, unless rounding decides; so also the same accuracy."""
    episodes = trained.episodes(256, 13)
    found = answers(serve, trained, f"random(budget={budget}, seed=3)", episodes)
    masked = Masked(trained, random_visible(trained, 256, 258, budget))
    expected = []
    for episode, row in zip(episodes, found, strict=True):
        logits = masked.logits(torch.tensor([[*episode.context, *q.prompt] for q in episode.questions]))
        expected.append(logits.argmax(-1).tolist())
        behind = logits.amax(-1) - logits.gather(-1, torch.tensor(row)[:, None])[:, 0]
        assert (behind < TIE).all()
    ours, theirs = right(found, episodes), right(expected, episodes)
    assert len(ours) >= 200
    assert abs(ours.mean() - theirs.mean()) < 3 * standard_error(theirs)
    assert 0.05 < theirs.mean() < 0.95  # dropped tokens are missed, and kept ones found


def standard_error(hits: np.ndarray[Any, Any]) -> float:
    """Of a share of right answers; never nought from few of them (one more of each kind)."""
    share = (hits.sum() + 1) / (len(hits) + 2)
    return float(np.sqrt(share * (1 - share) / len(hits)))


@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("budget", [0.125, 0.25, 0.5, 0.75])
def test_a_window_answers_what_lies_inside_it(serve: Serve, trained: Trained, budget: float, length: int) -> None:
    episodes = trained.episodes(length, 13 if length == 256 else 7)
    hits = right(answers(serve, trained, f"window(budget={budget})", episodes), episodes)
    # When the last token of the question attends, that many tokens before it are there.
    inside = [
        min(q.evidence) >= length + len(q.prompt) - 1 - int(length * budget) for e in episodes for q in e.questions
    ]
    assert len(hits) == len(inside) >= 200
    assert abs(hits.mean() - np.mean(inside)) < 3 * standard_error(np.array(inside))


def test_full_and_exact_top_k_answer_nearly_everything(serve: Serve, trained: Trained) -> None:
    episodes = trained.episodes(256, 13)
    for strategy in ("full", "topk(budget=0.06)"):
        assert right(answers(serve, trained, strategy, episodes), episodes).mean() > 0.95


@pytest.mark.parametrize("selection", ["topk", "infinigen", "quest", "clusterkv"])
@pytest.mark.parametrize("retention", ["h2o", "streaming", "snapkv"])
def test_what_is_dropped_is_missed_and_what_is_demoted_is_found(
    serve: Serve, trained: Trained, retention: str, selection: str
) -> None:
    """A tenth of the tokens on the device, and of the others a tenth at most read by each query."""
    episodes = trained.episodes(256, 3)
    dropped, demoted = (
        right(answers(serve, trained, f"{retention}(budget=0.1){more}", episodes), episodes).mean()
        for more in ("", f"+{selection}(budget=0.1)")
    )
    assert dropped < 0.3
    assert demoted > 0.9


@pytest.mark.parametrize(
    "strategy",
    [
        "window(budget={})",
        "random(budget={})",
        "streaming(budget={})",
        "h2o(budget={})",
        "h2o(normalised=true, budget={})",
        "snapkv(budget={})",
        "infinigen(budget={})",
        "topk(budget={})",
    ],
)
def test_a_larger_budget_answers_no_worse_within_the_error(serve: Serve, trained: Trained, strategy: str) -> None:
    episodes = trained.episodes(256, 7)
    curve = [right(answers(serve, trained, strategy.format(b), episodes), episodes) for b in (0.125, 0.25, 0.5, 1.0)]
    for less, more in pairwise(curve):
        assert more.mean() >= less.mean() - 3 * np.hypot(standard_error(less), standard_error(more))
    assert curve[-1].mean() > 0.9
