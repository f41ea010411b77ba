"""DVMSR, a vision Mamba distilled from a larger one.

Team BlingBling, report section 4.24; Lei et al., "DVMSR: Distillated Vision Mamba for Efficient Super-Resolution".

    x - mean
    conv_first      3 -> C  ------------------------------------------.
    patch_embed     pixels in raster order as tokens, layer norm      |
    layers.0 ... layers.3   RSSB: twice Mamba(norm(t)), conv 3x3,     |
                            + input                                   |
    norm_f, conv_after_body     layer norm, C -> C                    |
    +  <--------------------------------------------------------------'
    upsample        C -> 3 r r, pixel shuffle, + mean

Particular: there is no residual around a Mamba block, the published code drops it. The recurrence runs over the whole
image in raster order, one direction: an output pixel depends on all pixels before it. Table 1's FLOPs lack everything
inside Mamba but its first projection: fvcore does not see into the published fused function.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register

_STATE, _KERNEL, _EXPAND = 16, 4, 2


class _Mamba(nn.Module):
    """Gu and Dao's block on tokens [N, L, C]."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.conv, self.scan = layers.causal_conv, layers.selective_scan
        inner, self.rank = _EXPAND * c, -(-c // 16)
        self.in_proj = nn.Linear(c, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, _KERNEL, padding=_KERNEL - 1, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * _STATE, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, _STATE + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.conv(x, self.conv1d)
        dt, b, c = self.x_proj(x).split([self.rank, _STATE, _STATE], -1)
        # Rates of decay are powers of e: never in half precision.
        a = -self.A_log.to(torch.float64 if x.dtype == torch.float64 else torch.float32).exp()
        return self.out_proj(self.scan(x, dt, self.dt_proj, a, b, c, self.D, z))


class _Block(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.mixer = _Mamba(layers, c)

    def forward(self, t: Tensor) -> Tensor:
        return self.mixer(self.norm(t))


class _RSSB(nn.Module):
    """Residual state space block, on maps [N, C, H, W]."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.Sequential(_Block(layers, c), _Block(layers, c))})
        self.conv = layers.conv3x3(c, c)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = self.residual_group["blocks"](tokens).transpose(1, 2).reshape(x.shape)
        return self.conv(y, residual=x)


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class DVMSR(Network):
    """DVMSR (report section 4.24).

    Args:
        channels: width of the body, C.
        num_layers: RSSBs, at least 1.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, r H, r W], not clamped.
    """

    name = "dvmsr"

    def __init__(self, *, channels: int = 60, num_layers: int = 4, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_layers=num_layers, upscale=upscale)
        self.scale = upscale
        self.set_mean()
        self.conv_first = self.kit.conv3x3(3, channels)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(channels)})
        self.layers = nn.Sequential(*(_RSSB(self.kit, channels) for _ in range(num_layers)))
        self.norm_f = nn.LayerNorm(channels)
        self.conv_after_body = self.kit.conv3x3(channels, channels)
        self.upsample = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_first(x - self.mean)
        y = self.layers(_normalized(self.patch_embed["norm"], shallow))
        y = self.conv_after_body(_normalized(self.norm_f, y), residual=shallow)
        return self.upsample(y) + self.mean


class PlainDVMSR(DVMSR):
    """`DVMSR` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="dvmsr",
        title="DVMSR",
        team="BlingBling",
        team_id=7,
        section="4.24",
        parameters=424_428,
        flops=20_168_048_640,
        table1={
            "psnr_val": 26.93,
            "psnr_test": 27.04,
            "runtime_val_ms": 40.75,
            "runtime_test_ms": 34.63,
            "runtime_ms": 37.69,
            "params_m": 0.424,
            "flops_g": 20.17,
            "score_runtime": 604.72,
            "score_params": 14.51,
            "score_flops": 7.77,
            "score": 426.64,
            "rank": 22,
        },
    ),
    DVMSR,
    PlainDVMSR,
)
