"""Training rows: an episode with its questions and answers, and how much each token's prediction counts."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvwise.tasks.base import Episode, Task
from kvwise.tasks.synthetic.copy import Copy
from kvwise.tasks.synthetic.counting import Counting
from kvwise.tasks.synthetic.forgetting import Forgetting
from kvwise.tasks.synthetic.multi_value import MultiValue
from kvwise.tasks.synthetic.recall import Recall
from kvwise.tasks.synthetic.tracking import Tracking
from kvwise.tasks.token_language import FIRST_FILLER, FIRST_KEY, NUM_FILLER, TokenLanguage

TASKS: Mapping[str, Task] = {
    "recall": Recall(),
    "multi_value": MultiValue(),
    "tracking": Tracking(),
    "forgetting": Forgetting(),
    "counting": Counting(),
    "copy": Copy(),
}
SPREADABLE = ("recall", "multi_value")  # whose questions may also come as soon as their fact has been said
MAX_QUESTIONS = 24


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one text; `answers` marks those that are answers, `filler` those of the filler that can be guessed."""

    kind: str
    tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
    answers: np.ndarray[tuple[int], np.dtype[np.bool_]]
    filler: np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows side by side, padded at the end: tokens [B, T] and the masks of their targets [B, T]."""

    kinds: tuple[str, ...]
    tokens: Tensor
    answers: Tensor
    filler: Tensor


def make_batch(
    rng: np.random.Generator, language: TokenLanguage, mix: Mapping[str, float], length: int, count: int
) -> Batch:
    """`count` rows with contexts of `length` tokens, of kinds drawn by `mix`."""
    kinds = tuple(rng.choice(list(mix), size=count, p=np.array(list(mix.values())) / sum(mix.values())).tolist())
    rows = [make_row(rng, language, kind, length) for kind in kinds]
    longest = max(len(row.tokens) for row in rows)
    columns = []
    for name in ("tokens", "answers", "filler"):
        parts = [getattr(row, name) for row in rows]
        columns.append(torch.from_numpy(np.stack([np.pad(p, (0, longest - len(p))) for p in parts])))
    return Batch(kinds, *columns)


def make_row(rng: np.random.Generator, language: TokenLanguage, kind: str, length: int) -> Row:
    """One row of `kind`: a task's name, or `repeat`."""
    if kind == "repeat":
        return _repeat(rng, language, length)
    episode = TASKS[kind].episode(rng, language, length)
    tokens, answers = _spread(rng, episode) if kind in SPREADABLE and rng.random() < 0.5 else _at_the_end(episode)
    filler = (tokens >= FIRST_FILLER) & (tokens < FIRST_FILLER + NUM_FILLER) & ~answers
    return Row(kind, tokens, answers, filler)


def _at_the_end(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Context, then question and answer after question and answer."""
    tokens, marks = list(episode.context), [False] * len(episode.context)
    for question in episode.questions[:MAX_QUESTIONS]:
        tokens += [*question.prompt, *question.answer]
        marks += [False] * len(question.prompt) + [True] * len(question.answer)
    return np.array(tokens, dtype=np.int64), np.array(marks)


def _spread(rng: np.random.Generator, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Every question at a random place behind its fact; places inside another statement are moved to its end."""
    context = np.array(episode.context)
    is_filler = (context >= FIRST_FILLER) & (context < FIRST_FILLER + NUM_FILLER)
    safe = np.append(np.flatnonzero(is_filler), len(context))  # a question may stand before a token of filler
    asked: dict[int, list[int]] = {}
    for i, question in enumerate(episode.questions[:MAX_QUESTIONS]):
        place = int(rng.integers(max(question.evidence) + 1, len(context) + 1))
        asked.setdefault(int(safe[np.searchsorted(safe, place)]), []).append(i)
    tokens: list[int] = []
    marks: list[bool] = []
    done = 0
    for place in sorted(asked):
        tokens += episode.context[done:place]
        marks += [False] * (place - done)
        done = place
        for i in asked[place]:
            question = episode.questions[i]
            tokens += [*question.prompt, *question.answer]
            marks += [False] * len(question.prompt) + [True] * len(question.answer)
    tokens += episode.context[done:]
    marks += [False] * (len(context) - done)
    return np.array(tokens, dtype=np.int64), np.array(marks)


def _repeat(rng: np.random.Generator, language: TokenLanguage, length: int) -> Row:
    """Random symbols repeated with a period drawn for the row (a fixed one is solved by position alone)."""
    period = int(rng.integers(8, min(length // 2, 64) + 1))
    block = rng.choice(np.arange(FIRST_KEY, language.vocab_size), size=period, replace=False)
    tokens = np.concatenate([language.begin, np.tile(block, -(-length // period))[: length - 1]]).astype(np.int64)
    answers = np.arange(length) > period
    answers[min(length, 1 + 4 * period) :] = False  # a few periods say it all
    return Row("repeat", tokens, answers, np.zeros(length, dtype=bool))
