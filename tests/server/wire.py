"""A client that says exactly what a test wants said, byte by byte."""

import json
import socket
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The envelope's content; fails if the reply is anything else."""
        document = json.loads(self.body)
        assert list(document) == ["error"]
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        found: dict[str, Any] = document["error"]
        return found


class Wire:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._rest = b""

    def send(self, text: str | bytes) -> Self:
        """Send, with line ends as HTTP wants them where the text has plain ones."""
        self.socket.sendall(text.replace("\n", "\r\n").encode("latin-1") if isinstance(text, str) else text)
        return self

    def reply(self, *, head_only: bool = False) -> Reply:
        """The next answer; fails if the connection ends before it is whole."""
        while b"\r\n\r\n" not in self._rest:
            self._read()
        head, self._rest = self._rest.split(b"\r\n\r\n", 1)
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = 0 if head_only else int(headers.get("content-length", 0))
        while len(self._rest) < length:
            self._read()
        body, self._rest = self._rest[:length], self._rest[length:]
        return Reply(int(first.split()[1]), headers, body)

    def ended(self) -> bool:
        """Waits: whether the server closes the connection without another word."""
        try:
            return not self._rest and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _read(self) -> None:
        part = self.socket.recv(65536)
        assert part, f"the connection ended after {self._rest!r}"
        self._rest += part

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
