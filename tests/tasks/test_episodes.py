"""What every task promises of every episode, in every language."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwise.core.errors import TaskError
from kvwise.tasks.base import Episode, Task
from kvwise.tasks.catalogue import parse_task, tasks
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.token_language import TokenLanguage
from tests.tasks.readers import answer_in_text, answer_in_tokens
from tests.tasks.speakers import TEXT, TOKEN, speaker

EXACT = [name for name, task in tasks().items() if task.exact]
OTHERS = [
    "needle(depth=0)",
    "needle(depth=0.5)",
    "needle(depth=1.0)",
    "multi_value(num_values=1)",
    "copy(num_symbols=3)",
]
VARIANTS = [
    "counting(num_words=8, share=0.3)",
    "tracking(fewest=1, most=1)",
    "forgetting(most=1)",
    "early_fact(num_facts=1)",
]


def make(task: str | Task, language: str, length: int, seed: int = 0) -> Episode:
    task = parse_task(task) if isinstance(task, str) else task
    return task.episode(np.random.default_rng(seed), speaker(language), length)


def check(name: str, language: str, length: int, seed: int) -> Episode:
    episode = make(name, language, length, seed)
    assert len(episode.context) == length
    assert episode.questions
    assert episode.context[: len(speaker(language).begin)] == speaker(language).begin
    for question in episode.questions:
        right(language, episode.context, question.prompt, question.answer)
        evidence = tuple(episode.context[i] for i in question.evidence)
        assert len(set(question.evidence)) == len(evidence)
        holds(name, language, evidence, question.answer)
    apart(episode)
    return episode


def right(language: str, context: tuple[int, ...], prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
    """The answer is what an independent reader of the context finds."""
    spoken = speaker(language)
    if isinstance(spoken, TokenLanguage):
        assert answer_in_tokens(context, prompt, spoken.vocab_size) == answer
    else:
        assert isinstance(spoken, TextLanguage)
        read = spoken._decode
        assert read(answer).strip() == answer_in_text(read(context[1:]), read(prompt))


def holds(name: str, language: str, evidence: tuple[int, ...], answer: tuple[int, ...]) -> None:
    """The evidence is the answer, word for word; links stand apart, and what is counted comes several times."""
    if name.startswith("counting"):
        assert len(evidence) > len(answer)
        assert evidence == answer * (len(evidence) // len(answer))
    elif name.startswith("tracking") and language in TEXT:
        comma = speaker(language)._piece(",")
        assert evidence == tuple(token for token in answer if (token,) != comma)
    else:
        assert evidence == answer


def apart(episode: Episode) -> None:
    """No two questions ask for the same fact, and none says what another asks for."""
    prompts = [question.prompt for question in episode.questions]
    assert len(set(prompts)) == len(prompts)
    places = [place for question in episode.questions for place in question.evidence]
    assert len(set(places)) == len(places)
    for i, question in enumerate(episode.questions):
        for other in episode.questions[:i] + episode.questions[i + 1 :]:
            assert not inside(question.answer, (*other.prompt, *other.answer))


def inside(part: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


@pytest.mark.parametrize("language", TOKEN)
@pytest.mark.parametrize("name", [*EXACT, *OTHERS, *VARIANTS])
def test_the_answer_follows_from_the_context(name: str, language: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(32, 2048), st.integers(0, 2**32))
    def run(length: int, seed: int) -> None:
        check(name, language, length, seed)

    run()


@pytest.mark.parametrize("language", TEXT)
@pytest.mark.parametrize("name", [*EXACT, *OTHERS, *VARIANTS])
def test_the_answer_follows_from_the_text(name: str, language: str) -> None:
    @settings(max_examples=5, deadline=None)
    @given(st.integers(1024, 2048), st.integers(0, 2**32))
    def run(length: int, seed: int) -> None:
        check(name, language, length, seed)

    run()


@pytest.mark.parametrize("language", [*TOKEN, *TEXT])
@pytest.mark.parametrize("name", tasks())
def test_the_seed_makes_the_episode(name: str, language: str) -> None:
    once, again, other = (make(name, language, 1024, seed) for seed in (5, 5, 6))
    assert once == again
    assert once != other


@pytest.mark.parametrize("language", [*TOKEN, *TEXT])
@pytest.mark.parametrize("name", tasks())
@pytest.mark.parametrize("length", [-1, 0, 1, 6])
def test_a_context_too_short_is_refused(name: str, language: str, length: int) -> None:
    if name == "continuation" and length == 6:
        assert len(make(name, language, length).context) == length
        return
    with pytest.raises(TaskError, match=rf"context of {length} tokens is too short .* at least \d+"):
        make(name, language, length)


@pytest.mark.parametrize("name", EXACT)
def test_the_length_that_an_error_names_is_enough(name: str) -> None:
    with pytest.raises(TaskError) as error:
        make(name, "token-512", 6)
    needed = int(str(error.value).split()[-1])
    assert len(make(name, "token-512", needed).context) == needed
    with pytest.raises(TaskError):
        make(name, "token-512", needed - 1)


def test_continuation_goes_on_as_the_filler_does() -> None:
    episode = make("continuation(num_tokens=40)", "token-512", 100, seed=3)
    (question,) = episode.questions
    assert (question.prompt, question.evidence) == ((), ())
    language = speaker("token-512")
    filler = language.filler(np.random.default_rng(3), 139)
    assert (*language.begin, *filler) == (*episode.context, *question.answer)
    assert len(question.answer) == 40


@pytest.mark.parametrize(("depth", "place"), [(0, 1), (0.5, 250), (1, 494)])
def test_a_needle_stands_at_its_depth(depth: float, place: int) -> None:
    episode = make(f"needle(depth={depth})", "token-512", 500)
    assert episode.context.index(1) == pytest.approx(place, abs=4)
    assert episode.questions[0].evidence[-1] < 500


def test_early_facts_open_the_conversation() -> None:
    for language in ("token-512", "text-bytes"):
        episode = make("early_fact", language, 1024)
        assert max(max(question.evidence) for question in episode.questions) < 300
        assert len(episode.questions) == 4


def test_keys_are_assigned_again_before_the_last_value() -> None:
    context = make("forgetting", "token-512", 2048).context
    keys = [context[i + 1] for i, token in enumerate(context) if token == 1]
    assert max(keys.count(key) for key in keys) == 3
    assert len(set(keys)) < len(keys)


def test_facts_take_about_a_fifth_of_the_context() -> None:
    for length in (256, 1024):
        said = sum(token >= 64 or token < 16 for token in make("recall", "token-1024", length).context)
        assert 0.15 < said / length < 0.22


@pytest.mark.parametrize("name", tasks())
def test_a_small_vocabulary_is_enough_for_long_contexts(name: str) -> None:
    episode = parse_task(name).episode(np.random.default_rng(0), TokenLanguage(128), 2048)
    assert len(episode.context) == 2048
    assert max(episode.context) < 128


def test_vocabulary_limits() -> None:
    with pytest.raises(TaskError, match="at least 128 token ids, not 127"):
        TokenLanguage(127)
    with pytest.raises(TaskError, match="33 different values are needed and the language has 32"):
        parse_task("needle(num_values=33)").episode(np.random.default_rng(0), TokenLanguage(128), 2048)
    for language in ("token-512", "text-bytes"):
        with pytest.raises(TaskError, match="9 different words of a group are needed and the language has 8"):
            make("counting(num_words=9)", language, 2048)
        with pytest.raises(TaskError, match="different values are needed"):
            make("copy(num_symbols=99999)", language, 2048)
        with pytest.raises(TaskError, match="different keys are needed"):
            make("early_fact(num_facts=99999)", language, 2048)


@dataclass(frozen=True)
class Pin:
    name: str
    digest: str


# The shipped model has learned these layouts: a change here makes its weights worthless.
PINS = [
    Pin("recall", "01e8c781d2cf7cff"),
    Pin("multi_value", "d0bbd747800a2120"),
    Pin("tracking", "57f222c8464af19b"),
    Pin("forgetting", "24b70a81add7b020"),
    Pin("counting", "29fad4ef63ed78b9"),
    Pin("copy", "77cb98ec672a5b8d"),
    Pin("needle", "7a24a0780b7206ca"),
    Pin("early_fact", "4729d3c408b67df3"),
    Pin("continuation", "c016e2d8c6c8ddfa"),
]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_the_layout_that_the_model_was_trained_on(pin: Pin) -> None:
    episodes = [make(pin.name, language, length, 7) for language in TOKEN for length in (64, 512)]
    assert digest(*episodes) == pin.digest


def test_the_filler_is_the_same_in_every_process() -> None:
    assert digest(speaker("token-512").filler(np.random.default_rng(0), 5000)) == "2ad6c93d73da534d"
    assert speaker("token-512").filler(np.random.default_rng(1), 99) == speaker("token-1024").filler(
        np.random.default_rng(1), 99
    )


def test_filler_longer_than_the_stored_text_goes_round() -> None:
    filler = speaker("token-512").filler(np.random.default_rng(0), 1_200_000)
    assert len(filler) == 1_200_000
    assert filler[: 1_200_000 - (1 << 20)] == filler[1 << 20 :]
