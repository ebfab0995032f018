"""A tokenizer that spells the token language, so that plain `transformers` and people can read it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvwise.tasks.token_language import BOS, FIRST_FILLER, FIRST_KEY, FIRST_WORD, NUM_FILLER, TokenLanguage

MARKERS = ("BOS", "KEY", "QUERY", "LINK", "TRACE", "COUNT", "PASSAGE", "CONTINUE")


def token_words(language: TokenLanguage) -> list[str]:
    """The word of every id: markers, f filler, w words to count, k keys, v values; u ids that nothing uses."""
    names = [*MARKERS, *(f"u{i}" for i in range(FIRST_FILLER - len(MARKERS)))]
    names += [f"f{i}" for i in range(NUM_FILLER)]
    names += [f"w{i}" for i in range(FIRST_KEY - FIRST_WORD)]
    names += [f"{kind}{i}" for kind in "kv" for i in range(language.num_symbols)]
    return [*names, *(f"u{i}" for i in range(len(names), language.vocab_size))]


def write_tokenizer(folder: Path, language: TokenLanguage) -> None:
    """Write `tokenizer.json` and what belongs to it. Words stand between blanks; BOS is put before a text."""
    words = token_words(language)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    begin = words[BOS]
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, BOS)])
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, bos_token=begin).save_pretrained(folder)
