"""Checksums of a model folder: written when it is made, verified before it is loaded."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from kvwise.core.errors import UsageError

FILE = "checksums.json"


def write_checksums(folder: Path, names: Sequence[str]) -> None:
    """Write the sha256 of the files `names` of `folder` beside them."""
    sums = {name: _sha256(folder / name) for name in names}
    (folder / FILE).write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")


def add_checksum(folder: Path, name: str) -> None:
    """Where `folder` has checksums, note that of the file `name` among them."""
    if (folder / FILE).is_file():
        write_checksums(folder, [*(known for known in _read(folder / FILE) if known != name), name])


def verify(folder: Path) -> None:
    """UsageError unless every file that `folder` has a checksum of is there and is what it was."""
    for name, expected in _read(folder / FILE).items():
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{path} is missing: reinstall kvwise (pip install --force-reinstall kvwise)")
        found = _sha256(path)
        if found != expected:
            raise UsageError(
                f"{path} is not the file that was shipped: its sha256 is {found} instead of {expected}:"
                " reinstall kvwise (pip install --force-reinstall kvwise)"
            )


def _read(path: Path) -> dict[str, str]:
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}): reinstall kvwise") from error
    if not isinstance(sums, dict) or not sums:
        raise UsageError(f"{path} lists no checksums: reinstall kvwise")
    return sums


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
