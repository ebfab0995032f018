"""The keys file: tenants in TOML, by the SHA-256 of their keys; and the file with the administration's key."""

import logging
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvwise.cache.ttl import Ttl
from kvwise.core.errors import UsageError
from kvwise.core.sizes import parse_bytes, parse_seconds
from kvwise.methods.catalogue import parse
from kvwise.server.tenancy.tenant import Tenant, tenant_id

_log = logging.getLogger(__name__)
_MAX_BYTES = 4 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_COUNTS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
_FIELDS = ("name", "keys", *_COUNTS, "cached_bytes", "ttl", "idle_ttl", "strategies")
_MIN_ADMIN_KEY = 16  # characters


@dataclass(frozen=True, slots=True)
class KnownKey:
    """The SHA-256 of a key, and whose it is."""

    digest: bytes
    tenant: Tenant


def hash_key(key: bytes) -> bytes:
    """What is kept of a key. Keys are random and long, so that a plain digest cannot be searched."""
    return sha256(key).digest()


def show_hash(digest: bytes) -> str:
    """A digest as the keys file has it."""
    return f"sha256:{digest.hex()}"


def read_keys_file(path: Path) -> list[KnownKey]:
    """All keys of a file, tenants in its order. UsageError, which never quotes a key, for one that is not sound."""
    text = read_private(path, secret=False)
    return parse_keys(text, str(path))


def parse_keys(text: str, where: str) -> list[KnownKey]:
    """`read_keys_file` of a file's text; `where` is its name in errors."""
    tables = parse_tables(text, where)
    if not tables:
        raise UsageError(f"{where} names no tenant: add one with 'kvwise keys add {where} --tenant NAME'")
    keys: list[KnownKey] = []
    names: set[str] = set()
    owners: dict[bytes, str] = {}
    for number, table in enumerate(tables, 1):
        tenant, digests = _tenant(table, f"{where}, tenant {number}")
        if tenant.name in names:
            raise UsageError(f"{where}: two tenants are called {tenant.name!r}; names must differ")
        names.add(tenant.name)
        for digest in digests:
            if digest in owners:
                raise UsageError(f"{where}: a key of {tenant.name!r} is there twice ({owners[digest]!r} has it too)")
            owners[digest] = tenant.name
            keys.append(KnownKey(digest, tenant))
    return keys


def parse_tables(text: str, where: str) -> list[Mapping[str, Any]]:
    """The `[[tenant]]` tables of a file's text; UsageError if it has anything else."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is no TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply: it needs [[tenant]] tables only") from None
    tables = found.pop("tenant", [])
    if found:
        raise UsageError(f"{where}: unknown key {min(found)!r}; it needs [[tenant]] tables only")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{where}: tenant must be a list of tables: write [[tenant]]")
    return tables


def _tenant(table: Mapping[str, Any], where: str) -> tuple[Tenant, list[bytes]]:
    if unknown := sorted(set(table) - set(_FIELDS)):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; keys: {', '.join(_FIELDS)}")
    name = require_name(table.get("name"), where)
    where = f"{where} ({name})"
    digests = _digests(table.get("keys"), where)
    counts = {field: _count(table[field], f"{where}: {field}") for field in _COUNTS if field in table}
    cached = _cached_bytes(table["cached_bytes"], f"{where}: cached_bytes") if "cached_bytes" in table else None
    ttl = Ttl(*(_seconds(table[f], f"{where}: {f}") if f in table else None for f in ("ttl", "idle_ttl")))
    strategies = _strategies(table["strategies"], f"{where}: strategies") if "strategies" in table else None
    tenant = Tenant(
        name, tenant_id(name, digests[0]), cached_bytes=cached, ttl=ttl, strategies=strategies, **counts
    )  # fmt: skip
    return tenant, digests


def require_name(name: object, where: str) -> str:
    """A tenant's name; UsageError for what is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"{where}: name must be 1 to 64 letters, digits, '.', '_' or '-', the first no sign")
    return name


def _digests(keys: object, where: str) -> list[bytes]:
    if not isinstance(keys, list) or not keys:
        raise UsageError(f"{where}: keys must be a list with at least one 'sha256:...'")
    found = [_HASH.fullmatch(key) if isinstance(key, str) else None for key in keys]
    digests = [bytes.fromhex(match[1]) for match in found if match is not None]
    if len(digests) < len(keys):
        number = next(i for i, match in enumerate(found, 1) if match is None)
        raise UsageError(
            f"{where}: key {number} is no 'sha256:' and 64 small hex digits; keys are never kept as they are: make one "
            "with 'kvwise keys add'"
        )
    if hash_key(b"") in digests:
        raise UsageError(f"{where}: key {digests.index(hash_key(b'')) + 1} is the hash of nothing")
    return digests


def _count(value: object, where: str) -> int:
    if type(value) is not int or not 1 <= value < 2**53:
        raise UsageError(f"{where} = {_short(value)} must be a whole number, at least 1 (leave it out for no limit)")
    return value


def _cached_bytes(value: object, where: str) -> int:
    if not isinstance(value, str) or (size := _size(value)) is None or size < 1:
        raise UsageError(f'{where} = {_short(value)} must be a size above 0, such as "1GiB"')
    return size


def _size(text: str) -> int | None:
    try:
        return parse_bytes(text)
    except (UsageError, OverflowError):
        return None


def _seconds(value: object, where: str) -> float:
    if not isinstance(value, str):
        raise UsageError(f'{where} = {_short(value)} must be a duration, such as "15m" or "2h"')
    return parse_seconds(value, where)


def _strategies(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UsageError(f'{where} must be a list of strategies, such as ["full+prefix"]')
    return tuple(str(parse(one)) for one in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# -- files ----------------------------------------------------------------------------------------------------------


def read_admin_key(path: Path) -> bytes:
    """The digest of the key that a file holds, as it is or as `sha256:...`. UsageError if the file is not sound."""
    key = read_private(path, secret=True).strip()
    if match := _HASH.fullmatch(key):
        return bytes.fromhex(match[1])
    if len(key) < _MIN_ADMIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{path} must hold one key of at least {_MIN_ADMIN_KEY} plain characters, no spaces, or its 'sha256:...'"
        )
    return hash_key(key.encode())


def read_private(path: Path, *, secret: bool) -> str:
    """The text of a file that only its owner may write, and if it is `secret`, read. UsageError otherwise."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path} is no regular file; name a file with keys")
            _require_private(path, status.st_mode, secret=secret)
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; name a file with keys that this user may read") from None
    except ValueError:
        raise UsageError(f"{str(path)!r} is no path of a file; name a file with keys") from None
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path} is larger than {_MAX_BYTES} bytes: no keys file is")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8 text") from None


def _require_private(path: Path, mode: int, *, secret: bool) -> None:
    others_write, others_read = mode & (stat.S_IWGRP | stat.S_IWOTH), mode & (stat.S_IRGRP | stat.S_IROTH)
    if others_write or (secret and others_read):
        what = "changed" if others_write else "read"
        raise UsageError(f"{path} may be {what} by others (mode {stat.S_IMODE(mode):04o}): run chmod 600 on it")
    if others_read:
        _log.warning("%s may be read by others (mode %04o): it holds hashes only, but run chmod 600 on it", path,
                     stat.S_IMODE(mode))  # fmt: skip


def tenants_of(keys: Sequence[KnownKey]) -> list[Tenant]:
    """The tenants that have these keys, in order."""
    return list({key.tenant.id: key.tenant for key in keys}.values())
