"""`kvwise serve` as a process: start, signals, a log that cannot be written. Few, since each imports torch."""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error"}
MAIN = "from kvwise.cli.main import main; main()"
BLOCKED = f"""
import sys
from kvwise.core.errors import UsageError
from kvwise.models import load

def wait(*given, **options):
    sys.stdin.readline()
    raise UsageError("the model\\nhas gone")

load.load_model = wait
{MAIN}
"""
LONG = {"model": "tiny", "prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start("random:3m", stderr=...)`: a server on a free port; killed when the test ends."""
    with ExitStack() as stack:

        def run(*arguments: str, code: str = MAIN, **streams: Any) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", code, "serve", *arguments]
            options = ["--port", "0", "--served-model-name", "tiny", "--kv-cache-memory-bytes", "64MiB"]
            asked: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
            process = subprocess.Popen([*command, *options], env=ENVIRONMENT, text=True, **asked)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def url_of(line: str) -> str:
    found = re.search(r"http://127\.0\.0\.1:[0-9]+", line)
    assert found is not None, line
    return found[0]


def test_sigterm_lets_what_runs_end_and_a_log_that_cannot_be_written_harms_nobody(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    with Path("/dev/full").open("w") as full:
        server = start("random:3m", stderr=full)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert re.fullmatch(r"kvwise serves tiny at \S+ \(prefix; KV memory 64\.\d MiB, \d+ blocks\)\n", line), line
    server.stdout.close()
    with httpx.Client(base_url=url_of(line), timeout=60) as client:
        assert client.get("/health").json() == {"status": "ready"}
        with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 300}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            health = until(lambda: client.get("/health"), 503)
            refusal = client.post("/v1/completions", json=LONG)
            said = [one for one in lines if one]
    assert refusal.json()["error"]["code"] == "server_draining"
    assert int(refusal.headers["retry-after"]) >= 1
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.wait(30) == 0


def test_a_second_sigint_ends_it_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    server = start("random:3m", "--drain", "1h")
    assert server.stdout is not None
    client = httpx.Client(base_url=url_of(server.stdout.readline()), timeout=60)
    with client, client.stream("POST", "/v1/completions", json=LONG) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
        server.send_signal(signal.SIGINT)
        until(lambda: client.get("/health"), 503)
        assert server.poll() is None
        server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130


def test_it_listens_while_the_model_loads_and_a_model_that_cannot_be_loaded_is_one_line(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    server = start("random:3m", code=BLOCKED, stdin=subprocess.PIPE)
    assert server.stderr is not None
    url = url_of(server.stderr.readline())
    health, other = httpx.get(f"{url}/health"), httpx.post(f"{url}/v1/completions", json=LONG)
    assert (health.status_code, health.json()) == (503, {"status": "starting"})
    assert (other.status_code, other.json()["error"]["code"]) == (503, "server_starting")
    out, err = server.communicate("go on\n", timeout=30)
    assert (server.returncode, out, err) == (2, "", "kvwise: the model has gone\n")


def until(ask: Callable[[], httpx.Response], status: int) -> httpx.Response:
    """The first answer of that status: a signal is seen a little later than it is sent."""
    for _ in range(1000):
        if (answer := ask()).status_code == status:
            return answer
        select.select([], [], [], 0.005)
    raise AssertionError(f"no {status} but {answer.status_code}: {answer.text}")


def test_output_that_nobody_takes_does_not_change_the_exit_status() -> None:
    code = "with logging_to():\n say('x')\n logging.getLogger('kvwise').info('y')\nlet_go(sys.stdout, sys.stderr)"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\nfrom kvwise.server.log import *\n{code}"],
            env=ENVIRONMENT,
            stdout=full,
            stderr=full,
        )
    assert done.returncode == 0
