"""Prompts from files: ShareGPT-like conversations, and lines of one's own."""

import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from kvwise.core.errors import UsageError
from kvwise.study.client.options import Dataset, Traffic
from kvwise.study.client.prompts import DEFAULT_OUTPUT, Ask, Maker
from kvwise.study.lengths import open_text

MAX_FILE = 4 << 30
_CHARS_PER_TOKEN = 4  # where there is no tokenizer: what English takes in most vocabularies
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "chatgpt", "model")
# vLLM's limits for ShareGPT: shorter or longer ones are left out (tokens of the prompt, of the answer, of both).
_SHORTEST, _LONGEST, _LONGEST_SUM = 4, 1024, 2048


def read_turns(traffic: Traffic, maker: Maker, rng: np.random.Generator) -> list[tuple[Ask, ...]]:
    """Conversations of a file; repeated if they are too few for the run. UsageError, naming file and place."""
    path = Path(traffic.path or "")
    if traffic.dataset is Dataset.CUSTOM:
        found: list[tuple[Ask, ...]] = [(_custom(row, where, traffic, maker),) for row, where in _lines(path)]
    else:
        talks = [_talk(row, where) for row, where in _rows(path)]
        make = _all_turns if traffic.dataset is Dataset.MULTI_TURN else _first_turn
        asked = (make(talks[i], traffic, maker) for i in rng.permutation(len(talks)) if talks[i])
        found = list(islice((turns for turns in asked if turns), traffic.count))
    if not found:
        raise UsageError(f"{path} has nothing to ask that fits --dataset-name {traffic.dataset}")
    return list(islice(cycle(found), traffic.count))


def _custom(row: dict[str, Any], where: str, traffic: Traffic, maker: Maker) -> Ask:
    """A line {"prompt": text or token ids, "output_tokens": n} or {"messages": [...]}."""
    output = row.get("output_tokens", traffic.output_len or DEFAULT_OUTPUT)
    if type(output) is not int or output < 1:
        raise UsageError(f"{where}: output_tokens={output!r} must be a whole number, at least 1")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise UsageError(f"{where}: messages must be a list of objects")
        if not maker.is_chat:
            raise UsageError(f"{where}: messages need --endpoint-type openai-chat")
        return Ask(lambda: messages, None, output)
    prompt = row.get("prompt")
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        if maker.is_chat:
            raise UsageError(f"{where}: token ids cannot be a chat: choose --endpoint-type openai")
        return Ask(lambda: prompt, len(prompt), output)
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"{where}: prompt must be a text or a list of token ids, and not empty")
    return maker.ask_text(prompt, output)


def _first_turn(talk: list[tuple[str, str]], traffic: Traffic, maker: Maker) -> tuple[Ask, ...]:
    asked, answered = talk[0]
    num_in, num_out = _size(asked, maker), _size(answered, maker)
    fits = num_in >= _SHORTEST and (traffic.output_len is not None or num_out >= _SHORTEST)
    fits = fits and num_in <= _LONGEST and num_in + num_out <= _LONGEST_SUM
    return (maker.ask_text(asked, traffic.output_len or num_out),) if fits else ()


def _all_turns(talk: list[tuple[str, str]], traffic: Traffic, maker: Maker) -> tuple[Ask, ...]:
    return tuple(
        maker.ask_text(asked, traffic.output_len or _size(answered, maker))
        for asked, answered in talk[: traffic.num_turns]
    )


def _size(text: str, maker: Maker) -> int:
    count = maker.vocabulary.count(text)
    return max(1, len(text) // _CHARS_PER_TOKEN if count is None else count)


def _talk(row: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(asked, answered) of each turn; an answer that is missing is empty."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        raise UsageError(f"{where}: field 'conversations' is missing, or no list")
    pairs: list[tuple[str, str]] = []
    for turn in turns:
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(who, str) or not isinstance(text, str):
            raise UsageError(f"{where}: a turn must have 'from' and 'value' (or 'role' and 'content') as texts")
        if who in _ASKS and text:
            pairs.append((text, ""))
        elif who in _ANSWERS and pairs and not pairs[-1][1]:
            pairs[-1] = (pairs[-1][0], text)
    return pairs


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects of a JSON list, or of JSON lines."""
    with open_text(path) as file:
        try:
            first = file.read(1)
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise UsageError(f"{path} is no readable text: {error}") from error
    if first != "[":
        yield from _lines(path)
        return
    if path.stat().st_size > MAX_FILE:
        raise UsageError(f"{path} is larger than {MAX_FILE} bytes: give it as JSON lines")
    with open_text(path) as file:
        try:
            rows = json.load(file)
        except (ValueError, RecursionError, OSError, EOFError) as error:
            raise UsageError(f"{path} is no JSON: {error}") from error
    for number, row in enumerate(rows):
        yield _object(row, f"{path} entry {number}"), f"{path} entry {number}"


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _object(json.loads(line), f"{path} line {number}"), f"{path} line {number}"
        except (ValueError, RecursionError, OSError, EOFError) as error:
            raise UsageError(f"{path} is no file of JSON lines: {error}") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is no JSON object but {type(row).__name__}")
    return row
