"""Server-sent events, cut out of bytes as they arrive, however they are split."""

from kvwise.core.errors import RequestError

MAX_EVENT = 16 << 20


class EventReader:
    """Takes bytes, gives the data of each event that they complete (WHATWG HTML, 9.2.6). Only data is kept."""

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a line
        self._data: list[bytes] = []  # of the event that is not complete yet
        self._size = 0
        self._after_return = False  # a line feed that comes first belongs to the line before

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events that end in these bytes. RequestError if one grows beyond all measure."""
        if not data:
            return []
        if self._after_return and data[0] == 10:
            data = data[1:]
        self._after_return = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], 0
        if self._size + len(self._rest) > MAX_EVENT:
            raise RequestError(f"an event of the stream is longer than {MAX_EVENT} bytes")
        return events
