"""Request traces: Mooncake JSONL (prefixes as hash ids) and CSV (lengths only) -> requests, checked line by line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kvwise.core.errors import PlanError
from kvwise.study.lengths import MAX_TOKENS, open_text, read_columns

MAX_LINE = 16 << 20
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. Equal hash ids stand for equal blocks of tokens behind equal prefixes."""

    arrival_s: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path, *, block_size: int = 512, limit: int | None = None) -> list[TraceRequest]:
    """Read the first `limit` requests in the order of their times (ties in file order).

    PlanError, naming file and line: a missing field, a length below 1, a negative time, a number of
    hash ids that does not fit the length, a hash id that stands behind two different prefixes.
    """
    name = path.name.removesuffix(".gz")
    requests = _from_csv(path, limit) if name.endswith(".csv") else list(_from_jsonl(path, block_size, limit))
    if not requests:
        raise PlanError(f"{path} has no requests")
    return sorted(requests, key=lambda r: r.arrival_s)


def trace_prompt(
    request: TraceRequest, *, block_size: int, length_scale: float, vocab_size: int, seed: int
) -> np.ndarray:
    """The prompt's token ids, int64: every hash id gives the same tokens wherever it stands.

    Lengths are scaled block by block (at least one token each), so that prefixes shared before are shared after.
    """
    if not request.hash_ids:
        length = max(1, round(request.input_length * length_scale))
        key = (seed, 1, request.input_length, round(request.arrival_s * 1e6))
        return np.random.default_rng(key).integers(0, vocab_size, size=length)
    sizes = np.full(len(request.hash_ids), block_size)
    sizes[-1] = request.input_length - block_size * (len(sizes) - 1)
    parts = [
        np.random.default_rng((seed, 0, hash_id)).integers(0, vocab_size, size=max(1, round(size * length_scale)))
        for hash_id, size in zip(request.hash_ids, sizes, strict=True)
    ]
    return np.concatenate(parts)


def _from_csv(path: Path, limit: int | None) -> list[TraceRequest]:
    columns = read_columns(path, ("arrival_s", "input_tokens", "output_tokens"))
    rows = zip(*columns.values(), strict=True)
    out: list[TraceRequest] = []
    for line, (arrival, tokens_in, tokens_out) in enumerate(rows, start=2):
        if limit is not None and len(out) == limit:
            break
        _check_length(tokens_in, "input_tokens", f"{path} line {line}")
        _check_length(tokens_out, "output_tokens", f"{path} line {line}")
        out.append(TraceRequest(float(arrival), int(tokens_in), int(tokens_out), ()))
    return out


def _from_jsonl(path: Path, block_size: int, limit: int | None) -> Iterator[TraceRequest]:
    seen: dict[int, tuple[int | None, int]] = {}
    with open_text(path) as file:
        for number, text in enumerate(_lines(file, path), start=1):
            if limit is not None and number > limit:
                return
            where = f"{path} line {number}"
            request = _read_request(text, where)
            _check_hashes(request, seen, block_size, where)
            yield request


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """Lines with text; a line longer than MAX_LINE is refused before it is in memory."""
    try:
        while line := file.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise PlanError(f"{path} has a line longer than {MAX_LINE} characters; is it a JSONL trace?")
            if line.strip():
                yield line
    except (UnicodeDecodeError, EOFError, OSError) as error:
        raise PlanError(f"{path} is no readable text: {error}") from error


def _read_request(text: str, where: str) -> TraceRequest:
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise PlanError(f"{where} is no JSON object but {type(row).__name__}")
    for name in _FIELDS:
        if name not in row:
            raise PlanError(f"{where}: field {name!r} is missing (needed: {', '.join(_FIELDS)})")
    time, hash_ids = row["timestamp"], row["hash_ids"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < 1e15:
        raise PlanError(f"{where}: timestamp={time!r} must be milliseconds, 0 or more")
    if not isinstance(hash_ids, list) or not all(type(h) is int and h >= 0 for h in hash_ids):
        raise PlanError(f"{where}: hash_ids must be a list of whole numbers, 0 or more")
    lengths = [_check_length(row[name], name, where) for name in ("input_length", "output_length")]
    return TraceRequest(time / 1000, lengths[0], lengths[1], tuple(hash_ids))


def _check_length(value: Any, name: str, where: str) -> int:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1 <= value <= MAX_TOKENS or value != int(value):
        raise PlanError(f"{where}: {name}={value!r} must be a whole number from 1 to {MAX_TOKENS}")
    return int(value)


def _check_hashes(request: TraceRequest, seen: dict[int, tuple[int | None, int]], block_size: int, where: str) -> None:
    """Each block's id stands behind one prefix and for one number of tokens (`seen`: id -> parent, tokens)."""
    wanted = -(-request.input_length // block_size)
    if len(request.hash_ids) != wanted:
        raise PlanError(
            f"{where}: {len(request.hash_ids)} hash ids for {request.input_length} tokens, but blocks of "
            f"{block_size} tokens give {wanted}; give the trace's own block size"
        )
    parent = None
    for index, hash_id in enumerate(request.hash_ids):
        block = (parent, min(block_size, request.input_length - index * block_size))
        before = seen.setdefault(hash_id, block)
        if before != block:
            raise PlanError(
                f"{where}: hash id {hash_id} is {block[1]} tokens behind id {block[0]} here, and {before[1]} tokens "
                f"behind id {before[0]} before; a hash id names one whole prefix"
            )
        parent = hash_id
