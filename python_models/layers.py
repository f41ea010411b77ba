"""What a network is made of: the same wiring from fused layers, or from plain PyTorch ones.

Networks whose data flow is more than a list of convolutions are written once, with `self.kit`: `FUSED` in the
network, `PLAIN` in its twin, which then computes what the published network does in the steps it does it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels import functional
from esr_kernels.modules import (
    ESA,
    RLFB,
    BSConv,
    BSConvS,
    Conv1x1,
    Conv3x3,
    Conv3x3PixelShuffle,
    DepthwiseConv,
    LayerNorm2d,
    ModulatingConv1x1,
    PixelNorm,
    PixelShuffleUpsampler,
)
from esr_kernels.reparam import Reparameterized

from .plain_blocks import (
    PlainBSConv,
    PlainBSConvS,
    PlainConv1x1,
    PlainConv3x3,
    PlainConv3x3PixelShuffle,
    PlainDepthwiseConv,
    PlainESA,
    PlainLayerNorm2d,
    PlainModulatingConv1x1,
    PlainPixelNorm,
    PlainRLFB,
    PlainUpsampler,
    plain_attention,
    plain_causal_conv,
    plain_modulate,
    plain_rep,
    plain_selective_scan,
    plain_window_attention,
)

Make = Callable[..., Any]


@dataclass(frozen=True)
class Layers:
    """Constructors with the arguments and the state-dict names of the fused modules.

    `rep` takes a form of `Reparameterized` first and makes a convolution of it, whose twin is the folded one.
    """

    conv3x3: Make
    conv1x1: Make
    bsconv: Make
    bsconv_s: Make
    depthwise_conv: Make
    layer_norm2d: Make
    pixel_norm: Make
    conv3x3_pixel_shuffle: Make
    upsampler: Make
    esa: Make
    rlfb: Make
    rep: Make
    attention: Callable[..., Tensor]
    modulating_conv1x1: Make
    pool: Callable[..., Tensor]
    modulate: Callable[..., Tensor]
    causal_conv: Callable[..., Tensor]
    selective_scan: Callable[..., Tensor]
    # On pixels: of maps [N, C, H, W] in the fused kit, of tokens [N, H, W, C] in the plain one.
    linear: Make
    token_norm: Make
    window_attention: Callable[..., Tensor]


class PixelLinear(nn.Linear):
    """`nn.Linear` of the channels of every pixel of [N, C, H, W] (one or several, concatenated), with activation and
    residual."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, activation: str = "none") -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, xs: Tensor | Sequence[Tensor], residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        weight = self.weight[:, :, None, None]
        return functional.conv1x1(xs, weight, self.bias, activation=self.activation, residual=residual)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T + bias) v over tokens, [B, heads, T, D]; in elementary steps while `torch.jit` traces."""
    if torch.jit.is_tracing():
        return plain_attention(q, k, v, scale, bias)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def _causal_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`plain_causal_conv` on a row of pixels, by a filter that has zeros for the tokens to come."""
    weight = F.pad(conv.weight, (0, conv.kernel_size[0] - 1)).unsqueeze(2)
    row = x.transpose(1, 2).unsqueeze(2)
    return functional.depthwise_conv(row, weight, conv.bias, activation="silu").squeeze(2).transpose(1, 2)


def _selective_scan(
    u: Tensor, dt: Tensor, dt_proj: nn.Linear, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor
) -> Tensor:
    """Arguments of `plain_selective_scan`."""
    delta = F.linear(dt, dt_proj.weight)
    return functional.selective_scan(u, delta, a, b, c, d, z=z, delta_bias=dt_proj.bias, delta_softplus=True)


def _rep(form: Callable[..., Reparameterized], *channels: int, **options: Any) -> Reparameterized:
    return form(*channels, **options)


FUSED = Layers(
    conv3x3=Conv3x3,
    conv1x1=Conv1x1,
    bsconv=BSConv,
    bsconv_s=BSConvS,
    depthwise_conv=DepthwiseConv,
    layer_norm2d=LayerNorm2d,
    pixel_norm=PixelNorm,
    conv3x3_pixel_shuffle=Conv3x3PixelShuffle,
    upsampler=PixelShuffleUpsampler,
    esa=ESA,
    rlfb=RLFB,
    rep=_rep,
    attention=_attention,
    modulating_conv1x1=ModulatingConv1x1,
    pool=functional.adaptive_max_pool,
    modulate=functional.modulate,
    causal_conv=_causal_conv,
    selective_scan=_selective_scan,
    linear=PixelLinear,
    token_norm=PixelNorm,
    window_attention=functional.window_attention,
)
PLAIN = Layers(
    conv3x3=PlainConv3x3,
    conv1x1=PlainConv1x1,
    bsconv=PlainBSConv,
    bsconv_s=PlainBSConvS,
    depthwise_conv=PlainDepthwiseConv,
    layer_norm2d=PlainLayerNorm2d,
    pixel_norm=PlainPixelNorm,
    conv3x3_pixel_shuffle=PlainConv3x3PixelShuffle,
    upsampler=PlainUpsampler,
    esa=PlainESA,
    rlfb=PlainRLFB,
    rep=plain_rep,
    attention=plain_attention,
    modulating_conv1x1=PlainModulatingConv1x1,
    pool=F.adaptive_max_pool2d,
    modulate=plain_modulate,
    causal_conv=plain_causal_conv,
    selective_scan=plain_selective_scan,
    linear=nn.Linear,
    token_norm=nn.LayerNorm,
    window_attention=plain_window_attention,
)


def pad_same(*convs: Any) -> None:
    """Write the padding as "same", as some published networks do: fvcore then does not count the convolution."""
    for conv in convs:
        conv.padding = "same"
