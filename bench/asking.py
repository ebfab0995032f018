"""A client in a process of its own, for benchmarks: told what to ask, it says when the answers came.

`python bench/asking.py URL SALT` reads a workload as JSON from each line of its input and writes what it saw as JSON to
a line of its output, until its input ends. It asks as `kvwise bench` does, over connections that stay open. `Asking`
starts one.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TextIO

from kvwise.study.client.load import Load, Sender
from kvwise.study.client.options import Target
from kvwise.study.client.prompts import Ask, Conversation
from kvwise.study.client.wire import Wire, open_wire


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it is due, in seconds from the start, and its token ids."""

    at: float
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a workload. Seconds: of each request from when it was sent, and of all of them."""

    ttfts: list[float]
    latencies: list[float]
    num_tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return self.num_tokens / self.seconds


class Asking:
    """The other process, as this one sees it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(self, asked: Sequence[Asked], num_output: int) -> Seen:
        """Have requests sent when they are due and wait for all answers. RuntimeError if one fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"asked": [asdict(one) for one in asked], "output": num_output}) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline() or '{"error": "the client has ended"}')
        if "error" in told:
            raise RuntimeError(told["error"])
        return Seen(**told)


@contextmanager
def asking(url: str, salt: str) -> Iterator[Asking]:
    """A client of the server at `url`, whose prompts hit only what it has asked itself; it ends with the block."""
    command = [sys.executable, __file__, url, salt]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Asking(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]


async def send(wire: Wire, asked: Sequence[Asked], num_output: int) -> Seen:
    """Send requests when they are due and wait for all answers. RuntimeError if one fails."""
    talks = [
        Conversation(i, one.at, (Ask(partial(list, one.prompt), len(one.prompt), num_output),))
        for i, one in enumerate(asked)
    ]
    outcome = await Load(talks, Sender(wire.body, wire.send, is_chat=False)).run()
    failed = next((answer.error for answer in outcome.answers if not answer.ok), None)
    if failed is not None:
        raise RuntimeError(failed)
    answers = sorted(outcome.answers, key=lambda answer: answer.conversation)
    ttfts, latencies = [a.ttft for a in answers], [a.latency for a in answers]
    return Seen(ttfts, latencies, sum(a.num_output for a in answers), outcome.duration_s)


async def obey(url: str, salt: str, orders: TextIO) -> None:
    """Do what each line says."""
    fields = {"temperature": 0, "cache_salt": salt}  # greedy, as the engine's default is
    async with open_wire(Target(url, ignore_eos=True, extra_body=fields)) as wire:
        await wire.find_model()
        while line := await asyncio.to_thread(orders.readline):  # meanwhile connections that the server closes close
            order = json.loads(line)
            try:
                told = asdict(await send(wire, [Asked(**one) for one in order["asked"]], order["output"]))
            except RuntimeError as error:
                told = {"error": str(error)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    asyncio.run(obey(sys.argv[1], sys.argv[2], sys.stdin))
