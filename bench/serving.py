"""A `kvwise serve` of its own process, for benchmarks: started, asked for its metrics and its memory, ended."""

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_START = "from kvwise.cli.main import main; main()"
_WHERE = re.compile(r" at (http://\S+)")


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    url: str
    process: psutil.Process

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics, summed over their labels, by name without the prefix."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        out: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("kvwise:"):
                name, _, value = line.removeprefix("kvwise:").rpartition(" ")
                name = name.partition("{")[0]
                out[name] = out.get(name, 0.0) + float(value)
        return out

    def rss(self) -> int:
        """Bytes of its memory that are resident."""
        return int(self.process.memory_info().rss)


@contextmanager
def serving(model: str, options: Sequence[str], *, threads: int) -> Iterator[Served]:
    """Start a server with `kvwise serve`'s options on a free port; it ends with the block. RuntimeError: it cannot."""
    command = [sys.executable, "-c", _START, "serve", model, "--port", "0", *options]
    environment = {**psutil.Process().environ(), "OMP_NUM_THREADS": str(threads)}
    # Its log goes where ours goes.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        where = _WHERE.search(line)
        if where is None:
            raise RuntimeError(f"the server did not start: {line or process.wait(30)}; run {' '.join(command)}")
        yield Served(where[1].rstrip(";"), psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
