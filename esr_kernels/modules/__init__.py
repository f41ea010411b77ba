"""Building blocks of the challenge's networks, with the published state-dict names."""

from .bsconv import BSConv, BSConvS
from .cca import CCA
from .collapsible import RBSB, CollapsibleConv
from .conv import Conv1x1, Conv3x3, DepthwiseConv
from .conv3xc import Conv3XC
from .conv_bn import ConvBN
from .ecb import ECB, RepBlock
from .esa import ESA
from .gdfn import GDFN
from .mbrb import MBRB
from .multiscale import Level, MultiscaleGate, local_variance
from .norm import LayerNorm2d, PixelNorm
from .repconv1x1 import RepConv1x1
from .repmbconv import RepMBConv, RepMBConvPoint, RepMBConvSE
from .rlfb import RLFB
from .rrrb import ERB, RRRB
from .safm import SAFM, ModulatingConv1x1
from .scale import ElementScale
from .spab import SPAB
from .upsampler import Conv3x3PixelShuffle, PixelShuffleUpsampler

__all__ = [
    "CCA",
    "ECB",
    "ERB",
    "ESA",
    "GDFN",
    "MBRB",
    "RBSB",
    "RLFB",
    "RRRB",
    "SAFM",
    "SPAB",
    "BSConv",
    "BSConvS",
    "CollapsibleConv",
    "Conv1x1",
    "Conv3XC",
    "Conv3x3",
    "Conv3x3PixelShuffle",
    "ConvBN",
    "DepthwiseConv",
    "ElementScale",
    "LayerNorm2d",
    "Level",
    "ModulatingConv1x1",
    "MultiscaleGate",
    "PixelNorm",
    "PixelShuffleUpsampler",
    "RepBlock",
    "RepConv1x1",
    "RepMBConv",
    "RepMBConvPoint",
    "RepMBConvSE",
    "local_variance",
]
