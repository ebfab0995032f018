"""`kvwise cache`: what a tier keeps, and how to warm it, pin it, check it and empty it."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from kvwise.cli.remote import (
    KeyFile,
    PromptFile,
    PromptText,
    ServerUrl,
    clear_there,
    list_there,
    one_place,
    pin_there,
    prompt_of,
    purge_there,
    remote,
    stats_there,
    unpin_there,
)
from kvwise.cli.show import show_json, show_rows
from kvwise.cli.times import pinned_until, show_seconds
from kvwise.cli.warm import warm
from kvwise.core.errors import UsageError
from kvwise.core.options import read_call
from kvwise.core.tiering import parse_tier

if TYPE_CHECKING:
    from kvwise.engine.hierarchy.shelf import Shelf
    from kvwise.tiers.record import Header

app = typer.Typer(
    name="cache",
    help="Look after KV: what a disk, redis or object tier keeps (--tier), also beside a live server, or what a "
    "running server keeps on its device and below (--server). ls, stats, warm, pin, unpin and purge work on both; "
    "verify and gc on a tier; clear on a server. A tier is asked by KEYs, a server by prompts.",
    no_args_is_help=False,
)

TierText = Annotated[str, typer.Option("--tier", help="Such as 'disk(path=/var/cache/kvwise)'.")]
TierOrServer = Annotated[str | None, typer.Option("--tier", help="Such as 'disk(path=/var/cache/kvwise)'.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Keys = Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Hex digits of keys, as ls prints them.")]
All = Annotated[bool, typer.Option("--all", help="All records.")]
Session = Annotated[str | None, typer.Option(help="What a session stored.")]
Tenant = Annotated[str | None, typer.Option(help="Of a tenant: in a tier its salt, at a server its name.")]
Until = Annotated[str | None, typer.Option(help="When the pin ends: 2030-01-31T12:00, or Unix seconds.")]
For = Annotated[str | None, typer.Option("--for", help="How long the pin holds: 15m, 2h, 7d.")]

app.command("warm")(warm)


@app.command("ls")
def list_records(
    tier: TierOrServer = None,
    limit: Annotated[int, typer.Option(help="Records shown; 0: all.")] = 50,
    server: ServerUrl = None, key_file: KeyFile = None, prompt: PromptText = None, prompt_file: PromptFile = None,
    tenant: Annotated[str | None, typer.Option(help="Whose prompt it is (with --server).")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """List a tier's records, or a server's sessions; with --prompt where its blocks are."""
    one_place(tier, server, only_server={"--prompt": prompt, "--prompt-file": prompt_file, "--tenant": tenant})
    if server is not None:
        list_there(remote(server, key_file), prompt, prompt_file, tenant, as_json=as_json)
        return
    assert tier is not None
    if limit < 0:
        raise UsageError(f"--limit {limit} must be 0 (all) or more")
    with _open(tier) as shelf:
        records, pins, now = sorted(shelf.records(), key=_group_then_chain), shelf.pins(), time.time()
    shown = records[:limit] if limit else records
    if as_json:
        show_json({"tier": tier, "num_records": len(records), "records": [_facts(r, pins, now) for r in shown]})
        return
    columns = ("key", "model", "codec", "tenant", "session", "depth", "bytes", "age", "expires", "pinned")
    groups = [_group(record) for record in shown]
    breaks = [i for i in range(len(groups) - 1) if groups[i] != groups[i + 1]]
    show_rows(columns, [_cells(record, pins, now) for record in shown], breaks=breaks)
    if len(shown) < len(records):
        typer.echo(f"{len(records) - len(shown)} more records: --limit 0 shows all", err=True)


@app.command()
def pin(
    keys: Keys = None, tier: TierOrServer = None, everything: All = False, session: Session = None,
    tenant: Tenant = None, until: Until = None, duration: For = None, server: ServerUrl = None,
    key_file: KeyFile = None, prompt: PromptText = None, prompt_file: PromptFile = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Keep records from eviction and purge. A KEY pins the whole prefix that ends with it, a server a --prompt."""
    one_place(tier, server, only_server={"--prompt": prompt, "--prompt-file": prompt_file})
    end = pinned_until(until, duration)
    if server is not None:
        _only_prompts(keys, everything, session)
        pin_there(remote(server, key_file), prompt, prompt_file, tenant, end, as_json=as_json)
        return
    assert tier is not None
    with _open(tier) as shelf:
        chosen = _chosen(shelf, keys, everything, session, tenant, whole_prefix=True)
        shelf.pin([record.key for record in chosen], end)
    facts = {"pinned": len(chosen), "bytes": _bytes(chosen), "until": end}
    _tell(as_json, facts, f"{len(chosen)} records pinned, {_bytes(chosen)} bytes, {_until(end)}")


@app.command()
def unpin(
    keys: Keys = None, tier: TierOrServer = None, everything: All = False, session: Session = None,
    tenant: Tenant = None, server: ServerUrl = None, key_file: KeyFile = None, prompt: PromptText = None,
    prompt_file: PromptFile = None, as_json: Json = False,
) -> None:  # fmt: skip
    """End pins. A KEY ends those of the whole prefix that ends with it, at a server a --prompt its own."""
    one_place(tier, server, only_server={"--prompt": prompt, "--prompt-file": prompt_file})
    if server is not None:
        _only_prompts(keys, everything, session)
        unpin_there(remote(server, key_file), prompt, prompt_file, tenant, as_json=as_json)
        return
    assert tier is not None
    with _open(tier) as shelf:
        chosen = _chosen(shelf, keys, everything, session, tenant, whole_prefix=True)
        ended = shelf.unpin(shelf.pins() if everything else [record.key for record in chosen])
    _tell(as_json, {"unpinned": ended}, f"{ended} pins ended")


@app.command()
def purge(
    tier: TierOrServer = None,
    session: Session = None,
    tenant: Tenant = None,
    prefix: Annotated[list[str] | None, typer.Option(help="A KEY and all that continues it; may be repeated.")] = None,
    everything: All = False,
    with_pinned: Annotated[bool, typer.Option("--with-pinned", help="Pinned records too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    server: ServerUrl = None, key_file: KeyFile = None, prompt: PromptText = None, prompt_file: PromptFile = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Delete records, overwriting their bytes; then look them up again. Exit 1 if any is still there.

    At a server --tenant alone names all that is the tenant's; with --session or --prompt, whose that is.
    """
    one_place(tier, server, only_server={"--prompt": prompt, "--prompt-file": prompt_file})
    if server is not None:
        if prefix or with_pinned:
            raise UsageError("--prefix and --with-pinned are for a tier: a server is asked by --prompt, and pins end")
        text = None if prompt is None and prompt_file is None else prompt_of(prompt, prompt_file)
        what = {"everything": everything or None, "session": session, "tenant": tenant, "prompt": text}
        _confirm(yes, "Delete this for good?")
        purge_there(remote(server, key_file), what, as_json=as_json)
        return
    assert tier is not None
    with _open(tier) as shelf:
        wanted = _chosen(shelf, prefix, everything, session, tenant, whole_prefix=False)
        pins = {} if with_pinned else shelf.pins()
        chosen = [record for record in wanted if record.key not in pins]
        _confirm(yes, f"Delete {len(chosen)} records, {_bytes(chosen)} bytes, for good?")
        failed = shelf.remove(chosen)
        again = shelf.still_there(chosen)
        shelf.tidy_pins(shelf.records())
        wipes = shelf.store.wipes
    gone = [record for record in chosen if record not in again]
    facts = {
        "purged": len(gone), "bytes": _bytes(gone), "overwritten": wipes, "kept_pinned": len(wanted) - len(chosen),
        "failed": len(failed), "found_again": len(again),
    }  # fmt: skip
    how = "overwritten and deleted" if wipes else "deleted (this tier cannot overwrite)"
    kept = f"; {facts['kept_pinned']} pinned ones kept" if facts["kept_pinned"] else ""
    proof = f"{len(again)} of them are still found" if again else "looked up again: none is found"
    _tell(as_json, facts, f"{len(gone)} records, {_bytes(gone)} bytes {how}{kept}; {proof}")
    if again or failed:
        raise typer.Exit(1)


@app.command()
def clear(server: ServerUrl = None, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Empty the device's cache of a running server: nothing there is found any more. Its tiers keep what they have."""
    if server is None:
        raise UsageError("clear is for a running server: name --server (a tier is emptied by purge --all)")
    clear_there(remote(server, key_file), as_json=as_json)


@app.command()
def verify(
    tier: TierText,
    delete: Annotated[bool, typer.Option("--delete", help="Remove bad records.")] = False,
    as_json: Json = False,
) -> None:
    """Read every record and check every byte. Exit 1 if any is bad."""
    from kvwise.tiers.base import FaultKind

    with _open(tier) as shelf:
        torn, records = shelf.num_torn, shelf.records()
        bad = shelf.verify(records)
        if delete:
            shelf.remove([one.header for one in bad])
    foreign = sum(one.fault.kind is FaultKind.FOREIGN for one in bad)
    facts = {
        "good": len(records) - len(bad), "corrupt": len(bad) - foreign + torn, "foreign": foreign,
        "bytes": _bytes(records), "deleted": len(bad) + torn if delete else torn,
        "bad": [{"key": one.header.key.hex(), "why": str(one.fault)} for one in bad],
    }  # fmt: skip
    lines = [f"{one.header.key.hex()[:16]}: {one.fault}" for one in bad]
    lines += [f"{torn} places where no sound record starts: cleared on the way"] if torn else []
    total = f"{facts['good']} good, {facts['corrupt']} corrupt, {foreign} foreign"
    _tell(as_json, facts, "\n".join([*lines, total + (f"; {len(bad)} deleted" if delete and bad else "")]))
    if bad or torn:
        raise typer.Exit(1)


@app.command()
def gc(tier: TierText, as_json: Json = False) -> None:
    """Delete what has expired, what is corrupt, and what is over the size that --tier states (oldest first)."""
    from kvwise.engine.hierarchy.shelf import Chains

    size = parse_tier(tier).size_bytes if "size" in read_call(tier, "tier", UsageError)[1] else None
    with _open(tier) as shelf:
        torn, records = shelf.num_torn, shelf.records()
        expired = [record for record in records if shelf.expired(record)]
        gone = {record.key for record in expired}
        corrupt = [one.header for one in shelf.verify([record for record in records if record.key not in gone])]
        gone |= {record.key for record in corrupt}
        left = [record for record in records if record.key not in gone]
        over, total = [], _bytes(left)
        for record in Chains(left).leaving({*shelf.pins(), *(r.key for r in left if not r.num_tokens)}):
            if size is None or total <= size:
                break
            over.append(record)
            total -= record.record_bytes
        removed = [*expired, *corrupt, *over]
        failed = shelf.remove(removed)
        pins = shelf.tidy_pins(shelf.records())
    facts = {
        "expired": len(expired), "corrupt": len(corrupt) + torn, "over_size": len(over), "stale_pins": pins,
        "bytes_freed": _bytes(removed) - _bytes(one.header for one in failed), "failed": len(failed),
        "bytes_left": total,
    }  # fmt: skip
    _tell(
        as_json, facts,
        f"{len(expired)} expired, {facts['corrupt']} corrupt, {len(over)} over size: "
        f"{facts['bytes_freed']} bytes freed, {total} left; {pins} stale pins dropped",
    )  # fmt: skip
    if failed:
        raise typer.Exit(1)


@app.command()
def stats(tier: TierOrServer = None, server: ServerUrl = None, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Count a tier's records and bytes, by model, codec and tenant; or tell a server's figures."""
    one_place(tier, server)
    if server is not None:
        stats_there(remote(server, key_file), as_json=as_json)
        return
    assert tier is not None
    with _open(tier) as shelf:
        records, now, on_medium = shelf.records(), time.time(), shelf.store.num_bytes()
        expired, pins = sum(map(shelf.expired, records)), shelf.pins()
    from kvwise.engine.hierarchy.shelf import ends_at

    groups: dict[str, dict[str, Counter[str]]] = {"model": {}, "codec": {}, "tenant": {}}
    for record in records:
        for kind, name in zip(groups, _group(record)[:3], strict=True):
            groups[kind].setdefault(name, Counter()).update(records=1, bytes=record.record_bytes)
    oldest = min((record.stored_at for record in records), default=None)
    coming = [end for record in records if now < (end := ends_at(record)) < inf]
    facts = {
        "records": len(records), "bytes": _bytes(records), "bytes_on_medium": on_medium, "expired": expired,
        "pinned": sum(record.key in pins for record in records), "oldest": oldest,
        "next_expiry": min(coming, default=None), **{f"by_{kind}": found for kind, found in groups.items()},
    }  # fmt: skip
    if as_json:
        show_json(facts)
        return
    rows = [["all", "", str(len(records)), str(_bytes(records))]]
    rows += [
        [kind, name, str(n["records"]), str(n["bytes"])] for kind, found in groups.items() for name, n in found.items()
    ]
    show_rows(("of", "name", "records", "bytes"), rows)
    typer.echo(
        f"{on_medium} bytes on the medium; oldest {'-' if oldest is None else show_seconds(now - oldest)}, next expiry "
        f"{show_seconds(min(coming) - now) if coming else 'never'}; {expired} expired, {facts['pinned']} pinned",
        err=True,
    )


# -- records ------------------------------------------------------------------------------------------------------


def _open(tier: str) -> "Shelf":
    spec = parse_tier(tier)
    from kvwise.engine.hierarchy.shelf import Shelf

    return Shelf(spec)


def _chosen(
    shelf: "Shelf", keys: list[str] | None, everything: bool, session: str | None, tenant: str | None, *,
    whole_prefix: bool,
) -> list["Header"]:  # fmt: skip
    """The records that exactly one of the four ways names; a key: with those before it, or those behind it."""
    from kvwise.engine.hierarchy.names import tag
    from kvwise.engine.hierarchy.shelf import Chains

    ways = [bool(keys), everything, session is not None, tenant is not None]
    if sum(ways) != 1:
        raise UsageError("say which records: keys, --session, --tenant or --all; exactly one of them")
    records = shelf.records()
    if keys:
        chains = Chains(records)
        follow = chains.prefix if whole_prefix else chains.continued
        found = [record for text in keys for record in follow(chains.find(text))]
        return list({record.key: record for record in found}.values())
    if session is not None:
        return [record for record in records if record.session == tag(session)]
    if tenant is not None:
        return [record for record in records if record.tenant == tag(tenant)]
    return records


def _only_prompts(keys: list[str] | None, everything: bool, session: str | None) -> None:
    if keys or everything or session is not None:
        raise UsageError("a server is asked by --prompt: KEYs, --all and --session of pins are for a tier")


def _confirm(yes: bool, question: str) -> None:
    """Ask, where somebody is there to be asked."""
    if not yes and sys.stdin.isatty() and sys.stdout.isatty():
        typer.confirm(question, abort=True)


def _bytes(records: Iterable["Header"]) -> int:
    return sum(record.record_bytes for record in records)


def _group(record: "Header") -> tuple[str, str, str, str]:
    """Model, codec, tenant and session: names of models and owners are not in records, only tags of them."""
    return (
        record.identity.hex()[:12], record.codec,
        *(tag.hex()[:12] if any(tag) else "-" for tag in (record.tenant, record.session)),
    )  # type: ignore[return-value]  # fmt: skip


def _group_then_chain(record: "Header") -> tuple[tuple[str, str, str, str], int, bytes]:
    return _group(record), record.depth, record.key


def _cells(record: "Header", pins: dict[bytes, float], now: float) -> list[str]:
    from kvwise.engine.hierarchy.shelf import ends_at

    pinned = (
        "" if record.key not in pins else "yes" if pins[record.key] == inf else show_seconds(pins[record.key] - now)
    )
    return [
        record.key.hex()[:16], *_group(record), str(record.depth), str(record.record_bytes),
        show_seconds(max(now - record.stored_at, 0.1)), show_seconds(ends_at(record) - now), pinned,
    ]  # fmt: skip


def _facts(record: "Header", pins: dict[bytes, float], now: float) -> dict[str, object]:
    from kvwise.engine.hierarchy.shelf import ends_at

    model, codec, tenant, session = _group(record)
    return {
        "key": record.key.hex(), "parent": record.parent.hex(), "model": model, "codec": codec, "tenant": tenant,
        "session": session, "depth": record.depth, "tokens": record.num_tokens, "bytes": record.record_bytes,
        "stored_at": record.stored_at, "age_s": now - record.stored_at, "expires_at": ends_at(record),
        "pinned": record.key in pins, "pinned_until": pins.get(record.key),
    }  # fmt: skip


def _until(end: float) -> str:
    return "until unpinned" if end == inf else f"for {show_seconds(end - time.time())}"


def _tell(as_json: bool, facts: Mapping[str, object], line: str) -> None:
    show_json(facts) if as_json else typer.echo(line)
