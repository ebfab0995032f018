"""What must not go wrong in a server: after each fault it answers, its books are exact, and it has told of it."""

import asyncio
import contextlib
import json
import os
import re
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from typing import Any

import httpx
import pytest
import torch

from kvwise.core.clock import VirtualClock
from kvwise.core.params import SamplingParams
from kvwise.engine.engine import Engine
from kvwise.engine.llm import LLM
from kvwise.engine.service import ServiceLimits, State
from kvwise.methods.retention.h2o import H2O
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.server.observing.request_log import RequestLog
from kvwise.server.protocol import GuardedProtocol
from kvwise.server.run import watchdog
from tests.server.asgi import Pace
from tests.server.conftest import Served, make_server, serving
from tests.server.leaving import PATIENCE_S, require_quiet, tasks_besides
from tests.server.telling import read
from tests.server.wire import Reply, Wire

SECRET = "Rumpelstilzchen ist mein Name"  # what every prompt begins with, and no log may say
PROMPT = f"{SECRET}, und morgen hol ich der Koenigin ihr Kind. Ach wie gut, dass niemand weiss, wie ich heiss!"


# -- asking, and what must hold afterwards ------------------------------------------------------------------------


class Told(Served):
    """A server behind a socket, with its log of requests."""

    def __init__(self, served: Served, log: RequestLog, stream: StringIO) -> None:
        super().__init__(served.server, served.app, served.url, served.port, served.loop)
        self._log = log
        self._stream = stream
        self._wires: list[Wire] = []
        self.idle = self.on_loop(_tasks)

    def lines(self) -> list[dict[str, Any]]:
        """One for each request so far. Nothing is logged afterwards."""
        self._log.close()
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]

    def figures(self) -> dict[str, float]:
        """What /metrics says now."""
        found = read(self.get("/metrics").content)
        return {name.removeprefix("kvwise:"): value for name, value in found.items()}

    def get(self, path: str) -> httpx.Response:
        """By a new connection."""
        with httpx.Client(verify=False, trust_env=False, timeout=PATIENCE_S) as client:
            return client.get(self.url + path)

    def ask(self, prompt: Any = PROMPT, **fields: Any) -> Wire:
        """Send a request; its answer is still to be read."""
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 12, **fields}
        data = json.dumps(body)
        head = f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: {len(data)}"
        return self.send(f"{head}\nConnection: close\n\n").send(data)

    def send(self, text: str) -> Wire:
        """By a connection of its own."""
        self._wires.append(Wire(self.port))
        return self._wires[-1].send(text)

    def hang_up(self) -> None:
        """End all connections."""
        for wire in self._wires:
            wire.close()

    def text(self, prompt: Any = PROMPT, **fields: Any) -> str:
        """The text of an answer that must be one."""
        return text_of(self.ask(prompt, **fields).reply())

    def on_engine(self, work: Callable[[Engine], Any], strategy: str | None = None) -> Any:
        """Do something between two steps."""
        return self.on_loop(lambda: self.service.call(work, strategy))

    def until_queued(self, number: int) -> None:
        """Until so many requests are with the service."""

        async def wait() -> None:
            async with asyncio.timeout(PATIENCE_S):
                while len(self.service.streams()) < number:
                    await asyncio.sleep(0.001)

        self.on_loop(wait)


async def _tasks() -> set[Any]:
    return asyncio.all_tasks()


def text_of(reply: Reply) -> str:
    assert reply.status == 200, reply
    text: str = json.loads(reply.body)["choices"][0]["text"]
    return text


def events(wire: Wire) -> list[Any]:
    """What a stream said until its connection ended; [DONE] as it is."""
    with wire, wire.socket.makefile("rb") as file:
        said = re.findall(rb"^data: (.*)$", file.read(), re.MULTILINE)
    return [one.decode() if one == b"[DONE]" else json.loads(one) for one in said]


def failure(reply: Reply) -> str:
    """The code of a 500 that tells nothing of the server."""
    assert reply.status == 500, reply
    assert reply.error["message"] == "the server failed on this request; its log says why"
    code: str = reply.error["code"]
    return code


@pytest.fixture
def start(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., Told]]:
    """`start(max_num_seqs=4)`: a server that tells; in the end no log may have said what prompts said."""
    with contextlib.ExitStack() as stack:

        def begin(loaded: LoadedModel = tiny, **asked: Any) -> Told:
            server, stream = make_server(loaded, **asked), StringIO()
            log = RequestLog(stream=stream)
            stack.callback(lambda: require_silent(stream.getvalue(), caplog.text))
            stack.callback(log.close)
            server.observers.append(log)
            told = Told(stack.enter_context(serving(server)), log, stream)
            stack.callback(told.hang_up)
            return told

        yield begin


def require_silent(*logs: str) -> None:
    assert not any(word in log for log in logs for word in SECRET.split() if len(word) > 4)


def require_well(told: Told, expected: str, **fields: Any) -> None:
    """It answers, its books are exact, nothing is left of any request, and the next answer is that of a clean run."""
    assert (told.get("/health").status_code, told.service.health) == (200, State.READY)
    assert told.text(**fields) == expected
    assert told.on_loop(lambda: tasks_besides(told.idle)) == set()
    require_quiet(told)


@pytest.fixture(scope="module")
def clean(tiny: LoadedModel) -> Callable[..., str]:
    """`clean(strategy="h2o")`: what a clean engine answers."""

    def answer(prompt: Any = PROMPT, strategy: str = "full", max_tokens: int = 12) -> str:
        with LLM(tiny, strategy, kv_cache_memory_bytes=2**24) as llm:
            (output,) = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        return output.text

    return answer


# -- F22: readers that do not read --------------------------------------------------------------------------------


def test_a_client_that_reads_nothing_is_cut_off_and_little_is_kept_for_it(
    start: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []
    made, paused = GuardedProtocol.connection_made, GuardedProtocol.pause_writing

    def with_small_buffers(self: GuardedProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    def noted(self: GuardedProtocol) -> None:
        sizes.append(self.transport.get_write_buffer_size())
        paused(self)

    monkeypatch.setattr(GuardedProtocol, "connection_made", with_small_buffers)
    monkeypatch.setattr(GuardedProtocol, "pause_writing", noted)
    told = start(settings={"slow_reader_s": 0.5})
    with told.ask(stream=True, n=8, max_tokens=900, logprobs=20) as wire:
        gone = select.poll()
        gone.register(wire.socket, 0)  # tells of hang-ups and errors only
        assert gone.poll(PATIENCE_S * 1000)
    require_well(told, clean())
    assert max(sizes) < 2**19  # of some 20 MB that it would have got
    figures = told.figures()
    assert figures['request_refused_total{code="slow_reader"}'] == 1
    (line, _) = told.lines()
    assert line["error"] == "slow_reader"
    assert line["output_tokens"] < 8 * 900
    assert f"request {line['request_id']} is cut off: its client reads nothing" in caplog.messages


# -- F23: ten times more than fits --------------------------------------------------------------------------------

FITS, BURST = 6, 60


def test_a_burst_is_refused_while_the_engine_stands_still(start: Any, clean: Any) -> None:
    told = start(max_num_seqs=2, limits=ServiceLimits(max_waiting=FITS))
    steps = told.on_engine(Pace)  # from now on it stands in its first step
    wires = [told.ask(n % 10 * "x" + PROMPT) for n in range(BURST)]
    refused = readable(wires, BURST - FITS)
    assert told.get("/health").status_code == 200
    for wire in refused:
        reply = wire.reply()
        assert (reply.status, reply.error["code"], reply.error["type"]) == (429, "overloaded", "rate_limit_error")
        assert re.fullmatch("[1-9][0-9]*", reply.headers["retry-after"])
    assert steps.taken == 0
    assert len(told.service.streams()) == FITS
    steps.allow(float("inf"))
    admitted = [(n, wire) for n, wire in enumerate(wires) if wire not in refused]
    assert [text_of(wire.reply()) for _, wire in admitted] == [clean(n % 10 * "x" + PROMPT) for n, _ in admitted]
    require_well(told, clean())
    assert told.figures()['request_refused_total{code="overloaded"}'] == BURST - FITS
    assert [line["error"] for line in told.lines()].count("overloaded") == BURST - FITS


def test_prompts_that_are_long_together_are_refused_too(start: Any, clean: Any) -> None:
    told = start(limits=ServiceLimits(max_waiting_tokens=2 * (len(PROMPT) + 1)))
    steps = told.on_engine(Pace)
    wires = [told.ask() for _ in range(20)]
    refused = readable(wires, 18)
    assert {wire.reply().status for wire in refused} == {429}
    steps.allow(float("inf"))
    assert [text_of(wire.reply()) for wire in wires if wire not in refused] == [clean()] * 2
    require_well(told, clean())


def readable(wires: Sequence[Wire], number: int) -> list[Wire]:
    """Those that have got an answer, once so many have."""
    poll, by_number, found = select.poll(), {wire.socket.fileno(): wire for wire in wires}, []
    for wire in wires:
        poll.register(wire.socket, select.POLLIN)
    while len(found) < number:
        ready = poll.poll(PATIENCE_S * 1000)
        assert ready, f"{len(found)} of {number} have got an answer"
        for descriptor, _ in ready:
            found.append(by_number[descriptor])
            poll.unregister(descriptor)
    return found


# -- F24: one prefix, asked for at once ---------------------------------------------------------------------------


def test_a_prefix_that_256_ask_for_at_once_is_computed_about_once(start: Any, clean: Any) -> None:
    told = start(max_num_seqs=64, max_num_batched_tokens=256)
    prompts = [PROMPT + letter * 3 for letter in "abcdefgh"]
    expected = [clean(prompt, max_tokens=4) for prompt in prompts]

    def spoil(engine: Engine) -> None:
        engine.memory.arena.keys.fill_(float("nan"))  # a block that is found before it is written spoils its finder
        engine.memory.arena.values.fill_(float("nan"))

    told.on_engine(spoil)
    gate = threading.Event()
    told.service._thread.put(lambda: gate.wait(PATIENCE_S))  # so that all are there before the first step
    wires = [told.ask(prompts[n % 8], max_tokens=4, attest=True) for n in range(256)]
    told.until_queued(256)
    gate.set()
    choices = [json.loads(wire.reply().body)["choices"][0] for wire in wires]
    assert [choice["text"] for choice in choices] == [expected[n % 8] for n in range(256)]
    computed = sum(choice["kvwise"]["tokens_computed"] for choice in choices)
    size, shared = len(PROMPT) + 4, (len(PROMPT) + 1) // 16 * 16  # the tokenizer adds one in front
    assert computed <= size + 255 * (size - shared) + 256 * 3
    require_well(told, clean())
    assert told.figures()["prefix_cache_hits_total"] >= 255 * shared


# -- F25, F26: too little memory ----------------------------------------------------------------------------------


def test_a_pool_that_is_exhausted_in_mid_decode_lets_all_finish_right(start: Any, clean: Any) -> None:
    told = start(kv_cache_memory_bytes=2**20, max_num_seqs=8, strategies=("full",))
    prompts = [letter * 40 for letter in "abcdef"]
    wires = [told.ask(prompt, max_tokens=60) for prompt in prompts]
    assert [text_of(wire.reply()) for wire in wires] == [clean(prompt, max_tokens=60) for prompt in prompts]
    require_well(told, clean())
    assert told.figures()["num_preemptions_total"] > 0
    assert sum(line["preemptions"] for line in told.lines()) == told.on_engine(lambda e: e.stats().num_preemptions)


@pytest.mark.parametrize("too_large", [{"prompt": "x" * 400}, {"max_tokens": 400}, {"prompt": ["x", "y" * 400]}])
def test_what_is_larger_than_the_pool_is_a_400_at_admission(start: Any, clean: Any, too_large: Any) -> None:
    told = start(kv_cache_memory_bytes=2**20)
    steps = told.on_engine(Pace)
    waits = told.ask()
    reply = told.ask(**too_large).reply()  # though no step is taken
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    steps.allow(float("inf"))
    assert text_of(waits.reply()) == clean()
    require_well(told, clean())
    assert told.figures()['request_refused_total{code="context_length_exceeded"}'] == 1
    assert [line["error"] for line in told.lines()].count("context_length_exceeded") == 1


def test_a_step_that_hangs_is_told_of_and_got_over(start: Any, clean: Any, caplog: pytest.LogCaptureFixture) -> None:
    clock = VirtualClock()
    told = start(limits=ServiceLimits(watchdog_s=10), clock=clock)
    watch = asyncio.run_coroutine_threadsafe(watchdog(told.service, interval_s=0.001), told.loop)
    steps = told.on_engine(Pace)
    hangs = told.ask()
    told.until_queued(1)
    spin(lambda: told.service._thread.busy_since is not None)
    clock.advance(9)
    assert told.get("/health").status_code == 200
    clock.advance(2)
    health, other = told.get("/health"), told.ask().reply()
    assert (health.status_code, health.json()) == (503, {"status": "stuck"})
    assert (other.status, other.error["code"]) == (503, "server_stuck")
    assert int(other.headers["retry-after"]) >= 1
    assert told.figures()['state{state="stuck"}'] == 1
    spin(lambda: "the server is stuck: /health answers 503" in caplog.messages)
    steps.allow(float("inf"))
    assert text_of(hangs.reply()) == clean()
    spin(lambda: "the server is ready again" in caplog.messages)
    watch.cancel()
    clock.advance(1)
    require_well(told, clean())
    assert told.figures()['state{state="ready"}'] == 1
    assert [line["error"] for line in told.lines()] == ["server_stuck", None, None]


def spin(holds: Callable[[], bool]) -> None:
    """Until something holds that another thread makes hold."""

    async def wait() -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0.001)

    asyncio.run(wait())


# -- F28: no memory -----------------------------------------------------------------------------------------------

OUT_OF_MEMORY = [MemoryError, torch.OutOfMemoryError]


def once(real: Callable[..., Any], error: type[Exception], *, at: int = 1) -> Callable[..., Any]:
    """Raises at one call."""
    calls: list[int] = []

    def call(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error("no memory")
        return real(*given, **named)

    return call


def fails_in_forward(engine: Engine, error: type[Exception], patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr(engine._runner, "run", once(engine._runner.run, error, at=at))


def fails_in_building(engine: Engine, error: type[Exception], patch: pytest.MonkeyPatch, at: int) -> None:
    patch.setattr(engine._builder, "build", once(engine._builder.build, error, at=at))


def fails_in_sampling(engine: Engine, error: type[Exception], patch: pytest.MonkeyPatch, at: int) -> None:
    import kvwise.engine.finish as finish

    patch.setattr(finish, "sample", once(finish.sample, error, at=at))


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["host", "device"])
@pytest.mark.parametrize("fails", [fails_in_forward, fails_in_building, fails_in_sampling])
def test_a_step_without_memory_fails_its_own_requests_only(
    start: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception],
    fails: Callable[..., None],
) -> None:  # fmt: skip
    """Two run, one as a stream that has begun, and two wait: those that wait are answered."""
    told = start(max_num_seqs=2)
    steps = told.on_engine(Pace)
    fails(told.on_engine(lambda engine: engine), error, monkeypatch, 3)
    stream = told.ask(stream=True)
    told.until_queued(1)
    whole = told.ask()
    told.until_queued(2)
    waiting = [told.ask(letter + PROMPT) for letter in "ab"]
    told.until_queued(4)
    steps.allow(2)
    assert stream.socket.recv(1, socket.MSG_PEEK)  # its answer has begun: the status cannot be changed any more
    steps.allow(float("inf"))
    said = events(stream)
    assert said[-1]["error"]["code"] == "internal_error"
    assert failure(whole.reply()) == "internal_error"
    assert [text_of(wire.reply()) for wire in waiting] == [clean(letter + PROMPT) for letter in "ab"]
    require_well(told, clean())
    figures = told.figures()
    assert figures['request_success_total{finished_reason="error"}'] == 2
    assert figures['request_refused_total{code="internal_error"}'] == 2
    lines = told.lines()
    assert [line["error"] for line in lines].count("internal_error") == 2
    for line in lines[:2]:
        (entry,) = [message for message in caplog.messages if line["request_id"] in message]
        assert "no memory" in entry


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["host", "device"])
@pytest.mark.parametrize("where", ["admit", "row", "match"])
def test_an_admission_without_memory_fails_its_own_request_only(
    start: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception], where: str
) -> None:
    told = start(max_num_seqs=4)
    engine = told.on_engine(lambda engine: engine)
    owner, name = {
        "admit": (engine.memory.placement, "admit"), "row": (engine.memory.cache, "admit_with_room"),
        "match": (engine.memory.cache, "match"),
    }[where]  # fmt: skip
    steps = told.on_engine(Pace)
    runs = told.ask(max_tokens=40)
    told.until_queued(1)
    steps.allow(3)
    spin(lambda: steps.taken == 3 and steps.stands)
    failing = once(getattr(owner, name), error)
    monkeypatch.setattr(owner, name, failing)
    fails = told.ask("y" + PROMPT)
    told.until_queued(2)
    steps.allow(float("inf"))
    assert failure(fails.reply()) == "internal_error"
    assert text_of(runs.reply()) == clean(max_tokens=40)
    require_well(told, clean())
    assert told.figures()['request_success_total{finished_reason="error"}'] == 1
    assert [line["error"] for line in told.lines()] == ["internal_error", None, None]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["host", "device"])
def test_a_request_that_cannot_be_queued_for_lack_of_memory_fails_alone(
    start: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    """It is known to the engine by then, in part."""
    told = start()
    steps, engine = told.on_engine(Pace), told.on_engine(lambda engine: engine)
    runs = told.ask(max_tokens=40)
    told.until_queued(1)
    steps.allow(3)
    spin(lambda: steps.taken == 3 and steps.stands)
    monkeypatch.setattr(engine._scheduler, "add", once(engine._scheduler.add, error))
    fails = told.ask("y" + PROMPT)
    told.until_queued(2)
    steps.allow(float("inf"))
    assert failure(fails.reply()) == "internal_error"
    assert text_of(runs.reply()) == clean(max_tokens=40)
    require_well(told, clean())
    assert told.figures()['request_refused_total{code="internal_error"}'] == 1
    assert [line["error"] for line in told.lines()].count("internal_error") == 1


# -- F29, F30: methods that raise, numbers that are none ----------------------------------------------------------


def test_a_method_that_raises_fails_its_request_only(
    start: Any, clean: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told, keep, bad = start(strategies=("h2o", "prefix")), H2O.keep, "y" + PROMPT

    def broken(self: H2O, view: Any) -> Any:
        if view.num_tokens == len(bad) + 1:
            raise RuntimeError("keep is broken")
        return keep(self, view)

    monkeypatch.setattr(H2O, "keep", broken)
    steps = told.on_engine(Pace)
    good, fails, streams = told.ask(), told.ask(bad), told.ask(bad, stream=True)
    other = told.ask(bad, strategy="prefix")
    told.until_queued(4)
    steps.allow(float("inf"))
    assert failure(fails.reply()) == "internal_error"
    (said,) = [one for one in events(streams) if one != "[DONE]" and "error" in one] or [None]
    assert said is None or said["error"]["code"] == "internal_error"
    assert text_of(good.reply()) == clean(strategy="h2o")
    assert text_of(other.reply()) == clean(bad)
    require_well(told, clean(strategy="h2o"))
    assert told.figures()['request_success_total{finished_reason="error"}'] == 2
    assert [line["error"] for line in told.lines()].count("internal_error") == 2
    assert sum("keep is broken" in message for message in caplog.messages) == 2


POISON = 300  # an id that text never has


def test_no_number_in_kv_fails_its_request_and_nothing_of_it_is_cached(
    start: Any, clean: Any, caplog: pytest.LogCaptureFixture
) -> None:
    poisoned = load_model("random:3m")
    with torch.no_grad():
        poisoned.model.get_input_embeddings().weight[POISON] = float("nan")
    told = start(poisoned, max_num_batched_tokens=64)
    sick = [*PROMPT.encode()[:20], POISON, *PROMPT.encode()[21:]]
    for _ in range(2):
        fails, fine = told.ask(sick, stream=True), told.ask()
        said = fails.reply()
        assert failure(said) == "internal_error"
        assert text_of(fine.reply()) == clean()
    cached = told.on_engine(lambda engine: engine.memory.cache.num_resident(engine.keys(sick)))
    assert cached <= 1  # what is before the sick token is sound
    require_well(told, clean())
    assert told.figures()['request_success_total{finished_reason="error"}'] == 2
    assert [line["error"] for line in told.lines()].count("internal_error") == 2
    assert sum("not finite" in message for message in caplog.messages) == 2


# -- F38: scrapes, logs -------------------------------------------------------------------------------------------


def test_a_storm_of_scrapes_harms_nobody(start: Any, clean: Any) -> None:
    told = start(clock=(clock := VirtualClock()))
    steps = told.on_engine(Pace)
    runs = told.ask(max_tokens=100)
    told.until_queued(1)
    steps.allow(10)
    wires = [told.send("GET /metrics HTTP/1.1\nHost: x\nConnection: close\n\n") for _ in range(500)]
    steps.allow(float("inf"))
    assert {wire.reply().status for wire in wires} == {200}
    assert text_of(runs.reply()) == clean(max_tokens=100)
    clock.advance(1)
    assert told.figures()["metrics_renders_total"] == 2  # one for all of them, and this one
    require_well(told, clean())


def full_disk() -> Any:
    return open("/dev/full", "w")


def closed_file() -> Any:
    stream = StringIO()
    stream.close()
    return stream


def pipe_without_reader() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("make", [full_disk, closed_file, pipe_without_reader])
def test_a_log_that_cannot_be_written_harms_nobody_and_is_told_of(start: Any, clean: Any, make: Any) -> None:
    told = start()
    stream = make()
    log = RequestLog(stream=stream)
    told.server.observers.append(log)
    assert [told.text() for _ in range(5)] == [clean()] * 5
    log.close()
    assert log.num_lost == 5
    assert told.figures()["request_log_lost_total"] == 5
    assert len(told.lines()) == 5  # the other log has them
    require_well(told, clean())
    with contextlib.suppress(OSError):
        stream.close()
