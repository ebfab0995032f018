"""`kvwise generate --explain`: every place of the picture, the words, the page and the JSON tell what heads held."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kvwise.cli.explain import OPEN, PACKED, RECALLED, Explained, Strip, cells, draw, explained, strips_of
from kvwise.cli.explain_page import page
from kvwise.cli.main import run
from kvwise.core.output import Attestation, HeadReport, RequestMetrics, RequestOutput

PROMPT = "KEY k3 v8 " + "f1 f2 f3 f5 " * 15 + "KEY k9 v1 f2 QUERY k9"
GENERATE = ["generate", "--model", "builtin:recall", "--prompt", PROMPT, "--ignore-eos"]


def output_of(heads: list[list[HeadReport]] | None, *, prompt: int = 6, seen: int = 10, **more: Any) -> RequestOutput:
    strategy = more.pop("strategy", "streaming(budget=0.5)")
    return RequestOutput(
        "a", 0, list(range(prompt)), list(range(seen - prompt + 1)), [], "", None, None, None, RequestMetrics(0.0),
        Attestation(strategy, tokens_seen=seen, heads=heads, **more),
    )  # fmt: skip


def drawn(shown: Explained, width: int = 60, *, colour: bool = False) -> str:
    out = StringIO()
    console = Console(file=out, width=width, highlight=False, color_system="truecolor" if colour else None)
    draw(console, shown)
    return out.getvalue()


def strip(opened: Any = (), packed: Any = (), recalled: Any = ()) -> Strip:
    return Strip("layer 0, head 0", 1, tuple(opened), tuple(packed), tuple(recalled))


# -- strips -----------------------------------------------------------------------------------------------------------


def test_heads_that_held_the_same_are_one_strip() -> None:
    a, b = HeadReport([0, 1, 2], 1), HeadReport([0, 1, 2], 2)
    c = HeadReport([0], 0, [5])
    strips = strips_of([[a, a], [a, a], [a, b, a, a], [c], [a, a]])
    assert [s.label for s in strips] == [
        "layers 0-1, all heads", "layer 2, heads 0, 2-3", "layer 2, head 1", "layer 3, head 0", "layer 4, all heads",
    ]  # fmt: skip
    assert [s.num_heads for s in strips] == [4, 3, 1, 1, 2]
    assert (strips[0].packed, strips[0].open) == ((0,), (1, 2))
    assert (strips[2].packed, strips[2].open) == ((0, 1), (2,))
    assert strips[3].recalled == (5,)
    assert sum(s.num_heads for s in strips) == 11
    assert strips_of([]) == []


def test_a_place_for_every_token_shows_each_one() -> None:
    one = strip([0, 4, 9], [2, 3], [7])
    text = "".join(character for _, character in cells(one, 10, 80))
    assert text == "█ ▓▓█  • █"
    assert [kind for kind, _ in cells(one, 10, 80)] == [OPEN, "", PACKED, PACKED, OPEN, "", "", RECALLED, "", OPEN]


def test_places_of_several_tokens_show_how_many() -> None:
    assert "".join(c for _, c in cells(strip(range(8)), 16, 2)) == "█ "
    assert "".join(c for _, c in cells(strip([0, *range(8, 12)]), 16, 2)) == "▁▄"
    assert "".join(c for _, c in cells(strip((), [0, *range(8, 16)]), 16, 2)) == "░▓"
    assert "".join(c for _, c in cells(strip((), (), [0, *range(8, 16)]), 16, 2)) == "∘•"


POSITIONS = st.integers(1, 300).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(0, 3), min_size=n, max_size=n), st.integers(1, 120))
)


@settings(max_examples=150, deadline=None)
@given(POSITIONS)
def test_every_place_tells_the_truth(case: tuple[int, list[int], int]) -> None:
    """Computed again, token by token: blank if none is there, full only if all are, and of the most common kind."""
    num_tokens, kinds, width = case
    drawn = cells(strip(*([p for p, k in enumerate(kinds) if k == kind] for kind in (1, 2, 3))), num_tokens, width)
    assert len(drawn) == min(num_tokens, width)
    starts = [place * num_tokens // len(drawn) for place in range(len(drawn) + 1)]
    for place, (kind, character) in enumerate(drawn):
        inside = kinds[starts[place] : starts[place + 1]]
        counts = {scale: inside.count(k) for scale, k in ((OPEN, 1), (PACKED, 2), (RECALLED, 3))}
        held = sum(counts.values())
        assert (character == " ") == (held == 0)
        if held:
            assert counts[kind] == max(counts.values())
            assert (character == kind[-1]) == (held > len(inside) * (len(kind) - 1) / len(kind))


# -- the terminal -----------------------------------------------------------------------------------------------------


def test_the_picture() -> None:
    kept = [[HeadReport([0, 1, 8, 9]), HeadReport([0, 1, 2, 9], 3, [5])]]
    text = drawn(explained(output_of(kept, tokens_dropped=12, bytes_freed=2**20, bits_per_element=16.0)))
    lines = text.splitlines()
    assert lines[0] == "a.0: streaming(budget=0.5)"
    assert lines[1] == "layer 0, head 0 │██      ██│ 4 of 10"
    assert lines[2] == "layer 0, head 1 │▓▓▓  •   █│ 4 + 1 of 10"
    assert lines[3] == "                 0     ↑6 9"
    assert lines[4] == "█ kept   ▓ kept, packed in codes   • brought back by the last step   blank: dropped"
    assert "10 tokens: 6 of the prompt, 4 of the output" in text
    assert "4 of 10 on the device (40.0%)" in text
    assert "12 tokens" in text
    assert "16 per element" in text
    assert "1.00 MiB" in text
    assert "\x1b" not in text


def test_colours_are_for_terminals_and_say_nothing_new() -> None:
    shown = explained(output_of([[HeadReport([0, 1, 2, 9], 3)]]))
    coloured = drawn(shown, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == drawn(shown)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_strips_fit_the_width(width: int) -> None:
    heads = [[HeadReport(list(range(h, 5000, 3))) for h in range(2)] for _ in range(2)]
    lines = drawn(explained(output_of(heads, prompt=4900, seen=5000)), width).splitlines()
    strips = [line for line in lines if "│" in line]
    assert len(strips) == 2
    assert all(width - 4 <= len(line) <= width for line in strips)
    assert "a place stands for up to" in "\n".join(lines)
    assert "↑4900: the first token of the output" in lines


def test_what_blank_means_depends_on_the_methods() -> None:
    for strategy, words in (
        ("h2o", "dropped"),
        ("elastic", "dropped, living on in what stays"),
        ("topk", "on the host"),
        ("somebody_elses(x=1)", "not held"),
    ):
        assert explained(output_of([[HeadReport([0])]], strategy=strategy)).absent == words
    assert "blank" not in drawn(explained(output_of([[HeadReport(list(range(10)))]])))


def test_a_request_that_held_nothing() -> None:
    for heads in (None, [], [[HeadReport([])]]):
        shown = explained(output_of(heads, prompt=3, seen=0))
        assert "the request held no KV" in drawn(shown) or shown.num_tokens == 0
        assert page([shown], [[]])


def test_words_of_merged_and_recalled() -> None:
    heads = [[HeadReport([0, 1]), HeadReport([0])]]
    words = dict(explained(output_of(heads, tokens_merged=7, tokens_fetched=5, fetch_candidates=20)).words)
    assert words["kept"] == "1.5 on average of 2 heads, 1 to 2, of 10 on the device (15.0%)"
    assert words["merged"].startswith("7 ")
    assert words["recalled"] == "5 of 20 that could be (25.0%)"
    plain = dict(explained(output_of(heads)).words)
    assert "merged" not in plain
    assert "recalled" not in plain


# -- the page ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags, attributes and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def test_the_page_is_sound_and_needs_nothing_else() -> None:
    hostile = ["</script><script>alert(1)</script>", "<b>", "&", "\n", "<!--", *"fghij"]
    heads = [[HeadReport([0, 1, 8, 9]), HeadReport([0, 1, 2, 9], 3, [5, 6])]]
    text = page([explained(output_of(heads, strategy="streaming(budget=0.5)+prefix"))] * 2, [hostile] * 2)
    read = Reader(text)
    assert read.open == []
    assert not re.search(r"https?://|@import|url\(|src=|<link", text)
    facts = json.loads(read.scripts[0])
    assert len(read.scripts) == 2
    assert facts[0]["tokens"] == hostile
    assert facts[0]["strips"][0]["open"] == [[0, 2], [8, 10]]
    assert facts[0]["strips"][1] == {
        "label": "layer 0, head 1", "open": [[9, 10]], "packed": [[0, 3]], "recalled": [[5, 7]],
    }  # fmt: skip
    canvases = [attributes for tag, attributes in read.tags if tag == "canvas"]
    assert len(canvases) == 4
    for facts in canvases:
        assert facts["role"] == "slider"
        assert facts["tabindex"] == "0"
        assert facts["aria-valuemax"] == "9"
        assert "of 10 tokens kept" in (facts["aria-label"] or "")
    assert ("html", {"lang": "en"}) in read.tags
    assert "prefers-color-scheme: dark" in text
    assert "<noscript>" in text


# -- the command ------------------------------------------------------------------------------------------------------


def test_explain_on_the_built_in_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kept.html"
    given = [*GENERATE, "--strategy", "streaming(budget=0.25, sinks=2)+prefix", "--max-tokens", "4"]
    assert run([*given, "--explain", "--explain-html", str(file)]) == 0
    told = capsys.readouterr()
    num_prompt = len(PROMPT.split()) + 1  # and BOS
    seen, kept = num_prompt + 3, num_prompt // 4
    (line,) = (line for line in told.out.splitlines() if line.startswith("layers 0-3, all heads"))
    assert line.endswith(f"│ {kept} of {seen}")
    inside = line.split("│")[1]
    assert inside == "██" + " " * (seen - kept) + "█" * (kept - 2)
    assert f"picture: {file}" in told.err
    facts = json.loads(Reader(file.read_text()).scripts[0])
    assert facts[0]["strips"][0]["open"] == [[0, 2], [seen - kept + 2, seen]]
    assert len(facts[0]["tokens"]) == seen
    assert facts[0]["tokens"][num_prompt - 1] == "k9"


def test_explain_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*GENERATE, "--strategy", "streaming(budget=0.25, sinks=2)", "--max-tokens", "4", "--json"]
    assert run([*given, "--explain", "--n", "2"]) == 0
    for line in capsys.readouterr().out.splitlines():
        heads = json.loads(line)["attestation"]["heads"]
        assert {len(head["kept"]) for layer in heads for head in layer} == {(len(PROMPT.split()) + 1) // 4}
    assert run(given) == 0
    assert json.loads(capsys.readouterr().out)["attestation"]["heads"] is None


def test_a_picture_of_every_prompt_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*GENERATE, "--prompt", PROMPT + " f1", "--n", "2", "--max-tokens", "2", "--strategy", "topk"]
    assert run([*given, "--explain", "--explain-html", str(tmp_path / "a.html")]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^request-\d+\.[01]: topk$", out, re.MULTILINE)) == 4
    assert (tmp_path / "a.html").read_text().count("<section>") == 4


def test_a_page_alone_draws_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*GENERATE, "--max-tokens", "2", "--strategy", "streaming(budget=0.25)", "--explain-html"]
    assert run([*given, str(tmp_path / "a.html")]) == 0
    assert "│" not in capsys.readouterr().out
    (facts,) = json.loads(Reader((tmp_path / "a.html").read_text()).scripts[0])
    assert facts["strips"]
    assert facts["absent"] == "dropped"


def test_a_page_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.html", "is no folder")):
        assert run(["generate", "--model", "/no/model", "--prompt", "x", "--explain-html", str(path)]) == 2
        assert words in capsys.readouterr().err
