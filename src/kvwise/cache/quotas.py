"""Quotas: the most that one tenant may keep in a tier, and which of its own blocks leave for it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import inf

from kvwise.core.errors import UsageError


class Quotas:
    """Counts what tenants keep, in the tier's unit (bytes, or blocks), and ranks the slots of limited tenants.

    A tenant at its limit pushes out its own least recently used slots, never another tenant's. Only *idle* slots are
    ranked: those that may leave now.
    """

    def __init__(self, limits: Mapping[str, int]) -> None:
        for tenant, limit in limits.items():
            if limit < 0:
                raise UsageError(f"quota {limit} of tenant {tenant!r}: it must be >= 0 (leave it out for no quota)")
        self.limits = dict(limits)
        self.used: Counter[str] = Counter()
        self._idle: dict[str, dict[int, int]] = {tenant: {} for tenant in limits}  # slot -> amount, oldest first
        self._num_idle: Counter[str] = Counter()

    def room(self, tenant: str) -> float:
        """How much more the tenant could keep if all its idle slots left; infinity without a quota."""
        if tenant not in self.limits:
            return inf
        return self.limits[tenant] - self.used[tenant] + self._num_idle[tenant]

    def charge(self, tenant: str, amount: int) -> None:
        """The tenant keeps `amount` more."""
        self.used[tenant] += amount

    def discharge(self, tenant: str, amount: int) -> None:
        """The tenant keeps `amount` less; a tenant that keeps nothing is forgotten."""
        self.used[tenant] -= amount
        if not self.used[tenant]:
            del self.used[tenant]

    def offer(self, slots: Iterable[tuple[int, str, int]]) -> None:
        """(slot, tenant, amount): these may leave now; the first named first."""
        for slot, tenant, amount in slots:
            if tenant in self.limits:
                self._idle[tenant][slot] = amount
                self._num_idle[tenant] += amount

    def hold(self, slots: Iterable[tuple[int, str, int]]) -> None:
        """These may not leave any longer, or left."""
        for slot, tenant, amount in slots:
            if tenant in self.limits:
                del self._idle[tenant][slot]
                self._num_idle[tenant] -= amount

    def victims(self, tenant: str, amount: int) -> list[int]:
        """The tenant's slots that must leave before it may keep `amount` more, oldest first. Changes nothing."""
        victims: list[int] = []
        if tenant not in self.limits:
            return victims
        excess = self.used[tenant] + amount - self.limits[tenant]
        for slot, held in self._idle[tenant].items():
            if excess <= 0:
                break
            victims.append(slot)
            excess -= held
        return victims

    def idle(self) -> dict[str, dict[int, int]]:
        """A copy of tenant -> idle slot -> amount, for proofs."""
        return {tenant: dict(slots) for tenant, slots in self._idle.items()}
