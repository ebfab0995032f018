"""Who may use the server: tenants by their API keys, the administrator by its own, and what each may ask for."""

import hmac
import ipaddress
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256

from starlette.requests import HTTPConnection

from kvwise.core.clock import Clock, MonotonicClock
from kvwise.core.errors import UsageError
from kvwise.engine.service import EngineService
from kvwise.methods.catalogue import parse
from kvwise.server.errors import AUTHENTICATION, PERMISSION, ApiError
from kvwise.server.settings import ServerSettings
from kvwise.server.tenancy.keys_file import KnownKey, hash_key, read_admin_key, read_keys_file, tenants_of
from kvwise.server.tenancy.quota import Lease, Quota
from kvwise.server.tenancy.tenant import EVERYBODY, Tenant

__all__ = ["Lease", "Tenant", "Tenants"]

_log = logging.getLogger(__name__)
_MOST_KEY_BYTES = 1024  # no key is longer: what a header may make us hash
_SCHEME = "bearer"


class Tenants:
    """Knows keys by their SHA-256 only. Without `keys` everybody is `tenants[0]`; without `admin` nobody is."""

    def __init__(
        self, tenants: Sequence[Tenant] = (EVERYBODY,), keys: Sequence[KnownKey] = (), admin: bytes | None = None,
        clock: Clock | None = None,
    ) -> None:  # fmt: skip
        self.tenants = tuple(tenants)
        self._keys = [(key.digest, key.tenant) for key in keys]
        self._admin = admin
        self._by_name = {tenant.name: tenant for tenant in self.tenants}
        self._by_id = {tenant.id: tenant for tenant in self.tenants}
        if len(self._by_name) < len(self.tenants) or not self.tenants:
            raise UsageError("tenants need names that differ, and there must be one")
        if admin is not None and any(hmac.compare_digest(admin, digest) for digest, _ in self._keys):
            raise UsageError("the administration's key is also a tenant's: give it one of its own")
        clock = clock or MonotonicClock()
        self._quotas = {tenant.id: Quota(tenant, clock) for tenant in self.tenants}

    @classmethod
    def open(cls, settings: ServerSettings, *, api_keys: Sequence[str] = (), clock: Clock | None = None) -> "Tenants":
        """Read the files that the settings name. `api_keys` make one tenant without a name.

        UsageError for a file that is not sound, and for listening beyond this machine without keys.
        """
        if api_keys and settings.keys_file is not None:
            raise UsageError("API keys come from the command line or from a keys file: give one of them")
        admin = None if settings.admin_key_file is None else read_admin_key(settings.admin_key_file)
        if settings.keys_file is not None:
            keys = read_keys_file(settings.keys_file)
            tenants = tenants_of(keys)
        else:
            if any(not key.strip() for key in api_keys):
                raise UsageError("an API key is empty: leave --api-key out, or give it a value")
            keys, tenants = [KnownKey(hash_key(key.encode()), EVERYBODY) for key in api_keys], [EVERYBODY]
        if not keys and not is_loopback(settings.host):
            if not settings.insecure:
                raise UsageError(
                    f"host {settings.host!r} lets others in, and there is no API key: give --api-key or a keys file, "
                    "listen on 127.0.0.1, or say --insecure"
                )
            _log.warning("listening on %s without an API key: everybody who reaches it may use it", settings.host)
        return cls(tenants, keys, admin, clock)

    # -- who ----------------------------------------------------------------------------------------------------

    @property
    def has_keys(self) -> bool:
        """Whether requests need one."""
        return bool(self._keys)

    @property
    def has_admin(self) -> bool:
        """Whether there is an administration at all."""
        return self._admin is not None

    def authenticate(self, request: HTTPConnection) -> Tenant:
        """Whose request it is, by its one `Authorization: Bearer` header; ApiError 401, whatever is wrong with it."""
        if not self._keys:
            return self.tenants[0]
        given, found = _digest(request), None
        for digest, tenant in self._keys:  # all of them, so that time tells nothing
            found = tenant if hmac.compare_digest(digest, given) else found
        if found is None:
            raise _unknown_key()
        return found

    def require_admin(self, request: HTTPConnection) -> None:
        """ApiError 401 unless the request has the administration's own key."""
        given = _digest(request)
        if self._admin is None or not hmac.compare_digest(self._admin, given):
            raise _unknown_key()

    def named(self, name: str) -> Tenant:
        """The tenant of that name; UsageError if there is none. For the operator."""
        if name not in self._by_name:
            known = ", ".join(self._by_name) or "only the one without a name"
            raise UsageError(f"no tenant is called {name!r}; there is: {known}")
        return self._by_name[name]

    def of_id(self, tenant_id: str) -> Tenant | None:
        """The tenant with that id; None if there is none."""
        return self._by_id.get(tenant_id)

    def require_strategy(self, tenant: Tenant, strategy: str | None) -> None:
        """ApiError 403 unless the tenant may choose it; None: it chose none."""
        allowed = tenant.strategies
        if strategy is not None and allowed is not None and str(parse(strategy)) not in allowed:
            raise ApiError(
                403, f"strategy {strategy!r} is not open to you; choose {' or '.join(allowed) or 'none'}",
                type=PERMISSION, param="strategy", code="strategy_not_allowed",
            )  # fmt: skip

    # -- how much -----------------------------------------------------------------------------------------------

    def require_quota(self, tenant: Tenant) -> None:
        """ApiError 429 if the smallest request would be refused: before a body is read."""
        self._quotas[tenant.id].require(1, 1)

    def lease(self, tenant: Tenant, num_prompt: int, max_output: int, *, num_samples: int = 1) -> Lease:
        """Take a request's share of its tenant's quotas: tokens of its prompts, the most its samples may generate.

        ApiError 429 with Retry-After if it must wait. The lease must be finished, however the request ends.
        """
        return self._quotas[tenant.id].lease(num_samples, num_prompt, max_output)

    def num_running(self, tenant: Tenant) -> int:
        """Samples that the tenant has in flight."""
        return self._quotas[tenant.id].num_running

    @property
    def cached_bytes(self) -> Mapping[str, int]:
        """Tenant id -> most bytes of KV in each tier: `EngineConfig.tenant_quotas`."""
        return {tenant.id: tenant.cached_bytes for tenant in self.tenants if tenant.cached_bytes is not None}

    async def tell(self, service: EngineService) -> None:
        """Give the tenants' times to live to the engines; to be said again when one was replaced."""
        for strategy in service.strategies:
            for tenant in self.tenants:
                await service.call(lambda e, t=tenant: e.lifecycle.set_tenant_ttl(t.id, t.ttl), strategy)  # type: ignore[misc]


def _digest(request: HTTPConnection) -> bytes:
    """SHA-256 of the key that a request brings; of nothing for all that is no key."""
    headers = request.headers.getlist("authorization")
    scheme, _, key = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    raw = key.strip(" ").encode("latin-1")  # as Starlette has decoded it
    usable = scheme.lower() == _SCHEME and len(raw) <= _MOST_KEY_BYTES
    return hash_key(raw) if usable and raw else sha256(b"").digest()


def _unknown_key() -> ApiError:
    return ApiError(
        401, "this API key is not known here: send 'Authorization: Bearer KEY' with one that is", type=AUTHENTICATION,
        code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
    )  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
