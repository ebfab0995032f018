"""Whole blocks: a request's KV stays where its prefill put it."""

from collections.abc import Mapping, Sequence

from kvwise.core.output import HeadReport
from kvwise.engine.placement.base import Failure
from kvwise.engine.sequence import Sequence as Seq
from kvwise.models.attention import Observer, Part


class BlockPlacement:
    """Nothing is rearranged; every sequence is served from its block table."""

    settles = False
    wants_mass = False
    looks_ahead = False

    def observed_rows(self, sequence: Seq) -> int:
        """None."""
        return 0

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The pool's own limit is all there is."""
        return None

    def admit(self, sequence: Seq) -> bool:
        """Nothing is needed outside the pool."""
        return True

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Nothing is held outside the pool."""
        return True

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """Nobody looks."""
        return None

    def settle(self, sequence: Seq) -> bool:
        """Never asked: this placement does not settle."""
        raise AssertionError("a sequence in whole blocks does not settle")

    def grow(self, sequence: Seq) -> bool:
        """Never asked: nothing is settled."""
        raise AssertionError("no sequence is settled")

    def part(self, sequences: Sequence[Seq], counts: Sequence[int], rows: slice) -> Part:
        """Never asked: nothing is settled."""
        raise AssertionError("no sequence is settled")

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """Nothing to do."""
        return []

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Nothing to do."""
        return []

    def explain(self, sequence: Seq) -> list[list[HeadReport]]:
        """Never asked: nothing is settled."""
        raise AssertionError("no sequence is settled")

    def release(self, sequence: Seq) -> None:
        """Nothing is held."""

    def kv_bytes(self) -> Mapping[str, int]:
        """Nothing is held outside the pool."""
        return {}

    def links(self) -> Mapping[str, str]:
        """No link is used."""
        return {}

    def close(self) -> None:
        """Nothing runs in the background."""
