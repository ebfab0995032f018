"""What a model's attention does, found by running it: the hook is accepted only if it was seen to work.

Two short sequences go through the hooked model as one flat batch, with a plain dense attention behind the
hook. Every layer must call once, in order, with one shape of KV; and the logits must be those of the same
model with its own attention. A model that takes images is given one more sequence, with an image in it.
Architectures that keep attention tables of their own, hybrids with state-space layers, position biases and
attention sinks all show here, whatever they are called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvwise.core.errors import UnsupportedModel
from kvwise.models.config import one_line
from kvwise.models.hook import Splice, forward_model
from kvwise.models.loaded import LayerAttention
from kvwise.models.quiet import quiet
from kvwise.models.vision import Placed, Vision

LENGTHS = (7, 4)  # tokens of the two sequences
TOLERANCE = {
    torch.float32: 2e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 0.25,
}  # of the largest logit; a probe, not a proof


class ProbeBatch:
    """Dense causal attention over the probe's sequences; notes what each call brought."""

    def __init__(self, lengths: tuple[int, ...], current: Callable[[], nn.Module]) -> None:
        self._lengths = lengths
        self._current = current
        self.calls: list[tuple[int, LayerAttention]] = []
        self.value_dims: set[int] = set()

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See AttentionBatch."""
        num_query_heads, head_dim = queries.shape[1:]
        self.value_dims.add(values.shape[2])
        seen = LayerAttention(self._current(), num_query_heads, keys.shape[1], head_dim, scale, window, softcap)
        self.calls.append((layer, seen))
        parts = zip(*(torch.split(tensor, list(self._lengths)) for tensor in (queries, keys, values)), strict=True)
        return torch.cat([_dense(q, k, v, scale, window, softcap) for q, k, v in parts])


def vocab_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding: the token ids the model can read."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def probe(
    model: PreTrainedModel, install: Callable[[], None], name: str, vision: Vision | None = None
) -> tuple[LayerAttention, ...]:
    """Compares `model` before and after `install` hooked it: its layers, or UnsupportedModel."""
    sequences = _sequences(model, vision)
    plain = _run_plain(model, sequences, name)
    try:
        with quiet():
            install()
            batch, logits = _run_hooked(model, sequences, vision)
    except Exception as error:  # somebody's model code, called in a way it may not know
        raise UnsupportedModel(f"{_hooked(model, name)}: {one_line(error)}") from error
    layers = _check_calls(model, name, batch)
    difference = float((plain - logits).abs().max() / plain.abs().max().clamp_min(1e-6))
    if not difference <= TOLERANCE.get(model.dtype, 0.25):
        raise UnsupportedModel(
            f"{_hooked(model, name)}: with the hook its logits are off by {difference:.1%}, so its attention"
            " does something the hook does not see (position biases or attention sinks, for example)"
        )
    return layers


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens int64 [n] of one sequence, on the model's device, and the image in it."""

    tokens: Tensor
    placed: Placed | None = None

    def inputs(self) -> dict[str, Tensor]:
        """What transformers' own forward is given."""
        device = self.tokens.device
        inputs = {"input_ids": self.tokens[None]}
        if self.placed is not None:
            inputs |= {key: value.to(device) for key, value in self.placed.pictures[0].inputs.items()}
            if self.placed.positions is not None:
                ((start, stop),) = self.placed.spans
                kinds = torch.zeros_like(self.tokens)
                kinds[start:stop] = 1
                inputs["mm_token_type_ids"] = kinds[None]
        return inputs


def _sequences(model: PreTrainedModel, vision: Vision | None) -> list[_Sequence]:
    vocab, generator = vocab_size(model), torch.Generator().manual_seed(0)
    drawn = [torch.randint(vocab, (length,), generator=generator) for length in LENGTHS]
    if vision is None:
        return [_Sequence(tokens.to(model.device)) for tokens in drawn]
    drawn = [torch.where(tokens == vision.token, (tokens + 1) % vocab, tokens) for tokens in drawn]
    image = torch.randint(256, (48, 64, 3), generator=generator, dtype=torch.uint8).numpy()
    first = drawn[0].tolist()
    tokens, placed = vision.place([*first[:3], vision.token, *first[3:]], [vision.read(image)])
    shown = _Sequence(torch.tensor(tokens, device=model.device), placed)
    return [shown, *(_Sequence(tokens.to(model.device)) for tokens in drawn)]


def _run_plain(model: PreTrainedModel, sequences: list[_Sequence], name: str) -> Tensor:
    """Logits [T, V] of the model with its own attention, one sequence at a time."""
    try:
        with torch.inference_mode(), quiet():
            return torch.cat([model(**one.inputs(), use_cache=False).logits[0].float() for one in sequences])
    except Exception as error:  # somebody's model code, of somebody's config
        raise UnsupportedModel(f"{name} does not run with plain transformers: {one_line(error)}") from error


def _run_hooked(model: PreTrainedModel, sequences: list[_Sequence], vision: Vision | None) -> tuple[ProbeBatch, Tensor]:
    splice = None if vision is None else _splice(vision, sequences[0])
    stack: list[nn.Module] = []
    handles = [
        handle
        for module in model.modules()
        for handle in (
            module.register_forward_pre_hook(lambda module, args: stack.append(module)),
            module.register_forward_hook(lambda module, args, output: _pop(stack)),
        )
    ]
    # Attention is called from its module's own forward: the innermost module in progress made the call.
    batch = ProbeBatch(tuple(len(one.tokens) for one in sequences), lambda: stack[-1])
    tokens = torch.cat([one.tokens for one in sequences])
    positions = torch.cat([_positions(one, sequences[0]) for one in sequences], -1).to(model.device)
    try:
        logits = forward_model(model, tokens, positions, batch, splice)
    finally:
        for handle in handles:
            handle.remove()
    return batch, logits


def _splice(vision: Vision, shown: _Sequence) -> Splice:
    assert shown.placed is not None
    ((start, stop),) = shown.placed.spans
    rows = torch.arange(start, stop, device=shown.tokens.device)
    return Splice(rows, vision.features(shown.placed.pictures[0]))


def _positions(one: _Sequence, first: _Sequence) -> Tensor:
    """[n], or [3, n] if those of the first sequence, the one with an image, are."""
    if one.placed is not None and one.placed.positions is not None:
        return torch.from_numpy(one.placed.positions)
    plain = torch.arange(len(one.tokens))
    return plain if first.placed is None or first.placed.positions is None else plain.expand(3, -1)


def _pop(stack: list[nn.Module]) -> None:
    stack.pop()


def _check_calls(model: PreTrainedModel, name: str, batch: ProbeBatch) -> tuple[LayerAttention, ...]:
    config: Any = model.config.get_text_config()
    num_layers, called = config.num_hidden_layers, [layer for layer, _ in batch.calls]
    if called != list(range(num_layers)):
        raise UnsupportedModel(
            f"{_hooked(model, name)}: {len(set(called))} of its {num_layers} layers called the hook; the"
            " others keep attention or state of their own. docs/models.md lists what works"
        )
    layers = tuple(seen for _, seen in batch.calls)
    _check_windows(model, name, layers)
    shapes = {(layer.num_query_heads, layer.num_kv_heads, layer.head_dim) for layer in layers}
    if len(shapes) > 1 or batch.value_dims != {layers[0].head_dim}:
        raise UnsupportedModel(
            f"{_hooked(model, name)}: pages hold one shape, its layers (query heads, KV heads, head dim)"
            f" have {sorted(shapes)} and values of {sorted(batch.value_dims)}"
        )
    return layers


def _check_windows(model: PreTrainedModel, name: str, layers: tuple[LayerAttention, ...]) -> None:
    """What a short probe cannot see: a layer that looks back less far than it told the hook."""
    config: Any = model.config.get_text_config()
    for layer, kind in zip(layers, getattr(config, "layer_types", None) or (), strict=False):
        if kind != "full_attention" and not (kind == "sliding_attention" and layer.window is not None):
            raise UnsupportedModel(f"{_hooked(model, name)}: a layer has {kind!r} and told the hook no window")


def _hooked(model: PreTrainedModel, name: str) -> str:
    return f"the attention of {name} (model type {model.config.model_type!r}) cannot be hooked"


def _dense(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of one sequence from its start: [n, Hq, D], [n, H, D] -> [n, Hq, D]."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1).float(), values.repeat_interleave(groups, 1).float()
    scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    place = torch.arange(len(queries), device=queries.device)
    distance = place[:, None] - place[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(queries.dtype)
