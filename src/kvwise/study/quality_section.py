"""The [quality] section of a plan: what is asked of a model, under which protocols, and how surely it is known."""

import math
from typing import Annotated, Literal

from pydantic import Field

from kvwise.core.errors import PlanError, TaskError
from kvwise.study.strict import Strict
from kvwise.tasks.catalogue import parse_task

Budget = Annotated[float, Field(gt=0)]
Context = Annotated[int, Field(ge=1, le=1_000_000)]
Protocol = Literal["multi-turn", "multi-request"]

TASKS = (
    "recall",
    "multi_value",
    "tracking",
    "forgetting",
    "counting",
    "copy",
    "early_fact",
    "continuation",
)


class Records(Strict):
    """A local file of task records, the first `limit` of them, for models that read text."""

    kind: Literal["ruler", "longbench", "scbench"]
    file: str
    limit: int | None = Field(default=None, ge=1)


class Quality(Strict):
    """How quality is measured.

    `tasks` are asked in contexts of `context_lengths` tokens (none: those of the blocks), each with at least
    `ceil(0.25 / standard_error^2)` answers: the standard error of an accuracy is then at most that, at one half.
    Under the "multi-turn" protocol the questions of a context follow each other on the compressed cache; under
    "multi-request" each is asked alone on a fork of it. `guides` are strategies that are measured for quality only,
    at `guide_budgets`, on models that have tasks. Models without (random weights) get `prompts` random prompts, and
    `tokens` greedy tokens of the full cache are forced on every strategy.
    """

    tasks: tuple[str, ...] = TASKS
    context_lengths: tuple[Context, ...] = (512,)
    standard_error: float = Field(default=0.06, ge=0.002, le=0.25)
    protocols: tuple[Protocol, ...] = Field(default=("multi-turn",), min_length=1)
    guides: tuple[str, ...] = ()
    guide_budgets: tuple[Budget, ...] = ()
    records: tuple[Records, ...] = ()
    prompts: int = Field(default=4, ge=1)
    tokens: int = Field(default=16, ge=1)

    @property
    def num_answers(self) -> int:
        """The least number of answers a task."""
        # Rounded first: 0.25 / 0.05**2 is a hair above 100.
        return math.ceil(round(0.25 / self.standard_error**2, 6))


def check_quality(quality: Quality) -> None:
    """PlanError for what types cannot say."""
    for name in ("tasks", "context_lengths", "protocols", "guides", "guide_budgets"):
        values = getattr(quality, name)
        if len(set(values)) < len(values):
            raise PlanError(f"quality.{name} names {max(values, key=values.count)!r} twice")
    for text in quality.tasks:
        try:
            parse_task(text)
        except TaskError as error:
            raise PlanError(f"quality.tasks: {error}") from error
    if not quality.tasks and not quality.records:
        raise PlanError("quality.tasks is empty and there are no quality.records; name a task, such as 'recall'")
