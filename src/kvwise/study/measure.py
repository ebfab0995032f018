"""Measures one cell: an engine is made, driven, and closed; what it did becomes rows."""

from collections.abc import Callable, Sequence
from contextlib import closing

from kvwise.core.clock import Clock
from kvwise.core.errors import CapacityError, KvwiseError, RequestError
from kvwise.study.asked import sittings
from kvwise.study.cells import REFERENCE, Cell, CellKind
from kvwise.study.exam import Sitting
from kvwise.study.face import Bench, ModelFacts, OnOffRun
from kvwise.study.live import Pace, drive, warm_up
from kvwise.study.loading import LoadingMeasure, NotIdentical
from kvwise.study.plan import Plan, parse_memory
from kvwise.study.quality import Reference, examine, reference
from kvwise.study.rows import CellResult, live_result, onoff_result, quality_result
from kvwise.study.workloads import Job, cell_jobs, sample_prompts

BLOCK_SLACK = 64  # tokens a request may waste in partly filled blocks
WARM_UP_TOKENS = 64
SIDES = ("hf-off", "hf-on", "kvwise")


class IdleMethod(KvwiseError):
    """A strategy's method did nothing in a cell, so the cell would measure something else than it says."""


class CellRunner:
    """Runs cells of one plan on one bench; what the full cache answered is kept while cells ask the same."""

    def __init__(self, plan: Plan, bench: Bench) -> None:
        self._plan = plan
        self._bench = bench
        self._kept: tuple[tuple[str, int], Reference, int] | None = None
        self._measures: dict[CellKind, Callable[[Cell], CellResult]] = {
            CellKind.LOADING: LoadingMeasure(plan, bench).run,
            CellKind.LIVE: self._live,
            CellKind.QUALITY: self._quality,
            CellKind.ONOFF: self._onoff,
        }

    @property
    def clock(self) -> Clock:
        """The bench's clock."""
        return self._bench.clock

    def run(self, cell: Cell) -> CellResult:
        """Measure `cell`; any exception means that it failed."""
        return self._measures[cell.kind](cell)

    # -- traffic --------------------------------------------------------------------------------------------------

    def _live(self, cell: Cell) -> CellResult:
        began = self.clock.now()
        facts = self._bench.facts(cell.model)
        jobs = cell_jobs(cell, seed=self._plan.seed, vocab_size=facts.vocab_size)
        _require_fit(jobs, facts)
        memory = memory_bytes(cell.memory, facts, [len(j.prompt) + j.output_tokens for j in jobs])
        assert cell.load is not None
        with closing(self._bench.engine(cell.model, cell.strategy, memory, cell.placement)) as engine:
            length = min(WARM_UP_TOKENS, min(len(j.prompt) for j in jobs))
            prompts = sample_prompts(length, cell.load.warmup_requests, seed=1, vocab_size=facts.vocab_size)
            warm_up(engine, prompts)
            out = drive(engine, jobs, self._pace(cell))
            heads_shared = facts.num_heads - engine.num_heads
        result = live_result(cell, jobs, out, facts, self.clock.now() - began)
        row = result.tables["cells"][0]
        if row["num_errors"] == len(jobs):
            raise RequestError(next(r["error"] for r in result.tables["requests"] if r["error"]))
        self._require_work(cell, result, heads_shared)
        return result

    def _pace(self, cell: Cell) -> Pace:
        assert cell.load is not None
        return Pace(
            clock=self.clock,
            sleep=self._bench.sleep,
            resident_bytes=self._bench.resident_bytes,
            limit_s=cell.load.time_limit_s,
            sample_every_s=cell.load.sample_every_s,
            concurrency=cell.concurrency,
            block_tokens=self._plan.engine.block_size,
            open_loop=cell.rate != float("inf"),
        )

    def _require_work(self, cell: Cell, result: CellResult, heads_shared: int) -> None:
        row = result.tables["cells"][0]
        num_loads = sum(row.get("loads", {}).values())
        idle = self._bench.idle_methods(cell.strategy, row["did"], row["tokens_reused"], num_loads, heads_shared)
        if idle:
            raise IdleMethod(
                f"{' and '.join(idle)} did nothing in this cell (prompts too short for the budget, or nothing to share)"
            )

    # -- quality --------------------------------------------------------------------------------------------------

    def _quality(self, cell: Cell) -> CellResult:
        began = self.clock.now()
        facts = self._bench.facts(cell.model)
        full, memory = self._reference(cell, facts)
        examined = full.examined
        if cell.strategy != REFERENCE:
            with closing(self._bench.engine(cell.model, cell.strategy, memory)) as engine:
                examined = examine(engine, full)
        result = quality_result(cell, examined, facts, self.clock.now() - began)
        # A budget of everything has nothing to drop.
        if cell.budget is None or cell.budget < 1:
            self._require_work(cell, result, facts.num_heads - examined.num_heads)
        return result

    def _reference(self, cell: Cell, facts: ModelFacts) -> tuple[Reference, int]:
        """What the full cache answers, and the bytes of a pool that holds all who sit the exam at once."""
        key = cell.model, cell.context
        if self._kept is None or self._kept[0] != key:
            assert cell.quality is not None
            asked = sittings(cell.quality, facts, cell.context, self._plan.seed)
            memory = exam_memory(asked, facts, self._plan.engine.max_num_seqs)
            self._kept = None  # the logits of the one before: both at once may be too much
            with closing(self._bench.engine(cell.model, REFERENCE, memory)) as engine:
                self._kept = key, reference(engine, asked), memory
        return self._kept[1:]

    # -- on and off -----------------------------------------------------------------------------------------------

    def _onoff(self, cell: Cell) -> CellResult:
        began = self.clock.now()
        assert cell.onoff is not None
        facts = self._bench.facts(cell.model)
        prompt = sample_prompts(cell.onoff.prompt_tokens, 1, seed=self._plan.seed, vocab_size=facts.vocab_size)[0]
        for side in SIDES:
            self._bench.generate(cell.model, side, prompt.tolist(), 2)
        runs = [
            (repeat, run, same)
            for repeat in range(cell.onoff.repeats)
            for tokens in cell.onoff.output_tokens
            for run, same in self._sides(cell.model, prompt.tolist(), tokens)
        ]
        return onoff_result(cell, runs, self.clock.now() - began)

    def _sides(self, model: str, prompt: list[int], tokens: int) -> list[tuple[OnOffRun, bool]]:
        runs = [self._bench.generate(model, side, prompt, tokens) for side in SIDES]
        for run in runs[1:]:
            if run.tokens != runs[0].tokens:
                pairs = zip(run.tokens, runs[0].tokens, strict=False)
                where = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(run.tokens), tokens))
                raise NotIdentical(
                    f"{run.side} and {runs[0].side} differ from output token {where + 1} of {tokens} on ({model})"
                )
        return [(run, True) for run in runs]


def exam_memory(asked: Sequence[Sitting], facts: ModelFacts, max_num_seqs: int) -> int:
    """Bytes of a KV pool in which the longest `max_num_seqs` samples run at once."""
    longest = sorted((len(s.context) + x.num_tokens for s in asked for x in s.samples), reverse=True)
    return memory_bytes("auto", facts, longest[:max_num_seqs])


def memory_bytes(memory: str, facts: ModelFacts, request_tokens: Sequence[int]) -> int:
    """Size of the KV pool. "auto" is room for all requests at once, so that memory limits nothing."""
    kind, amount = parse_memory(memory)
    if kind == "bytes":
        return amount
    tokens = amount if kind == "tokens" else sum(request_tokens) + BLOCK_SLACK * (len(request_tokens) + 2)
    return tokens * facts.kv_token_bytes


def _require_fit(jobs: Sequence[Job], facts: ModelFacts) -> None:
    longest = max(jobs, key=lambda j: len(j.prompt) + j.output_tokens)
    tokens = len(longest.prompt) + longest.output_tokens
    if tokens > facts.max_model_len:
        raise CapacityError(
            f"request {longest.index} has {len(longest.prompt)} prompt and {longest.output_tokens} output tokens, more "
            f"than the {facts.max_model_len} positions of {facts.name}: lower the context length or the length scale"
        )
