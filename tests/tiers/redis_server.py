"""A redis-server of our own on a free loopback port, without persistence; and a proxy before it that misbehaves."""

import atexit
import shutil
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest

_STARTS_WITHIN_S = 10.0
_SETTINGS = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--daemonize", "no", "--databases", "16")


class RedisServer:
    """A server in a folder of its own. `start` after `kill` takes the same port."""

    def __init__(self, *settings: str) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.skip("no redis-server or valkey-server on this machine (Debian: apt-get install redis-server)")
        self._program = program
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="kvwise-redis-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def socket_path(self) -> str:
        return str(Path(self._folder.name) / "redis.sock")

    def start(self) -> None:
        """Start it and wait until it answers."""
        paths = ("--dir", self._folder.name, "--unixsocket", self.socket_path)
        self._process = subprocess.Popen(
            [self._program, *_SETTINGS, "--port", str(self.port), *paths, *self._settings],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                if self.say("PING").startswith((b"+PONG", b"-NOAUTH")):
                    return
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"redis-server does not start on port {self.port}")
            time.sleep(0.005)

    def say(self, *words: str | bytes) -> bytes:
        """One command over a connection of its own; the first part of what comes back."""
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            sock.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(p), p) for p in parts))
            return sock.recv(1 << 16)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        self._folder.cleanup()


@cache
def shared_server() -> RedisServer:
    """One server for all tests of this process that do not kill it or change its settings; ask it to FLUSHALL."""
    server = RedisServer()
    atexit.register(server.close)
    return server


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
