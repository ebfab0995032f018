"""A request's images on the engine's side: put into its prompt, and looked up for the rows of a step."""

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvwise.core.errors import UsageError
from kvwise.engine.scheduler import Scheduled
from kvwise.engine.sequence import Sequence
from kvwise.models.hook import Splice
from kvwise.models.loaded import LoadedModel
from kvwise.models.vision import Placed, Vision

Failures = list[tuple[Sequence, Exception]]


@dataclass(frozen=True, slots=True)
class Shown:
    """What a sequence's tokens from `first` on show: features [n, hidden]."""

    first: int
    features: Tensor


def place_images(loaded: LoadedModel, prompt: list[int], images: Many[Any]) -> tuple[list[int], Placed | None]:
    """The prompt with its images' tokens in it, and where they are. UsageError if they do not belong together."""
    require_list(images)
    if loaded.vision is None:
        if images:
            raise UsageError(
                f"{len(images)} images were given, and {loaded.name} reads text only: take a model that docs/models.md "
                "lists as one for images, with its preprocessor_config.json, or leave them out"
            )
        return prompt, None
    if len(images) > (num_places := prompt.count(loaded.vision.token)):
        raise loaded.vision.miscounted(num_places, len(images))  # before files are read
    pictures = [loaded.vision.read(image, f"image {i + 1}") for i, image in enumerate(images)]
    return loaded.vision.place(prompt, pictures)


def require_list(images: object) -> None:
    """UsageError for one image where the images of a prompt are meant."""
    if not isinstance(images, list | tuple):
        raise UsageError(f"the images of a prompt are a list, not one {type(images).__name__}: write [image]")


def look(vision: Vision | None, schedule: Many[Scheduled]) -> tuple[dict[Sequence, list[Shown]], Failures]:
    """What the rows of a step show, and the sequences whose images the model could not take."""
    shown: dict[Sequence, list[Shown]] = {}
    failures: Failures = []
    for item in schedule:
        if vision is not None and item.sequence.images is not None:
            try:
                shown[item.sequence] = _shown(vision, item, item.sequence.images)
            except Exception as error:  # the model or the memory gave out: only this request fails
                failures.append((item.sequence, error))
    return shown, failures


def _shown(vision: Vision, item: Scheduled, placed: Placed) -> list[Shown]:
    start = item.sequence.num_computed
    stop = start + item.num_tokens
    found = []
    for picture, (first, end) in zip(placed.pictures, placed.spans, strict=True):
        if first < stop and start < end:
            begin = max(start, first)
            found.append(Shown(begin, vision.features(picture)[begin - first : min(stop, end) - first]))
    return found


def splice(order: Many[Scheduled], shown: Mapping[Sequence, Many[Shown]]) -> Splice | None:
    """The rows of the flat batch that show something, and what; None if all are text."""
    rows, features = [], []
    row = 0
    for item in order:
        for one in shown.get(item.sequence, ()):
            start = row + one.first - item.sequence.num_computed
            rows.append(torch.arange(start, start + len(one.features), device=one.features.device))
            features.append(one.features)
        row += item.num_tokens
    return Splice(torch.cat(rows), torch.cat(features)) if rows else None
