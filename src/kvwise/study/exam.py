"""What a model is asked: contexts, what is forced behind each, and which tokens of that are the answers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np

from kvwise.core.errors import TaskError
from kvwise.study.quality_section import Protocol
from kvwise.study.scores import AGREEMENT
from kvwise.study.workloads import sample_prompts
from kvwise.tasks.base import Episode, Task
from kvwise.tasks.catalogue import parse_task
from kvwise.tasks.language import Language

FORCED = "forced"  # the protocol of models without tasks: the full cache's own continuation
MIN_EPISODES = 6  # an error clustered by fewer contexts is a guess

Tokens = tuple[int, ...]
Grade = Callable[[Sequence[int]], float]  # generated tokens -> 0 (wrong) to 1


@dataclass(frozen=True, slots=True)
class Answer:
    """Output tokens [start, stop) of a sample are the answer to question number `question`.

    `exact`: it is right or wrong; otherwise only likely. `told`: the answer is known beforehand, so that its
    likelihood means something. `depth` is where in the context its evidence lies, from 0 to 1. `grade` scores what
    was generated freely.
    """

    question: int
    start: int
    stop: int
    exact: bool = True
    told: bool = True
    depth: float | None = None
    grade: Grade | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """What follows the context: `forced` tokens, then up to `num_free` greedy ones."""

    forced: Tokens
    answers: tuple[Answer, ...]
    num_free: int = 0

    @property
    def num_tokens(self) -> int:
        """Output tokens at most."""
        return len(self.forced) + self.num_free


@dataclass(frozen=True, slots=True)
class Sitting:
    """One request: a context, compressed before anything behind it is known, and its samples."""

    task: str
    protocol: str
    episode: int
    context: Tokens
    samples: tuple[Sample, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample with its context."""
        return len(self.context) + max(sample.num_tokens for sample in self.samples)


def task_sittings(
    texts: Sequence[str],
    protocols: Sequence[Protocol],
    language: Language,
    context: int,
    *,
    num_answers: int,
    seed: int,
) -> list[Sitting]:
    """Episodes of every task, each under every protocol; the same for every strategy.

    An exact task is asked until it has `num_answers` questions, any other until it has as many answer tokens.
    TaskError naming the task if `context` is too short for it.
    """
    out = []
    for text in texts:
        task = parse_task(text)
        try:
            episodes = list(_episodes(task, language, context, num_answers, seed))
        except TaskError as error:
            raise TaskError(f"task {text!r}: {error}") from error
        for protocol in protocols:
            out += [_sitting(text, task.exact, protocol, i, episode) for i, episode in enumerate(episodes)]
    return out


def _episodes(task: Task, language: Language, context: int, num_answers: int, seed: int) -> Iterator[Episode]:
    # The task has its own stream: a task more or less in the plan leaves the others as they are.
    rng = np.random.default_rng((seed, crc32(str(task).encode()), context))
    asked = number = 0
    while asked < num_answers or number < MIN_EPISODES:
        episode = task.episode(rng, language, context)
        asked += sum(1 if task.exact else len(question.answer) for question in episode.questions)
        number += 1
        yield episode


def _sitting(task: str, exact: bool, protocol: Protocol, number: int, episode: Episode) -> Sitting:
    length = len(episode.context)
    samples: list[Sample] = []
    forced: Tokens = ()
    answers: tuple[Answer, ...] = ()
    for index, question in enumerate(episode.questions):
        depth = float(np.mean(question.evidence)) / length if question.evidence else None
        start = len(forced) + len(question.prompt)
        forced += (*question.prompt, *question.answer)
        answers += (Answer(index, start, len(forced), exact, depth=depth),)
        if protocol == "multi-request":
            samples.append(Sample(forced, answers))
            forced, answers = (), ()
    return Sitting(task, protocol, number, episode.context, tuple(samples) or (Sample(forced, answers),))


def agreement_sittings(context: int, count: int, num_tokens: int, *, seed: int, vocab_size: int) -> list[Sitting]:
    """Random prompts, to be continued greedily by the full cache; see `force`.

    They share their first half, so that prefix sharing is judged too.
    """
    whole = sample_prompts(context, count, seed=seed, vocab_size=vocab_size)
    prompts = [np.concatenate([whole[0][: context // 2], prompt[context // 2 :]]) for prompt in whole]
    free = Sample((), (Answer(0, 0, num_tokens, exact=False, told=False),), num_tokens)
    return [Sitting(AGREEMENT, FORCED, i, tuple(p.tolist()), (free,)) for i, p in enumerate(prompts)]


def force(sitting: Sitting, outputs: Sequence[Sequence[int]]) -> Sitting:
    """The sitting with what was generated in each sample forced, for all strategies to be compared on it."""
    samples = (replace(s, forced=tuple(o), num_free=0) for s, o in zip(sitting.samples, outputs, strict=True))
    return replace(sitting, samples=tuple(samples))
