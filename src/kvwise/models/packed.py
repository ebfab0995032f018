"""Linear layers with weights in oneDNN's blocked layout: on a CPU, float32 products 1.2-2.8 times as fast.

Torch sends float32 products to MKL, which leaves AVX-512 unused on some CPUs and packs the weights anew in every
call. oneDNN blocks them once. Module by module the weights are replaced, not copied: memory stays the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Below this many weights the call costs more (10 us) than the product gains.
MIN_WEIGHTS = 1 << 17
# A hint of how many rows come; measured, the layout chosen for it is the best for any number of rows.
_ROWS_HINT = 16


class PackedLinear(nn.Module):
    """`nn.Linear` on a blocked weight, for inference: [..., in_features] float32 -> [..., out_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach(), _ROWS_HINT)
        self._product = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:
        """A plain copy of the weight [out_features, in_features], made at each access."""
        dense: Tensor = self._packed.to_dense()
        return dense

    def forward(self, rows: Tensor) -> Tensor:
        """rows @ weight.T + bias."""
        out: Tensor = self._product(rows, self._packed, self.bias, "none", [], "")
        return out


def pack(model: nn.Module) -> int:
    """Replaces the large float32 linear layers of a model on the CPU; how many. Tied weights stay as they are."""
    if not can_pack():
        return 0
    count = 0
    uses = _uses(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in (nn.Linear, Conv1D) or not _fits(child.weight, uses):
                continue
            weight: Any = child.weight
            # Conv1D is a linear layer whose weight is stored the other way round.
            dense = weight.t().contiguous() if isinstance(child, Conv1D) else weight
            setattr(parent, name, PackedLinear(dense, child.bias))  # type: ignore[arg-type]
            count += 1
    return count


def can_pack() -> bool:
    """Whether this build of torch has the operators (inductor's own, not a documented interface) and they work here."""
    weight, rows = torch.eye(16), torch.arange(32.0).view(2, 16)
    try:
        with torch.inference_mode():
            return bool(torch.equal(PackedLinear(weight, None)(rows), rows))
    except (AttributeError, RuntimeError):  # another torch, or another processor
        return False


def _uses(model: nn.Module) -> dict[int, int]:
    """How many modules hold each weight, by address."""
    uses: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            uses[weight.data_ptr()] = uses.get(weight.data_ptr(), 0) + 1
    return uses


def _fits(weight: Any, uses: dict[int, int]) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return plain and weight.numel() >= MIN_WEIGHTS and uses[weight.data_ptr()] == 1
