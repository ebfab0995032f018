"""Random lives of KV over device, memory and disk: store, load, evict, expire, purge, crash, damage.

Real engines serve a real model. Whatever they bring back, the logits are those of a full prefill; what has expired or
was purged is computed anew; and after every rule the books of every tier are exact.
"""

import shutil
import tempfile
from functools import cache
from math import inf
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from kvwise.cache.misses import RemovalReason
from kvwise.cache.ttl import Ttl
from kvwise.core.clock import VirtualClock
from kvwise.core.config import EngineConfig
from kvwise.core.tiering import parse_tier
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.names import Deadlines
from kvwise.engine.lifecycle import Owner
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.tiers.base import Fault, FaultKind
from tests.engine.hierarchy.tiering import WITHIN_S, Unruly, check, hierarchy_of, loads_of
from tests.engine.runs import finish, greedy, prompts

SIZE = 16
BLOCK_BYTES = 2 * 4 * 2 * SIZE * 16 * 4
LENGTHS = (40, 40, 70)
METHODS = ("load(chunk=16)", "cake(chunk=16)", "layerwise")
SALTS = ("", "", "a")
OFF = Fault(FaultKind.OFF, "this process has ended")


def texts() -> list[list[int]]:
    """Three texts that part from each other inside the third and the second block."""
    first, second, third = prompts(70, 70, 70, seed=13)
    return [first, first[:35] + second[35:], first[:18] + third[18:]]


TEXTS = texts()


@cache
def model() -> LoadedModel:
    return load_model("random:llama-tiny")


@cache
def expected(text: int, length: int) -> Tensor:
    """Logits [2, V] of a full prefill and the token after it."""
    with Engine(model(), parse("full"), EngineConfig(kv_cache_memory_bytes=8 * BLOCK_BYTES)) as engine:
        return ask(engine, text, length)[0]


def ask(engine: Engine, text: int, length: int, **more: Any) -> tuple[Tensor, Any]:
    rows: list[Tensor] = []
    engine.add_request(
        TEXTS[text][:length], greedy(2), request_id="a",
        observe=lambda index, step, logits: rows.append(logits.clone()), **more,
    )  # fmt: skip
    output = finish(engine)["a"]
    return torch.stack(rows), output


def handled(did: Any) -> int:
    """Tokens that were found, loaded or computed."""
    return int(did.tokens_reused + did.tokens_loaded + did.tokens_computed)


class HierarchyMachine(RuleBasedStateMachine):
    """`until` says of each key when, at the latest, anything that was stored under it may be served."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.clock = VirtualClock()
        self.folder = Path(tempfile.mkdtemp(prefix="kvwise-machine-"))
        begin = Deadlines.start
        wall = lambda: 1.7e9 + self.clock.now()  # noqa: E731
        self.patch = patch.object(Deadlines, "start", lambda clock: begin(clock, wall))
        self.patch.start()
        self.until: dict[bytes, float] = {}
        self.engine: Engine | None = None
        self.method = ""
        self.dead: list[Engine] = []

    def opened(self) -> Engine:
        assert self.engine is not None
        return self.engine

    @initialize(method=st.sampled_from(METHODS), offload=st.sampled_from(["through", "back"]))
    def open(self, method: str, offload: str) -> None:
        self.method = method
        tiers = [f"memory(size={7 * BLOCK_BYTES})", f"disk(size={14 * BLOCK_BYTES}, path={self.folder})"]
        config = EngineConfig(
            check=True, kv_cache_memory_bytes=7 * BLOCK_BYTES, max_num_batched_tokens=16, max_num_seqs=2,
            tiers=[parse_tier(tier) for tier in tiers], offload=offload,
        )  # fmt: skip
        self.engine = Engine(model(), parse(f"full+prefix+{method}"), config, self.clock)

    # what happens ------------------------------------------------------------------------------------------

    @rule(
        text=st.integers(0, 2), length=st.sampled_from(LENGTHS), salt=st.sampled_from(SALTS),
        ttl=st.sampled_from([inf, 5.0, 20.0]), idle=st.sampled_from([inf, inf, 3.0]), away=st.booleans(),
    )  # fmt: skip
    def serve(self, text: int, length: int, salt: str, ttl: float, idle: float, away: bool) -> None:
        if away:
            self.leave_the_device()
        now, engine = self.clock.now(), self.opened()
        discarded: list[int] = []
        start_over = engine._scheduler.start_over

        def note(sequence: Any) -> None:
            discarded.append(handled(sequence.attestation))
            start_over(sequence)

        with patch.object(engine._scheduler, "start_over", note):
            logits, output = ask(engine, text, length, salt=salt, ttl=Ttl(ttl, idle))
        assert torch.allclose(logits, expected(text, length), atol=1e-4)
        chain = engine.lifecycle.keys(TEXTS[text][:length], Owner(salt)).chain
        alive = [self.until.get(key, -inf) > now for key in chain]
        fresh = alive.index(False) if False in alive else len(alive)
        did = output.attestation
        assert did.tokens_reused + did.tokens_loaded <= SIZE * fresh
        # Only a request that starts over (a layer was bad, those before it were used) has handled more than its tokens.
        wasted = discarded[-1] if discarded else 0
        assert handled(did) - wasted == length + 1
        hits = did.tokens_reused if self.method.startswith("cake") else did.tokens_reused + did.tokens_loaded
        for key in chain[hits // SIZE :]:  # computed, or nobody knows; an idle time slides: nothing is said of it here
            self.until[key] = max(self.until.get(key, -inf), now + ttl)

    @rule(text=st.integers(0, 2), ttl=st.sampled_from([5.0, 20.0]), seconds=st.sampled_from([3.0, 5.0, 20.0]))
    def come_back(self, text: int, ttl: float, seconds: float) -> None:
        """Stored for a while, used by somebody who asks for no end, and once more later."""
        self.serve(text, 70, "", ttl, inf, away=False)
        self.serve(text, 70, "", inf, inf, away=True)
        self.clock.advance(seconds)
        self.serve(text, 70, "", inf, inf, away=False)

    @rule()
    def settle_down(self) -> None:
        assert hierarchy_of(self.opened()).flush(WITHIN_S)

    @rule()
    def leave_the_device(self) -> None:
        assert hierarchy_of(self.opened()).flush(WITHIN_S)
        self.opened().memory.cache.clear()

    @rule()
    def leave_all_but_the_disk(self) -> None:
        self.leave_the_device()
        memory = hierarchy_of(self.opened()).tiers[0]
        memory.remove(memory.keys_where(), RemovalReason.EVICTED, wipe=False)

    @rule(seed=st.integers(0, 3))
    def press(self, seed: int) -> None:
        """Others need the room."""
        engine = self.opened()
        engine.add_request(prompts(90, seed=100 + seed)[0], greedy(1), salt="others")
        finish(engine)

    @rule(seconds=st.sampled_from([0.5, 3.0, 5.0, 20.0]))
    def tick(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(text=st.integers(0, 2), length=st.sampled_from(LENGTHS), salt=st.sampled_from(SALTS))
    def purge_a_prefix(self, text: int, length: int, salt: str) -> None:
        chain = self.opened().lifecycle.keys(TEXTS[text][:length], Owner(salt)).chain
        self.opened().lifecycle.purge_prefix(TEXTS[text][:length], Owner(salt))
        for key in chain:
            self.until.pop(key, None)

    @rule(salt=st.sampled_from(SALTS))
    def purge_a_tenant(self, salt: str) -> None:
        self.opened().lifecycle.purge_tenant(salt)
        for text in TEXTS:
            for key in self.opened().lifecycle.keys(text, Owner(salt)).chain:
                self.until.pop(key, None)

    @rule()
    def purge_all(self) -> None:
        self.opened().lifecycle.purge_all()
        self.until.clear()

    @rule(text=st.integers(0, 2), seconds=st.sampled_from([None, 4.0]))
    def pin(self, text: int, seconds: float | None) -> None:
        until = None if seconds is None else self.clock.now() + seconds
        self.opened().lifecycle.pin(TEXTS[text][:40], until=until)

    @rule(text=st.integers(0, 2))
    def unpin(self, text: int) -> None:
        self.opened().lifecycle.unpin(TEXTS[text])

    @rule(method=st.sampled_from(METHODS), offload=st.sampled_from(["through", "back"]))
    def close_and_open(self, method: str, offload: str) -> None:
        self.opened().close()
        self.open(method, offload)

    @rule(method=st.sampled_from(METHODS), offload=st.sampled_from(["through", "back"]))
    def crash(self, method: str, offload: str) -> None:
        """What was queued is never written; what lies in the folder is all there is."""
        hierarchy = hierarchy_of(self.opened())
        hierarchy._saver._jobs.clear()
        for tier in hierarchy.tiers:
            tier.store = Unruly(tier.store)
            tier.store.outage = OFF
        assert hierarchy._saver.flush(WITHIN_S)
        assert hierarchy._fetcher.flush(WITHIN_S)
        self.dead.append(self.opened())
        self.open(method, offload)

    @rule(offset=st.integers(0, BLOCK_BYTES // 2 - 1))
    def flip_bits(self, offset: int) -> None:
        """One in every half a block: no record on the disk is whole after that."""
        assert hierarchy_of(self.opened()).flush(WITHIN_S)
        for path in self.folder.iterdir():
            if path.is_file() and path.stat().st_size > BLOCK_BYTES:
                data = bytearray(path.read_bytes())
                for at in range(offset, len(data), BLOCK_BYTES // 2):
                    data[at] ^= 1
                with path.open("r+b") as file:
                    file.write(data)

    # what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def books_are_exact(self) -> None:
        if self.engine is None:
            return
        loads_of(self.engine).advance()
        check(self.engine)
        usage = self.engine.memory.cache.usage()
        assert usage.num_sequences == 0
        tiers = hierarchy_of(self.engine).tiers
        assert tiers[0].stats().num_bytes <= 7 * BLOCK_BYTES
        assert tiers[1].stats().num_bytes <= 14 * BLOCK_BYTES

    def teardown(self) -> None:
        for engine in [*self.dead, *([] if self.engine is None else [self.engine])]:
            engine.close()
        self.patch.stop()
        shutil.rmtree(self.folder)


TestHierarchy = HierarchyMachine.TestCase
TestHierarchy.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
