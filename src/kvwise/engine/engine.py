"""The engine: `step` is schedule, run, commit."""

import itertools
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
from torch import Tensor

from kvwise.cache.identity import PrefixKeys, Tokens
from kvwise.cache.scopes import Scope
from kvwise.cache.ttl import NO_TTL, Ttl
from kvwise.core.clock import Clock, MonotonicClock
from kvwise.core.config import PRIORITY, EngineConfig
from kvwise.core.errors import CapacityError, UsageError
from kvwise.core.output import Attestation, EngineStats, FinishReason, RequestMetrics, RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import Strategy
from kvwise.engine.batch import Batch, BatchBuilder
from kvwise.engine.finish import Finisher
from kvwise.engine.hierarchy.storing import Storing
from kvwise.engine.lifecycle import Lifecycle, Owner, PurgeReport
from kvwise.engine.meter import Meter, ShareMeter
from kvwise.engine.placement.base import ReadsInStrides
from kvwise.engine.placement.choose import make_memory
from kvwise.engine.runner import Runner
from kvwise.engine.sampler import SequenceSampler
from kvwise.engine.scheduler import Scheduled, Scheduler
from kvwise.engine.seeing import look, place_images
from kvwise.engine.sequence import Observe, Phase, Sequence
from kvwise.engine.sizing import max_model_len
from kvwise.models.loaded import LoadedModel
from kvwise.models.text import OutputText
from kvwise.models.vision import Placed


class Engine:
    """Continuous batching of many requests over one model and one strategy. Speaks token ids; not thread-safe."""

    def __init__(
        self, loaded: LoadedModel, strategy: Strategy, config: EngineConfig, clock: Clock | None = None,
        meter: Meter | None = None,
    ) -> None:  # fmt: skip
        self.loaded = loaded
        self.strategy = strategy
        self.config = config
        self.clock = clock or MonotonicClock()
        self.memory = make_memory(loaded, strategy, config, self.clock)
        self.lifecycle = Lifecycle(self.memory, config, self.clock)
        self.max_model_len = max_model_len(loaded, config)
        cache, placement = self.memory.cache, self.memory.placement
        self._loads = self.memory.loads
        self._storing = None if self._loads is None else Storing(self._loads.hierarchy, cache, config)
        self._scheduler = Scheduler(cache, placement, config, self.clock, self._loads, self._storing)
        self._builder = BatchBuilder(cache, self.memory.arena, self.memory.kernels, placement, self._loads)
        self._runner = Runner(loaded, look_ahead=placement.looks_ahead, meter=meter or ShareMeter(config.compute_share))
        self._finisher = Finisher(self.memory, self._scheduler, loaded, self.clock)
        self._requests: dict[str, list[Sequence]] = {}
        self._ids = itertools.count()
        self._num_steps = 0
        self.num_step_tokens = 0  # computed in the last step

    # -- requests -----------------------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Many[int],
        params: SamplingParams | Many[SamplingParams],
        *,
        images: Many[Any] = (),
        request_id: str | None = None,
        salt: str = "",
        session: str = "",
        scope: Scope = Scope.TENANT,
        ttl: Ttl = NO_TTL,
        cache_salt: str = "",
        num_shareable: int | None = None,
        priority: int = 0,
        ttft_target_s: float | None = None,
        arrival: float | None = None,
        observe: Observe | None = None,
    ) -> str:
        """Queue a request and return its id. UsageError if it can never be served; nothing is queued then.

        Several `params` make one sample each, all forked from the prompt once it is computed: with questions as their
        `forced_tokens`, each is asked of the same cache, which has seen none of them. `images` are paths, PIL images or
        uint8 arrays (`models.images.read_image`), for which the prompt has one placeholder each, or all the tokens they
        take (`models.vision.Vision.place`). `salt` names the tenant: equal
        prompts of different tenants share nothing. `session`, `scope` and `ttl` say who else may reuse the request's
        KV and how long it is kept (see `lifecycle`), `cache_salt` parts them further, and only the full blocks of the
        first `num_shareable` tokens (None: all) are looked up and published. A smaller `priority` goes first, where the
        config's `scheduling_policy` heeds it; `ttft_target_s` is a wish that loading may heed. `arrival` is in seconds
        on the engine's clock (now, if None). `observe(index, step, logits)` sees the raw logits [V] behind every output
        token of every sample.
        """
        number = next(self._ids)
        name = request_id if request_id is not None else f"request-{number}"
        samples = _samples(params)
        self._refuse_priority(priority)
        tokens, placed = self._prompt(name, [int(t) for t in prompt], samples, images)
        now = self.clock.now() if arrival is None else arrival
        owner = Owner(salt, session, scope, ttl, cache_salt)
        sequences = [
            self._sequence(name, index, number, tokens, one, now, observe, placed) for index, one in enumerate(samples)
        ]
        for sequence in sequences:
            sequence.salt, sequence.session, sequence.priority = owner.salt, owner.session, priority
            sequence.keys = self._keys(sequence.token_array(), owner, placed, num_shareable)
        keys = sequences[0].keys
        assert keys is not None
        terms = self.lifecycle.begin(name, owner, keys)
        for sequence in sequences:
            sequence.terms, sequence.ttft_target_s, sequence.num_owned = terms, ttft_target_s, len(keys)
        sequences[0].siblings = sequences[1:]
        self._requests[name] = sequences
        self._scheduler.add(sequences[0])
        return name

    def _sequence(
        self, name: str, index: int, number: int, tokens: list[int], params: SamplingParams, now: float,
        observe: Observe | None, placed: Placed | None,
    ) -> Sequence:  # fmt: skip
        return Sequence(
            request_id=name,
            index=index,
            prompt=tokens,
            tokens=list(tokens),
            params=params,
            metrics=RequestMetrics(arrival=now, num_prompt_tokens=len(tokens)),
            attestation=Attestation(str(self.strategy), bits_per_element=8.0 * self.memory.layout.element_bytes),
            output=OutputText(self.loaded.tokenizer, params.stop),
            sampler=SequenceSampler(
                params,
                tokens,
                vocab_size=self.loaded.vocab_size,
                eos_token_ids=self.loaded.eos_token_ids,
                seed=number,
                index=index,
                device=self.loaded.device,
            ),
            observe=observe,
            images=placed,
        )

    def _prompt(
        self, name: str, tokens: list[int], samples: list[SamplingParams], images: Many[Any]
    ) -> tuple[list[int], Placed | None]:
        """The tokens to be computed, images included; UsageError if they can never be."""
        for one in samples:
            self._refuse(name, tokens, one)
        tokens, placed = place_images(self.loaded, tokens, images)
        for one in samples if placed is not None else ():
            self._refuse(name, tokens, one)  # longer now
        return tokens, placed

    def _refuse_priority(self, priority: int) -> None:
        if priority and self.config.scheduling_policy != PRIORITY:
            raise UsageError(
                f"priority={priority} means nothing under scheduling_policy={self.config.scheduling_policy!r}: leave "
                f"it out, or choose {PRIORITY!r}"
            )

    def require_servable(self, prompt: Many[int], params: SamplingParams) -> None:
        """UsageError if a prompt without images can never be served with these parameters. Safe on any thread."""
        self._refuse("", [int(t) for t in prompt], params)

    def _refuse(self, name: str, tokens: list[int], params: SamplingParams) -> None:
        longest = len(tokens) + params.max_tokens
        vocab = self.loaded.vocab_size
        if name in self._requests:
            raise UsageError(f"request id {name!r} is in use: choose another")
        if not tokens:
            raise UsageError("the prompt is empty: give at least one token")
        if not all(0 <= t < vocab for t in tokens):
            bad = next(t for t in tokens if not 0 <= t < vocab)
            raise UsageError(f"token id {bad} is outside the vocabulary of {vocab} tokens")
        if longest > self.max_model_len:
            raise CapacityError(
                f"prompt of {len(tokens)} tokens and max_tokens={params.max_tokens} make {longest}, more than "
                f"max_model_len={self.max_model_len}: shorten the prompt or lower max_tokens"
            )
        forced = params.forced_tokens
        if forced is not None and not all(0 <= t < vocab for t in forced):
            bad = next(t for t in forced if not 0 <= t < vocab)
            raise UsageError(f"forced_tokens: id {bad} is outside the vocabulary of {vocab} tokens")
        self._refuse_size(len(tokens), longest)

    def _refuse_size(self, num_prompt: int, longest: int) -> None:
        """Every request must be able to run alone, or it would wait for ever."""
        placement = self.memory.placement
        if not isinstance(placement, ReadsInStrides):
            self.memory.cache.require_fits(num_prompt if placement.settles else longest)
        reason = placement.room_for(num_prompt, longest)
        if reason is not None:
            raise CapacityError(reason)

    def abort(self, request_id: str) -> None:
        """End a request in any phase; its memory is free at once. An id that is not known is no error."""
        for sequence in self._requests.get(request_id, []):
            if sequence.phase is not Phase.FINISHED:
                self._finisher.end(sequence, FinishReason.ABORT)

    def abort_all(self) -> None:
        """End every request."""
        for name in list(self._requests):
            self.abort(name)

    def warm(
        self, prompt: Many[int], *, pin: bool = False, pin_until: float | None = None, salt: str = "",
        session: str = "", scope: Scope = Scope.TENANT, ttl: Ttl = NO_TTL, images: Many[Any] = (),
    ) -> str:  # fmt: skip
        """Queue a prompt to be computed and kept, with nothing generated; its request id. See `lifecycle.ready`.

        With `pin`, its full blocks are kept from eviction in every tier until `pin_until` (None: until unpinned).
        """
        params = SamplingParams(max_tokens=0)
        name = self.add_request(prompt, params, images=images, salt=salt, session=session, scope=scope, ttl=ttl)
        self.hold_warm(name, pin=pin, pin_until=pin_until)
        return name

    def hold_warm(self, request_id: str, *, pin: bool = False, pin_until: float | None = None) -> None:
        """What a queued request's prompt leaves is to stay warm: see `warm`."""
        keys = self._requests[request_id][0].keys
        assert keys is not None
        self.lifecycle.keep_warm(request_id, keys.copy(), pin=pin, until=pin_until)

    def keys(self, prompt: Many[int], images: Many[Any] = (), owner: Owner = Owner()) -> PrefixKeys:  # noqa: B008
        """The keys of a prompt with images, by which `lifecycle` finds, pins and purges its blocks."""
        tokens, placed = place_images(self.loaded, [int(t) for t in prompt], images)
        return self._keys(np.asarray(tokens, dtype=np.int64), owner, placed)

    def _keys(
        self, tokens: Tokens, owner: Owner, placed: Placed | None, num_shareable: int | None = None
    ) -> PrefixKeys:
        limit = None if num_shareable is None else num_shareable // self.memory.layout.block_size
        content = () if placed is None else placed.content
        return self.memory.cache.keys(tokens, owner.salt, content, limit=limit)

    def purge_session(self, session: str) -> PurgeReport:
        """End the session's requests, then forget in every tier what only it holds."""
        for name, sequences in list(self._requests.items()):
            if sequences[0].session == session:
                self.abort(name)
                self.lifecycle.end(name)
        return self.lifecycle.purge_session(session)

    def has_unfinished(self) -> bool:
        """Whether some request has tokens to come, or an end that `step` has not told yet."""
        return bool(self._requests)

    # -- a step -------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Schedule, run, commit: one forward pass for every request that can go on."""
        self.idle()
        schedule = self._scheduler.schedule()
        self._finisher.fail(self._scheduler.take_failures())
        if schedule:
            self._run(schedule)
        elif self._loads:
            self._loads.wait()
        elif not self._scheduler.running and self._scheduler.waiting and not self._scheduler.wait_for_blocks():
            self._finisher.refuse_stuck(self._scheduler.waiting[0])
        self._num_steps += 1
        self.num_step_tokens = sum(item.num_tokens for item in schedule)
        if self.config.check:
            self.memory.cache.check()
        return self.collect()

    def idle(self) -> None:
        """What is due without a request: KV expires, blocks go down, others are no longer held. `step` does it too."""
        self.memory.cache.expire()
        if self._storing is not None:
            self._storing.poll()
        self._scheduler.look_ahead()

    def _run(self, schedule: list[Scheduled]) -> None:
        shown, failures = look(self.loaded.vision, schedule)
        self._finisher.fail(failures)
        schedule = [item for item in schedule if item.sequence.row is not None]
        if not schedule:
            return
        try:
            batch = self._builder.build(schedule, shown)
            began = self.clock.now()
            logits = self._runner.run(batch)
        except Exception as error:  # the model or the memory gave out: only this step's requests fail
            self._finisher.fail([(s.sequence, error) for s in schedule])
            return
        if self._loads is not None:
            self._loads.note_step([(s.sequence, s.num_tokens) for s in batch.order], self.clock.now() - began)
            for item in batch.order:
                if self._loads.is_broken(item.sequence):
                    self._scheduler.start_over(item.sequence)
        self._commit(batch, logits)

    def _commit(self, batch: Batch, logits: Tensor) -> None:
        """The step's KV is written: make it known, let methods see it, take the new tokens."""
        order = [item for item in batch.order if item.sequence.row is not None]  # the others must start over
        prefills = [(s.sequence, s.num_tokens) for s in order if s.sequence.phase is Phase.PREFILL]
        settled = [s.sequence for s in order if s.sequence.settled]
        for item in order:
            item.sequence.num_computed += item.num_tokens
            item.sequence.attestation.tokens_computed += item.num_tokens
        sound = self._finisher.drop_unsound(batch, logits)
        alive = [s.sequence for s in order if s.sequence.row is not None]
        self._publish(alive)
        if self._storing is not None:
            self._storing.offer_full(alive)
        if prefills := [p for p in prefills if p[0].row is not None]:
            self._finisher.fail(self.memory.placement.after_prefill_step(prefills))
        if settled := [s for s in settled if s.row is not None]:
            self._finisher.fail(self.memory.placement.after_decode_step(settled))
        self._finisher.take_tokens(sound, logits)

    def _publish(self, sequences: list[Sequence]) -> None:
        rows = np.array([s.row for s in sequences], dtype=np.int64)
        computed = np.array([s.num_computed for s in sequences], dtype=np.int64)
        cache = self.memory.cache
        for i in cache.keyless(rows, computed).tolist():
            start = cache.num_keyed(int(rows[i]))
            cache.extend_keys(int(rows[i]), np.asarray(sequences[i].tokens[start : computed[i]], dtype=np.int64))
        cache.commit(rows, computed)
        for sequence in sequences:
            if sequence.session:
                self._note_growth(sequence)

    def _note_growth(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        keys = self.memory.cache.chain(sequence.row)
        if len(keys) > sequence.num_owned:
            self.lifecycle.grew(sequence.session, keys, sequence.num_owned)
            sequence.num_owned = len(keys)

    def collect(self) -> list[RequestOutput]:
        """Outputs of all sequences with news since the last call; requests that have ended are forgotten."""
        outputs = []
        for name in list(self._requests):
            sequences = self._requests[name]
            outputs += [self._finisher.output(s) for s in sequences if s.has_news]
            if all(s.phase is Phase.FINISHED for s in sequences):
                del self._requests[name]
                self.lifecycle.end(name)
        return outputs

    # -- figures ------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> tuple[int, int]:
        """Requests that no step has scheduled, and the tokens to be computed for them."""
        waiting = self._scheduler.waiting
        return len(waiting), sum(len(sequence.tokens) for sequence in waiting)

    @property
    def max_request_tokens(self) -> int:
        """Tokens that a request may come to, prompt and output, by the model's length and the pool's."""
        most = self.max_model_len
        return most if self.memory.placement.settles else min(most, self.memory.cache.most_tokens)

    def first_samples(self) -> list[Sequence]:
        """The first sample of every request that has not ended, to be read only, and only between two steps."""
        return [sequences[0] for sequences in self._requests.values()]

    def stats(self) -> EngineStats:
        """Figures of this moment."""
        usage, cache = self.memory.cache.usage(), self.memory.cache
        outside = dict(self.memory.placement.kv_bytes())
        hierarchy = self.memory.hierarchy
        for tier in [] if hierarchy is None else hierarchy.tiers:
            outside[tier.name] = outside.get(tier.name, 0) + tier.stats().num_bytes
        packed = self.memory.arena.packed
        device = usage.num_pages_used * self.memory.layout.page_bytes + outside.pop("device", 0)
        if packed is not None:
            device += usage.num_packed_used * packed.format.page_bytes
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            blocks_total=usage.num_blocks,
            blocks_free=usage.num_free,
            blocks_cached=usage.num_cached,
            pool_bytes=self.memory.arena.num_bytes,
            kv_bytes={"device": device, **outside},
            prefix_queries=cache.num_prefix_queries,
            prefix_hits=cache.num_prefix_hits,
            links={**self.memory.placement.links(), **({} if hierarchy is None else hierarchy.links())},
            tiers={} if hierarchy is None else {tier.name: tier for tier in hierarchy.stats()},
        )

    def close(self) -> None:
        """End what runs in the background and take the hooks off the model."""
        self.abort_all()
        for name in self._requests:
            self.lifecycle.end(name)
        self._requests.clear()
        self._runner.close()
        self.memory.placement.close()
        if self._loads is not None:
            self._loads.close()
            self._loads.hierarchy.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _samples(params: SamplingParams | Many[SamplingParams]) -> list[SamplingParams]:
    """The parameters of each sample of a request."""
    if isinstance(params, SamplingParams):
        return [params] * params.n
    if not params or any(one.n != 1 for one in params):
        raise UsageError("several sampling params make one sample each: give at least one, all with n=1")
    return list(params)
