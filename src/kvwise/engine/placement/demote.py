"""Demotion: what a retention method keeps stays in device pages; the rest goes to the host for a selection to read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from kvwise.core.output import HeadReport
from kvwise.engine.placement.base import Failure
from kvwise.engine.placement.demoted import Demoted, Demotion
from kvwise.engine.placement.heirs import Heir
from kvwise.engine.placement.host_pool import HostPool
from kvwise.engine.placement.host_rows import HostRows
from kvwise.engine.placement.page_part import PagePart
from kvwise.engine.placement.pages import PagePlacement
from kvwise.engine.placement.recall_fetch import Asked, Fetch, Recall
from kvwise.engine.placement.recall_reader import PromptObserver, Reader
from kvwise.engine.sequence import Sequence as Seq
from kvwise.kernels.base import Segment
from kvwise.models.attention import AskAhead, LooksAhead, Observer, Part


class DemotePlacement:
    """Carries out a retention method in `PagePlacement` and a selection method over what that one lets go.

    Attention is one softmax over a layer's pages and the rows fetched for it. In the layers that the selection reads
    in full all that has left is fetched, step by step: the retention method keeps its budget in every layer, nothing
    is lost in any, and what that costs is counted with the fetched tokens (and where the selection keeps fetched rows
    for later steps, with the staging pages).

    On the host a request's rows take as many tokens in all layers as have left the layer that most have left. What
    leaves in a step is stored before the next begins.
    """

    settles = True

    def __init__(self, recall: Recall, host: HostPool, pages: Callable[[Heir], PagePlacement]) -> None:
        self._recall = recall
        self._tiers = recall.tiers
        self._host = host
        self._demotion = Demotion(recall, host)
        self._pages = pages(self._demotion)
        self.index = recall.index
        self.wants_mass = self._pages.wants_mass
        self.looks_ahead = recall.selection.looks_ahead
        self._rows: dict[Seq, HostRows] = {}

    def observed_rows(self, sequence: Seq) -> int:
        """Those of the retention method."""
        return self._pages.observed_rows(sequence)

    # -- admission ----------------------------------------------------------------------------------------------

    def room_for(self, num_prompt: int, num_tokens: int) -> str | None:
        """The device must hold what stays, and the host, to be safe, everything."""
        if refusal := self._host.refusal(num_tokens):
            return f"prompt of {num_prompt} tokens and its output {refusal}"
        return self._pages.room_for(num_prompt, num_tokens)

    def admit(self, sequence: Seq) -> bool:
        """Have room on the host for the prompt: how much of it leaves is known when it settles."""
        rows = self._host.open(len(sequence.tokens))
        if rows is not None:
            self._rows[sequence] = rows
        return rows is not None

    def fork(self, source: Seq, sibling: Seq) -> bool:
        """Room on the host, and what both methods have seen of the prompt; each fork settles by itself."""
        if not self.admit(sibling):
            return False
        self._recall.fork(source, sibling)
        return self._pages.fork(source, sibling)

    # -- prefill ------------------------------------------------------------------------------------------------

    def observer(self, prefills: Sequence[tuple[Seq, int]]) -> Observer | None:
        """Both methods look at prompts."""
        if not prefills:
            return None
        found = [PromptObserver(self._recall, prefills), self._pages.observer(prefills)]
        return _Observers([one for one in found if one is not None])

    def after_prefill_step(self, prefills: Sequence[tuple[Seq, int]]) -> list[Failure]:
        """Nothing moves before a request settles."""
        return self._recall.failed()

    def settle(self, sequence: Seq) -> bool:
        """Keep what the retention method keeps; store and index the rest."""
        if sequence in self._recall.failures:
            raise self._recall.failures.pop(sequence)
        assert sequence.row is not None
        self._demotion.open(sequence.row, sequence, self._rows[sequence])
        settled = self._pages.settle(sequence)
        if sequence in self._recall.failures:
            raise self._recall.failures.pop(sequence)
        return settled

    # -- decoding -----------------------------------------------------------------------------------------------

    def grow(self, sequence: Seq) -> bool:
        """Room for the next token on the device, and on the host for whoever makes room for it."""
        held = self._demoted(sequence)
        num_rows = int((held.counts + self._pages.num_leaving(sequence)).max())
        return self._host.reserve(held.rows, num_rows) and self._pages.grow(sequence)

    def part(self, sequences: Sequence[Seq], counts: Sequence[int], rows: slice) -> Part:
        """Pages, and rows that are fetched."""
        pages = self._pages.part(sequences, counts, rows)
        recalled = _Recalled(self._recall, [self._demoted(s) for s in sequences])
        pages.further = recalled
        return _AheadPart(pages, recalled) if self.looks_ahead else pages

    def after_decode_step(self, sequences: Sequence[Seq]) -> list[Failure]:
        """Victims leave for the host."""
        failures = dict(self._pages.after_decode_step(sequences))
        return list({**dict(self._recall.failed()), **failures}.items())

    # -- the rest -----------------------------------------------------------------------------------------------

    def _demoted(self, sequence: Seq) -> Demoted:
        assert sequence.row is not None
        return self._demotion.of(sequence.row)

    def kept_positions(self, sequence: Seq) -> list[list[list[int]]]:
        """Positions that each layer and head holds on the device, sorted."""
        return self._pages.kept_positions(sequence)

    def explain(self, sequence: Seq) -> list[list[HeadReport]]:
        """What each layer and head holds on the device, and what its last step read of the host."""
        held = self._demoted(sequence)
        return [
            [replace(head, recalled=rows) for head, rows in zip(heads, held.recalled(layer), strict=True)]
            for layer, heads in enumerate(self._pages.explain(sequence))
        ]

    def release(self, sequence: Seq) -> None:
        """Wait for transfers that may still read or write what the sequence holds, then forget it on both sides."""
        if sequence.row is not None:
            self.index.drop(sequence.row)
            self._demotion.forget(sequence.row)
        self._pages.release(sequence)
        rows = self._rows.pop(sequence, None)
        if rows is not None:
            self._tiers.finish_fetches()
            self._host.close(rows)
        if not self._rows:
            self._tiers.staging.clear()
        self._recall.failures.pop(sequence, None)

    def kv_bytes(self) -> Mapping[str, int]:
        """Host blocks in use, and on the device, besides pages, the index and the staging pages."""
        device = self.index.num_bytes + self._tiers.staged_bytes + self._pages.kv_bytes().get("device", 0)
        return {"host": self._host.num_bytes, "device": device}

    def links(self) -> Mapping[str, str]:
        """Labels of both directions."""
        return self._tiers.links()

    def close(self) -> None:
        """End the links' threads."""
        self._tiers.close()


class _Observers:
    """Several who look at a prompt."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def observe(self, layer: int, queries: Tensor, keys: Tensor) -> None:
        """All see it."""
        for one in self._observers:
            one.observe(layer, queries, keys)


class _Recalled:
    """What layers read besides their pages: rows of those that have left, where any have."""

    def __init__(self, recall: Recall, held: Sequence[Demoted]) -> None:
        self._recall = recall
        self._held = held
        self._fetches: dict[int, Fetch] = {}
        self.reader = Reader(recall, self._asked)

    def _asked(self, layer: int) -> list[Asked]:
        return [Asked(held.sequence, held.rows, int(held.counts[layer])) for held in self._held]

    def segment(self, layer: int, queries: Tensor, keys: Tensor | None) -> Segment | None:
        """The fetched rows, here by now."""
        assert keys is not None  # methods that recall are refused where layers share KV
        fetch = self.reader.arrived(layer, queries, keys)
        if fetch is None:
            return None
        self._fetches[layer] = fetch
        return fetch.segment(self._recall.tiers)

    def end(self, layer: int) -> None:
        """Their staging pages are free, unless rows are kept for later steps."""
        if layer in self._fetches:
            self._fetches.pop(layer).done()


class _AheadPart(LooksAhead):
    """Pages, with rows that are fetched while the layer before runs."""

    def __init__(self, pages: PagePart, recalled: _Recalled) -> None:
        self.rows = pages.rows
        self._pages = pages
        self._recalled = recalled

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor | None, values: Tensor | None, *, scale: float,
        window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """As the pages do."""
        return self._pages.attend(layer, queries, keys, values, scale=scale, window=window, softcap=softcap)

    def look_ahead(self, layer: int, ask: AskAhead) -> None:
        """Guess what the next layer will read, and begin to fetch it."""
        self._recalled.reader.look_ahead(layer, ask, self.rows)
