"""Changes of a keys file: made in its text, so that comments stay, proven by reading it again, written as a whole."""

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvwise.core.errors import UsageError
from kvwise.server.tenancy.keys_file import (
    KnownKey,
    hash_key,
    parse_keys,
    parse_tables,
    read_private,
    require_name,
    show_hash,
)

PREFIX = "kvw-"
_RANDOM_BYTES = 32
_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*tenant[ \t]*\]\].*$", re.MULTILINE)
_KEYS = re.compile(r"^[ \t]*keys[ \t]*=[ \t]*\[([^\]]*)\]", re.MULTILINE)

_Tables = list[dict[str, Any]]


def new_key() -> str:
    """A random key."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def add_key(file: Path, tenant: str) -> str:
    """Make a key for a tenant, who is made too if there is no such one; the key, which is kept nowhere."""
    require_name(tenant, f"tenant {tenant[:64]!r}")
    key = new_key()
    text = show_hash(hash_key(key.encode()))

    def change(old: str, tables: _Tables) -> tuple[str, _Tables]:
        found = next((table for table in tables if table.get("name") == tenant), None)
        if found is None:
            table = {"name": tenant, "keys": [text]}
            gap = "" if not old else "\n" if old.endswith("\n") else "\n\n"
            return f'{old}{gap}[[tenant]]\nname = "{tenant}"\nkeys = ["{text}"]\n', [*tables, table]
        start, end = _place(old, tables.index(found))
        match = _KEYS.search(old, start, end)
        if match is None:
            raise _by_hand(file, text)
        inside = match[1].rstrip()
        comma = "" if inside.endswith(",") else ","
        # Behind the others: the tenant's salt comes of its first key.
        new = f'{old[: match.start(1)]}{inside}{comma} "{text}"{old[match.end(1) - _tail(match[1]) :]}'
        found["keys"] = [*found["keys"], text]
        return new, tables

    _rewrite(file, change, hint=text, create=True)
    return key


def remove_key(file: Path, digits: str) -> str:
    """Take out the key whose hash begins with `digits`; the tenant's name. Its last key stays."""
    key = find_key(read_keys(file), digits)
    text = show_hash(key.digest)

    def change(old: str, tables: _Tables) -> tuple[str, _Tables]:
        table = next(table for table in tables if text in table["keys"])
        if len(table["keys"]) == 1:
            raise UsageError(f"it is the last key of {table['name']!r}: remove the tenant with --tenant instead")
        table["keys"] = [one for one in table["keys"] if one != text]
        return re.sub(rf"""["']{text}["'][ \t]*,?[ \t]*""", "", old, count=1), tables

    _rewrite(file, change, hint=text)
    return key.tenant.name


def remove_tenant(file: Path, tenant: str) -> int:
    """Take out a tenant with all its keys; how many they were."""
    removed = 0

    def change(old: str, tables: _Tables) -> tuple[str, _Tables]:
        nonlocal removed
        names = [table["name"] for table in tables]
        if tenant not in names:
            raise UsageError(f"{file}: no tenant is called {tenant!r}; there is: {', '.join(names)}")
        place = names.index(tenant)
        start, end = _place(old, place)
        removed = len(tables[place]["keys"])
        return old[:start] + old[end:], [table for table in tables if table["name"] != tenant]

    _rewrite(file, change, hint=tenant, may_be_empty=True)
    return removed


def read_keys(file: Path) -> list[KnownKey]:
    """All keys of a file."""
    return parse_keys(read_private(file, secret=False), str(file))


def find_key(keys: list[KnownKey], digits: str) -> KnownKey:
    """The one key whose hash begins with `digits`; UsageError if it is none or several."""
    wanted = digits.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{4,64}", wanted):
        raise UsageError("name a key by the first digits of its hash (4 to 64), as 'kvwise keys ls' shows it")
    found = [key for key in keys if key.digest.hex().startswith(wanted)]
    if len(found) != 1:
        raise UsageError(f"{len(found)} keys begin with {wanted!r}: see 'kvwise keys ls', and give more digits")
    return found[0]


def _place(text: str, number: int) -> tuple[int, int]:
    """From the header of the table with that number to the next one's, or the end."""
    starts = [match.start() for match in _HEADER.finditer(text)]
    if number >= len(starts):
        raise UsageError("the tenants are not written as [[tenant]] tables: change the file by hand")
    return starts[number], starts[number + 1] if number + 1 < len(starts) else len(text)


def _tail(inside: str) -> int:
    """Length of the white space before the closing bracket."""
    return len(inside) - len(inside.rstrip())


def _by_hand(file: Path, hint: str) -> UsageError:
    return UsageError(f"{file} is written in a way that this command cannot change: do it by hand ({hint})")


def _rewrite(
    file: Path, change: Callable[[str, _Tables], tuple[str, _Tables]], *, hint: str, create: bool = False,
    may_be_empty: bool = False,
) -> None:  # fmt: skip
    """Change a file's text so that it says exactly what `change` wants, or not at all."""
    target = Path(os.path.realpath(file))
    with _locked(target.parent):
        old = "" if create and not target.exists() else read_private(target, secret=False)
        if old.strip() and parse_tables(old, str(file)):
            parse_keys(old, str(file))  # only a sound file is changed
        new, wanted = change(old, _tables(old, file))
        if _tables(new, file) != wanted:
            raise _by_hand(file, hint)
        if wanted or not may_be_empty:
            parse_keys(new, str(file))
        _replace(target, new)


def _tables(text: str, file: Path) -> _Tables:
    def plain(table: Mapping[str, Any]) -> dict[str, Any]:
        return dict(table)

    return [plain(table) for table in parse_tables(text, str(file))]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process changes files of the folder at a time."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; name a file in a folder that exists") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _replace(target: Path, text: str) -> None:
    """Write a file as a whole: to a second name that only its owner may read, synced, and renamed."""
    new = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as out:
                out.write(text.encode())
                out.flush()
                os.fsync(out.fileno())
            os.replace(new, target)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None
