"""A fake engine and bench with the real ones' face, on a virtual clock: a study of minutes runs in a blink."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvwise.core.clock import VirtualClock
from kvwise.core.errors import CapacityError, PlanError, StrategyError
from kvwise.core.output import Attestation, EngineStats, FinishReason, LoadReport, RequestMetrics, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.engine.hierarchy.tier import TierStats
from kvwise.study.face import LoaderRun, LoaderSetup, ModelFacts, Observe, OnOffRun, StepTime
from kvwise.study.placement import NOWHERE, Placement
from kvwise.tasks.token_language import TokenLanguage

BLOCK = 16
VOCAB = 320
HEADS = 8  # layers times KV heads
LOADING = {"load", "cake"}
KNOWN = (
    "full",
    "prefix",
    "h2o",
    "infinigen",
    "streaming",
    "window",
    "random",
    "idle",
    "broken",
    "hungry",
    "sharer",
    *LOADING,
)
LANGUAGE = TokenLanguage(VOCAB)  # made once: its text takes a moment


@dataclass(eq=False)
class _Request:
    output: RequestOutput
    params: SamplingParams
    observe: Observe | None
    computed: int = 0


@dataclass
class FakeEngine:
    """Prefill and decode at a price per token; methods change what is read, held and answered."""

    clock: VirtualClock
    strategy: str
    speed: float  # seconds per million parameter-tokens
    facts: ModelFacts
    memory_bytes: int | None
    placement: Placement = NOWHERE
    waiting: list[_Request] = field(default_factory=list)
    running: list[_Request] = field(default_factory=list)
    ended: list[_Request] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    hits: int = 0
    queries: int = 0
    steps: int = 0
    closed: bool = False

    @property
    def budget(self) -> float:
        found = re.search(r"budget=([0-9.]+)", self.strategy)
        return float(found[1]) if found else 1.0

    @property
    def num_heads(self) -> int:
        return HEADS - 2 if "sharer" in self.strategy else HEADS

    @property
    def block_bytes(self) -> int:
        return self.pool // 100

    @property
    def pool(self) -> int:
        return self.memory_bytes or 1 << 30

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        request_id: str | None = None,
        arrival: float | None = None,
        observe: Observe | None = None,
    ) -> str:
        name = request_id or f"request-{len(self.seen)}-{self.queries}"
        now = self.clock.now() if arrival is None else arrival
        for index, one in enumerate([params] if isinstance(params, SamplingParams) else params):
            longest = (len(prompt) + one.max_tokens) * self.facts.kv_token_bytes
            if longest * self.share() > self.pool:
                raise CapacityError(f"request of {longest} bytes is larger than the pool of {self.pool}")
            metrics = RequestMetrics(arrival=now, num_prompt_tokens=len(prompt))
            attestation = Attestation(self.strategy)
            output = RequestOutput(name, index, list(prompt), [], [], "", None, None, None, metrics, attestation)
            self.waiting.append(_Request(output, one, observe))
        return name

    def abort(self, request_id: str) -> None:
        for request in [*self.running, *self.waiting]:
            if request.output.request_id == request_id:
                self._end(request, FinishReason.ABORT)

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.ended)

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if "broken" in self.strategy:
            raise MemoryError("no memory for this method")
        while self.waiting and self.used() + self._needs(self.waiting[0]) <= self.pool:
            self.running.append(self.waiting.pop(0))
            self._match(self.running[-1])
        cost, room = 0.0008, 512
        for request in self.running:
            cost += self._advance(request, room) * self.speed * self.facts.num_parameters / 1e6
        self.clock.advance(cost)
        self._emit()
        news = [r.output for r in [*self.running, *self.ended] if r.output.new_token_ids or r in self.ended]
        self.ended.clear()
        return news

    def _match(self, request: _Request) -> None:
        request.output.metrics.first_scheduled = self.clock.now()
        if "prefix" not in self.strategy:
            return
        tokens = request.output.prompt_token_ids
        self.queries += len(tokens)
        length = 0
        while length + BLOCK < len(tokens) and tuple(tokens[: length + BLOCK]) in self.seen:
            length += BLOCK
        self.hits += length
        request.computed = length
        request.output.metrics.num_cached_tokens = length
        request.output.attestation.tokens_reused = length
        if LOADING & set(self.strategy.split("+")):
            request.output.attestation.tokens_loaded = BLOCK
            request.output.metrics.load = LoadReport("both", BLOCK, 0, 0.02, 0.01, 0.012, 0.002)

    def _advance(self, request: _Request, room: int) -> float:
        """Tokens' worth of work."""
        prompt = len(request.output.prompt_token_ids)
        if request.computed < prompt:
            count = min(room, prompt - request.computed)
            request.computed += count
            return count * (1.15 if "h2o" in self.strategy else 1.0)
        return 1 + 0.01 * self.budget * prompt * (6 if "infinigen" in self.strategy else 1)

    def _emit(self) -> None:
        now = self.clock.now()
        for request in list(self.running):
            output = request.output
            output.new_token_ids.clear()
            if request.computed < len(output.prompt_token_ids):
                continue
            step = len(output.token_ids)
            forced = request.params.forced_tokens or ()
            likely = (len(output.prompt_token_ids) + step) % VOCAB
            if request.observe is not None:
                hint = forced[step] if step < len(forced) else None
                logits = self.logits(output.prompt_token_ids, step, hint)
                likely = int(logits.argmax())
                request.observe(output.index, step, logits)
            output.token_ids.append(forced[step] if step < len(forced) else likely)
            output.new_token_ids.append(output.token_ids[-1])
            output.metrics.token_times.append(now)
            output.metrics.first_token = output.metrics.token_times[0]
            self._attest(request)
            if len(output.token_ids) == request.params.max_tokens:
                self._end(request, FinishReason.LENGTH)

    def _attest(self, request: _Request) -> None:
        for name in ("h2o", "infinigen", "streaming", "window", "random"):
            if name in self.strategy and self.budget < 1:
                request.output.attestation.did[name] = request.output.attestation.did.get(name, 0) + 7

    def logits(self, prompt: list[int], step: int, hint: int | None = None) -> np.ndarray:
        """Drawn; a model that has learned something favours `hint`, the better the more of the cache there is."""
        rng = np.random.default_rng((sum(prompt) % 9973, step))
        logits = 3 * rng.standard_normal(VOCAB)
        if hint is not None and self.facts.language is not None:
            logits[hint] += 15
        blur = 0.0 if self.budget == 1 else (0.9 if "h2o" in self.strategy else 0.4) * (1 - self.budget) ** 2
        return ((1 - blur) * logits + blur * 2 * rng.standard_normal(VOCAB)).astype(np.float32)

    def _end(self, request: _Request, reason: FinishReason) -> None:
        ended = RequestOutput(
            request.output.request_id, request.output.index, request.output.prompt_token_ids, request.output.token_ids,
            list(request.output.new_token_ids), "", reason, None, None, request.output.metrics,
            request.output.attestation,
        )  # fmt: skip
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        tokens = [*ended.prompt_token_ids, *ended.token_ids]
        if "prefix" in self.strategy:
            self.seen |= {tuple(tokens[:i]) for i in range(BLOCK, len(tokens), BLOCK)}
        self.ended.append(_Request(ended, request.params, None))

    def share(self) -> float:
        return 0.25 if "infinigen" in self.strategy else self.budget

    def _needs(self, request: _Request) -> int:
        tokens = len(request.output.prompt_token_ids) + request.params.max_tokens
        return int(tokens * self.facts.kv_token_bytes * self.share())

    def used(self) -> int:
        return sum(map(self._needs, self.running))

    def stats(self) -> EngineStats:
        tiers = {"device": self.used()}
        if "infinigen" in self.strategy:
            tiers["host"] = self.used() * 4
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_preemptions=0,
            num_steps=self.steps,
            blocks_total=100,
            blocks_free=100 - min(100, 100 * self.used() // self.pool),
            blocks_cached=0,
            pool_bytes=self.pool,
            kv_bytes=tiers,
            prefix_queries=self.queries,
            prefix_hits=self.hits,
            links={"host:device": "12 GB/s (throttled)"} if "infinigen" in self.strategy else {},
            tiers=self._tiers(),
        )

    def _tiers(self) -> dict[str, TierStats]:
        """Every other block that was looked up and not on the device is in the first tier."""
        if not LOADING & set(self.strategy.split("+")):
            return {}
        found = self.queries // BLOCK // 4
        stats = {}
        for i, name in enumerate(tier.partition("(")[0] for tier in self.placement.tiers):
            faults = {"late": 1} if self.queries else {}
            stats[name] = TierStats(
                name, found, found * 64, None, 0, 0, found, found, faults, found >> i, found, "closed"
            )
        return stats

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLoader:
    """Computes at a price per step and loads at the link's speed; Cake does both until they meet."""

    clock: VirtualClock
    setup: LoaderSetup
    facts: ModelFacts
    wrong_tokens: bool
    speed: float = 1e12
    lossless: bool = True
    closed: bool = False
    stored: int = 0
    speeds: list[float] = field(default_factory=list)  # of every run
    log: list[str] = field(default_factory=list)  # of all loaders of a bench: who ran

    @property
    def method(self) -> str:
        return self.setup.strategy.rpartition("+")[2].partition("(")[0]

    @property
    def chunk_tokens(self) -> int:
        return 128 if self.method in LOADING else 0

    def store(self, prompt: Sequence[int]) -> None:
        self.stored = len(prompt)

    def throttle(self, bytes_per_second: float) -> None:
        self.speed = bytes_per_second

    def run(self, prompts: Sequence[Sequence[int]]) -> LoaderRun:
        self.speeds.append(self.speed)
        self.log.append(self.method)
        start, outputs = self.clock.now(), []
        part = max(1, round(self.setup.step_tokens * self.setup.share))
        steps = tuple(self._step(part, at) for at in range(0, len(prompts[0]), part))
        for i, prompt in enumerate(prompts):
            self.clock.advance(self._seconds(len(prompt), steps) if not i else 0.001 * len(prompt) / 100)
            metrics = RequestMetrics(arrival=start, first_token=self.clock.now(), num_prompt_tokens=len(prompt))
            attestation = Attestation(self.setup.strategy, tokens_computed=len(prompt))
            if i == 0 and self.method in LOADING:
                attestation.tokens_loaded = len(prompt) // 2
                attestation.tokens_computed -= attestation.tokens_loaded
                metrics.load = LoadReport("both", attestation.tokens_loaded, 0, 0.2, 0.1, 0.1, 0.01)
            token = sum(prompt) % VOCAB + (self.wrong_tokens and self.method in LOADING)
            output = RequestOutput(
                f"r{i}", 0, list(prompt), [token], [], "", FinishReason.LENGTH, None, None, metrics, attestation
            )
            outputs.append(output)
        return LoaderRun(start, tuple(outputs), steps)

    def _step(self, num_tokens: int, at: int) -> StepTime:
        """2 ms and 2 us for each token of context, of a full step and of one that is drawn out."""
        full = self.setup.full_step_s or (0.002, 2e-6)
        return StepTime(num_tokens, at, full[0] + full[1] * at)

    def _seconds(self, num_tokens: int, steps: Sequence[StepTime]) -> float:
        compute = sum(step.seconds for step in steps)
        load = num_tokens * self.facts.kv_token_bytes / self.speed
        both = compute * load / (compute + load) + steps[-1].seconds / 2
        return {"prefix": compute, "load": load, "cake": both}[self.method]

    def close(self) -> None:
        self.closed = True


class FakeBench:
    """Engines for any strategy of known words, all in one virtual time."""

    def __init__(self, speed: float = 2e-6) -> None:
        self.clock = VirtualClock()
        self.speed = speed
        self.engines: list[FakeEngine] = []
        self.loaders: list[FakeLoader] = []
        self.log: list[str] = []
        self.wrong_tokens = False  # of whoever loads
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.clock.advance(max(seconds, 0.0) + 1e-9)

    def resident_bytes(self) -> int:
        return 300 << 20

    def check_strategy(self, text: str) -> None:
        for part in text.split("+"):
            name = part.partition("(")[0]
            if name not in KNOWN:
                raise StrategyError(f"unknown method {name!r} (known: {', '.join(KNOWN)})")
        found = re.search(r"budget=([0-9.]+)", text)
        if found and not 0 < float(found[1]) <= 1:
            raise StrategyError(f"h2o: budget={found[1]} is out of range: it must be above 0, at most 1")

    def check_placement(self, text: str, placement: Placement) -> None:
        if LOADING & set(text.split("+")) and not placement.tiers:
            raise PlanError(f"strategy {text!r} loads from tiers")

    def idle_methods(
        self, text: str, did: Mapping[str, int], tokens_reused: int, num_loads: int = 0, heads_shared: int = 0
    ) -> tuple[str, ...]:
        names = [part.partition("(")[0] for part in text.split("+")]
        busy = {name for name, count in did.items() if count} | ({"prefix"} if tokens_reused else set()) | {"full"}
        busy |= (LOADING if num_loads else set()) | ({"sharer"} if heads_shared else set())
        return tuple(name for name in names if name not in busy)

    def facts(self, model: str) -> ModelFacts:
        if "missing" in model:
            raise CapacityError(f"no model {model}")
        millions = float(re.search(r"(\d+)m", model)[1]) if re.search(r"(\d+)m", model) else 5.0
        language = LANGUAGE if model.startswith("builtin:") else None
        return ModelFacts(model, VOCAB, 4096, 4096, int(millions * 4e6), int(millions * 1e6), HEADS, language)

    def engine(self, model: str, strategy: str, memory_bytes: int | None, placement: Placement = NOWHERE) -> FakeEngine:
        if "hungry" in strategy:
            raise CapacityError("the pool is too small for one block: raise kv_cache_memory_bytes")
        engine = FakeEngine(self.clock, strategy, self.speed, self.facts(model), memory_bytes, placement)
        self.engines.append(engine)
        return engine

    def loader(self, setup: LoaderSetup) -> "FakeLoader":
        self.loaders.append(FakeLoader(self.clock, setup, self.facts(setup.model), self.wrong_tokens, log=self.log))
        return self.loaders[-1]

    def generate(self, model: str, side: str, prompt: Sequence[int], output_tokens: int) -> OnOffRun:
        per_token = 0.004
        seconds = per_token * output_tokens * (1 + (output_tokens / 60 if side == "hf-off" else 0))
        if side == "kvwise":
            seconds *= 1.06
        self.clock.advance(seconds)
        return OnOffRun(side, output_tokens, per_token, seconds, tuple(range(output_tokens)))
