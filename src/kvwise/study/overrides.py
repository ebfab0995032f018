"""Changes to a plan from the command line: every option replaces one axis or setting in all blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvwise.core.errors import PlanError
from kvwise.study.placement import NEVER
from kvwise.study.plan import Plan, Slo, read_plan_data


@dataclass(frozen=True, slots=True)
class Overrides:
    """What was given on the command line; None or empty: as in the plan."""

    model: Sequence[str] = ()
    strategy: Sequence[str] = ()
    budget: Sequence[float] = ()
    request_rate: Sequence[str] = ()
    max_concurrency: Sequence[str] = ()
    context_length: Sequence[int] = ()
    task: Sequence[str] = ()
    protocol: Sequence[str] = ()
    memory: Sequence[str] = ()
    tiers: Sequence[str] = ()
    ttl: Sequence[str] = ()
    idle_ttl: Sequence[str] = ()
    repeats: int | None = None
    num_prompts: int | None = None
    burstiness: float | None = None
    goodput: Sequence[str] = ()
    min_quality: float | None = None
    time_limit: float | None = None
    seed: int | None = None
    dtype: str | None = None
    link: Sequence[str] = ()
    trace: str | None = None
    trace_block_size: int | None = None
    length_scale: float | None = None
    time_scale: float | None = None
    block: Sequence[str] = ()

    def apply(self, plan: Plan) -> Plan:
        """The changed plan, checked as a whole; PlanError if it makes no sense any more."""
        if self == Overrides():
            return plan
        data = plan.model_dump(mode="json", exclude_none=True)
        self._choose_blocks(data)
        for block in data["block"]:
            self._change_block(block)
        for table in data["loading"]:
            self._change_loading(table)
        for key, value in (("min_quality", self.min_quality), ("time_limit_s", self.time_limit),
                           ("seed", self.seed), ("dtype", self.dtype)):  # fmt: skip
            if value is not None:
                data[key] = value
        # What is asked is asked at the length that the traffic has.
        asked = (("context_lengths", self.context_length), ("tasks", self.task), ("protocols", self.protocol))
        data["quality"] |= {key: list(values) for key, values in asked if values}
        if self.goodput:
            data["slo"] = parse_goodput(self.goodput).model_dump(exclude_none=True)
        if self.link:
            data["links"] = dict(_split(text, "=", "--link", "host:device=12GB/s") for text in self.link)
        return read_plan_data(data, "command line")

    def _choose_blocks(self, data: dict[str, Any]) -> None:
        if not self.block:
            return
        known = [block["name"] for block in (*data["block"], *data["loading"])]
        for name in self.block:
            if name not in known:
                raise PlanError(f"--block {name}: the plan has no such block (it has: {', '.join(known)})")
        for kind in ("block", "loading"):
            data[kind] = [block for block in data[kind] if block["name"] in self.block]
        data.pop("onoff", None)

    def _change_block(self, block: dict[str, Any]) -> None:
        if self.trace is not None:
            block["workload"] = {"kind": "trace", "file": self.trace}
            if not self.request_rate:
                block["request_rates"] = ["trace"]
        self._change_trace(block)
        axes: tuple[tuple[str, Sequence[Any]], ...] = (
            ("models", self.model),
            ("strategies", self.strategy),
            ("budgets", self.budget),
            ("request_rates", [_number_or(text, ("inf", "trace"), "--request-rate") for text in self.request_rate]),
            ("concurrency", [_count_or(text, "unlimited", "--max-concurrency") for text in self.max_concurrency]),
            ("context_lengths", self.context_length),
            ("memory", self.memory),
            ("tiers", [_list_of(text) for text in self.tiers]),
            ("ttl_s", [_number_or(text, (NEVER,), "--ttl") for text in self.ttl]),
            ("idle_ttl_s", [_number_or(text, (NEVER,), "--idle-ttl") for text in self.idle_ttl]),
        )
        block.update({key: list(values) for key, values in axes if values})
        if self.repeats is not None:
            block["repeats"] = self.repeats
        if self.burstiness is not None:
            block["load"]["burstiness"] = self.burstiness
        if self.num_prompts is not None:
            block["load"] |= {"min_requests": self.num_prompts, "max_requests": self.num_prompts}

    def _change_loading(self, table: dict[str, Any]) -> None:
        axes = (("models", self.model), ("context_lengths", self.context_length))
        table.update({key: list(values) for key, values in axes if values})
        if self.repeats is not None:
            table["repeats"] = self.repeats

    def _change_trace(self, block: dict[str, Any]) -> None:
        given = {"block_size": self.trace_block_size, "length_scale": self.length_scale, "time_scale": self.time_scale}
        given = {key: value for key, value in given.items() if value is not None}
        if given and block["workload"]["kind"] != "trace":
            raise PlanError(f"{', '.join(given)}: block {block['name']!r} replays no trace; give --trace FILE too")
        block["workload"] |= given


def parse_goodput(texts: Sequence[str]) -> Slo:
    """Read service levels in ms as vLLM's benchmark writes them: `ttft:500 tpot:50`."""
    levels: dict[str, float] = {}
    for text in texts:
        for part in text.split():
            name, value = _split(part, ":", "--goodput", "ttft:500")
            if name not in ("ttft", "tpot", "e2el"):
                raise PlanError(f"--goodput {part}: {name!r} is no latency; use ttft, tpot or e2el, in ms")
            levels["e2e_ms" if name == "e2el" else f"{name}_ms"] = _number(value, f"--goodput {part}")
    return Slo(**levels)


def _split(text: str, mark: str, option: str, example: str) -> tuple[str, str]:
    name, found, value = text.partition(mark)
    if not found or not name or not value:
        raise PlanError(f"{option} {text}: write it as {option} {example}")
    return name, value


def _list_of(text: str) -> list[str]:
    return [] if text == "none" else [part.strip() for part in text.split(" + ")]


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise PlanError(f"{where}: {text!r} must be a number above 0")
    return value


def _number_or(text: str, words: tuple[str, ...], option: str) -> float | str:
    return text if text in words else _number(text, option)


def _count_or(text: str, word: str, option: str) -> int | str:
    if text == word:
        return word
    if not text.isdecimal() or int(text) < 1:
        raise PlanError(f"{option} {text}: must be a whole number above 0, or {word}")
    return int(text)
