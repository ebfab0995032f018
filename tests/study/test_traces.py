"""Traces: equal hash ids give equal tokens, and a bad line is refused with its number."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvwise.core.errors import PlanError
from kvwise.study.cells import CellKind, expand
from kvwise.study.traces import TraceRequest, read_trace, trace_prompt
from kvwise.study.workloads import cell_jobs
from tests.study.conftest import make_plan

ROW = {"timestamp": 0, "input_length": 40, "output_length": 3, "hash_ids": [0, 1, 2]}


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return path


def prompt(request: TraceRequest, scale: float = 1.0) -> list[int]:
    return trace_prompt(request, block_size=16, length_scale=scale, vocab_size=100, seed=3).tolist()


def test_equal_hash_ids_give_equal_tokens(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"timestamp": 2500, "input_length": 33, "hash_ids": [0, 1, 7]}]
    first, second = read_trace(write(tmp_path / "t.jsonl.gz", rows), block_size=16)
    assert (first.arrival_s, second.arrival_s) == (0, 2.5)
    a, b = prompt(first), prompt(second)
    assert (len(a), len(b)) == (40, 33)
    assert a[:32] == b[:32]
    assert a[32] != b[32]
    short = [prompt(r, scale=0.25) for r in (first, second)]
    assert [len(s) for s in short] == [10, 9]
    assert short[0][:8] == short[1][:8]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "has no requests"),
        (["{broken\n"], "line 1 is no JSON"),
        (["[1]\n"], "line 1 is no JSON object but list"),
        ([{k: v for k, v in ROW.items() if k != "hash_ids"}], "line 1: field 'hash_ids' is missing"),
        ([ROW, ROW | {"output_length": 0}], "line 2: output_length=0 must be a whole number from 1"),
        ([ROW | {"input_length": "40"}], "input_length='40'"),
        ([ROW | {"input_length": 10**12}], "input_length=1000000000000"),
        ([ROW | {"timestamp": -1}], "timestamp=-1"),
        ([ROW | {"hash_ids": [0, 1]}], "2 hash ids for 40 tokens, but blocks of 16 tokens give 3"),
        ([ROW | {"hash_ids": [0, 1, "x"]}], "hash_ids must be a list"),
        ([ROW, ROW | {"hash_ids": [1, 0, 2]}], "line 2: hash id 1 is 16 tokens behind id None here"),
        ([ROW, ROW | {"input_length": 41}], "hash id 2 is 9 tokens behind id 1 here, and 8 tokens"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_trace(write(tmp_path / "t.jsonl", rows), block_size=16)
    assert words in str(caught.value)


def test_csv_traces_carry_lengths_only(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ["arrival_s,input_tokens,output_tokens\n1.5,20,3\n0.5,10,2\n"])
    requests = read_trace(path)
    assert [(r.arrival_s, r.input_length, r.output_length) for r in requests] == [(0.5, 10, 2), (1.5, 20, 3)]
    assert prompt(requests[0]) != prompt(requests[1])[:10]


def trace_plan(path: Path, rate: str) -> str:
    return f"""
[[block]]
name = "t"
strategies = ["full+prefix"]
models = ["m"]
request_rates = [{rate}]
quality = false
[block.workload]
kind = "trace"
file = "{path}"
block_size = 16
time_scale = 0.5
length_scale = 0.5
max_output_tokens = 1
"""


@pytest.mark.parametrize(("rate", "times"), [('"trace"', [0, 1, 3]), ("2.0", [0, 0.5, 1.5]), ('"inf"', [0, 0, 0])])
def test_a_trace_is_scaled_in_time_and_length(tmp_path: Path, rate: str, times: list[float]) -> None:
    rows = [ROW | {"timestamp": 1000 + t} for t in (0, 2000, 6000)]
    path = write(tmp_path / "t.jsonl", rows)
    (cell,) = [c for c in expand(make_plan(trace_plan(path, rate))) if c.kind is CellKind.LIVE]
    jobs = cell_jobs(cell, seed=0, vocab_size=50)
    assert [j.not_before for j in jobs] == times
    assert {(len(j.prompt), j.output_tokens) for j in jobs} == {(20, 1)}


def test_a_published_trace_reads_whole() -> None:
    folder = os.environ.get("KVWISE_TRACES")
    if folder is None:
        pytest.skip("KVWISE_TRACES names no folder with Mooncake traces")
    for path in sorted(Path(folder).glob("mooncake_*.jsonl.gz")):
        requests = read_trace(path)
        assert len(requests) > 1000
        assert np.diff([r.arrival_s for r in requests]).min() >= 0
