"""`kvwise serve`: an OpenAI-compatible server in front of a model; `kvwise config show`: its settings."""

from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvwise.cli.engine_options import EngineOptions
from kvwise.cli.settings import origins, reads_file, show_settings, with_options
from kvwise.core.errors import UsageError
from kvwise.core.sizes import parse_seconds

if TYPE_CHECKING:
    from kvwise.engine.service import EngineService
    from kvwise.server.context import Server
    from kvwise.server.settings import ServerSettings

LISTENING, CACHE, LOAD, WATCHING = "Listening", "Methods of the KV cache", "Under load", "Watching"
ENVIRONMENT = {"auto_envvar_prefix": "KVWISE"}  # --max-num-seqs is KVWISE_MAX_NUM_SEQS too
_NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client")
_SECRET = ("api_key",)
_HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What a server serves, to whom, and how much of it."""

    model: Annotated[str | None, typer.Argument(help="Folder, hub id, config.json, builtin:recall, or random:13m.")] = (
        None
    )
    host: Annotated[str, typer.Option(rich_help_panel=LISTENING)] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="0: any free one.", rich_help_panel=LISTENING)] = 8000
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name for requests, instead of MODEL; may be given several times.", rich_help_panel=LISTENING
        ),
    ] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Asked of everybody; better in KVWISE_API_KEY than here.", rich_help_panel=LISTENING),
    ] = None
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tenants and their keys.", rich_help_panel=LISTENING)
    ] = None
    admin_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key opens /admin.", rich_help_panel=LISTENING)
    ] = None
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without keys.", rich_help_panel=LISTENING)
    ] = False
    strategy: Annotated[str, typer.Option(help="Methods joined by +, see kvwise methods.", rich_help_panel=CACHE)] = (
        "full+prefix"
    )
    allow_strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="One that requests may choose, served beside it; shares the KV memory.", rich_help_panel=CACHE
        ),
    ] = None
    enable_prefix_caching: Annotated[
        bool | None, typer.Option(help="Default: as --strategy says.", rich_help_panel=CACHE)
    ] = None
    warm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts computed before it is ready.", rich_help_panel=CACHE)
    ] = None
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait.", rich_help_panel=LOAD)] = 256
    max_waiting_tokens: Annotated[int, typer.Option(help="Tokens of their prompts.", rich_help_panel=LOAD)] = 2_000_000
    watchdog: Annotated[
        str, typer.Option(metavar="TIME", help="A step that takes longer: stuck.", rich_help_panel=LOAD)
    ] = "120s"
    slow_reader: Annotated[
        str, typer.Option(metavar="TIME", help="A client that reads nothing so long is cut off.", rich_help_panel=LOAD)
    ] = "30s"
    drain: Annotated[
        str, typer.Option(metavar="TIME", help="After SIGTERM, for what runs to end.", rich_help_panel=LOAD)
    ] = "30s"
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="Metrics under vLLM's names too.", rich_help_panel=WATCHING)
    ] = False
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="/metrics needs no key beside --keys.", rich_help_panel=WATCHING)
    ] = False
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Prompts in the log.", rich_help_panel=WATCHING)
    ] = False
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Where traces go.", rich_help_panel=WATCHING)
    ] = None
    live: Annotated[bool, typer.Option(help="The live view at /.", rich_help_panel=WATCHING)] = True

    def settings(self) -> "ServerSettings":
        """As the server takes them; UsageError for what is out of range."""
        from kvwise.server.settings import ServerSettings

        if self.model is None:
            raise UsageError("no model: write kvwise serve MODEL, or model = ... in the file of --config")
        for name in ("max_waiting", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is out of range: it must be at least 1")
        return ServerSettings(
            model_names=self.served_model_name or [self.model],
            host=self.host,
            port=self.port,
            slow_reader_s=parse_seconds(self.slow_reader, "--slow-reader"),
            drain_s=parse_seconds(self.drain, "--drain"),
            keys_file=self.keys,
            admin_key_file=self.admin_key_file,
            insecure=self.insecure,
            log_prompts=self.log_prompts,
            vllm_metrics=self.vllm_metrics,
            open_metrics=self.open_metrics,
            otlp_endpoint=self.otlp_endpoint,
            warm_file=self.warm,
            live=self.live,
        )

    def strategies(self) -> list[str]:
        """The default first."""
        return [_with_prefix(self.strategy, self.enable_prefix_caching), *(self.allow_strategy or ())]


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", is_eager=True, callback=reads_file(ServeOptions, EngineOptions),
        help="TOML; the command line and the environment (KVWISE_...) go before it.",
    ),
]  # fmt: skip

config_app = typer.Typer(name="config", help="Settings, and where they come from.", no_args_is_help=False)


@with_options(ServeOptions, EngineOptions)
def serve(options: ServeOptions, engine: EngineOptions, config: Config = None) -> None:
    """Serve a model to OpenAI's clients until SIGTERM; the first line of output says where."""
    _require_packages()
    settings, engine_config, names = options.settings(), engine.config(), options.strategies()
    watchdog_s = parse_seconds(options.watchdog, "--watchdog")
    # Bad options are refused above, before the seconds it takes to import torch.
    from kvwise.engine.service import EngineService, ServiceLimits
    from kvwise.methods.catalogue import parse
    from kvwise.server.log import logging_to
    from kvwise.server.run import run
    from kvwise.server.tenancy.tenants import Tenants

    limits = ServiceLimits(options.max_waiting, options.max_waiting_tokens, settings.slow_reader_s, watchdog_s)
    strategies = [parse(name) for name in names]
    assert options.model is not None
    model = options.model

    tenants = Tenants.open(settings, api_keys=options.api_key or ())
    engine_config = replace(engine_config, tenant_quotas={**engine_config.tenant_quotas, **tenants.cached_bytes})

    def load() -> "EngineService":
        return EngineService(engine.load(model), strategies, engine_config, limits)

    with logging_to():
        run(settings, tenants, load, _announce)


@config_app.command("show", context_settings=ENVIRONMENT)
@with_options(ServeOptions, EngineOptions)
def show_config(
    options: ServeOptions,
    engine: EngineOptions,
    ctx: typer.Context,
    config: Config = None,
    origin: Annotated[bool, typer.Option("--origin", help="Where each setting comes from.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the settings that kvwise serve would have with the same arguments, file and environment."""
    values: dict[str, Any] = {**asdict(options), **asdict(engine)}
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    for name in _SECRET:
        shown[name] = _HIDDEN if shown[name] else shown[name]
    typer.echo(show_settings(shown, origins(ctx, list(shown)) if origin else None, as_json=as_json))


def _announce(server: "Server", url: str) -> None:
    from kvwise.server.log import say

    figures = server.service.snapshots
    memory = sum(one.stats.pool_bytes for one in figures) / 2**20
    blocks = sum(one.stats.blocks_total for one in figures)
    name, strategies = server.model_names[0], ", ".join(server.service.strategies)
    say(f"kvwise serves {name} at {url} ({strategies}; KV memory {memory:.1f} MiB, {blocks} blocks)")


def _with_prefix(strategy: str, wanted: bool | None) -> str:
    """The strategy with or without the reuse of prefixes."""
    methods = [method.strip() for method in strategy.split("+")]
    if wanted and "prefix" not in methods:
        return f"{strategy}+prefix"
    if wanted is False:
        return "+".join(method for method in methods if method != "prefix") or "full"
    return strategy


def _require_packages() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"kvwise serve needs {', '.join(missing)}: pip install 'kvwise[serve]'")
