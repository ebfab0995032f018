"""A checkpoint folder: what is refused before a byte of its weights is believed, and its fingerprint."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from kvwise.core.errors import UsageError
from kvwise.models.config import one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checked folder: its files of weights, and how many numbers they hold."""

    folder: Path
    shards: tuple[Path, ...]
    num_elements: int

    def fingerprint(self) -> str:
        """sha256 over the config and every byte of the weights, shortened: equal only for equal models."""
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *self.shards):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"sha256-{digest.hexdigest()[:16]}"

    def stamps(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the files: two equal answers mean that nothing changed between them."""
        paths = (self.folder / "config.json", *self.shards)
        try:
            return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
        except OSError as error:
            raise UsageError(f"{self.folder} changed while it was being loaded: {error}") from error

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder brings a tokenizer."""
        return any((self.folder / name).is_file() for name in TOKENIZERS)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Finds and checks the weights of `folder`. Only safetensors are read: pickles can run code."""
    if (folder / INDEX).is_file():
        shards = _indexed_shards(folder)
    elif (folder / SINGLE).is_file():
        shards = (folder / SINGLE,)
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UsageError(
                f"{folder} has its weights only as pickles ({pickles[0]}), which can run code when read:"
                " convert them to safetensors"
            )
        raise UsageError(f"{folder} has a config.json but no weights: neither {SINGLE} nor {INDEX} is there")
    return Checkpoint(folder, shards, sum(_num_elements(shard) for shard in shards))


def _indexed_shards(folder: Path) -> tuple[Path, ...]:
    path = folder / INDEX
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is not an index of weights: {one_line(error)}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or name in ("", "..", "."):
            raise UsageError(f"{path} names the file {name!r}; a shard must be a plain file name in the same folder")
        if not name.endswith(".safetensors"):
            raise UsageError(f"{path} names the file {name!r}; only safetensors are read")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing or not names:
        which = missing[0] if missing else "any"
        raise UsageError(f"{folder} lacks {which} ({len(missing)} of {len(names)} shards missing): download it again")
    return tuple(folder / name for name in sorted(names))


def _num_elements(shard: Path) -> int:
    try:
        with safe_open(shard, framework="pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{shard} is not a whole safetensors file: {one_line(error)}") from error
    return sum(_product(shape) for shape in shapes)


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
