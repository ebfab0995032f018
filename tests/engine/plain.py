"""What transformers itself answers: the reference that lossless serving must equal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvwise.models import random
from kvwise.models.support import tiny_config

TIE = 1e-4  # logits closer than this may be ordered by rounding


@dataclass(frozen=True)
class Answer:
    """Greedy output tokens and the logits [N, V] they were taken from."""

    tokens: list[int]
    logits: Tensor

    def require(self, tokens: list[int]) -> None:
        """Fail unless `tokens` are the same, up to the first position that rounding alone decides."""
        assert len(tokens) == len(self.tokens)
        for i, (ours, theirs) in enumerate(zip(tokens, self.tokens, strict=True)):
            if ours != theirs:
                margin = float(self.logits[i, theirs] - self.logits[i, ours])
                assert margin < TIE, f"token {i}: {ours} instead of {theirs}, which leads by {margin:.6f}"
                return  # what follows different tokens differs


class Plain:
    """A tiny random model of one architecture, not hooked."""

    def __init__(self, architecture: str) -> None:
        self.model = random.build(tiny_config(architecture), 0, lambda num: None)
        self.model.generation_config.eos_token_id = None
        self._answers: dict[tuple[tuple[int, ...], int], Answer] = {}

    def answer(self, prompt: list[int], num_tokens: int) -> Answer:
        """Greedy `generate` of one prompt; the end-of-sequence token does not end it."""
        key = (tuple(prompt), num_tokens)
        if key not in self._answers:
            ids = torch.tensor([prompt])
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            self._answers[key] = Answer(found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits))
        return self._answers[key]
