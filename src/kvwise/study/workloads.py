"""What the requests of a cell ask: chat with turns, documents with questions, random prompts, traces -> jobs."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvwise.core.errors import PlanError
from kvwise.study.arrivals import arrival_times, spread_ties
from kvwise.study.cells import Cell
from kvwise.study.lengths import draw, read_columns
from kvwise.study.plan import Chat, Document, Load, Pairs, Random, TraceFile
from kvwise.study.traces import TraceRequest, read_trace, trace_prompt


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One request to come.

    `prompt` int64 [T] is whole, with drawn answers as history. `after` is the index of the turn before, which must
    have ended (plus `think_s`) first. `forced` are the tokens the engine is made to answer with. When the history
    is to hold the engine's own answer, `tail` is how many tokens of the prompt are this turn's own.
    """

    index: int
    not_before: float
    prompt: np.ndarray
    output_tokens: int
    session: int
    turn: int = 0
    after: int | None = None
    think_s: float = 0.0
    forced: np.ndarray | None = None
    tail: int | None = None


def cell_jobs(cell: Cell, *, seed: int, vocab_size: int) -> list[Job]:
    """The jobs of a live cell, by time. The strategy plays no part in the draw: all strategies get equal traffic."""
    if cell.workload is None or cell.load is None:
        raise PlanError(f"cell {cell.id} ({cell.kind}) has no traffic")
    rng = np.random.default_rng(traffic_seed(cell, seed))
    if isinstance(cell.workload, TraceFile):
        return _trace_jobs(cell, cell.workload, seed, vocab_size)
    count = num_requests(cell.rate, cell.load)
    times = arrival_times(count, math.inf if cell.rate is None else cell.rate, cell.load.burstiness, rng)
    if isinstance(cell.workload, Chat):
        return _chat_jobs(cell.workload, cell.context, times, rng, vocab_size)
    prompts = _plain_prompts(cell.workload, cell.context, count, rng, vocab_size)
    return [Job(i, float(times[i]), prompt, tokens, session) for i, (session, prompt, tokens) in enumerate(prompts)]


def num_requests(rate: float | None, load: Load) -> int:
    """How many requests a cell sends."""
    if rate is None or math.isinf(rate):
        return load.max_requests
    return min(max(round(rate * load.duration_s), load.fewest), load.max_requests)


def traffic_seed(cell: Cell, seed: int) -> int:
    """A seed of everything about the cell but its strategy, budget and memory."""
    facts = (seed, cell.block, cell.model, cell.rate, cell.concurrency, cell.context, cell.repeat)
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "little")


def sample_prompts(context: int, count: int, *, seed: int, vocab_size: int) -> list[np.ndarray]:
    """`count` unrelated prompts of `context` random tokens."""
    rng = np.random.default_rng((seed, context, count))
    return [rng.integers(0, vocab_size, size=context) for _ in range(count)]


def _chat_jobs(chat: Chat, context: int, times: np.ndarray, rng: np.random.Generator, vocab: int) -> list[Job]:
    count = len(times)
    systems = [rng.integers(0, vocab, size=context) for _ in range(chat.system_prompts)]
    asked = draw(chat.turn_tokens, count, rng)
    answered = draw(chat.answer_tokens, count, rng)
    history: dict[int, np.ndarray] = {}
    last: dict[int, int] = {}
    jobs = []
    for index, (session, turn) in enumerate(_interleave(count, chat, rng)):
        before = history.get(session, systems[session % len(systems)])
        prompt = np.concatenate([before, rng.integers(0, vocab, size=asked[index])])
        answer = rng.integers(0, vocab, size=answered[index])
        job = Job(
            index=index,
            not_before=float(times[index]),
            prompt=prompt,
            output_tokens=len(answer),
            session=session,
            turn=turn,
            after=last.get(session),
            think_s=chat.think_s,
            forced=answer if chat.answers == "forced" else None,
            tail=int(asked[index]) if chat.answers == "real" else None,
        )
        jobs.append(job)
        history[session] = np.concatenate([prompt, answer])
        last[session] = index
    return jobs


def _interleave(count: int, chat: Chat, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(session, turn) of each request: a few sessions are open at a time, and any of them may be next."""
    num_sessions = math.ceil(count / chat.turns)
    waiting = iter(range(num_sessions))
    open_now = [(s, 0) for s in (next(waiting, None) for _ in range(chat.open_sessions)) if s is not None]
    for _ in range(count):
        place = int(rng.integers(len(open_now)))
        session, turn = open_now[place]
        yield session, turn
        if turn + 1 < chat.turns:
            open_now[place] = (session, turn + 1)
            continue
        fresh = next(waiting, None)
        open_now[place : place + 1] = [] if fresh is None else [(fresh, 0)]


def _plain_prompts(
    workload: Document | Random | Pairs, context: int, count: int, rng: np.random.Generator, vocab: int
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(session, prompt, output tokens) of unrelated prompts, and of questions to shared documents."""
    if isinstance(workload, Document):
        asked = draw(workload.question_tokens, count, rng)
        outputs = draw(workload.answer_tokens, count, rng)
        documents = [rng.integers(0, vocab, size=context) for _ in range(math.ceil(count / workload.questions))]
        order = rng.permutation(np.arange(count) // workload.questions)
        for document, question, output in zip(order, asked, outputs, strict=True):
            prompt = np.concatenate([documents[document], rng.integers(0, vocab, size=question)])
            yield int(document), prompt, int(output)
        return
    inputs, outputs = _plain_lengths(workload, context, count, rng)
    for index, (tokens, output) in enumerate(zip(inputs, outputs, strict=True)):
        yield index, rng.integers(0, vocab, size=int(tokens)), int(output)


def _plain_lengths(
    workload: Random | Pairs, context: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(workload, Random):
        inputs = np.full(count, context) if workload.input_tokens is None else draw(workload.input_tokens, count, rng)
        return np.minimum(inputs, context), draw(workload.answer_tokens, count, rng)
    columns = read_columns(Path(workload.file), (workload.input_column, workload.output_column))
    rows = rng.integers(0, len(columns[workload.input_column]), size=count)
    scaled = [np.maximum(1, np.rint(values[rows] * workload.length_scale)) for values in columns.values()]
    return (
        np.minimum(scaled[0], context).astype(np.int64),
        np.minimum(scaled[1], workload.max_output_tokens).astype(np.int64),
    )


def _trace_jobs(cell: Cell, trace: TraceFile, seed: int, vocab: int) -> list[Job]:
    if cell.load is None:
        raise PlanError(f"cell {cell.id} has no load")
    requests = read_trace(Path(trace.file), block_size=trace.block_size, limit=cell.load.max_requests)
    times = _trace_times(requests, trace, cell.rate)
    return [
        Job(
            index=index,
            not_before=float(times[index]),
            prompt=trace_prompt(
                request,
                block_size=trace.block_size,
                length_scale=trace.length_scale,
                vocab_size=vocab,
                seed=seed,
            ),
            output_tokens=min(max(1, round(request.output_length * trace.length_scale)), trace.max_output_tokens),
            session=index,
        )
        for index, request in enumerate(requests)
    ]


def _trace_times(requests: list[TraceRequest], trace: TraceFile, rate: float | None) -> np.ndarray:
    """Arrival times from the first request on: the trace's own, or scaled to a mean rate with its bursts kept."""
    times = np.array([r.arrival_s for r in requests])
    times = spread_ties(times, trace.spread_ties_s) - times[0]
    if rate is None:
        return np.asarray(times * trace.time_scale)
    if math.isinf(rate) or times[-1] == 0:
        return np.zeros(len(times))
    return np.asarray(times * (len(times) / rate / times[-1]))
