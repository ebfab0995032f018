"""For the tests of methods of one's own: what every method promises, tried on a small model.

`check_method(MyMethod)` runs all promises that its kind has; `kept_positions` tells what a method kept of a prompt, to
be compared with an independent computation (the *oracle*); `prompt_view` makes up what an engine would show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor

from kvwise.core.config import EngineConfig
from kvwise.core.errors import UsageError
from kvwise.core.layout import KVLayout
from kvwise.core.method import Axis, Method
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import conflict, make_strategy
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import MethodCatalogue, catalogue, parse
from kvwise.methods.own import faults
from kvwise.methods.retention.base import PromptView, Retention
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel

MODEL = "random:llama-tiny"
RAGGED = (1, 3, 17, 33, 48, 70)  # lengths of the prompts of a batch: below, at and above a block
NUM_OUTPUTS = 12
CLOSE = 1e-3  # logits of the same tokens in another batch, relative to the largest
_ALONE: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_seqs": 1}
_TOGETHER: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_seqs": 8}
_CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 9, "max_num_seqs": 8}
_RUNNING = (Axis.RETENTION, Axis.SELECTION, Axis.ENCODING)


def check_method(method: Method | type[Method], model: str = MODEL) -> list[str]:
    """Try all that a method promises, with the options it has; AssertionError names the promise that is broken.

    The promises kept come back. Methods of other axes than retention, selection and encoding are not run.
    """
    made = method() if isinstance(method, type) else method
    fault = next(faults(type(made)), None)
    assert fault is None, f"{type(made).__name__} {fault}"
    trial = _Trial(made, model)
    kept = []
    for promise in trial.promises():
        _hold(promise, made)
        kept.append(_name(promise))
    return kept


def _hold(promise: Callable[[], None], method: Method) -> None:
    try:
        promise()
    except Exception as error:  # a method is somebody's code: it may raise anything
        raise AssertionError(f"{method}: broken promise: {_name(promise)}: {error}") from error


def _name(promise: Callable[[], None]) -> str:
    return " ".join((promise.__doc__ or "").split()).rstrip(".")


class _Trial:
    """The promises of one method; each is a function that raises."""

    def __init__(self, method: Method, model: str) -> None:
        self._method, self._model = method, model
        kind = type(method)
        others = [other for other in catalogue() if other.name != kind.name]
        self.known = MethodCatalogue([*others, kind])
        self._has_budget = any(option.name == "budget" for option in fields(kind))

    def promises(self) -> Iterator[Callable[[], None]]:
        """Those that the method's axis has."""
        yield from (self.prints, self.refuses, self.composes)
        if self._method.axis not in _RUNNING:
            return
        yield from (self.same_in_any_batch, self.survives_preemption, self.forks)
        if isinstance(self._method, Retention):
            if (self._method.capacity(200) or 200) < 200:
                yield self.holds_its_capacity
            if self._has_budget:
                yield self.exact_at_budget_one

    # -- values -----------------------------------------------------------------------------------------------------

    def prints(self) -> None:
        """It is a value: equal, hashable, and what it prints parses back."""
        method = self._method
        again = self.known.find(method.name).build(
            {option.name: getattr(method, option.name) for option in fields(method)}
        )
        assert again == method, f"{again!r} is not {method!r}"
        assert hash(again) == hash(method)
        strategy = make_strategy({method.axis: method, **self._needed()}, self.known)
        assert parse(str(strategy), self.known) == strategy, f"{strategy} does not parse back"

    def refuses(self) -> None:
        """It refuses options it does not have, and a budget above 1."""
        kind = type(self._method)
        _refused("an option it does not have", kind.build, {"no_such_option": 1})
        if self._has_budget:
            for value in (0.0, 1.5, float("nan")):
                _refused(f"budget={value}", kind.build, {"budget": value})

    def composes(self) -> None:
        """Each pair with a method of another question is built, or refused for a reason."""
        prefix = self.known.find("prefix")()
        for kind in self.known:
            if kind.axis is self._method.axis:
                continue
            other = kind()
            chosen = {Axis.REUSE: prefix, self._method.axis: self._method, other.axis: other}
            clash = next((why for one, two in combinations(chosen.values(), 2) if (why := conflict(one, two))), None)
            if clash is None:
                assert make_strategy(chosen, self.known)
            else:
                _refused(f"{other.name}, though {clash}", make_strategy, chosen, self.known)

    def _needed(self) -> dict[Axis, Method]:
        """The reuse of prefixes, for what finds KV by them."""
        alone = conflict(self._method, self.known.default(Axis.REUSE)) is None or self._method.axis is Axis.REUSE
        return {} if alone else {Axis.REUSE: self.known.find("prefix")()}

    # -- on an engine ---------------------------------------------------------------------------------------------

    def engine(self, method: Method | None = None, **settings: Any) -> Engine:
        """A checked engine that runs the method."""
        chosen = self._method if method is None else method
        loaded = _load(self._model)
        layout = KVLayout(loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 16, loaded.dtype.itemsize)
        settings.setdefault("kv_cache_memory_bytes", 256 * layout.block_bytes)
        strategy = make_strategy({chosen.axis: chosen}, self.known)
        return Engine(loaded, strategy, EngineConfig(check=True, **settings))

    def same_in_any_batch(self) -> None:
        """One at a time, in a batch and in chunks, a prompt is answered alike."""
        alone, *others = (self._logits(settings) for settings in (_ALONE, _TOGETHER, _CHUNKED))
        for other in others:
            assert other.keys() == alone.keys(), "some steps are missing"
            for key, logits in alone.items():
                apart = float((other[key] - logits).abs().max() / logits.abs().max())
                assert apart < CLOSE, f"prompt {key[0]}, output {key[1]}: logits differ by {apart:.2g}"

    def _logits(self, settings: dict[str, Any]) -> dict[tuple[int, int], Tensor]:
        """(prompt, step) -> the logits; all runs are led through the same outputs."""
        seen: dict[tuple[int, int], Tensor] = {}
        engine = self.engine(**settings)
        for number, (prompt, then) in enumerate(zip(_prompts(), _prompts(NUM_OUTPUTS, seed=9), strict=True)):

            def note(index: int, step: int, logits: Any, number: int = number) -> None:
                seen[number, step] = torch.as_tensor(logits).detach().float().clone()

            engine.add_request(prompt, _greedy(forced_tokens=then), observe=note)
        _finish(engine)
        return seen

    def survives_preemption(self) -> None:
        """A request that is preempted is finished, and leaves nothing behind."""
        engine = self.engine(**_CHUNKED)
        for prompt in _prompts()[-2:]:
            engine.add_request(prompt, _greedy())
        outputs: list[RequestOutput] = []
        for step in range(1000):
            outputs += [output for output in engine.step() if output.finished]
            running = [sequence for sequence in engine._scheduler.running if sequence.num_outputs > 2]
            if step % 7 == 6 and running and engine.stats().num_preemptions < 3:
                engine._scheduler.preempt(running[0])
            if not engine.has_unfinished():
                break
        assert len(outputs) == 2, "a request never ends"
        assert engine.stats().num_preemptions, "no request was preempted"
        _close(engine, outputs)

    def forks(self) -> None:
        """Samples of one prompt all start from what is kept of the prompt alone."""
        engine = self.engine(**_TOGETHER)
        forced = _prompts(NUM_OUTPUTS, seed=9)[0]
        engine.add_request(_prompts()[-1], _greedy(n=3, forced_tokens=forced, explain=True))
        heads = [output.attestation.heads for output in _finish(engine)]
        assert len(heads) == 3, "a sample is missing"
        assert all(one == other for one, other in pairwise(heads)), "they kept different tokens"

    def holds_its_capacity(self) -> None:
        """Tokens held are no more than the capacity on average of layers and heads, the newest among them."""
        method, prompt = self._method, _prompts(200)[0]
        assert isinstance(method, Retention)
        most = method.capacity(200)
        assert most is not None
        most += NUM_OUTPUTS - 1 if method.grows else 0
        newest = 200 + NUM_OUTPUTS - 2
        layers = kept_positions(method, prompt, NUM_OUTPUTS, self._model)
        heads = [head for layer in layers for head in layer]
        mean = sum(map(len, heads)) / len(heads)
        assert mean <= most, f"{mean:g} tokens are held on average, and the capacity is {most}"
        assert all(newest in head for head in heads), "the newest token has left"

    def exact_at_budget_one(self) -> None:
        """At a budget of 1 the answers are those of the full cache."""
        method = type(self._method).build({"budget": 1})
        full = self.known.find("full")()
        answers = []
        for one in (method, full):
            engine = self.engine(one, **_CHUNKED)
            for prompt in _prompts():
                engine.add_request(prompt, _greedy())
            answers.append({output.request_id: output.token_ids for output in _finish(engine)})
        assert answers[0] == answers[1]


# -- for oracles --------------------------------------------------------------------------------------------------


def kept_positions(
    method: Method, prompt: Sequence[int], num_outputs: int = 2, model: str = MODEL
) -> list[list[list[int]]]:
    """The positions that each layer and head holds when a request has ended: [L][H][...].

    The last token of an output is never computed. A request with one output ends before anything is dropped: two or
    more show what the method does.
    """
    engine = _Trial(method, model).engine(**_TOGETHER)
    engine.add_request(prompt, _greedy(num_outputs, explain=True))
    (output,) = _finish(engine)
    assert output.attestation.heads is not None
    return [[head.kept for head in layer] for layer in output.attestation.heads]


def prompt_view(
    method: Retention, num_tokens: int, *, shape: tuple[int, int] = (2, 2), group: int = 2, dim: int = 8, seed: int = 0
) -> PromptView:
    """A prompt that was made up: random keys, values, and the attention of random queries, with its masses."""
    generator = torch.Generator().manual_seed(seed)
    num_layers, num_heads = shape
    logits = 3 * torch.randn(num_layers, num_heads, group, num_tokens, num_tokens, generator=generator)
    later = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    attention = logits.masked_fill(later, -torch.inf).softmax(-1)
    keys, values = torch.randn(2, num_layers, num_heads, num_tokens, dim, generator=generator)
    observed = method.observed_rows(num_tokens)
    return PromptView(
        num_tokens=num_tokens,
        num_prompt=num_tokens,
        capacity=method.capacity(num_tokens),
        shape=shape,
        positions=torch.arange(num_tokens, dtype=torch.int32),
        mass=attention.sum((2, 3)) if method.needs_mass else None,
        rows=lambda layer: attention[layer, :, :, num_tokens - observed :],
        keys=lambda layer: keys[layer],
        values=lambda layer: values[layer],
    )


def random_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random bytes as token ids, which every model knows."""
    return torch.randint(256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def _prompts(length: int | None = None, seed: int = 0) -> list[list[int]]:
    return [random_prompt(length or each, seed * 100 + number) for number, each in enumerate(RAGGED)]


def _greedy(num_outputs: int = NUM_OUTPUTS, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=num_outputs, ignore_eos=True, **more)


@cache
def _load(model: str) -> LoadedModel:
    return load_model(model)


def _finish(engine: Engine) -> list[RequestOutput]:
    """Run to the end; nothing may fail and nothing may be left."""
    outputs = []
    while engine.has_unfinished():
        outputs += [output for output in engine.step() if output.finished]
    return _close(engine, outputs)


def _close(engine: Engine, outputs: list[RequestOutput]) -> list[RequestOutput]:
    failed = next((output.error for output in outputs if output.error is not None), None)
    usage = engine.memory.cache.usage()
    engine.memory.cache.check()
    engine.close()
    assert failed is None, failed
    assert usage.num_sequences == usage.num_referenced == usage.num_broken == 0, "memory is still held at the end"
    return outputs


def _refused(what: str, build: Callable[..., object], *args: object) -> None:
    try:
        build(*args)
    except UsageError:
        return
    raise AssertionError(f"it takes {what}")
