"""Load: stored KV comes back whole, and only then is the rest computed."""

from dataclasses import dataclass
from typing import ClassVar

from kvwise.methods.loading.base import Chunk, Decision, Loading, Outlook, Progress
from kvwise.methods.loading.reckon import first_run, missing


@dataclass(frozen=True)
class Load(Loading):
    """Loads all stored blocks, first to last, in chunks of `chunk` tokens; computes what is missing after that.

    A stored prefix of fewer than `min_tokens` tokens is left alone. This is the I/O-only side that Cake (arXiv
    2410.03065, section 5) compares with; it never asks whether loading pays.
    """

    codec: str = "raw"
    min_tokens: int = 0
    chunk: int = 512

    name: ClassVar[str] = "load"
    idea: ClassVar[str] = "load what is stored, then compute the rest"
    paper: ClassVar[str] = "I/O-only in Cake, arXiv 2410.03065"

    def __post_init__(self) -> None:
        self.require_codec()
        self.require("min_tokens", self.min_tokens >= 0, "0 or more")
        self.require("chunk", self.chunk >= 1, "at least 1")

    def decide(self, outlook: Outlook) -> Decision:
        """Load, unless there is too little of it."""
        num_blocks = outlook.stop - outlook.first
        declined = num_blocks <= 0 or num_blocks * outlook.block_size < self.min_tokens
        return Decision.COMPUTE if declined else Decision.LOAD

    def next_chunk(self, outlook: Outlook, progress: Progress) -> Chunk | None:
        """The first blocks that have not come; one that failed does not keep later ones from being used."""
        left = missing(outlook, progress)
        if not len(left):
            return None
        return Chunk(*first_run(outlook, left, max(1, self.chunk // outlook.block_size)))

    def may_compute(self, outlook: Outlook, progress: Progress) -> bool:
        """Once everything has arrived or failed."""
        return not progress.loading or not len(missing(outlook, progress))
