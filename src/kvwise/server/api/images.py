"""Images of a request: `data:` URLs of base64 and nothing else, so that the server never fetches anything."""

import base64
import binascii
import re
import warnings
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from kvwise.core.errors import UsageError
from kvwise.models.images import MAX_PIXELS, read_image, require_pillow
from kvwise.server.errors import ApiError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 16  # of a request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # those that OpenAI takes
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)


def read_images(urls: Sequence[str]) -> "list[Image]":
    """The images of a request, RGB. ApiError 400 for other URLs, for what is no image, and for too many pixels."""
    if len(urls) > MAX_IMAGES:
        raise _refused(f"{len(urls)} images are more than {MAX_IMAGES}, the limit of a request")
    images: list[Image] = []
    for number, url in enumerate(urls, 1):
        images.append(_read(url, f"image {number}"))
        if sum(one.width * one.height for one in images) > MAX_PIXELS:
            raise _refused(f"the images have more than {MAX_PIXELS} pixels together: scale them down")
    return images


def _read(url: str, name: str) -> "Image":
    prefix = _DATA_URL.match(url)
    if prefix is None:
        raise _refused(f"{name} is no URL of the form data:image/png;base64,...: images are never fetched")
    try:
        data = base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise _refused(f"{name} is not base64") from None
    require_pillow()
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own warning about size: ours is an error
            opened = Image.open(BytesIO(data), formats=FORMATS)
        with opened:
            return read_image(opened, name)
    except UsageError as error:
        raise _refused(str(error)) from None
    except Exception:  # decoders meet bytes of any kind
        raise _refused(f"{name} cannot be read as {', '.join(FORMATS)}") from None


def _refused(message: str) -> ApiError:
    return ApiError(400, message, param="messages", code="invalid_image")
