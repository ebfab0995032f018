"""A plan expanded into cells: what one engine is asked to do once, with an id that names everything it depends on."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import product

from kvwise.core.errors import PlanError, StrategyError
from kvwise.study.plan import Block, Load, OnOff, Plan, Quality, TraceFile, Workload

REFERENCE = "full"  # the strategy everything is compared with


class CellKind(StrEnum):
    """What a cell measures."""

    ONOFF = "onoff"  # KV cache on against off
    QUALITY = "quality"  # agreement with the full cache
    LIVE = "live"  # traffic in real time


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. `rate` inf sends at once, None follows the trace; `concurrency` None is unlimited."""

    kind: CellKind
    block: str
    model: str
    strategy: str
    framework: str
    budget: float | None = None
    rate: float | None = math.inf
    concurrency: int | None = None
    context: int = 0
    memory: str = "auto"
    repeat: int = 0
    workload: Workload | None = None
    load: Load | None = None
    quality: Quality | None = None
    onoff: OnOff | None = None
    id: str = ""

    @property
    def label(self) -> str:
        """Strategy as shown: framework and budget, such as `h2o 20%`."""
        return label(self.framework, self.budget)

    def describe(self) -> str:
        """One line for progress and failure lists."""
        if self.kind is CellKind.ONOFF:
            return f"KV cache on/off, {self.model}"
        if self.kind is CellKind.QUALITY:
            return f"agreement, {self.label}, {self.model}, context {self.context}"
        context = f", context {self.context}" if self.context else ""
        memory = "" if self.memory == "auto" else f", {self.memory}"
        return f"{self.label}, {self.model}, {self.load_text()}{context}{memory}, repeat {self.repeat + 1}"

    def load_text(self) -> str:
        """The load as shown, such as `8 req/s` or `4 at a time`."""
        at_once = "all at once" if self.concurrency is None else f"{self.concurrency} at a time"
        if self.rate is None:
            return "trace times" if self.concurrency is None else f"trace times, at most {at_once}"
        if math.isinf(self.rate):
            return at_once
        return f"{self.rate:g} req/s" + ("" if self.concurrency is None else f", at most {at_once}")


def label(framework: str, budget: float | None) -> str:
    """Framework and budget as shown."""
    return framework if budget is None else f"{framework} {budget * 100:g}%"


def framework_of(text: str) -> str:
    """The strategy text without its budget: `h2o(budget={budget})` and `h2o(budget=0.2)` are `h2o`."""
    bare = re.sub(r"\bbudget=(\{budget\}|[0-9.]+)\s*,?\s*", "", text)
    return re.sub(r",?\s*\)", ")", bare).replace("()", "").replace("{budget}", "B").strip()


def expand(plan: Plan) -> list[Cell]:
    """All cells in the order they run; PlanError if there are more than the plan's `max_cells`."""
    count = sum(_count(block) for block in plan.block)
    if count > plan.max_cells:
        raise PlanError(
            f"the plan has {count} cells, the limit is {plan.max_cells}; take values out of the axes, "
            f"split the product into blocks, or raise max_cells"
        )
    unique: dict[str, Cell] = {}
    for cell in _all(plan):
        named = replace(cell, id=_cell_id(cell, plan))
        unique.setdefault(named.id, named)
    return list(unique.values())


def check_strategies(plan: Plan, parse: Callable[[str], object]) -> None:
    """Let `parse` judge every strategy of the plan; PlanError naming block and strategy on the first it refuses."""
    for block in plan.block:
        for text, _, budget in _filled(block):
            try:
                parse(text)
            except StrategyError as error:
                origin = "" if budget is None else f" (budget {budget:g})"
                raise PlanError(f"block {block.name!r}: strategy {text!r}{origin}: {error}") from error


def _count(block: Block) -> int:
    conditions = (block.models, block.request_rates, block.concurrency, block.context_lengths, block.memory)
    per_strategy = sum(len(block.budgets) if "{budget}" in s else 1 for s in block.strategies)
    return per_strategy * block.repeats * math.prod(map(len, conditions))


def _all(plan: Plan) -> Iterator[Cell]:
    if plan.onoff:
        yield Cell(CellKind.ONOFF, "on/off", plan.onoff.model, REFERENCE, REFERENCE, onoff=plan.onoff)
    for block in plan.block:
        if block.quality:
            yield from _quality_cells(block, plan.quality)
    # Repeats outermost and strategies innermost: a slow minute of the machine then hits all strategies alike.
    for repeat in range(max(block.repeats for block in plan.block)):
        for block in plan.block:
            if repeat < block.repeats:
                yield from _live_cells(block, repeat)


def _quality_cells(block: Block, quality: Quality) -> Iterator[Cell]:
    # The name of the block stays out: blocks that ask the same prompts share the measurement.
    for model, context in product(block.models, block.context_lengths):
        for text, framework, budget in _filled(block):
            yield Cell(
                CellKind.QUALITY,
                "agreement",
                model,
                text,
                framework,
                budget,
                context=context,
                quality=quality,
            )


def _live_cells(block: Block, repeat: int) -> Iterator[Cell]:
    filled = list(_filled(block))
    turn = repeat % len(filled)  # another strategy goes first in each repeat
    axes = product(block.models, block.context_lengths, block.memory, block.concurrency, block.request_rates)
    for model, context, memory, concurrency, rate in axes:
        for text, framework, budget in filled[turn:] + filled[:turn]:
            yield Cell(
                kind=CellKind.LIVE,
                block=block.name,
                model=model,
                strategy=text,
                framework=framework,
                budget=budget,
                rate=None if rate == "trace" else float(rate),
                concurrency=None if concurrency == "unlimited" else concurrency,
                context=_context(block.workload, context),
                memory=memory,
                repeat=repeat,
                workload=block.workload,
                load=block.load,
            )


def _context(workload: Workload, context: int) -> int:
    return 0 if isinstance(workload, TraceFile) else context  # a trace brings its own lengths


def _filled(block: Block) -> Iterator[tuple[str, str, float | None]]:
    """(strategy text, framework, budget) of every strategy, once per budget where it names {budget}."""
    for template in block.strategies:
        unknown = set(re.findall(r"\{([^{}]*)\}", template)) - {"budget"}
        if unknown:
            raise PlanError(
                f"block {block.name!r}: strategy {template!r}: only {{budget}} can be filled in, not {unknown}"
            )
        if "{budget}" not in template:
            yield template, framework_of(template), _own_budget(template)
            continue
        if not block.budgets:
            raise PlanError(f"block {block.name!r}: strategy {template!r} needs budgets; add `budgets = [0.2]`")
        for budget in block.budgets:
            yield template.replace("{budget}", f"{budget:g}"), framework_of(template), budget


def _own_budget(text: str) -> float | None:
    match = re.search(r"\bbudget=([0-9.]+)", text)
    return None if match is None else float(match[1])


def _cell_id(cell: Cell, plan: Plan) -> str:
    """12 hex digits over the cell and whatever of the plan it depends on."""
    facts = {k: v for k, v in asdict(cell).items() if k not in ("id", "workload", "load", "quality", "onoff")}
    for name in ("workload", "load", "quality", "onoff"):
        table = getattr(cell, name)
        facts[name] = None if table is None else table.model_dump(mode="json")
    facts |= {"seed": plan.seed, "dtype": plan.dtype, "engine": plan.engine.model_dump(mode="json")}
    facts |= {"links": plan.links, "threads": plan.threads}
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
