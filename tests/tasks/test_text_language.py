"""Text whose tokens are those that were asked for, whatever the tokenizer does."""

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kvwise.core.errors import TaskError, UsageError
from kvwise.models.text import ByteTokenizer, HuggingFaceTokenizer
from kvwise.tasks.catalogue import parse_task
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.words import ADJECTIVES, GROUPS, NOUNS, SENTENCES
from tests.tasks.speakers import TEXT, speaker, tokenizer

RNG = np.random.default_rng
STATEMENTS = [
    ("recall", r" One of the special magic numbers for [a-z]+-[a-z]+ is: \d{7}\."),
    ("multi_value", r" The special magic numbers for [a-z]+-[a-z]+ are: \d{7}, \d{7}, \d{7}, \d{7}\."),
    ("tracking", r" VAR [a-z]+-[a-z]+ = \d{7}\."),
    ("tracking", r" VAR [a-z]+-[a-z]+ = VAR [a-z]+-[a-z]+\."),
    ("counting", r" Somebody wrote down the word [a-z]+\."),
    ("copy", r" Here is a sequence of numbers:( \d{7},){9} \d{7}\."),
]


def spoken(name: str) -> TextLanguage:
    language = speaker(name)
    assert isinstance(language, TextLanguage)
    return language


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(("task", "pattern"), STATEMENTS)
def test_statements_read_as_written_between_whole_sentences(name: str, task: str, pattern: str) -> None:
    import re

    language = spoken(name)
    context = parse_task(task).episode(RNG(1), language, 1500).context
    text = f" {language._decode(context[1:]).lstrip()}"
    assert re.search(pattern, text)
    rest = re.sub("|".join(p for _, p in STATEMENTS), "", text)
    first, *sentences = rest.split(".")
    assert sentences.pop() == "", "the context ends with a whole sentence"
    assert all(f"{sentence.strip()}." in SENTENCES for sentence in sentences)
    assert any(sentence.endswith(first.strip()) for sentence in (s.rstrip(".") for s in SENTENCES))


@pytest.mark.parametrize("name", TEXT)
def test_a_question_begins_its_answer_and_the_next_question_follows(name: str) -> None:
    language = spoken(name)
    questions = parse_task("recall").episode(RNG(1), language, 1500).questions[:2]
    text = language._decode([token for q in questions for token in (*q.prompt, *q.answer)])
    assert text.count("\nQuestion: ") + text.startswith("Question: ") == 2
    assert text.count("\nAnswer: The special magic numbers for ") == 2


@pytest.mark.parametrize("name", TEXT)
def test_a_value_has_the_same_tokens_wherever_it_stands(name: str) -> None:
    language = spoken(name)
    key, value = language.keys(RNG(0), 1)[0], language.values(RNG(0), 1)[0]
    for text in (language.assign(key, [value]), language.assign(key, [value, value]), language.link(value, key)):
        assert any(text[i : i + len(value)] == value for i in range(len(text)))


def test_begin_opens_every_context() -> None:
    plain = ByteTokenizer(320)
    language = TextLanguage(plain.encode, plain.decode, (256, 65, 66))
    for task in ("recall", "needle", "continuation", "early_fact"):
        context = parse_task(task).episode(RNG(0), language, 999).context
        assert len(context) == 999
        assert context[:3] == (256, 65, 66)
        assert 256 not in context[1:], "the BOS that encode puts in front of each piece is taken off"


def test_a_tokenizer_of_transformers() -> None:
    inner = PreTrainedTokenizerFast(tokenizer_object=tokenizer("byte-level"), bos_token="<s>", unk_token="<unk>")
    outer = HuggingFaceTokenizer(inner)
    language = TextLanguage(
        lambda text: outer.encode(text, add_special=False), outer.decode, (outer.bos_token_id or 0,)
    )
    episode = parse_task("recall").episode(RNG(0), language, 700)
    assert len(episode.context) == 700
    assert outer.decode(episode.questions[0].answer).strip().isdigit()


def test_keys_values_and_words_are_different() -> None:
    language = spoken("text-bytes")
    assert len(set(language.keys(RNG(0), language.num_symbols))) == language.num_symbols == 2304
    assert len(set(language.values(RNG(0), 2304))) == 2304
    with pytest.raises(TaskError, match="2305 different keys are needed and the language has 2304"):
        language.keys(RNG(0), 2305)
    words = [word for group in range(language.num_groups) for word in language.words(RNG(0), group, 8)]
    assert len(set(words)) == 32


def test_no_word_begins_another_and_no_sentence_speaks_of_them() -> None:
    counted = [word for _, group in GROUPS for word in group]
    for words in (ADJECTIVES, NOUNS, counted):
        assert not [(a, b) for a in words for b in words if a != b and b.startswith(a)]
    assert not [(w, s) for w in counted for s in SENTENCES if w in s.lower()]
    assert not [s for s in SENTENCES if any(sign.isdigit() for sign in s) or not s.endswith(".")]


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    letters = {sign: i for i, sign in enumerate(" abcdefghijklmnopqrstuvwxyz")}
    with pytest.raises(TaskError, match=r"reads .* back as .* English letters, digits and punctuation"):
        TextLanguage(
            lambda text: [letters.get(sign, 0) for sign in text.lower()],
            lambda tokens: "".join(" abcdefghijklmnopqrstuvwxyz"[token] for token in tokens),
        )
    with pytest.raises(UsageError, match="200"):
        TextLanguage(ByteTokenizer(200).encode, ByteTokenizer(200).decode)


def test_words_that_share_their_tokens_are_refused() -> None:
    read = "".join

    class Short:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def encode(self, text: str) -> list[int]:
            if text.lstrip("a\n ").isdigit():
                return [ord("a")] if text.startswith("a") else []
            return [ord(sign) for sign in text]

    with pytest.raises(TaskError, match="different words with the same tokens"):
        TextLanguage(Short().encode, lambda tokens: read(map(chr, tokens))).values(RNG(0), 2)
