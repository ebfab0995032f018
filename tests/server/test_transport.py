"""What comes over the wire is answered with the envelope or refused in time, whatever it is."""

import asyncio
import json
import logging
import select
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from kvwise.engine.service import State
from kvwise.models.loaded import LoadedModel
from kvwise.server.faults import as_fault
from kvwise.server.gates import known, room
from kvwise.server.run import Front, watchdog
from kvwise.server.settings import ServerSettings
from kvwise.server.strict import gated
from tests.server.conftest import Served, make_server, serving
from tests.server.wire import Reply, Wire

BODY, HEAD, CONNECTIONS = 4096, 2048, 8
QUICK = {
    "max_body_bytes": BODY, "max_header_bytes": HEAD, "max_connections": CONNECTIONS, "request_timeout_s": 0.3,
    "slow_reader_s": 0.3, "live": False,
}  # fmt: skip


class Said(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    text: str
    numbers: list[int] = []


def _add_routes(one: Served) -> None:
    server = one.server
    router = APIRouter(route_class=gated(known(server), room(server)))

    @router.post("/echo")
    async def echo(said: Said, request: Request) -> dict[str, Any]:
        return {"text": said.text, "id": request.state.request_id, "tenant": request.state.tenant.name}

    @router.get("/boom")
    async def boom() -> None:
        raise ZeroDivisionError("a secret of the server")

    @router.get("/flood")
    async def flood() -> StreamingResponse:
        async def forever() -> AsyncIterator[bytes]:
            while True:
                yield b"x" * 2**16
                await asyncio.sleep(0)

        return StreamingResponse(forever())

    one.app.include_router(router)


@pytest.fixture(scope="module")
def quick(tiny: LoadedModel) -> Iterator[Served]:
    """A server with small limits and routes of our own: /echo, /boom, /flood."""
    with serving(make_server(tiny, settings=QUICK)) as one:
        _add_routes(one)
        yield one


@pytest.fixture
def wire(quick: Served) -> Iterator[Wire]:
    with Wire(quick.port) as one:
        yield one


def post(body: str | bytes, headers: str = "Content-Type: application/json\n") -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = f"POST /echo HTTP/1.1\nHost: x\n{headers}Content-Length: {len(data)}\n\n"
    return head.replace("\n", "\r\n").encode("latin-1") + data


def refused(reply: Reply, status: int, code: str) -> dict[str, Any]:
    error = reply.error
    assert (reply.status, error["code"]) == (status, code), reply
    return error


# -- routes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["/nope", "/v1", "/v1/", "/health/", "//health", "/v1/../health", "/.%2e/health", "/health%00", "/HEALTH",
               "/%", "/%ff%fe", "/docs", "/redoc", "*", "/" + "a" * 1000],
)  # fmt: skip
def test_other_paths_are_404(wire: Wire, target: str) -> None:
    refused(wire.send(f"GET {target} HTTP/1.1\nHost: x\n\n").reply(), 404, "route_not_found")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_are_405_and_say_which(wire: Wire, method: str) -> None:
    reply = wire.send(f"{method} /health HTTP/1.1\nHost: x\nContent-Length: 0\n\n").reply()
    refused(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "GET"


def test_head_has_no_body(wire: Wire) -> None:
    assert wire.send("HEAD /nope HTTP/1.1\nHost: x\n\n").reply(head_only=True).status == 404
    assert wire.send("GET /health HTTP/1.1\nHost: x\n\n").reply().status == 200


@pytest.mark.parametrize(
    "target",
    ["/v1/models", "/v1/models/x", "/%761/models", "/v1%2Fmodels", "http://health/v1/models", "/v1/models?/health",
     "/v1/models#/health"],
)  # fmt: skip
@pytest.mark.parametrize("host", ["x", "x/health", "x:1/health?", ""])
def test_nothing_but_the_key_opens_a_route(tiny: LoadedModel, locked: Served, target: str, host: str) -> None:
    tricks = (
        "X-Original-URL: /health\nX-Rewrite-URL: /health\nX-Forwarded-Prefix: /health\nX-HTTP-Method-Override: HEAD"
    )
    with Wire(locked.port) as wire:
        refused(wire.send(f"GET {target} HTTP/1.1\nHost: {host}\n{tricks}\n\n").reply(), 401, "invalid_api_key")


@pytest.fixture(scope="module")
def locked(tiny: LoadedModel) -> Iterator[Served]:
    with serving(make_server(tiny, api_keys=["the-key"], settings={"live": False})) as one:
        yield one


def test_the_key_opens_it(locked: Served) -> None:
    with Wire(locked.port) as wire:
        head = "GET http://elsewhere/v1/models HTTP/1.1\nHost: evil\nAuthorization: Bearer the-key\n\n"
        assert wire.send(head).reply().status == 200


def test_a_refusal_does_not_wait_for_the_body(locked: Served) -> None:
    head = "POST /v1/completions HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 1000000\n"
    with Wire(locked.port) as wire:
        refused(wire.send(head + "Expect: 100-continue\n\n").reply(), 401, "invalid_api_key")


def test_a_refusal_for_want_of_room_does_not_wait_either(quick: Served, wire: Wire) -> None:
    async def ready() -> None:
        quick.service.ready()

    quick.on_loop(lambda: quick.service.drain(0))
    try:
        reply = wire.send("POST /echo HTTP/1.1\nHost: x\nContent-Length: 1000\n\n").reply()
        refused(reply, 503, "server_draining")
        assert int(reply.headers["retry-after"]) >= 1
        reply = wire.send("x" * 1000 + "GET /health HTTP/1.1\nHost: x\n\n").reply()
        assert (reply.status, json.loads(reply.body)) == (503, {"status": "draining"})
    finally:
        quick.on_loop(ready)


# -- ids and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "req-123_x.y", "x" * 128, "~!@"])
def test_a_plain_request_id_is_kept(wire: Wire, given: str) -> None:
    reply = wire.send(f"GET /health HTTP/1.1\nHost: x\nX-Request-Id: {given}\n\n").reply()
    assert reply.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "\xe4", "\x80", "a\nX-Request-Id: b"])
def test_any_other_request_id_is_replaced(wire: Wire, given: str) -> None:
    reply = wire.send(f"GET /nope HTTP/1.1\nHost: x\nX-Request-Id: {given}\n\n").reply()
    assert reply.headers["x-request-id"].startswith("req-")


def test_the_route_knows_the_id(wire: Wire) -> None:
    reply = wire.send(post('{"text": "\\u00e4"}', "Content-Type: application/json\nX-Request-Id: mine\n")).reply()
    assert json.loads(reply.body) == {"text": "ä", "id": "mine", "tenant": ""}


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    reply = wire.send("GET /boom HTTP/1.1\nHost: x\nX-Request-Id: tell-me\n\n").reply()
    error = refused(reply, 500, "internal_error")
    assert "secret" not in error["message"]
    assert wire.send("GET /health HTTP/1.1\nHost: x\n\n").reply().status == 200
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in told] == ["request tell-me failed"]


# -- bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    ["", "Content-Type: text/plain\n", "Content-Type: application/x-www-form-urlencoded\n", "Content-Type: json\n",
     "Content-Type: application/json; charset=utf-16\n", "Content-Type: application/json\nContent-Encoding: gzip\n",
     "Content-Type: multipart/form-data; boundary=x\n"],
)  # fmt: skip
def test_what_does_not_say_it_is_json_is_415(wire: Wire, headers: str) -> None:
    reply = wire.send(post('{"text": "x"}', headers)).reply()
    assert reply.error["type"] == "invalid_request_error"
    assert reply.status == 415


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"']
)
def test_what_does_is_read(wire: Wire, kind: str) -> None:
    assert wire.send(post('{"text": "x"}', f"Content-Type: {kind}\n")).reply().status == 200


def test_an_empty_body_is_a_400(wire: Wire) -> None:
    refused(wire.send(post("")).reply(), 400, "invalid_json")
    refused(wire.send("POST /echo HTTP/1.1\nHost: x\nContent-Type: application/json\n\n").reply(), 400, "invalid_json")


@pytest.mark.parametrize("body", ["null", "[]", '"x"', "1"])
def test_what_is_no_object_is_a_400(wire: Wire, body: str) -> None:
    refused(wire.send(post(body)).reply(), 400, "invalid_value")


def test_a_body_of_the_largest_size_is_read_and_no_larger_one(wire: Wire) -> None:
    text = '{"text": "%s"}'
    assert wire.send(post(text % ("x" * (BODY - 12)))).reply().status == 200
    refused(wire.send(post(text % ("x" * (BODY - 11)))).reply(), 413, "request_too_large")


def test_a_declared_size_is_enough_to_refuse(wire: Wire) -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 99999999\n\n"
    refused(wire.send(head).reply(), 413, "request_too_large")


def test_a_body_in_chunks_is_counted_as_it_comes(wire: Wire) -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
    wire.send(head)
    for _ in range(BODY // 1024 + 1):
        wire.send(f"400\n{'x' * 1024}\n")
    refused(wire.reply(), 413, "request_too_large")


def test_a_body_in_chunks_is_put_together(wire: Wire) -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
    assert wire.send(head + '4\n{"te\n9\nxt": "y"}\n0\n\n').reply().status == 200


def test_a_body_that_nobody_wants_is_not_read_for_ever(quick: Served, wire: Wire) -> None:
    wire.send("POST /nope HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n")
    refused(wire.reply(), 404, "route_not_found")
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        wire.send(f"400\n{'x' * 1024}\n" * 2**14)


@pytest.mark.parametrize(
    "head",
    ["Content-Length: 5\nContent-Length: 6", "Content-Length: -1", "Content-Length: x", "Content-Length: 1, 2",
     "Content-Length: 5\nTransfer-Encoding: chunked", "Transfer-Encoding: gzip",
     "Content-Length: 99999999999999999999999"],
)  # fmt: skip
def test_a_size_that_can_be_read_in_two_ways_is_a_400(wire: Wire, head: str) -> None:
    refused(wire.send(f"POST /echo HTTP/1.1\nHost: x\n{head}\n\n").reply(), 400, "invalid_http")
    assert wire.ended()


# -- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["", "G", "GET /health HTTP/1.1\nHost: x\nX-A", "\n"])
def test_a_head_that_does_not_come_is_a_408(wire: Wire, begin: str) -> None:
    refused(wire.send(begin).reply(), 408, "request_timeout")
    assert wire.ended()


def test_a_body_that_does_not_come_is_a_408(wire: Wire) -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 100\n\n"
    refused(wire.send(head + '{"text"').reply(), 408, "request_timeout")


def test_a_connection_that_goes_on_with_line_ends_is_closed(wire: Wire) -> None:
    assert wire.send("GET /health HTTP/1.1\nHost: x\n\n").reply().status == 200
    refused(wire.send("\n").reply(), 408, "request_timeout")
    assert wire.ended()


def test_a_client_that_leaves_in_the_middle_harms_nobody(quick: Served, caplog: pytest.LogCaptureFixture) -> None:
    head = "POST /echo HTTP/1.1\nHost: x\nContent-Type: application/json\nContent-Length: 100\n\n"
    for part in ("GET /hea", "GET /health HTTP/1.1\nHost: x\n\n", head, head + '{"te'):
        with Wire(quick.port) as wire:
            wire.send(part)
    with Wire(quick.port) as wire:
        assert wire.send("GET /health HTTP/1.1\nHost: x\n\n").reply().status == 200
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_takes_nothing_is_cut_off(quick: Served, wire: Wire) -> None:
    wire.send("GET /flood HTTP/1.1\nHost: x\n\n")
    gone = select.poll()
    gone.register(wire.socket, 0)  # tells of hang-ups and errors only
    assert gone.poll(20_000)


def test_pipelined_requests_are_answered_in_order(wire: Wire) -> None:
    one = "GET /health HTTP/1.1\nHost: x\nX-Request-Id: %d\n\n"
    wire.send("".join(one % n for n in range(5)))
    assert [wire.reply().headers["x-request-id"] for _ in range(5)] == list("01234")


# -- heads and connections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [f"GET /{'a' * HEAD} HTTP/1.1\nHost: x\n\n", f"GET / HTTP/1.1\nX-A: {'a' * HEAD}\n\n",
     "GET / HTTP/1.1\n" + "X-A: b\n" * HEAD + "\n", f"GET / HTTP/1.1\n{'A' * HEAD * 200}", f"GET /{'a' * HEAD * 200}"],
)  # fmt: skip
def test_a_large_head_is_a_431(wire: Wire, head: str) -> None:
    refused(wire.send(head).reply(), 431, "headers_too_large")


@pytest.mark.parametrize(
    "text",
    ["x\n\n", "GET / HTTP/9.9\n\n", "GET  HTTP/1.1\n\n", "GET health HTTP/1.1\nHost: x\n\n",
     "CONNECT x:1 HTTP/1.1\nHost: x\n\n",
     "GET /health HTTP/1.1\nHost : x\n\n", "GET /health HTTP/1.1\nA: \x00\n\n", "BREW /health HTTP/1.1\n\n",
     "GET /health HTTP/1.1\nA: b\n c: d\rx\n\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
     "PRI * HTTP/2.0\n\nSM\n\n"],
)  # fmt: skip
def test_what_is_no_http_is_a_400(wire: Wire, text: str) -> None:
    refused(wire.send(text).reply(), 400, "invalid_http")
    assert wire.ended()


def test_an_upgrade_is_not_made(wire: Wire) -> None:
    head = "GET /health HTTP/1.1\nHost: x\nConnection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Key: eA==\n"
    assert wire.send(head + "Sec-WebSocket-Version: 13\n\n").reply().status == 200


def test_only_so_many_connections_are_open(quick: Served) -> None:
    wires = [Wire(quick.port) for _ in range(CONNECTIONS)]
    try:
        with Wire(quick.port) as one_more:
            refused(one_more.reply(), 503, "too_many_connections")
            assert one_more.ended()
    finally:
        for wire in wires:
            wire.close()


# -- the document -------------------------------------------------------------------------------------------------


def test_the_document_tells_of_every_error(locked: Served) -> None:
    document = httpx.get(f"{locked.url}/openapi.json").json()
    assert "HTTPValidationError" not in json.dumps(document)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            answers = operation["responses"]
            assert "422" not in answers, path
            wanted = {"400", "401", "404", "429", "500", "503"} | ({"413", "415"} if method == "post" else set())
            if "requestBody" in operation:
                assert wanted <= set(answers), (path, wanted - set(answers))
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    for part in json.dumps(document).split('"$ref": "#/')[1:]:
        place: Any = document
        for key in part.split('"')[0].split("/"):
            place = place[key]


# -- what is around it --------------------------------------------------------------------------------------------


def test_there_is_an_answer_before_there_is_an_app() -> None:
    async def ask() -> list[httpx.Response]:
        front = httpx.ASGITransport(Front(ServerSettings(["x"])))
        async with httpx.AsyncClient(transport=front, base_url="http://x") as client:
            return [await client.get("/health"), await client.post("/v1/completions", json={})]

    health, other = asyncio.run(ask())
    assert (health.status_code, health.json()) == (503, {"status": "starting"})
    assert (other.status_code, other.json()["error"]["code"]) == (503, "server_starting")
    assert int(other.headers["retry-after"]) >= 1
    assert other.headers["x-request-id"].startswith("req-")


class _Sick:
    """A service whose health goes through a list, once."""

    def __init__(self, *states: State) -> None:
        self._states = iter(states)

    @property
    def health(self) -> State:
        state = next(self._states, None)
        if state is None:
            raise asyncio.CancelledError
        return state


def test_the_watchdog_tells_once(caplog: pytest.LogCaptureFixture) -> None:
    sick: Any = _Sick(State.READY, State.STUCK, State.STUCK, State.STUCK, State.READY, State.READY, State.STUCK)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(watchdog(sick, interval_s=0))
    told = [record.getMessage() for record in caplog.records]
    assert told == ["the server is stuck: /health answers 503", "the server is ready again",
                    "the server is stuck: /health answers 503"]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param", "code", "says"),
    [
        ({}, "text", "missing_required_parameter", "missing"),
        ({"text": 1}, "text", "invalid_value", "text=1: input should be a valid string"),
        ({"text": "x", "numbers": [1, "2"]}, "numbers[1]", "invalid_value", "numbers[1]='2'"),
        ({"text": "x", "numbers": [True]}, "numbers[0]", "invalid_value", "valid integer"),
        ({"text": "x", "temprature": 1}, "temprature", "unknown_parameter", "not known here"),
        ({"text": ["x" * 3000]}, "text", "invalid_value", "..."),
    ],
)
def test_a_fault_names_the_field(wire: Wire, body: dict[str, Any], param: str, code: str, says: str) -> None:
    error = refused(wire.send(post(json.dumps(body))).reply(), 400, code)
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 200


def test_of_a_union_the_fault_that_came_furthest_counts() -> None:
    body = {"prompt": ["a", 5]}
    faults = [
        {"type": "string_type", "loc": ("body", "prompt", "str"), "msg": "No string", "input": ["a", 5]},
        {"type": "string_type", "loc": ("body", "prompt", "list[str]", 1), "msg": "Not a string", "input": 5},
        {"type": "int_type", "loc": ("body", "prompt", "list[int]", 0), "msg": "Not a number", "input": "a"},
    ]
    error = as_fault(faults, body)
    assert (error.param, error.message) == ("prompt[1]", "prompt[1]=5: not a string")
