"""Whose KV meets: lossy codecs never answer a lossless request, nor does another model, dtype or tenant's KV."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvwise.cache.scopes import Scope
from kvwise.core.output import RequestOutput
from kvwise.models.load import load_model
from tests.engine.hierarchy.tiering import hierarchy_of, require_idle, store, tier_text
from tests.engine.runs import finish, greedy, prompts, run

Serve = Callable[..., Any]

(PROMPT,) = prompts(100)
BLOCKS = 6
LOSSY = ["load(codec=int8)", "load(codec=int4)", "load(codec=int4z)", "cachegen(levels=2)", "cachegen(levels=3)"]


def ask(engine: Any, prompt: list[int] = PROMPT, **more: Any) -> RequestOutput:
    (output,) = run(engine, [prompt], greedy(4), **more)
    return output


@pytest.mark.parametrize("lossy", LOSSY)
def test_lossy_and_lossless_share_a_folder_and_nothing_else(serve: Serve, tmp_path: Path, lossy: str) -> None:
    tier = tier_text("disk", tmp_path)
    expected = ask(serve("llama-tiny", "full+prefix")).token_ids
    for first, second in ((lossy, "load"), ("load", lossy)):
        with serve("llama-tiny", f"full+prefix+{first}", tiers=[tier]) as engine:
            store(engine, [PROMPT], greedy(4))
            assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS
        with serve("llama-tiny", f"full+prefix+{second}", tiers=[tier]) as other:
            output = ask(other)
            assert output.attestation.tokens_loaded == 0
            assert output.attestation.tokens_computed > 100
            assert output.token_ids == expected
            require_idle(other)
        for path in (tmp_path / "disk").iterdir():
            path.unlink()


@pytest.mark.parametrize(("one", "other"), [("load(codec=int8)", "load(codec=int4)"), (LOSSY[-2], LOSSY[-1])])
def test_codecs_and_their_settings_are_told_apart(serve: Serve, tmp_path: Path, one: str, other: str) -> None:
    tier = tier_text("disk", tmp_path)
    with serve("llama-tiny", f"full+prefix+{one}", tiers=[tier]) as engine:
        store(engine, [PROMPT], greedy(4))
    with serve("llama-tiny", f"full+prefix+{other}", tiers=[tier]) as engine:
        assert ask(engine).attestation.tokens_loaded == 0
    with serve("llama-tiny", f"full+prefix+{one}", tiers=[tier]) as engine:  # its own are still there
        assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS


def test_raw_is_raw_whatever_loads_it(serve: Serve, tmp_path: Path) -> None:
    tier = tier_text("disk", tmp_path)
    with serve("llama-tiny", "full+prefix+load", tiers=[tier]) as engine:
        store(engine, [PROMPT], greedy(4))
    with serve("llama-tiny", "full+prefix+layerwise", tiers=[tier]) as engine:
        assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS


# How far a logit may be off, beside the spread of the logits; random ones would be off by 5 or so.
BOUNDS = {"load(codec=int8)": 0.1, "load(codec=int4)": 1.5, "cachegen(levels=2)": 3.0}


@pytest.mark.parametrize("lossy", BOUNDS)
def test_lossy_answers_are_close_and_attested(serve: Serve, lossy: str) -> None:
    engine = serve("llama-tiny", f"full+prefix+{lossy}", tiers=["memory(size=4MiB)"])
    rows: list[Tensor] = []

    def once() -> RequestOutput:
        engine.add_request(
            PROMPT, greedy(3, forced_tokens=[1, 2, 3]), request_id="a",
            observe=lambda i, step, logits: rows.append(logits.clone()),
        )  # fmt: skip
        return finish(engine)["a"]

    assert once().attestation.tokens_loaded == 0
    assert hierarchy_of(engine).flush()
    engine.memory.cache.clear()
    again = once()
    assert again.attestation.tokens_loaded == 16 * BLOCKS
    assert again.attestation.did[lossy.partition("(")[0]] == 16 * BLOCKS
    computed, loaded = torch.stack(rows[:3]), torch.stack(rows[3:])
    distance = float((computed - loaded).abs().max() / computed.std())
    assert 0 < distance < BOUNDS[lossy]
    assert engine.memory.cache.identity.encoding.startswith("native, at rest as ")


# -- whose it is (F11) --------------------------------------------------------------------------------------------


def test_another_models_dtypes_or_block_sizes_kv_is_no_hit(serve: Serve, tmp_path: Path) -> None:
    tier = tier_text("disk", tmp_path)
    with serve("llama-tiny", "full+prefix+load", tiers=[tier]) as engine:
        store(engine, [PROMPT], greedy(4))
    other_weights = load_model("random:llama-tiny", seed=1)  # of the same shape and name (F34)
    for model, settings in (
        (other_weights, {}),
        ("mistral-tiny", {}),
        ("llama-tiny", {"kv_cache_dtype": "bfloat16"}),
        ("llama-tiny", {"block_size": 32}),
    ):
        with serve(model, "full+prefix+load", tiers=[tier], **settings) as other:
            output = ask(other)
            assert output.attestation.tokens_loaded == 0
            assert output.token_ids == ask(serve(model, "full+prefix", **settings)).token_ids
            assert len(hierarchy_of(other).tiers[0].index) > 0  # it sees that there is something
    with serve("llama-tiny", "full+prefix+load", tiers=[tier]) as engine:
        assert ask(engine).attestation.tokens_loaded == 16 * BLOCKS


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"salt": "a"}, {"salt": "b"}),
        ({"salt": "a"}, {}),
        ({}, {"salt": "a"}),
        ({"salt": "a", "session": "s", "scope": Scope.SESSION}, {"salt": "a"}),
        ({"salt": "a", "session": "s", "scope": Scope.SESSION}, {"salt": "a", "session": "t", "scope": Scope.SESSION}),
        ({"salt": "a", "scope": Scope.REQUEST}, {"salt": "a"}),
        ({"salt": "a", "scope": Scope.REQUEST}, {"salt": "a", "scope": Scope.REQUEST}),
        ({"salt": "a"}, {"salt": "a", "scope": Scope.GLOBAL}),
    ],
)
def test_owners_that_do_not_share(serve: Serve, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    engine = serve("llama-tiny", "full+prefix+load", tiers=["memory(size=4MiB)"])
    store(engine, [PROMPT], greedy(4), **mine)
    stored = len(hierarchy_of(engine).tiers[0].index)
    assert stored == (0 if mine.get("scope") is Scope.REQUEST else BLOCKS)
    output = ask(engine, **theirs)
    assert output.attestation.tokens_loaded == output.attestation.tokens_reused == 0
    require_idle(engine)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"salt": "a"}, {"salt": "a", "session": "s"}),
        ({"salt": "a", "session": "s", "scope": Scope.SESSION}, {"salt": "a", "session": "s", "scope": Scope.SESSION}),
        ({"salt": "a", "scope": Scope.GLOBAL}, {"salt": "b", "scope": Scope.GLOBAL}),
        ({"salt": "a", "scope": Scope.GLOBAL}, {}),
    ],
)
def test_owners_that_share(serve: Serve, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    engine = serve("llama-tiny", "full+prefix+load", tiers=["memory(size=4MiB)"])
    store(engine, [PROMPT], greedy(4), **mine)
    assert ask(engine, **theirs).attestation.tokens_loaded == 16 * BLOCKS
    require_idle(engine)
