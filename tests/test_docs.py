"""Pages that name code fail here when the code has moved on."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "kvwise"
MENTION = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[a-z_0-9/]+\.py")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def defined(path: Path) -> set[str]:
    """Classes, functions and `Class.member` of a file."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return names


def mentions(text: str) -> list[tuple[str, str | None]]:
    """(file, name) pairs: every name belongs to the file mentioned last before it."""
    found: list[tuple[str, str | None]] = []
    current: str | None = None
    for match in MENTION.findall(text):
        if FILE.fullmatch(match) and not match.startswith("tests/"):
            current = match
            found.append((match, None))
        elif current is not None and NAME.fullmatch(match):
            found.append((current, match))
    return found


def stale(text: str) -> list[str]:
    wrong = []
    for file, name in mentions(text):
        path = SOURCE / file
        if not path.is_file():
            wrong.append(file)
        elif name is not None and name not in defined(path):
            wrong.append(f"{file} {name}")
    return wrong


def test_every_name_on_the_way_of_one_request_exists() -> None:
    text = (ROOT / "docs" / "one-request.md").read_text()
    assert len([m for m in mentions(text) if m[1]]) > 25
    assert stale(text) == []


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert stale("see `engine/engine.py` `Engine.step_twice` and `engine/nowhere.py`") == [
        "engine/engine.py Engine.step_twice",
        "engine/nowhere.py",
    ]
