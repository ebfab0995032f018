"""A tenant: whose requests share KV with each other and with nobody else, and how much it may ask for."""

import hmac
import json
from dataclasses import dataclass
from hashlib import sha256

from kvwise.cache.ttl import NO_TTL, Ttl

_LABEL = b"kvwise tenant 1\0"


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who a request is from. Limits that are None do not exist; sizes in bytes.

    `id` is the salt of its KV and never leaves the server; `name` is for logs ("": the only tenant there is, which has
    no name).
    """

    name: str
    id: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None  # samples in flight
    cached_bytes: int | None = None  # of KV, in each tier
    ttl: Ttl = NO_TTL  # the default of its requests, and the most they may ask for
    strategies: tuple[str, ...] | None = None  # which of the server's it may choose

    def session_key(self, session: str) -> str:
        """What the engine calls this tenant's session: names of different tenants never meet. "" stays ""."""
        return json.dumps([self.id, session]) if self.id and session else session

    def session_name(self, key: str) -> str:
        """The name of which `key` is the `session_key`."""
        return str(json.loads(key)[1]) if self.id and key else key


EVERYBODY = Tenant("", "")


def tenant_id(name: str, first_key: bytes) -> str:
    """The salt of a tenant whose first key has the SHA-256 `first_key`: who knows the name cannot tell it."""
    return f"{name}-{hmac.digest(first_key, _LABEL + name.encode(), sha256).hex()[:32]}"
