"""Quotas: how many requests and tokens a tenant may have a minute, and how many samples at once."""

from collections.abc import Callable
from math import ceil

from kvwise.core.clock import Clock
from kvwise.server.errors import RATE_LIMIT, ApiError
from kvwise.server.tenancy.tenant import Tenant

_MINUTE_S = 60.0
_CONCURRENT_RETRY_S = 1.0  # nobody knows when a request will end


class Bucket:
    """Holds up to `limit`, which flow in evenly within a minute.

    What asks for more than it can ever hold needs it full and leaves a debt, so that nothing waits for ever and the
    rate holds all the same.
    """

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._at = clock.now()

    @property
    def level(self) -> float:
        """What it holds now; below 0 in debt."""
        now = self._clock.now()
        self._level = min(self.limit, self._level + (now - self._at) * self.limit / _MINUTE_S)
        self._at = now
        return self._level

    def wait_s(self, amount: int) -> float:
        """Seconds until `amount` may be taken."""
        lack = min(amount, self.limit) - self.level
        return max(0.0, lack * _MINUTE_S / self.limit)

    def take(self, amount: int) -> None:
        """Take `amount`; below 0 gives back."""
        self._level = min(self.limit, self.level - amount)

    def headers(self, what: str) -> dict[str, str]:
        """As OpenAI tells of a limit."""
        return {
            f"x-ratelimit-limit-{what}": str(self.limit),
            f"x-ratelimit-remaining-{what}": str(max(0, int(self.level))),
            f"x-ratelimit-reset-{what}": show_reset((self.limit - self.level) * _MINUTE_S / self.limit),
        }


class Lease:
    """One request's share of its tenant's quotas, held until `finish`."""

    def __init__(self, quota: "Quota", num_samples: int, max_output: int) -> None:
        self._quota = quota
        self._num_samples = num_samples
        self._max_output = max_output
        self._open = True

    @property
    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*` for the answer."""
        return self._quota.headers

    def finish(self, num_output: int) -> None:
        """The request is over: tokens it did not generate are given back. Nothing happens the second time."""
        if self._open:
            self._open = False
            self._quota.give_back(self._num_samples, max(0, self._max_output - num_output))


class Quota:
    """What a tenant has used of its limits. Runs on the event loop."""

    def __init__(self, tenant: Tenant, clock: Clock) -> None:
        make: Callable[[int | None], Bucket | None] = lambda n: None if n is None else Bucket(n, clock)  # noqa: E731
        self._requests = make(tenant.requests_per_minute)
        self._tokens = make(tenant.tokens_per_minute)
        self._max_concurrent = tenant.max_concurrent
        self.num_running = 0  # samples

    @property
    def headers(self) -> dict[str, str]:
        """`x-ratelimit-*` of the limits there are."""
        requests = {} if self._requests is None else self._requests.headers("requests")
        return requests if self._tokens is None else requests | self._tokens.headers("tokens")

    def require(self, num_samples: int, num_tokens: int) -> None:
        """ApiError unless a request of so many samples, and tokens in all, may begin now. Changes nothing."""
        most = self._max_concurrent
        if most is not None and num_samples > most:
            raise ApiError(
                400, f"a request of {num_samples} samples is more than the {most} that you may have at once: ask for "
                "fewer", code="too_many_samples",
            )  # fmt: skip
        waits = [
            (0.0 if b is None else b.wait_s(amount), b, amount, what)
            for b, amount, what in ((self._requests, 1, "requests"), (self._tokens, num_tokens, "tokens"))
        ]
        wait, bucket, amount, what = max(waits, key=lambda one: one[0])
        if bucket is not None and wait > 0:
            raise self._refusal(f"{bucket.limit} {what} a minute; this request needs {amount}", wait)
        if most is not None and self.num_running + num_samples > most:
            raise self._refusal(f"{most} samples at once; {self.num_running} are running", _CONCURRENT_RETRY_S)

    def _refusal(self, limit: str, wait_s: float) -> ApiError:
        headers = {"Retry-After": str(max(1, ceil(wait_s))), "retry-after-ms": str(ceil(wait_s * 1000))}
        return ApiError(
            429, f"rate limit reached: {limit}. Try again in {wait_s:.3g} s", type=RATE_LIMIT,
            code="rate_limit_exceeded", headers=headers | self.headers,
        )  # fmt: skip

    def lease(self, num_samples: int, num_prompt: int, max_output: int) -> Lease:
        """Take what a request may need at most; ApiError 429 if it must wait, and nothing is taken then."""
        self.require(num_samples, num_prompt + max_output)
        self.num_running += num_samples
        for bucket, amount in ((self._requests, 1), (self._tokens, num_prompt + max_output)):
            if bucket is not None:
                bucket.take(amount)
        return Lease(self, num_samples, max_output)

    def give_back(self, num_samples: int, num_tokens: int) -> None:
        """Samples have ended, and tokens were not needed."""
        self.num_running -= num_samples
        if self._tokens is not None:
            self._tokens.take(-num_tokens)


def show_reset(seconds: float) -> str:
    """A duration as OpenAI writes them: `250ms`, `1.5s`, `6m0s`."""
    if seconds < 1:
        return f"{ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, _MINUTE_S)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:.3g}s"
