"""Fields of a request as parameters of the sampler."""

from kvwise.core.errors import CapacityError, UsageError
from kvwise.core.params import SamplingParams
from kvwise.server.api.schema import GenerationRequest
from kvwise.server.errors import ApiError

COMPLETION_TOKENS = 16  # of a completion that does not say how many, as OpenAI's


def sampling_params(
    body: GenerationRequest, *, max_tokens: int, logprobs: int | None, vocab_size: int
) -> SamplingParams:
    """What `body` asks of the sampler; ApiError 400 for token ids that the vocabulary does not have."""
    for param, ids in (("logit_bias", body.logit_bias or {}), ("stop_token_ids", body.stop_token_ids or [])):
        if (strange := next((token for token in ids if token >= vocab_size), None)) is not None:
            raise ApiError(400, f"{param}: token id {strange} is not in the vocabulary of {vocab_size}", param=param)
    try:
        return SamplingParams(
            n=body.n or 1,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(0, body.top_k or 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            seed=body.seed,
            stop=tuple(body.stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            logit_bias=body.logit_bias or {},
        )
    except UsageError as error:  # fields that do not go together: the message begins with the field's name
        raise ApiError(400, str(error), param=str(error).partition("=")[0]) from None


def output_limit(asked: int | None, *, default: int | None, num_prompt: int, most: int, param: str) -> int:
    """`max_tokens` of a prompt of `num_prompt` tokens where prompt and output come to `most` at most.

    If nothing was asked for: `default`, or all that is left. ApiError 400 if there is not so much room.
    """
    left = most - num_prompt
    if left < (asked or 1):
        wanted = "" if asked is None else f", and max_tokens={asked} on top of them"
        raise ApiError(  # begins as OpenAI's does: clients know the error by these words
            400, f"This model's maximum context length is {most} tokens, prompt and output together; {param} comes to "
            f"{num_prompt}{wanted}: shorten it, or lower max_tokens", param=param, code="context_length_exceeded",
        )  # fmt: skip
    return asked if asked is not None else left if default is None else min(default, left)


def refused_for_length(error: CapacityError, param: str) -> ApiError:
    """The answer to a request that is larger than the model or the memory."""
    return ApiError(400, str(error), param=param, code="context_length_exceeded")
