"""How the benchmarks compare a prediction with a reference: their definitions, quirks included, as functions of text.

The quirks are kept because a score that differs from the published definition compares with nothing.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from kvwise.core.errors import TaskError

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NOT_A_WORD = re.compile(r"[^a-z0-9]+")
# First and last character of each run of Chinese punctuation and full-width signs.
CHINESE_SIGNS = "！－／／：＠［｀｛､、〃》】〔〟〰〰〾〿–—‘’‛‟…‧﹏﹏"
SIGNS = frozenset(string.punctuation)
ALL_SIGNS = SIGNS | {
    chr(code)
    for first, last in zip(CHINESE_SIGNS[::2], CHINESE_SIGNS[1::2], strict=True)
    for code in range(ord(first), ord(last) + 1)
}


def english_words(text: str) -> list[str]:
    """Words without case, punctuation and articles (SQuAD's normalisation, arXiv 1606.05250)."""
    bare = "".join(sign for sign in text.lower() if sign not in SIGNS)
    return ARTICLES.sub(" ", bare).split()


def bare_chinese(text: str) -> str:
    """`text` without case, punctuation and white space."""
    return "".join("".join(sign for sign in text.lower() if sign not in ALL_SIGNS).split())


def chinese_words(text: str) -> list[str]:
    """Chinese text cut into words; TaskError if the package that does it is not installed."""
    try:
        import rjieba
    except ImportError:
        raise TaskError(
            "records in Chinese are scored by words, which the package rjieba finds: pip install 'kvwise[records]'"
        ) from None
    return list(rjieba.cut(text))


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words (or characters), each as often as it occurs."""
    same = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * same / (len(prediction) + len(reference)) if same else 0.0


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L over summaries as the package `rouge` 1.0.1 computes it, which LongBench uses.

    Sentences end at full stops; what is counted are *different* words: those of the longest common subsequences of
    all pairs of sentences, against those of either text. A sentence of white space has one empty word.
    """
    said, right = _sentences(prediction), _sentences(reference)
    if not said or not right:
        return 0.0
    common = {mine[i] for mine in said for theirs in right for i, _ in common_subsequence(mine, theirs)}
    precision = len(common) / len({word for sentence in said for word in sentence})
    recall = len(common) / len({word for sentence in right for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_lsum(prediction: str, reference: str) -> float:
    """ROUGE-Lsum as the package `rouge_score` computes it without stemming, which SCBench uses (Lin 2004, section 3.2).

    Sentences end at line breaks. Of each reference sentence the words in the union of its longest common
    subsequences with all predicted sentences count, no word more often than it occurs in either text.
    """
    said, right = _lines(prediction), _lines(reference)
    num_said, num_right = sum(map(len, said)), sum(map(len, right))
    if not num_said or not num_right:
        return 0.0
    left = Counter(word for line in said for word in line) & Counter(word for line in right for word in line)
    hits = 0
    for line in right:
        for i in sorted({i for mine in said for i, _ in common_subsequence(line, mine)}):
            hits += left[line[i]] > 0
            left[line[i]] -= 1
    return 2 * hits / (num_said + num_right)


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Places in `first` and `second` of a longest common subsequence, found from the end.

    Where several are longest, the last word of `first` is given up before that of `second`.
    """
    table = [[0] * (len(second) + 1)]
    for word in first:
        above = table[-1]
        row = [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    i, j, found = len(first), len(second), []
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            found.append((i, j))
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found[::-1]


def edit_similarity(first: str, second: str) -> float:
    """Share of matching characters (`difflib`'s ratio) in whole per cent, as `fuzzywuzzy` gives it."""
    return round(100 * SequenceMatcher(None, first, second).ratio()) / 100


def bleu(prediction: str, reference: str) -> float:
    """BLEU-4 of words with smoothing 4 of Chen & Cherry (2014), as `nltk` computes it."""
    said, right = prediction.split() or [""], reference.split() or [""]
    logs, misses = 0.0, 0
    for n in range(1, 5):
        mine, theirs = _grams(said, n), _grams(right, n)
        hits = float(sum((mine & theirs).values()))
        if not hits:
            if n == 1 or len(said) == 1:
                return 0.0
            misses += 1
            hits = math.log(len(said)) / (5 * 2**misses)
        logs += math.log(hits / max(1, sum(mine.values()))) / 4
    return math.exp(logs + min(0.0, 1 - len(right) / len(said)))


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _lines(text: str) -> list[list[str]]:
    return [NOT_A_WORD.sub(" ", line.lower()).split() for line in text.split("\n")]
