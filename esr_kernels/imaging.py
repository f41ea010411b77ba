"""Pictures: reading, writing and conversion, with depth, transparency, orientation and colour profile kept."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin, features
from torch import Tensor

from .files import atomically, temporary_name

EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_PIXELS = 100_000_000
LARGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65535, "WEBP": 16383}
_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What the metadata of a picture may take beside its pixels, in bytes.
_METADATA = 2**26
# The one segment in which JPEG holds EXIF.
_JPEG_EXIF = 65533
# 16 bits in several channels, which Pillow would reduce to 8: how it can be told to give the upper and the lower bytes.
_DEEP = {"RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L")}
_DEEP_GREY_ALPHA = "LA;16B"
# Values that PNG's encoder filters at once.
_FILTERED = 2**20
_ALL = slice(None)
# What a damaged file can make a decoder raise.
BROKEN = (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, EOFError, struct.error, zlib.error)

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

    def __post_init__(self) -> None:
        if self.pixels.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"pixels: expected uint8 or uint16, got {self.pixels.dtype}")
        if self.pixels.ndim != 3 or self.pixels.shape[2] not in (1, 3) or 0 in self.pixels.shape:
            raise ValueError(f"pixels: expected [H, W, 1] or [H, W, 3], got shape {list(self.pixels.shape)}")
        if self.alpha is None:
            return
        if self.alpha.dtype != self.pixels.dtype:
            raise TypeError(f"alpha: expected {self.pixels.dtype} as the pixels, got {self.alpha.dtype}")
        if self.alpha.shape != self.pixels.shape[:2]:
            raise ValueError(f"alpha: expected {list(self.pixels.shape[:2])}, got shape {list(self.alpha.shape)}")

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

    @property
    def transparent(self) -> bool:
        """Whether any pixel is less than opaque."""
        return self.alpha is not None and int(self.alpha.min()) < self.largest


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """The picture in a PNG, JPEG or WebP file.

    8 and 16 bits per channel, grey and colour, palettes, transparency; EXIF orientation is applied. CMYK and YCbCr
    are converted to RGB. Of a JPEG file with several pictures (MPO) the first is taken.

    Args:
        path: the file.
        max_pixels: larger pictures are refused before they are decoded, at least 1.

    Raises:
        FileNotFoundError: there is no such file.
        ImageError: it is no picture of these formats, is damaged or animated, or has more than max_pixels.
    """
    path = Path(path)
    with opened(path, max_pixels) as (file, image), _errors_of(path):
        pixels, alpha = _decode(image, file)
        icc = image.info.get("icc_profile") if image.mode not in ("CMYK", "YCbCr", "LAB") else None
        exif, orientation = read_exif(image)
    pixels = np.ascontiguousarray(_oriented(pixels, orientation))
    alpha = None if alpha is None else np.ascontiguousarray(_oriented(alpha, orientation))
    return Picture(pixels, alpha, icc or None, exif)


@contextmanager
def opened(path: Path, max_pixels: int) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """A picture's file, and the picture, not yet decoded, with its size checked.

    Raises:
        As `read_image`, except for damage beyond the header.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        raise ImageError(f"{path}: not a file")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        with _errors_of(path):
            image = _open(file, max_pixels)
        with image:
            yield file, image


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """What decoding raises inside, as an ImageError that names the file."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except MemoryError:
        raise ImageError(f"{path}: not enough memory to decode it") from None
    except BROKEN as error:
        raise ImageError(f"{path}: damaged picture: {first_line(error)}") from None


def image_kind(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Height and width as `read_image` will give them, and what the file holds, from its header alone.

    Returns:
        height, width, and one of "RGB", "RGB with alpha", "grey", "grey with alpha", "palette", "CMYK", "YCbCr", "LAB",
        with " of 16 bits" where it has them.

    Raises:
        As `read_image`, except for damage beyond the header.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, _open(file, max_pixels) as image:
            tiles = getattr(image, "tile", None)
            raw = str(tiles[0][3]) if image.format == "PNG" and tiles else ""
            mode, size, orientation = image.mode, image.size, read_exif(image)[1]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except BROKEN as error:
        raise ImageError(f"{path}: damaged picture: {first_line(error)}") from None
    width, height = size if orientation < 5 else size[::-1]
    names = {"L": "grey", "1": "grey", "I": "grey", "LA": "grey with alpha", "RGBA": "RGB with alpha", "P": "palette"}
    kind = "grey with alpha" if raw == _DEEP_GREY_ALPHA else names.get(mode.partition(";")[0], mode)
    deep = raw in _DEEP or raw == _DEEP_GREY_ALPHA or mode.startswith("I")
    return height, width, kind + (" of 16 bits" if deep else "")


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The picture, not yet decoded, with its size checked.

    `Image.open` is not used: its own limit is one number for the whole process, and it would have to be changed.
    """
    head = file.read(30)
    size = os.fstat(file.fileno()).st_size
    if size > 8 * max_pixels + _METADATA:
        raise ImageError(
            f"a file of {size / 2**20:.0f} MiB is more than {max_pixels / 1e6:g} million pixels can need; "
            "allow more with --max-pixels (max_pixels)"
        )
    file.seek(0)
    image: Image.Image
    if head.startswith(_PNG_SIGNATURE):
        image = PngImagePlugin.PngImageFile(file)
    elif head.startswith(b"\xff\xd8\xff"):
        image = JpegImagePlugin.JpegImageFile(file)
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        if not features.check("webp"):
            raise ImageError("this Pillow was built without WebP")
        # Its decoder takes memory for the whole picture as soon as it is opened.
        _check_size(_webp_size(head), max_pixels)
        image = WebPImagePlugin.WebPImageFile(file)
    else:
        raise ImageError("not a PNG, JPEG or WebP picture")
    _check_size(image.size, max_pixels)
    if getattr(image, "is_animated", False):
        raise ImageError(f"an animation of {getattr(image, 'n_frames', 2)} pictures; give single ones")
    return image


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} is more than {max_pixels / 1e6:g} million pixels; "
            "allow it with --max-pixels (max_pixels)"
        )


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height from the first 30 bytes of a WebP file."""
    kind = head[12:16]
    if len(head) == 30 and kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if len(head) == 30 and kind == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if len(head) >= 25 and kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    raise ImageError("damaged picture: no size in its header")


def _decode(image: Image.Image, file: BinaryIO) -> tuple[Array, Array | None]:
    """Pixels [H, W, 1 or 3] and alpha [H, W], uint8 or uint16."""
    tiles = getattr(image, "tile", None)
    raw = tiles[0][3] if image.format == "PNG" and tiles else None
    if raw in _DEEP:
        upper, lower = (_load_as(image, mode, file) for mode in _DEEP[raw])
        planes = upper.astype(np.uint16) << 8 | lower
    elif raw == _DEEP_GREY_ALPHA:
        # Two numbers of two bytes are as long as four numbers of one; the decoder cannot tell.
        planes = np.ascontiguousarray(_load_as(image, "RGBA", file)).view(">u2").astype(np.uint16)
    else:
        image.load()
        if image.mode == "PA" or (image.mode == "P" and "transparency" in image.info):
            planes = np.asarray(image.convert("RGBA"))
        elif image.mode in ("L", "LA", "RGB", "RGBA"):
            planes = np.asarray(image)
        elif image.mode == "1":
            planes = np.asarray(image.convert("L"))
        elif image.mode in ("P", "CMYK", "YCbCr", "LAB"):
            planes = np.asarray(image.convert("RGB"))
        elif image.mode in ("I;16", "I;16B", "I"):
            planes = np.asarray(image).astype(np.uint16)
        else:
            raise ImageError(f"pictures of kind {image.mode} are not supported")
    if planes.ndim == 2:
        planes = planes[..., None]
    if planes.shape[2] in (2, 4):
        return planes[..., :-1], planes[..., -1]
    return planes, _keyed_alpha(image, planes, raw)


def _load_as(image: Image.Image, mode: str, file: BinaryIO) -> Array:
    """The bytes of a deep PNG, [H, W, 3 or 4] uint8, unpacked by the named one of Pillow's raw modes."""
    if not image.tile:  # type: ignore[attr-defined]
        # A picture is decoded once; the other half of its bytes takes a second one.
        file.seek(0)
        image = PngImagePlugin.PngImageFile(file)
    (tile,) = image.tile  # type: ignore[attr-defined]
    image.tile = [(*tile[:3], mode)]  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image)


def _keyed_alpha(image: Image.Image, planes: Array, raw: object) -> Array | None:
    """Transparency of a PNG that names one colour or one grey as transparent."""
    key = image.info.get("transparency")
    if image.format != "PNG" or not isinstance(key, (int, tuple)):
        return None
    largest = int(np.iinfo(planes.dtype).max)
    # Greys of 2 and 4 bits have been stretched to 8, the key has not; with 1 bit both have.
    wanted = np.asarray(key, np.int64).reshape(-1) * {"L;2": 85, "L;4": 17}.get(str(raw), 1)
    return np.where((planes == wanted).all(-1), 0, largest).astype(planes.dtype)


def read_exif(image: Image.Image) -> tuple[bytes | None, int]:
    """EXIF data without its orientation, and that orientation; broken EXIF counts as none."""
    try:
        exif = image.getexif()
        orientation = int(exif.pop(_ORIENTATION, 1))
        return (exif.tobytes() if len(exif) else None), orientation
    except BROKEN:
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


def check_output(path: str | Path, height: int, width: int, *, transparent: bool) -> None:
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
    if transparent and kind == "JPEG":
        raise ImageError(f"{path}: JPEG holds no transparency; choose .png or .webp")
    try:
        # One try instead of questions: permissions, long names, read-only and vanished folders all show here.
        folder = path.parent
        if path.is_dir():
            raise ImageError(f"{path}: is a folder")
        if not folder.is_dir():
            raise ImageError(f"{path}: there is no folder {folder}")
        path.exists()
        temporary = temporary_name(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror or first_line(error)}") from None


def write_image(path: str | Path, picture: Picture, *, quality: int = 95) -> None:
    """Write a picture, completely or not at all; the extension chooses the format.

    JPEG and WebP hold 8 bits; 16-bit pictures are rounded for them. JPEG takes a picture with an alpha channel when all
    of it is opaque.

    Args:
        path: .png, .jpg, .jpeg or .webp.
        quality: of JPEG and WebP, 1..100; 100 is lossless for WebP.

    Raises:
        ImageError: the format cannot hold the picture, or the file cannot be written.
    """
    path = Path(path)
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise ImageError(f"quality: expected 1..100, got {quality!r}")
    check_output(path, picture.height, picture.width, transparent=picture.transparent)
    kind = format_of(path)
    if kind == "JPEG":
        picture = replace(picture, alpha=None)
    if kind != "PNG" and picture.depth == 16:
        picture = _to_8_bits(picture)

    def encode(part: Path) -> None:
        with part.open("xb") as file:
            _encode(file, picture, kind, quality)

    try:
        atomically(path, encode)
    except ImageError:
        raise
    except (OSError, ValueError, struct.error) as error:
        raise ImageError(
            f"{path}: cannot be written: {getattr(error, 'strerror', None) or first_line(error)}"
        ) from None


def _to_8_bits(picture: Picture) -> Picture:
    def rounded(a: Array) -> Array:
        return ((a.astype(np.uint32) + 128) // 257).astype(np.uint8)

    alpha = picture.alpha
    return replace(picture, pixels=rounded(picture.pixels), alpha=None if alpha is None else rounded(alpha))


def _encode(file: BinaryIO, picture: Picture, kind: str, quality: int) -> None:
    channels = picture.pixels.shape[2] + (picture.alpha is not None)
    if picture.depth == 16 and channels > 1:
        writer = PngWriter(file, picture.height, picture.width, channels, 16, picture.icc_profile, picture.exif)
        step = max(1, _FILTERED // picture.width)
        for top in range(0, picture.height, step):
            writer.write(_planes(picture, slice(top, top + step)))
        writer.close()
        return
    planes = _planes(picture, _ALL)
    image = Image.fromarray(np.ascontiguousarray(planes[..., 0] if channels == 1 else planes))
    options: dict[str, Any] = {}
    profile = picture.icc_profile
    if kind == "WEBP" and picture.grey:
        image = image.convert("RGBA" if picture.alpha is not None else "RGB")
        # A grey profile means nothing for the colours that WebP turns greys into.
        profile = None if profile and profile[16:20] == b"GRAY" else profile
    if profile:
        options["icc_profile"] = profile
    if picture.exif and (kind != "JPEG" or len(picture.exif) <= _JPEG_EXIF):
        options["exif"] = picture.exif
    if kind == "JPEG":
        options |= {"quality": quality, "subsampling": 0 if quality >= 90 else -1}
    elif kind == "WEBP":
        options |= {"lossless": quality == 100, "quality": quality}
    image.save(file, kind, **options)


def _planes(picture: Picture, rows: slice) -> Array:
    """Rows of the picture [h, W, 1..4] with alpha as the last channel."""
    if picture.alpha is None:
        return picture.pixels[rows]
    return np.concatenate([picture.pixels[rows], picture.alpha[rows][..., None]], -1)


class PngWriter:
    """A PNG written row by row, in memory for a few rows; 16 bits in several channels, which Pillow cannot write.

    Args:
        file: open for writing; stays open.
        height, width: of the picture, 1..2^31-1.
        channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        depth: bits per channel, 8 or 16.
        icc_profile, exif: as in `Picture`.

    Raises:
        ValueError: another number of channels or bits, or a side out of range.
        OSError: of the file.
    """

    def __init__(
        self,
        file: BinaryIO,
        height: int,
        width: int,
        channels: int,
        depth: int,
        icc_profile: bytes | None = None,
        exif: bytes | None = None,
    ) -> None:
        kinds = {1: 0, 2: 4, 3: 2, 4: 6}
        if channels not in kinds:
            raise ValueError(f"channels: expected 1..4, got {channels}")
        if depth not in (8, 16):
            raise ValueError(f"depth: expected 8 or 16, got {depth}")
        if not (1 <= height < 2**31 and 1 <= width < 2**31):
            raise ValueError(f"height, width: expected 1..{2**31 - 1}, got {height}, {width}")
        self._file, self._rows, self._shape = file, height, (width, channels)
        self._dtype = np.dtype(np.uint8 if depth == 8 else np.uint16)
        self._bytes = channels * depth // 8  # of a pixel
        self._above = np.zeros((1, width * self._bytes), np.uint8)
        self._compress = zlib.compressobj(6)
        file.write(_PNG_SIGNATURE)
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kinds[channels], 0, 0, 0))
        if icc_profile:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile))
        if exif:
            self._chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind)
        self._file.write(data)
        self._file.write(struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))

    def write(self, rows: Array) -> None:
        """Append rows [h, W, channels] from top to bottom.

        Raises:
            TypeError: another dtype than the depth's.
            ValueError: another width or number of channels, or more rows than announced.
            OSError: of the file.
        """
        if rows.dtype != self._dtype:
            raise TypeError(f"rows: expected {self._dtype}, got {rows.dtype}")
        if rows.ndim != 3 or rows.shape[1:] != self._shape:
            raise ValueError(f"rows: expected [h, {self._shape[0]}, {self._shape[1]}], got shape {list(rows.shape)}")
        if len(rows) > self._rows:
            raise ValueError(f"rows: {self._rows} more make the picture complete, got {len(rows)}")
        self._rows -= len(rows)
        step = max(1, _FILTERED // self._above.size)
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            data = np.ascontiguousarray(part, part.dtype.newbyteorder(">")).view(np.uint8).reshape(len(part), -1)
            encoded = self._compress.compress(self._filtered(data).tobytes())
            if encoded:
                self._chunk(b"IDAT", encoded)

    def _filtered(self, data: Array) -> Array:
        """Rows of bytes [h, n] as [h, 1 + n]: the filter's number, then what it leaves, smallest in sum (PNG, 12.8)."""
        up = np.concatenate([self._above, data[:-1]])
        self._above = data[-1:].copy()
        left, corner = np.zeros_like(data), np.zeros_like(data)
        left[:, self._bytes :], corner[:, self._bytes :] = data[:, : -self._bytes], up[:, : -self._bytes]
        estimate = left.astype(np.int16) + up - corner
        far = [np.abs(estimate - a) for a in (left, up, corner)]
        paeth = np.where((far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner))
        candidates = {0: data, 1: data - left, 2: data - up, 4: data - paeth}
        sums = [np.abs(c.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64) for c in candidates.values()]
        best = np.argmin(sums, 0)
        out = np.empty((len(data), 1 + data.shape[1]), np.uint8)
        for index, (number, candidate) in enumerate(candidates.items()):
            out[best == index, 0] = number
            out[best == index, 1:] = candidate[best == index]
        return out

    def close(self) -> None:
        """Complete the picture.

        Raises:
            ValueError: rows are missing.
            OSError: of the file.
        """
        if self._rows:
            raise ValueError(f"rows: {self._rows} are missing")
        self._chunk(b"IDAT", self._compress.flush())
        self._chunk(b"IEND", b"")


def middle(length: int, limit: int) -> slice:
    """The middle `limit` of so many rows or columns, or all of them where they are no more."""
    begin = max(length - limit, 0) // 2
    return slice(begin, begin + min(length, limit))


def to_tensor(picture: Picture, data_range: float, rows: slice = _ALL, columns: slice = _ALL) -> Tensor:
    """The colours, or a part of them, as a float32 [1, 3, H, W] in [0, data_range]; grey in all three channels."""
    part = picture.pixels[rows, columns]
    planes = torch.from_numpy(np.moveaxis(part, 2, 0)[None].astype(np.float32, order="C"))
    planes *= data_range / picture.largest
    return planes.expand(-1, 3, -1, -1).contiguous() if picture.grey else planes


def quantize(tile: Tensor, data_range: float, depth: int, grey: bool) -> Array:
    """[1, 3, H, W] in [0, data_range] as [H, W, 3] (grey: [H, W, 1], the mean) of 8 or 16 bits: clamped, rounded half
    to even as the challenge does."""
    largest = 2**depth - 1
    planes = tile[0].float()
    if grey:
        planes = planes.mean(0, keepdim=True)
    # In place after the first: a result of 16 million pixels has copies of 200 MB.
    planes = planes.clamp(0, data_range).mul_(largest / data_range).round_()
    return planes.permute(1, 2, 0).cpu().numpy().astype(np.uint16 if depth == 16 else np.uint8, order="C")


def resize_alpha(alpha: Array, height: int, width: int) -> Array:
    """Transparency [h, w], uint8 or uint16, at another size, bicubic; fully opaque stays fully opaque."""
    largest = np.iinfo(alpha.dtype).max
    if (alpha == largest).all():
        return np.full((height, width), largest, alpha.dtype)
    # Pillow resizes 8 bits in place of 32; 16 bits only as floating-point numbers.
    image = Image.fromarray(alpha if alpha.dtype == np.uint8 else alpha.astype(np.float32))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    if alpha.dtype == np.uint8:
        return resized
    rounded = np.rint(resized)
    return np.clip(rounded, 0, largest, out=rounded).astype(alpha.dtype)
