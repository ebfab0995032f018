"""Native `fold` and `merge_folded`."""

import torch
from torch import Tensor

from kvwise import _native
from kvwise.core.errors import UsageError
from kvwise.kernels.cpu_sealed import CpuSealing, call
from kvwise.kernels.folded import FoldedStates


class CpuFolding(CpuSealing):
    """They read the weights of the maps: a kind of `Maps` with other functions is the reference's."""

    def fold(
        self, states: FoldedStates, rows: Tensor, layers: Tensor, heads: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """See `Kernels.fold`."""
        shape = (len(rows), states.values.shape[-1])
        if keys.shape != shape or values.shape != shape or layers.shape != rows.shape or heads.shape != rows.shape:
            raise UsageError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be {shape}, of {len(rows)} rows,"
                f" {len(layers)} layers, {len(heads)} heads"
            )
        places = [part.to(torch.int64).contiguous() for part in (rows, layers, heads)]
        tokens = [part.float().contiguous() for part in (keys, values)]
        call(
            _native.fold,
            self._instruction_set,
            states.native_fields,
            *(part.data_ptr() for part in (*places, *tokens)),
            len(rows),
            self._threads,
        )

    def merge_folded(
        self, states: FoldedStates, layer: int, rows: Tensor, queries: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """See `Kernels.merge_folded`."""
        shape = (len(rows), *states.maps.query_in.shape[1:3])
        if queries.shape != shape or out.shape != shape or lse.shape != shape[:2]:
            raise UsageError(
                f"queries {tuple(queries.shape)} and out {tuple(out.shape)} must be {shape}, lse {tuple(lse.shape)}"
                f" {shape[:2]}"
            )
        asked = queries.float()
        if asked.stride(2) != 1:
            asked = asked.contiguous()
        rows, answers, lse = rows.to(torch.int64).contiguous(), out.float().contiguous(), lse.float().contiguous()
        merged = torch.empty_like(answers)
        call(
            _native.merge_folded,
            self._instruction_set,
            states.native_fields,
            layer,
            rows.data_ptr(),
            len(rows),
            asked.data_ptr(),
            asked.stride(0),
            asked.stride(1),
            answers.data_ptr(),
            lse.data_ptr(),
            merged.data_ptr(),
            self._threads,
        )
        return merged.to(out.dtype)
