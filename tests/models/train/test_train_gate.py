"""The gate judges right, and its errors are honest."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kvwise.models.train.gate import CARD_TASKS, MIN_CONTEXTS, Mark, falls_below, max_contexts, measure
from kvwise.models.train.rows import MAX_QUESTIONS
from kvwise.tasks.token_language import FIRST_KEY, KEY, QUERY, TokenLanguage

LANGUAGE = TokenLanguage(192)


class Oracle(nn.Module):
    """Answers recall by reading the text; gives the last pair's value with `wrong` keys."""

    device = torch.device("cpu")

    def __init__(self, wrong: float = 0.0) -> None:
        super().__init__()
        self.wrong = wrong
        self.longest_pass = 0

    def model(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        """The "hidden state" is the logits."""
        self.longest_pass = max(self.longest_pass, tokens.numel())
        logits = torch.zeros(*tokens.shape, LANGUAGE.vocab_size)
        for row, out in zip(tokens.tolist(), logits, strict=True):
            said = {row[i + 1]: row[i + 2] for i in range(len(row) - 2) if row[i] == KEY}
            for i in range(len(row) - 1):
                if row[i] == QUERY and row[i + 1] in said:
                    out[i + 1, self.value(said, row[i + 1])] = 9.0
        return type("Output", (), {"last_hidden_state": logits})

    def value(self, said: dict[int, int], key: int) -> int:
        right = (key - FIRST_KEY) % 100 >= 100 * self.wrong
        return said[key] if right else (said[key] - FIRST_KEY + 1) % LANGUAGE.num_symbols + FIRST_KEY

    def lm_head(self, states: torch.Tensor) -> torch.Tensor:
        return states


def recall(model: Oracle, answers: int = 200, seed: int = 0) -> Mark:
    return measure(model, LANGUAGE, {"recall": CARD_TASKS["recall"]}, {100: True}, answers, seed)[0]


def test_a_model_that_knows_is_right_and_its_error_is_not_zero() -> None:
    mark = recall(Oracle())
    assert mark.accuracy == 1.0
    assert mark.num_answers >= 200
    assert 0 < mark.error < 0.02
    assert mark.nll == pytest.approx(math.log(1 + (LANGUAGE.vocab_size - 1) * math.exp(-9)), rel=1e-4)


def test_wrong_answers_are_counted() -> None:
    keys = min(32, LANGUAGE.num_symbols)
    share = sum(i < keys / 2 for i in range(LANGUAGE.num_symbols)) / LANGUAGE.num_symbols
    mark = recall(Oracle(wrong=keys / 200), answers=1000)
    assert mark.accuracy == pytest.approx(1 - share, abs=4 * mark.error)
    assert 0.005 < mark.error < 0.03


def test_equal_arguments_ask_equal_questions() -> None:
    first, again, other = (recall(Oracle(wrong=0.3), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.accuracy != other.accuracy


def test_a_task_with_one_question_a_context_is_bounded_by_contexts() -> None:
    found = measure(Oracle(), LANGUAGE, {"needle": CARD_TASKS["needle"]}, {64: True, 700: False}, answers=400)
    assert [mark.num_answers for mark in found] == [400, max_contexts(700)]
    assert [mark.trained for mark in found] == [True, False]
    assert max_contexts(700) == 146
    assert max_contexts(100_000) == MIN_CONTEXTS


def test_a_task_without_right_answers_has_a_loss_only() -> None:
    mark = measure(Oracle(), LANGUAGE, {"continuation": CARD_TASKS["continuation"]}, {64: True}, answers=5)[0]
    assert mark.accuracy is None
    assert mark.error is None
    assert mark.nll == pytest.approx(math.log(LANGUAGE.vocab_size), rel=1e-4)


def test_what_falls_below_the_card_is_three_errors_below_it() -> None:
    card = Mark("recall", 64, True, 400, 1.0, 0.01, 0.0, 0.0)
    found = [dataclasses.replace(card, accuracy=accuracy) for accuracy in (0.99, 0.96, 0.95)]
    assert [falls_below(mark, card) for mark in found] == [False, False, True]
    assert not falls_below(card, found[2])


def test_answers_of_one_context_are_not_taken_for_independent() -> None:
    """With whole contexts right or wrong, the error is that of the number of contexts."""
    from kvwise.models.train.gate import _error

    right, asked = np.array([20.0, 0.0] * 10), np.full(20, 20.0)
    assert _error(right, asked, 0.5) == pytest.approx(0.5 / math.sqrt(19), rel=0.01)
    assert MAX_QUESTIONS >= 20
