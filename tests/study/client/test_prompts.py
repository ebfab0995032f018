"""What is asked: lengths, shared prefixes, traces, files; equal seeds give equal traffic."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvwise.core.errors import UsageError
from kvwise.study.client.datasets import conversations
from kvwise.study.client.options import Dataset, EndpointType, Target, Traffic
from kvwise.study.client.prompts import Conversation, Maker
from kvwise.study.client.vocabulary import Bytes, Common, Hub, load_vocabulary

IDS, WORDS = Maker(Common(), is_chat=False), Maker(Common(), is_chat=True)
BYTES = Maker(Bytes(), is_chat=False)


def prompts(traffic: Traffic, maker: Maker) -> list[Any]:
    return [ask.prompt() for talk in conversations(traffic, maker) for ask in talk.turns]


def test_random_prompts_are_ids_of_the_lengths_asked_behind_one_prefix() -> None:
    traffic = Traffic(input_len=40, output_len=9, prefix_len=24, num_prompts=30)
    found = prompts(traffic, IDS)
    assert {len(p) for p in found} == {64}
    assert all(p[:24] == found[0][:24] for p in found)
    assert len({tuple(p[24:]) for p in found}) == 30
    assert all(32 <= token < 127 for p in found for token in p)
    turns = [ask for talk in conversations(traffic, IDS) for ask in talk.turns]
    assert {(ask.num_prompt, ask.max_tokens) for ask in turns} == {(64, 9)}
    assert found == prompts(traffic, IDS)
    assert found != prompts(Traffic(input_len=40, output_len=9, prefix_len=24, num_prompts=30, seed=1), IDS)


def test_the_range_ratio_spreads_both_lengths_evenly_around_theirs() -> None:
    traffic = Traffic(input_len=100, output_len=20, range_ratio=0.5, num_prompts=2000)
    asks = [talk.turns[0] for talk in conversations(traffic, IDS)]
    inputs, outputs = ([ask.num_prompt for ask in asks], [ask.max_tokens for ask in asks])
    assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (50, 150, 10, 30)
    assert abs(np.mean(inputs) - 100) < 2


def test_a_chat_gets_words_and_bytes_are_a_token_each() -> None:
    traffic = Traffic(input_len=12, num_prompts=3)
    assert all(len(text.split()) == 12 for text in prompts(traffic, WORDS))
    assert all(isinstance(text, str) and len(text.encode()) == 12 for text in prompts(traffic, BYTES))


def test_rates_say_when_requests_are_sent() -> None:
    at = [talk.at for talk in conversations(Traffic(num_prompts=50, rate=10.0), IDS)]
    assert at == sorted(at)
    assert at[-1] == pytest.approx(5.0)
    assert {talk.at for talk in conversations(Traffic(num_prompts=5), IDS)} == {0.0}
    assert Traffic(duration_s=3.0, rate=2.5).count == 8
    assert Traffic(duration_s=3.0).count == 1000


def test_turns_of_a_conversation_come_at_the_rate_asked() -> None:
    traffic = Traffic(Dataset.MULTI_TURN, num_turns=4, num_prompts=10, rate=2.0, input_len=5, prefix_len=8, think_s=1.5)
    talks = conversations(traffic, BYTES)
    assert [len(talk.turns) for talk in talks] == [4, 4, 2]
    assert talks[-1].at == pytest.approx(10 / 2.0)  # so many requests, at two a second
    assert {talk.think_s for talk in talks} == {1.5}
    texts = [[ask.prompt() for ask in talk.turns] for talk in talks]
    assert [len(text) for text in texts[0]] == [13, 5, 5, 5]
    assert len({turns[0][:8] for turns in texts}) == 1


# -- traces -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [(0, 1200, 5, [1, 2, 3]), (2000, 1536, 6, [1, 2, 4]), (3000, 700, 7, [1, 9]), (4000, 1200, 8, [1, 2, 3])]
    path = tmp_path / "trace.jsonl"
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return path


def test_equal_hash_ids_are_equal_tokens(trace: Path) -> None:
    first, second, third, again = prompts(Traffic(Dataset.MOONCAKE, trace), IDS)
    assert [len(p) for p in (first, second, third)] == [1200, 1536, 700]
    assert first[:1024] == second[:1024]
    assert first[:512] == third[:512]
    assert first[1024:] != second[1024:1200]
    assert first == again


def test_scaled_prompts_share_what_they_shared(trace: Path) -> None:
    talks = conversations(Traffic(Dataset.MOONCAKE, trace, length_scale=0.125), WORDS)
    first, second = (talk.turns[0].prompt().split() for talk in talks[:2])  # type: ignore[union-attr]
    assert (len(first), len(second)) == (64 + 64 + 22, 192)
    assert first[:128] == second[:128]
    assert [talk.turns[0].num_prompt for talk in talks[:2]] == [150, 192]
    assert [talk.turns[0].max_tokens for talk in talks] == [1, 1, 1, 1]


def test_a_trace_keeps_its_times_or_gets_a_rate(trace: Path) -> None:
    def at(**fields: Any) -> list[float]:
        return [talk.at for talk in conversations(Traffic(Dataset.MOONCAKE, trace, **fields), IDS)]

    assert at() == [0.0, 2.0, 3.0, 4.0]
    assert at(time_scale=0.5) == [0.0, 1.0, 1.5, 2.0]
    assert at(rate=2.0) == [0.0, 1.0, 1.5, 2.0]
    assert at(rate=float("inf")) == [0.0] * 4
    assert at(num_prompts=2) == [0.0, 2.0]


def test_a_wrong_block_size_is_refused_by_its_line(trace: Path) -> None:
    with pytest.raises(UsageError, match=r"line 1.*256"):
        conversations(Traffic(Dataset.MOONCAKE, trace, block_tokens=256), IDS)


# -- files ------------------------------------------------------------------------------------------------------


def share_gpt(path: Path, *, as_lines: bool = False) -> Path:
    def talk(*texts: str) -> dict[str, Any]:
        return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]}

    rows = [
        talk("question one", "an answer of twenty.", "and then what", "more words"),
        talk("question two", "another answer"),
        talk("hi", "too short a question"),
        talk("x" * 2000, "too long a question"),
    ]
    path.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("as_lines", [False, True])
def test_share_gpt_asks_first_turns_for_answers_as_long_as_theirs(tmp_path: Path, as_lines: bool) -> None:
    path = share_gpt(tmp_path / "talks.json", as_lines=as_lines)
    talks = conversations(Traffic(Dataset.SHAREGPT, path, num_prompts=10), BYTES)
    found = Counter((ask.prompt(), ask.num_prompt, ask.max_tokens) for talk in talks for ask in talk.turns)
    assert found == {("question one", 12, 20): 5, ("question two", 12, 14): 5}  # repeated until there are enough
    fixed = conversations(Traffic(Dataset.SHAREGPT, path, num_prompts=2, output_len=3), BYTES)
    assert [talk.turns[0].max_tokens for talk in fixed] == [3, 3]


def test_turns_of_a_file_are_asked_one_after_the_other(tmp_path: Path) -> None:
    talks = conversations(
        Traffic(Dataset.MULTI_TURN, share_gpt(tmp_path / "t.json"), num_prompts=5, num_turns=9), BYTES
    )
    assert ["question one", "and then what"] in [[ask.prompt() for ask in talk.turns] for talk in talks]


def test_lines_of_ones_own_are_texts_ids_or_messages(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "abc", "output_tokens": 5}\n\n{"prompt": [5, 6]}\n')
    talks = conversations(Traffic(Dataset.CUSTOM, path, num_prompts=3), IDS)
    asked = [(ask.prompt(), ask.num_prompt, ask.max_tokens) for talk in talks for ask in talk.turns]
    assert asked == [("abc", None, 5), ([5, 6], 2, 128), ("abc", None, 5)]
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}')
    ((ask,),) = (talk.turns for talk in conversations(Traffic(Dataset.CUSTOM, path, num_prompts=1), WORDS))
    assert ask.prompt() == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("custom", "", "nothing to ask"),
        ("custom", "[1, 2", "JSON"),
        ("custom", "3", "line 1.*int"),
        ("custom", '{"prompt": ""}', "line 1.*prompt"),
        ("custom", '{"prompt": [1, -2]}', "line 1.*prompt"),
        ("custom", '{"prompt": "a", "output_tokens": 0}', "line 1.*output_tokens"),
        ("custom", '{"messages": [{}]}', "line 1.*openai-chat"),
        ("sharegpt", "[{}]", "entry 0.*conversations"),
        ("sharegpt", '[{"conversations": [{"from": "human"}]}]', "entry 0.*value"),
        ("sharegpt", '[{"conversations": []}]', "nothing to ask"),
        ("sharegpt", "[", "JSON"),
        ("sharegpt", "[" * 100_000, "JSON"),
        ("multi-turn", "\xff", "readable"),
        ("mooncake", "{}", "timestamp"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: str, where: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UsageError, match=f"(?s)bad.*{where}"):
        conversations(Traffic(Dataset(name), path), IDS)


def test_settings_out_of_range_are_refused() -> None:
    for bad in (
        {"input_len": 0}, {"range_ratio": 1.0}, {"rate": 0.0}, {"rate": float("nan")}, {"burstiness": 0.0},
        {"max_concurrency": 0}, {"num_prompts": 0}, {"num_prompts": 10**9}, {"duration_s": float("inf")}, {"seed": -1},
        {"path": Path("x")}, {"dataset": Dataset.CUSTOM}, {"length_scale": 0.0}, {"think_s": -1.0},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Traffic(**bad)  # type: ignore[arg-type]
    for url in ("localhost:8000", "ftp://x", "http://", "file:///etc/passwd"):
        with pytest.raises(UsageError):
            Target(url)


def test_urls_with_and_without_v1_are_the_same() -> None:
    for base in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Target(base).url == "http://h:1/v1/completions"
        assert Target(base, EndpointType.CHAT).url == "http://h:1/v1/chat/completions"
    assert Target("http://h:1/proxy", endpoint="generate").url == "http://h:1/proxy/generate"


class Tokenizer:
    """As transformers' are, of four words."""

    vocab_size = 5
    all_special_ids = (2,)

    def decode(self, ids: list[int]) -> str:
        return "".join("abXde"[i] for i in ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return ["abXde".index(sign) for sign in text]


def test_a_tokenizer_makes_text_without_special_tokens() -> None:
    maker = Maker(Hub(Tokenizer()), is_chat=False)
    found = prompts(Traffic(input_len=50, num_prompts=4), maker)
    assert {sign for text in found for sign in text} == set("abde")
    assert maker.vocabulary.count("abd") == 3


def test_a_tokenizer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_vocabulary("nobody/nothing")
    with pytest.raises(UsageError, match="no folder"):
        load_vocabulary("../../no such")


def test_conversations_are_numbered() -> None:
    talks: list[Conversation] = conversations(Traffic(num_prompts=4), IDS)
    assert [talk.index for talk in talks] == [0, 1, 2, 3]
