"""How the kernels see feature maps, and what decides the arithmetic of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import tf32_allowed
from .recording import dense

# Offsets inside one image are 32-bit up to here; a block of offsets may go beyond by its size.
LARGEST_OFFSET = 2**31 - 2**16


class Map(NamedTuple):
    """A feature map [N, channels, height, width] the kernels can address.

    Attributes:
        tensor: its memory, from the first element.
        pitch: elements from pixel to pixel where channels lie together; 0 for planes.
        batch: from image to image, in pixels where channels lie together, else in elements.
        channels, height, width: of the map.
        shuffle: r where the memory holds the pixel-shuffled image, r times as high and wide, else 1.
    """

    tensor: Tensor
    pitch: int
    batch: int
    channels: int
    height: int
    width: int
    shuffle: int = 1

    @property
    def span(self) -> int:
        """Elements from the first of an image to its last, at most."""
        return self.height * self.width * (self.pitch or self.channels)

    @property
    def stored(self) -> int:
        """Channels that are written: with the zeros that fill it up, where its pixels have room for them."""
        columns = padded(self.channels)
        return columns if self.pitch >= columns else self.channels


class _Nothing(NamedTuple):
    """In place of a map that is not there."""

    tensor: None = None
    pitch: int = 0
    batch: int = 0
    channels: int = 0
    shuffle: int = 1


NOTHING = _Nothing()


def as_map(x: Tensor) -> Map:
    """`x` as a map; a copy where neither its channels nor its planes are dense."""
    n, c, h, w = x.shape
    sn, sc, sh, sw = x.stride()
    if (w == 1 or sw == 1) and (h == 1 or sh == w) and (c == 1 or sc == h * w):
        return Map(x, 0, sn, c, h, w)
    pitch = sw if w > 1 else sh if h > 1 else c
    if (c == 1 or sc == 1) and pitch >= c and (h == 1 or w == 1 or sh == w * pitch) and (n == 1 or sn % pitch == 0):
        return Map(x, pitch, sn // pitch, c, h, w)
    return as_map(dense(x))


def shuffled(image: Tensor, r: int) -> Map:
    """The image [N, C, H r, W r] as the map [N, C r r, H, W] that pixel_shuffle would turn into it."""
    _, c, h, w = image.shape
    image = dense(image)
    if r == 1:
        return as_map(image)
    return Map(image, 0, c * h * w, c * r * r, h // r, w // r, r)


def padded(channels: int) -> int:
    """Channels rounded up to what the matrix instructions take."""
    return -(-channels // 16) * 16


def wide(*maps: Map | None, largest: int = 0) -> bool:
    """Whether offsets inside an image, or numbers up to `largest`, need 64 bits."""
    return largest > LARGEST_OFFSET or any(m is not None and m.span > LARGEST_OFFSET for m in maps)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: "tf32" where PyTorch allows it for convolutions, else "tf32x3".

    The latter splits each factor in two tf32 numbers, which is as accurate as float32 and uses tensor cores too.
    """
    if dtype != torch.float32:
        return "tf32"  # has no effect on half types
    return "tf32" if tf32_allowed() else "tf32x3"
