"""What the administration does: each operation over all engines of the service."""

import time
from collections.abc import Callable
from math import inf
from typing import TypeVar

from kvwise.cache.scopes import Scope
from kvwise.cache.sessions import SessionInfo
from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.core.errors import CapacityError, RequestError, UsageError
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import parse
from kvwise.server.admin.purge import everything_of, prompt_of, session_of, tenant_of
from kvwise.server.admin.schema import (
    Changed,
    ChangedAnswer,
    DrainAnswer,
    DrainRequest,
    EngineEntry,
    HowLong,
    PinRequest,
    PromptQuery,
    PurgeAnswer,
    PurgedEngine,
    PurgeRequest,
    ResidenceAnswer,
    SessionAnswer,
    SessionEntry,
    SessionQuery,
    SessionRequest,
    SessionsAnswer,
    StatsAnswer,
    StrategyAnswer,
    StrategyRequest,
    TenantEntry,
    WarmAnswer,
    WarmedPrompt,
    WarmRequest,
    Where,
    Whose,
)
from kvwise.server.admin.warm import Pin, Prompt, Warmed, find, sharing_strategies, tokens_of, warm_one
from kvwise.server.context import Server
from kvwise.server.errors import NOT_FOUND, ApiError
from kvwise.server.tenancy.tenant import Tenant

_FRESH_S = 1.0  # that figures may wait for a step to end
_T = TypeVar("_T")


class Administration:
    """The operations behind the routes, each over all engines."""

    def __init__(self, server: Server) -> None:
        self._tenants = server.tenants
        self._service = server.service

    # -- looking ------------------------------------------------------------------------------------------------

    async def stats(self) -> StatsAnswer:
        """Figures of now; while a long step runs, those from before it."""
        service = self._service
        await service.refresh(_FRESH_S)
        waiting, waiting_tokens = service.num_waiting
        engines = [
            EngineEntry(
                strategy=s.strategy, stats=s.stats, misses=dict(s.misses), evicted=s.num_evicted, leaked=s.num_leaked
            )
            for s in service.snapshots
        ]
        tenants = [
            TenantEntry(
                name=t.name, running=self._tenants.num_running(t), requests_per_minute=t.requests_per_minute,
                tokens_per_minute=t.tokens_per_minute, max_concurrent=t.max_concurrent, cached_bytes=t.cached_bytes,
            )
            for t in self._tenants.tenants
        ]  # fmt: skip
        return StatsAnswer(
            state=service.health, waiting=waiting, waiting_tokens=waiting_tokens, engines=engines, tenants=tenants
        )

    async def residence(self, asked: PromptQuery) -> ResidenceAnswer:
        """Where a prompt is, in each engine."""
        prompt = await self._prompt(asked, asked.prompt)
        return ResidenceAnswer(engines=[await self._where(prompt, one) for one in self._chosen(asked)])

    async def _where(self, prompt: Prompt, strategy: str) -> Where:
        found = await find(self._service, prompt, strategy)
        return Where(
            strategy=strategy, tokens=len(prompt.tokens), blocks=found.num_blocks, on_device=found.on_device,
            below=dict(found.below), resident=found.num_resident == found.num_blocks,
        )  # fmt: skip

    # -- keeping ------------------------------------------------------------------------------------------------

    async def warm(self, asked: WarmRequest) -> WarmAnswer:
        """Compute prompts one after another, then see where they all are: later ones may push out earlier ones."""
        ttl = Ttl(asked.ttl_s, asked.idle_ttl_s)
        pin = Pin(self._until(asked)) if asked.pin else None
        prompts = [await self._prompt(asked, one, ttl) for one in asked.prompts]
        sharing = await sharing_strategies(self._service)
        strategies = [one for one in self._chosen(asked) if one in sharing]
        if not strategies:
            raise UsageError("no strategy here reuses prefixes, so that nothing can be kept warm: add +prefix")
        done = [
            (strategy, number, prompt, await warm_one(self._service, prompt, strategy, pin))
            for strategy in strategies
            for number, prompt in enumerate(prompts)
        ]
        answers = [await self._warmed(*one) for one in done]
        return WarmAnswer(resident=all(one.resident for one in answers), prompts=answers)

    async def _warmed(self, strategy: str, number: int, prompt: Prompt, done: Warmed) -> WarmedPrompt:
        where = (await self._where(prompt, strategy)).model_dump()
        where["resident"] = where["resident"] and done.error is None
        return WarmedPrompt(**where, prompt=number, computed=done.computed, loaded=done.loaded, error=done.error)

    async def pin(self, asked: PinRequest) -> ChangedAnswer:
        """Pin what is stored of a prompt."""
        prompt, until = await self._prompt(asked, asked.prompt), self._until(asked)
        return await self._change(
            lambda engine: engine.lifecycle.pin(prompt.tokens, prompt.owner, until=until), self._chosen(asked)
        )

    async def unpin(self, asked: PromptQuery) -> ChangedAnswer:
        """End its pins."""
        prompt = await self._prompt(asked, asked.prompt)
        return await self._change(
            lambda engine: engine.lifecycle.unpin(prompt.tokens, prompt.owner), self._chosen(asked)
        )

    async def clear(self) -> ChangedAnswer:
        """Make everything on the devices unfindable."""
        return await self._change(lambda engine: engine.memory.cache.clear(), self._service.strategies)

    async def _change(self, work: Callable[[Engine], int], strategies: list[str]) -> ChangedAnswer:
        done = [Changed(strategy=one, blocks=await self._service.call(work, one)) for one in strategies]
        return ChangedAnswer(engines=done)

    async def purge(self, asked: PurgeRequest) -> PurgeAnswer:
        """Forget what is asked for, in every engine."""
        if asked.everything:
            return await self._purge(everything_of)
        tenant = self._tenants.named(asked.tenant or "")
        if asked.session is not None:
            return await self._purge_session(tenant, asked.session)
        if asked.prompt is None:
            return await self._purge(lambda engine: tenant_of(engine, tenant.id))
        tokens = await tokens_of(asked.prompt, self._service)
        owner = Prompt(tokens, tenant, scope=Scope(asked.scope), cache_salt=asked.cache_salt).owner
        return await self._purge(lambda engine: prompt_of(engine, tokens, owner))

    async def _purge(self, work: Callable[[Engine], PurgedEngine]) -> PurgeAnswer:
        engines = [await self._service.call(work, one) for one in self._service.strategies]
        return _proven(engines)

    async def _purge_session(self, tenant: Tenant, session: str) -> PurgeAnswer:
        key = tenant.session_key(session)
        found = await self._in_each(session, key, lambda engine: session_of(engine, key))
        return _proven(found)

    # -- sessions -----------------------------------------------------------------------------------------------

    async def sessions(self) -> SessionsAnswer:
        """All sessions, engine by engine."""
        found = []
        for strategy in self._service.strategies:
            infos, now = await self._service.call(lambda e: (e.lifecycle.sessions(), e.clock.now()), strategy)
            found += [self._entry(strategy, info, now) for info in infos]
        return SessionsAnswer(sessions=found)

    def _entry(self, strategy: str, info: SessionInfo, now: float) -> SessionEntry:
        tenant = self._tenants.of_id(info.tenant)
        return SessionEntry(
            strategy=strategy, session=info.session if tenant is None else tenant.session_name(info.session),
            tenant="" if tenant is None else tenant.name, is_open=info.is_open, blocks=info.num_keys,
            running=info.num_running, idle_s=max(0.0, now - info.used_at),
            closes_in_s=None if info.closes_at == inf else max(0.0, info.closes_at - now),
        )  # fmt: skip

    async def open_session(self, session: str, asked: SessionRequest) -> SessionAnswer:
        """Open it in every engine."""
        tenant, ttl = self._tenants.named(asked.tenant), Ttl(asked.ttl_s, asked.idle_ttl_s)
        key = tenant.session_key(session)
        for strategy in self._service.strategies:
            await self._service.call(lambda e: e.lifecycle.open_session(key, tenant=tenant.id, ttl=ttl), strategy)
        return SessionAnswer(session=session, tenant=tenant.name, is_open=True)

    async def end_session(self, session: str, query: SessionQuery) -> SessionAnswer:
        """Close it, or purge it, wherever it is known."""
        tenant = self._tenants.named(query.tenant)
        if query.purge:
            purged = await self._purge_session(tenant, session)
            return SessionAnswer(session=session, tenant=tenant.name, is_open=False, purged=purged)
        key = tenant.session_key(session)
        await self._in_each(session, key, lambda engine: engine.lifecycle.close_session(key))
        return SessionAnswer(session=session, tenant=tenant.name, is_open=False)

    async def _in_each(self, session: str, key: str, work: Callable[[Engine], _T]) -> list[_T]:
        """Do something in every engine that knows the session; 404 if none does."""
        found = []
        for strategy in self._service.strategies:
            known = lambda e: any(info.session == key for info in e.lifecycle.sessions())  # noqa: E731
            if await self._service.call(known, strategy):
                found.append(await self._service.call(work, strategy))
        if not found:
            raise ApiError(404, f"no session of that tenant is called {session[:64]!r}", type=NOT_FOUND,
                           code="session_not_found")  # fmt: skip
        return found

    # -- the service --------------------------------------------------------------------------------------------

    def strategy(self) -> StrategyAnswer:
        """What is served."""
        strategies = self._service.strategies
        return StrategyAnswer(default=strategies[0], strategies=strategies)

    async def switch(self, asked: StrategyRequest) -> StrategyAnswer:
        """Drain, then switch; a new engine is told what tenants may keep."""
        try:
            await self._service.switch(parse(asked.strategy), asked.timeout_s)
        except RequestError as error:
            raise ApiError(409, str(error), code="requests_running") from None
        except CapacityError as error:  # of the engine to be made, not of a request
            raise ApiError(400, str(error), param="strategy") from None
        await self._tenants.tell(self._service)
        return self.strategy()

    async def drain(self, asked: DrainRequest) -> DrainAnswer:
        """Serve what there is, and nothing more."""
        drained = await self._service.drain(asked.timeout_s)
        return DrainAnswer(state=self._service.health, drained=drained)

    # -- what was meant -----------------------------------------------------------------------------------------

    def _chosen(self, asked: Whose) -> list[str]:
        """The engines meant, by strategy; UsageError for one that is not served."""
        strategies = self._service.strategies
        if asked.strategy is None:
            return strategies
        if (name := str(parse(asked.strategy))) not in strategies:
            raise UsageError(f"strategy {name!r} is not served here; choose one of {', '.join(strategies)}")
        return [name]

    async def _prompt(self, asked: Whose, prompt: str | list[int], ttl: Ttl = NO_TTL) -> Prompt:
        tenant, tokens = self._tenants.named(asked.tenant), await tokens_of(prompt, self._service)
        vocab = self._service.loaded.vocab_size
        if any(token >= vocab for token in tokens):
            raise UsageError(f"token id {max(tokens)} is outside the vocabulary of {vocab} tokens")
        return Prompt(tokens, tenant, asked.session or "", Scope(asked.scope), asked.cache_salt, ttl)

    def _until(self, asked: HowLong) -> float | None:
        """The end of a pin on the service's clock."""
        if asked.for_s is not None:
            return self._service.clock.now() + asked.for_s
        if asked.until is None:
            return None
        left = asked.until - time.time()
        if left <= 0:
            raise ApiError(400, f"until={asked.until:g} is over: name a moment to come", param="until")
        return self._service.clock.now() + left


def _proven(engines: list[PurgedEngine]) -> PurgeAnswer:
    return PurgeAnswer(proven=not any(t.found_again for e in engines for t in e.tiers), engines=engines)
