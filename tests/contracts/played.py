"""Rounds of the same ragged requests on one engine, and what methods did to them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvwise.core.method import Axis, Method
from kvwise.core.output import RequestOutput
from kvwise.core.strategy import conflict, make_strategy
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.engine.sequence import Sequence as Seq
from kvwise.methods.catalogue import catalogue
from tests.engine.hierarchy.tiering import Patient, leave_device, require_idle
from tests.engine.runs import LIMIT, greedy, prompts, require_empty, sequence_of

Serve = Callable[..., Any]
Kept = list[list[list[int]]]

# Options under which prompts of 40 to 70 tokens are enough for a method to do something.
SMALL: dict[str, dict[str, Any]] = {
    "cake": {"escape": False, "chunk": 16},
    "cachegen": {"chunk": 32, "levels": 1},
    "cascading": {"stride": 24},
    "clusterkv": {"sink": 4, "nlist": 5, "update": 5, "new_clusters": 2},
    "corm": {"window": 8, "recent": 8},
    "fp8": {"group": 16},
    "hierarchical": {"group": 16},
    "infinigen": {"alpha": 1.0},
    "int4": {"group": 16},
    "int8": {"group": 16},
    "kivi": {"group": 16, "residual": 16},
    "kvmerger": {"first": 1},
    "kvsharer": {"map": "2:0-3:1"},
    "less": {"weights": "untrained"},
    "quest": {"page": 4},
    "random": {"recent": 4},
    "refreekv": {"threshold": 0.05},
    "snapkv": {"observed": 8},
    "think": {"recent": 4, "observed": 8},
    "vlcache": {"observed": 8},
}
LENGTHS = (66, 41, 3, 55)
_FIRST, *_REST = prompts(*LENGTHS)
_REST[-1][:20] = _FIRST[:20]  # one shares a block with the first
PROMPTS = [_FIRST, *_REST]
NUM_OUTPUTS = 14
FORCED = prompts(*[NUM_OUTPUTS] * len(PROMPTS), seed=9)
PREEMPTED, AFTER = 1, 5  # this request loses its memory when it has so many tokens
SETTINGS = {"max_num_batched_tokens": 40, "max_num_seqs": 3}


def small(name: str) -> Method:
    """The method of this name, with options that make it work on short prompts."""
    kind = catalogue().find(name)
    budget = {"budget": 0.5} if "budget" in kind.__dataclass_fields__ else {}
    return kind.build({**budget, **SMALL.get(name, {})})


def line_of(*methods: Method) -> str:
    """The strategy of these methods, with the reuse of prefixes if one of them cannot be without."""
    chosen = {method.axis: method for method in methods}
    if any(conflict(catalogue().default(Axis.REUSE), method) for method in methods):
        chosen.setdefault(Axis.REUSE, small("prefix"))
    return str(make_strategy(chosen, catalogue()))


@dataclass
class Played:
    """What came of it. Requests are told apart by round and number, and by how often they had settled before."""

    engine: Engine
    outputs: list[list[RequestOutput]] = field(default_factory=list)
    logits: dict[tuple[int, int, int], Tensor] = field(
        default_factory=dict
    )  # round, number, step; of each first sample
    twins: dict[tuple[int, int, int], list[Tensor]] = field(default_factory=dict)  # likewise, of the other samples
    kept: dict[tuple[int, int, int], Kept] = field(default_factory=dict)  # round, number, times settled

    def total(self, of: Callable[[RequestOutput], int], rounds: slice = slice(None)) -> int:
        """A sum over the requests of some rounds."""
        return sum(of(output) for outputs in self.outputs[rounds] for output in outputs)


def play(serve: Serve, line: str, *, model: str = "llama-tiny", num_samples: int = 1, **settings: Any) -> Played:
    """Serve all prompts, and serve them again where KV can be reused: on the device, or from below where it is loaded.

    They arrive while others run; one is preempted in every round, and computed again. Outputs are forced, so that runs
    of other strategies can be compared step by step.
    """
    meter = Patient() if loads(line) else None
    more = {"tiers": ["memory(size=64MiB)"], "meter": meter} if meter else {}
    engine = serve(model, line, **{**SETTINGS, **more, **settings})
    played = Played(engine)
    _watch(played)
    for number in range(2 if engine.memory.cache.sharing else 1):
        played.outputs.append(_round(played, number, num_samples))
        if meter is not None:
            leave_device(engine)
            meter.engine = engine
    require_empty(engine)
    if meter is not None:
        require_idle(engine)
    return played


def loads(line: str) -> bool:
    """Whether a strategy loads from tiers."""
    names = [part.partition("(")[0] for part in line.split("+")]
    return any(kind.name in names for kind in catalogue() if kind.axis is Axis.LOADING and not kind.default)


def _watch(played: Played) -> None:
    """Note what is kept whenever a request settles."""
    placement: Any = played.engine.memory.placement
    if not hasattr(placement, "kept_positions"):
        return
    settle = placement.settle

    def settled(sequence: Seq) -> bool:
        done: bool = settle(sequence)
        if done and sequence.index == 0:
            round_, number = (int(part) for part in sequence.request_id.split("."))
            times = sequence.metrics.num_preemptions
            played.kept[round_, number, times] = placement.kept_positions(sequence)
        return done

    placement.settle = settled


def _round(played: Played, round_: int, num_samples: int) -> list[RequestOutput]:
    engine, done = played.engine, {}
    waiting = list(range(len(PROMPTS)))
    preempted = False
    for step in range(LIMIT):
        if waiting and step % 2 == 0:
            _add(played, round_, waiting.pop(0), num_samples)
        for output in engine.step():
            if output.finished:
                done[output.request_id, output.index] = output
        preempted = preempted or _preempt(engine, f"{round_}.{PREEMPTED}")
        if not waiting and not engine.has_unfinished():
            break
    assert preempted
    assert [output.error for output in done.values()] == [None] * len(PROMPTS) * num_samples
    assert all(len(output.token_ids) == NUM_OUTPUTS for output in done.values())
    return [done[key] for key in sorted(done)]


def _add(played: Played, round_: int, number: int, num_samples: int) -> None:
    def note(index: int, step: int, logits: Tensor) -> None:
        if index == 0:
            played.logits[round_, number, step] = logits.clone()
        else:
            played.twins.setdefault((round_, number, step), []).append(logits.clone())

    params = greedy(NUM_OUTPUTS, forced_tokens=FORCED[number])
    played.engine.add_request(PROMPTS[number], [params] * num_samples, request_id=f"{round_}.{number}", observe=note)


def _preempt(engine: Engine, name: str) -> bool:
    if name not in engine._requests:
        return False
    sequence = sequence_of(engine, name)
    if sequence.phase is not Phase.DECODE or sequence.num_outputs != AFTER:
        return False
    engine._scheduler.preempt(sequence)
    return True


# -- what must have happened --------------------------------------------------------------------------------------


def require_work(played: Played, methods: Sequence[Method]) -> None:
    """Every one of these methods has done what it is there for."""
    for method in methods:
        count = _work_of(played, method)
        assert count > 0, f"{method} did nothing in {played.engine.strategy}"


def _work_of(played: Played, method: Method) -> int:
    name, engine = method.name, played.engine
    if method.axis is Axis.RETENTION:
        return played.total(lambda out: out.attestation.did.get(name, 0))
    if method.axis is Axis.SELECTION:
        fetched = played.total(lambda out: out.attestation.tokens_fetched)
        return fetched if fetched < played.total(lambda out: out.attestation.fetch_candidates) else 0
    if name == "kvsharer":
        return engine.loaded.num_layers - engine.memory.layout.num_layers
    if method.axis is Axis.ENCODING:
        native = 8.0 * engine.memory.layout.element_bytes
        fewer = played.total(lambda out: out.attestation.bits_per_element < native)
        return fewer and played.total(lambda out: out.attestation.did.get(name, 0))
    if method.axis is Axis.REUSE:
        return played.total(lambda out: out.attestation.tokens_reused, slice(1, 2))
    assert method.axis is Axis.LOADING, f"how is the work of {method.axis} told?"
    return played.total(lambda out: out.attestation.tokens_loaded, slice(1, 2))


def require_same_answers(played: Played, wanted: Played, *, within: float = 1e-3) -> None:
    """In every round the logits of the first of `wanted`, at every step of all requests, relative to the largest."""
    assert played.logits.keys() >= wanted.logits.keys()
    for (round_, number, step), logits in played.logits.items():
        right = wanted.logits[0, number, step]
        apart = float((logits - right).abs().max() / right.abs().max())
        assert apart < within, f"round {round_}, request {number}, step {step}: logits differ by {apart:.2g}"


def require_same_kept(played: Played, wanted: Played, layers: Sequence[int] | None = None) -> None:
    """Every layer and head kept the same tokens whenever a request settled; of `wanted` only these layers are there."""
    assert played.kept.keys() >= wanted.kept.keys()
    assert wanted.kept
    for (round_, number, times), kept in played.kept.items():
        right = wanted.kept[0, number, times]
        assert kept == (right if layers is None else [right[layer] for layer in layers]), (round_, number, times)
