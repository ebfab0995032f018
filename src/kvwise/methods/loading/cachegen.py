"""CacheGen: stored KV comes back in encoded chunks, each in the best quality that the target time allows."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress
from kvwise.methods.loading.reckon import Blocks, Reckoning, first_run, missing

MODES = ("paper", "released")


@dataclass(frozen=True)
class CacheGen(Loading):
    """CacheGen, arXiv 2310.07240 section 5: chunks of `chunk` tokens, first to last, at a level of quality each.

    A chunk comes at the best level at which it and all that follow should arrive in time, at the speed of the previous
    chunk; if none does, at the lowest, or it is computed ("sent as text") where that is quicker. The first chunk
    comes at the middle level, when no speed was measured. In time means: so that the rest of the prompt is computed
    `ttft_ms` milliseconds after admission, or when the request itself says; without any target every chunk comes at
    the best level. A chunk to be computed is passed over, and computed while later ones are loaded.

    `levels` and `mode` are the codec's. A stored prefix below `min_tokens` tokens is computed: in the paper text wins
    below about a thousand, but where depends on machine and link, so the default is to load always.
    """

    ttft_ms: float | None = None
    levels: int = 3
    mode: str = "paper"
    chunk: int = 1536
    min_tokens: int = 0

    name: ClassVar[str] = "cachegen"
    idea: ClassVar[str] = "load encoded chunks, each in the best quality that the wanted time to the first token allows"
    paper: ClassVar[str] = "CacheGen, arXiv 2310.07240"

    def __post_init__(self) -> None:
        self.require("ttft_ms", self.ttft_ms is None or self.ttft_ms > 0, "above 0")
        self.require("levels", 1 <= self.levels <= 4, "1 to 4")
        self.require("mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        self.require("chunk", self.chunk >= 1, "at least 1")
        self.require("min_tokens", self.min_tokens >= 0, "0 or more")

    @property
    def codec(self) -> str:
        """The codec of this name, with the same levels and mode."""
        return f"cachegen(levels={self.levels}, mode={self.mode})"

    def decide(self, outlook: Outlook) -> Decision:
        """Both: chunk by chunk."""
        num_blocks = outlook.stop - outlook.first
        declined = num_blocks <= 0 or num_blocks * outlook.block_size < self.min_tokens
        return Decision.COMPUTE if declined else Decision.BOTH

    def next_chunk(self, outlook: Outlook, progress: Progress) -> Chunk | None:
        """The next chunk that is not better computed."""
        left = missing(outlook, progress)
        left = left[left >= _tried(outlook, progress)]
        while len(left):
            start, stop = first_run(outlook, left, max(1, self.chunk // outlook.block_size))
            level = self._level(outlook, progress, left)
            if level is not None:
                return Chunk(start, stop, level=level)
            if not self._computes_sooner(outlook, progress, start, stop):
                return Chunk(start, stop, level=_num_levels(outlook) - 1)
            left = left[stop - start :]
        return None

    def may_compute(self, outlook: Outlook, progress: Progress) -> bool:
        """Only what was passed over or has failed: it stands before a chunk that was tried, and has not arrived."""
        if not progress.loading or progress.computed >= outlook.stop:
            return True
        under_way = progress.under_way.start if progress.under_way is not None else outlook.first
        return progress.computed < max(under_way, _tried(outlook, progress))

    def _level(self, outlook: Outlook, progress: Progress, left: Blocks) -> int | None:
        """The best level at which blocks `left` should all arrive in time; None if none does."""
        num_levels, target_s = _num_levels(outlook), self._target_s(outlook)
        if not progress.last_bytes:
            return num_levels // 2
        if target_s is None:
            return 0
        after_s = outlook.seconds_to_compute(outlook.stop * outlook.block_size, outlook.num_tokens) or 0.0
        for level in range(num_levels):
            num_bytes = sum(_bytes_at(outlook, block, level) for block in left.tolist())
            if progress.elapsed_s + _seconds(progress, num_bytes) + after_s <= target_s:
                return level
        return None

    def _target_s(self, outlook: Outlook) -> float | None:
        if outlook.ttft_target_s is not None:
            return outlook.ttft_target_s
        return None if self.ttft_ms is None else self.ttft_ms / 1000

    def _computes_sooner(self, outlook: Outlook, progress: Progress, start: int, stop: int) -> bool:
        """Whether blocks [start, stop) are computed sooner than loaded at the lowest level."""
        lowest = sum(_bytes_at(outlook, block, _num_levels(outlook) - 1) for block in range(start, stop))
        compute_s = Reckoning(outlook, progress).compute_s(start, stop)
        return compute_s is not None and compute_s < _seconds(progress, lowest)


def _tried(outlook: Outlook, progress: Progress) -> int:
    """The block behind the last that has arrived or failed."""
    known = (progress.arrived | progress.failed)[::-1]
    return outlook.stop - int(known.argmax()) if known.any() else outlook.first


def _seconds(progress: Progress, num_bytes: int) -> float:
    return progress.last_s * num_bytes / progress.last_bytes


def _num_levels(outlook: Outlook) -> int:
    """Levels in which every block is stored."""
    return min((len(levels) for levels in outlook.levels), default=1)


def _bytes_at(outlook: Outlook, block: int, level: int) -> int:
    sizes = outlook.level_bytes or [[num_bytes] for num_bytes in outlook.num_bytes]
    return sizes[block - outlook.first][level]
