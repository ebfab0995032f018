"""The real loader: one engine with one loading method over one throttled tier, driven request by request."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvwise.core.clock import Clock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import CapacityError
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import Strategy
from kvwise.engine.engine import Engine
from kvwise.models.loaded import LoadedModel
from kvwise.study.face import LoaderRun, LoaderSetup, StepTime
from kvwise.study.placement import tier_spec

BLOCK = 16
SLACK = 4 * BLOCK  # tokens a request may waste in partly filled blocks
POOL = 5  # prefixes that the device has room for: only a part of a pool is held for storing, the rest is not stored
DEADLINE_S = 300.0  # a link may be as slow as one likes
FLUSH_S = 60.0


class StepMeter:
    """Notes what steps take; draws a step out to its share of what a full step takes, if there is one.

    That is how Cake (arXiv 2410.03065, section 5) shares the device: a request has a share of the token budget of
    each step, and a step lasts as long as ever, since others have the rest of it. Sleeping in proportion to what
    was computed would be another thing: a small step costs more for each of its tokens than a full one.
    """

    def __init__(
        self, part_tokens: int, full_step_s: tuple[float, float] | None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.steps: list[StepTime] = []
        self.undisturbed = False
        self._part_tokens = part_tokens
        self._full_step_s = full_step_s
        self._sleep = sleep

    def charge(self, num_tokens: int, context: int, seconds: float) -> None:
        """A step of `num_tokens` tokens, which attend to `context` others on average, took `seconds`."""
        if self._full_step_s is not None and not self.undisturbed:
            fixed, slope = self._full_step_s
            lasting = (fixed + slope * context) * min(1.0, num_tokens / self._part_tokens)
            if lasting > seconds:
                self._sleep(lasting - seconds)
                seconds = lasting
        self.steps.append(StepTime(num_tokens, context, seconds))


class Loader:
    """A `LoaderSetup` at work on a loaded model; a disk tier lies in `folder` unless it says otherwise."""

    def __init__(
        self, setup: LoaderSetup, loaded: LoadedModel, strategy: Strategy, clock: Clock, token_bytes: int, folder: Path
    ) -> None:
        part = max(1, round(setup.step_tokens * setup.share))
        self._clock = clock
        self._meter = StepMeter(part, setup.full_step_s)
        self._engine = Engine(loaded, strategy, _config(setup, strategy, part, token_bytes, folder), clock, self._meter)
        self._hierarchy = self._engine.memory.hierarchy
        self.lossless = self._hierarchy is None or self._hierarchy.codec.lossless
        self.chunk_tokens = int(getattr(strategy.loading, "chunk", 0))

    def store(self, prompt: Sequence[int]) -> None:
        """Compute a prompt, undisturbed and as fast as it goes, and wait until it lies in the tier.

        CapacityError if it does not: whoever loads would then measure computing.
        """
        self._meter.undisturbed = True
        try:
            self.run([prompt])
        finally:
            self._meter.undisturbed = False
        if self._hierarchy is None:
            return
        keys = self._engine.memory.cache.keys(np.asarray(prompt, dtype=np.int64), "").chain
        found = len(self._hierarchy.find(keys))
        if found < len(keys):
            raise CapacityError(
                f"of {len(keys)} blocks of the prefix {found} lie in tier {self._hierarchy.tiers[0].name}: give it "
                f"more room, or see why they were not stored"
            )

    def throttle(self, bytes_per_second: float) -> None:
        """Set the speed of the link up from the tier."""
        if self._hierarchy is not None:
            for tier in self._hierarchy.tiers:
                tier.read_pace.bytes_per_second = bytes_per_second

    def run(self, prompts: Sequence[Sequence[int]]) -> LoaderRun:
        """Serve prompts that arrive together, one token each, from a device that holds nothing, and forget them."""
        self._meter.steps.clear()
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        start = self._clock.now()
        names = [self._engine.add_request(prompt, params, arrival=start) for prompt in prompts]
        done: dict[str, RequestOutput] = {}
        while self._engine.has_unfinished():
            done.update((output.request_id, output) for output in self._engine.step() if output.finished)
        if self._hierarchy is not None:
            self._hierarchy.flush(FLUSH_S)
        self._engine.memory.cache.clear()
        return LoaderRun(start, tuple(done[name] for name in names), tuple(self._meter.steps))

    def close(self) -> None:
        """Close the engine and its tier."""
        self._engine.close()


def _config(setup: LoaderSetup, strategy: Strategy, part: int, token_bytes: int, folder: Path) -> EngineConfig:
    tokens = POOL * (setup.longest + SLACK) + setup.others * (setup.others_tokens + SLACK)
    loads = not strategy.loading.default
    return EngineConfig(
        kv_cache_memory_bytes=tokens * token_bytes,
        max_num_seqs=min(part, 1 + setup.others) if setup.others else 1,
        max_num_batched_tokens=part,
        tiers=(tier_spec(setup.tier, folder),) if loads else (),
        store_min_tokens=setup.longest,  # the short ones come once
        tier_deadline_s=DEADLINE_S,
    )
