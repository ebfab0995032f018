"""LESS: heavy hitters and the latest tokens stay, and all others live on in a small trained state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kvwise.core.errors import StrategyError
from kvwise.core.method import Trait
from kvwise.methods.retention.base import DecodeView, Kept, PromptView, Residual, ResidualShape, Retention
from kvwise.methods.retention.feature_maps import FILE, load, untrained
from kvwise.methods.retention.folded import Folded
from kvwise.methods.retention.h2o import H2O

if TYPE_CHECKING:
    from torch import Tensor

AUTO, UNTRAINED = "auto", "untrained"


@dataclass(frozen=True)
class Less(Retention):
    """LESS, arXiv 2402.09398: H2O's rule, and what leaves is folded into a state of fixed size per KV head.

    `budget` and `recent` are those of H2O (the paper's 2.5 % heavy hitters and 2.5 % latest tokens are the defaults).
    A token that leaves adds `psi(k) v` and `psi(k)` to the state; a query that attends to the tokens that stay
    attends to the state as well, in one softmax: see `folded.Folded.merge`. The state is as large as about four tokens
    of KV where the head size is 128.

    phi and psi are trained for a model (`kvwise train less`) and found beside its weights as `less.safetensors`, or
    where `weights` says. `weights=untrained` is what training starts from: H2O but for traces, a control.
    """

    budget: float = 0.05
    recent: float = 0.5
    weights: str = AUTO

    name: ClassVar[str] = "less"
    idea: ClassVar[str] = "as h2o, and fold what leaves into a small trained state that is still attended to"
    paper: ClassVar[str] = "LESS, arXiv 2402.09398"
    traits: ClassVar[frozenset[Trait]] = frozenset(
        {Trait.NEEDS_EVERY_ROW, Trait.OWNS_PAGES, Trait.PRIVATE, Trait.LIVES_ON, Trait.FOLDS}
    )
    needs_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require("budget", 0 < self.budget <= 1, "above 0, at most 1")
        self.require("recent", 0 <= self.recent <= 1, "0 to 1")

    @property
    def drops(self) -> bool:
        """Unless the budget is 1."""
        return self.budget < 1

    @property
    def policy(self) -> H2O:
        """What decides who stays."""
        return H2O(self.budget, self.recent)

    @property
    def ranks_by_mass(self) -> bool:
        """As H2O says."""
        return self.policy.ranks_by_mass

    def capacity(self, num_prompt_tokens: int) -> int | None:
        """As H2O says."""
        return self.policy.capacity(num_prompt_tokens)

    def keep(self, view: PromptView) -> Kept:
        """As H2O says."""
        return self.policy.keep(view)

    def worth(self, view: DecodeView) -> Tensor:
        """As H2O says."""
        return self.policy.worth(view)

    def residual(self, shape: ResidualShape) -> Residual | None:
        """The folded state; StrategyError, naming the command, if nobody has trained it for this model."""
        heads = (shape.num_layers, shape.num_query_heads, shape.num_kv_heads, shape.head_dim)
        if self.weights == UNTRAINED:
            return Folded(shape, untrained(*heads, hidden=shape.head_dim))
        return Folded(shape, load(self._file(shape), *heads))

    def _file(self, shape: ResidualShape) -> Path:
        if self.weights != AUTO:
            path, why = Path(self.weights).expanduser(), "is no file"
        elif shape.folder is not None:
            path, why = shape.folder / FILE, "is not there"
        else:
            path, why = Path(FILE), "would lie beside the model's weights, which have no folder here"
        if path.is_file() and (self.weights != AUTO or shape.folder is not None):
            return path
        raise StrategyError(
            f"{self.name} needs kernels trained for {shape.model}, and {path} {why}: make them with 'kvwise train less"
            f" --model {shape.model} --out FILE' and name the file in less(weights=FILE), or put it beside the model's"
            f" weights as {FILE}; less(weights={UNTRAINED}) tries it without"
        )
