"""A plan expanded into cells: what one engine is asked to do once, with an id that names everything it depends on."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import product

from kvwise.core.errors import PlanError, StrategyError
from kvwise.study.loading_section import BASE, Loading
from kvwise.study.placement import NOWHERE, Placement
from kvwise.study.plan import Block, Load, OnOff, Plan, TraceFile, Workload
from kvwise.study.quality_section import Quality

REFERENCE = "full"  # the strategy everything is compared with

Filled = tuple[str, str, float | None]  # strategy text, framework, budget


class CellKind(StrEnum):
    """What a cell measures."""

    ONOFF = "onoff"  # KV cache on against off
    QUALITY = "quality"  # what the strategy costs in answers
    LIVE = "live"  # traffic in real time
    LOADING = "loading"  # the first token of a request whose prefix is stored below


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. `rate` inf sends at once, None follows the trace; `concurrency` None is unlimited.

    A loading cell measures all methods over all bandwidths of its table; `share` is that of the device's steps.
    """

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
    placement: Placement = NOWHERE
    share: float = 1.0
    loading: Loading | None = None
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
            return f"quality, {self.label}, {self.model}, context {self.context}"
        if self.kind is CellKind.LOADING:
            share = "" if self.share == 1 else f", {self.share * 100:g} % of each step"
            return f"loading, {self.block}, {self.model}, context {self.context}{share}"
        context = f", context {self.context}" if self.context else ""
        memory = "" if self.memory == "auto" else f", {self.memory}"
        placed = "".join(f", {part}" for part in self.placement.words())
        return f"{self.label}, {self.model}, {self.load_text()}{context}{memory}{placed}, repeat {self.repeat + 1}"

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


def expand(plan: Plan, *, quality_only: bool = False) -> list[Cell]:
    """All cells in the order they run; PlanError if there are more than the plan's `max_cells`.

    `quality_only`, here or in the plan, leaves out all but the quality cells.
    """
    only = quality_only or plan.quality_only
    loads = sum(len(t.models) * len(t.context_lengths) * len(t.compute_shares) for t in plan.loading)
    _refuse_many(plan, loads)
    _refuse_many(plan, sum(_num_quality(block, plan.quality) for block in plan.block))
    if not only:
        _refuse_many(plan, sum(_num_live(block) for block in plan.block))
    unique: dict[str, Cell] = {}
    for cell in _quality_cells(plan) if only else _all(plan):
        named = replace(cell, id=_cell_id(cell, plan))
        unique.setdefault(named.id, named)
    if only and not unique:
        raise PlanError("the plan measures no quality; take `quality = false` out of one of its blocks")
    return list(unique.values())


def block_texts(block: Block) -> frozenset[str]:
    """The strategies of a block, filled."""
    return frozenset(text for text, _, _ in _filled(block))


def check_strategies(plan: Plan, parse: Callable[[str], object]) -> None:
    """Let `parse` judge every strategy of the plan; PlanError naming where it stands on the first it refuses."""
    loads = [(f"loading {b.name!r}", ((text, m, None) for m, text in b.strategies.items())) for b in plan.loading]
    blocks = [(_origin(b), _filled(b)) for b in plan.block]
    for origin, strategies in [*blocks, ("quality.guides", _guides(plan)), *loads]:
        for text, _, budget in strategies:
            try:
                parse(text)
            except StrategyError as error:
                filled = "" if budget is None else f" (budget {budget:g})"
                raise PlanError(f"{origin}: strategy {text!r}{filled}: {error}") from error


def has_tasks(model: str) -> bool:
    """Whether a model of this name can be asked anything: random weights only agree with the full cache or do not."""
    return not model.startswith("random:") and not model.endswith(".json")


def _refuse_many(plan: Plan, count: int) -> None:
    if count > plan.max_cells:
        raise PlanError(
            f"the plan has {count} cells, the limit is {plan.max_cells}; take values out of the axes, "
            f"split the product into blocks, or raise max_cells"
        )


def _num_live(block: Block) -> int:
    conditions = (block.models, block.request_rates, block.concurrency, block.context_lengths, block.memory,
                  block.tiers, block.links, block.ttl_s, block.idle_ttl_s)  # fmt: skip
    return _num_filled(block.strategies, block.budgets) * block.repeats * math.prod(map(len, conditions))


def _num_quality(block: Block, quality: Quality) -> int:
    contexts = quality.context_lengths or block.context_lengths
    filled = _num_filled(block.strategies, block.budgets) + _num_filled(quality.guides, quality.guide_budgets)
    return filled * len(block.models) * len(contexts) if _asks(block) else 0


def _asks(block: Block) -> bool:
    """Whether the quality of a block's strategies is measured: not where they load from tiers, which no exam has."""
    return block.quality and not any(block.tiers)


def _num_filled(templates: Sequence[str], budgets: Sequence[float]) -> int:
    return sum(len(budgets) if "{budget}" in template else 1 for template in templates)


def _all(plan: Plan) -> Iterator[Cell]:
    if plan.onoff:
        yield Cell(CellKind.ONOFF, "on/off", plan.onoff.model, REFERENCE, REFERENCE, onoff=plan.onoff)
    yield from _quality_cells(plan)
    yield from _loading_cells(plan)
    # Repeats outermost and strategies innermost: a slow minute of the machine then hits all strategies alike.
    for repeat in range(max((block.repeats for block in plan.block), default=0)):
        for block in plan.block:
            if repeat < block.repeats:
                yield from _live_cells(block, repeat)


def _quality_cells(plan: Plan) -> Iterator[Cell]:
    """Strategies of all blocks by model and context length: blocks that ask the same share the measurement.

    The full cache is always there, since the others are measured by it.
    """
    asked: dict[tuple[str, int], dict[Filled, None]] = {}
    for block in plan.block:
        if _asks(block):
            for place in product(block.models, plan.quality.context_lengths or block.context_lengths):
                strategies = asked.setdefault(place, {(REFERENCE, REFERENCE, None): None})
                strategies |= dict.fromkeys(_filled(block))
    for (model, context), strategies in asked.items():
        guides = dict.fromkeys(_guides(plan)) if has_tasks(model) else {}
        for text, framework, budget in strategies | guides:
            yield Cell(
                CellKind.QUALITY,
                "quality",
                model,
                text,
                framework,
                budget,
                context=context,
                quality=plan.quality,
            )


def _loading_cells(plan: Plan) -> Iterator[Cell]:
    for table in plan.loading:
        for model, context, share in product(table.models, table.context_lengths, table.compute_shares):
            yield Cell(CellKind.LOADING, table.name, model, BASE, BASE, context=context, share=share, loading=table)


def _live_cells(block: Block, repeat: int) -> Iterator[Cell]:
    filled = list(_filled(block))
    turn = repeat % len(filled)  # another strategy goes first in each repeat
    axes = product(
        block.models, block.context_lengths, block.memory, block.placements, block.concurrency, block.request_rates
    )
    for model, context, memory, placement, concurrency, rate in axes:
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
                placement=placement,
            )


def _context(workload: Workload, context: int) -> int:
    return 0 if isinstance(workload, TraceFile) else context  # a trace brings its own lengths


def _filled(block: Block) -> Iterator[Filled]:
    return _fill(block.strategies, block.budgets, _origin(block), "budgets")


def _guides(plan: Plan) -> Iterator[Filled]:
    return _fill(plan.quality.guides, plan.quality.guide_budgets, "quality.guides", "guide_budgets")


def _origin(block: Block) -> str:
    return f"block {block.name!r}"


def _fill(templates: Sequence[str], budgets: Sequence[float], origin: str, key: str) -> Iterator[Filled]:
    """Every strategy with its framework and budget, once per budget where it names {budget}."""
    for template in templates:
        unknown = set(re.findall(r"\{([^{}]*)\}", template)) - {"budget"}
        if unknown:
            raise PlanError(f"{origin}: strategy {template!r}: only {{budget}} can be filled in, not {unknown}")
        if "{budget}" not in template:
            yield template, framework_of(template), _own_budget(template)
            continue
        if not budgets:
            raise PlanError(f"{origin}: strategy {template!r} needs budgets; add `{key} = [0.2]`")
        for budget in budgets:
            yield template.replace("{budget}", f"{budget:g}"), framework_of(template), budget


def _own_budget(text: str) -> float | None:
    match = re.search(r"\bbudget=([0-9.]+)", text)
    return None if match is None else float(match[1])


def _cell_id(cell: Cell, plan: Plan) -> str:
    """12 hex digits over the cell and whatever of the plan it depends on."""
    facts = {k: v for k, v in asdict(cell).items() if k not in ("id", "workload", "load", "quality", "onoff")}
    # What came later and says nothing is left out, so that cells recorded before it keep their ids.
    for name, silent in (("placement", NOWHERE), ("share", 1.0), ("loading", None)):
        if getattr(cell, name) == silent:
            del facts[name]
    if cell.loading is not None:
        facts["loading"] = cell.loading.facts()
    for name in ("workload", "load", "quality", "onoff"):
        table = getattr(cell, name)
        facts[name] = None if table is None else table.model_dump(mode="json")
    facts |= {"seed": plan.seed, "dtype": plan.dtype, "engine": plan.engine.facts()}
    facts |= {"links": plan.links, "threads": plan.threads}
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
