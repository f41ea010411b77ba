"""SPAN and SPAN-tiny.

SPAN: team XiaomiMM, rank 1, report section 4.1; Wan et al., "Swift Parameter-free Attention Network for Efficient
Super-Resolution". SPAN-tiny: team SPAN-T of Table 1, the same network with 26 channels instead of 28.

    x - mean, * 255                      [0, 1] -> about +-127
    conv_1          3 -> C  ------------------------.
    block_1 ... block_6     SPAB, C -> C            |
      |  `- out of block_1 -------------------------|
      |             mid of block_6 -----------------|
    conv_2          C -> C  ------------------------|
    conv_cat        1x1 over the four, 4C -> C  <---'
    upsampler       C -> 3 r r, pixel shuffle

Particular: no skip over the body; attention without parameters (see `SPAB`); every 3x3 convolution but the last is a
`Conv3XC`. The concatenation's fourth member is the *activated* first convolution of block 6: the report's Eq. 4 has the
output of block 5 there, but the published weights were trained with this. The output is not scaled back: the network
maps +-127 to [0, 1] by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from esr_kernels.modules import SPAB, Conv1x1, Conv3XC, PixelShuffleUpsampler
from esr_kernels.modules.arguments import positive

from .base import RGB_MEAN, Network
from .plain_blocks import PlainConv3XC, PlainSPAB, PlainUpsampler
from .registry import ModelCard, register
from .table1 import TABLE1

if TYPE_CHECKING:
    from typing_extensions import Self

IMG_RANGE = 255.0


class _Normalization(Network):
    """The image's way into the network: (x - mean) * range, or nothing where the file holds `no_norm`."""

    def _set_normalization(self, norm: bool, img_range: float, rgb_mean: Sequence[float]) -> None:
        if norm and len(rgb_mean) != self.in_channels:
            raise ValueError(
                f"norm: the mean has {len(rgb_mean)} values for {self.in_channels} input channels; use norm=False"
            )
        self.norm, self.img_range = bool(norm), float(img_range)
        if norm:
            self.set_mean(rgb_mean)
        else:
            self.register_buffer("no_norm", torch.zeros(1))

    def _normalize(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.dtype)) * self.img_range if self.norm else x


class SPAN(_Normalization):
    """SPAN (report section 4.1).

    Args:
        feature_channels: width of the body: 28 in the challenge, 26 in SPAN-tiny, 48 and 52 elsewhere.
        upscale: 1, 2, 3, 4, ...
        in_channels, out_channels: of the images.
        num_blocks: SPABs, at least 1.
        bias: whether the convolutions have one.
        norm: subtract `rgb_mean` and multiply by `img_range` first; False in files that hold a `no_norm` entry.
        img_range, rgb_mean: of `norm`; not in the checkpoint.
        deploy: folded convolutions, for inference and slim files, or the training form.
        gain: of the training form, see `Conv3XC`.

    Images [N, in_channels, H, W] in [0, 1], any size; result [N, out_channels, r H, r W], not clamped.
    """

    name = "span"

    def __init__(
        self,
        *,
        feature_channels: int = 28,
        upscale: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        num_blocks: int = 6,
        bias: bool = True,
        norm: bool = True,
        img_range: float = IMG_RANGE,
        rgb_mean: Sequence[float] = RGB_MEAN,
        deploy: bool = True,
        gain: int = 2,
    ) -> None:
        super().__init__()
        positive(feature_channels=feature_channels, upscale=upscale, num_blocks=num_blocks)
        positive(in_channels=in_channels, out_channels=out_channels)
        c = feature_channels
        self.scale, self.in_channels, self.num_blocks = upscale, in_channels, num_blocks
        # conv_1, three convolutions a block, conv_2, the upsampler's.
        self.receptive_radius = 1 + 3 * num_blocks + 1 + 1
        self._set_normalization(norm, img_range, rgb_mean)

        self.conv_1 = Conv3XC(in_channels, c, gain=gain, bias=bias, deploy=deploy)
        for i in range(1, num_blocks + 1):
            self.add_module(f"block_{i}", SPAB(c, bias=bias, deploy=deploy, gain=gain))
        self.conv_2 = Conv3XC(c, c, gain=gain, bias=bias, deploy=deploy)
        self.conv_cat = Conv1x1(4 * c, c)
        self.upsampler = PixelShuffleUpsampler(c, out_channels, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(self._normalize(x))
        first = y = mid = shallow
        for i in range(1, self.num_blocks + 1):
            block = self.get_submodule(f"block_{i}")
            if i == self.num_blocks:
                y, mid = block(y, return_mid=True)
            else:
                y = block(y)
            if i == 1:
                first = y
        deep = self.conv_2(y)
        return self.upsampler(self.conv_cat([shallow, deep, first, mid]))

    @torch.no_grad()
    def only_shallow(self) -> None:
        """Pass the first convolution's maps on to the upsampler and nothing else, for the start of a training."""
        weight = self.conv_cat.weight
        weight.zero_()
        weight[:, : weight.shape[0], 0, 0] = torch.eye(weight.shape[0])
        if self.conv_cat.bias is not None:
            self.conv_cat.bias.zero_()

    def standard(self) -> Self:
        """With the usual `img_range`, which the first convolution's weights take in."""
        if not self.norm or self.img_range == IMG_RANGE:
            return self
        with torch.no_grad():
            self.conv_1.get_parameter("eval_conv.weight").mul_(self.img_range / IMG_RANGE)
        self.img_range = IMG_RANGE
        self.options.pop("img_range", None)
        return self

    @classmethod
    def infer_options(cls, state: Mapping[str, Tensor], slim: Mapping[str, Tensor]) -> dict[str, Any]:
        first, tail = slim.get("conv_1.eval_conv.weight"), slim.get("upsampler.0.weight")
        if first is None or tail is None or first.dim() != 4 or tail.dim() != 4 or 0 in (*first.shape, *tail.shape):
            return {}
        # Images come out with as many channels as go in, unless that makes the number of rows no square.
        channels = first.shape[1]
        rows, rest = divmod(tail.shape[0], channels)
        if rest or isqrt(rows) ** 2 != rows:
            channels = next((c for c in (3, 1, 4) if isqrt(tail.shape[0] // c) ** 2 * c == tail.shape[0]), channels)
        blocks = {k.split(".")[0] for k in slim if k.startswith("block_")}
        wide = state.get("conv_1.conv.0.weight")
        return {
            "gain": 2 if wide is None else wide.shape[0] // first.shape[1],
            "feature_channels": first.shape[0],
            "upscale": isqrt(tail.shape[0] // channels),
            "in_channels": first.shape[1],
            "out_channels": channels,
            "num_blocks": max(1, len(blocks)),
            "bias": "conv_1.eval_conv.bias" in slim,
            "norm": "no_norm" not in slim,
        }


class PlainSPAN(_Normalization):
    """`SPAN` in deploy form, in plain PyTorch."""

    name = "span"

    def __init__(
        self,
        *,
        feature_channels: int = 28,
        upscale: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
        num_blocks: int = 6,
        bias: bool = True,
        norm: bool = True,
        img_range: float = IMG_RANGE,
        rgb_mean: Sequence[float] = RGB_MEAN,
    ) -> None:
        super().__init__()
        c = feature_channels
        self.scale, self.in_channels, self.num_blocks = upscale, in_channels, num_blocks
        self.receptive_radius = 3 * num_blocks + 3
        self._set_normalization(norm, img_range, rgb_mean)
        self.conv_1 = PlainConv3XC(in_channels, c, bias)
        for i in range(1, num_blocks + 1):
            self.add_module(f"block_{i}", PlainSPAB(c, bias))
        self.conv_2 = PlainConv3XC(c, c, bias)
        self.conv_cat = nn.Conv2d(4 * c, c, 1)
        self.upsampler = PlainUpsampler(c, out_channels, upscale)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.conv_1(self._normalize(x))]
        mid = outputs[0]
        for i in range(1, self.num_blocks + 1):
            y, mid = self.get_submodule(f"block_{i}")(outputs[-1])
            outputs.append(y)
        return self.upsampler(self.conv_cat(torch.cat([outputs[0], self.conv_2(outputs[-1]), outputs[1], mid], 1)))


register(
    ModelCard(
        name="span",
        title="SPAN",
        team="XiaomiMM",
        team_id=38,
        section="4.1",
        parameters=150_688,
        flops=9_833_807_872,
        table1=TABLE1[38],
    ),
    SPAN,
    PlainSPAN,
)

register(
    ModelCard(
        name="span_tiny",
        title="SPAN-tiny",
        team="SPAN-T",
        team_id=39,
        section=None,
        parameters=130_828,
        flops=8_535_015_424,
        table1=TABLE1[39],
    ),
    SPAN,
    PlainSPAN,
    feature_channels=26,
)
