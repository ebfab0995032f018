"""Hostile bytes on the routes that matter: each gets its 4xx envelope, and the server goes on as if nothing was."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvwise.models.loaded import LoadedModel
from kvwise.server.protocol import GuardedProtocol
from tests.server.asgi import post, settled
from tests.server.conftest import MODEL, Served, key_file, make_server, private, serving
from tests.server.wire import Reply, Wire

KEY, ADMIN = "sk-a-tenant's-key", "sk-the-administrator's"
BODY, HEAD, DEPTH, ITEMS = 65_536, 4096, 16, 2000
LIMITS = {
    "max_body_bytes": BODY, "max_header_bytes": HEAD, "max_json_depth": DEPTH, "max_json_items": ITEMS,
    "request_timeout_s": 0.5,
}  # fmt: skip
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/live/blocks")
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def locked(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("keys")
    files = {"keys_file": key_file(folder, alice=KEY), "admin_key_file": private(folder / "admin", ADMIN)}
    with serving(make_server(tiny, settings=LIMITS | files)) as one:
        yield one


@pytest.fixture(scope="module")
def greedy(locked: Served) -> Callable[[], Any]:
    """The answer to a plain request; each time it is computed anew."""

    def ask() -> Any:
        body = {"model": MODEL, "prompt": "as ever", "max_tokens": 3, "temperature": 0}
        answer = post(f"{locked.url}/v1/completions", body, {"Authorization": f"Bearer {KEY}"})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    return ask


@pytest.fixture(autouse=True)
def _unharmed(locked: Served, greedy: Callable[[], Any]) -> Iterator[None]:
    """After each test: the pool is sound and holds nothing, and the next answer is what it was."""
    before = greedy()
    yield
    locked.on_loop(lambda: settled(locked.server))
    assert greedy() == before


@pytest.fixture
def wire(locked: Served) -> Iterator[Wire]:
    with Wire(locked.port) as one:
        yield one


AUTHORIZED = f"Authorization: Bearer {KEY}\n"


def request(body: bytes | str, path: str = CHAT, headers: str = AUTHORIZED, kind: str = "application/json") -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = f"POST {path} HTTP/1.1\nHost: x\n{headers}Content-Type: {kind}\nContent-Length: {len(data)}\n\n"
    return head.replace("\n", "\r\n").encode("latin-1") + data


def refused(reply: Reply, status: int, code: str) -> dict[str, Any]:
    error = reply.error
    assert (reply.status, error["code"]) == (status, code), reply
    return error


# -- who asks -----------------------------------------------------------------------------------------------------

NO_KEYS = [
    "", "Authorization: \n", "Authorization: Bearer\n", "Authorization: Bearer \n", f"Authorization: {KEY}\n",
    f"Authorization: Basic {KEY}\n", f"Authorization: Bearer{KEY}\n", f"Authorization: Bearer {KEY}x\n",
    f"Authorization: Bearer {KEY[:-1]}\n", f"Authorization: Bearer {KEY.upper()}\n", f"Authorization: Bearer\t{KEY}\n",
    f"Authorization: Bearer {KEY} {KEY}\n", f"Authorization: Bearer {KEY},Bearer {KEY}\n",
    f"Authorization: Bearer {KEY}\nAuthorization: Bearer {KEY}\n", f"Authorization: Bearer {KEY}\nAuthorization: x\n",
    f"X-Api-Key: {KEY}\n", f"Api-Key: {KEY}\n", f"Proxy-Authorization: Bearer {KEY}\n", f"Cookie: key={KEY}\n",
    f'Authorization: Bearer "{KEY}"\n', "Authorization: Bearer \xff\xfe\n", f"Authorization: Bearer {'k' * 2000}\n",
    "Authorization: Bearer null\n", f"Authorization : Bearer {KEY}\n".replace(" :", "_:"),
]  # fmt: skip


@pytest.mark.parametrize("headers", NO_KEYS)
def test_what_is_not_the_key_is_401(wire: Wire, headers: str) -> None:
    for path in ("/v1/completions", "/v1/models"):
        method = "GET" if path.endswith("models") else "POST"
        error = refused(
            wire.send(f"{method} {path} HTTP/1.1\nHost: x\n{headers}Content-Length: 0\n\n").reply(), 401,
            "invalid_api_key",
        )  # fmt: skip
        assert error["type"] == "authentication_error"
        assert KEY not in error["message"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_key_is_taken_however_its_scheme_is_spelled(wire: Wire, scheme: str) -> None:
    head = f"GET /v1/models HTTP/1.1\nHost: x\nauthorization:   {scheme}  {KEY}  \n\n"
    assert wire.send(head).reply().status == 200


@pytest.mark.parametrize("target", ["/admin/stats", "/admin/strategy", "/admin/sessions", "/metrics/../admin/stats",
                                    "/%61dmin/stats", "http://x/admin/stats", "/admin/stats?key=" + ADMIN])  # fmt: skip
@pytest.mark.parametrize("host", ["x", "localhost/health", "x\nX-Forwarded-Host: admin", "x\nX-Admin: 1"])
def test_a_tenant_is_no_administrator(wire: Wire, target: str, host: str) -> None:
    for key in (KEY, ADMIN + "x"):
        head = f"GET {target} HTTP/1.1\nHost: {host}\nAuthorization: Bearer {key}\n\n"
        error = wire.send(head).reply().error
        assert error["code"] in ("invalid_api_key", "route_not_found")


def test_the_administrators_key_is_no_tenants(wire: Wire) -> None:
    refused(wire.send(request("{}", headers=f"Authorization: Bearer {ADMIN}\n")).reply(), 401, "invalid_api_key")


# -- routes and heads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_generating_takes_a_post(wire: Wire, path: str, method: str) -> None:
    reply = wire.send(f"{method} {path} HTTP/1.1\nHost: x\n{AUTHORIZED}Content-Length: 0\n\n").reply()
    refused(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions/", "/v1/chat//completions", "//v1/chat/completions", "/v1/chat/completions%00",
     "/v1/chat/completions%2f", "/V1/chat/completions", "/v1/chat/../chat/completions", "/v1/chat/completions;x=1",
     "/v1/engines/x/completions", "/v1/embeddings", "/v1/files/../../etc/passwd", "/live/../live.html",
     "/live/%2e%2e/app.py", "/live/live.py", "/v1/responses"],
)  # fmt: skip
def test_a_path_is_taken_as_it_is(wire: Wire, path: str) -> None:
    refused(wire.send(request("{}", path)).reply(), 404, "route_not_found")


def test_an_allow_header_names_all_methods_of_a_path(wire: Wire) -> None:
    admin = f"Authorization: Bearer {ADMIN}\n"
    for path, methods in (("/admin/strategy", "GET, POST"), ("/admin/sessions/s", "DELETE, POST")):
        reply = wire.send(f"PUT {path} HTTP/1.1\nHost: x\n{admin}Content-Length: 0\n\n").reply()
        refused(reply, 405, "method_not_allowed")
        assert reply.headers["allow"] == methods


KINDS = [
    "text/plain", "application/xml", "application/json; charset=latin-1", "application/x-ndjson", "", "json",
    "multipart/form-data; boundary=x", "application/json, text/plain", "application/jsonp", "application/*",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_say_it_is_json_is_415(wire: Wire, kind: str) -> None:
    for path in ROUTES:
        refused(wire.send(request('{"model": "tiny"}', path, kind=kind)).reply(), 415, "content_type")


@pytest.mark.parametrize(
    "head", [f"X-A: {'a' * HEAD}\n", "X-A: b\n" * HEAD, f"{'A' * HEAD}: b\n", f"Cookie: {'c=d; ' * HEAD}\n",
             f"X-Request-Id: {'i' * HEAD}\n", f"Authorization: Bearer {'k' * HEAD}\n"],
)  # fmt: skip
def test_giant_heads_are_431(wire: Wire, head: str) -> None:
    refused(wire.send(request("{}", headers=head)).reply(), 431, "headers_too_large")


@pytest.mark.parametrize(
    "given",
    ["\x1b[31mred", "a" * 129, "'; DROP TABLE x; --", '{"a": 1}\t', "\xff\xff", "a\nX-Request-Id: a", "%0a%0d id"],
)
def test_a_hostile_request_id_is_replaced(wire: Wire, given: str) -> None:
    reply = wire.send(request("[]", headers=f"{AUTHORIZED}X-Request-Id: {given}\n")).reply()
    assert reply.status == 400
    if reply.error["code"] != "invalid_http":  # the parser lets no escapes through
        assert reply.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    "lines",
    ["X-Session-ID: a b\n", "X-Session-ID: \xe9\n", f"X-Session-ID: {'s' * 129}\n", "X-Session-ID: \n",
     "X-Session-ID: key:mine\n", "X-Session-ID: a\nX-Session-ID: b\n"],
)  # fmt: skip
def test_a_hostile_session_id_is_a_400(wire: Wire, lines: str) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1})
    reply = wire.send(request(body, "/v1/completions", headers=AUTHORIZED + lines)).reply()
    assert reply.error["param"].lower().replace("-", "_").endswith("session_id")
    assert reply.status == 400


# -- bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
def test_too_large_a_body_is_413_declared_or_not(locked: Served, path: str) -> None:
    with Wire(locked.port) as wire:
        head = f"POST {path} HTTP/1.1\nHost: x\n{AUTHORIZED}Content-Type: application/json\n"
        refused(wire.send(f"{head}Content-Length: {BODY + 1}\n\n").reply(), 413, "request_too_large")
    with Wire(locked.port) as wire:
        wire.send(f"{head}Transfer-Encoding: chunked\n\n")
        chunk = f"2000\r\n{'x' * 0x2000}\r\n".encode()
        for _ in range(BODY // 0x2000 + 1):
            wire.send(chunk)
        refused(wire.reply(), 413, "request_too_large")


@pytest.mark.parametrize(
    ("lines", "rest"),
    [("Content-Length: 7\nContent-Length: 8\n", "{}"), ("Content-Length: 2\nTransfer-Encoding: chunked\n", "{}"),
     ("Content-Length: -2\n", "{}"), ("Content-Length: 0x2\n", "{}"), ("Transfer-Encoding: chunked, identity\n", "{}"),
     ("Transfer-Encoding: chunked\n", "zz\n{}\n0\n\n")],
)  # fmt: skip
def test_a_length_that_lies_is_a_400(wire: Wire, lines: str, rest: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\nHost: x\n{AUTHORIZED}Content-Type: application/json\n{lines}\n"
    assert wire.send(head + rest).reply().status == 400
    assert wire.ended()


@pytest.mark.parametrize(
    "text", ["POST", f"POST {CHAT} HTTP/1.1\nHost: x\nX", f"POST {CHAT} HTTP/1.1\nHost: x\n{AUTHORIZED}"
             "Content-Type: application/json\nContent-Length: 50\n\n{",
             f"POST {CHAT} HTTP/1.1\nHost: x\n{AUTHORIZED}Content-Type: application/json\n"
             "Transfer-Encoding: chunked\n\n1\n{\n"],
)  # fmt: skip
def test_what_never_arrives_is_a_408(wire: Wire, text: str) -> None:
    refused(wire.send(text).reply(), 408, "request_timeout")


def of(value: bytes, field: bytes = b"temperature") -> bytes:
    """A chat with one more field, as bytes."""
    return b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"max_tokens":1,"' + field + b'":' + value + b"}"


NO_JSON = [
    b"", b" ", b"\x00", b"{", b"}", b"{}{}", b"{}x", b"[1,]", b"{'a': 1}", b"\xef\xbb\xbf{}", b"{}\x00",
    '{"a": 1}'.encode("utf-16"), b"// x\n{}", of(b"NaN"), of(b"Infinity"), of(b"-Infinity"), of(b"1e999"), of(b"01"),
    of(b"0x1"), of(b"1_000"), of(b"+1"), of(b".5"), of(b"1e", b"top_p"), of(b"9" * 19, b"seed"),
    of(b"9" * 5000, b"max_tokens2"), of(b"-" + b"9" * 300, b"seed"), of(b"1, \"top_p\": 1, \"top_p\": 1"),
    of(b'"\\ud800"', b"stop"), of(b'"\\udc00\\ud800"', b"user"), of(b'"\xff"', b"stop"), of(b'"\xc0\xaf"', b"stop"),
    of(b'"\xed\xa0\x80"', b"stop"), of(b'"\\x41"', b"stop"), of(b'"\\u12"', b"stop"), of(b'"a\nb"', b"stop"),
    of(b'{"\\ud800": 1}', b"logit_bias"), of(b"[" * 40 + b"]" * 40, b"stop"), b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1),
    b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), b"[" * 60_000, b'{"a":' * 10_000, b'["' + b'\\"' * 30_000,
]  # fmt: skip


@pytest.mark.parametrize("body", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_is_a_400(wire: Wire, body: bytes) -> None:
    reply = wire.send(request(body)).reply()
    if reply.status == 413:  # too many values is said before too deep
        assert body.count(b"[") + body.count(b":") > ITEMS / 2
        return
    error = refused(reply, 400, "invalid_json")
    assert len(error["message"]) < 250


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("body", ["null", "true", "1", '"x"', "[]", "[{}]"])
def test_what_is_no_object_is_a_400(wire: Wire, path: str, body: str) -> None:
    refused(wire.send(request(body, path)).reply(), 400, "invalid_value")


@pytest.mark.parametrize("body", [of(b"[" + b"1," * ITEMS + b"1]", b"stop"),
                                  json.dumps({f"k{n}": n for n in range(ITEMS)}).encode()])  # fmt: skip
def test_floods_of_values_and_keys_are_413(wire: Wire, body: bytes) -> None:
    refused(wire.send(request(body)).reply(), 413, "request_too_large")


def test_a_flood_of_unknown_keys_names_one(wire: Wire) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]} | {f"k{n}": n for n in range(500)}
    error = refused(wire.send(request(json.dumps(body))).reply(), 400, "unknown_parameter")
    assert error["param"] == "k0"
    assert len(error["message"]) < 200


def test_small_answers_are_not_held_back(locked: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TCP_NODELAY each answer on a connection that is kept waits 40 ms for the client's acknowledgement."""
    found: list[int] = []
    made = GuardedProtocol.connection_made

    def noted(self: GuardedProtocol, transport: Any) -> None:
        made(self, transport)
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(GuardedProtocol, "connection_made", noted)
    with Wire(locked.port) as wire:
        assert wire.send("GET /health HTTP/1.1\nHost: x\n\n").reply().status == 200
    assert found == [1]
