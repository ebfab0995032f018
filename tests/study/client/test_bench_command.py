"""`kvwise bench` against a server in the next thread: requests, results, files, refusals, exits."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvwise.cli.main import run
from tests.study.client.fake_server import FakeServer, Reply


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "KVWISE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def bench(server: FakeServer, *options: str) -> int:
    return run(["bench", "--base-url", server.url, *options])


def figures(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


SMALL = ("--random-input-len", "8", "--random-output-len", "3", "--num-prompts", "5")


def test_completions_send_what_vllm_sends(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--ignore-eos", "--extra-body", '{"top_k": 5, "model": "other"}', "--header", "X-A=b=c", "--json")
    assert bench(server, *SMALL, *options) == 0
    asked = server.bodies[0]
    assert isinstance(asked.pop("prompt")[0], int)
    assert asked == {
        "model": "other", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3,
        "ignore_eos": True, "top_k": 5,
    }  # fmt: skip
    assert server.headers[0]["X-A"] == "b=c"
    assert "Authorization" not in server.headers[0]
    found = figures(capsys)
    assert (found["model_id"], found["completed"], found["failed"]) == ("fake-model", 5, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (35, 15)
    assert found["total_cached_tokens"] == 10
    assert found["request_rate"] == "inf"
    assert found["output_throughput"] == pytest.approx(15 / found["duration"])
    assert found["finish_reasons"] == {"length": 5}


def test_a_chat_sends_messages_keys_and_sessions(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    options = ("--endpoint-type", "openai-chat", "--dataset-name", "multi-turn", "--num-turns", "2", "--session")
    assert bench(server, *options, "--num-prompts", "4", "--input-len", "3", "--model", "m", "--seed", "3") == 0
    longest = max(server.bodies, key=lambda asked: len(asked["messages"]))
    assert [message["role"] for message in longest["messages"]] == ["user", "assistant", "user"]
    assert longest["messages"][1]["content"] == "abc"
    assert longest["max_completion_tokens"] == 128
    assert {asked["model"] for asked in server.bodies} == {"m"}
    assert {head["X-Session-ID"] for head in server.headers} == {"kvwise-bench-0", "kvwise-bench-1"}
    assert {head["Authorization"] for head in server.headers} == {"Bearer sk-test"}


def test_errors_are_told_by_kind_and_refusals_apart(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    replies = [
        Reply(), Reply(status=429, headers={"Retry-After": "2"}), Reply(status=503), Reply(status=500),
        Reply(drop=True), Reply(raw=b"data: {}\n\n"), Reply(finish=None),
    ]  # fmt: skip
    server.reply = replies.__getitem__
    assert bench(server, *SMALL, "--num-prompts", "7", "--max-concurrency", "1", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["completed"], found["failed"], found["refused"]) == (1, 6, 2)
    assert found["errors_by_kind"] == {
        "http_429": 1, "http_503": 1, "http_500": 1, "disconnected": 1, "empty": 1, "incomplete": 1,
    }  # fmt: skip
    assert found["refused_without_retry_after"] == 1
    assert 0 < found["median_refusal_ms"] <= found["p99_refusal_ms"]
    assert "1 refusals had no Retry-After" in err


def test_a_request_that_takes_too_long_is_a_timeout(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda number: Reply(hold=True)
    assert bench(server, *SMALL, "--num-prompts", "2", "--timeout", "0.2", "--json") == 1
    assert figures(capsys)["errors_by_kind"] == {"timeout": 2}


def test_results_have_vllms_keys_and_name(server: FakeServer, tmp_path: Path) -> None:
    saved = ("--result-dir", str(tmp_path), "--goodput", "ttft:5000 tpot:500", "--goodput", "e2el:9000")
    assert bench(server, *SMALL, *saved, "--save-detailed", "--result-filename", "r.json", "--request-rate", "500") == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(VLLM_KEYS) <= set(found)
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert [len(found[key]) for key in VLLM_LISTS] == [5] * len(VLLM_LISTS)
    assert found["generated_texts"] == ["abc"] * 5
    assert found["p99_ttft_ms"] >= found["median_ttft_ms"] > 0
    assert bench(server, *SMALL, "--save-result", "--result-dir", str(tmp_path), "--max-concurrency", "2") == 0
    (path,) = (p for p in tmp_path.iterdir() if p.name != "r.json")
    assert path.name.startswith("openai-infqps-concurrency2-fake-model-")
    assert not set(VLLM_LISTS) & set(json.loads(path.read_text()))


VLLM_LISTS = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors", "start_times")
VLLM_KEYS = (
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
    *(f"{statistic}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el")
      for statistic in ("mean", "median", "std", "p99")),
    *VLLM_LISTS,
)  # fmt: skip


def test_the_warm_up_is_not_counted_and_other(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, *SMALL, "--warmup", "3", "--json") == 0
    assert figures(capsys)["completed"] == 5
    asked = [tuple(asked["prompt"]) for asked in server.bodies]
    assert len(asked) == 8
    assert not set(asked[:3]) & set(asked[3:])


def test_a_server_that_starts_is_waited_for(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.models_failures = 1
    assert bench(server, *SMALL) == 1
    assert "503" in capsys.readouterr().err
    server.models_failures = 1
    assert bench(server, *SMALL, "--ready-timeout", "30") == 0


def test_the_table_is_lines_in_a_pipe_and_progress_is_apart(
    server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(server, *SMALL) == 0
    out, err = capsys.readouterr()
    assert "Successful requests\t5" in out.splitlines()
    assert "[5/5]" in err


def test_plots_are_pictures(server: FakeServer, tmp_path: Path) -> None:
    assert bench(server, *SMALL, "--plot", str(tmp_path / "deep" / "plots")) == 0
    found = sorted((tmp_path / "deep" / "plots").iterdir())
    assert [path.name for path in found] == ["itl.png", "throughput.png", "ttft.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)


@pytest.mark.parametrize(
    "options",
    [
        ("--endpoint-type", "tgi"), ("--dataset-name", "x"), ("--dataset-name", "sharegpt"), ("--request-rate", "0"),
        ("--request-rate", "nan"), ("--request-rate", "x"), ("--extra-body", "{"), ("--extra-body", "[]"),
        ("--header", "a"), ("--header", "a=b\nc"), ("--goodput", "ttft"), ("--goodput", "speed:3"),
        ("--metric-percentiles", "a"), ("--metric-percentiles", "101"), ("--percentile-metrics", "x"),
        ("--num-prompts", "0"), ("--base-url", "nonsense"), ("--port", "0"), ("--timeout", "0"), ("--nonsense",),
        ("--dataset-name", "custom", "--dataset-path", "/nowhere/x"), ("--burstiness", "-1"), ("--tokenizer", "a b"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_line_and_exit_2(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_server_that_is_not_there_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert run(["bench", "--port", port]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert port in err


def test_a_key_that_is_refused_is_one_line_and_exit_1(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.models_status = 401
    assert bench(server, "--ready-timeout", "60") == 1
    assert "--api-key" in capsys.readouterr().err


def test_without_aiohttp_the_extra_is_named(
    server: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert bench(server) == 2
    assert "kvwise[bench]" in capsys.readouterr().err


def test_ctrl_c_tells_what_there_is(server: FakeServer) -> None:
    held = threading.Event()

    def reply(number: int) -> Reply:
        if number == 3:
            held.set()
        return Reply(hold=number >= 3)

    server.reply = reply
    # Whoever runs the tests may ignore Ctrl-C (a job in the background does), and children inherit that.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    begin = [sys.executable, "-c", f"{listen}; from kvwise.cli.main import main; main()", "bench"]
    command = [*begin, "--base-url", server.url, *SMALL, "--max-concurrency", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert held.wait(60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    found = json.loads(out)
    assert (found["completed"], found["interrupted"], found["num_planned"]) == (3, True, 5)
    assert "interrupted" in err
    assert "Traceback" not in err
