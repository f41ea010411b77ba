"""LKFN, the large kernel frequency-enhanced network.

Team ZHEstar, report section 4.7. BSRN (Li et al.) with partial large kernels and attention in the frequency domain.

    fea_conv        the image four times, 12 -> C, BSConv  --------.
    B1 ... B8       LKFB                                           |
    c1              1x1 over the eight outputs, 8 C -> C, GELU     |
    c2              BSConv                                         |
    +  <-----------------------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle

    LKFB    distillation (see `Distillation`) with partial large kernels, frequency attention, 1x1, layer norm, + input
    partial large kernel        depthwise 5x5 (dilated by 3 in the third) of half the channels, 1x1 over all, GELU
    frequency attention         x * inverse FFT of (z + MLP(z)) with z = FFT of x

Particular: one and the same MLP of 1x1 convolutions sees the real and the imaginary part. FFTs run in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esr_kernels.modules.arguments import positive

from .base import Network
from .distillation import Distillation
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _PartialLargeKernel(nn.Module):
    def __init__(self, layers: Layers, c: int, dilation: int) -> None:
        super().__init__()
        self.pdw = layers.depthwise_conv(c // 2, 5, dilation=dilation)
        self.pw = layers.conv1x1(c, c, bias=False, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.pw([self.pdw(a), b])


class _FrequencyAttention(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        leaky = {"activation": "leaky_relu", "negative_slope": 0.2}
        self.conv_layer1 = layers.conv1x1(c, c // 2, **leaky)
        self.conv_layer2 = layers.conv1x1(c // 2, c // 2, **leaky)
        self.conv_layer3 = layers.conv1x1(c // 2, c)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x  # no FFT takes it
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        z = torch.fft.rfft2(exact, norm="ortho")
        parts = []
        for part in (z.real, z.imag):
            enhanced = self.conv_layer3(self.conv_layer2(self.conv_layer1(part.to(x.dtype))))
            parts.append(part + enhanced)
        attention = torch.fft.irfft2(torch.complex(*parts), s=x.shape[2:], norm="ortho")
        return x * attention.to(x.dtype)


class _LKFB(Distillation):
    def __init__(self, layers: Layers, c: int) -> None:
        def partial(j: int) -> nn.Module:
            return _PartialLargeKernel(layers, c, dilation=3 if j == 3 else 1)

        super().__init__(layers, c, partial, layers.bsconv(c, c // 2, activation="gelu"))
        self.atten = _FrequencyAttention(layers, c)
        self.c6 = layers.conv1x1(c, c)
        self.pixel_norm = layers.pixel_norm(c)

    def refine(self, conv: nn.Module, t: Tensor) -> Tensor:
        return conv(t)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c6(self.atten(self.distill(x)))
        return self.pixel_norm(y) + x


class LKFN(Network):
    """LKFN (report section 4.7).

    Args:
        channels: width of the body, C, even.
        num_blocks: LKFBs, at least 1.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, r H, r W], not clamped.
    """

    name = "lkfn"

    def __init__(self, *, channels: int = 28, num_blocks: int = 8, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        if channels % 2:
            raise ValueError(f"channels: must be even, got {channels}")
        self.scale, self.num_blocks = upscale, num_blocks
        self.fea_conv = self.kit.bsconv(12, channels)
        for i in range(1, num_blocks + 1):
            self.add_module(f"B{i}", _LKFB(self.kit, channels))
        self.c1 = self.kit.conv1x1(num_blocks * channels, channels, activation="gelu")
        self.c2 = self.kit.bsconv(channels, channels)
        self.upsampler = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.fea_conv(x.repeat(1, 4, 1, 1))
        outputs: list[Tensor] = []
        for i in range(1, self.num_blocks + 1):
            outputs.append(self.get_submodule(f"B{i}")(outputs[-1] if outputs else shallow))
        return self.upsampler(self.c2(self.c1(outputs)) + shallow)


class PlainLKFN(LKFN):
    """`LKFN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="lkfn",
        title="LKFN",
        team="ZHEstar",
        team_id=3,
        section="4.7",
        parameters=89_676,
        flops=5_806_309_376,
        table1=TABLE1[3],
    ),
    LKFN,
    PlainLKFN,
)
