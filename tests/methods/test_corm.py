"""CORM keeps what recent rows mark: against lists on running models, and against loops on random attention."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvwise.core.errors import StrategyError
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import parse
from kvwise.methods.retention.corm import Corm
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of
from tests.methods.corm_reference import PlainCorm
from tests.methods.retention_views import decode_view, prompt_view, random_attention

Serve = Callable[..., Any]
Load = Callable[[str], Any]

ROUNDING = 1e-8  # marks closer to their bound than this would be rounding's
SHAPE = (2, 3)
CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 4}
UNCHUNKED = {"enable_chunked_prefill": False}
NUM_DECODED = 40


# -- the method alone -------------------------------------------------------------------------------------------


def plain_marks(attention: np.ndarray, window: int) -> list[int | None]:
    """The last of the last `window` rows that marked each token, from the attention [G, n, n] of a KV head."""
    num_rows = attention.shape[1]
    found: list[int | None] = [None] * num_rows
    for row in range(max(0, num_rows - window), num_rows):
        for token in range(row + 1):
            if np.mean(attention[:, row, token]) >= 1 / (row + 1):
                found[token] = row
    return found


@given(num_prompt=st.integers(1, 70), window=st.integers(1, 40), recent=st.integers(1, 40), seed=st.integers(0, 20))
def test_what_stays_of_a_prompt_equals_loops(num_prompt: int, window: int, recent: int, seed: int) -> None:
    method = Corm(window, recent)
    attention = random_attention(num_prompt, SHAPE, 2, seed)
    kept = method.keep(prompt_view(method, num_prompt, SHAPE, attention=attention))
    assert kept.limit is None and kept.mass is not None
    for layer, head in np.ndindex(SHAPE):
        marks = plain_marks(attention[layer, head].numpy(), window)
        stays = [t for t, row in enumerate(marks) if row is not None or t >= num_prompt - recent]
        if num_prompt <= window + recent:
            stays = list(range(num_prompt))
        assert kept.mask[layer, head].nonzero().flatten().tolist() == stays
        assert kept.mass[layer, head].tolist() == [row or 0 for row in marks]


@given(seed=st.integers(0, 200))
def test_what_a_sweep_leaves_equals_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window, recent = (int(n) for n in rng.integers(1, 20, 2))
    method = Corm(window, recent)
    shape = (2, *SHAPE, 64)
    num_tokens = rng.integers(60, 100, 2)
    positions, rows, used = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, bool)
    for b, layer, head in np.ndindex(shape[:3]):
        count = int(rng.integers(1, 60))
        held = np.append(rng.choice(num_tokens[b] - 1, count - 1, replace=False), num_tokens[b] - 1)
        positions[b, layer, head, :count] = rng.permutation(held)
        rows[b, layer, head] = rng.integers(0, num_tokens[b], 64)
        used[b, layer, head, :count] = True
    view = decode_view(
        torch.from_numpy(positions), torch.from_numpy(used), num_tokens.tolist(), [0, 0], mass=torch.from_numpy(rows)
    )
    stays = method.stays(view).numpy()
    for place in np.ndindex(shape[:3]):
        first_row, first_recent = num_tokens[place[0]] - window, num_tokens[place[0]] - recent
        for slot in np.flatnonzero(used[place]):
            wanted = rows[place][slot] >= first_row or positions[place][slot] >= first_recent
            assert stays[place][slot] == (wanted or used[place].sum() <= window + recent)


def test_few_tokens_all_stay() -> None:
    """Nothing leaves until the cache holds more than window and recent together: 20 do not."""
    attention = random_attention(20, SHAPE, 2, 0)
    assert Corm(12, 8).keep(prompt_view(Corm(12, 8), 20, SHAPE, attention=attention)).mask.all()
    assert not Corm(11, 8).keep(prompt_view(Corm(11, 8), 20, SHAPE, attention=attention)).mask.all()


def test_the_prompts_rows_stand_in_for_those_of_an_output_that_is_computed_again() -> None:
    method = Corm(10, 4)
    once = method.keep(prompt_view(method, 40, SHAPE, attention=random_attention(40, SHAPE, 2, 3)))
    again = method.keep(
        prompt_view(method, 40, SHAPE, attention=random_attention(40, SHAPE, 2, 3, num_outputs=6), num_outputs=6)
    )
    marked = once.mass[..., :40] > 0
    assert torch.equal(again.mass[..., :40], torch.where(marked, once.mass + 6, 0.0))
    assert again.mask[..., 40:].all() and (again.mass[..., 40:] == 45).all()
    assert torch.equal(again.mask[..., :40], marked)  # the latest four are outputs


def test_options_are_checked() -> None:
    for text in ("window=0", "recent=0"):
        with pytest.raises(StrategyError, match=f"corm: {text} is out of range: it must be at least 1"):
            parse(f"corm({text})")


# -- on a running engine ----------------------------------------------------------------------------------------


class Twin:
    """A plain reference run over the forced tokens of one request."""

    def __init__(self, loaded: Any, prompt: list[int], forced: list[int], method: Corm) -> None:
        plain = PlainCorm(loaded, method.window, method.recent)
        self.logits = [plain.prefill(prompt)]
        self.kept = {len(prompt): plain.kept()}
        for token in forced[:-1]:
            self.logits.append(plain.decode(token))
            self.kept[plain._num_tokens] = plain.kept()
        assert plain.margin > ROUNDING, "choose another seed: rounding would decide"


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize(
    ("model", "window", "recent", "seed"),
    [
        ("llama-tiny", 6, 5, 0),  # two query heads per KV head
        ("gemma2-tiny", 5, 9, 0),  # windows in every other layer, softcap
        ("gpt2-tiny", 12, 3, 0),
    ],
)
def test_kept_sets_equal_the_reference_at_every_layer_head_and_step(
    serve: Serve, load: Load, model: str, window: int, recent: int, seed: int, settings: dict[str, Any]
) -> None:
    method = Corm(window, recent)
    engine = serve(model, str(method), blocks=200, **settings)
    run(engine, prompts(50, 40, seed=77), greedy(9))  # pages that others have used before
    many, forced = prompts(26, 45, 70, 9, seed=seed), prompts(*[NUM_DECODED] * 4, seed=seed + 100)
    twins, seen = {}, {}
    for i, (prompt, tokens) in enumerate(zip(many, forced, strict=True)):
        name = f"r{i}"
        twins[name], seen[name] = Twin(load(model), prompt, tokens, method), []

        def note(index: int, step: int, logits: Tensor, into: list[Tensor] = seen[name]) -> None:
            into.append(logits.clone())

        engine.add_request(prompt, greedy(NUM_DECODED, forced_tokens=tokens), request_id=name, observe=note)
    checked = 0
    while engine.has_unfinished():
        engine.step()
        for name, twin in twins.items():
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                kept = engine.memory.placement.kept_positions(sequence)
                assert kept == twin.kept[sequence.num_computed], f"{name} at {sequence.num_computed} tokens"
                checked += 1
    assert checked == 4 * (NUM_DECODED - 1)
    for name, twin in twins.items():
        torch.testing.assert_close(torch.stack(seen[name]), torch.stack(twin.logits), atol=2e-4, rtol=1e-4)
    require_empty(engine)


def test_window_and_recent_of_all_there_is_keep_everything(serve: Serve) -> None:
    many = prompts(40, 70, 3)
    full = run(serve("llama-tiny", "full"), many, greedy(20))
    engine = serve("llama-tiny", "corm(window=60, recent=30)", **CHUNKED)
    outputs = run(engine, many, greedy(20))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in full]
    assert all(o.attestation.tokens_dropped == 0 for o in outputs)


def test_pages_are_really_freed(serve: Serve) -> None:
    """Heads hold unequal numbers of tokens, and the pool no more pages than those need."""
    engine = serve("llama-tiny", "corm(window=8, recent=8)", blocks=60)
    engine.add_request(prompts(320)[0], greedy(60), request_id="a")
    engine.step()
    layout, most = engine.memory.layout, 0
    while engine.has_unfinished():
        counts = [len(h) for layer in engine.memory.placement.kept_positions(sequence_of(engine, "a")) for h in layer]
        assert len(set(counts)) > 1
        # A page in hand for tokens to come, at most.
        held = engine.memory.cache.usage().num_pages_held
        assert held <= sum(layout.num_blocks_for(count + 1) + 1 for count in counts)
        most = max(most, held)
        engine.step()
    assert most < 20 * layout.pages_per_block
    finish(engine)
    require_empty(engine)


def test_a_preempted_request_is_finished(serve: Serve) -> None:
    engine = serve("llama-tiny", "corm(window=8, recent=6)", blocks=60, **CHUNKED)
    engine.add_request(prompts(61)[0], greedy(40), request_id="a")
    for _ in range(25):
        engine.step()
    sequence = sequence_of(engine, "a")
    assert sequence.phase is Phase.DECODE
    outputs = sequence.num_computed - 61
    engine._scheduler.preempt(sequence)
    while sequence.phase is not Phase.DECODE:
        engine.step()
    kept = engine.memory.placement.kept_positions(sequence)
    assert all(set(range(61, 61 + outputs)) <= set(head) for layer in kept for head in layer)
    done = finish(engine)
    assert len(done["a"].token_ids) == 40
    require_empty(engine)
