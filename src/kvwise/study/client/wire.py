"""Sends requests over HTTP and measures their answers. aiohttp is imported by `open_wire`, where it is needed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from kvwise.core.errors import RequestError, UsageError
from kvwise.study.client.answer import Answer, AnswerReader, BadAnswer
from kvwise.study.client.options import Target
from kvwise.study.client.prompts import Prompt

if TYPE_CHECKING:
    import aiohttp

_MAX_CONTENT = 1 << 20  # bytes of an answer that is no stream
_AGAIN_S = 0.25  # between two looks whether the server is there


class Wire:
    """One server, over one pool of connections without a limit: what waits, waits at the server."""

    def __init__(self, http: "aiohttp.ClientSession", target: Target) -> None:
        self._http = http
        self.target = target
        self.model = target.model or ""

    def body(self, prompt: Prompt, max_tokens: int) -> bytes:
        """The body of a request. `extra_body` has the last word."""
        target = self.target
        fields: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if target.is_chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            fields |= {"messages": messages, "max_completion_tokens": max_tokens}
        else:
            fields |= {"prompt": prompt, "max_tokens": max_tokens}
        if target.ignore_eos:
            fields["ignore_eos"] = True
        return json.dumps(fields | dict(target.extra_body), separators=(",", ":")).encode()

    async def send(self, body: bytes, answer: Answer, session: str | None = None) -> None:
        """Send a request and fill in its answer; what goes wrong is noted there and never raised."""
        import aiohttp

        headers = {"X-Session-ID": session} if session else None
        answer.start = time.perf_counter()
        try:
            async with self._http.post(self.target.url, data=body, headers=headers) as response:
                answer.status = response.status
                if response.status == 200:
                    await self._read(response, answer)
                else:
                    await _refused(response, answer)
        except BadAnswer as error:
            answer.fail(error.kind, str(error))
        except RequestError as error:
            answer.fail("bad_answer", str(error))
        except TimeoutError:
            answer.fail("timeout", f"no end within {self.target.timeout_s:g} s")
        except aiohttp.ClientConnectorError as error:
            answer.fail("connection", str(error))
        except (aiohttp.ClientError, OSError) as error:
            answer.fail("disconnected", f"{type(error).__name__}: {error}")

    async def _read(self, response: "aiohttp.ClientResponse", answer: Answer) -> None:
        reader = AnswerReader(answer, is_chat=self.target.is_chat)
        async for data in response.content.iter_any():
            reader.feed(data, time.perf_counter())
        reader.end()

    async def find_model(self) -> None:
        """Wait until the server answers, and learn what to call its model. RequestError if it does not, or has none."""
        give_up = time.perf_counter() + self.target.ready_timeout_s
        while (why := await self.look()) is not None:
            if time.perf_counter() >= give_up:
                raise RequestError(why)
            await asyncio.sleep(_AGAIN_S)

    async def look(self) -> str | None:
        """Why the server cannot be used yet; None: it can. RequestError if it never will."""
        import aiohttp

        url = self.target.at("/v1/models")
        try:
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
                status, content = response.status, await _content(response)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return f"{self.target.base_url} does not answer: {error or type(error).__name__}"
        if status in (401, 403):
            raise RequestError(f"{url} says {status}: give a key with --api-key, or another one")
        if status >= 500:
            return f"{url} says {status}: the server is not ready"
        if not self.model:
            self.model = _first_model(content, status, url)
        return None


@asynccontextmanager
async def open_wire(target: Target) -> AsyncIterator[Wire]:
    """Connections to a server, closed at the end. UsageError if aiohttp is not installed."""
    try:
        import aiohttp
    except ImportError as error:
        raise UsageError("kvwise bench needs aiohttp: pip install 'kvwise[bench]'") from error
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60, ttl_dns_cache=300),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=min(30.0, target.timeout_s)),
        headers=headers | dict(target.headers),
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as http:
        yield Wire(http, target)


async def _refused(response: "aiohttp.ClientResponse", answer: Answer) -> None:
    """An answer that is an error: its status, its message, and when to come again."""
    answer.decision_s = time.perf_counter() - answer.start
    try:
        answer.retry_after_s = float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        answer.retry_after_s = None
    answer.fail(f"http_{answer.status}", f"{answer.status} {_message(await _content(response))}")


async def _content(response: "aiohttp.ClientResponse") -> bytes:
    """The body of a small answer, or its beginning."""
    content = b""
    async for data in response.content.iter_any():
        content += data
        if len(content) > _MAX_CONTENT:
            break
    return content


def _message(content: bytes) -> str:
    try:
        found = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError, IndexError):
        found = content.decode(errors="replace")
    return str(found)


def _first_model(content: bytes, status: int, url: str) -> str:
    try:
        names: Sequence[dict[str, Any]] = json.loads(content)["data"]
        return str(names[0]["id"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise RequestError(f"{url} names no model (status {status}): give one with --model") from None
