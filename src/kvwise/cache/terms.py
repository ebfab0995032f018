"""Terms: under which conditions a block is kept, the same in every tier."""

from dataclasses import dataclass
from math import inf, isnan

from kvwise.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Terms:
    """How long a block may be found, and whose it is; infinity is "no limit".

    `expires_at` is absolute, in seconds on the injected clock: a promise about data, so no hit prolongs it. `idle_s`
    seconds may pass without a hit; every hit starts them anew, never beyond `expires_at`. `tenant` is the tenant of
    the salt, `session` who stored the block ("": nobody's).
    """

    expires_at: float = inf
    idle_s: float = inf
    tenant: str = ""
    session: str = ""

    def __post_init__(self) -> None:
        if isnan(self.expires_at) or not self.idle_s > 0:
            raise UsageError(
                f"expires_at {self.expires_at}, idle_s {self.idle_s}: a deadline must be a number, and an idle time "
                "more than 0 seconds (leave it out for no limit)"
            )

    def deadline(self, now: float) -> float:
        """When a block that is stored or hit at `now` seconds is no longer found, if nobody hits it again."""
        return min(self.expires_at, now + self.idle_s)


NO_LIMIT = Terms()
