"""`--server`: what `kvwise cache` asks of the administration of a running server."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from math import inf
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from kvwise.cli.show import show_json, show_rows
from kvwise.core.errors import KvwiseError, RequestError, UsageError

ENVIRONMENT = "KVWISE_ADMIN_KEY"
_TIMEOUT_S = 3600.0
_MAX_BYTES = 64 * 2**20

ServerUrl = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="A running server, in place of --tier; its own key is in "
                             f"{ENVIRONMENT} or --key-file.")
]  # fmt: skip
KeyFile = Annotated[Path | None, typer.Option(help="File with the key of the server's administration.")]
PromptText = Annotated[str | None, typer.Option("--prompt", help="A prompt, as text (with --server).")]
PromptFile = Annotated[Path | None, typer.Option(help="A file with one prompt, as text (with --server).")]


@dataclass(frozen=True, slots=True)
class Remote:
    """A server's administration."""

    url: str
    key: str

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to one request; UsageError for what the server refuses, RequestError for its faults.

        Follows no redirect and heeds no proxy: the key goes to this server alone.
        """
        place = urlsplit(self.url)
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps({k: v for k, v in body.items() if v is not None})
        try:
            connection = kind(place.hostname or "", place.port, timeout=_TIMEOUT_S)
            try:
                connection.request(method, f"{place.path.rstrip('/')}/admin{path}", content, headers)
                answer = connection.getresponse()
                status, text = answer.status, answer.read(_MAX_BYTES)
            finally:
                connection.close()
        except (OSError, HTTPException, ValueError) as error:
            raise UsageError(f"{self.url} cannot be asked: {error or type(error).__name__}; is it running?") from None
        return _read(status, text, self.url)


def _read(status: int, text: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{url} answered with status {status} and no JSON: is it a kvwise server?")
    if status == 200:
        return found
    error = found.get("error")
    fault = error if isinstance(error, dict) else {}
    if fault.get("code") == "route_not_found":
        raise UsageError(f"{url} has no administration: start it with --admin-key-file")
    kind: type[KvwiseError] = UsageError if status < 500 else RequestError
    raise kind(f"{url}: {fault.get('message', f'status {status}')}")


def remote(url: str, key_file: Path | None) -> Remote:
    """The administration at an address, with the key of a file or of the environment."""
    try:
        place = urlsplit(url)
        sound = place.scheme in ("http", "https") and place.hostname and (place.port is None or place.port > 0)
    except ValueError:
        sound = False
    if not sound or place.username or place.query or place.fragment:
        raise UsageError(f"--server {url!r} is no address of a server; write http://127.0.0.1:8000")
    try:
        key = os.environ.get(ENVIRONMENT, "") if key_file is None else key_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{key_file} cannot be read: {error}") from None
    if not (key := key.strip()) or not key.isascii() or not key.isprintable():
        raise UsageError(f"the administration of {url} asks for its key: set {ENVIRONMENT}, or name --key-file")
    return Remote(url, key)


def one_place(tier: str | None, server: str | None, *, only_server: Mapping[str, object] = {}) -> None:
    """UsageError unless exactly one of --tier and --server is given, and what only one of them knows goes with it."""
    if (tier is None) == (server is None):
        raise UsageError("say where: --tier for what a tier keeps, or --server for a running server; one of them")
    given = [option for option, value in only_server.items() if value]
    if tier is not None and given:
        raise UsageError(f"{given[0]} is for a running server: a tier knows no prompts. Give --server, or KEYs")


def prompt_of(text: str | None, file: Path | None) -> str:
    """The one prompt that was given; UsageError if none or two were."""
    if (text is None) == (file is None):
        raise UsageError("say which prompt: --prompt or --prompt-file, one of them")
    if text is not None:
        return text
    assert file is not None
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as text: {error}") from None


# -- commands -------------------------------------------------------------------------------------------------------


def list_there(there: Remote, prompt: str | None, file: Path | None, tenant: str | None, *, as_json: bool) -> None:
    """Where a prompt is, or without one, the sessions that the server knows."""
    if prompt is None and file is None:
        found = there.ask("GET", "/sessions")
        columns = ("strategy", "tenant", "session", "is_open", "blocks", "running", "idle_s", "closes_in_s")
        _show(found, found["sessions"], columns, as_json=as_json)
        return
    body = {"prompt": prompt_of(prompt, file), "tenant": tenant or ""}
    found = there.ask("POST", "/residence", body)
    _show(found, found["engines"], ("strategy", "tokens", "blocks", "on_device", "below", "resident"), as_json=as_json)


def stats_there(there: Remote, *, as_json: bool) -> None:
    """Figures of the server's engines."""
    found = there.ask("GET", "/stats")
    rows = [
        {"strategy": one["strategy"], "evicted": one["evicted"], "leaked": one["leaked"], **one["stats"]}
        for one in found["engines"]
    ]
    columns = (
        "strategy", "num_running", "num_waiting", "blocks_total", "blocks_free", "blocks_cached", "evicted", "leaked",
        "prefix_queries", "prefix_hits", "kv_bytes",
    )  # fmt: skip
    _show(found, rows, columns, as_json=as_json)


def pin_there(
    there: Remote, prompt: str | None, file: Path | None, tenant: str | None, end: float, *, as_json: bool
) -> None:
    """Pin a prompt's KV until `end`, in Unix seconds."""
    body = {"prompt": prompt_of(prompt, file), "tenant": tenant or "", "until": None if end == inf else end}
    _tell_changed(there.ask("POST", "/pin", body), "pinned", as_json=as_json)


def unpin_there(there: Remote, prompt: str | None, file: Path | None, tenant: str | None, *, as_json: bool) -> None:
    """End the pins of a prompt's KV."""
    body = {"prompt": prompt_of(prompt, file), "tenant": tenant or ""}
    _tell_changed(there.ask("POST", "/unpin", body), "unpinned", as_json=as_json)


def clear_there(there: Remote, *, as_json: bool) -> None:
    """Empty the device's cache."""
    _tell_changed(there.ask("POST", "/clear"), "cleared", as_json=as_json)


def purge_there(there: Remote, what: Mapping[str, Any], *, as_json: bool) -> None:
    """Purge, and exit 1 if a look-up still finds any of it."""
    found = there.ask("POST", "/purge", what)
    if as_json:
        show_json(found)
    else:
        rows = [{"strategy": one["strategy"], **tier} for one in found["engines"] for tier in one["tiers"]]
        _show(found, rows, ("strategy", "tier", "blocks", "bytes", "overwritten", "found_again"), as_json=False)
        typer.echo("looked up again: none is found" if found["proven"] else "some of it is still found", err=True)
    if not found["proven"]:
        raise typer.Exit(1)


def _tell_changed(found: Mapping[str, Any], done: str, *, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    for one in found["engines"]:
        typer.echo(f"{one['strategy']}: {one['blocks']} blocks {done}")


def _show(found: object, rows: list[dict[str, Any]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        show_json(found)
    else:
        show_rows(columns, [[_cell(row[name]) for name in columns] for row in rows])


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name}={one}" for name, one in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.0f}"
    return "-" if value in (None, "") else str(value).lower() if isinstance(value, bool) else str(value)
