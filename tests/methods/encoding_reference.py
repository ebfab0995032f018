"""Encodings in plain numpy, from their papers' words: codes, what they are read as, and who is sealed when."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# All finite e4m3 magnitudes: 4 bits of exponent with bias 7, 3 of mantissa; code 127 is NaN.
E4M3 = np.array(
    [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
)


def half(x: Floats) -> Floats:
    """Rounded to float16."""
    return np.asarray(x, np.float16).astype(np.float32)


def plain_affine(groups: Floats, bits: int) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """Codes of numbers [..., n] that share a step and a zero [..., 1]."""
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    zero, step = half(low), half((high - low) / np.float32(2**bits - 1))
    codes = np.rint((groups - zero) / np.where(step == 0, 1, step))
    return np.where(step == 0, 0, np.clip(codes, 0, 2**bits - 1)).astype(np.int64), step, zero


def plain_read(groups: Floats, bits: int) -> Floats:
    """What groups [..., n] are read as."""
    codes, step, zero = plain_affine(groups, bits)
    return (codes * step + zero).astype(np.float32)


def plain_split(groups: Floats) -> tuple[Floats, Floats]:
    """What QuantSpec's target and its draft read: x8 = (16 u + l) (s / 16) + z and x4 = u s + z."""
    upper, step, zero = plain_affine(groups, 4)
    x4 = (upper * step + zero).astype(np.float32)
    lower = np.clip(np.rint((groups - x4) / np.where(step == 0, 1, step / 16)), -8, 7)
    return np.where(step == 0, zero, (16 * upper + lower) * (step / 16) + zero).astype(np.float32), x4


def plain_float8(page: Floats) -> Floats:
    """What numbers [S, D] under one scale are read as: the nearest e4m3 number, of two the one with an even code."""
    scale = np.float32(np.abs(page).max() / np.float32(448)) or np.float32(1)
    scaled = np.minimum(np.abs(page / scale), 448)
    above = np.searchsorted(E4M3, scaled).clip(1)
    up, down = E4M3[above] - scaled, scaled - E4M3[above - 1]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return (np.sign(page) * E4M3[code]).astype(np.float32) * scale


def per_channel(keys: Floats, group: int, read: Callable[[Floats], Floats]) -> Floats:
    """Keys [T, D], T a multiple of `group`, read in groups of tokens of a channel."""
    return per_token(keys.T, group, read).T


def per_token(values: Floats, group: int, read: Callable[[Floats], Floats]) -> Floats:
    """Values [T, D] read in groups of channels of a token."""
    group = min(group, values.shape[1])
    return read(values.reshape(len(values), -1, group)).reshape(values.shape)


@dataclass
class PlainKIVI:
    """KIVI's two stores per side, as its released code keeps them: lists of token numbers."""

    residual: int
    packed_keys: list[int] = field(default_factory=list)
    open_keys: list[int] = field(default_factory=list)
    packed_values: list[int] = field(default_factory=list)
    open_values: list[int] = field(default_factory=list)

    def prefill(self, num_tokens: int) -> None:
        """The prompt."""
        tokens, cut = list(range(num_tokens)), num_tokens // self.residual * self.residual
        self.packed_keys, self.open_keys = tokens[:cut], tokens[cut:]
        cut = max(0, num_tokens - self.residual)
        self.packed_values, self.open_values = tokens[:cut], tokens[cut:]

    def decode(self) -> None:
        """One more token."""
        token = len(self.packed_keys) + len(self.open_keys)
        self.open_keys.append(token)
        if len(self.open_keys) == self.residual:
            self.packed_keys += self.open_keys
            self.open_keys = []
        self.open_values.append(token)
        if len(self.open_values) > self.residual:
            self.packed_values.append(self.open_values.pop(0))


def plain_double_buffer(num_tokens: int, group: int) -> int:
    """Tokens that QuantSpec's two buffers have passed on when `num_tokens` came one by one."""
    older, newer, packed = 0, 0, 0
    for _ in range(num_tokens):
        if older < group:
            older += 1
        else:
            newer += 1
        if newer == group:  # both full: the older one is quantised, and the newer takes its place
            packed, older, newer = packed + older, newer, 0
    return packed


def plain_channels(queries: Floats, keys: Floats, ratio: float) -> list[int]:
    """ThinK's kept channels of one head: queries [G, W, D], keys [T, D]; the outer products are really made."""
    dim = keys.shape[1]
    norms = [sum(float(np.square(np.outer(q[:, j], keys[:, j])).sum()) for q in queries) for j in range(dim)]
    worst_first = sorted(range(dim), key=lambda j: (norms[j], -j))
    return sorted(worst_first[int(dim * ratio) :])
