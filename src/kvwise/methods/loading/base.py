"""The seam of loading: which stored blocks to bring back in which order, and whether to compute meanwhile.

A loading method only decides, over numbers; it never sees a byte, a thread or a tensor. The engine carries it out with
real threads, and the same code runs under a virtual clock in tests and in the simulator.

The life of a load: `decide` once, at admission; unless it says COMPUTE, an I/O worker asks `next_chunk` again and
again until it answers None, and the engine asks `may_compute` before each step. Whatever `decide` said of LOAD or
BOTH, `may_compute` has the last word: the first is what is expected, the second what has turned out.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from kvwise.core.method import Axis, Method, Trait

Flags = npt.NDArray[np.bool_]
_CODEC = re.compile(r"[a-z][a-z0-9_-]*")


class Decision(StrEnum):
    """What becomes of a request's stored prefix."""

    COMPUTE = "compute"  # the stored blocks are left alone
    LOAD = "load"  # they are loaded, and only what is missing then is computed
    BOTH = "both"  # they are loaded from one end and computed from the other


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known when a request is admitted. Blocks are counted from the start of the prompt.

    The device holds blocks [0, first); tiers below hold the blocks [first, stop): block `first + i` takes
    `num_bytes[i]` bytes in tier `tiers[i]`. `num_tokens` is the prompt's length, `step_tokens` the most tokens a step
    may compute. `ttft_target_s` is the time to the first token that is wanted, if any. `levels[i]` names the codec
    levels in which the block is stored, best first (one, for all but cachegen), `level_bytes[i]` their sizes.
    `seconds_to_compute(start, stop)` guesses the prefill of tokens [start, stop); `seconds_to_load(tier, bytes)` a
    transfer alone on its link; either is None while nothing was measured. They may be asked at any time and tell what
    is known then. `queued_s(tier)`: the transfers ahead of it there.
    """

    block_size: int
    first: int
    stop: int
    num_tokens: int
    step_tokens: int
    tiers: Sequence[str]
    num_bytes: Sequence[int]
    seconds_to_compute: Callable[[int, int], float | None]
    seconds_to_load: Callable[[str, int], float | None]
    queued_s: Callable[[str], float]
    num_layers: int = 1
    ttft_target_s: float | None = None
    levels: Sequence[Sequence[str]] = ()
    level_bytes: Sequence[Sequence[int]] = ()


class Chunk(NamedTuple):
    """Blocks [start, stop) to load next: all layers, or one; at a codec level (index into the outlook's), or None."""

    start: int
    stop: int
    layer: int | None = None
    level: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is, at the moment of asking.

    `computed` is the first block that is not computed and not about to be (a step under way counts as done);
    `arrived` bool [stop - first]: loaded and verified; `failed` bool, same shape: not to be had, must be computed.
    `layers` is the number of layers that all blocks have (by-layer methods only). `elapsed_s` since admission;
    `last_bytes`, `last_s` the latest chunk that arrived (0 bytes: none yet) and `last_tier` where it lay (None: in the
    only tier there is); `last_tokens`, `last_step_s` the latest
    step that computed for this prompt, and how long the whole step took (0 tokens: none yet). `under_way` is the chunk
    being loaded now and `waited_s` since when. `loading` is False once `next_chunk` has answered None or the load was
    given up: what has not arrived then never will, and must be computed.
    """

    computed: int
    arrived: Flags
    failed: Flags
    layers: int = 0
    elapsed_s: float = 0.0
    last_bytes: int = 0
    last_s: float = 0.0
    last_tier: str | None = None
    last_tokens: int = 0
    last_step_s: float = 0.0
    under_way: Chunk | None = None
    waited_s: float = 0.0
    loading: bool = True


@dataclass(frozen=True)
class Loading(Method):
    """How stored KV comes back. A subclass states `by_layer` and says what `decide`, `next_chunk`, `may_compute` do."""

    axis: ClassVar[Axis] = Axis.LOADING
    traits: ClassVar[frozenset[Trait]] = frozenset({Trait.NEEDS_PREFIX_KEYS, Trait.SKIPS_ROWS})
    by_layer: ClassVar[bool] = False  # chunks name a layer; the rest of the prompt is computed while later ones come

    @property
    @abstractmethod
    def codec(self) -> str | None:
        """The codec of the blocks at rest, such as `raw`; None: this method stores and loads nothing."""

    def require_codec(self) -> None:
        """Refuse an option `codec` that cannot name one; which codecs there are is the tiers' knowledge."""
        self.require("codec", _CODEC.fullmatch(str(self.codec)) is not None, "the name of a codec, such as raw or int8")

    @property
    def look_ahead(self) -> int:
        """Waiting requests whose blocks are fetched to the fastest tier and kept there."""
        return 0

    @abstractmethod
    def decide(self, outlook: Outlook) -> Decision:
        """What to do with a request's stored prefix. Called once, at admission."""

    @abstractmethod
    def next_chunk(self, outlook: Outlook, progress: Progress) -> Chunk | None:
        """What to load next, or None: nothing more (for good). Called by the I/O worker, between chunks.

        The blocks of a chunk lie in one tier and have not arrived (a layer's chunk, by layer, names all blocks).
        """

    @abstractmethod
    def may_compute(self, outlook: Outlook, progress: Progress) -> bool:
        """Whether the step's leftover budget may go to this request's prompt now. Called before each step.

        The engine skips what has arrived and never computes past the next arrived block in one step. Once nothing is
        loading any more it need not ask: the answer is True.
        """
