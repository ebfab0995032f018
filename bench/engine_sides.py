"""The sides of bench/engine.py: one face for kvwise, transformers `generate` and its continuous batching.

A side is given prompts *cold* (it has seen nothing of them) or *warm* (the same prompts once more, their KV still
held): a warm run is decode alone. Every run comes back as tokens with the time at which each was known.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from typing_extensions import override

from kvwise.core.config import EngineConfig
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import parse
from kvwise.models.loaded import LoadedModel

Prompts = Sequence[Sequence[int]]
SPARE_BLOCKS = 64


@dataclass(frozen=True)
class Run:
    """Output tokens of each request and when each was known, in seconds from the start of the run."""

    tokens: list[list[int]]
    times: list[list[float]]

    @property
    def end_to_end(self) -> float:
        """Output tokens per second from the start to the last token."""
        return sum(map(len, self.times)) / max(t[-1] for t in self.times)

    @property
    def decode(self) -> float:
        """Output tokens per second after every request has its first token."""
        begin = max(t[0] for t in self.times)
        later = [one for times in self.times for one in times if one > begin]
        return len(later) / (max(later) - begin)

    @property
    def first_token(self) -> float:
        """Seconds to the first token of the request that waited longest."""
        return max(t[0] for t in self.times)


class Side(ABC):
    """One way to answer prompts greedily, with a fixed number of output tokens."""

    name: str

    @abstractmethod
    def open(self, num_requests: int, longest: int) -> None:
        """Make room for `num_requests` requests of `longest` tokens, prompt and output, held at once."""

    @abstractmethod
    def cold(self, prompts: Prompts, num_new: int) -> Run:
        """Answer prompts of equal length that were not seen before."""

    @abstractmethod
    def warm(self, num_new: int) -> Run:
        """Answer the prompts of the last cold run again, from their kept KV."""

    @abstractmethod
    def with_prefix(self, prefix: Sequence[int], tails: Prompts) -> list[Run]:
        """One request of one output token for each tail, alone, the KV of the prefix being kept."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""


class Kvwise(Side):
    """The engine, with prefix sharing; `kv_dtype` is what the pages hold."""

    def __init__(self, loaded: LoadedModel, name: str, kv_dtype: str, max_batched: int) -> None:
        self.name = name
        self._loaded = loaded
        self._kv_dtype = kv_dtype
        self._max_batched = max_batched
        self._prompts: Prompts = []
        self.engine: Engine | None = None

    @override
    def open(self, num_requests: int, longest: int) -> None:
        size = 16
        loaded = self._loaded
        element = 4 if self._kv_dtype == "float32" else 2
        token_bytes = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * element
        num_blocks = num_requests * (longest // size + 1) + SPARE_BLOCKS
        self.engine = Engine(
            loaded,
            parse("full+prefix"),
            EngineConfig(
                block_size=size,
                kv_cache_dtype=self._kv_dtype,
                kv_cache_memory_bytes=num_blocks * size * token_bytes,
                max_model_len=longest + size,
                max_num_seqs=max(num_requests, 16),
                max_num_batched_tokens=self._max_batched,
            ),
        )

    @override
    def cold(self, prompts: Prompts, num_new: int) -> Run:
        self._prompts = prompts
        return self._run(prompts, num_new)

    @override
    def warm(self, num_new: int) -> Run:
        return self._run(self._prompts, num_new)

    @override
    def with_prefix(self, prefix: Sequence[int], tails: Prompts) -> list[Run]:
        self._run([prefix], 1)
        return [self._run([[*prefix, *tail]], 1) for tail in tails]

    def _run(self, prompts: Prompts, num_new: int) -> Run:
        assert self.engine is not None
        begin = self.engine.clock.now()
        params = SamplingParams(max_tokens=num_new, ignore_eos=True)
        ids = [self.engine.add_request(p, params) for p in prompts]
        done = {}
        while self.engine.has_unfinished():
            done.update({o.request_id: o for o in self.engine.step() if o.finished})
        failed = [o.error for o in done.values() if o.error]
        if failed:
            raise RuntimeError(f"{self.name}: {failed[0]}")
        return Run(
            [done[i].token_ids for i in ids],
            [[t - begin for t in done[i].metrics.token_times] for i in ids],
        )

    @override
    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None


class _Clock(StoppingCriteria):
    """Notes when each step of `generate` knows its tokens; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Generate(Side):
    """transformers `generate`, the whole batch at once, attention by SDPA, cache kept between runs."""

    def __init__(self, model: PreTrainedModel, name: str, *, static: bool) -> None:
        self.name = name
        self._model = model
        self._static = static
        self._cache: DynamicCache | StaticCache | None = None
        self._prompts = torch.empty(0, 0, dtype=torch.int64)
        self._longest = 0

    @override
    def open(self, num_requests: int, longest: int) -> None:
        self._longest = longest

    @override
    def cold(self, prompts: Prompts, num_new: int) -> Run:
        self._prompts = torch.tensor([list(p) for p in prompts])
        self._cache = None
        self._cache = self._new_cache()
        return self._run(self._prompts, num_new)

    @override
    def warm(self, num_new: int) -> Run:
        self._rewind(self._prompts.shape[1] - 1)
        return self._run(self._prompts, num_new)

    @override
    def with_prefix(self, prefix: Sequence[int], tails: Prompts) -> list[Run]:
        """The cache is cut back to the prefix after each run, outside the time: nothing is copied."""
        self._cache = self._new_cache()
        self._run(torch.tensor([list(prefix)]), 1)
        runs = []
        for tail in tails:
            self._rewind(len(prefix))
            runs.append(self._run(torch.tensor([[*prefix, *tail]]), 1))
        return runs

    def _new_cache(self) -> DynamicCache | StaticCache:
        if self._static:
            return StaticCache(config=self._model.config, max_cache_len=self._longest)
        return DynamicCache(config=self._model.config)

    def _rewind(self, length: int) -> None:
        if isinstance(self._cache, StaticCache):
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(length)
        elif self._cache is not None:
            self._cache.crop(length - self._cache.get_seq_length())

    def _run(self, prompts: torch.Tensor, num_new: int) -> Run:
        clock = _Clock()
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                past_key_values=self._cache,
                generation_config=_greedy(num_new),
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        times = [t - begin for t in clock.times]
        return Run(out[:, prompts.shape[1] :].tolist(), [times] * prompts.shape[0])

    @override
    def close(self) -> None:
        self._cache = None


class ContinuousBatching(Side):
    """transformers `generate_batch`: paged, SDPA, prefix sharing on; the manager is kept between runs."""

    def __init__(self, model: PreTrainedModel, name: str, max_batched: int, page_size: int = 64) -> None:
        self.name = name
        self._model = model
        self._max_batched = max_batched
        self._page_size = page_size
        self._prompts: Prompts = []
        self._longest = 0
        self._num_requests = 0

    @override
    def open(self, num_requests: int, longest: int) -> None:
        self._num_requests, self._longest = num_requests, longest
        self._model.set_attn_implementation("sdpa")

    @override
    def cold(self, prompts: Prompts, num_new: int) -> Run:
        self._prompts = prompts
        return self._run(prompts, num_new)

    @override
    def warm(self, num_new: int) -> Run:
        return self._run(self._prompts, num_new)

    @override
    def with_prefix(self, prefix: Sequence[int], tails: Prompts) -> list[Run]:
        self._run([prefix], 1)
        return [self._run([[*prefix, *tail]], 1) for tail in tails]

    def _config(self) -> ContinuousBatchingConfig:
        pages = -(-self._longest // self._page_size) + 1
        return ContinuousBatchingConfig(
            page_size=self._page_size,
            num_blocks=self._num_requests * pages + 8,
            max_batch_tokens=max(self._max_batched, self._num_requests),
            max_requests_per_batch=max(self._num_requests, 16),
            allow_block_sharing=True,
            use_cuda_graph=False,
            use_async_batching=False,
            auto_switch_to_flash=False,
        )

    def _run(self, prompts: Prompts, num_new: int) -> Run:
        with torch.inference_mode():
            out = self._model.generate_batch(
                inputs=[list(p) for p in prompts],
                generation_config=_greedy(num_new),
                continuous_batching_config=self._config(),
                record_timestamps=True,
                progress_bar=False,
                persistent_manager=True,
                warmup=False,
            )
        results = list(out.values())
        short = [r for r in results if r.error or len(r.generated_tokens) != num_new]
        if short or len(results) != len(prompts):
            raise RuntimeError(f"generate_batch answered {len(results)} of {len(prompts)} requests, {short[:1]}")
        # Times count from the first request's creation: starting the manager's thread is left out.
        begin = min(r.created_time for r in results)
        return Run([r.generated_tokens for r in results], [[t - begin for t in r.timestamps or []] for r in results])

    @override
    def close(self) -> None:
        self._model.destroy_cached_continuous_batching_manager()


def _greedy(num_new: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=0)
