"""`kvwise bench`: loads an OpenAI-compatible server and tells how it answered."""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvwise.cli.show import show_json, show_rows
from kvwise.core.errors import UsageError

if TYPE_CHECKING:
    from kvwise.study.client.answer import Answer
    from kvwise.study.client.figures import Figures
    from kvwise.study.client.options import Target, Traffic, Wanted

INTERRUPTED = 130
KEY_NAMES = ("KVWISE_API_KEY", "OPENAI_API_KEY")

_SERVER, _DATA, _LOAD, _TELL = "Server", "Prompts", "Load", "Figures"
BaseUrl = Annotated[str | None, typer.Option(help="Instead of host and port.", rich_help_panel=_SERVER)]
Host = Annotated[str, typer.Option(rich_help_panel=_SERVER)]
Port = Annotated[int, typer.Option(min=1, max=65535, rich_help_panel=_SERVER)]
Kind = Annotated[
    str, typer.Option("--endpoint-type", "--backend", help="openai or openai-chat.", rich_help_panel=_SERVER)
]
Endpoint = Annotated[str | None, typer.Option(help="Path; default: the type's own.", rich_help_panel=_SERVER)]
Model = Annotated[str | None, typer.Option(help="Default: the server's first.", rich_help_panel=_SERVER)]
Key = Annotated[
    str | None,
    typer.Option(help=f"Default: {' or '.join(KEY_NAMES)} of the environment.", rich_help_panel=_SERVER),
]
Header = Annotated[list[str] | None, typer.Option(help="name=value; repeat.", rich_help_panel=_SERVER)]
Body = Annotated[str | None, typer.Option(help="JSON fields for every request.", rich_help_panel=_SERVER)]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", rich_help_panel=_SERVER)]
Timeout = Annotated[float, typer.Option(help="Seconds for one request.", rich_help_panel=_SERVER)]
Ready = Annotated[
    float,
    typer.Option("--ready-timeout", "--ready-check-timeout-sec", help="Seconds to wait for a server that starts.",
                 rich_help_panel=_SERVER),
]  # fmt: skip
DataName = Annotated[str, typer.Option(help="random, sharegpt, mooncake, multi-turn or custom.", rich_help_panel=_DATA)]
DataPath = Annotated[Path | None, typer.Option(help="JSON, JSONL or CSV, plain or .gz.", rich_help_panel=_DATA)]
InputLen = Annotated[
    int, typer.Option("--random-input-len", "--input-len", help="Tokens, of a turn.", rich_help_panel=_DATA)
]
OutputLen = Annotated[
    int | None,
    typer.Option("--random-output-len", "--output-len", help="Tokens; default: the file's, or 128.",
                 rich_help_panel=_DATA),
]  # fmt: skip
RangeRatio = Annotated[float, typer.Option("--random-range-ratio", help="Spread of lengths.", rich_help_panel=_DATA)]
PrefixLen = Annotated[
    int, typer.Option("--random-prefix-len", help="Tokens that all begin with.", rich_help_panel=_DATA)
]
NumTurns = Annotated[int, typer.Option(help="Of a conversation.", rich_help_panel=_DATA)]
Think = Annotated[float, typer.Option(help="Seconds between answer and next turn.", rich_help_panel=_DATA)]
Session = Annotated[bool, typer.Option("--session", help="Send X-Session-ID.", rich_help_panel=_DATA)]
Tokenizer = Annotated[
    str | None, typer.Option(help="Folder, hub id, or bytes; random prompts are then text.", rich_help_panel=_DATA)
]
BlockTokens = Annotated[int, typer.Option(help="A trace's tokens per hash id.", rich_help_panel=_DATA)]
LengthScale = Annotated[float, typer.Option(help="Times a trace's lengths.", rich_help_panel=_DATA)]
TimeScale = Annotated[float, typer.Option(help="Times a trace's times.", rich_help_panel=_DATA)]
Seed = Annotated[int, typer.Option(rich_help_panel=_DATA)]
NumPrompts = Annotated[int | None, typer.Option(help="Default: 1000, or rate x duration.", rich_help_panel=_LOAD)]
Rate = Annotated[
    float | None, typer.Option(help="Requests/s; default: inf, or a trace's times.", rich_help_panel=_LOAD)
]
Burstiness = Annotated[float, typer.Option(help="1: Poisson; below: bursts.", rich_help_panel=_LOAD)]
Concurrency = Annotated[int | None, typer.Option("--max-concurrency", rich_help_panel=_LOAD)]
Duration = Annotated[float | None, typer.Option(help="Seconds; then nothing more is sent.", rich_help_panel=_LOAD)]
Warmup = Annotated[
    int, typer.Option("--warmup", "--num-warmups", help="Requests before, not counted.", rich_help_panel=_LOAD)
]
Goodput = Annotated[
    list[str] | None,
    typer.Option(help="Limits in ms, 'ttft:500 tpot:50 e2el:5000'; repeat or join.", rich_help_panel=_TELL),
]
Metrics = Annotated[str, typer.Option("--percentile-metrics", help="Joined by commas.", rich_help_panel=_TELL)]
Percentiles = Annotated[str, typer.Option("--metric-percentiles", help="Joined by commas.", rich_help_panel=_TELL)]
Trust = Annotated[
    bool,
    typer.Option("--trust-prompts", help="Count input tokens as drawn, not as the server says.",
                 rich_help_panel=_TELL),
]  # fmt: skip
Save = Annotated[bool, typer.Option("--save-result", rich_help_panel=_TELL)]
Detailed = Annotated[bool, typer.Option("--save-detailed", help="With every request.", rich_help_panel=_TELL)]
ResultDir = Annotated[Path | None, typer.Option(rich_help_panel=_TELL)]
ResultName = Annotated[str | None, typer.Option("--result-filename", rich_help_panel=_TELL)]
Label = Annotated[str | None, typer.Option(help="Begins the result's file name.", rich_help_panel=_TELL)]
Plot = Annotated[Path | None, typer.Option(metavar="DIR", help="Draw PNG files there.", rich_help_panel=_TELL)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=_TELL)]


def bench(
    base_url: BaseUrl = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    endpoint_type: Kind = "openai",
    endpoint: Endpoint = None,
    model: Model = None,
    api_key: Key = None,
    header: Header = None,
    extra_body: Body = None,
    ignore_eos: IgnoreEos = False,
    timeout: Timeout = 600.0,
    ready_timeout: Ready = 0.0,
    dataset_name: DataName = "random",
    dataset_path: DataPath = None,
    random_input_len: InputLen = 1024,
    random_output_len: OutputLen = None,
    random_range_ratio: RangeRatio = 0.0,
    random_prefix_len: PrefixLen = 0,
    num_turns: NumTurns = 3,
    think_time: Think = 0.0,
    session: Session = False,
    tokenizer: Tokenizer = None,
    block_tokens: BlockTokens = 512,
    length_scale: LengthScale = 1.0,
    time_scale: TimeScale = 1.0,
    seed: Seed = 0,
    num_prompts: NumPrompts = None,
    request_rate: Rate = None,
    burstiness: Burstiness = 1.0,
    max_concurrency: Concurrency = None,
    duration: Duration = None,
    warmup: Warmup = 0,
    goodput: Goodput = None,
    percentile_metrics: Metrics = "ttft,tpot,itl,e2el",
    metric_percentiles: Percentiles = "99",
    trust_prompts: Trust = False,
    save_result: Save = False,
    save_detailed: Detailed = False,
    result_dir: ResultDir = None,
    result_filename: ResultName = None,
    label: Label = None,
    plot: Plot = None,
    as_json: Json = False,
) -> int:
    """Load an OpenAI-compatible server and tell its throughput and latency. Options and keys as of vllm bench serve."""
    from kvwise.study.client.options import Dataset, EndpointType, Target, Traffic, Wanted

    target = Target(
        base_url=base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}",
        endpoint_type=EndpointType(_one_of("endpoint type", endpoint_type, [kind.value for kind in EndpointType])),
        endpoint=endpoint, model=model, api_key=api_key or next(filter(None, map(os.environ.get, KEY_NAMES)), None),
        headers=dict(map(_header, header or ())), extra_body=_fields(extra_body), ignore_eos=ignore_eos,
        session=session, timeout_s=timeout, ready_timeout_s=ready_timeout,
    )  # fmt: skip
    traffic = Traffic(
        dataset=Dataset(_one_of("data set", dataset_name, [kind.value for kind in Dataset])), path=dataset_path,
        input_len=random_input_len, output_len=random_output_len, range_ratio=random_range_ratio,
        prefix_len=random_prefix_len, num_prompts=num_prompts, rate=request_rate, burstiness=burstiness,
        max_concurrency=max_concurrency, seed=seed, num_warmups=warmup, time_scale=time_scale,
        length_scale=length_scale, block_tokens=block_tokens, num_turns=num_turns, think_s=think_time,
        tokenizer=tokenizer, duration_s=duration,
    )  # fmt: skip
    wanted = Wanted(
        _levels(goodput or ()), tuple(percentile_metrics.split(",")), _percentiles(metric_percentiles), trust_prompts
    )
    found, answers = _run(target, traffic, wanted)
    found = {"label": label or endpoint_type} | found
    _tell(found, as_json=as_json)
    if save_result or save_detailed:
        _save(found, (result_dir or Path()) / (result_filename or _file_name(found)), detailed=save_detailed)
    if plot is not None:
        from kvwise.study.client.plots import draw_run

        for path in draw_run(answers, plot):
            _say(f"drawn: {path}")
    return INTERRUPTED if found["interrupted"] else 0 if found["completed"] else 1


def _run(target: "Target", traffic: "Traffic", wanted: "Wanted") -> tuple["Figures", "list[Answer]"]:
    from kvwise.study.client.progress import make_watcher
    from kvwise.study.client.run import run

    watcher = make_watcher(sys.stderr)
    try:
        found, outcome = run(target, traffic, wanted, watcher)
    finally:
        watcher.close()
    return found, outcome.answers


def _tell(found: "Figures", *, as_json: bool) -> None:
    from kvwise.study.client.words import rows, warnings, without_details

    if as_json:
        show_json(without_details(found))
    else:
        show_rows(("figure", "value"), rows(found))
    for text in warnings(found):
        _say(text)


def _save(found: "Figures", path: Path, *, detailed: bool) -> None:
    from kvwise.study.client.words import without_details

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found if detailed else without_details(found)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"result {path} cannot be written: {error.strerror or error}") from error
    _say(f"result: {path}")


def _file_name(found: "Figures") -> str:
    """As vLLM's: label, rate, concurrency, model, time."""
    limit = found["max_concurrency"]
    parallel = "" if limit is None else f"-concurrency{limit}"
    model = str(found["model_id"]).rsplit("/", 1)[-1]
    return f"{found['label']}-{found['request_rate']}qps{parallel}-{model}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def _one_of(what: str, value: str, known: list[str]) -> str:
    if value not in known:
        raise UsageError(f"{what} {value!r} is unknown: choose from {', '.join(known)}")
    return value


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or any(not sign.isprintable() for sign in text):
        raise UsageError(f"header {text!r} must be name=value, in printable characters")
    return name, value


def _fields(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra-body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UsageError(f"--extra-body must be a JSON object, not {type(fields).__name__}")
    return fields


def _levels(texts: Sequence[str]) -> dict[str, float]:
    out = {}
    for text in " ".join(texts).replace(",", " ").split():
        name, _, value = text.partition(":")
        out[name] = _float(value, f"goodput {text!r} must be like ttft:500, in milliseconds")
    return out


def _percentiles(text: str) -> tuple[float, ...]:
    problem = f"metric percentiles {text!r} must be numbers joined by commas"
    return tuple(_float(part, problem) for part in text.split(","))


def _float(text: str, problem: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise UsageError(problem)
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr)
