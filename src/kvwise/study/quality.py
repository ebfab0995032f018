"""Agreement with the full cache: the same prompts, the full cache's greedy answers forced, logits compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvwise.core.errors import RequestError
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.study.face import EngineFace


@dataclass(frozen=True, slots=True)
class Reference:
    """What the full cache said: per prompt the greedy tokens and the logits [steps, V] float32 behind them."""

    prompts: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]
    logits: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Per prompt, arrays over output tokens: whether the most likely token is the same, and KL(full || method).

    `kl` is in nats. `outputs` are the method's, for their attestation.
    """

    same: tuple[np.ndarray, ...]
    kl: tuple[np.ndarray, ...]
    outputs: tuple[RequestOutput, ...]


def reference(engine: EngineFace, prompts: Sequence[np.ndarray], num_tokens: int) -> Reference:
    """Let the full cache answer greedily with `num_tokens` tokens a prompt."""
    outputs, logits = _run(engine, prompts, [None] * len(prompts), num_tokens)
    return Reference(tuple(prompts), tuple(np.asarray(o.token_ids) for o in outputs), tuple(logits))


def agreement(engine: EngineFace, full: Reference) -> Agreement:
    """Force the reference's answers on `engine` and compare the logits behind every token of them."""
    num_tokens = len(full.tokens[0])
    outputs, logits = _run(engine, full.prompts, full.tokens, num_tokens)
    same, kl = [], []
    for theirs, ours in zip(full.logits, logits, strict=True):
        same.append(theirs.argmax(axis=1) == ours.argmax(axis=1))
        kl.append(divergence(theirs, ours))
    return Agreement(tuple(same), tuple(kl), tuple(outputs))


def divergence(full: np.ndarray, method: np.ndarray) -> np.ndarray:
    """KL(softmax(full) || softmax(method)) in nats per row of logits [steps, V], float64 [steps]."""
    p, q = _log_softmax(full), _log_softmax(method)
    # Rounding can make the sum of a vanishing divergence a hair negative.
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _run(
    engine: EngineFace, prompts: Sequence[np.ndarray], forced: Sequence[np.ndarray | None], num_tokens: int
) -> tuple[list[RequestOutput], list[np.ndarray]]:
    """Run all prompts together -> outputs and logits [num_tokens, V] in the order of the prompts."""
    seen: list[dict[int, np.ndarray]] = [{} for _ in prompts]
    names: dict[str, int] = {}
    last: dict[int, RequestOutput] = {}
    for index, (prompt, answer) in enumerate(zip(prompts, forced, strict=True)):
        params = SamplingParams(
            max_tokens=num_tokens, ignore_eos=True, forced_tokens=None if answer is None else answer.tolist()
        )
        name = engine.add_request(
            prompt.tolist(), params, request_id=f"quality-{index}", observe=_recorder(seen[index])
        )
        names[name] = index
        # The first runs alone, so that what the others share with it is there to be shared.
        if index in (0, len(prompts) - 1):
            while engine.has_unfinished():
                last |= {names[o.request_id]: o for o in engine.step() if o.request_id in names}
    for output in last.values():
        if output.error is not None:
            raise RequestError(output.error)
    logits = [np.stack([rows[step] for step in range(num_tokens)]) for rows in seen]
    return [last[i] for i in range(len(prompts))], logits


def _recorder(rows: dict[int, np.ndarray]) -> Callable[[int, Any], None]:
    def observe(step: int, logits: Any) -> None:
        # A copy: the engine may reuse the row. After a preemption a step can come twice, and is then the same.
        on_host = logits.cpu() if hasattr(logits, "cpu") else logits
        rows[step] = np.asarray(on_host, dtype=np.float32).copy()

    return observe
