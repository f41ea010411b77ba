"""Pictures read and written a few rows at a time, for those that are too large to be in memory as a whole."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, PngImagePlugin

from . import imaging
from .files import atomically
from .imaging import Array, ImageError, Picture, PngWriter

# PNG's pixels that are read in strips, as Pillow names them: channels and bits. Others, and interlaced pictures, are
# decoded as a whole: they would need all of their data for the first row, or a palette.
_STREAMED = {
    "L": (1, 8),
    "LA": (2, 8),
    "RGB": (3, 8),
    "RGBA": (4, 8),
    "I;16B": (1, 16),
    "LA;16B": (2, 16),
    "RGB;16B": (3, 16),
    "RGBA;16B": (4, 16),
}
# A pixel's bytes -> Pillow's modes to decode them by: the mode of the image, and what gives which of its bytes.
_DECODED = {
    1: ("L", ("L",)),
    2: ("LA", ("LA",)),
    3: ("RGB", ("RGB",)),
    4: ("RGBA", ("RGBA",)),
    6: ("RGB", ("RGB;16B", "RGB;16L")),
    8: ("RGBA", ("RGBA;16B", "RGBA;16L")),
}
# Entries of a picture's information that change its pixels, or may.
_LOOKED_AT = {"transparency", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}
# Bytes of a file that are decoded at once, and rows above the asked ones that stay readable.
_STRIP = 2**22
KEPT_ABOVE = 8


class Rows(Protocol):
    """A picture whose rows are read from top to bottom; attributes as those of `Picture`."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def grey(self) -> bool: ...
    @property
    def depth(self) -> int: ...
    @property
    def transparent(self) -> bool:
        """Whether any pixel is, or where only a part has been read may be, less than opaque."""
        ...

    @property
    def has_alpha(self) -> bool: ...
    @property
    def icc_profile(self) -> bytes | None: ...
    @property
    def exif(self) -> bytes | None: ...

    def read(self, top: int, bottom: int) -> Picture:
        """These rows; `top` may go back by no more than `KEPT_ABOVE` rows from one call to the next.

        Raises:
            ImageError: the file is damaged.
        """
        ...


class WholePicture:
    """`Rows` of a picture in memory."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.height, self.width, self.grey, self.depth = picture.height, picture.width, picture.grey, picture.depth
        self.has_alpha = picture.alpha is not None
        self.icc_profile, self.exif = picture.icc_profile, picture.exif

    @property
    def transparent(self) -> bool:
        return self.picture.transparent

    def read(self, top: int, bottom: int) -> Picture:
        alpha = self.picture.alpha
        return Picture(self.picture.pixels[top:bottom], None if alpha is None else alpha[top:bottom])


class PngRows:
    """`Rows` of a PNG file, of which no more than the asked rows and a few megabytes are in memory.

    Args:
        file: open for reading, and stays open.
        image: of that file, not decoded, for which `can_stream` holds.
    """

    def __init__(self, file: BinaryIO, image: PngImagePlugin.PngImageFile) -> None:
        tile, self._name = image.tile[0], file.name
        self._channels, self.depth = _STREAMED[_raw_mode(image)]
        self.width, self.height = image.size
        self.grey, self.has_alpha = self._channels < 3, self._channels in (2, 4)
        self.transparent = self.has_alpha
        self.icc_profile: bytes | None = image.info.get("icc_profile") or None
        self.exif = imaging.read_exif(image)[0] if "exif" in image.info else None
        self._bytes = self._channels * self.depth // 8  # of a pixel
        self._above = np.zeros(self.width * self._bytes, np.uint8)
        self._data = _decompressed(file, int(tile[2]) - 8)
        self._rest = b""
        self._first, self._kept = 0, np.empty((0, self.width, self._channels), np.uint8 if self.depth == 8 else ">u2")

    def read(self, top: int, bottom: int) -> Picture:
        if not self._first <= top < bottom <= self.height:
            raise ValueError(f"rows {top}..{bottom}: rows {self._first}..{self.height} are left to be read")
        try:
            first, end = max(top - KEPT_ABOVE, self._first), self._first + len(self._kept)
            parts = [self._kept[first - self._first :]]
            step = max(_STRIP // self._above.size, 1)
            while end < bottom:
                strip = self._next(min(step, self.height - end))
                if end + len(strip) > first:
                    parts.append(strip[max(first - end, 0) :])
                end += len(strip)
            self._first = first
            self._kept = np.concatenate(parts) if len(parts) > 1 else parts[0]
        except imaging.BROKEN as error:
            raise ImageError(f"{self._name}: damaged picture: {imaging.first_line(error)}") from None
        rows = self._kept[top - self._first : bottom - self._first].astype(f"u{self.depth // 8}", copy=False)
        return Picture(rows[..., :-1], rows[..., -1]) if self.has_alpha else Picture(rows)

    def _next(self, count: int) -> Array:
        """So many rows more: [count, W, C]."""
        size = count * (1 + self._above.size)
        chunks, have = [self._rest], len(self._rest)
        while have < size:
            data = next(self._data, b"")
            if not data:
                raise EOFError("image file is truncated")
            chunks.append(data)
            have += len(data)
        data = b"".join(chunks)
        self._rest = data[size:]
        # Pillow undoes the filters: in a picture that begins with the last row before these, as it is.
        framed = zlib.compress(b"\0" + self._above.tobytes() + data[:size], 0)
        mode, modes = _DECODED[self._bytes]
        planes = [np.asarray(Image.frombytes(mode, (self.width, count + 1), framed, "zip", raw)) for raw in modes]
        rows = np.stack(planes, -1) if len(planes) > 1 else planes[0]
        rows = np.ascontiguousarray(rows.reshape(count + 1, -1)[1:])
        self._above = rows[-1].copy()
        return rows.view(self._kept.dtype).reshape(count, self.width, self._channels)


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles else ""


def _chunks(file: BinaryIO, position: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, position of the data and its length, of each chunk from a position on."""
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, position + 8, length
        position += 12 + length


def _decompressed(file: BinaryIO, position: int) -> Iterator[bytes]:
    """What the IDAT chunks hold, in parts that are not empty and have no more than `_STRIP` bytes."""
    inflate = zlib.decompressobj()
    for kind, start, length in _chunks(file, position):
        if kind != b"IDAT":
            return
        for offset in range(0, length, _STRIP):
            file.seek(start + offset)
            data = file.read(min(_STRIP, length - offset))
            while data and not inflate.eof:
                part = inflate.decompress(data, _STRIP)
                data = inflate.unconsumed_tail
                if part:
                    yield part


def can_stream(file: BinaryIO, image: Image.Image) -> bool:
    """Whether a picture's rows can be read one after the other, knowing all that follows them: a PNG of 8 or 16 bits
    without palette, interlacing, orientation or a transparent colour."""
    if image.format != "PNG" or _raw_mode(image) not in _STREAMED:
        return False
    if image.info.get("interlace") or not image.info.keys().isdisjoint(_LOOKED_AT):
        return False
    if "exif" in image.info and imaging.read_exif(image)[1] != 1:
        return False
    # What comes after the pixels would be known too late.
    position = int(image.tile[0][2]) - 8  # type: ignore[attr-defined]
    return all(kind in (b"IDAT", b"IEND", b"tIME") for kind, _, _ in _chunks(file, position))


@contextmanager
def open_rows(path: Path, *, max_pixels: int = imaging.MAX_PIXELS, above: int = 0) -> Iterator[Rows]:
    """A picture's rows, of which only those in use are in memory where the format allows that.

    Args:
        path: a PNG, JPEG or WebP file.
        max_pixels: larger pictures are refused.
        above: pictures of no more pixels are decoded as a whole.

    Raises:
        FileNotFoundError, ImageError: as `imaging.read_image`, and the latter also while rows are read.
    """
    with imaging.opened(path, max_pixels) as (file, image):
        if image.size[0] * image.size[1] > above and can_stream(file, image):
            yield PngRows(file, image)  # type: ignore[arg-type]
            return
    yield WholePicture(imaging.read_image(path, max_pixels=max_pixels))


def write_png(path: Path, like: Rows, height: int, width: int, rows: Iterable[Array]) -> None:
    """Write a picture row by row, completely or not at all.

    Args:
        path: of a PNG file.
        like: a picture with the channels, depth and metadata of this one.
        height, width: of the picture.
        rows: its rows from top to bottom, some at a time: [h, W, C], alpha last.

    Raises:
        ImageError: the file cannot be written.
        Exception: of `rows`.
    """
    channels = (1 if like.grey else 3) + like.has_alpha
    parts = iter(rows)

    def write(part: Path) -> None:
        with part.open("xb") as file:
            writer = PngWriter(file, height, width, channels, like.depth, like.icc_profile, like.exif)
            for band in parts:
                writer.write(band)
            writer.close()

    try:
        atomically(path, write)
    except OSError as error:
        reason = error.strerror or imaging.first_line(error)
        raise ImageError(f"{path}: cannot be written: {reason}") from None
