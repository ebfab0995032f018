"""The rows a study leaves: what each column is, and how a finished cell becomes rows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from kvwise.core.output import RequestOutput
from kvwise.study.cells import Cell
from kvwise.study.face import ModelFacts, OnOffRun
from kvwise.study.live import Drive, Sample
from kvwise.study.quality import Examined, Marked
from kvwise.study.tier_rows import LOAD_REPORT, TIERS, load_columns, load_report, tier_columns
from kvwise.study.workloads import Job

Row = dict[str, Any]

_TEXT, _REAL, _WHOLE, _FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()
_COUNTS = pa.map_(_TEXT, _WHOLE)

# Who measured what, and where: in every row of every table, so that a row can be told apart after any join.
PROVENANCE = {
    "kvwise_version": _TEXT,
    "commit": _TEXT,
    "torch_version": _TEXT,
    "transformers_version": _TEXT,
    "machine": _TEXT,
    "threads": _WHOLE,
    "seed": _WHOLE,
    "plan_hash": _TEXT,
    "recorded_at": _TEXT,
}
IDENTITY = {
    "cell": _TEXT,
    "kind": _TEXT,
    "block": _TEXT,
    "model": _TEXT,
    "strategy": _TEXT,
    "framework": _TEXT,
    "budget": _REAL,
    "request_rate": _REAL,  # requests per second; inf: all at once; null: the trace's own times
    "concurrency": _WHOLE,  # null: no limit
    "context": _WHOLE,
    "memory": _TEXT,
    "repeat": _WHOLE,
    "workload": _TEXT,
    "tiers": _TEXT,  # this and all below: null in rows that are older than they are, and where there is none
    "throttles": _TEXT,  # links that this condition throttles, on top of the plan's
    "ttl_s": _REAL,
    "idle_ttl_s": _REAL,
    "compute_share": _REAL,  # of a step's tokens; of loading cells
}
_ATTESTED = ("tokens_seen", "tokens_computed", "tokens_reused", "tokens_dropped", "tokens_merged", "tokens_fetched",
             "fetch_candidates", "bytes_freed", "bytes_fetched", "tokens_loaded")  # fmt: skip
_SUMMED = tuple(name for name in _ATTESTED if name != "tokens_reused")  # over the requests of a quality cell
TABLES: Mapping[str, Mapping[str, pa.DataType]] = {
    "cells": {
        "status": _TEXT,  # done | failed
        "reason": _TEXT,
        "wall_s": _REAL,
        "duration_s": _REAL,
        "num_requests": _WHOLE,
        "num_finished": _WHOLE,
        "num_errors": _WHOLE,
        "cut": _FLAG,  # the time limit ended the cell
        "output_tokens": _WHOLE,  # all that were produced, also by requests that were cut
        "prompt_tokens": _WHOLE,  # of requests that finished
        "num_preemptions": _WHOLE,
        "prefix_queries": _WHOLE,
        "prefix_hits": _WHOLE,
        "pool_bytes": _WHOLE,
        "blocks_total": _WHOLE,
        "peak_kv_bytes": _COUNTS,  # per tier
        "mean_kv_bytes": pa.map_(_TEXT, _REAL),
        "kv_bytes_per_token": pa.map_(_TEXT, _REAL),  # per tier; of quality cells
        "peak_resident_bytes": _WHOLE,
        "links": pa.map_(_TEXT, _TEXT),
        "did": _COUNTS,
        "tokens_reused": _WHOLE,
        "num_parameters": _WHOLE,
        "kv_token_bytes": _WHOLE,
        "num_heads": _WHOLE,  # layers that store KV times KV heads; this and all below: of quality cells
        **dict.fromkeys(_SUMMED, _WHOLE),
        "bits_per_element": _REAL,  # mean over requests
        **TIERS,
    },
    "requests": {
        "request": _WHOLE,
        "session": _WHOLE,
        "turn": _WHOLE,
        "arrival_s": _REAL,  # from the cell's start; null: never sent
        "queue_s": _REAL,
        "ttft_s": _REAL,
        "tpot_s": _REAL,
        "e2e_s": _REAL,
        "itl_s": pa.list_(_REAL),
        "prompt_tokens": _WHOLE,
        "cached_tokens": _WHOLE,
        "output_tokens": _WHOLE,
        "num_preemptions": _WHOLE,
        "finish_reason": _TEXT,
        "error": _TEXT,
        **dict.fromkeys(_ATTESTED, _WHOLE),
        "bits_per_element": _REAL,
        "did": _COUNTS,
        "miss": _TEXT,  # why the first block that was computed was not found
        **LOAD_REPORT,
    },
    "loads": {
        "method": _TEXT,
        "bandwidth": _TEXT,  # as the plan writes it
        "bytes_per_s": _REAL,
        "break_even_bytes_per_s": _REAL,  # at which loading the longest prefix takes as long as computing it
        "run": _WHOLE,
        "num_others": _WHOLE,  # short requests that came with it
        "ttft_s": _REAL,
        "others_ttft_s": _REAL,  # mean
        "all_first_s": _REAL,  # until every request had its first token
        "chunk_s": _REAL,  # what a step (median) or a chunk on the link takes, the longer of them
        "tokens_loaded": _WHOLE,
        "tokens_computed": _WHOLE,
        "identical": _FLAG,  # the same first tokens as when all is computed
        **LOAD_REPORT,
    },
    "samples": {
        "time_s": _REAL,
        "num_running": _WHOLE,
        "num_waiting": _WHOLE,
        "blocks_total": _WHOLE,
        "blocks_free": _WHOLE,
        "blocks_cached": _WHOLE,
        "kv_bytes": _COUNTS,
        "resident_bytes": _WHOLE,
    },
    "answers": {
        "task": _TEXT,
        "protocol": _TEXT,
        "episode": _WHOLE,
        "question": _WHOLE,
        "num_tokens": _WHOLE,
        "right": _FLAG,  # null: there is no right answer, or it was scored
        "score": _REAL,  # of records, 0 to 1
        "nll_nats": _REAL,  # mean per answer token
        "same_top1": _REAL,  # share of answer tokens
        "kl_nats": _REAL,  # mean per answer token
        "depth": _REAL,  # where in the context the evidence lies, 0 to 1
    },
    "onoff": {
        "side": _TEXT,
        "num_output_tokens": _WHOLE,
        "run": _WHOLE,
        "first_s": _REAL,
        "total_s": _REAL,
        "identical": _FLAG,
    },
}


class Status(StrEnum):
    """How a cell ended."""

    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CellResult:
    """A cell that has ended, as rows per table."""

    cell: Cell
    status: Status
    reason: str | None
    tables: dict[str, list[Row]] = field(default_factory=dict)


def identity(cell: Cell) -> Row:
    """The columns that say which cell a row is of."""
    return {
        "cell": cell.id,
        "kind": cell.kind.value,
        "block": cell.block,
        "model": cell.model,
        "strategy": cell.strategy,
        "framework": cell.framework,
        "budget": cell.budget,
        "request_rate": cell.rate,
        "concurrency": cell.concurrency,
        "context": cell.context,
        "memory": cell.memory,
        "repeat": cell.repeat,
        "workload": None if cell.workload is None else json.dumps(cell.workload.model_dump(mode="json")),
        "tiers": cell.placement.tiers_text or None,
        "throttles": cell.placement.links_text or None,
        "ttl_s": cell.placement.ttl_s,
        "idle_ttl_s": cell.placement.idle_ttl_s,
        "compute_share": cell.share,
    }


def schema(table: str) -> pa.Schema:
    """The columns of a table with identity and provenance."""
    return pa.schema([*IDENTITY.items(), *TABLES[table].items(), *PROVENANCE.items()])


def failed(cell: Cell, reason: str, wall_s: float) -> CellResult:
    """A cell that could not be measured."""
    return CellResult(cell, Status.FAILED, reason, {"cells": [_cell_row(Status.FAILED, reason, wall_s)]})


def live_result(cell: Cell, jobs: Sequence[Job], drive: Drive, facts: ModelFacts, wall_s: float) -> CellResult:
    """The rows of a live cell."""
    requests = [_request_row(job, drive) for job in jobs]
    ended = [r for r in requests if r["finish_reason"] == "length" or r["finish_reason"] == "stop"]
    row = _cell_row(Status.DONE, None, wall_s) | _memory_columns(drive) | tier_columns(drive) | {
        "duration_s": drive.duration,
        "num_requests": len(jobs),
        "num_finished": len(ended),
        "num_errors": sum(r["finish_reason"] == "error" for r in requests),
        "cut": drive.cut,
        "output_tokens": sum(r["output_tokens"] for r in requests),
        "prompt_tokens": sum(r["prompt_tokens"] for r in ended),
        "did": _total(r["did"] for r in requests),
        "tokens_reused": sum(r.get("tokens_reused", 0) for r in requests),
        "num_parameters": facts.num_parameters,
        "kv_token_bytes": facts.kv_token_bytes,
        **load_columns(requests),
    }  # fmt: skip
    samples = [_sample_row(s) for s in drive.samples]
    return CellResult(cell, Status.DONE, None, {"cells": [row], "requests": requests, "samples": samples})


def quality_result(cell: Cell, examined: Examined, facts: ModelFacts, wall_s: float) -> CellResult:
    """The rows of a quality cell."""
    row = _cell_row(Status.DONE, None, wall_s) | {
        "num_requests": len(examined.outputs),
        "num_finished": len(examined.outputs),
        "did": _total(o.attestation.did for o in examined.outputs),
        "tokens_reused": sum(o.attestation.tokens_reused for o in examined.outputs),
        "num_parameters": facts.num_parameters,
        "kv_token_bytes": facts.kv_token_bytes,
        "kv_bytes_per_token": examined.bytes_per_token,
        "num_heads": examined.num_heads,
        **{name: sum(getattr(o.attestation, name) for o in examined.outputs) for name in _SUMMED},
        "bits_per_element": fmean(o.attestation.bits_per_element for o in examined.outputs),
    }
    return CellResult(cell, Status.DONE, None, {"cells": [row], "answers": list(map(_answer_row, examined.marks))})


def _answer_row(mark: Marked) -> Row:
    return {
        "task": mark.sitting.task,
        "protocol": mark.sitting.protocol,
        "episode": mark.sitting.episode,
        "question": mark.answer.question,
        "num_tokens": mark.num_tokens,
        "right": mark.right,
        "score": mark.score,
        "nll_nats": mark.nll,
        "same_top1": mark.same,
        "kl_nats": mark.kl,
        "depth": mark.answer.depth,
    }


def onoff_result(cell: Cell, runs: Sequence[tuple[int, OnOffRun, bool]], wall_s: float) -> CellResult:
    """The rows of the on/off comparison: (repeat, run, identical to the first side's tokens)."""
    rows = [
        {
            "side": run.side,
            "num_output_tokens": run.output_tokens,
            "run": repeat,
            "first_s": run.first_s,
            "total_s": run.total_s,
            "identical": same,
        }
        for repeat, run, same in runs
    ]
    return CellResult(cell, Status.DONE, None, {"cells": [_cell_row(Status.DONE, None, wall_s)], "onoff": rows})


def _cell_row(status: Status, reason: str | None, wall_s: float) -> Row:
    return {"status": status.value, "reason": reason, "wall_s": wall_s}


def _memory_columns(drive: Drive) -> Row:
    first, last = drive.first, drive.last
    if first is None or last is None:
        return {}
    return {
        "num_preemptions": last.num_preemptions - first.num_preemptions,
        "prefix_queries": last.prefix_queries - first.prefix_queries,
        "prefix_hits": last.prefix_hits - first.prefix_hits,
        "pool_bytes": last.pool_bytes,
        "blocks_total": last.blocks_total,
        "peak_kv_bytes": dict(drive.peak_bytes),
        "mean_kv_bytes": {tier: used / drive.duration for tier, used in drive.byte_seconds.items() if drive.duration},
        "peak_resident_bytes": max(s.resident_bytes for s in drive.samples),
        "links": dict(last.links),
    }


def loading_result(cell: Cell, rows: Sequence[Row], facts: ModelFacts, wall_s: float) -> CellResult:
    """The rows of a loading cell: one a timed run."""
    row = _cell_row(Status.DONE, None, wall_s) | {
        "num_requests": sum(1 + r["num_others"] for r in rows),
        "num_finished": sum(1 + r["num_others"] for r in rows),
        "num_parameters": facts.num_parameters,
        "kv_token_bytes": facts.kv_token_bytes,
        **load_columns(rows),
    }
    return CellResult(cell, Status.DONE, None, {"cells": [row], "loads": list(rows)})


def _request_row(job: Job, drive: Drive) -> Row:
    base: Row = {
        "request": job.index,
        "session": job.session,
        "turn": job.turn,
        "arrival_s": drive.sent.get(job.index),
        "prompt_tokens": len(job.prompt),
        "output_tokens": 0,
        "did": {},
        "finish_reason": "cut" if job.index in drive.sent else "not sent",
    }
    output = drive.outputs.get(job.index)
    return base if output is None else base | _output_columns(output)


def _output_columns(output: RequestOutput) -> Row:
    times = output.metrics
    steps = np.diff(times.token_times).tolist()
    first, count = times.first_token, len(output.token_ids)
    done = output.finish_reason is not None and output.finish_reason.value in ("length", "stop")
    attested = {name: getattr(output.attestation, name) for name in (*_ATTESTED, "bits_per_element")}
    return attested | load_report(output) | {
        "miss": times.miss,
        "queue_s": None if times.first_scheduled is None else times.first_scheduled - times.arrival,
        "ttft_s": None if first is None else first - times.arrival,
        # The rate of a cut request is as true as that of a whole one; one token has no rate.
        "tpot_s": float(np.mean(steps)) if steps else None,
        "e2e_s": times.token_times[-1] - times.arrival if done and times.token_times else None,
        "itl_s": steps,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": times.num_cached_tokens,
        "output_tokens": count,
        "num_preemptions": times.num_preemptions,
        "finish_reason": "cut" if not done and output.error is None else str(output.finish_reason),
        "error": output.error,
        "did": dict(output.attestation.did),
    }  # fmt: skip


def _sample_row(sample: Sample) -> Row:
    stats = sample.stats
    return {
        "time_s": sample.time,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "blocks_total": stats.blocks_total,
        "blocks_free": stats.blocks_free,
        "blocks_cached": stats.blocks_cached,
        "kv_bytes": dict(stats.kv_bytes),
        "resident_bytes": sample.resident_bytes,
    }


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0) + number
    return total
