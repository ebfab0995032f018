"""How the layers of a model rotate keys by position, found by running it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvwise.core.errors import UnsupportedModel
from kvwise.kernels.base import Kernels
from kvwise.models.hook import forward
from kvwise.models.loaded import LoadedModel

STEP = 7  # positions between the two tokens of the probe
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}  # of the largest number of a key
GROWING = ("dynamic", "longrope")  # scalings whose frequencies depend on the length of the text


@dataclass(frozen=True, slots=True)
class Rotation:
    """Inverse frequencies float64 [n] of a layer, whose keys' first 2 n channels are rotated; none if n is 0."""

    inv_freq: Tensor
    interleaved: bool = False


class _Keys:
    """Each token is a sequence of its own: its attention is its value, whatever its position. Notes the keys."""

    def __init__(self) -> None:
        self.by_layer: dict[int, Tensor] = {}

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """See AttentionBatch."""
        self.by_layer[layer] = keys.clone()
        return values.repeat_interleave(queries.shape[1] // keys.shape[1], 1)


def find_rotations(loaded: LoadedModel, kernels: Kernels) -> tuple[Rotation, ...]:
    """The rotation of every layer, seen to turn the key of one position into that of another.

    UnsupportedModel if a layer's keys are not a rotation of each other, or its frequencies change with the text.
    """
    config = loaded.config.get_text_config()
    scaling = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or "")
    for kind in (*(f"'{name}'" for name in GROWING), "mrope_section"):
        if kind in scaling:
            raise UnsupportedModel(f"{loaded.name} rotates by more than a token's position ({kind.strip(chr(39))})")
    tokens = torch.full((2,), loaded.vocab_size // 2, device=loaded.device)
    batch = _Keys()
    forward(loaded, tokens, torch.tensor([0, STEP], device=loaded.device), batch, tokens[:0])
    candidates = list(_candidates(loaded))
    found = []
    for layer, keys in sorted(batch.by_layer.items()):
        near = [c for c in candidates if _explains(c, keys, kernels, TOLERANCE[loaded.dtype])]
        if not near:
            raise UnsupportedModel(f"layer {layer} of {loaded.name} does not rotate its keys by their position")
        found.append(near[0])
    return tuple(found)


def _candidates(loaded: LoadedModel) -> Iterator[Rotation]:
    yield Rotation(torch.zeros(0, dtype=torch.float64, device=loaded.device))  # no positions at all
    for module in loaded.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.startswith("original"):
                yield Rotation(buffer.double())
                yield Rotation(buffer.double(), interleaved=True)


def _explains(candidate: Rotation, keys: Tensor, kernels: Kernels, tolerance: float) -> bool:
    first, later = keys[0].float(), keys[1].float()
    if 2 * len(candidate.inv_freq) > first.shape[-1]:
        return False
    turned = first
    if len(candidate.inv_freq):
        delta = torch.full((len(first),), STEP, device=first.device)
        turned = kernels.rotate(first, delta, candidate.inv_freq, interleaved=candidate.interleaved)
    return bool((turned - later).abs().max() <= tolerance * later.abs().max())
