"""The one kernel signature: what attention over paged segments means, whoever computes it.

Shape letters: T tokens, B sequences, H KV heads, G query heads per KV head, Hq = G * H query heads, D head dim
(Dk keys, Dv values), P pages, N entries of a table.

A *slot* is ``page * block_size + offset``. Whole-block tables name blocks, shared by all heads, and the page of
head ``h`` is ``block * page_stride + page_offset + h``; per-head tables name pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.kernels.folded import FoldedStates
from kvwise.kernels.packed import PackedArena


@dataclass(frozen=True, slots=True)
class Sealed:
    """The packed pages that hold the first tokens of a segment; its open pages hold those after them.

    Token ``t`` of a (sequence, head) has its key in page ``tables[b, h, t // S]``, row ``t % S``, if
    ``t < key_lengths[b, h]``, else at open slot ``t - open_base[b, h]`` of the segment's own table; its value
    likewise by `value_lengths`. Always ``open_base <= value_lengths <= key_lengths``.
    """

    arena: PackedArena
    tables: Tensor  # int32 [B, H, M] packed pages
    key_lengths: Tensor  # int32 [B, H]
    value_lengths: Tensor  # int32 [B, H]
    open_base: Tensor  # int32 [B, H]: token of open slot 0
    key_channels: Tensor | None = (
        None  # int32 [B, H, dim], distinct: the query's channels that meet plain keys of fewer (ThinK)
    )
    upper_only: bool = False  # split codes are read by their upper plane alone (QuantSpec's draft)
    positions: Tensor | None = None  # int32 [packed pages, S], read only under a window; None: index of the token
    mass: Tensor | None = None  # float32 [packed pages, S]: mass of tokens < key_lengths is added here


@dataclass(frozen=True, slots=True)
class Marks:
    """What to note of a key's mass instead of adding it to its column: where it is at least the bound, the position."""

    bound: Tensor  # float32 [B, H], more than 0
    position: Tensor  # float32 [B]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of pages in one encoding at one place; attention over several is one softmax over all of them.

    ``causal``: of the ``n`` queries of a sequence, query ``i`` sees the first ``length - n + i + 1`` slots in table
    order (so ``lengths`` counts the queries' own tokens, already appended); otherwise every query sees all
    ``length`` slots. A count below zero is none.

    A *stack* is F segments at once that differ in tables [F, B, H, N], lengths [F, B, H] and queries [F, T, Hq, Dk]
    only; without packed pages.

    With ``sealed``, ``lengths`` counts the tokens in packed and open pages together, tables are per head, and both
    ``positions`` and ``mass`` speak of open pages only.
    """

    keys: Tensor  # [P, block_size, Dk] float32, bfloat16 or float16
    values: Tensor  # [P, block_size, Dv], dtype of the keys
    tables: Tensor  # int32 [B, N] whole blocks, or [B, H, N] pages per head
    lengths: Tensor  # int32 [B], or [B, H]: slots in use
    num_kv_heads: int | None = None  # H; needed with whole-block tables, which do not say it
    page_stride: int = 1  # whole blocks only
    page_offset: int = 0  # whole blocks only
    causal: bool = True
    positions: Tensor | None = (
        None  # int32 [P, block_size]; read only under a window; None: position = index in table order
    )
    mass: Tensor | None = None  # float32 [P, block_size]; the softmax mass each key receives is added here
    sealed: Sealed | None = None  # packed pages before the open ones
    marks: Marks | None = None  # `mass` columns, of packed pages too, hold positions of rows that looked at a key
    queries: Tensor | None = None  # [T, Hq, Dk]: what these keys meet instead of the call's (rotated otherwise)

    @property
    def whole_blocks(self) -> bool:
        """Whether the table names blocks shared by all heads (else pages per head)."""
        return self.tables.ndim == 2

    @property
    def is_stack(self) -> bool:
        """Whether these are several segments."""
        return self.tables.ndim == 4

    def parts(self) -> "list[Segment]":
        """The segments of a stack; itself if it is none."""
        if not self.is_stack:
            return [self]
        of = [None] * len(self.tables) if self.queries is None else list(self.queries)
        return [
            replace(self, tables=tables, lengths=lengths, queries=queries)
            for tables, lengths, queries in zip(self.tables, self.lengths, of, strict=True)
        ]

    @property
    def num_heads(self) -> int:
        """KV heads H of this segment."""
        if not self.whole_blocks:
            return int(self.tables.shape[-2])
        if self.num_kv_heads is None:
            raise UsageError("a segment over whole blocks does not say its KV heads; pass num_kv_heads=")
        return self.num_kv_heads


class Attention(NamedTuple):
    """Result of one attend: ``out`` [T, Hq, Dv] in the query's dtype; ``lse`` [T, Hq] float32, natural log, or None."""

    out: Tensor
    lse: Tensor | None


class Kernels(Protocol):
    """What a kernel family offers; all compute the same function, and `reference` is its specification."""

    @property
    def name(self) -> str:
        """Name by which `kernels_for` finds this family."""
        ...

    def attend(
        self,
        queries: Tensor,
        query_start: Tensor,
        segments: Sequence[Segment],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        query_positions: Tensor | None = None,
        want_lse: bool = False,
        mass_rows: Tensor | None = None,
        mass_fading: Tensor | None = None,
    ) -> Attention:
        """Softmax attention of flat queries over the slots of all segments, accumulated in float32.

        queries: [T, Hq, Dk]; query head ``h * G + g`` reads KV head ``h``.
        query_start: int32 [B + 1]; sequence ``b`` owns rows ``query_start[b]:query_start[b + 1]`` (may be none).
        scale: factor on the dot products. softcap: logits become ``softcap * tanh(logits / softcap)``.
        window: a key is visible iff ``0 <= query position - key position < window``. Positions of keys are a
            segment's ``positions`` if given, else their index in table order; of queries ``query_positions``
            int32 [T] if given, else ``length - n + i``.
        mass_rows: int32 [B]; only the last ``mass_rows[b]`` rows of a sequence count towards the mass (None: all
            rows). The mass of a key is the sum of its true probabilities, after the merge over all segments, over
            the counted rows and the G heads reading it. It needs no T x T memory in any family. Pages of a segment
            with `marks` belong to one sequence and head.
        mass_fading: float32 [T]; a row's probabilities count ``exp(-mass_fading)`` times towards the mass (None: once).

        A query that sees no key, or that no sequence owns, gets out 0 and lse -inf.
        Raises UsageError on shapes that do not fit; native kernels also on pages outside an arena.
        """
        ...

    def append(
        self,
        keys_new: Tensor,
        values_new: Tensor,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        *,
        page_stride: int = 1,
        page_offset: int = 0,
    ) -> None:
        """Write new rows [T, H, D] into the arenas, rounded to their dtype.

        slots: int64 [T], ``block * block_size + offset``, where head ``h`` goes to page
        ``block * page_stride + page_offset + h``; or [T, H] in page space.
        """
        ...

    def gather(self, arena: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows [n, D] at int64 slots [n] of an arena [P, block_size, D], into ``out`` if given; of a column [n]."""
        ...

    def scatter(self, rows: Tensor, arena: Tensor, slots: Tensor) -> None:
        """Write rows [n, D] (of a column [n]) at int64 slots [n] of an arena; the slots must differ."""
        ...

    def move_slots(self, arena: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy slot ``source[i]`` to ``target[i]`` of an arena or column, in order of ``i``; int64 [n] each."""
        ...

    def copy_pages(
        self, source_arena: Tensor, source_pages: Tensor, target_arena: Tensor, target_pages: Tensor
    ) -> None:
        """Copy whole pages between arenas (or columns) of one dtype and page shape; int64 pages [n] each."""
        ...

    def lowest(self, worth: Tensor, first: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """The least of each ``worth[i, first[i]:stop[i]]`` and the index of the first such: float32 and int64 [n].

        worth: float [n, S]; first, stop: int [n]. Infinite where there is none, nan where any is; the index means
        nothing then.
        """
        ...

    def lowest_mass(
        self, mass: Tensor, positions: Tensor, tables: Tensor, first: Tensor, stop: Tensor, newest: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `lowest`, of the masses of n heads' slots ``first[i]:stop[i]``; after position ``newest[i]`` infinite.

        mass float32 and positions int32 are columns [P, block_size], tables int32 [n, N] pages; newest: int [n]. The
        index counts slots in table order. Native kernels raise UsageError on pages outside the columns.
        """
        ...

    def rotate(self, keys: Tensor, delta: Tensor, inv_freq: Tensor, *, interleaved: bool = False) -> Tensor:
        """Re-position rotated keys [n, D] by ``delta`` positions int [n]; a new tensor of the same dtype.

        The first ``2 * len(inv_freq)`` dims are rotary: halves (GPT-NeoX and Llama style) or interleaved pairs
        (GPT-J style); the rest is untouched. Exact for rotary embeddings (RoFormer, arXiv 2104.09864, section 3.2).
        """
        ...

    def angles(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the m different ones of positions int [...], cosines and sines float32 [m, R], and which is whose, int64.

        What `turn` takes. Exact: the angles are made in float64.
        """
        ...

    def turn(self, rows: Tensor, cos: Tensor, sin: Tensor, which: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rows [n, D] as they are rotated by angles of a table, each by F of them: float32 [F, n, D].

        cos, sin: float32 [m, R] of each angle's R pairs of dims; which: int64 [F, n]. Dims as in `rotate`.
        """
        ...

    def seal_keys(
        self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor, channels: Tensor | None = None
    ) -> None:
        """Pack the rows at slots int64 [n, S] of an open arena [P, block_size, D] into the keys of pages int64 [n].

        channels: int64 [n, dim], which channels a plain part of fewer keeps. Slots of a last page that is not full may
        repeat any row where the part is plain (rows stand alone there). Codes of a group and a page's float8 scale
        cover all S rows.
        """
        ...

    def seal_values(self, arena: Tensor, slots: Tensor, packed: PackedArena, pages: Tensor) -> None:
        """Pack the rows at slots int64 [n, S] of an open arena into the values of pages int64 [n]."""
        ...

    def seal_value_rows(self, arena: Tensor, slots: Tensor, packed: PackedArena, packed_slots: Tensor) -> None:
        """Pack single rows at slots int64 [n] as the values of tokens ``page * S + row``, int64 [n], all different.

        Only where rows stand alone: plain parts and codes whose axis is "token"; others raise UsageError. Rows of the
        page not named keep what they hold.
        """
        ...

    def unseal(self, packed: PackedArena, pages: Tensor) -> tuple[Tensor, Tensor]:
        """What pages int64 [n] hold: float32 keys [n, S, channels kept] and values [n, S, D]."""
        ...

    def fold(
        self, states: FoldedStates, rows: Tensor, layers: Tensor, heads: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Tokens leave: `psi(k)^T v` is added to H and `psi(k)` to z of their (row, layer, head) triples.

        rows, layers, heads int64 [n], triples may repeat; keys (rotated) and values [n, D]. Native kernels raise
        UsageError on what is outside the states.
        """
        ...

    def merge_folded(
        self, states: FoldedStates, layer: int, rows: Tensor, queries: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """One softmax over what stays and what has left: `(e^lse out + phi H) / (e^lse + phi z)`, in out's dtype.

        B requests in rows int64 [B] have attended to what stays: queries and out [B, Hq, D], lse float32 [B, Hq].
        Where nothing has left it is `out`, to the bit.
        """
        ...


def check_attend(
    queries: Tensor, query_start: Tensor, segments: Sequence[Segment], query_positions: Tensor | None
) -> int:
    """KV heads H shared by all segments; raises UsageError on shapes that do not fit (contents are not read)."""
    if not segments:
        raise UsageError("attend needs at least one segment")
    num_heads, num_query_heads = segments[0].num_heads, queries.shape[1]
    if num_query_heads % num_heads:
        raise UsageError(f"{num_query_heads} query heads are not a multiple of {num_heads} KV heads")
    num_sequences = query_start.shape[0] - 1
    for segment in segments:
        _check_segment(segment, num_sequences, num_heads, queries.shape)
    if query_positions is not None and query_positions.shape != queries.shape[:1]:
        raise UsageError(f"query_positions has shape {tuple(query_positions.shape)}, queries need [{queries.shape[0]}]")
    return num_heads


def _check_segment(segment: Segment, num_sequences: int, num_heads: int, shape: Sequence[int]) -> None:
    head_dim = shape[2]
    keys, values, tables = segment.keys, segment.values, segment.tables
    if keys.shape[:2] != values.shape[:2] or keys.dtype != values.dtype:
        raise UsageError(
            f"keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype} "
            "must agree in pages, block size and dtype"
        )
    if keys.shape[2] != head_dim:
        raise UsageError(f"queries have head dim {head_dim}, the key arena has {keys.shape[2]}")
    lead: tuple[int, ...] = (num_sequences,) if segment.whole_blocks else (num_sequences, num_heads)
    of_queries = tuple(shape)
    if segment.is_stack:
        lead, of_queries = (len(tables), *lead), (len(tables), *of_queries)
    if tables.shape[:-1] != lead or segment.lengths.shape != lead:
        raise UsageError(
            f"tables {tuple(tables.shape)} and lengths {tuple(segment.lengths.shape)} "
            f"do not fit {num_sequences} sequences, {num_heads} KV heads"
        )
    if segment.queries is not None and segment.queries.shape != of_queries:
        raise UsageError(f"a segment's queries {tuple(segment.queries.shape)} must be as the call's {of_queries}")
    if segment.marks is not None:
        _check_marks(segment.marks, num_sequences, num_heads)
    if segment.sealed is not None:
        _check_sealed(segment, segment.sealed, lead, head_dim)


def _check_marks(marks: Marks, num_sequences: int, num_heads: int) -> None:
    if marks.bound.shape != (num_sequences, num_heads) or marks.position.shape != (num_sequences,):
        raise UsageError(
            f"marks with bounds {tuple(marks.bound.shape)} and positions {tuple(marks.position.shape)} "
            f"do not fit {num_sequences} sequences, {num_heads} KV heads"
        )


def _check_sealed(segment: Segment, sealed: Sealed, lead: tuple[int, ...], head_dim: int) -> None:
    if segment.is_stack:
        raise UsageError("packed pages are of single segments: a stack has none")
    if segment.whole_blocks:
        raise UsageError("packed pages need per-head tables: the segment has whole-block ones")
    counts = (sealed.key_lengths, sealed.value_lengths, sealed.open_base)
    if sealed.tables.shape[:-1] != lead or any(x.shape != lead for x in counts):
        raise UsageError(f"packed tables {tuple(sealed.tables.shape)} and lengths do not fit sequences, heads {lead}")
    page, channels = sealed.arena.format, sealed.key_channels
    if page.head_dim != head_dim or page.head_dim != segment.values.shape[2]:
        raise UsageError(
            f"packed pages hold heads of {page.head_dim} channels; queries have {head_dim}, "
            f"open values {segment.values.shape[2]}"
        )
    if channels is None and page.key_dim != head_dim:
        raise UsageError(f"packed keys keep {page.key_dim} of {head_dim} channels: pass key_channels= to say which")
    if channels is not None and channels.shape != (*lead, page.key_dim):
        raise UsageError(f"key_channels {tuple(channels.shape)} must be {(*lead, page.key_dim)}")
