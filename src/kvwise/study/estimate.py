"""Means with standard errors that know which answers belong together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.96  # standard errors on either side of a 95 % interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error, from `count` answers. Answers of one context are not taken as independent."""

    value: float
    error: float
    count: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - Z * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + Z * self.error


def mean(values: Sequence[float], clusters: Sequence[object]) -> Estimate:
    """The mean of `values`; `clusters[i]` names the episode of value i. ValueError if there are none.

    The error is the cluster-robust one (Liang and Zeger 1986, with the factor J / (J - 1) for J clusters): residuals
    are added up within an episode before they are squared. One episode alone gives no such error: its answers are
    then taken as independent, and a single answer is as uncertain as it is large.
    """
    data = _column(values)
    residuals = (data - data.mean()) / len(data)
    return Estimate(float(data.mean()), _clustered(residuals, clusters, abs(float(data.mean()))), len(data))


def share(values: Sequence[float], clusters: Sequence[object], trials: int | None = None) -> Estimate:
    """The mean of values from 0 to 1, such as right answers; `trials` if a value is itself a share of several.

    Its error is never below that of so many independent trials by Agresti and Coull's rule (1998: two right and two
    wrong ones are added), so that few answers which are all right do not claim to be certain.
    """
    plain = mean(values, clusters)
    least = agresti_coull(plain.value, plain.count if trials is None else trials)
    return Estimate(plain.value, max(plain.error, least), plain.count)


def ratio(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[object]) -> Estimate:
    """Mean of `ours` over mean of `theirs` (values from 0 to 1, answer i the same question in both).

    The error is the delta method's for paired answers, clustered by episode: that of `ours - ratio * theirs`. It is
    never below what Agresti and Coull's rule gives for the share of questions on which the two differ. ValueError if
    the mean of `theirs` is 0.
    """
    a, b = _column(ours), _column(theirs)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} answers against {len(b)}: a ratio needs the same questions on both sides")
    if b.mean() == 0:
        raise ValueError("a ratio to answers that are all wrong")
    value = float(a.mean() / b.mean())
    error = _clustered((a - value * b) / (len(a) * b.mean()), clusters, value)
    least = agresti_coull(float(np.abs(a - b).mean()), len(a)) / float(b.mean())
    return Estimate(value, max(error, least), len(a))


def average(groups: Sequence[Sequence[Estimate]]) -> Estimate:
    """The mean of all estimates; ValueError if there are none.

    Groups are independent of each other (tasks, whose episodes are drawn anew). Within a group (protocols on the same
    episodes) errors are added as they are, as if they went up and down together, which overstates rather than
    understates.
    """
    flat = [estimate for group in groups for estimate in group]
    if not flat:
        raise ValueError("the mean of no estimates")
    error = math.sqrt(sum(sum(e.error for e in group) ** 2 for group in groups)) / len(flat)
    return Estimate(sum(e.value for e in flat) / len(flat), error, sum(e.count for e in flat))


def agresti_coull(p: float, n: int) -> float:
    """The standard error of a share `p` of `n` independent answers, with two right and two wrong ones added."""
    moved = (p * n + 2) / (n + 4)
    return math.sqrt(moved * (1 - moved) / (n + 4))


def _clustered(residuals: np.ndarray, clusters: Sequence[object], alone: float) -> float:
    """Root of the summed squares of each cluster's residuals; `alone` is the error of a single value."""
    if len(clusters) != len(residuals):
        raise ValueError(f"{len(residuals)} answers in {len(clusters)} clusters: every answer needs one")
    names = list(dict.fromkeys(clusters))
    groups: Sequence[object] = clusters
    if len(names) < 2:
        groups = names = list(range(len(residuals)))
    if len(names) < 2:
        return alone
    place = {name: i for i, name in enumerate(names)}
    sums = np.bincount([place[g] for g in groups], weights=residuals, minlength=len(names))
    return float(math.sqrt(len(names) / (len(names) - 1) * (sums**2).sum()))


def _column(values: Sequence[float]) -> np.ndarray:
    if len(values) == 0:
        raise ValueError("the mean of no values")
    return np.asarray(values, dtype=np.float64)
