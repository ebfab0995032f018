"""Types of the native module; every integer called an address is `Tensor.data_ptr()`, 0 where a tensor is absent."""

class Workspace:
    """Scratch memory of `attend`, kept between calls."""

    def __init__(self) -> None: ...

def instruction_sets() -> list[str]: ...
def read_memory(instruction_set: str, address: int, num_floats: int, num_threads: int, /) -> float: ...
def attend(
    workspace: Workspace,
    instruction_set: str,
    storage: int,
    num_heads: int,
    group: int,
    key_dim: int,
    value_dim: int,
    num_tokens: int,
    num_sequences: int,
    queries: int,
    token_stride: int,
    head_stride: int,
    query_start: int,
    query_positions: int,
    mass_rows: int,
    fading: int,
    segments: list[list[int]],
    out: int,
    lse: int,
    scale: float,
    window: int,
    softcap: float,
    exact: bool,
    num_threads: int,
    /,
) -> None: ...
def seal_pages(
    instruction_set: str,
    arena: int,
    num_slots: int,
    dim: int,
    storage: int,
    slots: int,
    packed: list[int],
    keys: bool,
    pages: int,
    channels: int,
    n: int,
    num_threads: int,
    /,
) -> None: ...
def seal_value_rows(
    instruction_set: str,
    arena: int,
    num_slots: int,
    dim: int,
    storage: int,
    slots: int,
    packed: list[int],
    packed_slots: int,
    n: int,
    num_threads: int,
    /,
) -> None: ...
def gather(arena: int, num_slots: int, row_bytes: int, slots: int, n: int, out: int, num_threads: int, /) -> None: ...
def scatter(rows: int, arena: int, num_slots: int, row_bytes: int, slots: int, n: int, num_threads: int, /) -> None: ...
def move_slots(arena: int, num_slots: int, row_bytes: int, source: int, target: int, n: int, /) -> None: ...
def copy_pages(
    source: int,
    num_source: int,
    source_pages: int,
    target: int,
    num_target: int,
    target_pages: int,
    page_bytes: int,
    n: int,
    num_threads: int,
    /,
) -> None: ...
def lowest(
    instruction_set: str,
    numbers: int,
    width: int,
    first: int,
    stop: int,
    n: int,
    least: int,
    where: int,
    num_threads: int,
    /,
) -> None: ...
def lowest_mass(
    instruction_set: str,
    mass: int,
    positions: int,
    num_pages: int,
    block_size: int,
    tables: int,
    width: int,
    first: int,
    stop: int,
    newest: int,
    n: int,
    least: int,
    where: int,
    num_threads: int,
    /,
) -> None: ...
def angles(positions: int, n: int, inv_freq: int, half: int, cos: int, sin: int, which: int, /) -> int: ...
def turn_rows(
    rows: int,
    num_rows: int,
    dim: int,
    cos: int,
    sin: int,
    num_angles: int,
    half: int,
    interleaved: bool,
    which: int,
    n: int,
    out: int,
    num_threads: int,
    /,
) -> None: ...
def append(
    instruction_set: str,
    rows: int,
    token_bytes: int,
    head_bytes: int,
    narrow: bool,
    storage: int,
    dim: int,
    arena: int,
    num_slots: int,
    row_bytes: int,
    num_tokens: int,
    num_heads: int,
    slots: int,
    per_head: bool,
    block_size: int,
    page_stride: int,
    page_offset: int,
    num_threads: int,
    /,
) -> None: ...
def fold(
    instruction_set: str,
    folded: list[int],
    rows: int,
    layers: int,
    heads: int,
    keys: int,
    values: int,
    n: int,
    num_threads: int,
    /,
) -> None: ...
def merge_folded(
    instruction_set: str,
    folded: list[int],
    layer: int,
    rows: int,
    num_rows: int,
    queries: int,
    row_stride: int,
    head_stride: int,
    out: int,
    lse: int,
    merged: int,
    num_threads: int,
    /,
) -> None: ...
def rans_encode(
    ends: int, width: int, rows: list[int], columns: int, lanes: int, codes: int, out: int, capacity: int, /
) -> int: ...
def rans_decode(
    ends: int, width: int, rows: list[int], columns: int, lanes: int, stream: int, length: int, codes: int, /
) -> bool: ...
def copy_pieces(instruction_set: str, pieces: list[tuple[int, int, int]], streaming: bool, /) -> bytes: ...
def seal_blocks(
    instruction_set: str,
    shape: list[int],
    headers: list[bytes],
    keys: list[int],
    values: list[int],
    targets: list[memoryview],
    streaming: bool,
    num_threads: int,
    /,
) -> None: ...
def open_blocks(
    instruction_set: str,
    shape: list[int],
    views: list[memoryview],
    wanted_keys: list[bytes],
    identity: bytes,
    codec: bytes,
    keys: list[int],
    values: list[int],
    streaming: bool,
    num_threads: int,
    /,
) -> list[bool]: ...
