"""A study plan: what is varied, under which traffic, for how long; TOML to values and back."""

import hashlib
import json
import tomllib
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from kvwise.core.errors import PlanError, UsageError
from kvwise.core.sizes import parse_bytes
from kvwise.study.lengths import Lengths
from kvwise.study.loading_section import Loading, check_loading
from kvwise.study.placement import Placement, check_tiers, link_table
from kvwise.study.quality_section import Budget, Context, Quality, check_quality
from kvwise.study.strict import Strict, read_table

MAX_PLAN_BYTES = 1 << 20
MAX_CELLS = 5000
PAPERS = {"2410.03065": "paper_2410_03065.toml"}  # arXiv id -> its plan

Rate = Annotated[float, Field(gt=0)] | Literal["inf", "trace"]
Concurrency = Annotated[int, Field(ge=1)] | Literal["unlimited"]
Lifetime = Annotated[float, Field(gt=0)] | Literal["never"]


class Chat(Strict):
    """Sessions of several turns behind shared system prompts; the context length is that of the system prompt.

    `answers` says what the history of the next turn holds: "forced" (drawn answers that the engine is made to give,
    so that prompts are equal for all strategies and the history is what the engine computed), "drawn" (drawn
    answers, while the engine's own are thrown away) or "real" (the engine's own: prompts then differ by strategy).
    """

    kind: Literal["chat"]
    turns: int = Field(default=3, ge=1, le=1000)
    system_prompts: int = Field(default=1, ge=1)
    open_sessions: int = Field(default=4, ge=1)
    turn_tokens: Lengths = 24
    answer_tokens: Lengths = 16
    answers: Literal["forced", "drawn", "real"] = "forced"
    think_s: float = Field(default=0.0, ge=0)


class Document(Strict):
    """Long documents, each asked several questions; the context length is that of the document."""

    kind: Literal["document"]
    questions: int = Field(default=3, ge=1)
    question_tokens: Lengths = 24
    answer_tokens: Lengths = 16


class Random(Strict):
    """Unrelated prompts of exactly the context length, or of `input_tokens` cut at it."""

    kind: Literal["random"]
    input_tokens: Lengths | None = None
    answer_tokens: Lengths = 16


class Pairs(Strict):
    """Unrelated prompts whose (input, output) lengths are rows of a CSV file, inputs cut at the context length."""

    kind: Literal["pairs"]
    file: str
    input_column: str = "input_tokens"
    output_column: str = "output_tokens"
    length_scale: float = Field(default=1.0, gt=0)
    max_output_tokens: int = Field(default=1024, ge=1)


class TraceFile(Strict):
    """A request trace: Mooncake JSONL, or CSV with arrival_s, input_tokens, output_tokens.

    `length_scale` and `time_scale` multiply lengths and times, so that a trace of a cluster fits the machine.
    """

    kind: Literal["trace"]
    file: str
    block_size: int = Field(default=512, ge=1)
    length_scale: float = Field(default=1.0, gt=0)
    time_scale: float = Field(default=1.0, gt=0)
    max_output_tokens: int = Field(default=1024, ge=1)
    spread_ties_s: float = Field(default=0.0, ge=0)


Workload = Annotated[Chat | Document | Random | Pairs | TraceFile, Field(discriminator="kind")]


class Load(Strict):
    """How many requests a cell sends and how they arrive.

    At a finite rate the number is `rate * duration_s`, kept between `min_requests` (8, or `max_requests` if that is
    fewer) and `max_requests`; at rate "inf" it is `max_requests`. `burstiness` is the shape of the Gamma law of the
    gaps: 1 is Poisson, below 1 is burstier.
    """

    duration_s: float = Field(default=3.0, gt=0)
    min_requests: int | None = Field(default=None, ge=1)
    max_requests: int = Field(default=64, ge=1)
    burstiness: float = Field(default=1.0, gt=0)
    time_limit_s: float = Field(default=10.0, gt=0)
    warmup_requests: int = Field(default=1, ge=0)
    sample_every_s: float = Field(default=0.02, gt=0)

    @property
    def fewest(self) -> int:
        """The least number of requests of a cell."""
        return min(8, self.max_requests) if self.min_requests is None else self.min_requests


class Block(Strict):
    """A product of axes under one workload. A plan of several blocks varies many axes without their full product.

    `tiers`, `links`, `ttl_s` and `idle_ttl_s` are the axes of placement: what lies below the device, over which
    throttled links (on top of the plan's), and how long it is kept.
    """

    ADDED: ClassVar[tuple[str, ...]] = ("tiers", "links", "ttl_s", "idle_ttl_s")

    name: str = Field(min_length=1, max_length=64)
    strategies: tuple[str, ...] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    budgets: tuple[Budget, ...] = ()
    request_rates: tuple[Rate, ...] = Field(default=("inf",), min_length=1)
    concurrency: tuple[Concurrency, ...] = Field(default=("unlimited",), min_length=1)
    context_lengths: tuple[Context, ...] = Field(default=(256,), min_length=1)
    memory: tuple[str, ...] = Field(default=("auto",), min_length=1)
    tiers: tuple[tuple[str, ...], ...] = Field(default=((),), min_length=1)
    links: tuple[dict[str, str], ...] = Field(default=({},), min_length=1)
    ttl_s: tuple[Lifetime, ...] = Field(default=("never",), min_length=1)
    idle_ttl_s: tuple[Lifetime, ...] = Field(default=("never",), min_length=1)
    repeats: int = Field(default=1, ge=1, le=1000)
    quality: bool = True
    workload: Workload
    load: Load = Load()

    @property
    def placements(self) -> list[Placement]:
        """The product of the axes of placement."""
        axes = product(self.tiers, self.links, self.ttl_s, self.idle_ttl_s)
        return [Placement(t, tuple(sorted(k.items())), _seconds(ttl), _seconds(idle)) for t, k, ttl, idle in axes]


def _seconds(lifetime: float | Literal["never"]) -> float | None:
    return None if lifetime == "never" else lifetime


class Slo(Strict):
    """What a good answer must meet, for goodput: the time to the first token and the mean time per later token."""

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    e2e_ms: float | None = Field(default=None, gt=0)


class OnOff(Strict):
    """The KV cache on against off, token by token, with growing outputs."""

    model: str
    prompt_tokens: int = Field(default=32, ge=1)
    output_tokens: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(16, 32, 64, 128), min_length=2)
    repeats: int = Field(default=2, ge=1)


class EngineOptions(Strict):
    """Engine settings that all cells share; the names are those of `EngineConfig`."""

    ADDED: ClassVar[tuple[str, ...]] = ("offload", "store_after", "store_min_tokens", "tier_deadline_s")

    device: str = "cpu"
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    max_num_seqs: int = Field(default=64, ge=1)
    max_num_batched_tokens: int = Field(default=512, ge=1)
    max_model_len: int | None = Field(default=None, ge=1)
    enable_chunked_prefill: bool = True
    kv_offloading: str | None = None
    kernels: str | None = None
    offload: Literal["through", "back"] = "through"
    store_after: int = Field(default=1, ge=1)
    store_min_tokens: int = Field(default=0, ge=0)
    tier_deadline_s: float = Field(default=10.0, gt=0)


class Plan(Strict):
    """A whole study.

    `min_quality` is the least score that a recommended strategy may have; `quality_only` leaves out all but answers.
    `paper` is the arXiv id of a paper whose figures are printed beside; `methods` are files (or modules) of the user's
    own methods.
    """

    ADDED: ClassVar[tuple[str, ...]] = ("loading", "methods")

    name: str = Field(default="study", min_length=1, max_length=64)
    seed: int = Field(default=0, ge=0)
    threads: int | None = Field(default=None, ge=1)
    dtype: str = "auto"
    time_limit_s: float | None = Field(default=None, gt=0)
    tie_margin: float = Field(default=0.05, ge=0, lt=1)
    min_quality: float | None = Field(default=None, ge=0, le=1)
    quality_only: bool = False
    paper: str | None = None
    max_cells: int = Field(default=1000, ge=1, le=MAX_CELLS)
    methods: tuple[str, ...] = ()
    slo: Slo = Slo()
    quality: Quality = Quality()
    onoff: OnOff | None = None
    engine: EngineOptions = EngineOptions()
    links: dict[str, str] = Field(default_factory=dict)
    block: tuple[Block, ...] = ()
    loading: tuple[Loading, ...] = ()


# What a reader may change between runs without making the rows already measured those of another study.
_NOT_MEASURED = ("name", "time_limit_s", "tie_margin", "min_quality", "quality_only", "paper", "max_cells", "slo")


def plan_hash(plan: Plan) -> str:
    """16 hex digits over everything that changes what is measured."""
    facts = plan.facts() | {"engine": plan.engine.facts(), "block": [block.facts() for block in plan.block]}
    kept = {k: v for k, v in facts.items() if k not in _NOT_MEASURED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def read_plan(path: Path) -> Plan:
    """Read a plan file; PlanError in one line if it cannot be."""
    if not path.is_file():
        raise PlanError(f"{path} is no file; give a plan in TOML (`kvwise study plan` prints one to start from)")
    if path.stat().st_size > MAX_PLAN_BYTES:
        raise PlanError(f"{path} has {path.stat().st_size} bytes; a plan may have at most {MAX_PLAN_BYTES}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from error
    return read_plan_text(text, str(path))


def read_plan_text(text: str, where: str) -> Plan:
    """Read a plan from TOML text; `where` names it in errors."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise PlanError(f"{where} is no TOML: {error}") from error
    if not data:
        raise PlanError(f"{where} is empty; `kvwise study plan` prints a plan to start from")
    return read_plan_data(data, where)


def read_plan_data(data: dict[str, Any], where: str) -> Plan:
    """Make a plan of parsed TOML."""
    plan = read_table(data, Plan, where)
    _check(plan, where)
    return plan


def link_speeds(plan: Plan) -> dict[str, float]:
    """Throttled links -> bytes per second."""
    return link_table(plan.links)


def _check(plan: Plan, where: str) -> None:
    """What types cannot say."""
    if not plan.block and not plan.loading:
        raise PlanError(f"{where} measures nothing: add a [[block]] or a [[loading]] table")
    names = [block.name for block in plan.block] + [table.name for table in plan.loading]
    if len(set(names)) < len(names):
        raise PlanError(f"{where}: two blocks are called {max(names, key=names.count)!r}; give each its own name")
    for block in plan.block:
        try:
            _check_block(block)
        except UsageError as error:
            raise PlanError(f"{where}: block {block.name!r}: {error}") from error
    for table in plan.loading:
        try:
            check_loading(table)
        except UsageError as error:
            raise PlanError(f"{where}: loading {table.name!r}: {error}") from error
    try:
        check_quality(plan.quality)
        link_speeds(plan)
        if plan.engine.kv_offloading is not None:
            parse_bytes(plan.engine.kv_offloading)
    except UsageError as error:
        raise PlanError(f"{where}: {error}") from error
    if plan.paper is not None and plan.paper not in PAPERS:
        raise PlanError(f"{where}: paper = {plan.paper!r} is not known; known: {', '.join(PAPERS)}")
    if plan.onoff and list(plan.onoff.output_tokens) != sorted(set(plan.onoff.output_tokens)):
        raise PlanError(f"{where}: onoff.output_tokens = {list(plan.onoff.output_tokens)} must grow")


def _check_block(block: Block) -> None:
    axes = ("strategies", "models", "budgets", "request_rates", "concurrency", "context_lengths", "memory", "tiers",
            "links", "ttl_s", "idle_ttl_s")  # fmt: skip
    for axis in axes:
        values = getattr(block, axis)
        again = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if again is not None:
            raise PlanError(f"{axis} names {again!r} twice")
    for tiers in block.tiers:
        check_tiers(tiers)
    for links in block.links:
        link_table(links)
    traced = isinstance(block.workload, TraceFile)
    if "trace" in block.request_rates and not traced:
        raise PlanError('request rate "trace" needs a workload of kind "trace"')
    for memory in block.memory:
        parse_memory(memory)
    if block.load.fewest > block.load.max_requests:
        raise PlanError(f"load.min_requests={block.load.min_requests} is above max_requests={block.load.max_requests}")


def parse_memory(text: str) -> tuple[Literal["auto", "bytes", "tokens"], int]:
    """Read `auto`, `2048 tokens` (what the full cache needs for them) or a size such as `32MiB`."""
    if text == "auto":
        return "auto", 0
    number, _, unit = text.partition(" ")
    if unit == "tokens" and number.isdecimal() and int(number) > 0:
        return "tokens", int(number)
    size = parse_bytes(text)
    if size <= 0:
        raise PlanError(f"memory {text!r} must be above 0")
    return "bytes", size
