"""Languages to run the tasks in: the token language, and text in tokenizers of several kinds, made offline."""

import string
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from kvwise.models.text import BOS, ByteTokenizer
from kvwise.tasks.language import Language
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.token_language import TokenLanguage
from kvwise.tasks.words import SENTENCES

CORPUS = [*SENTENCES, "One of the special magic numbers for quiet-bridge is: 123.", "Question: Which?\nAnswer:"]
TOKEN = ("token-512", "token-1024")
TEXT = ("text-bytes", "text-byte-level", "text-metaspace", "text-legacy")


def tokenizer(kind: str) -> Tokenizer:
    """GPT-2's kind, Llama's, and Llama 2's, which puts a space in front of whatever it encodes."""
    inner = Tokenizer(models.BPE(unk_token=None if kind == "byte-level" else "<unk>"))
    alphabet = list(string.printable)
    if kind == "byte-level":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def text_language(kind: str) -> TextLanguage:
    if kind == "bytes":
        plain = ByteTokenizer(320)
        return TextLanguage(lambda text: plain.encode(text, add_special=False), plain.decode, (BOS,))
    inner = tokenizer(kind)

    def decode(tokens: Sequence[int]) -> str:
        return str(inner.decode(list(tokens), skip_special_tokens=True))

    return TextLanguage(
        lambda text: inner.encode(text, add_special_tokens=False).ids, decode, (inner.token_to_id("<s>"),)
    )


@cache
def speaker(name: str) -> Language:
    form, kind = name.split("-", 1)
    return TokenLanguage(int(kind)) if form == "token" else text_language(kind)
