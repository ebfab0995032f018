"""As much of S3 as obstore speaks to a bucket, on loopback; it can be told to answer a status, or not at all."""

import contextlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_DATE = "2026-01-01T00:00:00.000Z"
_ITEM = f"<Contents><Key>{{}}</Key><LastModified>{_DATE}</LastModified><ETag>e</ETag><Size>{{}}</Size></Contents>"
_LIST = "<ListBucketResult>{}<IsTruncated>false</IsTruncated></ListBucketResult>"


class S3Server:
    """One bucket. `status` other than 0 answers every request; `hang` answers none until it is closed."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # "METHOD path"
        self.status = 0
        self.hang = False
        self.most_at_once = 0
        self.connections: list[socket.socket] = []
        self._at_once = 0
        self._mutex = threading.Lock()
        self._ends = threading.Event()
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = False  # so that closing waits for them
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Let go what hangs, and stop."""
        self._ends.set()
        self._server.shutdown()
        self._thread.join()
        for connection in self.connections:  # clients keep them for the next request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()

    def answer(self, method: str, target: str, span: str | None, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers for one request."""
        with self._mutex:
            self.requests.append(f"{method} {target}")
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if self.hang:
                self._ends.wait(2)
            if self.status:
                return self.status, b"", {}
            return self._answer(method, target, span, body)
        finally:
            with self._mutex:
                self._at_once -= 1

    def _answer(self, method: str, target: str, span: str | None, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        url = urlsplit(target)
        name = unquote(url.path).partition("/bucket")[2].removeprefix("/")
        if method == "GET" and "list-type" in url.query:
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            items = [
                _ITEM.format(key, len(data)) for key, data in sorted(self.objects.items()) if key.startswith(prefix)
            ]
            return 200, _LIST.format("".join(items)).encode(), {}
        if method == "POST":
            keys = re.findall("<Key>(.*?)</Key>", body.decode())
            for key in keys:
                self.objects.pop(key, None)
            items = [f"<Deleted><Key>{key}</Key></Deleted>" for key in keys]
            return 200, f"<DeleteResult>{''.join(items)}</DeleteResult>".encode(), {}
        if method == "PUT":
            self.objects[name] = body
            return 200, b"", {"ETag": '"e"'}
        data = self.objects.get(name)
        if data is None:
            return 404, b"", {}
        headers = {"ETag": '"e"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if span is None:
            return 200, data, headers
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups()  # type: ignore[union-attr]
        start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        if start >= len(data):
            return 416, b"", {}
        return 206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: S3Server

    def setup(self) -> None:
        super().setup()
        self.bucket.connections.append(self.connection)

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, data, headers = self.bucket.answer(self.command, self.path, self.headers.get("Range"), body)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
        except OSError:
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
