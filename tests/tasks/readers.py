"""What a context says, read without the code that wrote it, and the answers that follow from it."""

import re
from collections import Counter

Tokens = tuple[int, ...]
KINDS = {  # spelled out: the reader must not trust the writer's lists
    "animal": "otter rabbit falcon salmon beetle donkey lizard badger",
    "fruit": "cherry apricot lemon papaya quince raisin melon banana",
    "metal": "copper nickel silver cobalt tin zinc iron mercury",
    "instrument": "violin trumpet guitar piano cello flute banjo oboe",
}


def follow(links: list[tuple[object, object]], value: object) -> list[object]:
    """Whatever was assigned `value`, or what was assigned that, and so on."""
    chain, current = [], value
    while (reached := [to for source, to in links if source == current]) != []:
        assert len(reached) == 1
        current = reached[0]
        chain.append(current)
    return chain


def most_common(words: list[object]) -> object:
    (best, most), *rest = Counter(words).most_common(2)
    assert not rest or rest[0][1] < most, "two words come equally often"
    return best


def answer_in_tokens(context: Tokens, prompt: Tokens, vocab_size: int) -> Tokens:
    """The token language as its documentation states it: ids 0-7 are markers, 32-63 words, then keys, then values."""
    first_value = 64 + (vocab_size - 64) // 2
    statements, words = [], []
    for token in context:
        if token < 16:
            statements.append([token])
        elif 32 <= token < 64:
            words.append(token)
        elif token >= 64:
            statements[-1].append(token)
    marker, *given = prompt
    if marker == 2:
        last = next(s for s in reversed(statements) if s[0] == 1 and s[1] == given[0])
        assert all(token >= first_value for token in last[2:])
        return tuple(last[2:])
    if marker == 4:
        return tuple(follow([(s[1], s[2]) for s in statements if s[0] == 3], given[0]))
    if marker == 5:
        group = range(given[0], given[0] + 8)
        return (most_common([word for word in words if word in group]),)
    assert marker == 7
    (passage,) = [s[1:] for s in statements if s[0] == 6 and s[1:3] == given]
    return tuple(passage[2:])


def answer_in_text(context: str, prompt: str) -> str:
    """As a person would read it."""
    if "magic" in prompt:
        key = re.search(r"numbers for (\S+)\?", prompt)[1]
        said = re.findall(rf"magic numbers? for {key} (?:is|are): ([\d, ]+)\.", context)
        return said[-1]
    if "variables" in prompt:
        value = re.search(r"the value (\d+)", prompt)[1]
        links = [(source, to) for to, source in re.findall(r"VAR (\S+) = (?:VAR )?(\S+)\.", context)]
        return ", ".join(follow(links, value))
    if "wrote" in context and "Which" in prompt:
        kind = re.search(r"Which (\w+)", prompt)[1]
        words = re.findall(r"wrote down the word (\w+)\.", context)
        return most_common([word for word in words if word in KINDS[kind].split()])
    opening = re.search(r"begins with ([\d, ]+)\?", prompt)[1]
    (passage,) = [s for s in re.findall(r"sequence of numbers: ([\d, ]+)\.", context) if s.startswith(opening)]
    return passage.removeprefix(f"{opening}, ")
