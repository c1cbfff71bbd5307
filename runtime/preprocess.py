"""Photographs to the arrays that the image encoder takes: Pillow and NumPy only, the same code for training and serving."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DualmatchError

# Above this many pixels a file is refused before it is decoded: a decompression bomb, or a mistake.
MAX_PIXELS = 200_000_000
# What Pillow reads by itself. Not EPS, which it hands to Ghostscript, nor formats that no camera or web page writes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF")

ImageLike = Image.Image | bytes | str | Path


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a photograph becomes pixels (3, S, S), float32.

    Attributes:
        image_size: S.
        resize: `squash` scales the whole photograph to S x S; `crop` scales its shorter side to S * 256 / 224 and cuts the centre
            S x S (the DSRAN authors' evaluation transform).
        mean, std: per channel, on values in [0, 1].
        interpolation: of the resizing, on Pillow's images, antialiased when shrinking; what the trunk was trained with.
    """

    image_size: int
    resize: Literal["squash", "crop"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @property
    def resampling(self) -> Image.Resampling:
        """Pillow's name of the interpolation."""
        return Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR

    def __call__(self, image: ImageLike) -> NDArray[np.float32]:
        """Decode, orient by EXIF, convert to RGB, resize, normalise: (3, S, S) float32.

        Raises:
            DualmatchError: the image cannot be read.
        """
        return self.normalise(self.fit(open_rgb(image)))

    def fit(self, image: Image.Image) -> Image.Image:
        """The RGB image scaled (and cut) to S x S."""
        size = self.image_size
        if self.resize == "squash":
            return image.resize((size, size), self.resampling)
        scaled, (left, top) = self._scaled(*image.size)
        image = image.resize(scaled, self.resampling)
        return image.crop((left, top, left + size, top + size))

    def view(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a photograph that the network sees: left, top, right, bottom in the photograph's own pixels."""
        if self.resize == "squash":
            return 0.0, 0.0, float(width), float(height)
        (scaled_width, scaled_height), (left, top) = self._scaled(width, height)
        x, y = width / scaled_width, height / scaled_height
        return left * x, top * y, (left + self.image_size) * x, (top + self.image_size) * y

    def _scaled(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """For `crop`: the size that a photograph is scaled to, and the corner of what is cut out of it."""
        size = self.image_size
        short = size * 256 // 224
        # The longer side is truncated and the offset rounded, as torchvision's Resize and CenterCrop do.
        scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        return scaled, (round((scaled[0] - size) / 2.0), round((scaled[1] - size) / 2.0))

    def normalise(self, image: Image.Image) -> NDArray[np.float32]:
        """An RGB image of any size as (3, height, width) float32, mean and deviation applied."""
        # Channels are moved while they are bytes: on floats that costs more than all of the arithmetic.
        pixels_CHW = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels_CHW /= np.float32(255)
        pixels_CHW -= np.asarray(self.mean, np.float32)[:, None, None]
        pixels_CHW /= np.asarray(self.std, np.float32)[:, None, None]
        return pixels_CHW


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """While open, photographs of up to `pixels` pixels are decoded, in every thread of the process, whatever Pillow's own limit.

    Raises:
        DualmatchError: a limit below 1.
    """
    global MAX_PIXELS
    if pixels < 1:
        raise DualmatchError(f"the limit of pixels must be at least 1, got {pixels}.")
    before = MAX_PIXELS, Image.MAX_IMAGE_PIXELS
    MAX_PIXELS, Image.MAX_IMAGE_PIXELS = pixels, None
    try:
        yield
    finally:
        MAX_PIXELS, Image.MAX_IMAGE_PIXELS = before


def open_rgb(image: ImageLike) -> Image.Image:
    """Decode an image wholly and convert it to RGB: EXIF orientation applied, transparency composed on white.

    Raises:
        DualmatchError: not an image, truncated, larger than MAX_PIXELS, or of 32 bits a pixel.
    """
    name = "the image" if isinstance(image, Image.Image | bytes) else str(image)
    try:
        if isinstance(image, Image.Image):
            return _rgb(image.copy(), name)
        with Image.open(BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            return _rgb(opened, name)
    except DualmatchError:
        raise
    except FileNotFoundError:
        raise DualmatchError(f"there is no file {name}.") from None
    except UnidentifiedImageError:
        raise DualmatchError(f"{name} is not an image that Pillow can read.") from None
    except Image.DecompressionBombError as error:
        raise DualmatchError(f"{name} is refused: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (Pillow's readers meet damaged bytes with exceptions of every kind)
        raise DualmatchError(f"{name} cannot be decoded: {str(error) or type(error).__name__}.") from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """`image` in RGB; it may be changed, so that no more copies of a large photograph are held than needed."""
    if image.width * image.height > MAX_PIXELS:
        raise DualmatchError(f"{name} has {image.width} x {image.height} pixels, above the limit of {MAX_PIXELS}.")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips: all but the darkest 256 of 65536 levels would become white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DualmatchError(f"{name} has 32-bit pixels of unknown range; convert it to 8 or 16 bits.")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        flattened = Image.new("RGB", coloured.size, (255, 255, 255))
        flattened.paste(coloured, mask=coloured.getchannel("A"))
        return flattened
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")
