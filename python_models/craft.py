"""CRAFT, a transformer with a high-frequency prior, in the team's smaller variant.

Team ACVLAB, report section 4.28; Li et al., "Feature Modulation Transformer: Cross-Refinement of Global Representation
via High-Frequency Prior for Image Super-Resolution".

    reflected to multiples of 16, x - mean
    conv_first      3 -> C  -----------------------------------------------------------.
    layers.0 ... layers.3   twice HFB(SRWAB(SRWAB(z)), HFERB(z)), conv 3x3, + input    |
    norm, conv_after_body   layer norm, C -> C                                         |
    +  <-------------------------------------------------------------------------------'
    upsample        C -> 3 r r, pixel shuffle, + mean, cropped

    SRWAB   attention in windows, 4 x 16 for half the channels and 16 x 4 for the others (every second block rolls them
            by half), + depthwise 3x3 of the values; MLP
    HFERB   3x3 of half the channels, 1x1 of the others' local maxima, 1x1 over both, + input
    HFB     attention between channels, queries from the high-frequency branch; `GDFN`

Particular: the position bias of the windows (keys `pos`) is a constant, since its layer norms see one value each, and
softmax cancels it: the keys are loaded, the mathematics is left out. The challenge ran the network with images in
0..255; its weights were trained for 0..1, where it is by far better: `create("craft", weights, data_range=1.0)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import GDFN
from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .windows import from_windows, to_windows

_SHORT, _LONG = 4, 16  # a window's sides
_WINDOWS = ((_SHORT, _LONG), (_LONG, _SHORT))
_HEAD = 8  # channels


def _relative_positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """All offsets inside a window [(2 h - 1) (2 w - 1), 2], and for each pair of its pixels the index of theirs."""
    rows, columns = torch.arange(1 - height, height), torch.arange(1 - width, width)
    offsets = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1).t().contiguous().float()
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    index = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    return offsets, index


class _PositionBias(nn.Module):
    """The published bias from offsets. Its layer norms see one value each: every offset gets the same."""

    def __init__(self, heads: int) -> None:
        super().__init__()

        def step(out: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(1), nn.ReLU(inplace=True), nn.Linear(1, out))

        self.pos_proj = nn.Linear(2, 1)
        self.pos1, self.pos2, self.pos3 = step(1), step(1), step(heads)

    def forward(self, offsets: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class _WindowAttention(nn.Module):
    def __init__(self, layers: Layers, c: int, window: tuple[int, int], rolled: bool) -> None:
        super().__init__()
        self.layers, self.window, self.heads = layers, window, c // _HEAD
        self.shift = (window[0] // 2, window[1] // 2) if rolled else (0, 0)
        self.pos = _PositionBias(self.heads)

    def bias(self, offsets: Tensor, index: Tensor) -> Tensor:
        return self.pos(offsets)[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)

    def rolled(self, qkv: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
        """In the steps of the published network: [N, 3 C, H, W] -> [N, C, H, W]."""
        down, right = self.shift
        qkv = qkv.roll((-down, -right), (2, 3)) if down or right else qkv
        q, k, v = (to_windows(t, *self.window, self.heads) for t in qkv.chunk(3, 1))
        y = ((q * _HEAD**-0.5) @ k.transpose(-2, -1) + self.bias(offsets, index)).softmax(-1) @ v
        y = from_windows(y, *self.window, qkv.shape[2], qkv.shape[3])
        return y.roll((down, right), (2, 3)) if down or right else y

    def forward(self, q: Tensor, k: Tensor, v: Tensor, residual: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
        """[N, C, H, W]; the bias is left out but where operators are counted."""
        bias = self.bias(offsets, index) if torch.jit.is_tracing() else None
        attend = self.layers.window_attention
        return attend(q, k, v, self.window, self.heads, bias=bias, residual=residual, shift=self.shift)


class _MLP(nn.Module):
    def __init__(self, layers: Layers, c: int, hidden: int) -> None:
        super().__init__()
        activation = {} if layers is PLAIN else {"activation": "gelu"}
        self.fc1 = layers.linear(c, hidden, **activation)
        self.fc2 = layers.linear(hidden, c)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Of maps."""
        return self.fc2(self.fc1(x), residual)


class _SRWAB(nn.Module):
    """Shifted rectangular window attention block, on maps [N, C, H, W]; the plain one on tokens [N, H, W, C]."""

    def __init__(self, layers: Layers, c: int, rolled: bool) -> None:
        super().__init__()
        self.plain = layers is PLAIN  # not asked again: a copied model has a copied kit
        self.norm1 = layers.token_norm(c)
        self.qkv = layers.linear(c, 3 * c)
        self.attns = nn.ModuleList(_WindowAttention(layers, c // 2, w, rolled) for w in _WINDOWS)
        self.get_v = layers.depthwise_conv(c)
        self.proj = layers.linear(c, c)
        self.norm2 = layers.token_norm(c)
        self.mlp = _MLP(layers, c, 2 * c)

    def forward(self, x: Tensor, positions: list[tuple[Tensor, Tensor]]) -> Tensor:
        if self.plain:
            return self.on_tokens(x, positions)
        qkv = self.qkv(self.norm1(x))
        c = x.shape[1]
        parts = qkv.split(c // 2, 1)  # of q, k and v the halves
        added = self.get_v(qkv[:, 2 * c :]).chunk(2, 1)
        y = [
            attention(*parts[i::2], added[i], *position)
            for i, (attention, position) in enumerate(zip(self.attns, positions, strict=True))
        ]
        x = self.proj(y, x)
        return self.mlp(self.norm2(x), x)

    def on_tokens(self, x: Tensor, positions: list[tuple[Tensor, Tensor]]) -> Tensor:
        qkv = self.qkv(self.norm1(x)).permute(0, 3, 1, 2).contiguous()
        n, c3, h, w = qkv.shape
        halves = qkv.view(n, 3, 2, c3 // 6, h, w)
        outputs = [
            attention.rolled(halves[:, :, i].reshape(n, c3 // 2, h, w), *position)  # type: ignore[operator]
            for i, (attention, position) in enumerate(zip(self.attns, positions, strict=True))
        ]
        y = torch.cat(outputs, 1) + self.get_v(qkv[:, 2 * x.shape[3] :])
        x = x + self.proj(y.permute(0, 2, 3, 1))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class _HFERB(nn.Module):
    """High-frequency enhancement residual block."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        half = c // 2
        self.conv = layers.conv3x3(half, half, activation="gelu")
        self.fc = layers.conv1x1(half, half, activation="gelu")
        self.last_fc = layers.conv1x1(c, c)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.last_fc([self.conv(a), self.fc(F.max_pool2d(b, 3, 1, 1))], x)


class _ChannelAttention(nn.Module):
    """Restormer's transposed attention with queries from another map."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(c // _HEAD, 1, 1))
        self.q = layers.conv1x1(c, c, bias=False)
        self.q_dwconv = layers.depthwise_conv(c, bias=False)
        self.kv = layers.conv1x1(c, 2 * c, bias=False)
        self.kv_dwconv = layers.depthwise_conv(2 * c, bias=False)
        self.project_out = layers.conv1x1(c, c, bias=False)

    def forward(self, low: Tensor, high: Tensor, residual: Tensor) -> Tensor:
        n, c, h, w = low.shape
        maps = (self.q_dwconv(self.q(high)), *self.kv_dwconv(self.kv(low)).chunk(2, 1))
        q, k, v = (t.reshape(n, c // _HEAD, _HEAD, h * w) for t in maps)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return self.project_out(((cosines * self.temperature).softmax(-1) @ v).reshape(n, c, h, w), residual)


class _HFB(nn.Module):
    """Hybrid fusion block."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.norm1 = nn.ModuleDict({"body": layers.layer_norm2d(c, 1e-5)})
        self.attn = _ChannelAttention(layers, c)
        self.norm2 = nn.ModuleDict({"body": layers.layer_norm2d(c, 1e-5)})
        self.ffn = GDFN(c, int(c * 2.66), conv1x1=layers.conv1x1, depthwise_conv=layers.depthwise_conv)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low = self.attn(self.norm1["body"](low), high, low)
        return self.ffn(self.norm2["body"](low), low)


class _Group(nn.Module):
    """Two rounds of window attention and high-frequency enhancement, fused."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.plain = layers is PLAIN
        self.srwa_blocks = nn.ModuleList(_SRWAB(layers, c, rolled=i % 2 == 1) for i in range(4))
        self.hfer_blocks = nn.ModuleList(_HFERB(layers, c) for _ in range(2))
        self.hf_blocks = nn.ModuleList(_HFB(layers, c) for _ in range(2))

    def forward(self, z: Tensor, positions: list[tuple[Tensor, Tensor]]) -> Tensor:
        for i in range(2):
            low = z.permute(0, 2, 3, 1).contiguous() if self.plain else z
            for block in self.srwa_blocks[2 * i : 2 * i + 2]:  # type: ignore[union-attr]
                low = block(low, positions)
            low = low.permute(0, 3, 1, 2).contiguous() if self.plain else low
            z = self.hf_blocks[i](low, self.hfer_blocks[i](z))
        return z


class _Layer(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.residual_group = _Group(layers, c)
        self.conv = layers.conv3x3(c, c)

    def forward(self, x: Tensor, positions: list[tuple[Tensor, Tensor]]) -> Tensor:
        return self.conv(self.residual_group(x, positions), residual=x)


class CRAFT(Network):
    """CRAFT (report section 4.28).

    Args:
        channels: width of the body, C, a multiple of 16.
        num_layers: groups of blocks, at least 1.
        upscale: 1, 2, 3, 4, ...
        data_range: of the images; no step of the network depends on it, see above.

    Images [N, 3, H, W] in [0, data_range], at least 9 x 9 (for the reflection); result [N, 3, r H, r W], not clamped.
    """

    name = "craft"
    minimum_size = 9

    relative_position_index_h: Tensor
    relative_position_index_v: Tensor
    biases_h: Tensor
    biases_v: Tensor

    def __init__(self, *, channels: int = 48, num_layers: int = 4, upscale: int = 4, data_range: float = 255.0) -> None:
        super().__init__()
        positive(channels=channels, num_layers=num_layers, upscale=upscale)
        if channels % (2 * _HEAD):
            raise ValueError(f"channels: must be a multiple of {2 * _HEAD}, got {channels}")
        self.scale, self.data_range = upscale, float(data_range)
        self.set_mean()
        for name, sides in zip("hv", _WINDOWS, strict=True):
            self.register_buffer(f"relative_position_index_{name}", _relative_positions(*sides)[1])
            # In the published files the offsets are those of the other windows.
            self.register_buffer(f"biases_{name}", _relative_positions(*reversed(sides))[0])
        self.conv_first = self.kit.conv3x3(3, channels)
        self.layers = nn.ModuleList(_Layer(self.kit, channels) for _ in range(num_layers))
        self.norm = nn.ModuleDict({"body": self.kit.layer_norm2d(channels, 1e-5)})
        self.conv_after_body = self.kit.conv3x3(channels, channels)
        self.upsample = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % _LONG, 0, -h % _LONG), mode="reflect")
        positions = [(self.biases_h, self.relative_position_index_h), (self.biases_v, self.relative_position_index_v)]
        shallow = self.conv_first(x - self.mean)
        y = shallow
        for layer in self.layers:
            y = layer(y, positions)
        y = self.upsample(self.conv_after_body(self.norm["body"](y), residual=shallow)) + self.mean
        return y[:, :, : h * self.scale, : w * self.scale]


class PlainCRAFT(CRAFT):
    """`CRAFT` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="craft",
        title="CRAFT variant",
        team="ACVLAB",
        team_id=34,
        section="4.28",
        parameters=753_344,
        flops=55_893_447_872,
        data_range=255.0,
        table1={
            "psnr_val": 25.31,
            "psnr_test": 25.45,
            "runtime_val_ms": 206.29,
            "runtime_test_ms": 196.24,
            "runtime_ms": 201.26,
            "params_m": 0.753,
            "flops_g": 55.89,
            "score_runtime": 712280000000000.0,
            "score_params": 115.68,
            "score_flops": 293.76,
            "score": 499600000000000.0,
            "rank": None,
        },
    ),
    CRAFT,
    PlainCRAFT,
)
