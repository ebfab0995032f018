"""The real bench: models, engines, and transformers' own generation beside them."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

from kvwise.core.clock import Clock, MonotonicClock
from kvwise.core.config import EngineConfig
from kvwise.core.errors import PlanError, RequestError, TaskError
from kvwise.core.method import Axis
from kvwise.core.output import RequestOutput
from kvwise.core.params import SamplingParams
from kvwise.core.sizes import parse_bytes
from kvwise.core.strategy import Strategy
from kvwise.core.tiering import KINDS, TierSpec
from kvwise.engine.engine import Engine
from kvwise.engine.hierarchy.build import link_names
from kvwise.engine.placement.choose import LINKS
from kvwise.engine.sizing import kv_dtype
from kvwise.methods.catalogue import catalogue, parse
from kvwise.models.builtin import BUILTIN, builtin_folders
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.models.quiet import quiet
from kvwise.models.random import RANDOM_MODELS, build
from kvwise.models.text import HuggingFaceTokenizer
from kvwise.study.face import EngineFace, LoaderFace, LoaderSetup, ModelFacts, OnOffRun
from kvwise.study.loader import Loader
from kvwise.study.placement import NOWHERE, Placement, link_table, tier_spec
from kvwise.study.plan import Plan, link_speeds
from kvwise.tasks.language import Language
from kvwise.tasks.text_language import TextLanguage
from kvwise.tasks.token_language import TokenLanguage

_log = logging.getLogger(__name__)

ANY_TIERS = [TierSpec(kind, 1, where="" if kind in ("host", "memory") else "there") for kind in KINDS]
HELD_SHARE = 0.25  # of the machine's memory: models loaded before are kept while they fit in it


def num_threads() -> int:
    """Threads that torch computes with."""
    return torch.get_num_threads()


class Workbench:
    """Models and engines for one plan. Loaded models stay loaded while there is room for them.

    Disk tiers that do not say where they lie, lie in folders of their own inside `scratch` (made when the first is
    needed; None: the system's folder for temporary files), and are removed with their engines.
    """

    def __init__(self, plan: Plan, scratch: Path | None = None) -> None:
        unknown = sorted(set(plan.links) - {*LINKS, *link_names(ANY_TIERS)})
        if unknown:
            known = ", ".join(dict.fromkeys([*LINKS, *link_names(ANY_TIERS)]))
            raise PlanError(f"links: no link is called {unknown[0]!r}; links: {known}")
        self._scratch = scratch
        self._methods = catalogue().reading(*plan.methods)
        self.clock: Clock = MonotonicClock()
        self._plan = plan
        self._held: dict[str, LoadedModel] = {}
        self._plain: dict[str, Any] = {}
        self._languages: dict[str, Language | None] = {}
        self._process = psutil.Process(os.getpid())
        if plan.threads is not None:
            torch.set_num_threads(plan.threads)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(max(0.0, seconds))

    def resident_bytes(self) -> int:
        """Memory of this process that is in RAM."""
        return int(self._process.memory_info().rss)

    def check_strategy(self, text: str) -> None:
        """StrategyError if `text` is no strategy."""
        parse(text, self._methods)

    def check_placement(self, text: str, placement: Placement) -> None:
        """PlanError if strategy `text` cannot be run there: a method that loads without tiers, a link that is none."""
        method = parse(text, self._methods).loading
        if not method.default and not placement.tiers:
            raise PlanError(f'strategy {text!r}: {method.name} loads from tiers; add `tiers = [["host(size=256MiB)"]]`')
        specs = [tier_spec(tier, Path("folder")) for tier in placement.tiers]
        known = list(dict.fromkeys([*LINKS, *link_names(specs)]))
        unknown = sorted({name for name, _ in placement.links} - set(known))
        if unknown:
            raise PlanError(f"links: no link is called {unknown[0]!r} with these tiers; links: {', '.join(known)}")

    def idle_methods(
        self, text: str, did: Mapping[str, int], tokens_reused: int, num_loads: int = 0, heads_shared: int = 0
    ) -> tuple[str, ...]:
        """The methods that strategy `text` names and that, by these attested counts, did nothing.

        A loading method that decided about `num_loads` requests did its work, also if it decided to compute; an
        encoding did by which `heads_shared` heads store nothing, since their layers read another's KV.
        """
        excused = {Axis.REUSE: tokens_reused, Axis.LOADING: num_loads, Axis.ENCODING: heads_shared}
        named = (method for method in parse(text, self._methods).methods() if not method.default)
        return tuple(m.name for m in named if not did.get(m.name) and not excused.get(m.axis))

    def facts(self, model: str) -> ModelFacts:
        """Load a model (once) and say what it is."""
        loaded = self._load(model)
        return ModelFacts(
            name=model,
            vocab_size=loaded.vocab_size,
            max_model_len=loaded.max_model_len,
            kv_token_bytes=_token_bytes(loaded, self._config(None)),
            weight_bytes=loaded.weight_bytes,
            num_parameters=loaded.num_parameters,
            num_heads=loaded.num_layers * loaded.num_kv_heads,
            language=self._language(loaded),
            tokenizer=_reader(loaded),
        )

    def _language(self, loaded: LoadedModel) -> Language | None:
        """What a model can be asked in: the token language, English, or nothing. Made once: it keeps what it drew."""
        if loaded.name not in self._languages:
            self._languages[loaded.name] = _language_of(loaded)
        return self._languages[loaded.name]

    def engine(self, model: str, strategy: str, memory_bytes: int | None, placement: Placement = NOWHERE) -> EngineFace:
        """A fresh engine; `memory_bytes` is the size of its KV pool, None for its default.

        A strategy that loads nothing has no tiers, and only the links that it has.
        """
        parsed = parse(strategy, self._methods)
        folder = self._folder(placement.tiers)
        tiers = () if parsed.loading.default else tuple(tier_spec(tier, folder) for tier in placement.tiers)
        speeds = link_speeds(self._plan) | link_table(placement.links)
        known = {*LINKS, *link_names(tiers)}
        config = replace(
            self._config(memory_bytes),
            tiers=tiers,
            links={name: speed for name, speed in speeds.items() if name in known},
            ttl_s=placement.ttl_s,
            idle_ttl_s=placement.idle_ttl_s,
        )
        return _StudyEngine(self._load(model), parsed, config, self.clock, folder)

    def loader(self, setup: LoaderSetup) -> LoaderFace:
        """A fresh engine that loads."""
        loaded, folder = self._load(setup.model), self._folder((setup.tier,))
        token_bytes = _token_bytes(loaded, EngineConfig())
        return _StudyLoader(setup, loaded, parse(setup.strategy, self._methods), self.clock, token_bytes, folder)

    def _folder(self, tiers: Sequence[str]) -> Path:
        """A new folder, if one of the tiers may need it; it goes with the engine."""
        if not any(tier.startswith("disk") for tier in tiers):
            return Path()
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="kv-", dir=self._scratch))

    def generate(self, model: str, side: str, prompt: Sequence[int], output_tokens: int) -> OnOffRun:
        """Generate greedily with the KV cache off ("hf-off") or on ("hf-on", "kvwise"), timed."""
        if side == "kvwise":
            return self._generate_paged(model, prompt, output_tokens)
        return self._generate_plain(model, side == "hf-on", prompt, output_tokens)

    def _config(self, memory_bytes: int | None) -> EngineConfig:
        given = self._plan.engine.model_dump(exclude={"kv_offloading"})
        offloading = self._plan.engine.kv_offloading
        links = {name: speed for name, speed in link_speeds(self._plan).items() if name in LINKS}
        return EngineConfig(
            **given,
            kv_cache_memory_bytes=memory_bytes,
            kv_offloading_bytes=None if offloading is None else parse_bytes(offloading),
            links=links,
        )

    def _load(self, model: str) -> LoadedModel:
        if model not in self._held:
            loaded = load_model(model, dtype=self._plan.dtype, device=self._plan.engine.device, seed=self._plan.seed)
            room = psutil.virtual_memory().total * HELD_SHARE - loaded.weight_bytes
            while self._held and sum(held.weight_bytes for held in self._held.values()) > room:
                del self._held[next(iter(self._held))]
            self._held[model] = loaded
        return self._held[model]

    def _generate_paged(self, model: str, prompt: Sequence[int], output_tokens: int) -> OnOffRun:
        engine = self.engine(model, "full", None)
        try:
            params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
            start = self.clock.now()
            engine.add_request(prompt, params, arrival=start)
            outputs: list[RequestOutput] = []
            while engine.has_unfinished():
                outputs = engine.step() or outputs
            total = self.clock.now() - start
            last = outputs[-1]
            if last.error is not None:
                raise RequestError(last.error)
            first = last.metrics.token_times[0] - start
            return OnOffRun("kvwise", output_tokens, first, total, tuple(last.token_ids))
        finally:
            engine.close()

    def _generate_plain(self, model: str, cached: bool, prompt: Sequence[int], output_tokens: int) -> OnOffRun:
        plain = self._plain_model(model)
        ids = torch.tensor([list(prompt)])
        stamp = _FirstToken(self.clock)
        start = self.clock.now()
        with torch.inference_mode():
            out = plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                use_cache=cached,
                max_new_tokens=output_tokens,
                streamer=stamp,
            )
        total = self.clock.now() - start
        tokens = tuple(int(t) for t in out[0, ids.shape[1] :])
        return OnOffRun("hf-on" if cached else "hf-off", output_tokens, stamp.first - start, total, tokens)

    def _plain_model(self, model: str) -> Any:
        """The model as transformers runs it, without kvwise's attention."""
        if model not in self._plain:
            auto: Any = AutoModelForCausalLM
            name = model.removeprefix("random:")
            with quiet():
                if name in RANDOM_MODELS:
                    # Its twin under kvwise's attention is loaded by now, so the size was judged there.
                    plain = build(RANDOM_MODELS[name](), self._plan.seed, check_size=lambda _: None)
                else:
                    folder = builtin_folders()[model.removeprefix(BUILTIN)] if model.startswith(BUILTIN) else model
                    plain = auto.from_pretrained(folder, dtype=torch.float32).eval()
            # Timed runs have a given length: no token ends them, as with ignore_eos on our side.
            plain.generation_config.eos_token_id = None
            self._plain = {model: plain}
        return self._plain[model]


class _StudyEngine(Engine):
    """An engine whose folder goes with it."""

    def __init__(
        self, loaded: LoadedModel, strategy: Strategy, config: EngineConfig, clock: Clock, folder: Path
    ) -> None:
        super().__init__(loaded, strategy, config, clock)
        self._folder = folder

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block's KV."""
        return self.memory.layout.block_bytes

    @property
    def num_heads(self) -> int:
        """Layers that store KV, times KV heads."""
        return self.memory.layout.num_layers * self.memory.layout.num_kv_heads

    def close(self) -> None:
        """Close the engine, then remove what its disk tier left."""
        super().close()
        _remove(self._folder)


class _StudyLoader(Loader):
    """A loader whose folder goes with it."""

    def __init__(
        self, setup: LoaderSetup, loaded: LoadedModel, strategy: Strategy, clock: Clock, token_bytes: int, folder: Path
    ) -> None:
        super().__init__(setup, loaded, strategy, clock, token_bytes, folder)
        self._folder = folder

    def close(self) -> None:
        """Close the engine, then remove what its disk tier left."""
        super().close()
        _remove(self._folder)


def _remove(folder: Path) -> None:
    if folder != Path():
        shutil.rmtree(folder, ignore_errors=True)


def _token_bytes(loaded: LoadedModel, config: EngineConfig) -> int:
    """KV of one token, all layers and heads."""
    return 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * kv_dtype(loaded, config).itemsize


def _reader(loaded: LoadedModel) -> HuggingFaceTokenizer | None:
    """The tokenizer of a model that reads text; bytes fed to random weights are none."""
    tokenizer = loaded.tokenizer
    return tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) and not loaded.speaks_tokens else None


def _language_of(loaded: LoadedModel) -> Language | None:
    if loaded.speaks_tokens:
        return TokenLanguage(loaded.vocab_size)
    tokenizer = _reader(loaded)
    if tokenizer is None:
        return None
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    try:
        return TextLanguage(partial(tokenizer.encode, add_special=False), tokenizer.decode, begin)
    except TaskError as error:
        _log.warning("%s is asked no tasks, only for agreement with the full cache: %s", loaded.name, error)
        return None


class _FirstToken:
    """A streamer that only notes when the first new token came."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._calls = 0
        self.first = 0.0

    def put(self, value: object) -> None:
        """Called with the prompt, then with each token."""
        self._calls += 1
        if self._calls == 2:
            self.first = self._clock.now()

    def end(self) -> None:
        """Called at the end."""
