"""Fixtures of the server's tests: a small model, services, and apps behind real sockets."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn

from kvwise.core.config import EngineConfig
from kvwise.engine.service import EngineService, ServiceLimits
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.server.app import create_app
from kvwise.server.context import Server
from kvwise.server.run import uvicorn_config
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy.keys_file import hash_key, show_hash
from kvwise.server.tenancy.tenants import Tenants

_T = TypeVar("_T")
MODEL = "tiny"  # its name for requests
_LOOPBACK = ("127.0.0.1", "::1", "localhost", b"127.0.0.1", b"localhost")


@dataclass(slots=True)
class Served:
    """A server behind a socket, on an event loop in a thread of its own."""

    server: Server
    app: Any
    url: str
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def service(self) -> EngineService:
        return self.server.service

    def on_loop(self, work: Callable[[], Awaitable[_T]]) -> _T:
        """Run `work()`, a coroutine, on the server's loop, and wait for it."""

        async def run() -> _T:
            return await work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(60)


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """A random model with a byte tokenizer."""
    return load_model("random:3m")


def make_server(
    loaded: LoadedModel, *, strategies: tuple[str, ...] = ("full+prefix",), limits: ServiceLimits | None = None,
    settings: dict[str, Any] | None = None, api_keys: Sequence[str] = (), clock: Any = None, **config: Any,
) -> Server:  # fmt: skip
    """A server that has not started: `config` are fields of EngineConfig, `settings` those of ServerSettings."""
    config = {"kv_cache_memory_bytes": 2**24 * len(strategies), "check": True, **config}
    asked = ServerSettings(**{"model_names": (MODEL,), "port": 0, **(settings or {})})
    service = EngineService(
        loaded, [parse(one) for one in strategies], EngineConfig(**config), limits or ServiceLimits(), clock
    )
    return Server(service, asked, Tenants.open(asked, api_keys=api_keys), created=1_700_000_000)


def key_file(folder: Path, limits: str = "", **keys: str) -> Path:
    """A keys file of tenants, each with one key; `limits` are further lines of each."""
    hashes = {name: show_hash(hash_key(key.encode())) for name, key in keys.items()}
    text = "".join(f'[[tenant]]\nname = "{n}"\nkeys = ["{h}"]\n{limits}' for n, h in hashes.items())
    return private(folder / "keys.toml", text)


def private(path: Path, text: str) -> Path:
    """Write a file that only its owner can read."""
    path.write_text(text)
    path.chmod(0o600)
    return path


@contextmanager
def serving(server: Server, *, ready: bool = True) -> Iterator[Served]:
    """Serve on a free port of the loopback until the block ends."""
    app = create_app(server)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    http = uvicorn.Server(uvicorn_config(app, server.settings))
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.service.start()
        if ready:
            server.service.ready()
        try:
            serve = asyncio.create_task(http.serve(sockets=[listener]))
            while not http.started and not serve.done():
                await asyncio.sleep(0)
            started.set()
            await serve
        finally:
            started.set()
            await server.service.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),), name="kvwise-test-server")
    thread.start()
    try:
        assert started.wait(30)
        yield Served(server, app, f"http://127.0.0.1:{port}", port, loops[0])
    finally:
        http.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture
def make(tiny: LoadedModel) -> Callable[..., Server]:
    """`make(strategies=..., limits=..., settings={...}, max_num_seqs=4)`: a server that has not started."""
    return lambda **asked: make_server(tiny, **asked)


@pytest.fixture
def serve_http(tiny: LoadedModel) -> Iterator[Callable[..., Served]]:
    """`serve_http(settings={...}, max_num_seqs=4)`: a server behind a socket; `.url`. Closed when the test ends."""
    with ExitStack() as stack:
        yield lambda *, ready=True, **asked: stack.enter_context(serving(make_server(tiny, **asked), ready=ready))


@pytest.fixture(scope="module")
def served(tiny: LoadedModel) -> Iterator[Served]:
    """One server behind a socket for all tests of a module that change nothing in it."""
    with serving(make_server(tiny)) as one:
        yield one


@contextmanager
def only_loopback() -> Iterator[list[Any]]:
    """Whoever reaches for another machine, in any thread, fails, and so does the block; all that was asked for."""
    asked: list[Any] = []
    look_up, others = socket.getaddrinfo, []

    def allow(host: Any) -> None:
        asked.append(host)
        if host not in _LOOPBACK:
            others.append(host)
            raise ConnectionRefusedError(f"tests reach nobody else: {host}")

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if isinstance(address, tuple):
                allow(address[0])
            return original(self, address)

        return connect

    def resolve(host: Any, *more: Any, **named: Any) -> Any:
        allow(host)
        return look_up(host, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield asked
    assert others == []


@pytest.fixture
def loopback_only() -> Iterator[list[Any]]:
    """See `only_loopback`."""
    with only_loopback() as asked:
        yield asked
