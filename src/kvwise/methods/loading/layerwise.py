"""Layerwise: stored KV comes back layer by layer, and the rest is computed while later layers are on their way."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress


@dataclass(frozen=True)
class Layerwise(Loading):
    """CachedAttention (AttentionStore), arXiv 2403.19708 section 3: layer-wise pre-loading behind a read buffer.

    All blocks of layer 0 are loaded, then those of layer 1, and so on. The rest of the prompt is computed as soon as
    no layer should have to wait for its KV ("perfect" overlap): loading runs ahead by as many layers as that takes.
    While nothing is known of the prefill's speed, everything is loaded first, for a layer that waits holds up the
    whole batch. The blocks of the next `look_ahead` waiting requests are fetched to the fastest tier and kept there.
    """

    codec: str = "raw"
    look_ahead: int = 8

    name: ClassVar[str] = "layerwise"
    idea: ClassVar[str] = "load layer by layer while earlier layers compute; fetch ahead for waiting requests"
    paper: ClassVar[str] = "CachedAttention, arXiv 2403.19708"
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_codec()
        self.require("look_ahead", self.look_ahead >= 0, "0 or more")

    def decide(self, outlook: Outlook) -> Decision:
        """Load what there is."""
        return Decision.LOAD if outlook.stop > outlook.first else Decision.COMPUTE

    def next_chunk(self, outlook: Outlook, progress: Progress) -> Chunk | None:
        """The next layer of all blocks before the first that failed; what stands behind it is computed."""
        stop = _end(outlook, progress)
        if progress.layers >= outlook.num_layers or stop == outlook.first:
            return None
        return Chunk(outlook.first, stop, layer=progress.layers)

    def may_compute(self, outlook: Outlook, progress: Progress) -> bool:
        """Once every layer that is still to come should be there when a step that starts now needs it."""
        if not progress.loading or self.next_chunk(outlook, progress) is None:
            return True
        if not progress.layers:
            return False
        start = _end(outlook, progress) * outlook.block_size
        step_s = outlook.seconds_to_compute(start, min(start + outlook.step_tokens, outlook.num_tokens))
        if step_s is None:
            return False
        each_s = step_s / outlook.num_layers
        layer_s = max(progress.last_s, progress.waited_s)
        # Layer j is needed after j * each_s and comes after (j - layers + 1) * layer_s: straight lines in j, so that no
        # layer waits if neither the first nor the last of those still to come does; and if not the last, nor the first.
        left = outlook.num_layers - progress.layers
        return left * layer_s <= (outlook.num_layers - 1) * each_s


def _end(outlook: Outlook, progress: Progress) -> int:
    """The first block that failed, or the end of what is stored."""
    return outlook.first + int(progress.failed.argmax()) if progress.failed.any() else outlook.stop
