"""Running a server: listen, load, warm up, serve; drain when told to end."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from kvwise.core.errors import KvwiseError, UsageError
from kvwise.engine.service import EngineService, State, Unavailable
from kvwise.server.admin.warm import warm_up
from kvwise.server.app import create_app, envelope
from kvwise.server.context import Server
from kvwise.server.health import HEALTH, health_answer
from kvwise.server.limits import Limits
from kvwise.server.log import let_go
from kvwise.server.observing.observers import observe
from kvwise.server.protocol import guarded
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy.tenants import Tenants

_log = logging.getLogger(__name__)
_LAST_BYTES_S = 5  # after the drain, for answers to be written and the engine's thread to end
_WATCH_S = 1.0
_STARTING_S = 5.0  # Retry-After while the model loads
INTERRUPTED = 130
_T = TypeVar("_T")


def uvicorn_config(app: ASGIApp, settings: ServerSettings) -> uvicorn.Config:
    """How uvicorn serves: our protocol, no log of its own, no trust in headers of proxies, no WebSockets."""
    return uvicorn.Config(
        app, http=guarded(settings), ws="none", lifespan="off", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=max(1, round(settings.keep_alive_s)),
        timeout_graceful_shutdown=_LAST_BYTES_S,
    )  # fmt: skip


def run(
    settings: ServerSettings, tenants: Tenants, load: Callable[[], EngineService],
    on_ready: Callable[[Server, str], None],
) -> None:  # fmt: skip
    """Listen, `load` in a thread, and serve until SIGTERM or SIGINT; `on_ready` gets the server and its URL.

    What runs then has `settings.drain_s` to end. A second SIGINT ends the process at once with status 130. UsageError
    if the address cannot be listened on, or if the model cannot be loaded or warmed up.
    """
    listener = _listen(settings)
    with listener:
        asyncio.run(_Run(settings, tenants, listener).main(load, on_ready))


class Front:
    """Answers while there is no app yet: 503, `starting`."""

    def __init__(self, settings: ServerSettings) -> None:
        self.app: ASGIApp | None = None
        self._starting = Limits(_starting, settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        await (self.app or self._starting)(scope, receive, send)


async def _starting(scope: Scope, receive: Receive, send: Send) -> None:
    answer = (
        health_answer(State.STARTING) if scope["path"] == HEALTH else envelope(Unavailable(State.STARTING, _STARTING_S))
    )
    await answer(scope, receive, send)


class _Http(uvicorn.Server):
    """uvicorn's server without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Run:
    """One run of a server, on its event loop."""

    def __init__(self, settings: ServerSettings, tenants: Tenants, listener: socket.socket) -> None:
        self.settings = settings
        self.tenants = tenants
        self.front = Front(settings)
        self.listener = listener
        self.url = _url(settings.host, listener.getsockname()[1])
        self.http = _Http(uvicorn_config(self.front, settings))
        self.told_to_end = asyncio.Event()

    async def main(self, load: Callable[[], EngineService], on_ready: Callable[[Server, str], None]) -> None:
        """From the first connection to the last."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        listening = asyncio.create_task(self.http.serve(sockets=[self.listener]))
        _log.info("listening on %s; loading the model", self.url)
        try:
            service = await self._unless_told_to_end(_in_thread(load))
            if service is None:
                _leave(0)  # a model that is being loaded cannot be told to stop
            await self._serve(service, on_ready)
        finally:
            self.http.should_exit = True
            await listening

    async def _serve(self, service: EngineService, on_ready: Callable[[Server, str], None]) -> None:
        server = Server(service, self.settings, self.tenants, created=int(time.time()))
        close_observers = observe(server)
        await service.start()
        self.front.app = create_app(server)
        watch = asyncio.create_task(watchdog(service))
        try:
            warm = asyncio.create_task(warm_up(server))
            await self._unless_told_to_end(warm)
            if not self.told_to_end.is_set():
                _freeze()
                on_ready(server, self.url)
            await self.told_to_end.wait()
            _log.info("draining: %d requests are running", len(service.streams()))
            if not await service.drain(self.settings.drain_s):
                _log.warning("the requests that have not ended within %g s are aborted", self.settings.drain_s)
        finally:
            watch.cancel()
            self.http.should_exit = True
            await self._close(service)
            close_observers()

    async def _close(self, service: EngineService) -> None:
        """A step that hangs does not keep the process."""
        closing = asyncio.ensure_future(service.close())
        _, late = await asyncio.wait([closing], timeout=_LAST_BYTES_S)
        if late:
            _log.error("a step of the engine hangs: leaving without it")
            _leave(0)
        await closing

    async def _unless_told_to_end(self, work: "asyncio.Future[_T]") -> _T | None:
        """What `work` comes to; None if the end was asked for first."""
        ending: asyncio.Future[Any] = asyncio.ensure_future(self.told_to_end.wait())
        waiting: list[asyncio.Future[Any]] = [work, ending]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            work.cancel()
            return None
        finally:
            ending.cancel()

    def _on_signal(self, number: signal.Signals) -> None:
        if self.told_to_end.is_set() and number == signal.SIGINT:
            _leave(INTERRUPTED)
        self.told_to_end.set()


async def watchdog(service: EngineService, interval_s: float = _WATCH_S) -> None:
    """Tell the log, once each time, that the service is stuck or broken, and that it goes on again."""
    told = State.READY
    while True:
        state = service.health
        if state in (State.STUCK, State.BROKEN) and state is not told:
            _log.error("the server is %s: /health answers 503", state)
            told = state
        elif state not in (State.STUCK, State.BROKEN) and told is not State.READY:
            _log.warning("the server is %s again", state)
            told = State.READY
        await asyncio.sleep(interval_s)


def _freeze() -> None:
    """What has been made until now stays: collections of garbage do not look at it again, which takes long."""
    gc.collect()
    gc.freeze()


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or str(error)
        hint = "choose another --port, or 0 for a free one" if error.errno == errno.EADDRINUSE else "see --host, --port"
        raise UsageError(f"cannot listen on {settings.host} port {settings.port}: {why}; {hint}") from error


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _in_thread(work: Callable[[], _T]) -> "asyncio.Future[_T]":
    """Do something in a thread that does not keep the process from ending, as those of asyncio's pool would."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: Exception | None) -> None:
        if not done.done():
            done.set_exception(error) if error is not None else done.set_result(result)  # type: ignore[arg-type]

    def target() -> None:
        try:
            result, error = work(), None
        except KvwiseError as known:
            result, error = None, known
        except Exception as unknown:
            result, error = None, UsageError(f"the model cannot be loaded: {type(unknown).__name__}: {unknown}")
        with contextlib.suppress(RuntimeError):  # the loop is gone, and so is whoever asked
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=target, name="kvwise-load", daemon=True).start()
    return done


def _leave(status: int) -> NoReturn:
    let_go(sys.stdout, sys.stderr)
    os._exit(status)
