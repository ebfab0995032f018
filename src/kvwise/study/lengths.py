"""Length distributions: fixed, uniform, log-normal, or the rows of a CSV file."""

import csv
import gzip
from pathlib import Path
from typing import Annotated, Literal, TextIO, cast

import numpy as np
from pydantic import Field

from kvwise.core.errors import PlanError
from kvwise.study.strict import Strict

MAX_TOKENS = 1_000_000  # no served model reads longer prompts; a larger number is a mistake


class Uniform(Strict):
    """Whole numbers from `low` to `high`, both included."""

    kind: Literal["uniform"]
    low: int = Field(ge=1, le=MAX_TOKENS)
    high: int = Field(ge=1, le=MAX_TOKENS)


class LogNormal(Strict):
    """Log-normal with the given median; `sigma` is the spread of the logarithm; longer than `high` is cut."""

    kind: Literal["lognormal"]
    median: float = Field(ge=1, le=MAX_TOKENS)
    sigma: float = Field(ge=0, le=5)
    high: int = Field(ge=1, le=MAX_TOKENS)


class Column(Strict):
    """Drawn with replacement from one column of a CSV file, times `scale`."""

    kind: Literal["csv"]
    file: str
    column: str
    scale: float = Field(default=1.0, gt=0)


Lengths = Annotated[int, Field(ge=1, le=MAX_TOKENS)] | Uniform | LogNormal | Column


def draw(lengths: Lengths, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` lengths >= 1, int64."""
    if isinstance(lengths, int):
        return np.full(count, lengths, dtype=np.int64)
    if isinstance(lengths, Uniform):
        if lengths.low > lengths.high:
            raise PlanError(f"uniform lengths: low={lengths.low} is above high={lengths.high}; swap them")
        return rng.integers(lengths.low, lengths.high + 1, size=count)
    if isinstance(lengths, LogNormal):
        drawn = np.rint(rng.lognormal(np.log(lengths.median), lengths.sigma, size=count))
        return np.clip(drawn, 1, lengths.high).astype(np.int64)
    values = read_columns(Path(lengths.file), (lengths.column,))[lengths.column]
    picked = rng.choice(values, size=count)
    return np.maximum(1, np.rint(picked * lengths.scale)).astype(np.int64)


def read_columns(path: Path, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of non-negative numbers of a CSV file (also gzipped), float64 each.

    PlanError, naming file and line: a missing file or column, no rows, a value that is no such number.
    """
    out: dict[str, list[float]] = {name: [] for name in columns}
    with open_text(path) as file:
        reader = csv.DictReader(file)
        try:
            known = reader.fieldnames or []
            for name in columns:
                if name not in known:
                    raise PlanError(f"{path}: no column {name!r}; it has: {', '.join(known) or 'nothing'}")
            for line, row in enumerate(reader, start=2):
                for name in columns:
                    out[name].append(_number(row[name], path, line, name))
        except (UnicodeDecodeError, csv.Error, EOFError, OSError) as error:
            raise PlanError(f"{path} is no readable CSV file: {error}") from error
    if not out[columns[0]]:
        raise PlanError(f"{path} has no rows")
    return {name: np.asarray(values) for name, values in out.items()}


def open_text(path: Path) -> TextIO:
    """Open a text file, gunzipped if its name ends in .gz; PlanError if it cannot be opened."""
    if not path.is_file():
        raise PlanError(f"{path} is no file; give the path of a CSV or JSONL file (plain or .gz)")
    try:
        if path.suffix == ".gz":
            return cast(TextIO, gzip.open(path, "rt", encoding="utf-8"))
        return path.open(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}") from error


def _number(text: str | None, path: Path, line: int, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or value < 0:
        raise PlanError(f"{path} line {line}: {name}={text!r} is no number of 0 or more")
    return value
