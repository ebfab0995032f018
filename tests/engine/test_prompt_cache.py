"""Named prompt caches: what is saved comes back as it was, or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvwise.cache.scopes import Scope
from kvwise.cache.ttl import Ttl
from kvwise.core.clock import VirtualClock
from kvwise.core.errors import CapacityError, UsageError
from kvwise.engine import prompt_cache, prompt_loading
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.names import Deadlines
from kvwise.engine.lifecycle import Owner
from kvwise.engine.llm import LLM
from kvwise.engine.prompt_cache import load_prompt_cache, save_prompt_cache
from kvwise.tiers.base import Extent
from tests.conftest import BLOCK
from tests.engine.runs import greedy, prompts, require_empty, run

Serve = Callable[..., Engine]
MODEL = "llama-tiny"
(PROMPT,) = prompts(100)  # six full blocks
FULL = len(PROMPT) // BLOCK * BLOCK


@pytest.fixture
def saved(serve: Serve, tmp_path: Path) -> tuple[Path, list[int]]:
    """A file with `PROMPT`, and what the model answers to it."""
    engine = serve(MODEL, "full+prefix")
    (out,) = run(engine, [PROMPT], greedy(8))
    report = save_prompt_cache(engine, tmp_path / "prompt.kv", prompt=PROMPT)
    assert (report.num_blocks, report.num_tokens) == (6, FULL)
    assert report.num_bytes == os.path.getsize(report.path)
    return tmp_path / "prompt.kv", out.token_ids


def answer(engine: Engine, prompt: list[int] = PROMPT, **more: Any) -> tuple[int, list[int]]:
    """Tokens found, tokens made."""
    (out,) = run(engine, [prompt], greedy(8), **more)
    return out.metrics.num_cached_tokens, out.token_ids


def untouched(engine: Engine) -> None:
    """Nothing was published, nothing is held."""
    assert not list(engine.memory.cache.stored())
    require_empty(engine)


STRATEGIES = [
    ("full+prefix", ()),
    ("full+prefix+load", ("memory(size=64MiB)",)),
    ("full+prefix+cake", ("memory(size=64MiB)",)),
    ("streaming(budget=0.5)+prefix", ()),
    ("infinigen+prefix", ()),
]


@pytest.mark.parametrize(("strategy", "tiers"), STRATEGIES)
def test_a_loaded_prompt_is_hit_and_answers_the_same(
    serve: Serve, tmp_path: Path, strategy: str, tiers: tuple[str, ...]
) -> None:
    first = serve(MODEL, strategy, tiers=tiers)
    answer(first)
    found, expected = answer(first)  # a hit on the device: selections by what was computed may differ from a miss
    assert found == FULL
    save_prompt_cache(first, tmp_path / "p", prompt=PROMPT)
    fresh = serve(MODEL, strategy, tiers=tiers)
    report = load_prompt_cache(fresh, tmp_path / "p")
    assert (report.num_resident, report.place, report.num_expired) == (6, "device", 0)
    require_empty(fresh)
    assert answer(fresh) == (FULL, expected)


def test_blocks_below_are_saved_as_well(serve: Serve, tmp_path: Path) -> None:
    engine = serve(MODEL, "full+prefix+load", tiers=["memory(size=64MiB)"])
    _, expected = answer(engine)
    assert engine.memory.hierarchy is not None
    assert engine.memory.hierarchy.flush()
    engine.memory.cache.clear()
    assert save_prompt_cache(engine, tmp_path / "p", prompt=PROMPT).num_blocks == 6
    fresh = serve(MODEL, "full+prefix")
    load_prompt_cache(fresh, tmp_path / "p")
    assert answer(fresh) == (FULL, expected)


def test_a_bad_block_below_is_left_out(serve: Serve, tmp_path: Path) -> None:
    engine = serve(MODEL, "full+prefix+load", tiers=["memory(size=64MiB)"])
    answer(engine)
    hierarchy = engine.memory.hierarchy
    assert hierarchy is not None
    assert hierarchy.flush()
    engine.memory.cache.clear()
    keys = engine.lifecycle.keys(PROMPT)
    store: Any = hierarchy.tiers[0].store
    (view,) = store.read([Extent(keys.chain[3])])
    broken = bytearray(view)
    broken[-100] ^= 1
    store.write([(keys.chain[3], [bytes(broken)])])
    assert save_prompt_cache(engine, tmp_path / "p", prompt=PROMPT).num_blocks == 3
    fresh = serve(MODEL, "full+prefix")
    assert load_prompt_cache(fresh, tmp_path / "p").num_resident == 3


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_what_does_not_fit_the_pool_goes_to_the_first_tier(serve: Serve, tmp_path: Path, codec: str) -> None:
    method = f"full+prefix+load(codec={codec})"
    engine = serve(MODEL, method, tiers=["memory(size=64MiB)"])
    _, expected = answer(engine)
    save_prompt_cache(engine, tmp_path / "p", prompt=PROMPT)
    small = serve(MODEL, method, tiers=["memory(size=64MiB)"], blocks=8, max_num_seqs=2)
    row = small.memory.cache.admit_with_room(
        small.memory.cache.match(small.lifecycle.keys([1] * 64), 64), small.lifecycle.keys([1] * 64), 64
    )
    assert row is not None
    report = load_prompt_cache(small, tmp_path / "p")
    assert (report.place, report.num_resident) == ("memory", 6)
    small.memory.cache.release(row)
    cached, tokens = answer(small)
    assert cached == FULL
    if codec == "raw":
        assert tokens == expected
    bare = serve(MODEL, "full+prefix", blocks=4, max_num_seqs=2)
    if codec == "raw":
        with pytest.raises(CapacityError, match="6 blocks do not fit the device pool of 4"):
            load_prompt_cache(bare, tmp_path / "p")
        require_empty(bare)


def test_a_session_is_saved_with_all_its_chains(serve: Serve, tmp_path: Path) -> None:
    engine = serve(MODEL, "full+prefix")
    one, other = PROMPT + prompts(40, seed=1)[0], PROMPT[:48] + prompts(60, seed=2)[0]
    expected = [answer(engine, p, salt="t", session="s")[1] for p in (one, other)]
    answer(engine, prompts(64, seed=3)[0], salt="t", session="another")
    alone = prompts(50, seed=4)[0]
    expected.append(answer(engine, alone, salt="t", session="s", scope=Scope.SESSION)[1])
    report = save_prompt_cache(engine, tmp_path / "s", session="s")
    grown = [(len(p) + 7) // BLOCK for p in (one, other, alone)]  # the last token's KV is not computed
    assert report.num_blocks == sum(grown) - 3  # three blocks are common to two of them
    fresh = serve(MODEL, "full+prefix")
    assert load_prompt_cache(fresh, tmp_path / "s", owner=Owner("t", "s")).num_resident == report.num_blocks
    for prompt, tokens, scope in zip(
        (one, other, alone), expected, (Scope.TENANT, Scope.TENANT, Scope.SESSION), strict=True
    ):
        found = answer(fresh, prompt, salt="t", session="s", scope=scope)
        assert found == (len(prompt) // BLOCK * BLOCK, tokens)
    assert fresh.purge_session("s").num_blocks >= report.num_blocks


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "qwen2-tiny"}, ["model", "llama", "qwen2"]),
        ({"kv_cache_dtype": "bfloat16"}, ["dtype", "torch.float32/torch.float32", "torch.float32/torch.bfloat16"]),
        ({"block_size": 32}, ["block_size 16", "has 32"]),
    ],
)
def test_a_file_of_another_kind_is_refused(
    serve: Serve, saved: tuple[Path, list[int]], settings: dict[str, Any], words: list[str]
) -> None:
    engine = serve(settings.pop("model", MODEL), "full+prefix", **settings)
    with pytest.raises(UsageError) as error:
        load_prompt_cache(engine, saved[0])
    for word in words:
        assert word in str(error.value)
    untouched(engine)


def test_a_lossy_engine_and_a_lossless_one_refuse_each_others(serve: Serve, saved: tuple[Path, list[int]]) -> None:
    engine = serve(MODEL, "full+prefix+load(codec=int4)", tiers=["memory(size=64MiB)"])
    with pytest.raises(UsageError, match="of encoding 'native', this engine has 'native, at rest as int4"):
        load_prompt_cache(engine, saved[0])


def test_another_salt_is_refused(serve: Serve, tmp_path: Path) -> None:
    engine = serve(MODEL, "full+prefix")
    _, expected = answer(engine, salt="mine")
    save_prompt_cache(engine, tmp_path / "p", prompt=PROMPT, owner=Owner("mine"))
    fresh = serve(MODEL, "full+prefix")
    for owner in (Owner(), Owner("yours"), Owner("yours", "mine")):
        with pytest.raises(UsageError, match="another salt"):
            load_prompt_cache(fresh, tmp_path / "p", owner=owner)
    untouched(fresh)
    save_prompt_cache(serve_nobodys(serve), tmp_path / "q", prompt=PROMPT)
    with pytest.raises(UsageError, match="another salt"):
        load_prompt_cache(fresh, tmp_path / "q", owner=Owner("mine"))
    load_prompt_cache(fresh, tmp_path / "p", owner=Owner("mine"))
    assert answer(fresh)[0] == 0
    assert answer(fresh, salt="mine") == (FULL, expected)


def serve_nobodys(serve: Serve) -> Engine:
    """An engine that has computed `PROMPT` without a salt."""
    engine = serve(MODEL, "full+prefix")
    answer(engine)
    return engine


def test_a_cut_file_loads_nothing(serve: Serve, saved: tuple[Path, list[int]]) -> None:
    engine = serve(MODEL, "full+prefix")
    whole = saved[0].read_bytes()
    lengths = {0, 1, 8, 20, 21, 500, len(whole) - 1, len(whole) - 64, *range(7, len(whole), len(whole) // 50)}
    for length in sorted(lengths):
        saved[0].write_bytes(whole[:length])
        with pytest.raises(UsageError, match="prompt cache"):
            load_prompt_cache(engine, saved[0])
    saved[0].write_bytes(whole + b"\x00")
    with pytest.raises(UsageError, match="damaged"):
        load_prompt_cache(engine, saved[0])
    untouched(engine)


def test_a_flipped_bit_anywhere_loads_nothing(serve: Serve, saved: tuple[Path, list[int]]) -> None:
    engine = serve(MODEL, "full+prefix")
    whole = saved[0].read_bytes()
    random = np.random.default_rng(0)
    places = [*range(64), *random.integers(len(whole), size=400).tolist(), len(whole) - 1]
    for place in places:
        broken = bytearray(whole)
        broken[place] ^= 1 << int(random.integers(8))
        saved[0].write_bytes(bytes(broken))
        with pytest.raises(UsageError):
            load_prompt_cache(engine, saved[0])
    untouched(engine)
    saved[0].write_bytes(whole)
    load_prompt_cache(engine, saved[0])
    assert answer(engine) == (FULL, saved[1])


@pytest.mark.parametrize("chains", [1, 2])
def test_a_file_that_changes_after_it_was_verified_leaves_nothing(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chains: int
) -> None:
    path, first, engine = tmp_path / "s", serve(MODEL, "full+prefix"), serve(MODEL, "full+prefix")
    for prompt in prompts(100, 100)[:chains]:
        run(first, [prompt], greedy(1), session="s")
    save_prompt_cache(first, path, session="s")
    verify = prompt_loading.Reader.verify

    def then_break(self: Any) -> list[float]:
        found = verify(self)
        broken = bytearray(path.read_bytes())
        broken[-100] ^= 1
        path.write_bytes(bytes(broken))
        return found

    monkeypatch.setattr(prompt_loading.Reader, "verify", then_break)
    with pytest.raises(UsageError, match=f"block {6 * chains - 1}"):
        load_prompt_cache(engine, path, owner=Owner("", "s"))
    untouched(engine)


@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "pickle"])
def test_what_is_no_file_of_ours(serve: Serve, tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "pickle":
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR." * 20)
    with pytest.raises(UsageError, match=str(path)):
        load_prompt_cache(serve(MODEL, "full+prefix"), path)


def test_a_file_takes_its_place_whole_or_not_at_all(
    serve: Serve, saved: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve(MODEL, "full+prefix")
    answer(engine, prompts(40, seed=5)[0])
    before = saved[0].read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left"):
            save_prompt_cache(engine, saved[0], prompt=prompts(40, seed=5)[0])
    assert saved[0].read_bytes() == before
    assert [p.name for p in saved[0].parent.iterdir()] == [saved[0].name]
    for place in (saved[0].parent, saved[0].parent / "no" / "folder"):
        with pytest.raises(UsageError, match="name"):
            save_prompt_cache(engine, place, prompt=prompts(40, seed=5)[0])


def test_nothing_to_save(serve: Serve, tmp_path: Path) -> None:
    engine = serve(MODEL, "full+prefix")
    with pytest.raises(UsageError, match="no full block of it is resident"):
        save_prompt_cache(engine, tmp_path / "p", prompt=PROMPT)
    with pytest.raises(UsageError, match="unknown session"):
        save_prompt_cache(engine, tmp_path / "p", session="who")
    with pytest.raises(UsageError, match="add \\+prefix"):
        save_prompt_cache(serve(MODEL, "full"), tmp_path / "p", prompt=PROMPT)
    assert not list(tmp_path.iterdir())


def test_blocks_keep_the_rest_of_their_time(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wall(seconds: float) -> None:
        for module in (prompt_cache, prompt_loading):
            monkeypatch.setattr(module, "deadlines_of", lambda engine: Deadlines(engine.clock, seconds))

    wall(1000.0)
    engine = serve(MODEL, "full+prefix", clock=VirtualClock())
    answer(engine, ttl=Ttl(absolute_s=60))
    save_prompt_cache(engine, tmp_path / "p", prompt=PROMPT)
    wall(1050.0)
    clock = VirtualClock()
    fresh = serve(MODEL, "full+prefix", clock=clock)
    load_prompt_cache(fresh, tmp_path / "p")
    clock.advance(9)
    assert answer(fresh)[0] == FULL
    clock.advance(1)
    assert answer(fresh)[0] == 0
    wall(1060.0)
    late = serve(MODEL, "full+prefix", clock=VirtualClock())
    report = load_prompt_cache(late, tmp_path / "p")
    assert (report.num_resident, report.num_expired) == (0, 6)
    untouched(late)


def test_loading_twice_and_beside_running_requests(serve: Serve, saved: tuple[Path, list[int]]) -> None:
    engine = serve(MODEL, "full+prefix", blocks=40)
    engine.add_request(prompts(50, seed=9)[0], greedy(30), request_id="runs")
    engine.step()
    for _ in range(2):
        assert load_prompt_cache(engine, saved[0]).num_resident == 6
    assert len(list(engine.memory.cache.stored())) == 6 + 3
    assert answer(engine) == (FULL, saved[1])


def test_the_offline_face_computes_what_it_saves(load: Callable[[str], Any], tmp_path: Path) -> None:
    with LLM(load(MODEL), "full+prefix", kv_cache_memory_bytes=1 << 20) as llm:
        assert llm.save_prompt_cache(PROMPT, tmp_path / "p", salt="t").num_blocks == 6
        expected = llm.generate([PROMPT], greedy(4), salt="t")[0].token_ids
    with LLM(load(MODEL), "full+prefix", kv_cache_memory_bytes=1 << 20) as llm:
        assert llm.load_prompt_cache(tmp_path / "p", salt="t").num_tokens == FULL
        (out,) = llm.generate([PROMPT], greedy(4), salt="t")
        assert (out.metrics.num_cached_tokens, out.token_ids) == (FULL, expected)
