"""What a model can do with its full cache: every task at every length, in plain `transformers`, without the engine."""

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvwise.core.errors import UsageError
from kvwise.models.checksums import verify
from kvwise.models.quiet import quiet
from kvwise.models.train.rows import MAX_QUESTIONS, TASKS
from kvwise.tasks.base import Episode, Task
from kvwise.tasks.synthetic.continuation import Continuation
from kvwise.tasks.synthetic.early_fact import EarlyFact
from kvwise.tasks.synthetic.needle import Needle
from kvwise.tasks.token_language import TokenLanguage

CARD_TASKS: Mapping[str, Task] = {
    **TASKS,
    "needle": Needle(),
    "early_fact": EarlyFact(),
    "continuation": Continuation(),
}
TOKENS_PER_PASS = 8192
ANSWERS = 400
# Contexts of a cell: whichever of the two is more. 400 passes over 2,048 tokens would take minutes.
MIN_CONTEXTS, TOKENS_PER_CELL = 100, 102_400
CARD = "training.json"
MAX_BYTES = 10_000_000
ALLOWED_ERRORS = 3.0  # standard errors below the card


@dataclass(frozen=True, slots=True)
class Mark:
    """One task at one length: the share of answers that are right as a whole, and the loss, with standard errors.

    `nll` is in nats per answer token. `accuracy` is None for a task without one right answer.
    """

    task: str
    length: int
    trained: bool
    num_answers: int
    accuracy: float | None
    error: float | None
    nll: float
    nll_error: float


@dataclass(frozen=True, slots=True)
class _Text:
    """An episode as a row: its tokens, and where each answer begins and ends."""

    tokens: list[int]
    answers: list[tuple[int, int]]


@dataclass(slots=True)
class _Scores:
    """Per episode: right answers, answers, and mean loss of the answer tokens."""

    right: list[int]
    asked: list[int]
    nll: list[float]


def measure(
    model: Any,
    language: TokenLanguage,
    tasks: Mapping[str, Task],
    lengths: Mapping[int, bool],
    answers: int = ANSWERS,
    seed: int = 0,
) -> tuple[Mark, ...]:
    """Judge `model` on `answers` or more answers of each task at each of `lengths` (-> was it trained on).

    A task that asks few questions a context gets fewer answers at long lengths: see `max_contexts`.

    Every question is asked once, after the context and the questions before it with their right answers; an answer
    is right if each of its tokens is the most likely one. Equal arguments ask equal questions.
    """
    return tuple(
        _mark(name, length, trained, _score(model, _texts(language, name, task, length, answers, seed)))
        for name, task in tasks.items()
        for length, trained in lengths.items()
    )


def max_contexts(length: int) -> int:
    """How many contexts of `length` tokens are read at most to fill a cell."""
    return max(MIN_CONTEXTS, TOKENS_PER_CELL // length)


def check(folder: Path, answers: int = 100, seed: int = 1) -> None:
    """UsageError unless `folder` is what its card says: checksums, size, and the accuracy of every trained cell.

    The questions are others than the card's; a cell fails that lies more than 3 standard errors below it.
    """
    verify(folder)
    check_size(folder)
    card = read_card(folder)
    told = {(mark.task, mark.length): mark for mark in card if mark.trained and mark.accuracy is not None}
    if not told:
        raise UsageError(f"{folder / CARD} tells no accuracies: finish the training (python -m kvwise.models.train)")
    model, language = load_plain(folder)
    tasks = {name: CARD_TASKS[name] for name, _ in told}
    for mark in measure(model, language, tasks, dict.fromkeys(sorted({n for _, n in told}), True), answers, seed):
        before = told[mark.task, mark.length]
        if falls_below(mark, before):
            raise UsageError(
                f"{folder}: {mark.task} at {mark.length} tokens is {mark.accuracy:.3f} right, and its card says"
                f" {before.accuracy:.3f}: the weights and the card do not belong together"
            )


def check_size(folder: Path) -> None:
    """UsageError if the weights are too large to be shipped."""
    size = (folder / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise UsageError(f"{folder / 'model.safetensors'} has {size} bytes; at most {MAX_BYTES} are shipped")


def falls_below(found: Mark, told: Mark) -> bool:
    """Whether an accuracy lies more than 3 combined standard errors below that of the card."""
    if found.accuracy is None or told.accuracy is None or found.error is None or told.error is None:
        return False
    return found.accuracy < told.accuracy - ALLOWED_ERRORS * math.hypot(found.error, told.error)


def read_card(folder: Path) -> tuple[Mark, ...]:
    """The accuracies in a finished training's `training.json`."""
    try:
        return tuple(Mark(**row) for row in json.loads((folder / CARD).read_text(encoding="utf-8"))["accuracy"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CARD} is no card of a finished training ({error})") from error


def load_plain(folder: Path) -> tuple[Any, TokenLanguage]:
    """The model of `folder` as plain `transformers` loads it, in float32, and its language."""
    auto: Any = AutoModelForCausalLM
    with quiet():
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    return model, TokenLanguage(model.config.vocab_size)


def _texts(language: TokenLanguage, name: str, task: Task, length: int, answers: int, seed: int) -> list[_Text]:
    rng = np.random.default_rng((seed, zlib.crc32(name.encode()), length))
    texts: list[_Text] = []
    asked = 0
    while asked < answers and len(texts) < max_contexts(length):
        texts.append(_text(task.episode(rng, language, length)))
        asked += len(texts[-1].answers)
    return texts


def _text(episode: Episode) -> _Text:
    tokens, answers = list(episode.context), []
    for question in episode.questions[:MAX_QUESTIONS]:
        tokens += question.prompt
        answers.append((len(tokens), len(tokens) + len(question.answer)))
        tokens += question.answer
    return _Text(tokens, answers)


def _passes(texts: Sequence[_Text]) -> Iterator[Sequence[_Text]]:
    """`texts` in groups of about `TOKENS_PER_PASS` tokens."""
    count = max(1, TOKENS_PER_PASS // max(len(text.tokens) for text in texts))
    for first in range(0, len(texts), count):
        yield texts[first : first + count]


@torch.inference_mode()
def _score(model: Any, texts: Sequence[_Text]) -> _Scores:
    scores = _Scores([], [], [])
    for group in _passes(texts):
        longest = max(len(text.tokens) for text in group)
        padded = [text.tokens + [0] * (longest - len(text.tokens)) for text in group]  # behind what is asked: unseen
        hidden = model.model(torch.tensor(padded, device=model.device), use_cache=False).last_hidden_state
        for text, states in zip(group, hidden, strict=True):
            right, losses = _judge(model, states, text)
            scores.right.append(sum(right))
            scores.asked.append(len(right))
            scores.nll.append(float(np.mean(losses)))
    return scores


def _judge(model: Any, states: Tensor, text: _Text) -> tuple[list[bool], list[float]]:
    """Per answer: whether it is right, and its mean loss. `states` is [T, hidden]."""
    places = torch.tensor([place for start, end in text.answers for place in range(start, end)])
    targets = torch.tensor(text.tokens)[places]
    logits = model.lm_head(states[places - 1]).float().cpu()
    hits = (logits.argmax(-1) == targets).tolist()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    right, means, done = [], [], 0
    for start, end in text.answers:
        size = end - start
        right.append(all(hits[done : done + size]))
        means.append(sum(losses[done : done + size]) / size)
        done += size
    return right, means


def _mark(name: str, length: int, trained: bool, scores: _Scores) -> Mark:
    right, asked, nll = (np.array(column, dtype=float) for column in (scores.right, scores.asked, scores.nll))
    num_answers = int(asked.sum())
    nll_error = float(nll.std(ddof=1) / math.sqrt(len(nll))) if len(nll) > 1 else 0.0
    accuracy = error = None
    if CARD_TASKS[name].exact:
        accuracy = float(right.sum() / num_answers)
        error = _error(right, asked, accuracy)
    return Mark(name, length, trained, num_answers, accuracy, error, float(nll.mean()), nll_error)


def _error(right: np.ndarray, asked: np.ndarray, accuracy: float) -> float:
    """Standard error, clustered by episode; never below that of Agresti and Coull, which is not 0 at 0 or 1."""
    num = asked.sum()
    shifted = (right.sum() + 2) / (num + 4)
    floor = math.sqrt(shifted * (1 - shifted) / (num + 4))
    episodes = len(right)
    if episodes < 2:
        return floor
    spread = ((right - accuracy * asked) ** 2).sum() * episodes / (episodes - 1)
    return max(floor, math.sqrt(spread) / float(num))
