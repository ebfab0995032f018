"""What was measured of links and prefill, so that loading methods can compare them."""

from kvwise.methods.loading.estimate import LinkEstimate, PrefillEstimate


class Rates:
    """One estimate for each tier's link and one for prefill; nothing is known before the first sample."""

    def __init__(self) -> None:
        self.prefill = PrefillEstimate()
        self._links: dict[str, LinkEstimate] = {}

    def link(self, tier: str) -> LinkEstimate:
        """The estimate of loads from `tier`."""
        return self._links.setdefault(tier, LinkEstimate())
