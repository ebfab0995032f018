"""What LESS learns from: texts, and in each layer what rows of them lose when most tokens have left."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.methods.retention.base import PromptView
from kvwise.methods.retention.h2o import H2O
from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel
from kvwise.models.train.recipe import RECIPES
from kvwise.models.train.rows import make_row
from kvwise.tasks.token_language import TokenLanguage

BUDGETS = (0.05, 0.1, 0.2, 0.3)  # one is drawn for each text: the maps are to serve all of them
NUM_ROWS = 64  # of a text that are looked at


@dataclass(frozen=True, slots=True)
class Rows:
    """W rows of one text in one layer, after its cache was cut.

    queries [Hq, W, D], keys and values [H, T, D] of the whole text, `logits` [Hq, W, T] (scaled, -inf where a row may
    not look), `kept` bool [H, W, T], the row's own token among it, `gone` those before it that have left, and `out`
    [Hq, W, D] with the full cache.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    kept: Tensor
    gone: Tensor
    out: Tensor


def texts(
    loaded: LoadedModel, file: Path | None, length: int, rng: np.random.Generator
) -> tuple[str, Iterator[Tensor]]:
    """Texts of about `length` tokens without end, int64 [T], and what they are, in words.

    Pieces of `file`, or new rows of its tasks for a model of the built-in kind; or else random tokens.
    """
    if file is not None:
        return f"pieces of {file.name}", _pieces(_read(loaded, file, length), length, rng)
    if loaded.speaks_tokens:
        return "new rows of the model's tasks", _task_rows(loaded, length, rng)
    return "random tokens, which tell little of a text: give one with --text", _random_tokens(loaded, length, rng)


def _read(loaded: LoadedModel, file: Path, length: int) -> Tensor:
    try:
        tokens = torch.tensor(loaded.tokenizer.encode(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {file} cannot be read as UTF-8 text ({error})") from error
    if len(tokens) < length:
        raise UsageError(f"--text {file} has {len(tokens)} tokens: at least one piece of --length {length} is needed")
    return tokens


def _pieces(tokens: Tensor, length: int, rng: np.random.Generator) -> Iterator[Tensor]:
    while True:
        first = int(rng.integers(0, len(tokens) - length + 1))
        yield tokens[first : first + length]


def _task_rows(loaded: LoadedModel, length: int, rng: np.random.Generator) -> Iterator[Tensor]:
    language, mix = TokenLanguage(loaded.vocab_size), RECIPES["medium"].mix
    shares = np.array(list(mix.values())) / sum(mix.values())
    while True:
        yield torch.from_numpy(make_row(rng, language, str(rng.choice(list(mix), p=shares)), length).tokens)


def _random_tokens(loaded: LoadedModel, length: int, rng: np.random.Generator) -> Iterator[Tensor]:
    while True:
        yield torch.from_numpy(rng.integers(0, loaded.vocab_size, length))


def rows_of(loaded: LoadedModel, tokens: Tensor, rng: np.random.Generator) -> list[Rows]:
    """Run one text through the model and cut its cache: what each layer's rows see then and would have seen."""
    num_tokens = len(tokens)
    num_prompt = int(rng.integers(num_tokens // 2, 3 * num_tokens // 4 + 1))
    count = min(NUM_ROWS, num_tokens - num_prompt)
    at = np.sort(rng.choice(np.arange(num_prompt, num_tokens), count, replace=False))
    watch = _Watch(torch.from_numpy(at).to(loaded.device), H2O(float(rng.choice(BUDGETS))), num_prompt)
    place = torch.arange(num_tokens, device=loaded.device)
    forward(loaded, tokens.to(loaded.device), place, watch, place[:0])
    # Copies: tensors of a forward pass, which runs in inference mode, cannot be learned from.
    return [Rows(*(getattr(rows, part.name).clone() for part in fields(Rows))) for rows in watch.found]


@dataclass(slots=True)
class _Watch:
    """Attends with the full cache and notes the rows `at`, whose prompt was cut to the policy's budget."""

    at: Tensor
    policy: H2O
    num_prompt: int
    found: list[Rows] = field(default_factory=list)

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        queries_by_head, keys_by_head, values_by_head = (t.float().transpose(0, 1) for t in (queries, keys, values))
        num_heads, num_tokens = keys_by_head.shape[:2]
        group = len(queries_by_head) // num_heads
        logits = queries_by_head @ keys_by_head.repeat_interleave(group, 0).transpose(1, 2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        place = torch.arange(num_tokens, device=keys.device)
        distance = place[:, None] - place
        logits.masked_fill_((distance < 0) | (distance >= (window or num_tokens)), -torch.inf)
        attention = logits.softmax(-1)
        out = attention @ values_by_head.repeat_interleave(group, 0)
        kept = self._kept(attention.unflatten(0, (num_heads, group)).sum(1))  # type: ignore[no-untyped-call]
        gone = ~kept & (distance[self.at] > 0)
        self.found.append(
            Rows(
                queries_by_head[:, self.at],
                keys_by_head,
                values_by_head,
                logits[:, self.at],
                kept,
                gone,
                out[:, self.at],
            )
        )
        return out.transpose(0, 1).to(queries.dtype)

    def _kept(self, attention: Tensor) -> Tensor:
        """bool [H, W, T]: what the policy keeps of the tokens before each row by what rows before it told, and itself.

        `attention` [H, T, T] is summed over the query heads of each KV head.
        """
        mass = attention.cumsum(1)
        capacity = self.policy.capacity(self.num_prompt)
        kept = torch.zeros_like(mass[:, self.at], dtype=torch.bool)
        positions = torch.arange(mass.shape[-1], dtype=torch.int32, device=mass.device)
        for number, row in enumerate(self.at.tolist()):
            view = PromptView(
                row, row, capacity, (1, len(mass)), positions[:row], mass[None, :, row - 1, :row],
                _unseen, _unseen, _unseen,
            )  # fmt: skip
            kept[:, number, :row] = self.policy.keep(view).mask[0]
            kept[:, number, row] = True
        return kept


def _unseen(layer: int) -> Tensor:
    raise AssertionError("H2O ranks by mass alone")
