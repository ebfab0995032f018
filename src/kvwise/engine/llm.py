"""LLM: the offline face. Prompts in, outputs out."""

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvwise.core.config import EngineConfig
from kvwise.core.errors import UsageError
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.strategy import Strategy
from kvwise.core.tiering import parse_tier
from kvwise.engine.engine import Engine
from kvwise.engine.lifecycle import Owner
from kvwise.engine.prompt_cache import LoadedPrompt, SavedPrompt, load_prompt_cache, save_prompt_cache
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel

Prompt = str | Sequence[int]


class LLM:
    """A model under a strategy.

    `model` is a folder, a hub id, a `random:` name or a loaded model; `settings` are the fields of EngineConfig;
    tiers may be given as text, such as `tiers=["host(size=4GiB)"]`.

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
        tiers = [parse_tier(tier) if isinstance(tier, str) else tier for tier in settings.pop("tiers", ())]
        config = EngineConfig(**settings, tiers=tiers)
        chosen = parse(strategy) if isinstance(strategy, str) else strategy
        loaded = load_model(model, dtype=dtype, device=config.device) if isinstance(model, str) else model
        self.engine = Engine(loaded, chosen, config)
        self._boxes: dict[str, deque[RequestOutput]] = {}  # where the outputs of each caller's requests wait

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        salt: str = "",
        session: str = "",
    ) -> list[RequestOutput]:
        """Answer all prompts (text or token ids), batched; outputs in the order of prompts, then of samples.

        `salt` names the tenant whose prompts may share KV, `session` who stores it (see `Engine.add_request`).
        """
        many = _as_list(prompts)
        each = _each(params, len(many))
        ids: list[str] = []
        try:
            for prompt, one in zip(many, each, strict=True):
                ids.append(self.engine.add_request(self._tokens(prompt), one, salt=salt, session=session))
            outputs = self._outputs(ids, sum(one.n for one in each))
            finished = {(o.request_id, o.index): o for o in outputs if o.finished}
        finally:
            self._abort(ids)
        return [finished[name, i] for name, one in zip(ids, each, strict=True) for i in range(one.n)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, salt: str = "", session: str = ""
    ) -> Iterator[RequestOutput]:
        """Answer one prompt token by token. Closing the iterator aborts the request; several may run side by side."""
        chosen = params or SamplingParams()
        request_id = self.engine.add_request(self._tokens(prompt), chosen, salt=salt, session=session)
        try:
            yield from self._outputs([request_id], chosen.n)
        finally:
            self._abort([request_id])

    def save_prompt_cache(self, prompt: Prompt, path: str | Path, *, salt: str = "") -> SavedPrompt:
        """Write the KV of a prompt's full blocks to a file; it is computed first, as far as it is not resident."""
        tokens = self._tokens(prompt)
        owner = Owner(salt)
        keys = self.engine.lifecycle.keys(tokens, owner)
        if self.engine.lifecycle.residence(keys).num_resident < len(keys):
            self.generate([tokens], SamplingParams(max_tokens=0), salt=salt)
        return save_prompt_cache(self.engine, path, prompt=tokens, owner=owner)

    def load_prompt_cache(self, path: str | Path, *, salt: str = "", session: str = "") -> LoadedPrompt:
        """Bring the KV of a file back. UsageError, and nothing loaded, for one that is damaged or does not belong."""
        return load_prompt_cache(self.engine, path, owner=Owner(salt, session))

    def _outputs(self, request_ids: list[str], num_ends: int) -> Iterator[RequestOutput]:
        """Outputs of these requests until `num_ends` samples have ended; what steps tell of others goes to theirs."""
        box: deque[RequestOutput] = deque()
        self._boxes.update(dict.fromkeys(request_ids, box))
        while num_ends:
            while not box:
                self._deliver(self.engine.step())
            output = box.popleft()
            num_ends -= output.finished
            yield output

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._boxes:
                self._boxes[output.request_id].append(output)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._boxes.pop(request_id, None)
            self.engine.abort(request_id)
        self._deliver(self.engine.collect())

    def _tokens(self, prompt: Prompt) -> Sequence[int]:
        return self.engine.loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

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
