"""What runs on the GPU in one attend: softmax over tiles of packed and open pages, the merge of parts, and mass.

The tiles of a (sequence, head) are numbered through: packed ones first, which lie within one page each, then those of
N consecutive tokens in open pages. A token whose key is packed and whose value is still open is met in its packed tile.
"""

# triton ships no types, and what a kernel takes (pointers, compile-time constants) Python's types cannot say.
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, no-untyped-call"

import triton
import triton.language as tl

from kvwise.kernels.triton_packed import packed_tile, page_at, read_part, tiles_before, tiles_up_to


@triton.jit
def _find_sequence(query_start, num_sequences, block, GROUP: tl.constexpr, M: tl.constexpr, B: tl.constexpr):
    """Sequence that row block `block` belongs to, and its number within it; blocks are dealt out with one to spare."""
    at = tl.arange(0, B)
    starts = tl.load(query_start + at, mask=at < num_sequences, other=0) * GROUP // M + at
    sequence = tl.sum(((starts <= block) & (at < num_sequences)).to(tl.int32), 0) - 1
    first = tl.load(query_start + sequence)
    return sequence, block - (first * GROUP // M + sequence)


@triton.jit
def _slots_of(tables, index, used, head, page_stride, page_offset, PER_HEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """int64 slots of indices in table order."""
    entry = tl.load(tables + index // BLOCK_SIZE, mask=used, other=0).to(tl.int64)
    page = entry if PER_HEAD else entry * page_stride + page_offset + head
    return page * BLOCK_SIZE + index % BLOCK_SIZE


@triton.jit
def _rows_at(arena, slots, used, DIM: tl.constexpr, D: tl.constexpr):
    """Rows [N, D] of an open arena, 0 where not used."""
    d = tl.arange(0, D)
    return tl.load(arena + slots[:, None] * DIM + d[None, :], mask=used[:, None] & (d[None, :] < DIM), other=0.0)


@triton.jit
def _queries_at(
    queries, token, query_head, valid, channels, query_stride, query_head_stride, CHOSEN: tl.constexpr,
    DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows [M, D] of queries: their first DIM channels, or those that `channels` names."""
    d = tl.arange(0, D)
    channel = tl.load(channels + d, mask=d < DIM, other=0) if CHOSEN else d
    at = token[:, None] * query_stride + query_head[:, None] * query_head_stride + channel[None, :]
    return tl.load(queries + at, mask=valid[:, None] & (d[None, :] < DIM), other=0.0)


@triton.jit
def _scores(
    q, key, index, used, where, limit, at, scale, softcap, window, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Masked logits float32 [M, N] of queries [M, D] against keys [N, D] of tokens `index` at positions `where`."""
    scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee").to(tl.float32) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1)
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    visible = used[None, :] & (index[None, :] < limit[:, None])
    if WINDOW:
        distance = at[:, None] - where[None, :]
        visible = visible & (distance >= 0) & (distance < window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _fold(scores, value, maximum, total, summed, DTYPE: tl.constexpr):
    """One more tile into the running softmax."""
    highest = tl.maximum(maximum, tl.max(scores, 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp(scores - shift[:, None])
    alpha = tl.exp(maximum - shift)
    given = tl.dot(p.to(DTYPE), value.to(DTYPE), input_precision="ieee").to(tl.float32)
    return highest, total * alpha + tl.sum(p, 1), summed * alpha[:, None] + given


@triton.jit
def attend(
    queries, query_start, query_positions, keys, values, tables, lengths, positions, out, lse, scale, softcap, window,
    num_sequences, num_parts, part_stride, part_stride_lse, query_stride, query_head_stride, table_stride,
    table_head_stride, length_stride, length_head_stride, page_stride, page_offset, num_query_heads,
    first_half, second_half, per_half, half_bytes, packed_tables, packed_table_stride, packed_table_head_stride,
    bounds, bound_stride, packed_positions, key_channels,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PER_HEAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    POSITIONS: tl.constexpr, QUERY_POSITIONS: tl.constexpr, SOFTCAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    B: tl.constexpr, SEALED: tl.constexpr, S: tl.constexpr, NP: tl.constexpr, PAGE_BYTES: tl.constexpr,
    KEY_BYTES: tl.constexpr, UPPER: tl.constexpr, CHOSEN: tl.constexpr, PACKED_POSITIONS: tl.constexpr,
    DP: tl.constexpr, DP_PADDED: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr,
    K_SPLIT: tl.constexpr, K_TYPE: tl.constexpr, V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_SPLIT: tl.constexpr, V_TYPE: tl.constexpr,
):  # fmt: skip
    """Online softmax of M rows of one (sequence, KV head) over one part of the tiles of one segment.

    FlashAttention-2 (arXiv 2307.08691); parts as in Flash-Decoding (PyTorch blog, October 2023). Out is normalised
    within the part; a part without visible keys leaves lse -inf.
    """
    head = tl.program_id(1)
    part = tl.program_id(2)
    sequence, block = _find_sequence(query_start, num_sequences, tl.program_id(0), GROUP, M, B)
    first_query = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_query
    if block * M >= num_queries * GROUP:
        return
    row = block * M + tl.arange(0, M)
    valid = row < num_queries * GROUP
    query = tl.minimum(row // GROUP, num_queries - 1)
    query_head = head * GROUP + row % GROUP
    length = tl.load(lengths + sequence * length_stride + head * length_head_stride)
    own = length - num_queries + query
    limit = tl.minimum(own + 1, length) if CAUSAL else tl.zeros_like(own) + length
    at = tl.load(query_positions + first_query + query) if QUERY_POSITIONS else own
    token = (first_query + query).to(tl.int64)
    q = _queries_at(
        queries, token, query_head, valid, query_start, query_stride, query_head_stride, False, DK, DK_PADDED
    )  # fmt: skip
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    summed = tl.zeros([M, DV_PADDED], tl.float32)
    table = tables + sequence * table_stride + head * table_head_stride
    # Which tokens any of these rows may see, then which tiles hold them, then which of the tiles are this part's.
    end = tl.maximum(tl.max(limit), 0)
    begin = end * 0
    if WINDOW and not (POSITIONS or PACKED_POSITIONS):
        begin = tl.minimum(tl.maximum(tl.min(at) - window + 1, 0), end)
    key_length = end * 0
    open_base = end * 0
    num_packed = end * 0
    first_packed = end * 0
    if SEALED:
        bound = bounds + (sequence * tl.num_programs(1) + head)
        key_length = tl.load(bound)
        value_length = tl.load(bound + bound_stride)
        open_base = tl.load(bound + 2 * bound_stride)
        first_packed = tiles_before(tl.minimum(begin, key_length), S, NP)
        num_packed = tiles_up_to(tl.minimum(end, key_length), S, NP) - first_packed
    first_open = tl.maximum(begin - key_length, 0) // N
    num_tiles = num_packed + (tl.maximum(end - key_length, 0) + N - 1) // N - first_open
    each = (num_tiles + num_parts - 1) // num_parts
    mine = part * each
    last = tl.minimum(mine + each, num_tiles)
    if SEALED:
        q_packed = q
        if CHOSEN:
            channels = key_channels + (sequence * tl.num_programs(1) + head).to(tl.int64) * DP
            q_packed = _queries_at(
                queries, token, query_head, valid, channels, query_stride, query_head_stride, True, DP, DP_PADDED
            )  # fmt: skip
        packed_table = packed_tables + sequence * packed_table_stride + head * packed_table_head_stride
        for tile in range(first_packed + mine, first_packed + tl.minimum(last, num_packed)):
            page, first, page_row, index, used = packed_tile(tile, packed_table, key_length, S, NP)
            base = page_at(first_half, second_half, page, per_half, half_bytes, PAGE_BYTES)
            key = read_part(
                base, first, page_row, used, K_KIND, K_BITS, K_GROUP, K_SPLIT, K_TYPE, UPPER, S, DP, NP, DP_PADDED
            )  # fmt: skip
            where = index
            if PACKED_POSITIONS:
                where = tl.load(packed_positions + page * S + page_row, mask=used, other=0)
            scores = _scores(q_packed, key, index, used, where, limit, at, scale, softcap, window, WINDOW, SOFTCAP)
            sealed_value = used & (index < value_length)
            value = read_part(
                base + KEY_BYTES, first, page_row, sealed_value, V_KIND, V_BITS, V_GROUP, V_SPLIT, V_TYPE, UPPER, S,
                DV, NP, DV_PADDED,
            )  # fmt: skip
            open_value = used & (index >= value_length)
            if tl.max(open_value.to(tl.int32), 0) > 0:
                slots = _slots_of(table, index - open_base, open_value, head, 1, 0, True, BLOCK_SIZE)
                value += _rows_at(values, slots, open_value, DV, DV_PADDED).to(tl.float32)
            maximum, total, summed = _fold(scores, value, maximum, total, summed, q.dtype)
    for tile in range(first_open + tl.maximum(mine - num_packed, 0), first_open + last - num_packed):
        index = key_length + tile * N + tl.arange(0, N)
        used = index < length
        slots = _slots_of(table, index - open_base, used, head, page_stride, page_offset, PER_HEAD, BLOCK_SIZE)
        where = index
        if POSITIONS:
            where = tl.load(positions + slots, mask=used, other=0)
        key = _rows_at(keys, slots, used, DK, DK_PADDED)
        scores = _scores(q, key, index, used, where, limit, at, scale, softcap, window, WINDOW, SOFTCAP)
        value = _rows_at(values, slots, used, DV, DV_PADDED)
        maximum, total, summed = _fold(scores, value, maximum, total, summed, q.dtype)
    norm = tl.where(total > 0.0, total, 1.0)
    cell = token * num_query_heads + query_head
    dv = tl.arange(0, DV_PADDED)
    target = out + part.to(tl.int64) * part_stride + cell[:, None] * DV + dv[None, :]
    tl.store(target, summed / norm[:, None], mask=valid[:, None] & (dv[None, :] < DV))
    target_lse = lse + part.to(tl.int64) * part_stride_lse + cell
    tl.store(target_lse, tl.where(total > 0.0, maximum + tl.log(norm), float("-inf")), mask=valid)


@triton.jit
def merge(
    parts, lses, out, lse, num_parts, num_rows, DV: tl.constexpr, DV_PADDED: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """M rows of partial results [num_parts, num_rows, DV] over disjoint keys, weighted by their shares of the total."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    valid = row < num_rows
    dv = tl.arange(0, DV_PADDED)
    inside = valid[:, None] & (dv[None, :] < DV)
    maximum = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    summed = tl.zeros([M, DV_PADDED], tl.float32)
    cell = row
    for _ in range(num_parts):
        share = tl.load(lses + cell, mask=valid, other=float("-inf"))
        seen = share > float("-inf")
        # Rows that no sequence owns were never written.
        partial = tl.load(parts + cell[:, None] * DV + dv[None, :], mask=inside & seen[:, None], other=0.0)
        highest = tl.maximum(maximum, share)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        weight = tl.exp(share - shift)
        alpha = tl.exp(maximum - shift)
        summed = summed * alpha[:, None] + partial * weight[:, None]
        total = total * alpha + weight
        maximum = highest
        cell += num_rows
    norm = tl.where(total > 0.0, total, 1.0)
    tl.store(out + row[:, None] * DV + dv[None, :], summed / norm[:, None], mask=inside)
    tl.store(lse + row, tl.where(total > 0.0, maximum + tl.log(norm), float("-inf")), mask=valid)


@triton.jit
def add_mass(
    queries, query_start, query_positions, mass_rows, keys, tables, lengths, positions, mass, lse, scale, softcap,
    window, query_stride, query_head_stride, table_stride, table_head_stride, length_stride, length_head_stride,
    page_stride, page_offset, num_query_heads, mark_bounds, mark_positions,
    first_half, second_half, per_half, half_bytes, packed_tables, packed_table_stride, packed_table_head_stride,
    bounds, bound_stride, packed_positions, key_channels,
    GROUP: tl.constexpr, DK: tl.constexpr, DK_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PER_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, POSITIONS: tl.constexpr, QUERY_POSITIONS: tl.constexpr,
    SOFTCAP: tl.constexpr, MASS_ROWS: tl.constexpr, MARKS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    SEALED: tl.constexpr, PACKED: tl.constexpr, S: tl.constexpr, NP: tl.constexpr, PAGE_BYTES: tl.constexpr,
    UPPER: tl.constexpr, CHOSEN: tl.constexpr, PACKED_POSITIONS: tl.constexpr, DP: tl.constexpr,
    DP_PADDED: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_SPLIT: tl.constexpr, K_TYPE: tl.constexpr,
):  # fmt: skip
    """What the keys of one tile of one (sequence, KV head) receive from all counted rows, given their final lse.

    `PACKED` is about packed tiles and their column, else this is about open ones.
    """
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    first_query = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_query
    length = tl.load(lengths + sequence * length_stride + head * length_head_stride)
    key_length = length * 0
    open_base = length * 0
    if SEALED:
        bound = bounds + (sequence * tl.num_programs(1) + head)
        key_length = tl.load(bound)
        open_base = tl.load(bound + 2 * bound_stride)
    num_tiles = tiles_up_to(key_length, S, NP) if PACKED else (length - key_length + N - 1) // N
    if (num_queries == 0) or (tl.program_id(0) >= num_tiles):
        return
    if PACKED:
        packed_table = packed_tables + sequence * packed_table_stride + head * packed_table_head_stride
        page, first, page_row, index, used = packed_tile(tl.program_id(0), packed_table, key_length, S, NP)
        base = page_at(first_half, second_half, page, per_half, half_bytes, PAGE_BYTES)
        key = read_part(
            base, first, page_row, used, K_KIND, K_BITS, K_GROUP, K_SPLIT, K_TYPE, UPPER, S, DP, NP, DP_PADDED
        )  # fmt: skip
        slots = page * S + page_row
    else:
        index = key_length + tl.program_id(0) * N + tl.arange(0, N)
        used = index < length
        table = tables + sequence * table_stride + head * table_head_stride
        slots = _slots_of(table, index - open_base, used, head, page_stride, page_offset, PER_HEAD, BLOCK_SIZE)
        key = _rows_at(keys, slots, used, DK, DK_PADDED)
    where = index
    if PACKED and PACKED_POSITIONS:
        where = tl.load(packed_positions + slots, mask=used, other=0)
    if POSITIONS and not PACKED:
        where = tl.load(positions + slots, mask=used, other=0)
    channels = key_channels + (sequence * tl.num_programs(1) + head).to(tl.int64) * DP if CHOSEN else query_start
    counted = tl.minimum(tl.load(mass_rows + sequence), num_queries) if MASS_ROWS else num_queries
    from_query = num_queries - counted
    if CAUSAL:
        from_query = tl.maximum(from_query, tl.min(index, 0) - (length - num_queries))
    received = tl.zeros([NP if PACKED else N], tl.float32)
    for begin in range(from_query * GROUP, num_queries * GROUP, M):
        row = begin + tl.arange(0, M)
        valid = row < num_queries * GROUP
        query = tl.minimum(row // GROUP, num_queries - 1)
        query_head = head * GROUP + row % GROUP
        own = length - num_queries + query
        limit = tl.minimum(own + 1, length) if CAUSAL else tl.zeros_like(own) + length
        at = tl.load(query_positions + first_query + query) if QUERY_POSITIONS else own
        token = (first_query + query).to(tl.int64)
        q = _queries_at(
            queries, token, query_head, valid, channels, query_stride, query_head_stride, PACKED and CHOSEN,
            DP if PACKED else DK, DP_PADDED if PACKED else DK_PADDED,
        )  # fmt: skip
        scores = _scores(q, key, index, used, where, limit, at, scale, softcap, window, WINDOW, SOFTCAP)
        final = tl.load(lse + token * num_query_heads + query_head, mask=valid, other=float("-inf"))
        seen = valid & (final > float("-inf"))
        p = tl.where(seen[:, None], tl.exp(scores - tl.where(seen, final, 0.0)[:, None]), 0.0)
        received += tl.sum(p, 0)
    if MARKS:
        reached = received >= tl.load(mark_bounds + sequence * tl.num_programs(1) + head)
        noted = tl.zeros_like(received) + tl.load(mark_positions + sequence)
        tl.store(mass + slots, noted, mask=used & reached)
    else:
        tl.atomic_add(mass + slots, received, mask=used)
