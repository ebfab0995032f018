"""Ways to run an engine in tests."""

from collections.abc import Sequence
from typing import Any

import torch

from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Sequence as Seq

LIMIT = 3000  # steps after which a test's engine is stuck


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random byte tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def greedy(num_tokens: int, **more: Any) -> SamplingParams:
    """`num_tokens` greedy tokens, whatever they are."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, **more)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the final output of each sample, by request id (and `id/index` for n > 1)."""
    done = {}
    for _ in range(LIMIT):
        if not engine.has_unfinished():
            return done
        for output in engine.step():
            if output.finished:
                name = f"{output.request_id}/{output.index}" if output.index else output.request_id
                done[name] = output
    raise AssertionError(f"the engine is not done after {LIMIT} steps")


def run(
    engine: Engine, many: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], **more: Any
) -> list[RequestOutput]:
    """Serve all prompts at once; their outputs in order."""
    each = [params] * len(many) if isinstance(params, SamplingParams) else params
    names = [engine.add_request(prompt, one, **more) for prompt, one in zip(many, each, strict=True)]
    done = finish(engine)
    return [done[name] for name in names]


def sequence_of(engine: Engine, name: str, index: int = 0) -> Seq:
    """The engine's own record of a sample."""
    return engine._requests[name][index]


def require_empty(engine: Engine) -> None:
    """No request holds anything: all blocks are free or only cached, on every tier."""
    usage = engine.memory.cache.usage()
    assert usage.num_sequences == 0
    assert usage.num_referenced == usage.num_broken == 0
    assert usage.num_free + usage.num_cached == usage.num_blocks
    assert engine.memory.placement.kv_bytes().get("host", 0) == 0
    engine.memory.cache.check()
