"""The two memories of recall and the links between them: pages go to the host, rows come back."""

from concurrent.futures import Future

import torch
from torch import Tensor

from kvwise.engine.placement.staging import Staging
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
        # Two buffers, used by turns: one is read by the layer that runs while the next layer's rows arrive.
        self._staging = [Staging(self.layout, device.keys.dtype, device.keys.device) for _ in range(2)]

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

    def begin_fetch(self, layer: int, slots: Tensor, target: Tensor, shape: tuple[int, int]) -> "Future[Staging]":
        """Bring rows at host slots int64 [n] to staging slots [n], over the link.

        The buffer is laid out for `shape` = (sequences, pages of each head).
        """
        staging = self._staging[layer % 2]

        def transfer() -> Staging:
            staging.resize(*shape)
            for host, device in ((self.host.keys, staging.keys), (self.host.values, staging.values)):
                rows = self.host_kernels.gather(host, slots)
                self._staging_kernels.scatter(rows.to(device.device), device, target)
            return staging

        return self._fetch_link.begin(transfer, slots.numel() * self.row_bytes)

    def store_tokens(self, layer: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write one new token of each of B sequences to host slots int64 [B] of a layer: keys, values [B, H, D]."""
        place = self.host.keys.device
        self.host_kernels.append(
            keys.to(place), values.to(place), self.host.keys, self.host.values, slots,
            page_stride=self.layout.pages_per_block, page_offset=self.layout.page_offset(layer),
        )  # fmt: skip

    def host_keys(self, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        """Keys [H, T, D] of the first `num_tokens` tokens of a sequence with these host blocks int64 [N]."""
        return self._keys(self.host_kernels, self.host, layer, blocks, num_tokens)

    def device_keys(self, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        """The same of a sequence with these device blocks."""
        return self._keys(self.kernels, self.device, layer, blocks, num_tokens)

    def _keys(self, kernels: Kernels, arena: Arena, layer: int, blocks: Tensor, num_tokens: int) -> Tensor:
        size, num_heads = self.layout.block_size, self.layout.num_kv_heads
        tokens = torch.arange(num_tokens, device=blocks.device)
        page = blocks[tokens // size] * self.layout.pages_per_block + self.layout.page_offset(layer)
        slots = (page + torch.arange(num_heads, device=blocks.device)[:, None]) * size + tokens % size
        return kernels.gather(arena.keys, slots.flatten()).view(num_heads, num_tokens, -1)

    @property
    def staged_bytes(self) -> int:
        """Device bytes of the staging buffers."""
        return sum(s.num_bytes for s in self._staging)

    def links(self) -> dict[str, str]:
        """Labels of both directions."""
        return {link.name: link.label for link in (self._fetch_link, self._store_link)}

    def close(self) -> None:
        """End the links' threads."""
        self._fetch_link.close()
        self._store_link.close()
