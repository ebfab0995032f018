"""LLM: the offline face. Prompts in, outputs out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvwise.core.config import EngineConfig
from kvwise.core.errors import UsageError
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import Strategy
from kvwise.engine.engine import Engine
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel

Prompt = str | Sequence[int]


class LLM:
    """A model under a strategy.

    `model` is a folder, a hub id, a `random:` name or a loaded model; `settings` are the fields of EngineConfig.

        llm = LLM("random:13m", strategy="h2o(budget=0.2)")
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.text)
    """

    def __init__(
        self,
        model: str | LoadedModel,
        strategy: str | Strategy = "full+prefix",
        *,
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        config = EngineConfig(**settings)
        chosen = parse(strategy) if isinstance(strategy, str) else strategy
        loaded = load_model(model, dtype=dtype, device=config.device) if isinstance(model, str) else model
        self.engine = Engine(loaded, chosen, config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts (text or token ids), batched; outputs in the order of prompts, then of samples."""
        many = _as_list(prompts)
        each = _each(params, len(many))
        finished: Mapping[tuple[str, int], RequestOutput] = {}
        ids = []
        try:
            for prompt, one in zip(many, each, strict=True):
                ids.append(self.engine.add_request(self._tokens(prompt), one))
            finished = {(o.request_id, o.index): o for o in self._run() if o.finished}
        except BaseException:
            for request_id in ids:
                self.engine.abort(request_id)
            self.engine.collect()
            raise
        return [finished[name, i] for name, one in zip(ids, each, strict=True) for i in range(one.n)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answer one prompt token by token. Closing the iterator aborts the request."""
        request_id = self.engine.add_request(self._tokens(prompt), params or SamplingParams())
        try:
            for output in self._run():
                if output.request_id == request_id:
                    yield output
        finally:
            self.engine.abort(request_id)

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        return self.engine.loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _run(self) -> Iterator[RequestOutput]:
        while self.engine.has_unfinished():
            yield from self.engine.step()

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and all(isinstance(p, int) for p in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError(f"{len(params)} sampling params for {count} prompts: give one, or one for each")
    return list(params)
