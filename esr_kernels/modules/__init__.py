"""Building blocks of the challenge's networks, with the published state-dict names."""

from .bsconv import BSConv
from .conv import Conv1x1, Conv3x3, DepthwiseConv
from .conv3xc import Conv3XC
from .ecb import ECB, RepBlock
from .esa import ESA
from .gdfn import GDFN
from .norm import LayerNorm2d
from .rlfb import RLFB
from .safm import SAFM
from .scale import ElementScale
from .spab import SPAB
from .upsampler import PixelShuffleUpsampler

__all__ = [
    "ECB",
    "ESA",
    "GDFN",
    "RLFB",
    "SAFM",
    "SPAB",
    "BSConv",
    "Conv1x1",
    "Conv3XC",
    "Conv3x3",
    "DepthwiseConv",
    "ElementScale",
    "LayerNorm2d",
    "PixelShuffleUpsampler",
    "RepBlock",
]
