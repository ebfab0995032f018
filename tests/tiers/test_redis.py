"""Redis as a tier: what its server, the network or a stranger does wrong ends as a fault of that item, in time."""

import builtins
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from kvwise.core.clock import VirtualClock
from kvwise.core.errors import UsageError
from kvwise.tiers.base import Extent, Fault, FaultKind
from kvwise.tiers.breaker import Breaker, BreakerState
from kvwise.tiers.record import read_header, seal
from kvwise.tiers.redis import RedisStore
from kvwise.tiers.resp import Wire, command, command_in_pieces
from tests.tiers.fault_proxy import FaultProxy
from tests.tiers.redis_server import RedisServer, free_port, shared_server
from tests.tiers.samples import header_of, key_of, pieces_of, record_of

SOON_S = 0.08  # a deadline that tests wait for


@pytest.fixture
def server() -> RedisServer:
    """A running server that is empty. Do not change its settings."""
    server = shared_server()
    server.say("FLUSHALL")
    return server


@pytest.fixture
def own() -> Iterator[Callable[..., RedisServer]]:
    """`own(*settings)`: a server that may be killed and changed."""
    servers: list[RedisServer] = []

    def make(*settings: str) -> RedisServer:
        servers.append(RedisServer(*settings))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisStore]]:
    """`connect(url)`: a store that is closed when the test ends."""
    stores: list[RedisStore] = []

    def make(url: str, **settings: Any) -> RedisStore:
        stores.append(RedisStore(url, **settings))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def far(proxy: FaultProxy, connect: Callable[..., RedisStore]) -> RedisStore:
    """A store behind the proxy, connected, with records 1, 2 and 3, and a short deadline."""
    store = connect(f"redis://127.0.0.1:{proxy.port}", timeout_s=5.0)
    put(store, 1, 2, 3)
    store._timeout_s = SOON_S
    return store


def put(store: RedisStore, *numbers: int) -> None:
    assert store.write([(key_of(n), pieces_of(n)) for n in numbers]) == [None] * len(numbers)


def get(store: RedisStore, *numbers: int) -> list[bytes | FaultKind]:
    answers = store.read([Extent(key_of(n)) for n in numbers])
    return [a.kind if isinstance(a, Fault) else bytes(a) for a in answers]


def name_of(number: int) -> str:
    return f"kvwise:{key_of(number).hex()}"


def kinds(faults: list[Fault | None]) -> list[FaultKind | None]:
    return [fault and fault.kind for fault in faults]


# -- the network


def test_a_server_that_hangs_is_late_and_the_next_call_starts_afresh(far: RedisStore, proxy: FaultProxy) -> None:
    proxy.fault = "silent"
    began = time.monotonic()
    assert get(far, 1, 2) == [FaultKind.LATE] * 2
    assert time.monotonic() - began < 2  # an order of magnitude more than the deadline: any machine keeps that
    assert kinds(far.write([(key_of(4), pieces_of(4))])) == [FaultKind.LATE]
    assert kinds(far.delete([key_of(1)], wipe=True)) == [FaultKind.LATE]
    assert list(far.scan()) == []
    proxy.fault = ""
    far._timeout_s = 5.0
    assert get(far, 1, 2) == [record_of(1), record_of(2)]


def test_a_server_that_takes_nothing_in_is_late_too(connect: Callable[..., RedisStore]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the system answers the handshake, nobody reads
        store = connect(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout_s=SOON_S)
        assert kinds(store.write([(key_of(1), pieces_of(1, 8, 2 << 20))])) == [FaultKind.LATE]


def test_one_byte_a_packet_is_read_right(far: RedisStore, proxy: FaultProxy) -> None:
    far._timeout_s = 5.0
    proxy.fault = "drip"
    assert get(far, 1, 9, 2) == [record_of(1), FaultKind.MISSING, record_of(2)]
    assert {read_header(view).key for view in far.scan()} == {key_of(n) for n in (1, 2, 3)}


def test_a_byte_now_and_then_does_not_move_the_deadline(far: RedisStore, proxy: FaultProxy) -> None:
    """Each packet comes in time, all of them together never would."""
    proxy.fault, proxy.pause_s = "drip", SOON_S / 8
    began = time.monotonic()
    assert get(far, 1) == [FaultKind.LATE]
    assert len(proxy.answers) > 800  # the server answered; at this pace it would take eight seconds
    proxy.close()
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("how", ["reset", "close"])
def test_a_connection_that_breaks_in_an_answer_takes_only_the_rest_along(
    far: RedisStore, proxy: FaultProxy, how: str
) -> None:
    far._timeout_s = 5.0
    proxy.fault, proxy.after = how, len(record_of(1)) + 100
    # Used before, so that it is replaced once: and breaks again, at once.
    assert get(far, 1, 2, 3) == [record_of(1), FaultKind.IO_ERROR, FaultKind.IO_ERROR]
    proxy.fault = ""
    assert get(far, 1, 2, 3) == [record_of(n) for n in (1, 2, 3)]


GARBAGE = [
    b"HTTP/1.1 400 Bad Request\r\n\r\n",
    b"$99999999999\r\n" + bytes(100),
    b"$70000000\r\n" + bytes(100),
    b"$12x\r\n",
    b"$-7x\r\n",
    b"$3\r\nabcdef\r\n",
    b"*1000000\r\n",
    b"*1\r\n" * 5000,
    b"*3\r\n$5000\r\n" + bytes(5000),
    b":5\r\n" * 10,
    b"+OK\r\n" * 10,
    b"$-1\r\n" * 10,
    bytes(9000),
    b":" + b"9" * 4050 + b"\r\n" + bytes(5000),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: repr(g[:14]))
def test_what_is_no_answer_is_corrupt(far: RedisStore, proxy: FaultProxy, garbage: bytes) -> None:
    far._timeout_s = 5.0
    proxy.fault, proxy.garbage = "garbage", garbage
    assert get(far, 1) == [FaultKind.CORRUPT]
    proxy.fault = ""
    assert get(far, 9) in ([FaultKind.MISSING], [FaultKind.CORRUPT])  # answers that fit may still be under way
    far._pool._drop(far._pool._take(time.monotonic() + 5)[0])
    assert get(far, 1, 9) == [record_of(1), FaultKind.MISSING]


def test_garbage_is_no_scan(far: RedisStore, proxy: FaultProxy) -> None:
    for garbage in (b"*0\r\n", b"*2\r\n:5\r\n*0\r\n", b"*2\r\n$1\r\n0\r\n$1\r\n0\r\n", b"-ERR no\r\n"):
        proxy.fault, proxy.garbage = "garbage", garbage
        assert list(far.scan()) == []
        assert far.num_bytes() == 0


def test_a_close_ends_calls_under_way(far: RedisStore, proxy: FaultProxy) -> None:
    proxy.fault = "silent"
    far._timeout_s = 60.0
    got: list[Any] = []
    reader = threading.Thread(target=lambda: got.extend(get(far, 1, 2)))
    asked = len(proxy.requests)
    reader.start()
    while len(proxy.requests) == asked:
        time.sleep(0.001)
    far.close()
    reader.join(5)
    assert got == [FaultKind.OFF] * 2


def test_threads_have_connections_of_their_own_and_few_are_kept(far: RedisStore, proxy: FaultProxy) -> None:
    far._timeout_s = 20.0
    wrong = []

    def work(number: int) -> None:
        for _ in range(5):
            if get(far, number, 9) != [record_of(number), FaultKind.MISSING]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not far._pool._busy
    assert 1 <= len(far._pool._idle) <= 8
    far._timeout_s, proxy.fault = SOON_S, "silent"
    assert get(far, 1) == [FaultKind.LATE]
    assert far._pool._idle == []  # the others would only be late one after another


def test_a_socket_that_takes_little_at_a_time_gets_every_byte_once(server: RedisServer) -> None:
    class Meagre(socket.socket):
        def sendmsg(self, buffers: Any, *_: Any) -> int:
            return self.send(b"".join(buffers)[:997])

    with socket.create_connection(("127.0.0.1", server.port)) as plain:
        wire = Wire(Meagre(fileno=plain.detach()))
    value = record_of(1, 3, 5000)
    pieces = [value[:4], value[4:9000], b"", value[9000:]]
    answers: list[Any] = []
    commands = [command_in_pieces([[b"SET"], [b"x"], pieces]), command(b"GET", b"x")]
    wire.exchange(commands, answers, deadline=time.monotonic() + 5, max_bytes=len(value))
    wire.close()
    assert answers == ["OK", value]


# -- the server goes and comes back


def test_killed_and_restarted_it_is_empty_and_works(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore]
) -> None:
    server = own()
    store = connect(server.url)
    put(store, 1)
    server.kill()
    assert get(store, 1) == [FaultKind.IO_ERROR]
    assert kinds(store.write([(key_of(2), pieces_of(2))])) == [FaultKind.IO_ERROR]
    assert list(store.scan()) == []
    server.start()
    assert get(store, 1) == [FaultKind.MISSING]
    put(store, 1)
    assert get(store, 1) == [record_of(1)]


def test_a_restart_between_two_calls_is_not_even_a_fault(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore]
) -> None:
    server = own()
    store = connect(server.url)
    put(store, 1)
    for again in (lambda: get(store, 1) == [FaultKind.MISSING], lambda: put(store, 2) is None):
        server.kill()
        server.start()
        assert again()
    assert get(store, 2) == [record_of(2)]


def test_a_breaker_leaves_a_dead_server_alone_and_finds_it_again(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore]
) -> None:
    server = own()
    store = connect(server.url)
    clock = VirtualClock()
    breaker = Breaker("redis", clock, max_failures=3, backoff_s=1.0)

    def look() -> FaultKind | None:
        if not breaker.allows():
            return FaultKind.OFF
        (answer,) = store.read([Extent(key_of(1))])
        if isinstance(answer, Fault):
            breaker.failure(answer)
            return answer.kind
        breaker.success()
        return None

    put(store, 1)
    assert look() is None
    server.kill()
    assert [look() for _ in range(5)] == [FaultKind.IO_ERROR] * 3 + [FaultKind.OFF] * 2
    clock.advance(1.0)
    assert [look(), look()] == [FaultKind.IO_ERROR, FaultKind.OFF]  # the probe failed: 2 s from now
    server.start()
    clock.advance(1.0)
    assert look() == FaultKind.OFF
    clock.advance(1.0)
    assert look() == FaultKind.MISSING
    assert breaker.state is BreakerState.CLOSED
    put(store, 1)
    assert look() is None


# -- what the server refuses


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_out_of_memory_is_full_and_said_once(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore], caplog: pytest.LogCaptureFixture
) -> None:
    server = own("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    store = connect(server.url)
    put(store, 1)
    for start in (100, 200):
        faults = store.write([(key_of(n), pieces_of(n, 2, 200_000)) for n in range(start, start + 12)])
        assert {fault.kind for fault in faults if fault} == {FaultKind.FULL}
    assert get(store, 1) == [record_of(1)]
    (line,) = said(caplog)
    assert "OOM" in line
    assert "maxmemory" in line
    # It will not take the zeros of a wipe either: deleted all the same, and the purge must know.
    (fault,) = store.delete([key_of(1)], wipe=True)
    assert str(fault) == "full: not overwritten: refused: OOM"
    assert get(store, 1) == [FaultKind.MISSING]
    server.say("FLUSHALL")
    put(store, 300)


def test_a_replica_is_full_for_writes(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore], caplog: pytest.LogCaptureFixture
) -> None:
    server = own()
    store = connect(server.url)
    put(store, 1)
    server.say("REPLICAOF", "127.0.0.1", "1")
    for _ in range(3):
        assert kinds(store.write([(key_of(2), pieces_of(2))])) == [FaultKind.FULL]
        assert get(store, 1) == [record_of(1)]
    assert kinds(store.delete([key_of(1)])) == [FaultKind.FULL]
    assert ["READONLY" in line for line in said(caplog)] == [True]


def test_a_password_lets_in_and_is_never_told(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret, wrong = "open sesame/1", "close%20sesame"
    server = own("--requirepass", secret)
    at = f"127.0.0.1:{server.port}"
    store = connect(f"redis://:open%20sesame%2F1@{at}/3")
    put(store, 1)
    assert get(store, 1) == [record_of(1)]
    faults = []
    for url in (f"redis://{at}", f"redis://:{wrong}@{at}", f"redis://default:{wrong}@{at}/3"):
        refused = connect(url)
        for _ in range(2):
            (fault,) = refused.write([(key_of(2), pieces_of(2))])
            faults.append(fault)
            assert get(refused, 1) == [FaultKind.IO_ERROR]
    assert {fault.kind for fault in faults if fault} == {FaultKind.IO_ERROR}
    told = " ".join([*map(str, faults), repr(store), repr(vars(store)), caplog.text])
    assert "sesame" not in told
    assert "NOAUTH" in caplog.text
    assert "WRONGPASS" in caplog.text
    assert len(said(caplog)) == 3  # once for each store


def test_the_database_of_the_url_is_used(server: RedisServer, connect: Callable[..., RedisStore]) -> None:
    base = f"redis://127.0.0.1:{server.port}"
    put(connect(f"{base}/5"), 1)
    assert get(connect(f"{base}/5?client_name=kv"), 1) == [record_of(1)]
    assert get(connect(f"{base}/4"), 1) == [FaultKind.MISSING]
    assert get(connect(f"{base}/99"), 1) == [FaultKind.IO_ERROR]


# -- what lies under our keys


def test_a_huge_value_is_refused_before_it_is_received(
    server: RedisServer, proxy: FaultProxy, connect: Callable[..., RedisStore]
) -> None:
    store = connect(f"redis://127.0.0.1:{proxy.port}", max_record_bytes=10_000)
    server.say("SETRANGE", name_of(1), str(8 << 20), "x")
    put(store, 2)
    extents = [Extent(key_of(1)), Extent(key_of(2)), Extent(key_of(1), 0, 1 << 40), Extent(key_of(1), 5000)]
    answers = store.read([*extents, Extent(key_of(1), 64, 128)])
    refused = Fault(FaultKind.CORRUPT, "a value of more than 10000 bytes")
    assert answers[0] == answers[2] == answers[3] == refused
    assert bytes(answers[1]) == record_of(2)
    assert bytes(answers[4]) == bytes(64)
    assert len(proxy.answers) < 40_000
    assert kinds(store.write([(key_of(3), pieces_of(3, 2, 8000))])) == [FaultKind.FULL]
    assert store.delete([key_of(1)], wipe=True) == [None]
    assert get(store, 1) == [FaultKind.MISSING]


def test_another_type_under_a_key_is_corrupt(
    server: RedisServer, connect: Callable[..., RedisStore], caplog: pytest.LogCaptureFixture
) -> None:
    store = connect(server.url)
    put(store, 1)
    server.say("RPUSH", name_of(2), "a")
    assert get(store, 2, 1) == [FaultKind.CORRUPT, record_of(1)]
    assert store.read([Extent(key_of(2), 5, 9)])[0] == Fault(FaultKind.CORRUPT, "refused: WRONGTYPE")
    assert len(said(caplog)) == 1
    assert store.delete([key_of(2)], wipe=True) == [None]
    server.say("RPUSH", name_of(2), "a")
    put(store, 2)
    assert get(store, 2) == [record_of(2)]


def test_a_scan_removes_what_is_no_record_and_nothing_else(
    server: RedisServer, connect: Callable[..., RedisStore]
) -> None:
    store = connect(server.url)
    put(store, 1, 2)
    short, moved, flipped = record_of(3)[:-64], record_of(4), bytearray(record_of(5))
    flipped[100] ^= 1
    server.say("SET", name_of(3), short)
    server.say("SET", name_of(9), moved)
    server.say("SET", name_of(5), bytes(flipped))
    server.say("SET", name_of(6), "x")
    server.say("SADD", name_of(7), "x")
    strangers = ["kvwise:", "kvwise:other:" + key_of(8).hex(), "kvwise:" + key_of(8).hex().upper(), "other"]
    for stranger in strangers:
        server.say("SET", stranger, "mine")
    assert {read_header(view).key for view in store.scan()} == {key_of(1), key_of(2)}
    assert server.say("DBSIZE") == b":%d\r\n" % (2 + len(strangers))
    assert store.num_bytes() == len(record_of(1)) + len(record_of(2))


def test_prefixes_part_stores_even_if_they_look_like_patterns(
    server: RedisServer, connect: Callable[..., RedisStore]
) -> None:
    odd = ["a*:", "a?:", "[ab]:", "a\\:", "ab:", "a^-:", ""]
    stores = [connect(server.url, prefix=prefix) for prefix in odd]
    for number, store in enumerate(stores):
        put(store, number)
    for number, store in enumerate(stores):
        assert [read_header(view).key for view in store.scan()] == [key_of(number)]


def test_an_extent_of_nothing_tells_whether_the_record_is_there(
    server: RedisServer, connect: Callable[..., RedisStore]
) -> None:
    store = connect(server.url)
    put(store, 1)
    for start, stop in ((0, 0), (5, 5), (7, 3), (10_000, None), (10_000, 10_001)):
        there, absent = store.read([Extent(key_of(1), start, stop), Extent(key_of(2), start, stop)])
        assert there == b""
        assert absent == Fault(FaultKind.MISSING)


def test_a_scan_gives_long_headers_and_nothing_twice(
    server: RedisServer, connect: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connect(server.url)
    numbers = range(600)
    put(store, *numbers)
    assert store.write([(key_of(1), pieces_of(1, 300, 10))]) == [None]
    real, steps = store._pool.ask, []

    def repeating(commands: Any, *args: Any, **kwargs: Any) -> Any:
        """As while the server grows its table: the first name comes again and again."""
        answers = real(commands, *args, **kwargs)
        if answers and isinstance(answers[0], list):
            steps.append(answers[0][1])
            answers[0][1] = [*answers[0][1], steps[0][0], steps[0][0]]
        return answers

    monkeypatch.setattr(store._pool, "ask", repeating)
    headers = [read_header(view) for view in store.scan()]
    assert len(steps) > 1
    assert sorted(header.key for header in headers) == sorted(key_of(n) for n in numbers)
    assert max(len(header.segments) for header in headers) == 300


def test_many_records_come_in_batches(server: RedisServer, connect: Callable[..., RedisStore]) -> None:
    store = connect(server.url)
    numbers = range(700)
    put(store, *numbers)
    assert get(store, *numbers) == [record_of(n) for n in numbers]
    assert sorted(read_header(view).key for view in store.scan()) == sorted(key_of(n) for n in numbers)
    assert store.num_bytes() == sum(len(record_of(n)) for n in numbers)


# -- time and purging


def test_redis_forgets_a_record_when_it_expires(server: RedisServer, connect: Callable[..., RedisStore]) -> None:
    store = connect(server.url, wall=lambda: 1000.0)
    for number, expires_at in ((1, 1600.0), (2, inf), (3, 1e17)):
        record = seal(header_of(number, expires_at=expires_at), [(b"x" * 100,)])
        assert store.write([(key_of(number), record)]) == [None]
    left_ms = int(server.say("PTTL", name_of(1))[1:])
    assert 590_000 < left_ms <= 600_000
    assert server.say("PTTL", name_of(2)) == server.say("PTTL", name_of(3)) == b":-1\r\n"
    due = seal(header_of(1, expires_at=999.0), [(b"x" * 100,)])  # it replaces the one that had time left
    assert store.write([(key_of(1), due)]) == [None]
    time.sleep(0.01)
    assert get(store, 1) == [FaultKind.MISSING]


def test_a_record_without_a_header_is_refused(server: RedisServer, connect: Callable[..., RedisStore]) -> None:
    store = connect(server.url)
    faults = store.write([(key_of(1), [b"no header at all"]), (key_of(2), []), (key_of(3), pieces_of(3))])
    assert kinds(faults) == [FaultKind.CORRUPT, FaultKind.CORRUPT, None]


def test_a_wipe_overwrites_every_byte_before_it_deletes(server: RedisServer, proxy: FaultProxy) -> None:
    store = RedisStore(f"redis://127.0.0.1:{proxy.port}")
    assert store.wipes
    put(store, 1, 2)
    sent = len(proxy.requests)
    assert store.delete([key_of(1)], wipe=True) == [None]
    store.close()
    told = bytes(proxy.requests[sent:])
    size = len(record_of(1))
    name = name_of(1).encode()
    zeros = b"SETRANGE\r\n$71\r\n%b\r\n$1\r\n0\r\n$%d\r\n%b\r\n" % (name, size, bytes(size))
    assert 0 < told.index(zeros) < told.index(b"DEL\r\n$71\r\n" + name)


# -- where it connects


def test_a_unix_socket_will_do(server: RedisServer, connect: Callable[..., RedisStore]) -> None:
    store = connect(f"unix://{server.socket_path}")
    put(store, 1)
    assert get(store, 1) == [record_of(1)]
    assert repr(store) == f"RedisStore({server.socket_path}, prefix='kvwise:')"


def test_tls_by_the_scheme_of_the_url(
    own: Callable[..., RedisServer], connect: Callable[..., RedisStore], tmp_path: Path
) -> None:
    if which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(["openssl", "req", "-x509", "-nodes", *curve, *made], check=True, capture_output=True)
    port = free_port()
    own("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key),
        "--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no")  # fmt: skip
    store = connect(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}")
    pieces = pieces_of(1, 4, 300_000)
    assert store.write([(key_of(1), pieces), (key_of(2), pieces_of(2))]) == [None, None]
    assert get(store, 1, 2) == [b"".join(pieces), record_of(2)]
    stranger = connect(f"rediss://127.0.0.1:{port}")  # the system does not know this certificate
    assert get(stranger, 1) == [FaultKind.IO_ERROR]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://:sesame@h",
        "redis://:sesame@h:port",
        "redis://:sesame@h:99999999",
        "redis://:sesame@h?db=x",
        "redis://:sesame@h?no_such_option=1",
        "redis://:sesame@h?socket_timeout=3",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(UsageError, match=r"^redis: ") as refused:
        RedisStore(url)
    assert "sesame" not in str(refused.value)


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"timeout_s": 0.0}, {"timeout_s": inf}, {"max_record_bytes": 0}, {"prefix": "x" * 300}):
        with pytest.raises(UsageError, match="must be above 0"):
            RedisStore("redis://localhost", **settings)  # type: ignore[arg-type]


def test_without_redis_py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "redis" or name.startswith("redis."):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'kvwise\[redis\]'"):
        RedisStore("redis://localhost")
