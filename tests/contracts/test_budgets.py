"""What every method with a budget must honour on a running engine: run over all that the catalogue finds."""

from collections.abc import Callable
from typing import Any

import pytest

from kvwise.core.method import Method
from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.methods.catalogue import catalogue
from kvwise.methods.retention.base import Retention
from kvwise.methods.selection.base import Selection
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of

Serve = Callable[..., Any]

WITH_BUDGET = [kind for kind in catalogue() if "budget" in kind.__dataclass_fields__]
# Options under which a budget of 1 leaves nothing out.
EXACT: dict[str, dict[str, Any]] = {"infinigen": {"alpha": 1e9, "ratio": 1.0}}
# Options without which a method does not serve a random model.
NEEDED: dict[str, dict[str, Any]] = {"less": {"weights": "untrained"}}
# Methods whose layers and heads share what all of them may keep together.
SHARES = ("kvmerger", "vlcache")
# Arms of one method that decide differently.
MORE: dict[str, list[dict[str, Any]]] = {
    "h2o": [{"normalised": True}],
    "infinigen": [{"keep": 2}],
    "topk": [{"keep": 1}],
    "clusterkv": [{"update": 7, "new_clusters": 3, "nlist": 5, "keep": 0}],
    "quest": [{"page": 4, "keep": 3}],
}
ARMS = [kind.build({"budget": 0.3, **NEEDED.get(kind.name, {})}) for kind in WITH_BUDGET] + [
    kind.build({"budget": 0.3, **options}) for kind in WITH_BUDGET for options in MORE.get(kind.name, ())
]
RAGGED = (1, 3, 15, 17, 33, 48, 70, 26)
CHUNKED = {"max_num_batched_tokens": 9, "max_num_seqs": 8}
UNCHUNKED = {"enable_chunked_prefill": False}
ANY_ARM = pytest.mark.parametrize("method", ARMS, ids=str)


def tokens(outputs: list[Any]) -> list[list[int]]:
    assert all(o.error is None for o in outputs)
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize("kind", WITH_BUDGET, ids=lambda k: k.name)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("model", ["llama-tiny", "gpt2-tiny"])
def test_budget_one_is_full_to_the_token(
    serve: Serve, kind: type[Method], model: str, settings: dict[str, Any]
) -> None:
    method = kind.build({"budget": 1, **EXACT.get(kind.name, {})})
    many = prompts(*RAGGED)
    engine = serve(model, str(method), **settings)
    assert tokens(run(engine, many, greedy(12))) == tokens(run(serve(model, "full"), many, greedy(12)))
    require_empty(engine)


@ANY_ARM
def test_one_at_a_time_in_a_batch_and_in_chunks(serve: Serve, method: Method) -> None:
    """Forced tokens lead all runs through the same states; what is predicted there must agree."""
    many, forced = prompts(*RAGGED), prompts(*[12] * len(RAGGED), seed=9)
    answers = []
    for settings in ({**UNCHUNKED, "max_num_seqs": 1}, {**UNCHUNKED, "max_num_seqs": 8}, CHUNKED):
        engine = serve("llama-tiny", str(method), **settings)
        seen: dict[tuple[int, int], int] = {}
        for number, (prompt, then) in enumerate(zip(many, forced, strict=True)):

            def note(index: int, step: int, logits: Any, number: int = number, seen: Any = seen) -> None:
                seen[number, step] = int(logits.argmax())

            engine.add_request(prompt, greedy(12, forced_tokens=then), observe=note)
        assert all(output.error is None for output in finish(engine).values())
        require_empty(engine)
        answers.append(seen)
    assert len(answers[0]) == 12 * len(RAGGED)
    assert answers[0] == answers[1] == answers[2]


@ANY_ARM
def test_the_budget_is_held_at_every_step(serve: Serve, method: Method) -> None:
    engine = serve("llama-tiny", str(method), blocks=100, **CHUNKED)
    names = [engine.add_request(p, greedy(30)) for p in prompts(64, 100, 31)]
    checked = 0
    while engine.has_unfinished():
        engine.step()
        for name in names:
            if name in engine._requests and (sequence := sequence_of(engine, name)).phase is Phase.DECODE:
                require_budget(engine, method, sequence)
                checked += 1
    assert checked == 3 * 29
    require_empty(engine)


def require_budget(engine: Engine, method: Method, sequence: Any) -> None:
    """Tokens kept by every head, or of those that were read, within the share of the prompt."""
    if isinstance(method, Selection):
        told, layout = sequence.attestation, engine.memory.layout
        readers = (layout.num_layers - method.full_layers(layout.num_layers)) * layout.num_kv_heads
        steps = sequence.num_computed - sequence.num_prompt
        since = readers * sum(range(steps)) if method.grows else 0  # read whatever the budget is of the others
        assert told.fetch_candidates == readers * sum(sequence.num_prompt + step for step in range(steps))
        assert told.tokens_fetched <= 0.3 * (told.fetch_candidates - since) + since
        return
    assert isinstance(method, Retention)
    allowed = int(sequence.num_prompt * 0.3) + (sequence.num_computed - sequence.num_prompt if method.grows else 0)
    kept = engine.memory.placement.kept_positions(sequence)
    counts = [len(head) for layer in kept for head in layer]
    if method.name in SHARES:
        assert (allowed - 1) * len(counts) < sum(counts) <= allowed * len(counts)
    else:
        assert set(counts) == {allowed}
    newest = sequence.num_computed - 1
    assert all(newest in head for layer in kept for head in layer)


@ANY_ARM
def test_pages_are_really_freed(serve: Serve, method: Method) -> None:
    """After prefill the device holds no more than the budget's pages, and what is left admits others."""
    engine = serve("llama-tiny", str(method), blocks=60)
    (prompt,) = prompts(320)
    engine.add_request(prompt, greedy(4), request_id="a")
    engine.step()
    usage, layout = engine.memory.cache.usage(), engine.memory.layout
    full_layers = method.num_full_layers if isinstance(method, Selection) else layout.num_layers
    num_tokens = 320 if isinstance(method, Selection) else int(320 * 0.3)
    most = layout.num_blocks_for(num_tokens + 1) * full_layers * layout.num_kv_heads
    if method.name in SHARES:
        assert most - layout.pages_per_block <= usage.num_pages_held <= most + layout.pages_per_block
        most = usage.num_pages_held
    assert usage.num_pages_held == most
    assert sequence_of(engine, "a").attestation.bytes_freed == (20 * layout.pages_per_block - most) * layout.page_bytes
    finish(engine)
    require_empty(engine)


@ANY_ARM
def test_a_preempted_request_is_finished(serve: Serve, method: Method) -> None:
    """Whatever it had held, it is computed again, keeps what it may and leaves nothing behind."""
    engine = serve("llama-tiny", str(method), blocks=60, **CHUNKED)
    names = [engine.add_request(p, greedy(20)) for p in prompts(40, 61)]
    done = {}
    for step in range(400):
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        running = [sequence_of(engine, n) for n in names if n in engine._requests]
        if step % 7 == 6 and running and running[0].phase is Phase.DECODE:
            engine._scheduler.preempt(running[0])
        if not engine.has_unfinished():
            break
    assert engine.stats().num_preemptions >= 2
    assert [len(done[name].token_ids) for name in names] == [20, 20]
    assert all(output.error is None for output in done.values())
    require_empty(engine)
