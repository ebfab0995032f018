"""Images are read into one kind, named by what the model sees, counted, placed, and turned into features once."""

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from kvwise.core.errors import UnsupportedModel, UsageError
from kvwise.models import images, processors
from kvwise.models.images import read_image
from kvwise.models.load import load_model
from kvwise.models.loaded import LoadedModel
from kvwise.models.support import VISION_ARCHITECTURES, tiny_config
from kvwise.models.text import MarkedByteTokenizer
from kvwise.models.vision import Placed, Vision

Plain = Callable[[str], PreTrainedModel]
Load = Callable[[str], LoadedModel]
QWEN = ["qwen2_vl", "qwen2_5_vl"]


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def vision_of(load: Load, model_type: str = "llava") -> Vision:
    vision = load(f"{model_type}-tiny").vision
    assert vision is not None
    return vision


# -- reading --------------------------------------------------------------------------------------------------------


def test_a_path_a_pil_image_and_an_array_are_the_same_picture(load: Load, tmp_path: Path) -> None:
    array, vision = drawn(31, 44), vision_of(load, "qwen2_vl")
    Image.fromarray(array).save(tmp_path / "a.png")
    with_alpha = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    sources = [array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png"), with_alpha]
    assert len({vision.read(source).digest for source in sources}) == 1
    assert vision.read(drawn(31, 44, 1)).digest != vision.read(array).digest


def test_grey_images_become_rgb() -> None:
    grey = drawn(5, 7)[:, :, 0]
    for source in (grey, grey[:, :, None], Image.fromarray(grey)):
        read = read_image(source)
        assert (read.mode, read.size) == ("RGB", (7, 5))


def test_the_note_of_which_side_is_up_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(drawn(4, 9)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 9)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(("width", "height"), [(7072, 7072), (10_000, 10_000), (60_000, 60_000)])
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(width, height) + b"\0\0\0\0IDAT")
    with pytest.raises(UsageError, match="scale it down"):
        read_image(path)


def test_the_largest_image_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert read_image(drawn(3, 4)).size == (4, 3)
    with pytest.raises(UsageError, match="13 x 1 = 13 pixels, more than 12"):
        read_image(drawn(1, 13))


@pytest.mark.parametrize("content", [b"", b"no image", png_header(4, 4), png_header(4, 4) + b"\0\0\0\1IDATx1234"])
def test_a_bad_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.png"):
        read_image(path, "image 1")


def test_a_cut_file_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(drawn(40, 40)).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UsageError, match="cannot be"):
        read_image(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Path("/nowhere.png"), "no such file"),
        ("https://example.com/cat.png", "no such file"),
        (np.zeros((0, 4, 3), np.uint8), "nothing to see"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"\[4\]"),
        (b"bytes", "is a bytes"),
    ],
)
def test_what_is_no_image_is_refused(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_image(source)


def test_an_image_the_processor_refuses_is_the_callers_mistake(load: Load) -> None:
    with pytest.raises(UsageError, match=r"image 3 of 1000 x 2 pixels.*aspect ratio"):
        vision_of(load, "qwen2_vl").read(drawn(2, 1000), "image 3")


# -- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", VISION_ARCHITECTURES)
def test_features_are_those_of_transformers(load: Load, plain: Plain, model_type: str) -> None:
    vision, model = vision_of(load, model_type), plain(model_type)
    for size in [(20, 30), (64, 40), (30, 90)]:
        picture = vision.read(drawn(*size))
        processor = processors.default_processor(tiny_config(model_type))
        inputs = processor(images=[Image.fromarray(drawn(*size))], return_tensors="pt")
        with torch.inference_mode():
            untyped: Any = model
            expected = torch.cat(list(untyped.get_image_features(**inputs, return_dict=True).pooler_output))
        torch.testing.assert_close(vision.features(picture), expected, atol=1e-4, rtol=1e-4)
        assert picture.num_tokens == len(expected)


def test_features_are_computed_once_and_take_bounded_memory() -> None:
    vision = vision_of(lambda name: load_model(f"random:{name}"), "qwen2_vl")
    pictures = [vision.read(drawn(40, 40, seed)) for seed in range(4)]
    size = vision.features(pictures[0]).nbytes
    before = vision.num_computed
    vision.features(pictures[0])
    assert vision.num_computed == before
    vision._max_bytes = 2 * size
    for one in pictures:
        vision.features(one)
        assert vision._num_bytes <= 2 * size
        assert vision._num_bytes == sum(kept.nbytes for kept in vision._features.values())
    assert vision.num_computed == before + 3
    vision.features(pictures[3])
    vision.features(pictures[0])  # had to go
    assert vision.num_computed == before + 4
    vision._max_bytes = 1
    vision.features(pictures[1])
    assert len(vision._features) == 1, "one image is kept whatever its size"


# -- in a prompt ----------------------------------------------------------------------------------------------------


def test_each_placeholder_becomes_its_images_tokens(load: Load) -> None:
    vision = vision_of(load, "qwen2_vl")
    small, large = vision.read(drawn(16, 16)), vision.read(drawn(48, 24, 1))
    counts = small.num_tokens, large.num_tokens
    assert counts[0] != counts[1]
    image = vision.token
    tokens, placed = vision.place([1, image, 2, image], [small, large])
    assert tokens == [1, *[image] * counts[0], 2, *[image] * counts[1]]
    assert placed is not None
    assert placed.spans == ((1, 1 + counts[0]), (2 + counts[0], 2 + sum(counts)))
    assert [one[2] for one in placed.content] == [small.digest, large.digest]
    again, same = vision.place(tokens, [small, large])
    assert (again, same and same.spans) == (tokens, placed.spans)
    assert vision.place([1, 2], []) == ([1, 2], None)


@pytest.mark.parametrize(
    ("num_places", "num_images", "message"),
    [
        (0, 1, "0 image placeholders .* and 1 images were given: write one for each image, or all 16"),
        (1, 0, "1 image placeholders .* and 0 images"),
        (3, 2, "3 image placeholders .* and 2 images .* all 32"),
        (17, 1, "17 image placeholders"),
    ],
)
def test_a_wrong_count_is_named(load: Load, num_places: int, num_images: int, message: str) -> None:
    vision = vision_of(load)
    with pytest.raises(UsageError, match=message):
        vision.place([5, *[vision.token] * num_places], [vision.read(drawn(9, 9))] * num_images)


def test_an_expanded_image_is_one_run(load: Load) -> None:
    vision = vision_of(load)
    half = [vision.token] * 8
    with pytest.raises(UsageError, match="image 1 are not in one run of 16"):
        vision.place([*half, 5, *half], [vision.read(drawn(9, 9))])


def test_images_that_touch(load: Load) -> None:
    llava, qwen = vision_of(load), vision_of(load, "qwen2_vl")
    _, placed = llava.place([llava.token] * 2, [llava.read(drawn(9, 9))] * 2)
    assert placed is not None
    assert placed.spans == ((0, 16), (16, 32))
    with pytest.raises(UsageError, match="touch"):
        qwen.place([qwen.token] * 2, [qwen.read(drawn(9, 9))] * 2)


@pytest.mark.parametrize("model_type", QWEN)
def test_rotations_are_those_of_transformers_in_pieces_and_beyond(load: Load, plain: Plain, model_type: str) -> None:
    vision, model = vision_of(load, model_type), plain(model_type)
    pictures = [vision.read(drawn(24, 56)), vision.read(drawn(48, 16, 1))]
    tokens, placed = vision.place([7, 8, vision.token, 9, vision.token, 10], pictures)
    assert isinstance(placed, Placed)
    untyped: Any = model
    ids = torch.tensor([tokens])
    grids = torch.cat([one.inputs["image_grid_thw"] for one in pictures])
    expected, delta = untyped.model.get_rope_index(ids, (ids == vision.token).int(), image_grid_thw=grids)
    pieces = [placed.rotations(i, min(i + 5, len(tokens))) for i in range(0, len(tokens), 5)]
    assert np.array_equal(np.concatenate(pieces, axis=1), expected[:, 0].numpy())
    end = len(tokens)
    behind = placed.rotations(end - 1, end + 3)
    assert behind[:, 1:].tolist() == [[end + i + int(delta) for i in range(3)]] * 3
    assert int(delta) < 0


def test_a_text_without_a_mark_gets_its_images_in_front(load: Load) -> None:
    qwen = vision_of(load, "qwen2_vl")
    assert qwen.marked("what?", 2) == "<image_start><image><image_end>" * 2 + "what?"
    assert qwen.marked("a <image> b", 1) == "a <image> b"
    assert qwen.marked("plain", 0) == "plain"


def test_marks_are_tokens_of_a_byte_tokenizer() -> None:
    tokenizer = MarkedByteTokenizer(320, {"<image>": 259, "<image_end>": 261})
    assert tokenizer.encode("a<image><image_end>é") == [256, 97, 259, 261, 195, 169]
    assert tokenizer.encode("<imag", add_special=False) == list(b"<imag")
    assert tokenizer.name(261) == "<image_end>"


# -- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", VISION_ARCHITECTURES)
def test_only_the_language_part_is_hooked(load: Load, model_type: str) -> None:
    loaded = load(f"{model_type}-tiny")
    assert loaded.model.config.get_text_config()._attn_implementation == "kvwise"
    untyped: Any = loaded.model.config
    assert untyped.vision_config._attn_implementation == "sdpa"
    language: Any = loaded.model.base_model.language_model
    assert all(any(layer.module is module for module in language.modules()) for layer in loaded.layers)


def test_the_probe_sees_wrong_features(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Vision.features
    monkeypatch.setattr(Vision, "features", lambda self, picture: right(self, picture).flip(0))
    with pytest.raises(UnsupportedModel, match="logits are off"):
        load_model("random:llava-tiny")


def test_the_probe_sees_wrong_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = np.arange(1000)
    monkeypatch.setattr(Vision, "_rotate", lambda self, tokens, *more: (np.stack([flat] * 3)[:, : len(tokens)], 0))
    with pytest.raises(UnsupportedModel, match="logits are off"):
        load_model("random:qwen2vl-tiny")


@pytest.mark.parametrize("model_type", VISION_ARCHITECTURES)
def test_a_folder_brings_its_image_processor(load: Load, save: Callable[..., Path], model_type: str) -> None:
    folder = save(model_type)
    processors.default_processor(tiny_config(model_type)).save_pretrained(folder)
    vision, other = load_model(str(folder)).vision, vision_of(load, model_type)
    assert vision is not None
    picture = vision.read(drawn(40, 50))
    assert picture.digest == other.read(drawn(40, 50)).digest
    torch.testing.assert_close(vision.features(picture), other.features(picture))


def test_a_folder_without_an_image_processor_reads_text_only(
    save: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_model(str(save("llava")))
    assert loaded.vision is None
    assert "without images" in caplog.text


def test_a_broken_image_processor_is_named(save: Callable[..., Path]) -> None:
    folder = save("llava")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Nonsense"}')
    with pytest.raises(UsageError, match="image processor in"):
        load_model(str(folder))


def test_other_models_have_no_vision(load: Load) -> None:
    assert load("llama-tiny").vision is None


def test_random_models_are_the_same_in_every_build(plain: Plain) -> None:
    for model_type in VISION_ARCHITECTURES:
        first, second = plain(model_type), plain(model_type)
        for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert torch.equal(a, b), name
