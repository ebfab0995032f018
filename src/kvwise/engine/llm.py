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
from kvwise.engine.seeing import require_list
from kvwise.methods.catalogue import parse
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel

Prompt = str | Sequence[int]
Images = Sequence[Any]  # of one prompt: paths, PIL images, uint8 arrays


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
        images: Sequence[Any] | None = None,
        salt: str = "",
        session: str = "",
    ) -> list[RequestOutput]:
        """Answer all prompts (text or token ids), batched; outputs in the order of prompts, then of samples.

        `images` has one list of images for each prompt; for a single prompt that is no list, its own images. A text
        that names no place for them gets them in front. `salt` names the tenant whose prompts may share KV, `session`
        who stores it (see `Engine.add_request`).
        """
        many = _as_list(prompts)
        each = _each(params, len(many))
        seen = _images(images, len(many), alone=_is_one(prompts))
        ids: list[str] = []
        try:
            for prompt, one, shown in zip(many, each, seen, strict=True):
                tokens = self._tokens(prompt, shown)
                ids.append(self.engine.add_request(tokens, one, images=shown, salt=salt, session=session))
            outputs = self._outputs(ids, sum(one.n for one in each))
            finished = {(o.request_id, o.index): o for o in outputs if o.finished}
        finally:
            self._abort(ids)
        return [finished[name, i] for name, one in zip(ids, each, strict=True) for i in range(one.n)]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, images: Images = (), salt: str = "",
        session: str = "",
    ) -> Iterator[RequestOutput]:  # fmt: skip
        """Answer one prompt, with its images, token by token.

        Closing the iterator aborts the request; several may run side by side.
        """
        chosen = params or SamplingParams()
        tokens = self._tokens(prompt, images)
        request_id = self.engine.add_request(tokens, chosen, images=images, salt=salt, session=session)
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

    def _tokens(self, prompt: Prompt, images: Images = ()) -> Sequence[int]:
        require_list(images)
        loaded = self.engine.loaded
        if not isinstance(prompt, str):
            return prompt
        return loaded.tokenizer.encode(prompt if loaded.vision is None else loaded.vision.marked(prompt, len(images)))

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    return [prompts] if _is_one(prompts) else list(prompts)  # type: ignore[list-item, arg-type]


def _images(images: Sequence[Any] | None, count: int, *, alone: bool) -> list[Images]:
    """The images of each of `count` prompts; `alone`: they are those of the only one."""
    if images is None:
        return [()] * count
    if alone:
        return [images]
    if len(images) != count:
        raise UsageError(f"{len(images)} lists of images for {count} prompts: give one for each, empty or not")
    return list(images)


def _each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise UsageError(f"{len(params)} sampling params for {count} prompts: give one, or one for each")
    return list(params)
