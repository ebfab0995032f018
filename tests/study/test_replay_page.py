"""The page of the policies: figures from the replay, and the part that needs no traces is not stale."""

import gzip
import json
from pathlib import Path

import pytest

from kvwise.policies.catalogue import policies
from kvwise.study import replay_page
from kvwise.study.replay import replay
from kvwise.study.traces import read_trace

DOCS = Path(__file__).resolve().parents[2] / "docs" / "policies.md"


def write_turns(folder: Path) -> Path:
    prompts = [[0, 1], [0, 1, 2], [3], [0, 1, 2, 4]]
    rows = [
        {"timestamp": 40_000 * i, "input_length": 512 * len(ids), "output_length": 1, "hash_ids": ids}
        for i, ids in enumerate(prompts)
    ]
    path = folder / "turns.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_every_figure_is_that_of_a_replay(tmp_path: Path) -> None:
    path = write_turns(tmp_path)
    text = replay_page.page(tmp_path)
    assert "**turns**: 4 requests, 5 different blocks; a tier without limit finds 50.0 %." in text
    assert text.count("| 50.0 | 50.0 | 50.0 | 50.0 |") == len(policies()) + 2
    assert replay(read_trace(path), "lru", None, 60).token_hit_ratio == 0.2
    assert "| turns | 50.0 | 20.0 | 50.0 | 50.0 |" in text
    assert text == replay_page.page(tmp_path)


def test_touching_from_the_end_has_a_row_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_turns(tmp_path)
    monkeypatch.setattr(replay_page, "CAPACITIES", (3,))
    text = replay_page.page(tmp_path)
    assert "| `lru` | 20.0 |\n" in text
    assert "| `lru`, last to first | 40.0 |\n| *bound* | 40.0 |\n" in text


def test_the_page_names_every_policy_as_it_is_now() -> None:
    text = DOCS.read_text()
    (table,) = [part for part in replay_page.page(Path("/nowhere")).split("\n\n") if part.startswith("| policy")]
    assert table in text
    assert all(text.count(f"\n| `{name}` | ") >= 4 for name in policies())


def test_its_words_are_those_of_the_generator() -> None:
    text = DOCS.read_text()
    words = [part for part in replay_page.page(Path("/nowhere")).split("\n\n") if not part.startswith("|")]
    assert all(part.strip() in text for part in words)
