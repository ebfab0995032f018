"""One run of `kvwise bench`: finds the server, warms it up, sends the load, tells the figures."""

import asyncio
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from kvwise.core.errors import RequestError
from kvwise.study.client.answer import Answer
from kvwise.study.client.datasets import conversations
from kvwise.study.client.figures import Figures, figures
from kvwise.study.client.load import Load, Outcome, Sender
from kvwise.study.client.options import Target, Traffic, Wanted
from kvwise.study.client.prompts import Conversation, Maker
from kvwise.study.client.vocabulary import load_vocabulary
from kvwise.study.client.wire import Wire, open_wire


class Watcher(Protocol):
    """Somebody who is told how it goes."""

    def started(self, total: int) -> None:
        """So many requests are to be sent."""
        ...

    def ended(self, answer: Answer) -> None:
        """One has its answer."""
        ...


def run(target: Target, traffic: Traffic, wanted: Wanted, watcher: Watcher) -> tuple[Figures, Outcome]:
    """Run, and return the figures with the outcome that they are of. Ctrl-C ends it early; so much is marked.

    RequestError if the server cannot be reached, or not one warm-up request succeeds.
    """
    maker = Maker(load_vocabulary(traffic.tokenizer), target.is_chat)
    talks = conversations(traffic, maker)
    model, outcome = asyncio.run(_run(target, traffic, maker, talks, watcher))
    return _header(target, traffic, model) | figures(outcome, wanted), outcome


async def _run(
    target: Target, traffic: Traffic, maker: Maker, talks: list[Conversation], watcher: Watcher
) -> tuple[str, Outcome]:
    async with open_wire(target) as wire:
        await wire.find_model()
        if traffic.num_warmups:
            await _warm_up(wire, traffic, maker)
        watcher.started(sum(len(talk.turns) for talk in talks))
        with _quiet_collector():
            return wire.model, await load(wire, traffic, talks, watcher.ended).run()


def load(wire: Wire, traffic: Traffic, talks: list[Conversation], told: Callable[[Answer], None] | None = None) -> Load:
    """The load of some conversations on a server."""
    sender = Sender(wire.body, wire.send, wire.target.is_chat, wire.target.session)
    return Load(talks, sender, max_concurrency=traffic.max_concurrency, cut_s=traffic.duration_s, told=told)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """What is there already is not gone through again: each time that would hold up sending by milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _warm_up(wire: Wire, traffic: Traffic, maker: Maker) -> None:
    """Requests like those to come, but (where they are drawn) with other tokens: they fill no cache for them."""
    alike = replace(traffic, seed=traffic.seed + 1, num_prompts=traffic.num_warmups, rate=math.inf, duration_s=None)
    outcome = await load(wire, alike, conversations(alike, maker)).run()
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.answers and not any(answer.ok for answer in outcome.answers):
        raise RequestError(f"no warm-up request succeeded: {outcome.answers[0].error}")


def _header(target: Target, traffic: Traffic, model: str) -> Figures:
    rate = math.inf if traffic.rate is None else traffic.rate
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": str(target.endpoint_type),
        "backend": str(target.endpoint_type),
        "model_id": model,
        "tokenizer_id": traffic.tokenizer,
        "dataset_name": str(traffic.dataset),
        "num_prompts": traffic.count,
        "seed": traffic.seed,
        "request_rate": rate if math.isfinite(rate) else "inf",
        "burstiness": traffic.burstiness,
        "max_concurrency": traffic.max_concurrency,
    }
