"""Text that arrives in pieces is the text that decoding at once gives, cut at the first stop string."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers import models as rust_models
from transformers import PreTrainedTokenizerFast

from kvwise.core.errors import UsageError
from kvwise.models.text import (
    BOS,
    EOS,
    ByteTokenizer,
    Detokenizer,
    HuggingFaceTokenizer,
    OutputText,
    StopStrings,
    Tokenizer,
)

BYTES = ByteTokenizer(320)
CORPUS = ["the quick brown fox jumps over the lazy dog", "größer als 東京 🙂 naïve café", "x = y + 1  # why"] * 3


def trained(kind: str) -> HuggingFaceTokenizer:
    """A small real tokenizer: byte-level BPE (GPT-2's kind) or BPE over metaspaces with byte fallback (Llama's)."""
    if kind == "byte-level":
        inner = RustTokenizer(rust_models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    else:
        inner = RustTokenizer(rust_models.BPE(byte_fallback=True, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, special = [], ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>"))


TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": BYTES,
    "byte-level": trained("byte-level"),
    "metaspace": trained("metaspace"),
}


def pieces(tokenizer: Tokenizer, tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    detokenizer, found, at = Detokenizer(tokenizer), [], 0
    for size in sizes:
        found.append(detokenizer.add(tokens[at : at + size]))
        at += size
    return [*found, detokenizer.add(tokens[at:]), detokenizer.finish()]


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(UsageError, match="surrogate"):
            BYTES.encode(text)
        return
    assert BYTES.decode(BYTES.encode(text)) == text


def test_byte_tokens_outside_text() -> None:
    assert BYTES.encode("a") == [BOS, 97]
    assert BYTES.encode("a", add_special=False) == [97]
    assert BYTES.decode([BOS, 97, EOS]) == "a"
    assert BYTES.decode([97, EOS, 300], skip_special=False) == "a<|257|><|300|>"
    with pytest.raises(UsageError, match="200"):
        ByteTokenizer(200).encode("a")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_whole_text_and_never_split_a_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60, deadline=None)
    @given(st.text(alphabet="the quick🙂東京ß é\n", max_size=40), st.lists(st.integers(0, 3), max_size=60))
    def check(text: str, sizes: list[int]) -> None:
        tokens = tokenizer.encode(text, add_special=False)
        whole = tokenizer.decode(tokens)
        found = pieces(tokenizer, tokens, sizes)
        assert "".join(found) == whole
        assert not any("�" in piece for piece in found[:-1])

    check()


@given(st.lists(st.integers(0, 319), max_size=150), st.lists(st.integers(0, 3), max_size=60))
def test_nonsense_decodes_piece_by_piece_as_at_once(tokens: list[int], sizes: list[int]) -> None:
    assert "".join(pieces(BYTES, tokens, sizes)) == BYTES.decode(tokens)


def test_the_window_stays_short() -> None:
    detokenizer = Detokenizer(BYTES)
    for _ in range(300):
        detokenizer.add([0x80])
    assert len(detokenizer._window) <= 2 * Detokenizer.MAX_WINDOW
    assert detokenizer.add([65]).endswith("A")


def expected_cut(text: str, stops: list[str]) -> str:
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))]
    return text


@given(
    st.text(alphabet="ab\n", max_size=30),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 4), max_size=30),
)
def test_stop_strings_cut_the_same_whatever_the_pieces(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, found, at = StopStrings(stops), "", 0
    for size in [*sizes, len(text)]:
        found += matcher.add(text[at : at + size])
        at += size
        assert expected_cut(text, stops).startswith(found), "nothing comes out that a stop string takes back"
    if matcher.found is None:
        found += matcher.finish()
    assert found == expected_cut(text, stops)


def test_only_a_possible_start_is_held_back() -> None:
    matcher = StopStrings(["###", "END"])
    assert [matcher.add(piece) for piece in ("one #", "# two E", "N", "emy")] == ["one ", "## two ", "", "ENemy"]


def test_output_text_streams_and_stops() -> None:
    output = OutputText(BYTES, ["stop"])
    found = [output.add([token]) for token in "é says stop it".encode()]
    assert "".join(found) == output.text == "é says "
    assert output.stop == "stop"
    assert output.finish() == ""


def test_output_text_gives_back_what_it_held() -> None:
    output = OutputText(BYTES, ["stop"])
    output.add(b"non-st")
    assert output.text == "non-"
    assert output.finish() == "st"
    assert (output.text, output.stop) == ("non-st", None)
    half = OutputText(BYTES)
    assert half.add("é".encode()[:1]) == ""
    assert half.finish() == "�"


def test_chat_templates() -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert BYTES.decode(BYTES.chat(messages)) == "user: hi\nassistant: "
    tokenizer = trained("byte-level")
    with pytest.raises(UsageError, match="no chat template"):
        tokenizer.chat(messages)
    tokenizer.inner.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    assert tokenizer.decode(tokenizer.chat(messages)) == "hi!"
    tokenizer.inner.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="roles must alternate"):
        tokenizer.chat(messages)
    tokenizer.inner.chat_template = "{% for"
    with pytest.raises(UsageError, match="template failed"):
        tokenizer.chat(messages)


def test_a_skipped_special_token_does_not_glue_words() -> None:
    tokenizer = trained("metaspace")
    eos = tokenizer.eos_token_id
    assert eos is not None
    word = tokenizer.encode("the", add_special=False)
    tokens = [*word, eos, *word]
    assert "".join(pieces(tokenizer, tokens, [1] * len(tokens))) == tokenizer.decode(tokens) == "the the"
