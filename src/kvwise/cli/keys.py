"""`kvwise keys`: the tenants of a server and their API keys, of which only hashes are kept."""

from pathlib import Path
from typing import Annotated

import typer

from kvwise.cli.show import show_json, show_rows
from kvwise.core.errors import UsageError
from kvwise.core.sizes import show_bytes

app = typer.Typer(
    name="keys",
    help="Look after the keys file of `kvwise serve`. A running server reads it when it starts.",
    no_args_is_help=False,
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The keys file, TOML.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def add(
    file: File,
    tenant: Annotated[str, typer.Option(help="Whose key it is; a new name makes a new tenant.")],
    as_json: Json = False,
) -> None:
    """Make a random key, store its hash, and print the key: this once, for it is kept nowhere."""
    from kvwise.server.tenancy.keys_edit import add_key

    key = add_key(file, tenant)
    if as_json:
        show_json({"tenant": tenant, "key": key})
        return
    typer.echo(key)
    typer.echo(f"a key of {tenant}, shown this once; its hash is in {file}", err=True)


@app.command("ls")
def list_keys(file: File, as_json: Json = False) -> None:
    """List tenants and keys; `id` is the salt under which the tenant's KV lies in tiers."""
    from kvwise.server.tenancy.keys_edit import read_keys

    keys = read_keys(file)
    if as_json:
        show_json([{"tenant": k.tenant.name, "key": k.digest.hex(), "id": k.tenant.id} for k in keys])
        return
    columns = ("tenant", "key", "requests/min", "tokens/min", "at once", "cached", "id")
    rows = [
        [
            k.tenant.name, k.digest.hex()[:16],
            *("-" if n is None else str(n)
              for n in (k.tenant.requests_per_minute, k.tenant.tokens_per_minute, k.tenant.max_concurrent)),
            "-" if k.tenant.cached_bytes is None else show_bytes(k.tenant.cached_bytes), k.tenant.id,
        ]
        for k in keys
    ]  # fmt: skip
    show_rows(columns, rows)


@app.command()
def rm(
    file: File,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="First digits of its hash, as ls shows.")] = None,
    tenant: Annotated[str | None, typer.Option(help="All of a tenant, and itself.")] = None,
) -> None:
    """Remove a key, or a tenant with all its keys. Without its first key a tenant starts with an empty cache."""
    from kvwise.server.tenancy.keys_edit import remove_key, remove_tenant

    if (key is None) == (tenant is None):
        raise UsageError("say which: KEY or --tenant, one of them")
    if tenant is not None:
        typer.echo(f"tenant {tenant} and {remove_tenant(file, tenant)} keys removed")
        return
    assert key is not None
    typer.echo(f"a key of {remove_key(file, key)} removed")
