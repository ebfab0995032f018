"""A TCP proxy on loopback that forwards to a server until it is told to misbehave."""

import contextlib
import socket
import struct
import threading
import time

_CHUNK = 1 << 16


class FaultProxy:
    """Forwards connections to `port`. Faults touch what the server answers, from the next bytes on.

    `faults` is one of: "" (forward), "silent" (swallow: a half-open connection or a hung server), "reset" (after
    `after` bytes of the answer, RST), "close" (the same with FIN), "drip" (one byte a packet, `pause_s` apart),
    "garbage" (`garbage` instead of the answer). `requests` and `answers` are all bytes that came from either side.
    """

    def __init__(self, port: int) -> None:
        self.fault = ""
        self.after = 0
        self.pause_s = 0.0
        self.garbage = b""
        self.requests = bytearray()
        self.answers = bytearray()
        self.num_connections = 0
        self._target = port
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def close(self) -> None:
        """End all connections and threads."""
        self._closed = True
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _start(self, work: object, *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))  # type: ignore[arg-type]
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self._sockets.append(client)
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                client.close()
                continue
            self._sockets.append(server)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._start(self._forward, client, server)
            self._start(self._answer, server, client)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(_CHUNK):
                self.requests += data
                server.sendall(data)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(_CHUNK):
                self.answers += data
                if not self._pass_on(data, client):
                    return
            client.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, data: bytes, client: socket.socket) -> bool:
        """Give the client what the fault leaves of the data; whether the connection goes on."""
        if self.fault == "silent":
            return True
        if self.fault == "drip":
            for i in range(len(data)):
                client.sendall(data[i : i + 1])
                if self.pause_s:
                    time.sleep(self.pause_s)
            return True
        if self.fault == "garbage":
            client.sendall(self.garbage)
            return True
        if self.fault in ("reset", "close"):
            client.sendall(data[: self.after])
            self.after = max(0, self.after - len(data))
            if self.after == 0:
                if self.fault == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.shutdown(socket.SHUT_RD)  # wakes the other thread, which would hold the socket open
                    client.close()
                else:
                    client.shutdown(socket.SHUT_RDWR)
                return False
            return True
        client.sendall(data)
        return True
