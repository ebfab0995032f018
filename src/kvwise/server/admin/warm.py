"""Warm-up: prompts computed and kept before the server is ready, and whenever the administration asks."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvwise.cache.scopes import Scope
from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.core.errors import UsageError
from kvwise.core.params import SamplingParams
from kvwise.engine.lifecycle import Owner, Residence
from kvwise.engine.service import EngineService, Generate, State
from kvwise.engine.stream import News
from kvwise.engine.warm_file import Line, read_lines
from kvwise.server.context import Server
from kvwise.server.tenancy.tenant import Tenant
from kvwise.server.tenancy.tenants import Tenants


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens, and whose KV they are; fields as of `Owner`, the session as its tenant calls it."""

    tokens: Sequence[int]
    tenant: Tenant
    session: str = ""
    scope: Scope = Scope.TENANT
    cache_salt: str = ""
    ttl: Ttl = NO_TTL

    @property
    def owner(self) -> Owner:
        """As the engine knows it."""
        session = self.tenant.session_key(self.session)
        return Owner(self.tenant.id, session, self.scope, self.ttl, self.cache_salt)


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep from eviction until `until` seconds on the service's clock (None: until unpinned)."""

    until: float | None = None


@dataclass(slots=True)
class Warmed:
    """What became of one prompt under one strategy, in tokens; `residence` in blocks."""

    num_tokens: int
    computed: int = 0
    loaded: int = 0
    residence: Residence = field(default_factory=lambda: Residence(0, 0))
    error: str | None = None

    @property
    def resident(self) -> bool:
        """Whether all its full blocks are somewhere."""
        return self.error is None and self.residence.num_resident == self.residence.num_blocks


async def warm_up(server: Server) -> None:
    """Compute what the warm file names, then let requests in; a service that was told otherwise meanwhile is left so.

    UsageError if the file is not sound, or if not all of it is resident in the end.
    """
    service = server.service
    await server.tenants.tell(service)
    if server.settings.warm_file is not None:
        prompts = await read_prompts(server.settings.warm_file, service, server.tenants)
        service.begin_warming()
        await _warm_all(service, prompts, server.settings.warm_file)
    if service.health in (State.STARTING, State.WARMING):
        service.ready()


async def _warm_all(service: EngineService, prompts: Sequence[Prompt], file: Path) -> None:
    strategies = await sharing_strategies(service)
    if not strategies:
        raise UsageError(f"{file}: no strategy here reuses prefixes, so that nothing can be kept warm: add +prefix")
    for strategy in strategies:
        for number, prompt in enumerate(prompts, 1):
            done = await warm_one(service, prompt, strategy, Pin())
            if done.error is not None:
                raise UsageError(f"{file}, prompt {number}: {done.error}")
        places = [await find(service, prompt, strategy) for prompt in prompts]
        if any(place.num_resident < place.num_blocks for place in places):
            raise UsageError(
                f"{file}: its prompts do not fit together under {strategy!r}: name fewer, or give the KV more memory"
            )


async def read_prompts(file: Path, service: EngineService, tenants: Tenants) -> list[Prompt]:
    """The prompts of a warm file, whose salts are names of tenants."""
    lines = read_lines(file)
    return [await _prompt(line, f"{file}, prompt {n}", service, tenants) for n, line in enumerate(lines, 1)]


async def _prompt(line: Line, where: str, service: EngineService, tenants: Tenants) -> Prompt:
    try:
        tenant = tenants.named(line.salt)
    except UsageError as error:
        raise UsageError(f"{where}: its salt must be a tenant's name: {error}") from None
    return Prompt(await tokens_of(line.prompt, service), tenant, line.session)


async def tokens_of(prompt: str | Sequence[int], service: EngineService) -> Sequence[int]:
    """The tokens of a prompt; a text is read off the event loop."""
    return await asyncio.to_thread(service.loaded.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt


async def sharing_strategies(service: EngineService) -> list[str]:
    """Those of the service's under which a prompt's KV can be found again."""
    found = []
    for strategy in service.strategies:
        if await service.call(lambda engine: engine.memory.cache.sharing, strategy):
            found.append(strategy)
    return found


async def warm_one(service: EngineService, prompt: Prompt, strategy: str, pin: Pin | None) -> Warmed:
    """Compute or load a prompt, wait for it, and see where it is. What the engine refuses is an error of the prompt."""
    owner, done = prompt.owner, Warmed(len(prompt.tokens))
    request = Generate(
        prompt.tokens, SamplingParams(max_tokens=0), service.new_id("warm"), tenant=owner.tenant,
        session=owner.session, scope=owner.scope, ttl=owner.ttl, cache_salt=owner.cache_salt, strategy=strategy,
    )  # fmt: skip
    try:
        stream = service.submit_warm(request, pin=pin is not None, pin_until=None if pin is None else pin.until)
        try:
            _note(done, await stream.whole())
        finally:
            stream.abort()  # nothing, unless nobody waits any longer
            await service.call(lambda engine: engine.lifecycle.forget_warm(request.request_id), strategy)
    except UsageError as error:
        done.error = str(error)
        return done
    done.residence = await find(service, prompt, strategy)
    return done


def _note(done: Warmed, news: Sequence[News]) -> None:
    for one in news:
        done.error = one.error
        if one.attestation is not None:
            done.computed, done.loaded = one.attestation.tokens_computed, one.attestation.tokens_loaded


async def find(service: EngineService, prompt: Prompt, strategy: str) -> Residence:
    """Where the full blocks of a prompt are now."""
    owner = prompt.owner
    return await service.call(
        lambda engine: engine.lifecycle.residence(engine.lifecycle.keys(prompt.tokens, owner)), strategy
    )
