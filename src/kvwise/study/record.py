"""A study's folder: one sub-folder per finished cell, made whole or not at all, so that a killed study resumes."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvwise.core.errors import UsageError
from kvwise.study.cells import Cell
from kvwise.study.plan import Plan, plan_hash, read_plan
from kvwise.study.rows import TABLES, CellResult, Row, Status, identity, schema
from kvwise.study.toml import to_toml

FORMAT = 4  # 3: columns of tiers and loading; 4: of what quality cells attest; they are empty in older rows
READABLE = (2, 3, FORMAT)
MARKER = "study.json"
PLAN = "plan.toml"
SCRATCH = "scratch"  # of disk tiers, while cells run
MAX_DEATHS = 2  # a cell during which the process died so often is recorded as failed instead of tried again


@dataclass(frozen=True, slots=True)
class Progress:
    """Cells done, failed and left, in the plan's order."""

    done: tuple[Cell, ...]
    failed: tuple[tuple[Cell, str], ...]
    left: tuple[Cell, ...]


class StudyFolder:
    """Where the rows of one plan are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells = path / "cells"
        self._attempts = path / "attempts"

    # -- making and opening ---------------------------------------------------------------------------------------

    @classmethod
    def create_or_resume(cls, path: Path, plan: Plan) -> "StudyFolder":
        """The folder of `plan` at `path`. UsageError, touching nothing, if something else is there."""
        folder = cls(path)
        if not folder.refuse_other(plan):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"output folder {path} cannot be made: {error.strerror or error}") from error
            folder._write_marker(plan)
        folder._cells.mkdir(exist_ok=True)
        folder._attempts.mkdir(exist_ok=True)
        for leftover in folder._cells.glob(".*"):
            shutil.rmtree(leftover)
        # The plan may differ in what is not measured (service levels, floors): the latest is the one to report.
        _write(path / PLAN, to_toml(plan))
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple["StudyFolder", Plan]:
        """An existing study and its plan; UsageError if there is none at `path`."""
        if not (path / MARKER).is_file():
            raise UsageError(f"{path} is no study (it has no {MARKER}); give the folder that `kvwise study run` made")
        folder = cls(path)
        plan = read_plan(path / PLAN)
        folder.refuse_other(plan)
        return folder, plan

    def refuse_other(self, plan: Plan) -> bool:
        """Whether the folder holds a study of `plan`; False: it is free. UsageError if something else is there."""
        found = self.marked_hash()
        if found is None:
            return False
        if found != plan_hash(plan):
            raise UsageError(
                f"output folder {self.path} holds a study of another plan ({found}, this one is {plan_hash(plan)}); "
                f"choose another with --output, or give --overwrite-own to rename the old one (nothing was changed)"
            )
        return True

    def marked_hash(self) -> str | None:
        """Hash of the plan whose study is here; None: nothing is here. UsageError if something else is."""
        marked = self.marked()
        if marked is None:
            return None
        found, version = marked
        if version not in READABLE:
            raise UsageError(
                f"{self.path} was written in format {version}; this kvwise reads {READABLE[0]} to {FORMAT}: choose "
                f"another with --output, or read it with the kvwise that wrote it"
            )
        return found

    def marked(self) -> tuple[str, int] | None:
        """Plan hash and format of the study that is here; None: nothing is here. UsageError if something else is."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            return None
        if not self.path.is_dir():
            if self.path.exists() or self.path.is_symlink():
                raise UsageError(f"output {self.path} exists and is no folder; choose another with --output")
            return None
        try:
            marker = json.loads((self.path / MARKER).read_text(encoding="utf-8"))
            return str(marker["plan_hash"]), int(marker["format"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"output folder {self.path} exists and is no study; choose another with --output (nothing was changed)"
            ) from None

    def _write_marker(self, plan: Plan) -> None:
        marker = {"format": FORMAT, "plan_hash": plan_hash(plan), "name": plan.name, "created": _now()}
        _write(self.path / MARKER, json.dumps(marker, indent=1) + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process may add rows; UsageError if another does. The lock dies with its process."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(f"{self.path} is being written by another kvwise study; wait for it") from error
            yield

    # -- cells ----------------------------------------------------------------------------------------------------

    def begin(self, cell: Cell) -> None:
        """Note that `cell` is being tried, in case the process dies of it."""
        file = self._attempts / cell.id
        _write(file, str(self.deaths(cell) + 1))

    def deaths(self, cell: Cell) -> int:
        """How many times the process died while it tried `cell`."""
        file = self._attempts / cell.id
        return int(file.read_text()) if file.is_file() else 0

    def give_up(self, cell: Cell) -> None:
        """`cell` was interrupted on purpose: that does not count against it."""
        (self._attempts / cell.id).unlink(missing_ok=True)

    def save(self, result: CellResult, provenance: Mapping[str, Any]) -> None:
        """Write the rows of a cell that has ended: all of them or, if the process dies, none."""
        draft = self._cells / f".{result.cell.id}"
        draft.mkdir()
        common = identity(result.cell) | dict(provenance) | {"recorded_at": _now()}
        for table, rows in result.tables.items():
            filled = [common | row for row in rows]
            pq.write_table(pa.Table.from_pylist(filled, schema=schema(table)), draft / f"{table}.parquet")
        for file in draft.iterdir():
            _sync(file)
        target = self._cells / result.cell.id
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
        _sync(self._cells)
        self.give_up(result.cell)

    def forget(self, cell: Cell) -> None:
        """Drop a recorded cell, so that it is run again."""
        shutil.rmtree(self._cells / cell.id, ignore_errors=True)

    def progress(self, cells: list[Cell]) -> Progress:
        """Which of `cells` are done, failed and left."""
        ended = {row["cell"]: row for row in self.rows("cells")}
        done = tuple(c for c in cells if c.id in ended and ended[c.id]["status"] == Status.DONE)
        failed = tuple((c, str(ended[c.id]["reason"])) for c in cells if c.id in ended and c not in done)
        return Progress(done, failed, tuple(c for c in cells if c.id not in ended))

    # -- reading --------------------------------------------------------------------------------------------------

    def rows(self, table: str) -> list[Row]:
        """All rows of a table, cells in the order of their ids."""
        rows: list[Row] = self.table(table).to_pylist(maps_as_pydicts="strict")
        return rows

    def table(self, table: str) -> pa.Table:
        """All rows of a table, as an Arrow table."""
        parts = []
        for file in sorted(self._cells.glob(f"*/{table}.parquet")):
            if not file.parent.name.startswith("."):
                try:
                    parts.append(pq.read_table(file, schema=schema(table)))
                except (OSError, pa.ArrowException) as error:
                    raise UsageError(f"{file} cannot be read ({error}); remove {file.parent}") from error
        return pa.concat_tables(parts) if parts else schema(table).empty_table()

    def merge(self) -> list[Path]:
        """Write each table as one file beside the report."""
        written = []
        for name in TABLES:
            target = self.path / f"{name}.parquet"
            draft = target.with_name(f".{target.name}")
            pq.write_table(self.table(name), draft)
            os.replace(draft, target)
            written.append(target)
        return written


def set_aside(path: Path, plan: Plan) -> Path | None:
    """Rename a study of another plan or format at `path` to `path.1`, ...; None if there was none to rename."""
    found = StudyFolder(path).marked()
    if found is None or (found[0] == plan_hash(plan) and found[1] in READABLE):
        return None
    number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{n}").exists())
    target = path.with_name(f"{path.name}.{number}")
    os.rename(path, target)
    return target


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, text: str) -> None:
    """Replace a file whole."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
