"""Examines a strategy: every sitting through one engine, its logits scored as they come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from kvwise.core.errors import RequestError
from kvwise.core.output import EngineStats, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.study.exam import Answer, Sample, Sitting, force
from kvwise.study.face import EngineFace

FULL_BATCH = 0.9  # of the most samples that ran at once: steps with fewer do not count for KV bytes


@dataclass(frozen=True, slots=True)
class Marked:
    """One answer as it was given.

    `right`: every token of it was the most likely one, which is what greedy generation would then have said. `nll` is
    the mean negative log-likelihood of its tokens; `same` the share of them at which the most likely token is the
    full cache's; `kl` the mean KL(full || strategy), both in nats. None where it has no meaning.
    """

    sitting: Sitting
    answer: Answer
    num_tokens: int
    right: bool | None
    score: float | None
    nll: float | None
    same: float | None
    kl: float | None


@dataclass(frozen=True, slots=True)
class Examined:
    """A strategy's answers, its outputs for their attestation, and KV bytes per token of context and answers.

    `num_heads` are the layers that store KV times the KV heads, in which a token can be kept or dropped.
    """

    marks: tuple[Marked, ...]
    outputs: tuple[RequestOutput, ...]
    bytes_per_token: dict[str, float]
    num_heads: int


@dataclass(frozen=True, slots=True)
class Reference:
    """The full cache's answers, and the logits [V] float32 behind every token of them, in the order of the answers."""

    sittings: tuple[Sitting, ...]
    logits: tuple[np.ndarray, ...]
    examined: Examined


def reference(engine: EngineFace, sittings: Sequence[Sitting]) -> Reference:
    """Let the full cache sit the exam; what it generates freely and is not graded becomes what others are forced to."""
    scorer = _Scorer(sittings, None)
    examined = _examine(engine, sittings, scorer)
    asked = []
    for place, sitting in enumerate(sittings):
        free = all(answer.grade is None for sample in sitting.samples for answer in sample.answers)
        said = [scorer.outputs[place, index].token_ids for index in range(len(sitting.samples))]
        asked.append(force(sitting, said) if free else sitting)
    return Reference(tuple(asked), tuple(scorer.kept), examined)


def examine(engine: EngineFace, full: Reference) -> Examined:
    """Let a strategy sit the exam of `full` and compare the logits behind every token of the answers."""
    return _examine(engine, full.sittings, _Scorer(full.sittings, full.logits))


def divergence(full: np.ndarray, method: np.ndarray) -> float:
    """KL(softmax(full) || softmax(method)) in nats, of logits [V]."""
    p, q = log_softmax(full), log_softmax(method)
    # Rounding can make the sum of a vanishing divergence a hair negative.
    return max(float((np.exp(p) * (p - q)).sum()), 0.0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


class _Scorer:
    """Scores logits rows the moment the engine shows them; only the full cache's are kept."""

    def __init__(self, sittings: Sequence[Sitting], full: Sequence[np.ndarray] | None) -> None:
        self.outputs: dict[tuple[int, int], RequestOutput] = {}
        self._sittings = sittings
        self._full = full
        # A row a forced answer token: (sitting, sample, step) -> place in the arrays, and the token if it is known.
        self._rows: dict[tuple[int, int, int], tuple[int, int | None]] = {}
        for place, sitting in enumerate(sittings):
            for index, sample in enumerate(sitting.samples):
                self._expect(place, index, sample)
        count = len(self._rows)
        self.kept: list[np.ndarray] = [np.empty(0)] * (count if full is None else 0)
        self._right = np.zeros(count, dtype=bool)
        self._same = np.ones(count)
        self._nll, self._kl = np.zeros(count), np.zeros(count)
        self._seen = np.zeros(count, dtype=bool)

    def _expect(self, place: int, index: int, sample: Sample) -> None:
        for answer in sample.answers:
            for step in range(answer.start, answer.stop) if answer.grade is None else ():
                token = sample.forced[step] if step < len(sample.forced) else None
                self._rows[place, index, step] = (len(self._rows), token)

    def observer(self, place: int) -> Callable[[int, int, Any], None]:
        """What the engine calls with the logits behind every output token of sitting number `place`."""

        def observe(index: int, step: int, logits: Any) -> None:
            found = self._rows.get((place, index, step))
            if found is not None:
                self._score(*found, logits)

        return observe

    def _score(self, row: int, token: int | None, logits: Any) -> None:
        # A copy: the engine may reuse the row. After a preemption a step can come twice, and is then the same.
        on_host = logits.float().cpu().numpy() if hasattr(logits, "cpu") else logits
        mine = np.array(on_host, dtype=np.float32)
        best = int(mine.argmax())
        self._seen[row] = True
        if token is not None:
            self._right[row] = best == token
            self._nll[row] = -log_softmax(mine)[token]
        if self._full is None:
            self.kept[row] = mine
        else:
            self._same[row] = best == int(self._full[row].argmax())
            self._kl[row] = divergence(self._full[row], mine)

    def marks(self) -> list[Marked]:
        """All answers, once the engine is done. RequestError if it did not show what was asked."""
        return [
            self._mark(place, sitting, index, answer)
            for place, sitting in enumerate(self._sittings)
            for index, sample in enumerate(sitting.samples)
            for answer in sample.answers
        ]

    def _mark(self, place: int, sitting: Sitting, index: int, answer: Answer) -> Marked:
        if answer.grade is not None:
            said = self.outputs[place, index].token_ids[answer.start :]
            return Marked(sitting, answer, len(said), None, answer.grade(said), None, None, None)
        rows = [self._rows[place, index, step][0] for step in range(answer.start, answer.stop)]
        if not self._seen[rows].all():
            raise RequestError(f"the engine did not show the logits behind every token of {sitting.task}'s answers")
        return Marked(
            sitting=sitting,
            answer=answer,
            num_tokens=len(rows),
            right=bool(self._right[rows].all()) if answer.exact else None,
            score=None,
            nll=float(self._nll[rows].mean()) if answer.told else None,
            same=float(self._same[rows].mean()),
            kl=float(self._kl[rows].mean()),
        )


def _examine(engine: EngineFace, sittings: Sequence[Sitting], scorer: _Scorer) -> Examined:
    """Run the sittings of one protocol after the other, all of one protocol together."""
    # The first context is read once before, so that a strategy that shares prefixes has one to share.
    engine.add_request(sittings[0].context, SamplingParams(max_tokens=1, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
    held: dict[str, dict[str, float]] = {}
    for protocol in dict.fromkeys(sitting.protocol for sitting in sittings):
        held[protocol] = _run(engine, sittings, scorer, protocol)
    outputs = tuple(scorer.outputs.values())
    # Of forks, several stand on one context, which says less about the strategy than about their number.
    per_token = held.get("multi-turn", next(iter(held.values())))
    return Examined(tuple(scorer.marks()), outputs, per_token, engine.num_heads)


def _run(engine: EngineFace, sittings: Sequence[Sitting], scorer: _Scorer, protocol: str) -> dict[str, float]:
    meter = _Meter(engine.block_bytes)
    places: dict[str, int] = {}
    for place, sitting in enumerate(sittings):
        if sitting.protocol == protocol:
            params = [_params(sample) for sample in sitting.samples]
            name = engine.add_request(
                sitting.context, params, request_id=f"quality-{place}", observe=scorer.observer(place)
            )
            places[name] = place
    while engine.has_unfinished():
        outputs = engine.step()
        meter.note(outputs, engine.stats())
        for output in outputs:
            if output.error is not None:
                raise RequestError(output.error)
            scorer.outputs[places[output.request_id], output.index] = output
    return meter.per_token()


def _params(sample: Sample) -> SamplingParams:
    generated = any(answer.grade is not None for answer in sample.answers)
    return SamplingParams(max_tokens=sample.num_tokens, ignore_eos=not generated, forced_tokens=sample.forced or None)


@dataclass(slots=True)
class _Meter:
    """KV bytes per token, step by step."""

    _block_bytes: int
    _running: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)  # tokens of prompt and output
    _samples: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # per tier: (samples running, bytes)

    def note(self, outputs: Sequence[RequestOutput], stats: EngineStats) -> None:
        """Look at the engine after a step; what counts are steps in which all that runs has been prefilled."""
        for output in outputs:
            key = output.request_id, output.index
            if output.finished:
                self._running.pop(key, None)
            else:
                # The token of this step is not computed yet, and holds no KV.
                self._running[key] = len(output.prompt_token_ids), len(output.token_ids) - 1
        if not self._running or stats.num_running != len(self._running):
            return
        prompts = {name: prompt for (name, _), (prompt, _) in self._running.items()}
        tokens = sum(prompts.values()) + sum(count for _, count in self._running.values())
        # Blocks that are only cached belong to requests that have ended.
        cached = stats.blocks_cached * self._block_bytes
        for tier, used in stats.kv_bytes.items():
            own = used - cached if tier == "device" else used
            self._samples.setdefault(tier, []).append((len(self._running), own / tokens))

    def per_token(self) -> dict[str, float]:
        """Medians over the steps with (almost) the most samples; empty if no step had nothing but decoding.

        Windows and states of some methods are made for a whole batch, so that the last few requests of an exam, which
        have them to themselves, seem to hold more than they need.
        """
        return {tier: of_full_batches(values) for tier, values in self._samples.items()}


def of_full_batches(samples: Sequence[tuple[int, float]]) -> float:
    """The median of the figures of those (samples running, figure) with nine tenths of the most that ran, or more."""
    most = max(running for running, _ in samples)
    return median(value for running, value in samples if running >= FULL_BATCH * most)
