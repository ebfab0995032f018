"""The seam of placement: what happens to a request's KV between its prefill and its last token."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol

from kvwise.core.output import HeadReport
from kvwise.engine.sequence import Sequence as Seq
from kvwise.models.attention import Observer, Part

Failure = tuple[Seq, Exception]  # a request whose method raised, and what


class Placement(Protocol):
    """Takes over a sequence when its prefill has ended (`settle`) and answers for it until it is released.

    Until then, and for good if `settles` is false, a sequence lives in whole blocks of the device pool.
    """

    settles: bool
    wants_mass: bool  # whether prefill must accumulate the attention each token receives
    looks_ahead: bool  # whether its parts want to see a layer's query before the layer runs

    def observed_rows(self, sequence: Seq) -> int:
        """Of a prompt's last rows, how many must be computed even if their KV is known: a method looks at them."""
        ...

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """Why a request of `num_prompt` tokens that may grow to `num_tokens` can never be held, or None."""
        ...

    def admit(self, sequence: Seq) -> bool:
        """Hold what a sequence about to start needs outside the device pool. False: no room now, nothing is held."""
        ...

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Hold for `sibling`, which has a row and shares the blocks of `source`, what is held for that one.

        The prefill of `source` has ended, neither has settled. False: no room now, nothing is held.
        """
        ...

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """Who looks at this step's prompt queries and keys: (sequence, tokens) in the order of the flat batch."""
        ...

    def settle(self, sequence: Seq) -> bool:
        """Rearrange the KV of a sequence whose prefill has ended. False: no room now, nothing has changed."""
        ...

    def grow(self, sequence: Seq) -> bool:
        """Make room for the next token of a settled sequence. False: no room now, nothing has changed."""
        ...

    def part(self, sequences: Sequence[Seq], counts: Sequence[int], rows: slice) -> Part:
        """How a step reaches the KV of settled sequences, with so many new tokens each: one, unless read in strides."""
        ...

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """The step's prompt tokens are computed (committed); nothing has settled yet."""
        ...

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """The step's new tokens of settled sequences are stored and have attended."""
        ...

    def explain(self, sequence: Seq) -> list[list[HeadReport]]:
        """What each layer and head of a settled sequence holds now."""
        ...

    def release(self, sequence: Seq) -> None:
        """Forget a sequence, settled or not (its row is released by the caller, afterwards)."""
        ...

    def kv_bytes(self) -> Mapping[str, int]:
        """KV bytes held outside the device pool, by tier."""
        ...

    def links(self) -> Mapping[str, str]:
        """Labels of the links in use."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class ReadsInStrides(ABC):
    """A placement whose sequences are settled from their admission on, in pages that it asks for itself."""

    @abstractmethod
    def start(self, sequence: Seq) -> bool:
        """A sequence has a row, which holds nothing yet. False: no room now, nothing is held."""

    @abstractmethod
    def num_next(self, sequence: Seq) -> int:
        """How many of its next tokens a step may compute at most; 0: its stride has been read."""
