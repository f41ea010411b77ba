"""HARN, the hierarchical attention residual network.

Team PiXupt, report section 4.4.

    x - mean
    conv_shallow    3 -> C  ------------------------------------.
    bsc_layer.0 ... bsc_layer.3     HADB                        |
    c               1x1 over the four outputs, 4 C -> C         |
    conv_before_upsample    HSRB without activations, 1x1       |
    +  <--------------------------------------------------------'
    upsample        C -> 3 r r, pixel shuffle, + mean

    HADB    distillation (see `Distillation`) with HSRB, HSAM, `EnhancedCCA`, + input
    HSRB    1x1, then four quarters of the channels through depthwise kernels of several shapes, each after the
            previous one's result was added
    HSAM    GELU, attention, depthwise 3x3, + input; the attention of blocks 0 to 2 splits into four quarters that
            attend in windows of 32x32, 8x32, 32x8 and 8x32, each after a gated recurrent unit has merged the previous
            one's result; that of block 3 is a `MultiscaleGate`

Particular: block 1 rolls the padded map by half a window, without a mask; maps are padded by zeros to whole windows.
Table 1's FLOPs lack the published network's convolutions with padding "same", which fvcore does not see: it counts 9.84
of 10.96 G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import Level, MultiscaleGate
from esr_kernels.modules.arguments import positive

from .base import Network
from .distillation import Distillation, EnhancedCCA
from .layers import PLAIN, Layers, pad_same
from .registry import ModelCard, register

_WINDOWS = ((32, 32), (8, 32), (32, 8), (8, 32))
_ROLLED_BLOCK, _GATE_BLOCK = 1, 3
_BLOCKS = 4
_LEVELS = (Level(0, pool=3, padding=1), Level(1, pool=5, padding=0), Level(2, pool=7, padding=1, variance_number=3))


class _Hierarchy(nn.Module):
    """Depthwise convolutions of four quarters of the channels, one after the other."""

    def __init__(self, layers: Layers, c: int, activation: str) -> None:
        super().__init__()
        q = c // 4
        self.conv2_1 = layers.depthwise_conv(q, activation=activation)
        self.conv2_2 = layers.depthwise_conv(q, (5, 3), activation=activation)
        self.conv2_3 = layers.depthwise_conv(q, (3, 5), activation=activation)
        self.conv2_4 = nn.Sequential(layers.depthwise_conv(q), layers.depthwise_conv(q, activation=activation))

    def hierarchy(self, x: Tensor) -> list[Tensor]:
        """Four tensors [N, C / 4, H, W]."""
        a, b, c, d = x.chunk(4, 1)
        y1 = self.conv2_1(a)
        y2 = self.conv2_2(b + y1)
        y3 = self.conv2_3(c + y2)
        return [y1, y2, y3, self.conv2_4(d + y3)]


class _HSRB(_Hierarchy):
    """Hierarchical separable residual block."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__(layers, c, "gelu")
        self.conv1 = layers.conv1x1(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(torch.cat(self.hierarchy(self.conv1(x)), 1) + x)


class _Reconstruction(_Hierarchy):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__(layers, c, "none")
        self.conv1 = layers.conv1x1(c, c)
        self.conv1x1_2 = layers.conv1x1(c, c)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.conv1x1_2(F.gelu(torch.cat(self.hierarchy(self.conv1(x)), 1)), residual)


class _MixedFeatures(_Hierarchy):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.hierarchy(x), 1)


class _MLP(nn.Module):
    def __init__(self, layers: Layers, c: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = layers.conv1x1(c, hidden)
        self.dwc1 = _MixedFeatures(layers, hidden, "gelu")
        self.fc2 = layers.conv1x1(hidden, c)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(F.gelu(self.dwc1(x) + x), residual)


class _WindowAttention(nn.Module):
    """Attention of one head in windows, with depthwise 5x5 convolutions in place of position embeddings."""

    def __init__(self, layers: Layers, c: int, window: tuple[int, int], rolled: bool) -> None:
        super().__init__()
        self.kit, self.window, self.scale = layers, window, c**-0.5
        self.shift = (window[0] // 2, window[1] // 2) if rolled else (0, 0)
        self.proj_qk = layers.conv1x1(c, 2 * c)
        self.proj_v = layers.conv1x1(c, c)
        self.lepe_v = layers.depthwise_conv(c, 5)
        self.proj_q_5x5 = layers.depthwise_conv(c, 5)
        self.proj_k_5x5 = layers.depthwise_conv(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (down, right) = self.window, self.shift
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % width, 0, -h % height))
        if down or right:
            x = x.roll((-down, -right), (2, 3))
        q, k = self.proj_qk(x).chunk(2, 1)
        v = self.proj_v(x)
        lepe = self.lepe_v(v)
        q, k = self.proj_q_5x5(q) + lepe, self.proj_k_5x5(k) + lepe
        y = self.kit.window_attention(q, k, v, self.window, 1, scale=self.scale, residual=lepe)
        if down or right:
            y = y.roll((down, right), (2, 3))
        return y[:, :, :h, :w]


class _RecurrentGate(nn.Module):
    """Gated recurrent unit of 1x1 convolutions."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.gated_reset = layers.conv1x1(2 * c, c)
        self.gated_update = layers.conv1x1(2 * c, c)
        self.gated_fusion = layers.conv1x1(2 * c, c)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        reset = self.gated_reset([x, hidden]).sigmoid()
        update = self.gated_update([x, hidden]).sigmoid()
        fusion = self.gated_fusion([x, hidden * reset]).tanh()
        return (1 - update) * hidden + update * fusion


class _HierarchicalAttention(nn.Module):
    def __init__(self, layers: Layers, c: int, rolled: bool) -> None:
        super().__init__()
        self.norm1 = layers.layer_norm2d(c)
        self.proj1 = layers.conv1x1(c, 2 * c)
        for i, window in enumerate(_WINDOWS, 1):
            self.add_module(f"attn{i}", _WindowAttention(layers, c // 2, window, rolled))
        self.gate_layer = _RecurrentGate(layers, c // 2)
        self.proj = layers.conv1x1(2 * c, c)
        self.norm2 = layers.layer_norm2d(c)
        self.mlp = _MLP(layers, c, 2 * c)

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for i, part in enumerate(self.proj1(self.norm1(x)).chunk(4, 1), 1):
            merged = self.gate_layer(part, outputs[-1]) if outputs else part
            outputs.append(self.get_submodule(f"attn{i}")(merged))
        x = self.proj(outputs, x)
        return self.mlp(self.norm2(x), x)


class _Swin(nn.Module):
    def __init__(self, layers: Layers, c: int, rolled: bool) -> None:
        super().__init__()
        self.swin_body = nn.Sequential(_HierarchicalAttention(layers, c, rolled))

    def forward(self, x: Tensor) -> Tensor:
        return self.swin_body(x)


class _MDSA(MultiscaleGate):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__(c, c // 4, _LEVELS, conv1x1=layers.conv1x1, conv=layers.bsconv)

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


class _HSAM(nn.Module):
    """Hierarchical self-attention module."""

    def __init__(self, layers: Layers, c: int, block: int) -> None:
        super().__init__()
        attention = _MDSA(layers, c) if block == _GATE_BLOCK else _Swin(layers, c, rolled=block == _ROLLED_BLOCK)
        self.body = nn.Sequential(nn.GELU(), attention, layers.depthwise_conv(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class _HADB(Distillation):
    """Hierarchical attention distillation block."""

    def __init__(self, layers: Layers, c: int, block: int) -> None:
        last = layers.bsconv(c, c // 2, padding_mode="reflect", activation="gelu")
        super().__init__(layers, c, lambda _: _HSRB(layers, c), last)
        self.esa = _HSAM(layers, c, block)
        self.cca = EnhancedCCA(layers, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.cca(self.esa(self.distill(x))) + x


class HARN(Network):
    """HARN (report section 4.4).

    Args:
        channels: width of the body, C, a multiple of 4.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "harn"
    minimum_size = 15

    def __init__(self, *, channels: int = 20, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, upscale=upscale)
        if channels % 4:
            raise ValueError(f"channels: must be a multiple of 4, got {channels}")
        self.scale = upscale
        self.set_mean()
        self.conv_shallow = self.kit.conv3x3(3, channels)
        self.bsc_layer = nn.ModuleList(_HADB(self.kit, channels, block) for block in range(_BLOCKS))
        self.c = self.kit.conv1x1(_BLOCKS * channels, channels)
        self.conv_before_upsample = nn.Sequential(_Reconstruction(self.kit, channels))
        self.upsample = nn.Sequential(self.kit.upsampler(channels, 3, upscale))

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_shallow(x - self.mean)
        outputs: list[Tensor] = []
        for block in self.bsc_layer:
            outputs.append(block(outputs[-1] if outputs else shallow))
        (reconstruction,) = self.conv_before_upsample
        return self.upsample(reconstruction(self.c(outputs), shallow)) + self.mean


class PlainHARN(HARN):
    """`HARN` in plain PyTorch."""

    kit = PLAIN

    def __init__(self, *, channels: int = 20, upscale: int = 4) -> None:
        super().__init__(channels=channels, upscale=upscale)
        tail = self.get_submodule("upsample.0.0")
        pad_same(self.conv_shallow, tail, self.get_submodule(f"bsc_layer.{_GATE_BLOCK}.esa.body.2"))
        for module in self.modules():
            if isinstance(module, _Hierarchy):
                pad_same(module.conv2_1, module.conv2_2, module.conv2_3, *module.conv2_4)
            elif isinstance(module, EnhancedCCA):
                pad_same(module.body[0], module.body[3])


register(
    ModelCard(
        name="harn",
        title="HARN",
        team="PiXupt",
        team_id=41,
        section="4.4",
        parameters=59_577,
        flops=9_839_672_620,
        table1={
            "psnr_val": 26.91,
            "psnr_test": 27.0,
            "runtime_val_ms": 52.91,
            "runtime_test_ms": 44.21,
            "runtime_ms": 48.56,
            "params_m": 0.06,
            "flops_g": 9.84,
            "score_runtime": 3834.6,
            "score_params": 1.46,
            "score_flops": 2.72,
            "score": 2684.9,
            "rank": 23,
        },
    ),
    HARN,
    PlainHARN,
)
