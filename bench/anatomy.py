"""Where the time of an engine step goes: matrix products, attention, the model's elementwise rest, the engine.

Method: `perf_counter` around every `nn.Linear` (forward hooks), around the kernels' `append` and `attend`, around
the forward pass and around the whole step. The clock itself costs about 0.3 us a hook and counts as "model rest".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import nn

from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.models.packed import PackedLinear


@dataclass
class Anatomy:
    """Milliseconds of each step, by part."""

    step: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def median(self) -> dict[str, float]:
        """Medians over steps: `step`, its parts, and `share outside` products and attention."""
        middle = {name: _median(values) for name, values in {"step": self.step, **self.parts}.items()}
        outside = [
            1 - (m + a) / s for s, m, a in zip(self.step, self.parts["matmul"], self.parts["attention"], strict=True)
        ]
        return {**middle, "share outside": _median(outside)}


class _Stopwatch:
    """Adds up spans by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"matmul": 0.0, "attention": 0.0, "forward": 0.0}
        self.begin = 0.0

    def before(self, *_: Any) -> None:
        self.begin = perf_counter()

    def after(self, *_: Any) -> None:
        self.spent["matmul"] += perf_counter() - self.begin

    def wrap(self, name: str, call: Any) -> Any:
        """`call`, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = perf_counter()
            result = call(*args, **kwargs)
            self.spent[name] += perf_counter() - begin
            return result

        return timed


@contextmanager
def _instrumented(engine: Engine) -> Iterator[_Stopwatch]:
    watch = _Stopwatch()
    handles = []
    for module in engine.loaded.model.modules():
        if isinstance(module, (nn.Linear, PackedLinear)):
            handles.append(module.register_forward_pre_hook(watch.before))
            handles.append(module.register_forward_hook(watch.after))
    kernels: Any = engine.memory.kernels
    runner: Any = engine._runner
    for name in ("attend", "append"):
        setattr(kernels, name, watch.wrap("attention", getattr(kernels, name)))
    runner.run = watch.wrap("forward", runner.run)
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()
        del kernels.attend, kernels.append, runner.run


def anatomy(engine: Engine, prompts: list[list[int]], num_new: int) -> tuple[Anatomy, Anatomy]:
    """(prefill steps, decode steps) of one instrumented run of these prompts."""
    params = SamplingParams(max_tokens=num_new, ignore_eos=True)
    prefill, decode = Anatomy(), Anatomy()
    with _instrumented(engine) as watch:
        for prompt in prompts:
            engine.add_request(prompt, params)
        while engine.has_unfinished():
            spent = dict.fromkeys(watch.spent, 0.0)
            watch.spent.update(spent)
            begin = perf_counter()
            outputs = engine.step()
            step = perf_counter() - begin
            whole = len(outputs) == len(prompts) and all(len(o.token_ids) > 1 for o in outputs)
            _record(decode if whole else prefill, step, watch.spent)
    return prefill, decode


def _record(anatomy: Anatomy, step: float, spent: dict[str, float]) -> None:
    rest = spent["forward"] - spent["matmul"] - spent["attention"]
    found = {
        "matmul": spent["matmul"],
        "attention": spent["attention"],
        "model rest": rest,
        "engine": step - spent["forward"],
    }
    anatomy.step.append(step * 1e3)
    for name, seconds in found.items():
        anatomy.parts.setdefault(name, []).append(seconds * 1e3)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else float("nan")
