"""Decode over packed pages against the same tokens in fp16 pages, and sealing against writing.

    python bench/encoding.py                                   # all formats, and the gates
    python bench/encoding.py --kernels cpu-avx2 --formats int4 kivi --seconds 3

D 128, 32 query heads over 8 KV heads, 16k context, batch 8, two threads. Every format takes turns with fp16 pages of
the same run and a loop that only reads memory. *limit* is what its bytes cost at the measured read bandwidth, and what
is reached of it; *error* is the output's, relative to exact attention over the fp16 pages on normal noise, and what of
it the integer products add to exact attention over the same codes (think keeps channels drawn at random here: its
error says nothing of the method). Sealing the tokens of a page (keys and values) of
every head is compared with appending them from float32 rows as the model makes them: token by token as decode writes a
page, and, for the record, all of them in one call as prefill does; one thread each.
Gates: int4 >= 1.4x, 2-bit >= 1.5x, int8 >= 0.95x fp16; sealing a page below the price of writing it token by token.
Times are medians with half the distance between quartiles, ratios medians over pairs. Rows also go to
bench/results/encoding.json.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from attention import SEED, Side, ratio, spread, take_turns
from kvwise.kernels import Kernels, Sealed, Segment, available_kernels, kernels_for
from kvwise.kernels.cpu import CpuKernels
from kvwise.kernels.packed import Codes, Float8, PackedArena, PageFormat, Plain
from kvwise.tiers.memory import allocate
from machine import CPU, ReadBandwidth, write_results

DIM, QUERY_HEADS, HEADS, CONTEXT, BATCH, BLOCK_SIZE = 128, 32, 8, 16384, 8, 16
PAGES_PER_HALF = 8
SEALED_AT_ONCE = 64  # tokens of every head


@dataclass(frozen=True)
class Row:
    """One format; the newest `residual` tokens stay in fp16, and at least `gate` times fp16's speed is asked of it."""

    format: PageFormat
    residual: int = 0
    upper_only: bool = False
    gate: float | None = None


def codes(bits: int, key_group: int, value_group: int, page_tokens: int = 64, *, split: bool = False) -> PageFormat:
    """Keys per channel, values per token."""
    return PageFormat(
        Codes(bits, "channel", key_group, split), Codes(bits, "token", value_group, split), page_tokens, DIM
    )


ROWS = {
    "int8": Row(codes(8, 64, 128), gate=0.95),
    "int4": Row(codes(4, 64, 128), gate=1.4),
    "int4 g32/v32": Row(codes(4, 32, 32)),
    "int3": Row(codes(3, 64, 128)),
    "2-bit": Row(codes(2, 64, 128), gate=1.5),
    "2-bit g32/v32": Row(codes(2, 32, 32), gate=1.5),
    "kivi": Row(codes(2, 32, 32, 128), residual=128, gate=1.5),
    "1-bit": Row(codes(1, 64, 128)),
    "quantspec target": Row(codes(8, 128, 128, 128, split=True), residual=256),
    "quantspec draft": Row(codes(8, 128, 128, 128, split=True), residual=256, upper_only=True),
    "float8": Row(PageFormat(Float8(), Float8(), 64, DIM)),
    "think 0.4": Row(PageFormat(Plain(torch.float16, 77), Plain(torch.float16, DIM), 64, DIM), residual=32),
}


class Tokens:
    """fp16 pages of all sequences and heads in random order, and one query each."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        width = CONTEXT // BLOCK_SIZE
        num_pages = BATCH * HEADS * width
        self.keys, self.values = (_normal(allocate((num_pages, BLOCK_SIZE, DIM), torch.float16, CPU)) for _ in range(2))
        self.tables = torch.randperm(num_pages, dtype=torch.int32).view(BATCH, HEADS, width)
        self.lengths = torch.full((BATCH, HEADS), CONTEXT, dtype=torch.int32)
        self.queries = torch.randn(BATCH, QUERY_HEADS, DIM)
        self.query_start = torch.arange(BATCH + 1, dtype=torch.int32)

    @property
    def segment(self) -> Segment:
        """Every token in fp16."""
        return Segment(self.keys, self.values, self.tables, self.lengths)

    def attend(self, kernels: Kernels, segment: Segment) -> Tensor:
        """Attention of all queries."""
        return kernels.attend(self.queries, self.query_start, [segment], scale=DIM**-0.5).out

    def slots(self, num_tokens: int) -> Tensor:
        """Of the first tokens of every (sequence, head): int64 [B * H, num_tokens]."""
        index = torch.arange(num_tokens)
        pages = self.tables.long()[:, :, index // BLOCK_SIZE]
        return (pages * BLOCK_SIZE + index % BLOCK_SIZE).flatten(0, 1)


def _normal(arena: Tensor) -> Tensor:
    """Normal noise; a run of 2**22 numbers repeated, which is far longer than a page."""
    flat, run = arena.view(-1), torch.randn(1 << 22).to(arena.dtype)
    for start in range(0, flat.numel(), run.numel()):
        flat[start : start + run.numel()] = run[: flat.numel() - start]
    return arena


def sealed_segment(tokens: Tokens, row: Row, kernels: Kernels) -> Segment:
    """The same tokens, all but the residual in packed pages scattered over an arena."""
    form = row.format
    length = (CONTEXT - row.residual) // form.page_tokens * form.page_tokens
    width = length // form.page_tokens
    num_blocks = -(-BATCH * HEADS * width // (2 * PAGES_PER_HALF))
    half = allocate((2, num_blocks, PAGES_PER_HALF * form.page_bytes), torch.uint8, CPU)
    packed = PackedArena((half[0], half[1]), form)
    tables = torch.randperm(packed.num_pages)[: BATCH * HEADS * width].view(BATCH, HEADS, width)
    channels = None
    if form.key_dim < DIM:
        channels = torch.stack([torch.randperm(DIM)[: form.key_dim].sort().values for _ in range(BATCH * HEADS)])
    slots = tokens.slots(length).view(-1, form.page_tokens)
    each = None if channels is None else channels.repeat_interleave(width, dim=0)
    kernels.seal_keys(tokens.keys, slots, packed, tables.flatten(), each)
    kernels.seal_values(tokens.values, slots, packed, tables.flatten())
    lengths = torch.full_like(tokens.lengths, length)
    chosen = None if channels is None else channels.view(BATCH, HEADS, -1).int()
    sealed = Sealed(packed, tables.int(), lengths, lengths, lengths * 0, chosen, row.upper_only)
    return replace(tokens.segment, sealed=sealed)


def num_bytes(row: Row) -> int:
    """What one decode must read."""
    packed = (CONTEXT - row.residual) // row.format.page_tokens * row.format.page_bytes
    if row.upper_only:  # half of the codes stays where it is
        packed -= (CONTEXT - row.residual) * DIM
    return BATCH * HEADS * (packed + row.residual * DIM * 4)


def error_of(found: Tensor, wanted: Tensor) -> float:
    """Relative error of outputs."""
    return float((found - wanted).norm() / wanted.norm())


def measure(name: str, tokens: Tokens, kernels: Kernels, options: argparse.Namespace) -> dict[str, object]:
    """One format against fp16, in pairs."""
    row, bandwidth = ROWS[name], ReadBandwidth()
    segment = sealed_segment(tokens, row, kernels)
    sides: dict[str, Side] = {
        "read": lambda _: bandwidth.read(options.threads),
        "fp16": lambda _: tokens.attend(kernels, tokens.segment),
        "packed": lambda _: tokens.attend(kernels, segment),
    }
    times = take_turns(sides, options.repeats, options.seconds)
    read = bandwidth.num_bytes / median(times["read"])
    truth = tokens.attend(kernels, tokens.segment)
    found = tokens.attend(kernels, segment)
    exact = tokens.attend(CpuKernels(kernels.name.removeprefix("cpu-"), exact=True), segment)
    speed = ratio(times["fp16"], times["packed"])
    return {
        "part": "decode",
        "format": name,
        "kernels": kernels.name,
        "bits": row.format.bits_per_element,
        "residual": row.residual,
        "bytes_per_token": num_bytes(row) / (BATCH * HEADS * CONTEXT),
        "repeats": len(times["packed"]),
        "ms": median(times["packed"]) * 1e3,
        "spread": spread(times["packed"]),
        "fp16_ms": median(times["fp16"]) * 1e3,
        "fp16_spread": spread(times["fp16"]),
        "speed": speed,
        "limit_ms": num_bytes(row) / read * 1e3,
        "of_limit": num_bytes(row) / bandwidth.num_bytes * ratio(times["read"], times["packed"]),
        "read_gb_per_s": read / 1e9,
        "error": error_of(found, truth),
        "integer_error": error_of(found, exact),
        "seal": sealing(tokens, segment, kernels, options),
        "gate": row.gate,
    }


def sealing(tokens: Tokens, segment: Segment, kernels: Kernels, options: argparse.Namespace) -> dict[str, object]:
    """Sealing so many tokens of every head against appending them, other tokens of cold memory each time."""
    sealed, kernels = segment.sealed, CpuKernels(kernels.name.removeprefix("cpu-"), 1)
    assert sealed is not None
    form = sealed.arena.format
    count = max(SEALED_AT_ONCE, form.page_tokens)
    num_turns = int(sealed.key_lengths.max()) // count
    slots = tokens.slots(num_turns * count).view(BATCH * HEADS, num_turns, count)
    pages = sealed.tables.long().flatten(0, 1).view(BATCH * HEADS, num_turns, -1)
    channels = None if sealed.key_channels is None else sealed.key_channels.long().flatten(0, 1)
    rows = torch.randn(count, BATCH * HEADS, DIM)
    target = [torch.empty_like(x).copy_(x) for x in (tokens.keys, tokens.values)]

    def seal(repeat: int) -> object:
        turn = repeat % num_turns
        chosen, at = slots[:, turn].reshape(-1, form.page_tokens), pages[:, turn].flatten()
        each = None if channels is None else channels.repeat_interleave(pages.shape[2], dim=0)
        kernels.seal_keys(tokens.keys, chosen, sealed.arena, at, each)
        return kernels.seal_values(tokens.values, chosen, sealed.arena, at)

    def append(repeat: int) -> object:
        return kernels.append(rows, rows, *target, slots[:, repeat % num_turns].T)

    # In decode every sequence adds one token of each head a step.
    steps = rows.view(count, BATCH, HEADS, DIM)

    def write(repeat: int) -> object:
        targets = slots[:, repeat % num_turns].T.reshape(count, BATCH, HEADS)
        for step in range(count):
            kernels.append(steps[step], steps[step], *target, targets[step])
        return None

    times = take_turns({"seal": seal, "append": append, "write": write}, options.repeats, options.seconds / 2)
    per_token = 1e9 / (count * BATCH * HEADS)
    return {
        "tokens": count * BATCH * HEADS,
        "seal_ns": median(times["seal"]) * per_token,
        "append_ns": median(times["append"]) * per_token,
        "write_ns": median(times["write"]) * per_token,
        "spread": spread(times["seal"]),
        "of_append": ratio(times["seal"], times["append"]),
        "of_write": ratio(times["seal"], times["write"]),
    }


def line(row: dict[str, object]) -> str:
    """One printed line of a row."""
    seal = row["seal"]
    assert isinstance(seal, dict)
    return (
        f"{row['format']:<17}{row['bits']:6.2f} bit {row['bytes_per_token']:6.1f} B/token {row['ms']:7.2f} ms"
        f" ±{row['spread']:4.0%} fp16 {row['fp16_ms']:7.2f} ms = {row['speed']:5.2f}x"
        f"  {row['of_limit']:.2f} of limit {row['limit_ms']:6.2f} ms"
        f"  error {row['error']:6.2%} (integers {row['integer_error']:5.2%})"
        f"  seal {seal['seal_ns']:6.1f} ns/token = {seal['of_write']:.2f} of {seal['write_ns']:6.1f} token by token,"
        f" {seal['of_append']:.2f} of {seal['append_ns']:6.1f} at once"
    )


def failed_gates(rows: list[dict[str, object]]) -> list[str]:
    """What a gate demands and a row misses, in words."""
    failed = []
    for row in rows:
        gate, speed, seal = row["gate"], row["speed"], row["seal"]
        assert isinstance(speed, float) and isinstance(seal, dict)
        if isinstance(gate, float) and speed < gate:
            failed.append(f"{row['format']}: {speed:.2f}x fp16, wanted {gate}x")
        if seal["of_write"] >= 1:
            failed.append(f"{row['format']}: sealing costs {seal['of_write']:.2f} of writing, wanted below 1")
    return failed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    native = [name for name in available_kernels(CPU) if name.startswith("cpu-")]
    parser.add_argument("--formats", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--kernels", choices=native, default=native[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=4.0, help="stop repeating a format after this time")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "encoding.json")
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, print, write; 1 if a gate failed."""
    options = parse()
    torch.set_num_threads(options.threads)
    tokens, kernels = Tokens(), kernels_for(CPU, options.kernels)
    rows = []
    for name in options.formats:
        rows.append(measure(name, tokens, kernels, options))
        print(line(rows[-1]), flush=True)
    failed = failed_gates(rows)
    write_results(
        options.output,
        rows,
        seed=SEED,
        shape={"head_dim": DIM, "query_heads": QUERY_HEADS, "kv_heads": HEADS, "context": CONTEXT, "batch": BATCH},
        failed_gates=failed,
    )
    print(f"wrote {options.output}")
    print("gates: " + ("; ".join(failed) if failed else "none failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
