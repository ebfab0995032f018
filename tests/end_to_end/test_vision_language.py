"""Answers about images are those of transformers' `generate`, however they are served; another image shares nothing."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kvwise.cli.main import run as command
from kvwise.core.errors import CapacityError, UsageError
from kvwise.core.output import FinishReason
from kvwise.core.params import SamplingParams
from kvwise.engine.llm import LLM
from kvwise.engine.sequence import Phase
from kvwise.methods.retention.base import Kept, PromptView
from kvwise.methods.retention.vlcache import VLCache
from kvwise.models import processors, random
from kvwise.models.support import IMAGE, VISION_ARCHITECTURES, tiny_config
from tests.engine.plain import Answer
from tests.engine.runs import finish, greedy, prompts, require_empty, run, sequence_of

Serve = Callable[..., Any]
Array = np.ndarray[Any, Any]
Asked = tuple[list[int], list[Array]]

NUM_TOKENS = 10
CHUNKED = {"max_num_batched_tokens": 9, "max_num_seqs": 8}
UNCHUNKED = {"enable_chunked_prefill": False}
SERVED = ["llava", "qwen2_vl"]  # one of each rotation


def drawn(height: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SMALL, WIDE, TALL = drawn(20, 30), drawn(24, 72, 1), drawn(80, 32, 2)
TEXT = prompts(7, 21, 3, 33)


class Oracle:
    """A tiny vision-language model as transformers runs it."""

    def __init__(self, model_type: str) -> None:
        config = tiny_config(model_type)
        self.model: Any = random.build(config, 0, lambda num: None)
        self.model.generation_config.eos_token_id = None
        self.processor = processors.default_processor(config)

    def answer(self, expanded: list[int], images: list[Array], num_tokens: int = NUM_TOKENS) -> Answer:
        ids = torch.tensor([expanded])
        inputs: dict[str, Any] = {}
        if images:
            inputs = dict(self.processor(images=[Image.fromarray(i) for i in images], return_tensors="pt"))
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True, **inputs,
        )  # fmt: skip
        return Answer(found.sequences[0, len(expanded) :].tolist(), torch.cat(found.logits))


@pytest.fixture(scope="module")
def oracle() -> Callable[[str], Oracle]:
    return cache(Oracle)


# Prompts with a placeholder for each of their images, which differ in size; and text beside them.
MIXED: list[Asked] = [
    (TEXT[1], []),
    ([*TEXT[0], IMAGE, *TEXT[2]], [SMALL]),
    ([IMAGE, *TEXT[1]], [WIDE]),
    ([*TEXT[2], IMAGE, *TEXT[0], IMAGE, *TEXT[2]], [TALL, SMALL]),
    (TEXT[3], []),
    ([*TEXT[3], IMAGE, 9], [WIDE]),
]


def serve_all(engine: Any, asked: list[Asked], params: SamplingParams) -> list[Any]:
    names = [engine.add_request(prompt, params, images=images) for prompt, images in asked]
    done = finish(engine)
    return [done[name] for name in names]


def check(oracle: Oracle, asked: list[Asked], outputs: list[Any], num: int = NUM_TOKENS) -> None:
    for (_, images), output in zip(asked, outputs, strict=True):
        assert output.error is None
        oracle.answer(output.prompt_token_ids, images, num).require(output.token_ids)


# -- equal to transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", VISION_ARCHITECTURES)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
def test_images_and_text_in_one_batch(
    serve: Serve, oracle: Callable[[str], Oracle], model_type: str, settings: dict[str, Any]
) -> None:
    engine = serve(f"{model_type}-tiny", "full", **settings)
    outputs = serve_all(engine, MIXED, greedy(NUM_TOKENS))
    assert [o.prompt_token_ids.count(IMAGE) > 0 for o in outputs] == [bool(images) for _, images in MIXED]
    check(oracle(model_type), MIXED, outputs)
    require_empty(engine)


@pytest.mark.parametrize("model_type", SERVED)
@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
def test_a_prefix_hit_may_end_inside_an_image(
    serve: Serve, oracle: Callable[[str], Oracle], model_type: str, settings: dict[str, Any]
) -> None:
    engine = serve(f"{model_type}-tiny", "prefix", **settings)
    first = [([*TEXT[0], IMAGE], [WIDE])]
    (output,) = serve_all(engine, first, SamplingParams(max_tokens=0))
    ((start, stop),) = engine.loaded.vision.place(first[0][0], [engine.loaded.vision.read(WIDE)])[1].spans
    again = [([*TEXT[0], IMAGE, *TEXT[1]], [WIDE]), ([*TEXT[0], IMAGE, *TEXT[2], IMAGE, 9], [WIDE, TALL])]
    outputs = serve_all(engine, again, greedy(NUM_TOKENS))
    cached = [o.metrics.num_cached_tokens for o in outputs]
    assert all(start < num < stop for num in cached), (cached, start, stop)
    assert cached == [len(output.prompt_token_ids) // 16 * 16] * 2
    check(oracle(model_type), again, outputs)
    require_empty(engine)


@pytest.mark.parametrize("strategy", ["full", "prefix"])
@pytest.mark.parametrize("model_type", SERVED)
def test_after_preemption(serve: Serve, oracle: Callable[[str], Oracle], model_type: str, strategy: str) -> None:
    engine = serve(f"{model_type}-tiny", strategy, blocks=9, max_num_seqs=4)
    asked = [MIXED[1], MIXED[0], MIXED[2], MIXED[5]]
    outputs = serve_all(engine, asked, greedy(30))
    assert engine.stats().num_preemptions > 0
    check(oracle(model_type), asked, outputs, 30)
    require_empty(engine)


@pytest.mark.parametrize("model_type", SERVED)
@pytest.mark.parametrize(
    "strategy",
    ["h2o(budget=1)", "streaming(window=500)+prefix", "infinigen(alpha=1e9, budget=1, ratio=1)", "topk(budget=1)"],
)
def test_methods_that_keep_all_change_nothing(
    serve: Serve, oracle: Callable[[str], Oracle], model_type: str, strategy: str
) -> None:
    engine = serve(f"{model_type}-tiny", strategy, **CHUNKED)
    check(oracle(model_type), MIXED, serve_all(engine, MIXED, greedy(NUM_TOKENS)))


@pytest.mark.parametrize("model_type", SERVED)
def test_every_sample_is_what_it_is_alone(serve: Serve, model_type: str) -> None:
    asked = {"temperature": 1.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    found = []
    for slots in (8, 1):  # with one sequence at a time no sample can fork
        engine = serve(f"{model_type}-tiny", "prefix", max_num_seqs=slots)
        engine.add_request(MIXED[3][0], SamplingParams(n=3, **asked), images=MIXED[3][1], request_id="three")
        done = finish(engine)
        found.append([done[name].token_ids for name in ("three", "three/1", "three/2")])
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0]}) == 3


def test_a_prompt_that_ends_with_an_image(serve: Serve, oracle: Callable[[str], Oracle]) -> None:
    """The rule of positions goes on behind it: transformers' pass over all tokens says so, its cached loop does not."""
    engine, plain = serve("qwen2vl-tiny", "full", **CHUNKED), oracle("qwen2_vl")
    (output,) = serve_all(engine, [([*TEXT[3], IMAGE], [WIDE])], greedy(NUM_TOKENS))
    inputs = dict(plain.processor(images=[Image.fromarray(WIDE)], return_tensors="pt"))
    ids = torch.tensor([output.prompt_token_ids + output.token_ids])
    with torch.inference_mode():
        logits = plain.model(ids, use_cache=False, mm_token_type_ids=(ids == IMAGE).int(), **inputs).logits[0]
    assert logits[-NUM_TOKENS - 1 : -1].argmax(-1).tolist() == output.token_ids


# -- identity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SERVED)
def test_another_image_behind_the_same_tokens_shares_nothing(
    serve: Serve, oracle: Callable[[str], Oracle], model_type: str
) -> None:
    engine = serve(f"{model_type}-tiny", "prefix")
    prompt = [*TEXT[1], IMAGE, *TEXT[0]]  # one block of text before the image
    other = WIDE.copy()
    other[12:, 36:] ^= 255
    first, same, different = (
        serve_all(engine, [(prompt, [image])], greedy(NUM_TOKENS))[0] for image in (WIDE, WIDE.copy(), other)
    )
    full = len(first.prompt_token_ids) // 16 * 16
    assert first.prompt_token_ids == different.prompt_token_ids
    cached = [o.metrics.num_cached_tokens for o in (first, same, different)]
    assert cached == [0, full, 16], "text before an image is shared, what follows another image is not"
    assert same.token_ids == first.token_ids
    check(oracle(model_type), [(prompt, [other])], [different])


def test_a_hit_on_all_of_an_image_needs_no_features(serve: Serve) -> None:
    engine = serve("qwen2vl-tiny", "prefix")
    vision, image = engine.loaded.vision, drawn(33, 41, 5)
    asked = [([IMAGE, *TEXT[3]], [image])]
    before = vision.num_computed
    serve_all(engine, asked, greedy(1))
    assert vision.num_computed == before + 1
    vision._features.clear()
    vision._num_bytes = 0
    serve_all(engine, asked, greedy(1))
    assert vision.num_computed == before + 1


def test_a_prompt_with_an_image_is_purged_by_its_keys(serve: Serve) -> None:
    engine = serve("llava-tiny", "prefix")
    prompt, images = MIXED[1]
    serve_all(engine, [(prompt, images)], greedy(1))
    keys = engine.keys(prompt, images)
    assert engine.lifecycle.residence(keys).num_resident == len(keys) > 0
    assert engine.lifecycle.purge_prefix(keys).num_blocks == len(keys)
    (again,) = serve_all(engine, [(prompt, images)], greedy(1))
    assert again.metrics.num_cached_tokens == 0


def test_a_prompt_with_an_image_is_kept_warm(serve: Serve) -> None:
    engine = serve("llava-tiny", "prefix")
    prompt, images = MIXED[1]
    engine.warm(prompt, images=images, pin=True)
    finish(engine)
    (output,) = serve_all(engine, [(prompt, images)], greedy(1))
    assert output.metrics.num_cached_tokens == 16


# -- requests -------------------------------------------------------------------------------------------------------


def test_the_spans_of_images_are_known(serve: Serve) -> None:
    engine = serve("llava-tiny")
    prompt, images = MIXED[3]
    engine.add_request(prompt, greedy(1), images=images, request_id="two")
    engine.add_request(TEXT[0], greedy(1), request_id="none")
    assert sequence_of(engine, "two").image_spans == ((3, 19), (26, 42))
    assert sequence_of(engine, "none").image_spans == ()
    tokens = sequence_of(engine, "two").tokens
    assert [i for i, token in enumerate(tokens) if token == IMAGE] == [*range(3, 19), *range(26, 42)]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ([1, 2], [SMALL], "0 image placeholders .* 1 images"),
        ([1, IMAGE], [], "1 image placeholders .* 0 images"),
        ([1, IMAGE], [SMALL, SMALL], "1 image placeholders .* 2 images"),
        ([1, IMAGE], ["/nowhere.png"], "image 1 /nowhere.png: there is no such file"),
        ([1, IMAGE], "cat.png", "a list, not one str"),
        ([1, IMAGE], SMALL, "a list, not one ndarray"),
        ([400, IMAGE], [SMALL], "outside the vocabulary"),
    ],
)
def test_a_refused_request_leaves_nothing_behind(serve: Serve, prompt: list[int], images: Any, message: str) -> None:
    engine = serve("llava-tiny", "prefix")
    with pytest.raises(UsageError, match=message):
        engine.add_request(prompt, greedy(1), images=images)
    assert not engine.has_unfinished()
    require_empty(engine)
    check_text = serve_all(engine, [(TEXT[0], [])], greedy(2))
    assert check_text[0].error is None


@pytest.mark.parametrize("settings", [CHUNKED, UNCHUNKED], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("model_type", SERVED)
def test_elastic_drops_tokens_of_images_only(serve: Serve, model_type: str, settings: dict[str, Any]) -> None:
    engine = serve(f"{model_type}-tiny", "elastic(budget=0.7)", **settings)
    name = engine.add_request([*TEXT[0], IMAGE, *TEXT[1]], greedy(2, explain=True), images=[TALL])
    (span,) = sequence_of(engine, name).image_spans
    (output,) = finish(engine).values()
    text = {*range(span[0]), *range(span[1], span[1] + len(TEXT[1]))}
    assert output.attestation.tokens_merged > 0
    for layer in output.attestation.heads:
        for head in layer:
            assert len(text - set(head.kept)) <= 1  # one has made room for the token that was generated
            assert len({*range(*span)} & set(head.kept)) < span[1] - span[0]
    require_empty(engine)


@pytest.mark.parametrize("model_type", SERVED)
def test_vlcache_looks_with_the_text_behind_the_image(
    serve: Serve, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows observe as there are tokens behind it, and they are the last ones."""
    seen: list[tuple[int, ...]] = []
    keep = VLCache.keep

    def note(self: VLCache, view: PromptView) -> Kept:
        rows = view.rows(0)
        seen.append(tuple(rows.shape[2:]))
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:3]))
        return keep(self, view)

    monkeypatch.setattr(VLCache, "keep", note)
    engine = serve(f"{model_type}-tiny", "vlcache(budget=0.5)", **CHUNKED)
    name = engine.add_request([*TEXT[0], IMAGE, *TEXT[1]], greedy(6), images=[TALL])
    sequence = sequence_of(engine, name)
    (output,) = finish(engine).values()
    assert seen == [(len(TEXT[1]), sequence.num_prompt)]
    assert output.attestation.tokens_dropped > 0
    require_empty(engine)


def test_an_image_counts_towards_the_length(serve: Serve) -> None:
    engine = serve("llava-tiny", max_model_len=20)
    engine.add_request([1, 2, IMAGE], greedy(1), images=[SMALL])
    with pytest.raises(CapacityError, match="prompt of 20 tokens"):
        engine.add_request([*[1] * 4, IMAGE], greedy(1), images=[SMALL])


def test_a_text_model_refuses_images(serve: Serve) -> None:
    with pytest.raises(UsageError, match=r"1 images were given, and random:llama-tiny reads text only"):
        serve("llama-tiny").add_request([1, IMAGE], greedy(1), images=[SMALL])


def test_only_the_request_whose_image_fails_ends(
    serve: Serve, oracle: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serve("qwen2vl-tiny", "prefix", **CHUNKED)
    right, bad = type(engine.loaded.vision).features, engine.loaded.vision.read(TALL).digest

    def features(self: Any, picture: Any) -> Any:
        if picture.digest == bad:
            raise RuntimeError("out of memory")
        return right(self, picture)

    monkeypatch.setattr(type(engine.loaded.vision), "features", features)
    outputs = serve_all(engine, MIXED, greedy(NUM_TOKENS))
    failed = [o for o in outputs if o.error is not None]
    assert [(o.finish_reason, o.error) for o in failed] == [(FinishReason.ERROR, "RuntimeError: out of memory")]
    others = [(asked, o) for asked, o in zip(MIXED, outputs, strict=True) if o.error is None]
    assert len(others) == len(MIXED) - 1
    check(oracle("qwen2_vl"), [asked for asked, _ in others], [o for _, o in others])
    require_empty(engine)


def test_a_request_with_an_image_can_be_aborted_midway(serve: Serve) -> None:
    engine = serve("llava-tiny", "prefix", **CHUNKED)
    prompt, images = MIXED[3]
    engine.add_request(prompt, greedy(5), images=images, request_id="gone")
    engine.step()
    assert sequence_of(engine, "gone").phase is Phase.PREFILL
    engine.abort("gone")
    assert finish(engine)["gone"].finish_reason is FinishReason.ABORT
    require_empty(engine)


def test_text_only_requests_work_with_text_methods(serve: Serve) -> None:
    engine = serve("qwen2vl-tiny", "snapkv(budget=0.5)+prefix")
    assert all(o.error is None for o in run(engine, TEXT, greedy(5)))


# -- the faces ------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(load: Callable[[str], Any]) -> Iterator[LLM]:
    with LLM(load("llava-tiny"), kv_cache_memory_bytes=1 << 22) as made:
        yield made


def test_images_belong_to_their_prompts(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.fromarray(WIDE).save(path)
    params = SamplingParams(max_tokens=6)
    both = llm.generate(["see <image>", "no picture"], params, images=[[path], []])
    path.unlink()
    assert [o.prompt_token_ids.count(IMAGE) for o in both] == [16, 0]
    (one,) = llm.generate("see <image>", params, images=[Image.fromarray(WIDE)])
    (front,) = llm.generate("see", params, images=[WIDE, TALL])
    (ids,) = llm.generate(llm.engine.loaded.tokenizer.encode("see <image>"), params, images=[WIDE])
    assert both[0].token_ids == one.token_ids == ids.token_ids
    assert front.prompt_token_ids[1:33] == [IMAGE] * 32 or front.prompt_token_ids[:32] == [IMAGE] * 32
    assert list(llm.stream("see <image>", params, images=[WIDE]))[-1].token_ids == one.token_ids


def test_images_that_do_not_belong_to_prompts_are_refused(llm: LLM) -> None:
    for images, message in [([[SMALL]], "1 lists of images for 2 prompts"), ([SMALL, []], "a list, not one ndarray")]:
        with pytest.raises(UsageError, match=message):
            llm.generate(["a <image>", "b"], images=images)
    assert not llm.engine.has_unfinished()


def test_images_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, (SMALL, WIDE), strict=True):
        Image.fromarray(image).save(path)
    arguments = ["generate", "--model", "random:llava-tiny", "--max-tokens", "4", "--json"]
    shown = [part for path in paths for part in ("--image", str(path))]
    two = ["--prompt", "what?", "--prompt", "<image> and <image>?"]
    assert command([*arguments, *shown, *two]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["prompt_token_ids"].count(IMAGE) for one in answers] == [32, 32]
    with LLM("random:llava-tiny", kv_cache_memory_bytes=1 << 22) as llm:
        (same,) = llm.generate("what?", SamplingParams(max_tokens=4), images=[SMALL, WIDE])
    assert answers[0]["token_ids"] == same.token_ids


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "random:llama-tiny", "--image", "{image}"], "reads text only"),
        (["--model", "random:llava-tiny", "--image", "{folder}/none.png"], "there is no such file"),
        (["--model", "random:llava-tiny", "--image", "{image}", "--prompt", "<image><image>"], "2 image placeholders"),
        (["--model", "random:llava-tiny", "--image", "{image}", "--prompt-cache", "{folder}/c"], "prompts of text"),
    ],
)
def test_bad_images_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    Image.fromarray(SMALL).save(tmp_path / "a.png")
    filled = [part.format(image=tmp_path / "a.png", folder=tmp_path) for part in more]
    prompt = [] if "--prompt" in filled else ["--prompt", "hi"]
    assert command(["generate", *filled, *prompt]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
