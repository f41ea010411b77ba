"""Building blocks of the challenge's networks, with the published state-dict names."""

from .conv import Conv1x1, Conv3x3
from .conv3xc import Conv3XC
from .esa import ESA
from .rlfb import RLFB
from .spab import SPAB
from .upsampler import PixelShuffleUpsampler

__all__ = ["ESA", "RLFB", "SPAB", "Conv1x1", "Conv3XC", "Conv3x3", "PixelShuffleUpsampler"]
