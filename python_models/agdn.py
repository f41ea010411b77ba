"""AGDN, the attention guidance distillation network.

Team XJU_100th Ann, report section 4.5.

    x - mean
    fea_conv        3 -> C  -------------------------------------.
    B1 ... B4       AGDB                                         |
    c1              1x1 over the four outputs, 4 C -> C, GELU    |
    c2              BSConv                                       |
    +  <---------------------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle, + mean

    AGDB    distillation (see `Distillation`), then three attentions and + input:
    MVSA    t + t * `MultiscaleGate`(t)         over space
    RCCA    of u = GELU(depthwise 3x3): sigma (u - GELU(1x1 to one channel)) + CCA(u), + its input
    SGSA    attention between the channels of a head, ReLU instead of softmax, then `GDFN`

Particular: convolutions reflect at the border. SGSA works in overlapping windows of 96 x 96 at most, averaged where
they overlap (the test-time local converter of Chu et al.). The published code takes one image; this one takes batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from esr_kernels.functional import decomposes
from esr_kernels.modules import CCA, GDFN, ElementScale, Level, MultiscaleGate
from esr_kernels.modules.arguments import positive

from .base import Network
from .distillation import Distillation
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1

_HEAD = 8  # channels
_WINDOW = 96
_LEVELS = (Level(1, pool=5, padding=1, variance_number=4), Level(2, pool=7, padding=1, variance_number=3))


class _MVSA(nn.Module):
    """Multi-level variance-aware spatial attention."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        gate = MultiscaleGate(c, c // 4, _LEVELS, conv1x1=layers.conv1x1, conv=layers.bsconv)
        self.body = nn.Sequential(gate)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x) + x


class _RCCA(nn.Module):
    """Reallocated contrast-aware channel attention."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.dwconv = layers.depthwise_conv(c, activation="gelu")
        self.decompose = layers.conv1x1(c, 1, activation="gelu")
        self.sigma = ElementScale(c)
        self.cca = CCA(c, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.dwconv(x)
        return self.sigma(u - self.decompose(u)) + self.cca(u) + x


def _starts(size: int) -> list[int]:
    """Where the windows over `size` pixels begin."""
    count = (size - 1) // _WINDOW + 1
    if count == 1:
        return [0]
    step = ceil((size - _WINDOW) / (count - 1) - 1e-8)
    return [min(i * step, size - _WINDOW) for i in range(count)]


def _in_windows(qkv: Tensor, total: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of what `attend` makes of an image's windows, where they overlap; `total` is zeros."""
    height, width = total.shape[2:]
    count = qkv.new_zeros(1, 1, height, width)
    for top, left in product(_starts(height), _starts(width)):
        window = (..., slice(top, top + _WINDOW), slice(left, left + _WINDOW))
        total[window] += attend(qkv[window])
        count[window] += 1
    return total / count


def _is_one_window(height: int, width: int) -> bool:
    return height <= _WINDOW and width <= _WINDOW


# An operator, whose windows are cut for the size at hand: a graph of the network then is good for every size.
torch.library.define("esr_models::channel_attention", "(Tensor qkv, Tensor temperature) -> Tensor")


def _channel_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """The attention of `_ChannelAttention`, [N, 3 C, H, W] -> [N, C, H, W]: cosines from products and lengths."""
    n, c, height, width = qkv.shape

    def attend(part: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (-1, _HEAD)) for t in part.chunk(3, 1))
        of_q, of_k = (torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp_min(1e-12) for t in (q, k))
        cosines = q @ k.mT / (of_q @ of_k.mT)
        return (F.relu(cosines * temperature) @ v).reshape(n, c // 3, *part.shape[2:])

    if _is_one_window(height, width):
        return attend(qkv)
    return _in_windows(qkv, qkv.new_zeros(n, c // 3, height, width), attend)


torch.library.impl("esr_models::channel_attention", "CompositeExplicitAutograd", _channel_attention)


@torch.library.register_fake("esr_models::channel_attention")
def _(qkv: Tensor, temperature: Tensor) -> Tensor:
    n, c, height, width = qkv.shape
    return qkv.new_empty(n, c // 3, height, width)


@register_flop_formula(torch.ops.esr_models.channel_attention)
def _flops(qkv: Sequence[int], temperature: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Of the products of queries with keys and of their cosines with values."""
    n, c, height, width = qkv
    pixels = [min(size, _WINDOW) * len(_starts(size)) for size in (height, width)]
    return 2 * 2 * n * (c // 3) * _HEAD * pixels[0] * pixels[1]


class _ChannelAttention(nn.Module):
    """Restormer's transposed attention, sparse: ReLU of the scaled cosines of channels, in windows."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.plain = layers is PLAIN
        self.temperature = nn.Parameter(torch.ones(c // _HEAD, 1, 1))
        self.qkv = layers.conv1x1(c, 3 * c, bias=False)
        self.qkv_dwconv = layers.depthwise_conv(3 * c, bias=False)
        self.project_out = layers.conv1x1(c, c, bias=False)

    def attend(self, qkv: Tensor) -> Tensor:
        n, c, height, width = qkv.shape
        heads = c // (3 * _HEAD)
        q, k, v = (t.reshape(n, heads, _HEAD, height * width) for t in qkv.chunk(3, 1))
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (F.relu(cosines * self.temperature) @ v).reshape(n, c // 3, height, width)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x))
        if not (self.plain or decomposes() or (torch.is_grad_enabled() and qkv.requires_grad)):
            return self.project_out(torch.ops.esr_models.channel_attention(qkv, self.temperature), residual)
        height, width = int(x.shape[2]), int(x.shape[3])
        if _is_one_window(height, width):
            return self.project_out(self.attend(qkv), residual)
        return self.project_out(_in_windows(qkv, torch.zeros_like(x), self.attend), residual)


class _SGSA(nn.Module):
    """Sparse global self-attention."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.norm3 = nn.ModuleDict({"body": layers.layer_norm2d(c, 1e-5)})
        self.norm4 = nn.ModuleDict({"body": layers.layer_norm2d(c, 1e-5)})
        self.restormer_attn = _ChannelAttention(layers, c)
        self.restormer_ffn = GDFN(c, 2 * c, conv1x1=layers.conv1x1, depthwise_conv=layers.depthwise_conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.restormer_attn(self.norm3["body"](x), x)
        return self.restormer_ffn(self.norm4["body"](x), x)


class _AGDB(Distillation):
    def __init__(self, layers: Layers, c: int) -> None:
        half = c // 2
        last = nn.Conv2d(c, half, 3, padding=1, groups=half)
        super().__init__(layers, c, lambda _: layers.bsconv(c, c, padding_mode="reflect", activation="gelu"), last)
        self.esa = _MVSA(layers, c)
        self.cca = _RCCA(layers, c)
        self.ea = _SGSA(layers, c)

    def refine(self, conv: nn.Module, t: Tensor) -> Tensor:
        return conv(t, t, "pre")

    def last(self, t: Tensor) -> Tensor:
        return F.gelu(self.c4(t))

    def forward(self, x: Tensor) -> Tensor:
        return self.ea(self.cca(self.esa(self.distill(x)))) + x


class AGDN(Network):
    """AGDN (report section 4.5).

    Args:
        channels: width of the body, C, a multiple of 8.
        num_blocks: AGDBs, at least 1.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "agdn"
    minimum_size = 15

    def __init__(self, *, channels: int = 24, num_blocks: int = 4, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        if channels % _HEAD:
            raise ValueError(f"channels: must be a multiple of {_HEAD}, got {channels}")
        self.scale, self.num_blocks = upscale, num_blocks
        self.set_mean()
        self.fea_conv = self.kit.conv3x3(3, channels)
        for i in range(1, num_blocks + 1):
            self.add_module(f"B{i}", _AGDB(self.kit, channels))
        self.c1 = self.kit.conv1x1(num_blocks * channels, channels, activation="gelu")
        self.c2 = self.kit.bsconv(channels, channels, padding_mode="reflect")
        self.upsampler = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.fea_conv(x - self.mean)
        outputs: list[Tensor] = []
        for i in range(1, self.num_blocks + 1):
            outputs.append(self.get_submodule(f"B{i}")(outputs[-1] if outputs else shallow))
        return self.upsampler(self.c2(self.c1(outputs)) + shallow) + self.mean


class PlainAGDN(AGDN):
    """`AGDN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="agdn",
        title="AGDN",
        team="XJU_100th Ann",
        team_id=31,
        section="4.5",
        parameters=69_272,
        flops=4_387_685_760,
        table1=TABLE1[31],
    ),
    AGDN,
    PlainAGDN,
)
