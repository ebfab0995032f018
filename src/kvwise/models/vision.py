"""The eyes of a vision-language model: what its image tokens stand for, where they are, and how they are rotated.

An image is read once per request: its pixels as the model's own image processor makes them, their digest (which goes
into the keys of the blocks it reaches into), and how many tokens it takes. Features are computed when a step first
needs them, kept while there is room, and stand in the flat batch in place of the embeddings of placeholder tokens.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvwise.core.errors import UsageError
from kvwise.models.config import one_line
from kvwise.models.images import read_image
from kvwise.models.quiet import quiet

Int64 = npt.NDArray[np.int64]
FEATURE_BYTES = 256 << 20  # of features kept for steps, requests and preemptions to come


@dataclass(frozen=True, slots=True)
class Picture:
    """One image as the model sees it: `inputs` of its vision part (CPU tensors), and the tokens it takes.

    `digest` names the pixels and their layout: equal digests mean equal features.
    """

    digest: bytes
    num_tokens: int
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Placed:
    """The pictures of one prompt, in order, and the tokens they take: `spans` (first, stop).

    `positions` int64 [3, T] where the model rotates the prompt's tokens by time, height and width, else None; tokens
    behind the prompt are rotated by their index plus `delta`.
    """

    pictures: tuple[Picture, ...]
    spans: tuple[tuple[int, int], ...]
    positions: Int64 | None = None
    delta: int = 0

    @property
    def content(self) -> tuple[tuple[int, int, bytes], ...]:
        """What names the images in the keys of blocks."""
        return tuple((*span, one.digest) for span, one in zip(self.spans, self.pictures, strict=True))

    def rotations(self, first: int, stop: int) -> Int64:
        """Positions int64 [3, n] of tokens `first` to `stop`; only where `positions` are known."""
        assert self.positions is not None
        inside = self.positions[:, first:stop]
        behind = np.arange(max(first, self.positions.shape[1]), stop, dtype=np.int64) + self.delta
        return np.concatenate([inside, np.broadcast_to(behind, (3, len(behind)))], axis=1)


class Vision:
    """Reads images for one model. `token` is its placeholder's id, `mark` how a text says "an image goes here".

    `wrap` is what the model expects around a mark, as text with the mark in it.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, *, token: int, mark: str, wrap: str,
        max_bytes: int = FEATURE_BYTES,
    ) -> None:  # fmt: skip
        self.token = token
        self.mark = mark
        self.wrap = wrap
        self.num_computed = 0  # images that went through the vision part
        self._model: Any = model
        self._processor = processor
        self._max_bytes = max_bytes
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._num_bytes = 0
        self._counts: dict[tuple[object, ...], int] = {}
        # Of all models with positions in three dimensions, the same public method tells them.
        self._rope_index = getattr(model.base_model, "get_rope_index", None)

    def read(self, source: Any, name: str = "image") -> Picture:
        """Read an image (see `read_image`). UsageError if it cannot be read, or this model cannot take it."""
        image = read_image(source, name)
        try:
            with quiet():
                made: Mapping[str, Tensor] = dict(self._processor(images=[image], return_tensors="pt"))
        except Exception as error:  # the checkpoint's processor, with settings of its own
            width, height = image.size
            raise UsageError(f"{name} of {width} x {height} pixels is not for this model: {one_line(error)}") from error
        digest = _digest(made)
        dtype = self._model.dtype
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in made.items()}
        return Picture(digest, self._count(digest, inputs), inputs)

    def features(self, picture: Picture) -> Tensor:
        """What stands in place of the picture's tokens: [num_tokens, hidden], on the model's device.

        Computed unless kept; of those kept the longest unused make room.
        """
        found = self._features.pop(picture.digest, None)
        if found is None:
            found = self._compute(picture.inputs)
        else:
            self._num_bytes -= found.nbytes
        self._keep(picture.digest, found)
        if len(found) != picture.num_tokens:
            raise UsageError(f"an image has {len(found)} features for {picture.num_tokens} tokens")
        return found

    def place(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> tuple[list[int], Placed | None]:
        """A prompt with its pictures' tokens in it, and where they are; None if it has no pictures.

        The prompt has one placeholder for each picture, or is expanded already: for each picture as many, in one run,
        as it takes. UsageError for any other number.
        """
        tokens = list(prompt)
        counts = [one.num_tokens for one in pictures]
        at = [i for i, token in enumerate(tokens) if token == self.token]
        if len(at) == len(counts):
            starts = [where + sum(counts[:i]) - i for i, where in enumerate(at)]
            for where, count in zip(reversed(at), reversed(counts), strict=True):
                tokens[where : where + 1] = [self.token] * count
        elif counts and len(at) == sum(counts):
            starts = [at[sum(counts[:i])] for i in range(len(counts))]
        else:
            raise self.miscounted(len(at), len(counts), sum(counts))
        if not counts:
            return tokens, None
        spans = tuple((start, start + count) for start, count in zip(starts, counts, strict=True))
        for i, (start, stop) in enumerate(spans):
            if any(token != self.token for token in tokens[start:stop]):
                raise UsageError(f"the placeholders of image {i + 1} are not in one run of {stop - start} tokens")
        return tokens, Placed(tuple(pictures), spans, *self._rotate(tokens, pictures, spans))

    def miscounted(self, num_places: int, num_images: int, num_tokens: int | None = None) -> UsageError:
        """The error for a prompt whose placeholders are not those of its images, which take `num_tokens` if known."""
        expanded = f", or all {num_tokens} that they take" if num_tokens else ""
        return UsageError(
            f"the prompt has {num_places} image placeholders (token {self.token}, {self.mark!r} in text) and "
            f"{num_images} images were given: write one for each image{expanded}"
        )

    def marked(self, text: str, num_images: int) -> str:
        """A text that says where its images go: one that does not gets them in front, in the model's own wrapping."""
        return text if self.mark in text else self.wrap * num_images + text

    def _rotate(
        self, tokens: list[int], pictures: Sequence[Picture], spans: Sequence[tuple[int, int]]
    ) -> tuple[Int64 | None, int]:
        if self._rope_index is None:
            return None, 0
        if any(one[1] == other[0] for one, other in pairwise(spans)):
            raise UsageError("this model cannot tell two images apart that touch: put a token between them")
        kinds = torch.zeros(1, len(tokens), dtype=torch.int32)
        for start, stop in spans:
            kinds[0, start:stop] = 1
        grids = torch.cat([one.inputs["image_grid_thw"] for one in pictures])
        positions, delta = self._rope_index(torch.tensor([tokens]), mm_token_type_ids=kinds, image_grid_thw=grids)
        return positions[:, 0].numpy(), int(delta)

    def _count(self, digest: bytes, inputs: Mapping[str, Tensor]) -> int:
        """Tokens an image takes: told by its shape, or else seen once for each shape."""
        if (grid := inputs.get("image_grid_thw")) is not None:
            merge: int = self._processor.merge_size
            return int(grid.prod()) // merge**2
        shape = tuple(tuple(v.shape) if v.is_floating_point() else tuple(v.flatten().tolist()) for v in inputs.values())
        if shape not in self._counts:
            found = self._compute(inputs)
            self._keep(digest, found)
            self._counts[shape] = len(found)
        return self._counts[shape]

    def _keep(self, digest: bytes, features: Tensor) -> None:
        """Keep features as the last used; older ones make room, but one image is kept whatever its size."""
        self._features[digest] = features
        self._num_bytes += features.nbytes
        while self._num_bytes > self._max_bytes and len(self._features) > 1:
            _, gone = self._features.popitem(last=False)
            self._num_bytes -= gone.nbytes

    def _compute(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode(), quiet():
            there = {key: value.to(self._model.device) for key, value in inputs.items()}
            found = self._model.get_image_features(**there, return_dict=True).pooler_output
            self.num_computed += 1
            rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in found])
            return rows.to(self._model.dtype)


def _digest(inputs: Mapping[str, Tensor]) -> bytes:
    """sha256 over all that the vision part is given, in the processor's own precision."""
    digest = sha256()
    for key in sorted(inputs):
        value = inputs[key]
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.digest()
