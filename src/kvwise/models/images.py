"""Images as they come - a path, a PIL image or a numpy array - made into one kind: RGB, upright, of a sane size."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvwise.core.errors import UsageError
from kvwise.models.config import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource = "str | Path | Image | np.ndarray[Any, Any]"
MAX_PIXELS = 50_000_000
_CHANNELS = (1, 3, 4)


def read_image(source: Any, name: str = "image") -> "Image":
    """`source` as an RGB image; `name` is what errors call it.

    A path names a file (of an animation, the first frame is taken, and a camera's note of which side is up is
    followed); an array is uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. UsageError for anything else, for what
    cannot be decoded, has no pixels, or has more than MAX_PIXELS: that is told by the file's header, before its
    pixels take memory.
    """
    require_pillow()
    from PIL.Image import Image

    if isinstance(source, str | Path):
        return _from_file(Path(source).expanduser(), f"{name} {source}")
    if isinstance(source, Image):
        return _to_rgb(source, name)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    raise UsageError(f"{name} is a {type(source).__name__}: give a path, a PIL image or a numpy array of uint8")


def require_pillow() -> None:
    """UsageError if Pillow, which reads images, is not installed."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UsageError("images need Pillow: pip install 'kvwise[vision]'") from error


def _from_file(path: Path, name: str) -> "Image":
    from PIL import Image

    if not path.is_file():
        raise UsageError(f"{name}: there is no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about size: ours is an error
            opened = Image.open(path)
        with opened:
            return _to_rgb(opened, name)
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name} is too large ({one_line(error)}): scale it down") from error
    except OSError as error:
        raise UsageError(f"{name} cannot be read as an image: {one_line(error)}") from error


def _from_array(array: "np.ndarray[Any, Any]", name: str) -> "Image":
    from PIL import Image

    shape = array.shape
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and shape[2] in _CHANNELS)):
        raise UsageError(
            f"{name} is an array of {array.dtype} {list(shape)}: it must be uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    _check_size(shape[1], shape[0], name)
    squeezed = array[:, :, 0] if array.ndim == 3 and shape[2] == 1 else array
    return _to_rgb(Image.fromarray(np.ascontiguousarray(squeezed)), name)


def _to_rgb(image: "Image", name: str) -> "Image":
    from PIL import ImageOps

    _check_size(*image.size, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken notes in a file whose pixels are fine
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders of many formats meet bytes of any kind
        raise UsageError(f"{name} cannot be decoded: {one_line(error)}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise UsageError(f"{name} has {width} x {height} pixels: there is nothing to see")
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name} has {width} x {height} = {width * height} pixels, more than {MAX_PIXELS}: scale it down"
        )
