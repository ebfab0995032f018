"""Training rows: what is marked as an answer is one, and can be known when it is asked for."""

import numpy as np
import pytest

from kvwise.models.train.recipe import RECIPES
from kvwise.models.train.rows import MAX_QUESTIONS, SPREADABLE, TASKS, make_batch, make_row
from kvwise.tasks.token_language import (
    CONTINUE,
    COUNT,
    FIRST_FILLER,
    FIRST_WORD,
    GROUP_SIZE,
    KEY,
    LINK,
    NUM_FILLER,
    PASSAGE,
    QUERY,
    TRACE,
    TokenLanguage,
)

LANGUAGE = TokenLanguage(512)


def rows(kind: str, count: int = 30) -> list[tuple[list[int], list[bool]]]:
    """Tokens and answer marks of rows of several lengths."""
    made = []
    for seed in range(count):
        row = make_row(np.random.default_rng(seed), LANGUAGE, kind, (64, 200)[seed % 2])
        made.append((row.tokens.tolist(), row.answers.tolist()))
    return made


def expected(tokens: list[int], place: int, size: int) -> list[int]:
    """The answer to the question that ends before `place`, read off the text before it."""
    before = tokens[:place]
    if before[-2] == QUERY:
        said = [i for i in range(len(before) - 2) if before[i] == KEY and before[i + 1] == before[-1]]
        return before[said[-1] + 2 :][:size]
    if before[-2] == TRACE:
        chain = [before[-1]]
        for i in range(len(before) - 2):
            if before[i] == LINK and before[i + 1] == chain[-1]:
                chain.append(before[i + 2])
        return chain[1:]
    if before[-2] == COUNT:
        group = range(before[-1], before[-1] + GROUP_SIZE)
        assert (before[-1] - FIRST_WORD) % GROUP_SIZE == 0
        # Questions and answers name words too: the text is what comes before the first question.
        text = before[: before.index(COUNT)]
        return [max(group, key=text.count)]
    assert before[-3] == CONTINUE
    said = [i for i in range(len(before) - 3) if before[i] == PASSAGE and before[i + 1 : i + 3] == before[-2:]]
    return before[said[-1] + 3 :][:size]


def answers(marks: list[bool]) -> list[tuple[int, int]]:
    """Where runs of marks begin, and how long they are."""
    edges = np.flatnonzero(np.diff([False, *marks, False]))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("kind", TASKS)
def test_every_answer_can_be_read_off_the_text_before_it(kind: str) -> None:
    for tokens, marks in rows(kind):
        found = answers(marks)
        assert 1 <= len(found) <= MAX_QUESTIONS
        for place, size in found:
            assert tokens[place : place + size] == expected(tokens, place, size)


@pytest.mark.parametrize("kind", SPREADABLE)
def test_half_of_the_rows_ask_while_the_text_goes_on(kind: str) -> None:
    spread = [marks for _, marks in rows(kind) if answers(marks)[0][0] < 0.6 * len(marks)]
    assert 8 <= len(spread) <= 22


def test_a_question_never_stands_inside_another_statement() -> None:
    for tokens, _ in rows("multi_value"):
        for place, token in enumerate(tokens):
            if token == KEY:
                assert min(tokens[place + 1 : place + 6]) >= FIRST_WORD


def test_repeated_text_is_marked_where_it_can_be_known() -> None:
    for tokens, marks in rows("repeat"):
        first = marks.index(True)
        period = first - 1
        assert all(tokens[i] == tokens[i - period] for i, mark in enumerate(marks) if mark)
        assert len(set(tokens[1:first])) == period


def test_filler_and_answers_are_different_tokens() -> None:
    for kind in TASKS:
        row = make_row(np.random.default_rng(0), LANGUAGE, kind, 100)
        assert not (row.filler & row.answers).any()
        assert ((row.tokens[row.filler] >= FIRST_FILLER) & (row.tokens[row.filler] < FIRST_FILLER + NUM_FILLER)).all()


def test_padding_carries_no_loss() -> None:
    batch = make_batch(np.random.default_rng(0), LANGUAGE, RECIPES["small"].mix, 100, 24)
    assert len(set(batch.kinds)) > 3
    assert batch.tokens.shape == batch.answers.shape == batch.filler.shape
    padding = batch.tokens == 0
    padding[:, 0] = False  # the begin token
    assert padding.any()
    assert not (padding & (batch.answers | batch.filler)).any()


def test_equal_seeds_give_equal_batches() -> None:
    first, again, other = (
        make_batch(np.random.default_rng(seed), LANGUAGE, RECIPES["base"].mix, 64, 8) for seed in (1, 1, 2)
    )
    assert first.kinds == again.kinds
    assert (first.tokens == again.tokens).all()
    assert first.tokens.shape != other.tokens.shape or not (first.tokens == other.tokens).all()
