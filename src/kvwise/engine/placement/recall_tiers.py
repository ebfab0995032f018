"""The two memories of recall and the links between them: pages go to the host, rows come back."""

from collections.abc import Sequence
from concurrent.futures import Future, wait

import numpy as np
import torch
from torch import Tensor

from kvwise.engine.placement.staging import Int64, Staged, Staging
from kvwise.kernels.base import Kernels
from kvwise.tiers.arena import Arena
from kvwise.tiers.link import Link


class RecallTiers:
    """Device and host arenas of one layout. Knows bytes, pages and slots, and nothing of requests."""

    def __init__(
        self, device: Arena, host: Arena, kernels: Kernels, host_kernels: Kernels, fetch_link: Link, store_link: Link
    ) -> None:
        self.layout = device.layout
        self.device = device
        self.host = host
        self.kernels = kernels
        self.host_kernels = host_kernels
        self._staging_kernels = host_kernels if device.keys.device.type == "cpu" else kernels
        self._fetch_link = fetch_link
        self._store_link = store_link
        self.staging = Staging(self.layout, device.keys.dtype, device.keys.device)
        self.num_runs = 0  # pieces of host memory, K and V apart, that were fetched each as a whole
        self._fetches: list[Future[None]] = []  # those that may not have ended

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token in one head."""
        return 2 * self.layout.head_dim * self.host.keys.element_size()

    def begin_store(self, source: Tensor, target: Tensor) -> "Future[None]":
        """Copy device pages int64 [n] to host pages [n], over the link."""
        num_bytes = source.numel() * self.layout.page_bytes
        return self._store_link.begin(lambda: self._copy_to_host(source, target), num_bytes)

    def _copy_to_host(self, source: Tensor, target: Tensor) -> None:
        for device, host in ((self.device.keys, self.host.keys), (self.device.values, self.host.values)):
            if device.device == host.device:
                self.host_kernels.copy_pages(device, source, host, target)
            else:
                host[target] = device[source.to(device.device)].to(host.device)

    def begin_store_rows(self, keys: Tensor, values: Tensor, slots: Int64) -> "Future[None]":
        """Copy rows [n, D] from the device to host slots int64 [n] (page space), over the link."""
        target = torch.from_numpy(slots)

        def transfer() -> None:
            for rows, host in ((keys, self.host.keys), (values, self.host.values)):
                self.host_kernels.scatter(rows.to(host.device, host.dtype), host, target)

        return self._store_link.begin(transfer, len(slots) * self.row_bytes)

    def begin_fetch(self, staged: Sequence[Staged]) -> "Future[None]":
        """Move rows within the staging pages and bring others from the host over the link: one transfer for all."""
        move_from, move_to, fetch_from, fetch_to = (
            torch.from_numpy(np.concatenate(slots))
            for slots in zip(*((s.move_from, s.move_to, s.fetch_from, s.fetch_to) for s in staged), strict=True)
        )
        self.num_runs += 2 * (int((fetch_from.diff() != 1).sum()) + 1) if len(fetch_from) else 0

        def transfer() -> None:
            staging, place = self.staging, self.device.keys.device
            moves, into = (slots.to(place) for slots in (move_from, move_to))
            for host, arena in ((self.host.keys, staging.keys), (self.host.values, staging.values)):
                moved = self._staging_kernels.gather(arena, moves)
                self._staging_kernels.scatter(moved, arena, into)
                fetched = self.host_kernels.gather(host, fetch_from)
                self._staging_kernels.scatter(fetched.to(place), arena, fetch_to.to(place))

        arrival = self._fetch_link.begin(transfer, len(fetch_from) * self.row_bytes)
        self._fetches = [f for f in self._fetches if not f.done()] + [arrival]
        return arrival

    def finish_fetches(self) -> None:
        """Wait until no transfer writes to the staging pages or reads the host's; whether one failed is not asked."""
        wait(self._fetches)

    def take_pages(self, num_pages: int) -> Int64:
        """Staging pages int64 [n]. Before the staging memory is replaced by more, what is on its way must arrive."""
        if num_pages > self.staging.num_free:
            self.finish_fetches()
        return self.staging.take(num_pages)

    def permute(self, source: Int64, target: Int64) -> None:
        """Rows at host slots `source` lie at `target` afterwards; all are read before any is written."""
        for host in (self.host.keys, self.host.values):
            rows = self.host_kernels.gather(host, torch.from_numpy(source.ravel()))
            self.host_kernels.scatter(rows, host, torch.from_numpy(target.ravel()))

    def store_tokens(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write one new token of each of B sequences to host slots int64 [B] of a layer: keys, values [B, H, D]."""
        place = self.host.keys.device
        self.host_kernels.append(
            keys.to(place), values.to(place), self.host.keys, self.host.values, slots,
            page_stride=self.layout.pages_per_block, page_offset=self.layout.page_offset(layer),
        )  # fmt: skip

    def host_keys(self, slots: Tensor) -> Tensor:
        """Keys [n, D] at host slots int64 [n]."""
        return self.host_kernels.gather(self.host.keys, slots)

    def device_keys(self, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        """Keys [H, T, D] of the first `num_tokens` tokens of a sequence in these device blocks int64 [N]."""
        size, num_heads = self.layout.block_size, self.layout.num_kv_heads
        tokens = torch.arange(num_tokens, device=blocks.device)
        page = blocks[tokens // size] * self.layout.pages_per_block + self.layout.page_offset(layer)
        slots = (page + torch.arange(num_heads, device=blocks.device)[:, None]) * size + tokens % size
        return self.kernels.gather(self.device.keys, slots.flatten()).view(num_heads, num_tokens, -1)

    @property
    def staged_bytes(self) -> int:
        """Device bytes of the staging pages."""
        return self.staging.num_bytes

    def links(self) -> dict[str, str]:
        """Labels of both directions."""
        return {link.name: link.label for link in (self._fetch_link, self._store_link)}

    def close(self) -> None:
        """End the links' threads."""
        self._fetch_link.close()
        self._store_link.close()
