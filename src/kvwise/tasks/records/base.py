"""What all benchmarks have in common: records with questions, and reading them line by line from a JSONL file."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvwise.core.errors import TaskError

MAX_LINE_BYTES = 64 << 20
MAX_FILE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class RecordQuestion:
    """A question as text, asked after the context; any of `references` is right, unless the scorer says otherwise."""

    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Record:
    """A context and the questions about it, of one task of the benchmark."""

    task: str
    context: str
    questions: tuple[RecordQuestion, ...]


@dataclass(frozen=True, slots=True)
class RecordSet:
    """Records of one file, and how their answers are scored: `score(task, prediction, references)` is 0 to 1."""

    name: str
    records: tuple[Record, ...]
    score: Callable[[str, str, tuple[str, ...]], float]


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a JSON object, and where it stands, so that errors can say so."""

    where: str
    data: dict[str, Any]

    def error(self, problem: str) -> TaskError:
        """TaskError with the place in front."""
        return TaskError(f"{self.where}: {problem}")

    def text(self, name: str) -> str:
        """A field that must be text."""
        value = self.get(name)
        if not isinstance(value, str):
            raise self.error(f"field {name!r} is {_kind(value)}: it must be text")
        return self.encodable(value, name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that must be a text or a number, or a list of such with at least one member."""
        value = self.get(name)
        members = value if isinstance(value, list) else [value]
        if not members:
            raise self.error(f"field {name!r} is an empty list: at least one answer is needed to score by")
        for member in members:
            if isinstance(member, bool) or not isinstance(member, str | int | float):
                raise self.error(f"field {name!r} holds {_kind(member)}: it must hold texts or numbers")
        return tuple(self.encodable(_written(member), name) for member in members)

    def objects(self, name: str) -> tuple["Fields", ...]:
        """A field that must be a list of objects with at least one member."""
        value = self.get(name)
        if not (isinstance(value, list) and value and all(isinstance(member, dict) for member in value)):
            raise self.error(f"field {name!r} must be a list of objects with at least one member")
        return tuple(Fields(f"{self.where}, {name}[{i}]", member) for i, member in enumerate(value))

    def get(self, name: str) -> Any:
        """A field that must be there."""
        if name not in self.data:
            raise self.error(f"field {name!r} is missing; the fields are {', '.join(map(repr, self.data)) or 'none'}")
        return self.data[name]

    def encodable(self, text: str, name: str) -> str:
        """`text`, unless no tokenizer could read it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"field {name!r} has a lone surrogate at character {error.start}: it is no text") from None
        return text


def read_lines(path: str | Path, limit: int | None = None) -> Iterator[Fields]:
    """The objects of a JSONL file, at most `limit` of them; blank lines are skipped.

    TaskError names file, line and way out for a file that cannot be read, is empty or too large, is not UTF-8, or
    has a line that is no JSON object.
    """
    if limit is not None and limit < 1:
        raise TaskError(f"limit={limit} leaves no records of {path}: it must be at least 1, or None for all")
    found = size = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                size += len(line)
                _check_size(f"{path}, line {number}", len(line), size)
                if not line.strip():
                    continue
                yield _parse(f"{path}, line {number}", line, number == 1)
                found += 1
                if found == limit:
                    return
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise TaskError(f"cannot read {str(path)!r}: {error}; give the path of a JSONL file") from error
    if not found:
        raise TaskError(f"{path} has no records: it must be a JSONL file, one JSON object a line")


def known_task(path: str | Path, named: str | None, known: tuple[str, ...], prefixes: tuple[str, ...] = ()) -> str:
    """Which of the `known` tasks a file belongs to: by what its lines say, else by its name, else by its folder's.

    `prefixes` of a name are not looked at. TaskError naming the known tasks if it is none of them.
    """
    place = Path(path)
    names = [named] if named is not None else [place.stem, place.absolute().parent.name]
    for name in names:
        for prefix in ("", *prefixes):
            if name.removeprefix(prefix) in known:
                return name.removeprefix(prefix)
    said = "its field says" if named is not None else "its name and its folder say"
    raise TaskError(
        f"{path} belongs to no known task: {said} {' and '.join(map(repr, names))}; call the file <task>.jsonl with one"
        f" of {', '.join(known)}"
    )


def _check_size(where: str, line: int, total: int) -> None:
    if line > MAX_LINE_BYTES:
        raise TaskError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; a JSONL file has one record a line")
    if total > MAX_FILE_BYTES:
        raise TaskError(f"{where}: more than {MAX_FILE_BYTES >> 30} GiB so far; read fewer records with limit=")


def _parse(where: str, line: bytes, first: bool) -> Fields:
    try:
        data = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise TaskError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON ({error}); a JSONL file has one JSON object a line") from None
    if not isinstance(data, dict):
        raise TaskError(f"{where}: {_kind(data)} instead of an object; a JSONL file has one JSON object a line")
    return Fields(where, data)


def _written(value: str | int | float) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _kind(value: object) -> str:
    """What JSON calls it."""
    names = {str: "a text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
