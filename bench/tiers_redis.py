"""Redis tier against a raw socket on the same server in the same run: records of 1 to 4 MiB, read and written.

`python bench/tiers_redis.py` starts a redis-server of its own on a free loopback port, without persistence. Sides are
interleaved; speeds are medians over the repeats, and so are ratios, each of one repeat. The raw side does the least
that a client can: it sends the command, receives into one buffer that is used again, checks nothing and has no
deadline.
"""

import argparse
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from statistics import median
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory

import numpy as np

from kvwise.tiers.base import Extent
from kvwise.tiers.record import Header, seal
from kvwise.tiers.redis import RedisStore
from machine import write_results

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
GATE = 0.5  # of the raw socket, reading and writing one record at a time; the aim is 0.7
NUM_LAYERS = 16


class RawSocket:
    """GET and SET over a plain socket."""

    def __init__(self, port: int, num_bytes: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._frame = len(b"$%d\r\n" % num_bytes) + num_bytes + 2
        self._buffer = memoryview(bytearray(self._frame))

    def get(self, name: bytes) -> None:
        """Receive one value."""
        self._socket.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name))
        got = 0
        while got < self._frame:
            got += self._socket.recv_into(self._buffer[got:])

    def set(self, name: bytes, record: memoryview) -> None:
        """Send one value and wait until it is taken."""
        self._socket.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(record)))
        self._socket.sendall(record)
        self._socket.sendall(b"\r\n")
        if self._socket.recv(64) != b"+OK\r\n":
            raise OSError("the server refused a SET")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@contextmanager
def redis_server() -> Iterator[int]:
    """A server of its own; gives its port. RuntimeError if there is none on this machine or it does not start."""
    program = which("redis-server") or which("valkey-server")
    if program is None:
        raise RuntimeError("no redis-server or valkey-server on this machine (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with TemporaryDirectory() as folder:
        settings = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        process = Popen([program, *settings], stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        try:
            _await(port, process)
            yield port
        finally:
            process.kill()
            process.wait()


def measure(port: int, num_bytes: int, *, num_records: int = 8, repeats: int = 9) -> list[dict[str, object]]:
    """Rows of GET and SET at one record size: GB/s of the raw socket and of the store, one by one and in a batch."""
    records = [_record(number, num_bytes) for number in range(num_records)]
    blobs = [memoryview(b"".join(pieces)) for _, pieces in records]
    extents = [Extent(key) for key, _ in records]
    names = [b"kvwise:" + key.hex().encode() for key, _ in records]
    raw = RawSocket(port, len(blobs[0]))
    store = RedisStore(f"redis://127.0.0.1:{port}", timeout_s=30.0)
    sides: dict[str, dict[str, Callable[[], object]]] = {
        "SET": {
            "raw": lambda: [raw.set(name, blob) for name, blob in zip(names, blobs, strict=True)],
            "store": lambda: [_sound(store.write([record])) for record in records],
            "store, batch": lambda: _sound(store.write(records)),
        },
        "GET": {
            "raw": lambda: [raw.get(name) for name in names],
            "store": lambda: [_sound(store.read([extent])) for extent in extents],
            "store, batch": lambda: _sound(store.read(extents)),
        },
    }
    try:
        total = sum(map(len, blobs))
        return [_row(what, num_bytes, each, total, repeats) for what, each in sides.items()]
    finally:
        raw.close()
        store.close()


def table(rows: list[dict[str, object]]) -> str:
    """The rows as text."""
    lines = [f"{'':4} {'record':>8} {'raw GB/s':>9} {'store':>7} {'ratio':>6} {'batch':>7} {'ratio':>6}"]
    for row in rows:
        size = f"{int(str(row['record_bytes'])) / MIB:g} MiB"
        lines.append(
            f"{row['what']:4} {size:>8} {row['raw']:9.2f} {row['store']:7.2f} {row['ratio']:6.2f}"
            f" {row['store, batch']:7.2f} {row['ratio, batch']:6.2f}"
        )
    return "\n".join(lines)


def run(repeats: int) -> list[dict[str, object]]:
    """Rows of all sizes, on a server of its own."""
    with redis_server() as port:
        return [row for size in (MIB, 2 * MIB, 4 * MIB) for row in measure(port, size, repeats=repeats)]


def _row(
    what: str, num_bytes: int, sides: dict[str, Callable[[], object]], total: int, repeats: int
) -> dict[str, object]:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, go in sides.items():
            start = time.perf_counter()
            go()
            if repeat:  # the first is a warm-up
                seconds[side].append(time.perf_counter() - start)
    speed = {side: total / median(each) / 1e9 for side, each in seconds.items()}
    # Of neighbours in time: the machine may change its pace in the middle.
    ratios = {
        name: median(raw / own for raw, own in zip(seconds["raw"], seconds[side], strict=True))
        for name, side in (("ratio", "store"), ("ratio, batch", "store, batch"))
    }
    return {"what": what, "record_bytes": num_bytes, **speed, **ratios}


def _record(number: int, num_bytes: int) -> tuple[bytes, list[memoryview | bytes]]:
    """A record of about so many bytes, one segment a layer, keys and values in pieces of their own."""
    rng = np.random.default_rng(number)
    key = rng.bytes(32)
    body = memoryview(rng.bytes(num_bytes))
    half = num_bytes // NUM_LAYERS // 2
    halves = [body[i * half : (i + 1) * half] for i in range(2 * NUM_LAYERS)]
    header = Header(key, bytes(32), bytes(32), "raw", 16, number, 0.0)
    return key, seal(header, [(halves[2 * i], halves[2 * i + 1]) for i in range(NUM_LAYERS)])  # type: ignore[return-value]


def _sound(answers: list[object]) -> None:
    for answer in answers:
        if not (answer is None or isinstance(answer, memoryview)):
            raise RuntimeError(f"the store answered {answer}")


def _await(port: int, process: "Popen[bytes]") -> None:
    until = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < until:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as sock:
                sock.sendall(b"*1\r\n$4\r\nPING\r\n")
                if sock.recv(16).startswith(b"+PONG"):
                    return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError(f"redis-server does not start on port {port}")


def main() -> None:
    """Print the table; exit 1 below the gate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}/tiers_redis.json")
    arguments = parser.parse_args()
    rows = run(arguments.repeats)
    print(table(rows))
    if arguments.save:
        write_results(RESULTS / "tiers_redis.json", rows, seed=0, gate=GATE)
    slow = [row for row in rows if float(str(row["ratio"])) < GATE]
    if slow:
        raise SystemExit(f"below {GATE} of a raw socket: {', '.join(str(row['what']) for row in slow)}")


if __name__ == "__main__":
    main()
