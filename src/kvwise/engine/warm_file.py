"""The warm file: prompts whose KV is to be there before anybody asks, for `kvwise cache warm` and for a server."""

import json
from dataclasses import dataclass
from pathlib import Path

from kvwise.core.errors import UsageError

_FIELDS = {"prompt", "salt", "session"}


@dataclass(frozen=True, slots=True)
class Line:
    """A prompt (text or token ids) and whose it is."""

    prompt: str | list[int]
    salt: str = ""
    session: str = ""


def read_lines(file: Path) -> list[Line]:
    """The prompts of a file: JSONL if each line begins with a brace, else one prompt a line. UsageError for others."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}; name a file of prompts") from None
    except ValueError:
        raise UsageError(f"{file} is no UTF-8 text; write one prompt a line, or JSONL") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{file} holds no prompt; write one a line, or JSONL")
    if not all(line.lstrip().startswith("{") for _, line in lines):
        return [Line(line) for _, line in lines]
    return [_read_json(f"{file}, line {number}", line) for number, line in lines]


def _read_json(where: str, text: str) -> Line:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f'{where}: no JSON; write {{"prompt": ...}}') from None
    if "prompt" not in found or (unknown := set(found) - _FIELDS):
        what = "no prompt" if "prompt" not in found else f"unknown field {min(unknown)!r}"
        raise UsageError(f"{where}: {what}; fields: prompt, salt, session")
    prompt = found["prompt"]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not (isinstance(prompt, str) or is_ids) or not prompt:
        raise UsageError(f"{where}: prompt must be text or token ids, and not empty")
    owner = {name: found.get(name, "") for name in ("salt", "session")}
    if not all(isinstance(value, str) for value in owner.values()):
        raise UsageError(f"{where}: salt and session must be text")
    return Line(prompt, **owner)
