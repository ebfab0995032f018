"""Measures loading: how soon the first token comes when the prefix is computed, loaded, or both."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import median

import numpy as np

from kvwise.core.errors import CapacityError, KvwiseError, PlanError, RequestError
from kvwise.study.cells import Cell
from kvwise.study.face import Bench, LoaderFace, LoaderRun, LoaderSetup, ModelFacts, StepTime
from kvwise.study.loading_section import BASE, COMPUTE, LOAD, Loading, Mixed, read_bandwidth
from kvwise.study.plan import Plan
from kvwise.study.rows import CellResult, Row, loading_result
from kvwise.study.tier_rows import load_report
from kvwise.study.workloads import sample_prompts

WARM_UP_TOKENS = 64
PREFILL_RATE = 6000.0  # tokens per second, guessed
CALIBRATIONS = 3


class NotIdentical(KvwiseError):
    """Two ways of generating that must agree did not."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What computing takes undisturbed: a full step (seconds, and seconds per token of context), and a prefix."""

    full_step_s: tuple[float, float]
    prefix_s: float
    prefix_bytes: int

    @property
    def break_even(self) -> float:
        """Bytes per second at which loading the prefix takes as long as computing it."""
        return self.prefix_bytes / self.prefix_s


class LoadingMeasure:
    """Runs the loading cells of a plan; what computing takes is found out once for each model and longest prefix."""

    def __init__(self, plan: Plan, bench: Bench) -> None:
        self._plan = plan
        self._bench = bench
        self._kept: dict[tuple[str, int, int], Calibration] = {}

    def run(self, cell: Cell) -> CellResult:
        """All methods over all bandwidths of the cell's table, at its length and share."""
        began = self._bench.clock.now()
        assert cell.loading is not None
        table, facts = cell.loading, self._bench.facts(cell.model)
        require_length(cell, facts)
        known = self._calibration(table, cell.model, facts)
        speeds = {text: _speed(text, known) for text in table.bandwidths}
        point = Point(self._bench, table, cell.model, cell.context, cell.share, known.full_step_s, self._plan.seed)
        with point:
            rows = [
                row | {"bandwidth": text, "break_even_bytes_per_s": known.break_even}
                for text, speed in speeds.items()
                for row in point.measure(speed, table.repeats)
            ]
        return loading_result(cell, rows, facts, self._bench.clock.now() - began)

    def _calibration(self, table: Loading, model: str, facts: ModelFacts) -> Calibration:
        longest = max(table.context_lengths)
        key = model, longest, table.step_tokens
        if key not in self._kept:
            self._kept[key] = calibrate(self._bench, table, model, longest, self._plan.seed, facts)
        return self._kept[key]


class Point:
    """One model, prefix length and share of the device: an engine a method, all over the same prefix.

    A context manager. The prefix is stored once in each; before each request the devices hold nothing.
    """

    def __init__(
        self, bench: Bench, table: Loading, model: str, context: int, share: float,
        full_step_s: tuple[float, float] | None, seed: int,
    ) -> None:  # fmt: skip
        self._bench = bench
        self._table = table
        self._setup = (model, context, share, full_step_s)
        self._seed = seed
        self._facts = bench.facts(model)
        self._prompt = sample_prompts(context, 1, seed=seed, vocab_size=self._facts.vocab_size)[0].tolist()
        self._loaders: dict[str, LoaderFace] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Point":
        with ExitStack() as stack:
            for method in self._table.strategies:
                loader = stack.enter_context(closing(self._bench.loader(self._loader_setup(method))))
                if method == COMPUTE:
                    loader.run([self._prompt[:WARM_UP_TOKENS]])
                else:
                    loader.store(self._prompt)
                self._loaders[method] = loader
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _loader_setup(self, method: str) -> LoaderSetup:
        model, context, share, full_step_s = self._setup
        mixed = self._table.mixed
        return LoaderSetup(
            model,
            self._table.strategies[method],
            self._table.tier,
            longest=context,
            step_tokens=self._table.step_tokens,
            share=share,
            full_step_s=full_step_s if share < 1 else None,
            others=0 if mixed is None else mixed.requests,
            others_tokens=0 if mixed is None else mixed.high,
        )

    def measure(self, bytes_per_second: float, repeats: int) -> list[Row]:
        """Every method `repeats` times over a link of this speed, one after another, another one first each time.

        One round before that is not counted: estimators then know the link, and what computing costs.
        """
        rows: list[Row] = []
        for method, loader in self._loaders.items():
            if method != COMPUTE:
                loader.throttle(bytes_per_second)
            if method not in (COMPUTE, LOAD):  # these ask no estimator
                loader.run(self._prompts(-1))
        for run in range(repeats):
            order = list(self._loaders)
            turn = run % len(order)
            runs = {m: self._loaders[m].run(self._prompts(run)) for m in order[turn:] + order[:turn]}
            self._require_identical(runs)
            rows += [self._row(m, run, bytes_per_second, runs) for m in self._loaders]
        return rows

    def _prompts(self, run: int) -> list[list[int]]:
        """The long prompt, then short ones that nobody has seen before."""
        mixed = self._table.mixed
        return [self._prompt, *([] if mixed is None else _short(mixed, self._seed, run + 1, self._facts.vocab_size))]

    def _require_identical(self, runs: Mapping[str, LoaderRun]) -> None:
        first = _tokens(runs[COMPUTE])
        for method, run in runs.items():
            if self._loaders[method].lossless and _tokens(run) != first:
                raise NotIdentical(f"{method} gives other tokens than computing: {_tokens(run)}, not {first}")

    def _row(self, method: str, run: int, speed: float, runs: Mapping[str, LoaderRun]) -> Row:
        ours = runs[method]
        chunk = min(self._loaders[method].chunk_tokens, len(self._prompt))
        output = ours.outputs[0]
        firsts = [_first_s(ours, i) for i in range(len(ours.outputs))]
        steps = [s.seconds for s in runs[COMPUTE].steps]
        return load_report(output) | {
            "method": method,
            "bytes_per_s": speed,
            "run": run,
            "num_others": len(firsts) - 1,
            "ttft_s": firsts[0],
            "others_ttft_s": float(np.mean(firsts[1:])) if firsts[1:] else None,
            "all_first_s": max(firsts),
            "chunk_s": max(median(steps), chunk * self._facts.kv_token_bytes / speed if method != COMPUTE else 0.0),
            "tokens_loaded": output.attestation.tokens_loaded,
            "tokens_computed": output.attestation.tokens_computed,
            "identical": _tokens(ours) == _tokens(runs[COMPUTE]),
        }


def calibrate(bench: Bench, table: Loading, model: str, context: int, seed: int, facts: ModelFacts) -> Calibration:
    """Compute a prefix of `context` tokens a few times, alone: what it takes, and what each step takes."""
    prompt = sample_prompts(context, 1, seed=seed, vocab_size=facts.vocab_size)[0].tolist()
    setup = LoaderSetup(model, BASE, table.tier, longest=context, step_tokens=table.step_tokens)
    with closing(bench.loader(setup)) as loader:
        loader.run([prompt[:WARM_UP_TOKENS]])
        runs = [loader.run([prompt]) for _ in range(CALIBRATIONS)]
    steps = [step for run in runs for step in run.steps if step.num_tokens >= table.step_tokens]
    seconds = median(_first_s(run, 0) for run in runs)
    return Calibration(fit_steps(steps), seconds, context * facts.kv_token_bytes)


def fit_steps(steps: Sequence[StepTime]) -> tuple[float, float]:
    """Fixed seconds, and seconds per token of context, of full steps; the slope is never below 0.

    The line goes through the medians of the nearer and the farther half, so that a slow moment does not tilt it.
    """
    if not steps:
        return 0.0, 0.0
    ordered = sorted(steps, key=lambda step: step.context)
    half = max(1, len(ordered) // 2)
    near, far = ([(s.context, s.seconds) for s in part] for part in (ordered[:half], ordered[-half:]))
    (x0, y0), (x1, y1) = ((median(x for x, _ in part), median(y for _, y in part)) for part in (near, far))
    slope = max(0.0, (y1 - y0) / (x1 - x0)) if x1 > x0 else 0.0
    return max(0.0, y0 - slope * x0), slope


def require_length(cell: Cell, facts: ModelFacts) -> None:
    """CapacityError if the model has not so many positions."""
    if cell.context + 1 > facts.max_model_len:
        raise CapacityError(
            f"loading {cell.block!r}: a prefix of {cell.context} tokens and one more are more than the "
            f"{facts.max_model_len} positions of {facts.name}: lower context_lengths"
        )


def loading_seconds(table: Loading, context: int, share: float) -> float:
    """A guess of what a loading cell takes."""
    alone = context / PREFILL_RATE
    own = 0.0
    for text in table.bandwidths:
        value, relative = read_bandwidth(text)
        load = alone * max(table.context_lengths) / context / value if relative else alone
        load = max(load * context / max(table.context_lengths), 0.001)
        both = 1 / (share / alone + 1 / load)
        own += table.repeats * (alone / share + load) + (table.repeats + 1) * both * max(1, len(table.methods) - 1)
    return 0.5 + (1 + len(table.methods)) * alone + own


def _speed(text: str, known: Calibration) -> float:
    value, relative = read_bandwidth(text)
    return value * known.break_even if relative else value


def _short(mixed: Mixed, seed: int, run: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng((seed, run, 77))
    lengths = np.linspace(mixed.low, mixed.high, mixed.requests).round().astype(int)
    return [rng.integers(0, vocab_size, size=n).tolist() for n in rng.permutation(lengths)]


def _tokens(run: LoaderRun) -> list[int]:
    """The first token of every request."""
    return [output.token_ids[0] for output in run.outputs]


def _first_s(run: LoaderRun, index: int) -> float:
    output = run.outputs[index]
    if output.error is not None:
        raise RequestError(output.error)
    first = output.metrics.first_token
    if first is None or not math.isfinite(first):
        raise PlanError(f"{output.request_id} ended without a token")
    return first - run.start
