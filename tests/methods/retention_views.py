"""Views made up for tests of retention methods: what an engine would show them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvwise.methods.retention.base import DecodeView, PromptView, Retention, Spans


def prompt_view(
    method: Retention, num_prompt: int, shape: tuple[int, int], *, num_outputs: int = 0, mass: Tensor | None = None,
    attention: Tensor | None = None, spans: Spans = (),
) -> PromptView:  # fmt: skip
    """A prompt and outputs computed again. `attention` [L, H, G, n, T] has all rows of the prompt; the last show."""
    num_tokens = num_prompt + num_outputs
    num_rows = method.observed_rows(num_prompt, spans)

    def rows(layer: int) -> Tensor:
        assert attention is not None and 0 < num_rows <= num_prompt == attention.shape[-2]
        return attention[layer, :, :, num_prompt - num_rows :]

    return PromptView(
        num_tokens, num_prompt, method.capacity(num_prompt), shape, torch.arange(num_tokens, dtype=torch.int32), mass,
        rows, unseen, unseen, spans,
    )  # fmt: skip


def unseen(layer: int) -> Tensor:
    """What a method of scores never looks at."""
    raise AssertionError("no keys or values are needed")


def decode_view(
    positions: Tensor, used: Tensor, num_tokens: list[int], limit: list[int], *, mass: Tensor | None = None,
    marks: list[int] | None = None,
) -> DecodeView:  # fmt: skip
    """Slots [B, L, H, S] of B requests, whose heads all have the same limit and marks."""
    each_head = positions.shape[:3]
    spread: Callable[[Tensor], Tensor] = lambda numbers: numbers[:, None, None].expand(each_head)  # noqa: E731
    return DecodeView(
        positions, mass, used, torch.tensor(num_tokens), spread(torch.tensor(limit)),
        spread(torch.tensor(marks or [0] * len(limit)).float()),
    )  # fmt: skip


def victims(method: Retention, view: DecodeView) -> Tensor:
    """The slot int64 [B, L, H] that an engine would take from every head: of those in use the least worth."""
    return method.worth(view).masked_fill(~view.used, torch.inf).argmin(-1)


def random_attention(
    num_tokens: int, shape: tuple[int, int], group: int, seed: int, *, num_outputs: int = 0, sharpness: float = 3.0
) -> Tensor:
    """Causal probabilities float32 [L, H, G, n, n + outputs] of random logits; no row sees the outputs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, group, num_tokens, num_tokens, generator=generator) * sharpness
    hidden = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.nn.functional.pad(weights, (0, num_outputs))


def kept_lists(mask: Tensor) -> list[list[list[int]]]:
    """Positions by layer and head."""
    return [[head.nonzero().flatten().tolist() for head in layer] for layer in mask]
