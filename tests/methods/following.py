"""Runs an engine and plain references side by side, over the same forced tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvwise.engine.engine import Engine
from kvwise.engine.sequence import Phase
from kvwise.models.loaded import LoadedModel
from tests.engine.runs import greedy, prompts, require_empty, sequence_of
from tests.methods.plain_run import PlainRun, Rule, held, require_same

CHUNKED = {"max_num_batched_tokens": 11, "max_num_seqs": 4}
UNCHUNKED = {"enable_chunked_prefill": False}

Look = Callable[[Any, Rule], None]  # at an engine's sequence, after each of its steps, and the reference there


def follow(
    engine: Engine, loaded: LoadedModel, rules: Sequence[Rule], lengths: Sequence[int], *, num_decoded: int,
    seed: int = 0, look: Look = lambda sequence, rule: None,
) -> None:  # fmt: skip
    """Fail unless a batch of requests holds what its references hold after every step, and predicts what they do."""
    many, forced = prompts(*lengths, seed=seed), prompts(*[num_decoded] * len(lengths), seed=seed + 100)
    runs = {f"r{i}": PlainRun(loaded, rule) for i, rule in enumerate(rules)}
    seen: dict[str, list[Tensor]] = {name: [] for name in runs}
    expected = {name: [run.read(prompt)] for (name, run), prompt in zip(runs.items(), many, strict=True)}
    for (name, got), prompt, tokens in zip(seen.items(), many, forced, strict=True):

        def note(index: int, step: int, logits: Tensor, got: list[Tensor] = got) -> None:
            got.append(logits.clone())

        engine.add_request(prompt, greedy(num_decoded, forced_tokens=tokens), request_id=name, observe=note)
    checked = dict.fromkeys(runs, 0)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None
        for number, (name, run) in enumerate(runs.items()):
            if name not in engine._requests or (sequence := sequence_of(engine, name)).phase is not Phase.DECODE:
                continue
            for token in forced[number][checked[name] : sequence.num_computed - len(many[number])]:
                expected[name].append(run.read([token]))
                checked[name] += 1
            require_same(held(engine, sequence), run.layers, f"{name} at {sequence.num_computed} tokens")
            look(sequence, rules[number])
    require_empty(engine)
    for number, (name, run) in enumerate(runs.items()):
        for token in forced[number][checked[name] : num_decoded - 1]:
            expected[name].append(run.read([token]))
        torch.testing.assert_close(torch.stack(seen[name]), torch.stack(expected[name]), atol=3e-4, rtol=1e-3)
    assert min(checked.values()) >= num_decoded - 2
