"""KV that left the device and came back is the KV that was there: greedy tokens are those of transformers' `generate`
in float32, through every tier and loading method.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from tests.engine.hierarchy.tiering import KINDS, Patient, leave_device, require_idle, store, tier_text
from tests.engine.plain import Plain
from tests.engine.runs import finish, greedy, prompts, run
from tests.tiers.redis_server import shared_server

Serve = Callable[..., Any]
Reference = Callable[[str], Plain]

METHODS = ("load(chunk=32)", "cake(chunk=32)", "layerwise")
NUM_TOKENS = 6
CHUNKED = {"max_num_batched_tokens": 9, "max_num_seqs": 8}
NARROW: dict[str, Any] = {"max_num_batched_tokens": 16, "max_num_seqs": 4}  # so that cake loads something for sure
UNCHUNKED = {"enable_chunked_prefill": False}
SHARED, *TAILS = prompts(64, 40, 9, 90)
FIRST = [SHARED + tail for tail in TAILS] + prompts(33, 130, seed=1)
COLD = prompts(50, 21, seed=2)  # never stored: they run beside those that are


@pytest.fixture
def patient(serve: Serve) -> Serve:
    """`serve`, with steps that wait for what is being loaded, so that computing never outruns it."""

    def make(model: str, strategy: str, **settings: Any) -> Any:
        meter = Patient()
        meter.engine = serve(model, strategy, meter=meter, **settings)
        return meter.engine

    return make


@pytest.fixture(autouse=True)
def _empty_redis(request: pytest.FixtureRequest) -> None:
    if "redis" in request.node.name:
        shared_server().say("FLUSHALL")


def answered(plain: Plain, many: list[list[int]], outputs: list[RequestOutput], num_tokens: int = NUM_TOKENS) -> None:
    for prompt, output in zip(many, outputs, strict=True):
        assert output.error is None
        plain.answer(prompt, num_tokens).require(output.token_ids)


def loaded(outputs: list[RequestOutput]) -> list[int]:
    return [output.attestation.tokens_loaded for output in outputs]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tier_and_method(patient: Serve, plain: Reference, tmp_path: Path, kind: str, method: str) -> None:
    engine = patient(
        "llama-tiny", f"full+prefix+{method}", tiers=[tier_text(kind, tmp_path)], max_num_batched_tokens=24,
        max_num_seqs=4,
    )  # fmt: skip
    answered(plain("llama"), FIRST, store(engine, FIRST, greedy(NUM_TOKENS)))
    mixed = [FIRST[0], COLD[0], *FIRST[1:], COLD[1]]
    outputs = run(engine, mixed, greedy(NUM_TOKENS))
    answered(plain("llama"), mixed, outputs)
    came = [output for prompt, output in zip(mixed, outputs, strict=True) if prompt in FIRST]
    # Some find their start on the device, where another has just brought it; none computes all of it.
    assert all(o.attestation.tokens_loaded + o.attestation.tokens_reused for o in came)
    assert sum(loaded(came)) > 100
    assert all(
        o.attestation.did[method.partition("(")[0]] == o.attestation.tokens_loaded for o in came if loaded([o])[0]
    )
    assert loaded([outputs[1], outputs[-1]]) == [0, 0]
    require_idle(engine)


@pytest.mark.parametrize("offload", ["through", "back"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pool_too_small_to_keep_a_prefix(
    patient: Serve, plain: Reference, tmp_path: Path, kind: str, offload: str
) -> None:
    engine = patient(
        "llama-tiny", "full+prefix+load", tiers=[tier_text(kind, tmp_path)], blocks=13, max_num_seqs=3,
        max_num_batched_tokens=48, offload=offload,
    )  # fmt: skip
    came = 0
    for _ in range(3):
        outputs = run(engine, FIRST, greedy(NUM_TOKENS))
        answered(plain("llama"), FIRST, outputs)
        came += sum(loaded(outputs))
    assert came > 100
    require_idle(engine)


@pytest.mark.parametrize("offload", ["through", "back"])
def test_two_tiers_where_the_first_pushes_down_to_the_second(
    patient: Serve, plain: Reference, tmp_path: Path, offload: str
) -> None:
    engine = patient(
        "llama-tiny", "full+prefix+load", offload=offload,
        tiers=["host(size=96KiB)", tier_text("disk", tmp_path)],
    )  # fmt: skip
    store(engine, FIRST, greedy(NUM_TOKENS))
    outputs = run(engine, FIRST, greedy(NUM_TOKENS))
    answered(plain("llama"), FIRST, outputs)
    tiers = engine.stats().tiers
    assert tiers["host"].num_evicted > 0
    assert tiers["disk"].num_loaded > 0
    assert sum(loaded(outputs)) > 100
    require_idle(engine)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text", "gpt2"])
def test_windows_and_other_positions(
    patient: Serve, plain: Reference, architecture: str, method: str, settings: dict[str, Any]
) -> None:
    engine = patient(f"{architecture}-tiny", f"full+prefix+{method}", tiers=["memory(size=4MiB)"], **settings)
    many = prompts(17, 33, 48, 70)
    store(engine, many, greedy(NUM_TOKENS))
    outputs = run(engine, many, greedy(NUM_TOKENS))
    answered(plain(architecture), many, outputs)
    if not method.startswith("cake"):
        assert all(loaded(outputs))
    elif settings is CHUNKED:  # else one step may compute it all
        assert sum(loaded(outputs)) >= 32
    require_idle(engine)


@pytest.mark.parametrize("method", METHODS)
def test_kv_in_bfloat16(patient: Serve, serve: Serve, method: str) -> None:
    many = prompts(70, 100)
    expected = run(serve("llama-tiny", "full+prefix", kv_cache_dtype="bfloat16"), many, greedy(NUM_TOKENS))
    engine = patient(
        "llama-tiny", f"full+prefix+{method}", tiers=["memory(size=4MiB)"], kv_cache_dtype="bfloat16", **NARROW
    )  # fmt: skip
    store(engine, many, greedy(NUM_TOKENS))
    outputs = run(engine, many, greedy(NUM_TOKENS))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert all(loaded(outputs))


@pytest.mark.parametrize("method", METHODS)
def test_samples_that_fork_from_a_loaded_prompt(patient: Serve, serve: Serve, method: str) -> None:
    (prompt,) = prompts(75)
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)

    def samples(engine: Any) -> dict[str, list[int]]:
        engine.add_request(prompt, params, request_id="four")
        done = finish(engine)
        assert (done["four"].attestation.tokens_loaded > 0) == (engine.memory.hierarchy is not None)
        return {name: output.token_ids for name, output in done.items()}

    expected = samples(serve("llama-tiny", "full+prefix"))
    engine = patient("llama-tiny", f"full+prefix+{method}", tiers=["memory(size=4MiB)"], **NARROW)
    store(engine, [prompt], greedy(1))
    assert samples(engine) == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    require_idle(engine)


# -- methods that keep KV elsewhere -----------------------------------------------------------------------------

ALL_FETCHED = "infinigen(alpha=1e9, budget=1, ratio=1)"
NEVER_FULL = "streaming(window=300)"
ALL_KEPT = "h2o(budget=1)"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", [NEVER_FULL, ALL_FETCHED])
def test_with_other_placements(patient: Serve, plain: Reference, strategy: str, method: str) -> None:
    engine = patient(
        "llama-tiny", f"{strategy}+prefix+{method}", tiers=["memory(size=4MiB)"], max_num_batched_tokens=40,
        max_num_seqs=4,
    )  # fmt: skip
    many = [*FIRST[:3], COLD[0]]
    for _ in range(2):
        outputs = run(engine, many, greedy(NUM_TOKENS))
        answered(plain("llama"), many, outputs)
        leave_device(engine)
    assert all(loaded(outputs[:1]))
    assert sum(loaded(outputs)) > 100
    require_idle(engine)


@pytest.mark.parametrize("method", METHODS)
def test_positions_of_loaded_tokens_are_true(patient: Serve, serve: Serve, method: str) -> None:
    """What the window lets go is told by the positions column, which no tier stores."""
    many = prompts(100, 70)
    strategy = "streaming(window=24)+prefix"
    expected = [o.token_ids for o in run(serve("llama-tiny", strategy), many, greedy(12))]
    engine = patient("llama-tiny", f"{strategy}+{method}", tiers=["memory(size=4MiB)"], **NARROW)
    store(engine, many, greedy(12))
    engine.memory.arena.columns["positions"].fill_(7)  # whatever was there
    outputs = run(engine, many, greedy(12))
    assert [o.token_ids for o in outputs] == expected
    assert all(loaded(outputs))
    require_idle(engine)


@pytest.mark.parametrize("strategy", [NEVER_FULL, ALL_FETCHED])
@pytest.mark.parametrize("offload", ["through", "back"])
def test_what_settles_was_stored_before(patient: Serve, plain: Reference, strategy: str, offload: str) -> None:
    """The prompt's blocks are rearranged when it is computed: what goes down is what was there before."""
    engine = patient("llama-tiny", f"{strategy}+prefix+load", tiers=["memory(size=4MiB)"], offload=offload, blocks=64)
    many = FIRST[:3]
    for _ in range(2):
        for prompt in many:
            (output,) = run(engine, [prompt], greedy(NUM_TOKENS))
            answered(plain("llama"), [prompt], [output])
            leave_device(engine)
    assert loaded([output]) == [(len(many[-1]) - 1) // 16 * 16]


# -- restarts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["disk", "redis", "object"])
def test_another_engine_over_the_same_place(
    patient: Serve, plain: Reference, tmp_path: Path, kind: str, method: str
) -> None:
    text = tier_text(kind, tmp_path).replace("memory://", (tmp_path / "objects").as_uri())
    (tmp_path / "objects").mkdir()
    many = [FIRST[0], FIRST[-1]]
    with patient("llama-tiny", f"full+prefix+{method}", tiers=[text]) as engine:
        run(engine, many, greedy(NUM_TOKENS))
    again = patient("llama-tiny", f"full+prefix+{method}", tiers=[text], max_num_batched_tokens=24, max_num_seqs=4)
    outputs = run(again, many, greedy(NUM_TOKENS))
    answered(plain("llama"), many, outputs)
    assert all(loaded(outputs))
    require_idle(again)


CHILD = """
import json, sys
from kvwise.core.config import EngineConfig
from kvwise.core.params import SamplingParams
from kvwise.core.tiering import parse_tier
from kvwise.engine.llm import LLM
tier, many = json.loads(sys.argv[1])
with LLM("random:llama-tiny", "full+prefix+load", tiers=[parse_tier(tier)]) as llm:
    outputs = llm.generate(many, SamplingParams(max_tokens=6, ignore_eos=True))
print(json.dumps([[o.token_ids, o.attestation.tokens_loaded] for o in outputs]))
"""


def test_another_process_over_the_same_folder(patient: Serve, plain: Reference, tmp_path: Path) -> None:
    tier = tier_text("disk", tmp_path)
    many = FIRST[:2]

    def child() -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps([tier, many])], capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers: list[Any] = json.loads(done.stdout)
        return answers

    for prompt, (tokens, num_loaded) in zip(many, child(), strict=True):
        plain("llama").answer(prompt, NUM_TOKENS).require(tokens)
        assert num_loaded == 0
    engine = patient(
        "llama-tiny", "full+prefix+cake(chunk=32)", tiers=[tier], max_num_batched_tokens=24, max_num_seqs=4
    )
    outputs = run(engine, many, greedy(NUM_TOKENS))
    answered(plain("llama"), many, outputs)
    assert loaded(outputs)[0] > 0
    require_idle(engine)
