"""What an answer tells of its tokens: OpenAI's `usage`, and what the methods did to a sample's KV."""

from collections.abc import Sequence
from typing import Any

from kvwise.core.output import Attestation
from kvwise.engine.stream import News, Stream


def cached_tokens(end: News) -> int:
    """Tokens of the prompt that were found, on the device or below it; `end` is of the first sample of a prompt."""
    return 0 if end.metrics is None else min(end.metrics.num_prompt_tokens, end.metrics.num_cached_tokens)


def usage(streams: Sequence[Stream], firsts: Sequence[News]) -> dict[str, Any]:
    """`usage` of a request: `streams` are its prompts, `firsts` how the first sample of each has ended."""
    prompt, output = sum(one.num_prompt for one in streams), sum(one.num_tokens for one in streams)
    cached = [cached_tokens(end) for end in firsts]
    keyed = [0 if end.metrics is None else end.metrics.num_keyed_tokens for end in firsts]
    written = sum(max(0, all_keyed - found) for all_keyed, found in zip(keyed, cached, strict=True))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(cached), "cache_write_tokens": written},
    }


def attested(done: Attestation, places: int) -> dict[str, Any]:
    """What the methods did to a sample. A token is kept or dropped in each of `places` layers and heads.

    Why a prefix was not found is not told: that could be somebody else's secret.
    """
    return {
        "strategy": done.strategy,
        "layers_and_heads": places,
        "tokens_seen": done.tokens_seen,
        "tokens_computed": done.tokens_computed,
        "tokens_reused": done.tokens_reused,
        "tokens_loaded": done.tokens_loaded,
        "tokens_kept": max(0, done.tokens_seen * places - done.tokens_dropped - done.tokens_merged),
        "tokens_dropped": done.tokens_dropped,
        "tokens_merged": done.tokens_merged,
        "tokens_demoted": done.tokens_demoted,
        "tokens_recalled": done.tokens_fetched,
        "bits_per_element": done.bits_per_element,
        "bytes_freed": done.bytes_freed,
        "methods": dict(done.did),
    }
