"""Pictures: reading, writing and conversion, with depth, transparency, orientation and colour profile kept."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 100_000_000
LARGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65535, "WEBP": 16383}
_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a damaged file can make a decoder raise.
_BROKEN = (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, EOFError, struct.error, zlib.error)

Array = NDArray[Any]


class ImageError(ValueError):
    """A picture cannot be read or written; the message is one line that names the file and the reason."""


@dataclass(frozen=True)
class Picture:
    """A picture in memory.

    Attributes:
        pixels: [H, W, 1] (grey) or [H, W, 3] (RGB), uint8 or uint16.
        alpha: [H, W] of the same dtype, or None when there is no transparency.
        icc_profile: the colour profile the pixels are meant in.
        exif: EXIF data without an orientation, which has been applied to the pixels.
    """

    pixels: Array
    alpha: Array | None = None
    icc_profile: bytes | None = None
    exif: bytes | None = None

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def grey(self) -> bool:
        return self.pixels.shape[2] == 1

    @property
    def depth(self) -> int:
        """Bits per channel: 8 or 16."""
        return 16 if self.pixels.dtype == np.uint16 else 8

    @property
    def largest(self) -> int:
        """The value of full brightness: 255 or 65535."""
        return 2**self.depth - 1


# Pillow's own limit is a global number; while it is off, ours is checked before anything is decoded.
_pillow_limit = threading.RLock()


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    with _pillow_limit:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a PNG, JPEG or WebP file.

    8 and 16 bits per channel, grey and colour, palettes, transparency; EXIF orientation is applied. CMYK, YCbCr and Lab
    are converted to RGB.

    Args:
        path: the file.
        max_pixels: larger pictures are refused before they are decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it is no picture of these formats, is damaged or animated, or has more than max_pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with _without_pillow_limit(), Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    f"{path}: {width} x {height} is more than {max_pixels / 1e6:g} million pixels; "
                    "allow it with --max-pixels (max_pixels)"
                )
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ImageError(f"{path}: an animation of {image.n_frames} pictures; give single ones")
            deep = _deep_colour_png(path)
            pixels, alpha = _read_png16(path) if deep else _decode(image)
            icc = image.info.get("icc_profile") if image.mode not in ("CMYK", "YCbCr", "LAB") else None
            exif, orientation = _read_exif(image)
    except ImageError as error:
        raise ImageError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not a PNG, JPEG or WebP picture") from None
    except MemoryError:
        raise ImageError(f"{path}: not enough memory to decode it") from None
    except _BROKEN as error:
        raise ImageError(f"{path}: damaged picture: {_line(error)}") from None
    pixels = np.ascontiguousarray(_oriented(pixels, orientation))
    alpha = None if alpha is None else np.ascontiguousarray(_oriented(alpha, orientation))
    return Picture(pixels, alpha, icc or None, exif)


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _deep_colour_png(path: Path) -> bool:
    """Whether this is a PNG with 16 bits and more than one channel, which Pillow would reduce to 8."""
    with path.open("rb") as file:
        head = file.read(26)
    return len(head) == 26 and head.startswith(_PNG_SIGNATURE) and head[24] == 16 and head[25] in (2, 4, 6)


def _read_png16(path: Path) -> tuple[Array, Array | None]:
    import png

    with path.open("rb") as file:
        try:
            width, height, rows, info = png.Reader(file=file).read()
            flat = np.empty((height, width * info["planes"]), np.uint16)
            count = 0
            for count, row in enumerate(rows, 1):
                flat[count - 1] = row
        except (png.Error, AssertionError) as error:
            raise ImageError(f"damaged picture: {_line(error)}") from None
    if count != height:
        raise ImageError(f"damaged picture: {count} of {height} rows")
    planes = flat.reshape(height, width, info["planes"])
    if info["alpha"]:
        return planes[..., :-1], planes[..., -1]
    transparent = info.get("transparent")
    if transparent is None:
        return planes, None
    alpha = np.where((planes == np.asarray(transparent, np.uint16)).all(-1), 0, 65535).astype(np.uint16)
    return planes, alpha


def _decode(image: Image.Image) -> tuple[Array, Array | None]:
    image.load()
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        if mode == "F":
            raise ImageError("pictures of floating-point numbers are not supported")
        return np.asarray(image).astype(np.uint16)[..., None], None
    transparent = "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa")
    grey = mode in ("1", "L", "LA", "La")
    if mode in ("P", "PA"):
        grey = False
    wanted = ("L" if grey else "RGB") + ("A" if transparent else "")
    array = np.asarray(image.convert(wanted))
    if array.ndim == 2:
        array = array[..., None]
    return (array[..., :-1], array[..., -1]) if transparent else (array, None)


def _read_exif(image: Image.Image) -> tuple[bytes | None, int]:
    """EXIF data without its orientation, and that orientation; broken EXIF counts as none."""
    try:
        exif = image.getexif()
        orientation = int(exif.pop(_ORIENTATION, 1))
        return (exif.tobytes() if len(exif) else None), orientation
    except _BROKEN:
        return None, 1


def _oriented(array: Array, orientation: int) -> Array:
    """The array as EXIF's orientation 1..8 wants it shown."""
    if orientation in (2, 4):
        return np.flip(array, 1 if orientation == 2 else 0)
    if orientation == 3:
        return np.rot90(array, 2)
    if orientation == 5:
        return np.swapaxes(array, 0, 1)
    if orientation == 6:
        return np.rot90(array, 3)
    if orientation == 7:
        return np.swapaxes(np.rot90(array, 2), 0, 1)
    if orientation == 8:
        return np.rot90(array, 1)
    return array


def format_of(path: str | Path) -> str:
    """ "PNG", "JPEG" or "WEBP", by the extension.

    Raises:
        ImageError: another extension.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in EXTENSIONS:
        raise ImageError(f"{path}: unknown extension {suffix!r}, expected one of {', '.join(EXTENSIONS)}")
    return EXTENSIONS[suffix]


def check_output(path: str | Path, height: int, width: int, *, alpha: bool) -> None:
    """Refuse what `write_image` would refuse after the work is done.

    Raises:
        ImageError: the folder does not exist or cannot be written, or the format cannot hold such a picture.
    """
    path = Path(path)
    kind = format_of(path)
    if max(height, width) > LARGEST_SIDE[kind]:
        raise ImageError(
            f"{path}: {kind} holds at most {LARGEST_SIDE[kind]} pixels a side, the result is {width} x {height}"
        )
    if alpha and kind == "JPEG":
        raise ImageError(f"{path}: JPEG holds no transparency; choose .png or .webp")
    if path.is_dir():
        raise ImageError(f"{path}: is a folder")
    if not path.parent.is_dir():
        raise ImageError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"{path}: folder {path.parent} cannot be written")


def write_image(path: str | Path, picture: Picture, *, quality: int = 95) -> None:
    """Write a picture, completely or not at all; the extension chooses the format.

    JPEG and WebP hold 8 bits; 16-bit pictures are rounded for them.

    Args:
        path: .png, .jpg, .jpeg or .webp.
        quality: of JPEG and WebP, 1..100; 100 is lossless for WebP.

    Raises:
        ImageError: the format cannot hold the picture, or the file cannot be written.
    """
    path = Path(path)
    if not 1 <= quality <= 100:
        raise ImageError(f"quality: expected 1..100, got {quality}")
    check_output(path, picture.height, picture.width, alpha=picture.alpha is not None)
    kind = format_of(path)
    if kind != "PNG" and picture.depth == 16:
        picture = _to_8_bits(picture)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as file:
            _encode(file, picture, kind, quality)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or _line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _to_8_bits(picture: Picture) -> Picture:
    def rounded(a: Array) -> Array:
        return ((a.astype(np.uint32) + 128) // 257).astype(np.uint8)

    alpha = picture.alpha
    return replace(picture, pixels=rounded(picture.pixels), alpha=None if alpha is None else rounded(alpha))


def _encode(file: Any, picture: Picture, kind: str, quality: int) -> None:
    if picture.depth == 16 and not (picture.grey and picture.alpha is None):
        _encode_png16(file, picture)
        return
    planes = picture.pixels
    if picture.alpha is not None:
        planes = np.concatenate([planes, picture.alpha[..., None]], -1)
    if planes.shape[2] == 1:
        planes = planes[..., 0]
    image = Image.fromarray(np.ascontiguousarray(planes))
    options: dict[str, Any] = {}
    if picture.icc_profile:
        options["icc_profile"] = picture.icc_profile
    if picture.exif:
        options["exif"] = picture.exif
    if kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0 if quality >= 90 else -1}
    elif kind == "WEBP":
        options |= {"lossless": quality == 100, "quality": quality}
        image = image.convert("RGBA" if picture.alpha is not None else "RGB")
    image.save(file, kind, **options)


def _encode_png16(file: Any, picture: Picture) -> None:
    """16 bits in more than one channel, which Pillow cannot write; the profile and EXIF go in as chunks."""
    import png

    planes = picture.pixels
    if picture.alpha is not None:
        planes = np.concatenate([planes, picture.alpha[..., None]], -1)
    height, width, _ = planes.shape
    writer = png.Writer(width, height, greyscale=picture.grey, alpha=picture.alpha is not None, bitdepth=16)
    encoded = io.BytesIO()
    writer.write_packed(encoded, (row.astype(">u2").tobytes() for row in planes.reshape(height, -1)))
    encoded.seek(0)
    extra = []
    if picture.icc_profile:
        extra.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc_profile)))
    if picture.exif:
        extra.append((b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    header, *rest = png.Reader(file=encoded).chunks()
    png.write_chunks(file, [header, *extra, *rest])


def to_tensor(picture: Picture, data_range: float) -> Tensor:
    """The colours as a float32 [1, 3, H, W] in [0, data_range]; grey in all three channels."""
    planes = torch.from_numpy(picture.pixels.astype(np.float32)).permute(2, 0, 1)[None]
    planes = planes * (data_range / picture.largest)
    return planes.expand(-1, 3, -1, -1).contiguous() if picture.grey else planes.contiguous()


def quantize(tile: Tensor, data_range: float, depth: int, grey: bool) -> Array:
    """[1, 3, H, W] in [0, data_range] as [H, W, 3] (grey: [H, W, 1], the mean) of 8 or 16 bits: clamped, rounded half
    to even as the challenge does."""
    largest = 2**depth - 1
    planes = tile[0].float()
    if grey:
        planes = planes.mean(0, keepdim=True)
    planes = (planes.clamp(0, data_range) * (largest / data_range)).round()
    return planes.permute(1, 2, 0).cpu().numpy().astype(np.uint16 if depth == 16 else np.uint8)


def resize_alpha(alpha: Array, height: int, width: int) -> Array:
    """Transparency at another size, bicubic; fully opaque stays fully opaque."""
    largest = np.iinfo(alpha.dtype).max
    if (alpha == largest).all():
        return np.full((height, width), largest, alpha.dtype)
    image = Image.fromarray(alpha.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).round().clip(0, largest).astype(alpha.dtype)
