"""Keys of blocks: a sha256 chain over everything the bytes of a block depend on."""

import json
from dataclasses import asdict, dataclass, field
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from kvwise.core.errors import UsageError

Tokens = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Content = tuple[int, int, bytes]
"""Tokens `first` to `stop` of a prompt stand for something else than text, which these bytes name (an image)."""
_MAX_TOKEN = int(np.iinfo(np.int32).max)
_WIRE = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the bytes of a block depend on besides its tokens: caches may share only if all agree.

    Fields are printed names, compared exactly. `layers` names the layer map of methods that store some layers
    only or share them (`"all"`: one to one); `alignment` is the tokens an encoding packs together; `version`
    is the format of the key itself.
    """

    model: str
    revision: str
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    positions: str
    encoding: str = "native"
    alignment: int = 1
    layers: str = "all"
    adapter: str = ""
    version: int = 1

    def root(self, salt: str = "") -> bytes:
        """Parent of the first block of every chain under this identity and salt (32 bytes).

        JSON keeps the fields apart: no two different identities or salts spell the same text.
        """
        text = json.dumps([asdict(self), salt], sort_keys=True, ensure_ascii=True)
        return sha256(text.encode()).digest()


@dataclass(slots=True)
class PrefixKeys:
    """The chain of one prompt: `chain[i]` is the key of its i-th full block, `root` the parent of the first.

    `probe` is the first block's key without the salt, `bare_probe` without the identity too: they never find a block,
    they only let a miss say "other salt" or "other model". A private prompt has no keys: it neither hits nor publishes.
    `content`, by position, names what stands behind tokens that are placeholders: it is part of the key of every block
    that it reaches into, so that equal placeholders of different images share nothing. `limit` is the most blocks that
    may have keys: what follows them is neither found nor published.
    """

    root: bytes
    unsalted_root: bytes
    chain: list[bytes] = field(default_factory=list)
    probe: bytes = b""
    bare_probe: bytes = b""
    private: bool = False
    content: tuple[Content, ...] = ()
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.chain)

    def copy(self) -> "PrefixKeys":
        """An independent chain with the same keys."""
        return PrefixKeys(
            self.root,
            self.unsalted_root,
            self.chain.copy(),
            self.probe,
            self.bare_probe,
            self.private,
            self.content,
            self.limit,
        )

    def extend(self, tokens: Tokens, block_size: int) -> None:
        """Append the keys of the full blocks in `tokens` [T], which follow the last keyed block."""
        step = 4 * block_size
        data = token_bytes(tokens)
        if self.limit is not None:
            data = data[: max(0, self.limit - len(self.chain)) * step]
        parent = self.chain[-1] if self.chain else self.root
        first = len(self.chain) * block_size
        if not self.chain and len(data) >= step:
            block = data[:step] + self._shown(0, block_size)
            self.probe = sha256(self.unsalted_root + block).digest()
            self.bare_probe = sha256(block).digest()
        append = self.chain.append
        for start in range(0, len(data) - step + 1, step):
            block = data[start : start + step]
            if self.content:
                block += self._shown(first + start // 4, block_size)
            parent = sha256(parent + block).digest()
            append(parent)

    def _shown(self, first: int, num_tokens: int) -> bytes:
        """What is named by `content` in the tokens from `first` on: where it begins, seen from there, and its name."""
        reaching = [one for one in self.content if one[0] < first + num_tokens and first < one[1]]
        return b"".join((start - first).to_bytes(8, "little", signed=True) + name for start, _, name in reaching)


def token_bytes(tokens: Tokens) -> bytes:
    """Token ids [T], 4 little-endian bytes each; UsageError outside 0 .. 2^31-1, where they collide."""
    if tokens.dtype != _WIRE:
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) <= _MAX_TOKEN:
            raise UsageError(f"token ids must lie in 0 .. {_MAX_TOKEN}: got {tokens.min()} .. {tokens.max()}")
        tokens = tokens.astype(_WIRE)
    return tokens.tobytes()
