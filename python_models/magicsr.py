"""MagicSR-Light, a Swin transformer whose windows know their neighbours.

Team MagicSR, report section 4.26; Choi et al., "N-Gram in Swin Transformers for Efficient Lightweight Image
Super-Resolution".

    zeros to multiples of 32, (x - mean) / std
    shallow_extract     3 -> 64  ----------------------------------------------------.
    encoder_layer1      6 blocks  -----------------------------------------.         |
    encoder_layer2      4 blocks at half the size, from the downsampled    |         |
    encoder_layer3      4 blocks at a quarter                              |         |
    bottleneck          each of the three + LeakyReLU of the pooled        |         |
                        shallow map, pixel-shuffled to the full size;      |         |
                        depthwise 3x3, GELU, linear, layer norm            |         |
    +  <-------------------------------------------------------------------'         |
    decoder_layer1      6 blocks, layer norm                                         |
    +  <-----------------------------------------------------------------------------'
    to_target           64 -> 3 r r, pixel shuffle; 3x3; * std + mean, cropped

    block   attention in windows of 8 x 8 by scaled cosines, layer norm, + input; MLP, layer norm, + its input. To the
            pixels of a window is first added a context: attention among 2 x 2 neighbouring windows' embeddings,
            forwards and backwards. Every second block rolls its windows by half.

Particular: a block's input is the previous block's output plus that one's input. Encoders 2 and 3 also see the pooled
inputs of those before. The masks of rolled windows are in the state dict for 64 x 64 images (the decoder's for 32 x 32)
and computed for all others. No weights were published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .windows import from_windows, to_windows

_WINDOW, _SHIFT = 8, 4
_SEPARATE = -100.0  # is added between pixels of a rolled window that were not neighbours
_LARGEST_SCALE = 4.605170185988092  # log 100
_MEAN, _STD = (0.4485, 0.4375, 0.4045), (0.2352, 0.2244, 0.2349)
_MULTIPLE = 32
_TRAINED = 64  # pixels a side


def _windows(x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N windows, 64, C]."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // _WINDOW, _WINDOW, w // _WINDOW, _WINDOW, c)
    return x.transpose(2, 3).reshape(-1, _WINDOW**2, c)


def _merged(windows: Tensor, h: int, w: int) -> Tensor:
    """[N windows, 64, C] -> [N, h, w, C]."""
    rows, columns, c = h // _WINDOW, w // _WINDOW, windows.shape[2]
    x = windows.reshape(windows.shape[0] // (rows * columns), rows, columns, _WINDOW, _WINDOW, c)
    return x.transpose(2, 3).reshape(-1, h, w, c)


def _roll_mask(h: int, w: int) -> Tensor:
    """For each two pixels of a rolled window: [windows, 64, 64]."""

    def region(size: int) -> Tensor:
        position = torch.arange(size)
        return (position >= size - _WINDOW).long() + (position >= size - _SHIFT).long()

    regions = _windows((3 * region(h)[:, None] + region(w)).view(1, h, w, 1)).squeeze(-1)
    return torch.where(regions[:, None] == regions[:, :, None], 0.0, _SEPARATE)


def _position_index(side: int) -> Tensor:
    """For each pair of a square window's pixels the index of their offset, [side^2, side^2]."""
    y, x = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return (y[:, None] - y + side - 1) * (2 * side - 1) + x[:, None] - x + side - 1


class _CosineAttention(nn.Module):
    """Swin v2's attention in square windows, with a table of position biases."""

    relative_position_index: Tensor

    def __init__(self, layers: Layers, c: int, heads: int, side: int) -> None:
        super().__init__()
        self.layers, self.side, self.heads, self.width = layers, side, heads, c // heads
        inner = heads * self.width
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), 10.0).log())
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _position_index(side))
        self.qkv = layers.linear(c, 3 * inner)
        self.proj = layers.linear(inner, c)

    def scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """[heads, 1, 1] and [heads, tokens, tokens]."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)
        return self.logit_scale.clamp(max=_LARGEST_SCALE).exp(), bias

    def on_tokens(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[N windows, tokens, C], mask [windows, tokens, tokens]."""
        count, tokens, _ = x.shape
        qkv = self.qkv(x).view(count, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        scale, bias = self.scale_and_bias()
        q, k, bias = F.normalize(qkv[0], dim=-1) * scale, F.normalize(qkv[1], dim=-1), bias[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(count // mask.shape[0], 1, 1, 1)
        y = self.layers.attention(q, k, qkv[2], 1.0, bias)
        return self.proj(y.transpose(1, 2).reshape(count, tokens, self.heads * self.width))

    def with_mask(self, x: Tensor, mask: Tensor) -> Tensor:
        """[N, C, H, W], mask [windows, tokens, tokens] of any values."""
        q, k, v = (to_windows(t, self.side, self.side, self.heads) for t in self.qkv(x).chunk(3, 1))
        scale, bias = self.scale_and_bias()
        bias = (bias + mask[:, None]).repeat(x.shape[0], 1, 1, 1)
        y = self.layers.attention(F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v, 1.0, bias)
        return self.proj(from_windows(y, self.side, self.side, x.shape[2], x.shape[3]))

    def forward(self, x: Tensor, shift: int = 0) -> Tensor:
        """[N, C, H, W]."""
        q, k, v = self.qkv(x).chunk(3, 1)
        scale, bias = self.scale_and_bias()
        y = self.layers.window_attention(
            q,
            k,
            v,
            (self.side, self.side),
            self.heads,
            scale=scale.flatten(),
            bias=bias,
            shift=(shift, shift),
            shift_mask=_SEPARATE,
            cosine=True,
        )
        return self.proj(y)


class _NGramContext(nn.Module):
    """What each window learns from its neighbours: [N, C, H, W] -> [N, C, H / 8, W / 8]."""

    def __init__(self, layers: Layers, c: int, heads: int) -> None:
        super().__init__()
        self.plain, half = layers is PLAIN, c // 2
        self.unigram_embed = nn.Conv2d(c, half, _WINDOW, _WINDOW, groups=half)
        self.ngram_attn = _CosineAttention(layers, half, heads, 2)
        self.merge = layers.conv1x1(c, c)

    def neighbours(self, padded: Tensor) -> Tensor:
        """Attention inside every 2 x 2 windows, averaged: [N, C / 2, h + 1, w + 1] -> [N, C / 2, h, w]."""
        n, c, h, w = padded.shape
        corners = tuple(padded[:, :, i : h - 1 + i, j : w - 1 + j] for i in (0, 1) for j in (0, 1))
        if self.plain:
            tokens = torch.stack(corners, -1).permute(0, 2, 3, 4, 1).reshape(-1, 4, c)
            return self.ngram_attn.on_tokens(tokens).mean(1).view(n, h - 1, w - 1, c).permute(0, 3, 1, 2)
        windows = F.pixel_shuffle(torch.stack(corners, 2).flatten(1, 2), 2)
        return F.avg_pool2d(self.ngram_attn(windows), 2)

    def forward(self, x: Tensor) -> Tensor:
        unigrams = self.unigram_embed(x)
        forwards = self.neighbours(F.pad(unigrams, (0, 1, 0, 1), mode="reflect"))
        backwards = self.neighbours(F.pad(unigrams, (1, 0, 1, 0), mode="reflect"))
        return self.merge([forwards, backwards])


class _MLP(nn.Module):
    """Of tokens, or of maps in the fused kit."""

    def __init__(self, layers: Layers, c: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = layers.linear(c, hidden)
        self.fc2 = layers.linear(hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """Context-aware Swin transformer block on maps [N, C, H, W]; the plain one on tokens [N, H, W, C]."""

    attn_mask: Tensor | None

    def __init__(self, layers: Layers, c: int, heads: int, rolled: bool, trained: int) -> None:
        super().__init__()
        self.plain, self.rolled, self.trained = layers is PLAIN, rolled, trained
        self.usual_mask = True  # the loaded one is that of any other size
        self.ngram_window_partition = nn.ModuleDict({"ngram_context": _NGramContext(layers, c, heads)})
        self.attn = _CosineAttention(layers, c, heads, _WINDOW)
        self.norm1 = layers.token_norm(c)
        self.ffn = _MLP(layers, c, 2 * c)
        self.norm2 = layers.token_norm(c)
        self.register_buffer("attn_mask", _roll_mask(trained, trained) if rolled else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return self.on_tokens(x)
        n, c, h, w = x.shape
        context = self.ngram_window_partition["ngram_context"](x)
        pixels = x.reshape(n, c, h // _WINDOW, _WINDOW, w // _WINDOW, _WINDOW)
        y = (pixels + context[:, :, :, None, :, None]).reshape(n, c, h, w)
        mask = self.attn_mask
        if mask is None or self.usual_mask or (x.shape[2], x.shape[3]) != (self.trained, self.trained):
            y = self.attn(y, _SHIFT if self.rolled else 0)
        else:
            y = self.attn.with_mask(y.roll((-_SHIFT, -_SHIFT), (2, 3)), mask).roll((_SHIFT, _SHIFT), (2, 3))
        x = x + self.norm1(y)
        return x + self.norm2(self.ffn(x))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        mask = self.attn_mask
        if mask is not None and not mask.is_meta:
            self.usual_mask = torch.equal(mask, _roll_mask(self.trained, self.trained).to(mask))

    def on_tokens(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        context = self.ngram_window_partition["ngram_context"](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = x + context.repeat_interleave(_WINDOW, 1).repeat_interleave(_WINDOW, 2)
        mask = None
        if self.rolled:
            y = y.roll((-_SHIFT, -_SHIFT), (1, 2))
            mask = self.attn_mask
            if h != self.trained or w != self.trained:
                mask = _roll_mask(int(h), int(w)).to(x)
        y = _merged(self.attn.on_tokens(_windows(y), mask), h, w)
        if self.rolled:
            y = y.roll((_SHIFT, _SHIFT), (1, 2))
        x = x + self.norm1(y)
        return x + self.norm2(self.ffn(x))


class _Downsample(nn.Module):
    """Each 2 x 2 pixels, normalised, to one."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.plain = layers is PLAIN
        self.norm = layers.token_norm(4 * c)
        self.reduction = layers.linear(4 * c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [(i, j) for i in (0, 1) for j in (0, 1)]
        if self.plain:
            quarters = torch.cat([x[:, i::2, j::2] for i, j in corners], -1)
        else:
            quarters = torch.cat([x[:, :, i::2, j::2] for i, j in corners], 1)
        return self.reduction(self.norm(quarters))


class _Stage(nn.Module):
    def __init__(
        self, layers: Layers, c: int, heads: int, blocks: int, trained: int, *, cascade: int = 0, last: bool = False
    ) -> None:
        super().__init__()
        self.plain = layers is PLAIN
        self.across_cascade_proj = layers.linear(cascade, c) if cascade else None
        self.blocks = nn.ModuleList(_Block(layers, c, heads, i % 2 == 1, trained) for i in range(blocks))
        self.downsample = None if last else _Downsample(layers, c)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last block's output, and it plus its input at half the size."""
        if self.across_cascade_proj is not None:
            x = self.across_cascade_proj(x)
        y = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):
            x = y + x if self.plain or i else x
            y = block(x)
        return y, None if self.downsample is None else self.downsample(y + x)


class _Bottleneck(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.plain, inner = layers is PLAIN, c + c // 4 + c // 16
        self.depthwise = layers.depthwise_conv(inner, activation="gelu")
        self.pointwise = layers.linear(inner, c)
        self.norm = layers.token_norm(c)

    def forward(self, shallow: Tensor, stages: Sequence[Tensor]) -> Tensor:
        maps, pooled = [], shallow
        for i, stage in enumerate(stages):
            pooled = F.max_pool2d(pooled, 2) if i else pooled
            y = stage.permute(0, 3, 1, 2) if self.plain else stage
            maps.append(F.pixel_shuffle(y + F.leaky_relu(pooled), 2**i))
        y = self.depthwise(torch.cat(maps, 1))
        return self.norm(self.pointwise(y.permute(0, 2, 3, 1) if self.plain else y))


class _Target(nn.Module):
    def __init__(self, layers: Layers, c: int, upscale: int) -> None:
        super().__init__()
        self.before_shuffle = layers.conv3x3_pixel_shuffle(c, 3, upscale)
        self.to_origin = layers.conv3x3(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_origin(self.before_shuffle(x))


class MagicSR(Network):
    """MagicSR-Light (report section 4.26).

    Args:
        channels: width of the body, a multiple of 16 and at least 16.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 33 x 33; result [N, 3, r H, r W], not clamped.
    """

    name = "magicsr"
    minimum_size = _MULTIPLE + 1

    std: Tensor

    def __init__(self, *, channels: int = 64, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, upscale=upscale)
        if channels % 16:
            raise ValueError(f"channels: must be a multiple of 16, got {channels}")
        c, layers = channels, self.kit
        self.plain = layers is PLAIN
        self.scale = upscale
        self.set_mean(_MEAN)
        self.register_buffer("std", torch.tensor(_STD).view(1, -1, 1, 1), persistent=False)
        self.shallow_extract = nn.ModuleDict({"conv1": layers.conv3x3(3, c)})
        self.encoder_layer1 = _Stage(layers, c, 6, 6, _TRAINED)
        self.encoder_layer2 = _Stage(layers, c, 4, 4, _TRAINED // 2, cascade=2 * c)
        self.encoder_layer3 = _Stage(layers, c, 4, 4, _TRAINED // 4, cascade=3 * c, last=True)
        self.bottleneck = _Bottleneck(layers, c)
        self.decoder_layer1 = _Stage(layers, c, 6, 6, _TRAINED // 2, last=True)
        self.norm = layers.token_norm(c)
        self.to_target = _Target(layers, c, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % _MULTIPLE, 0, -h % _MULTIPLE))
        shallow = self.shallow_extract["conv1"]((x - self.mean) / self.std)
        tokens = cascade = shallow.permute(0, 2, 3, 1) if self.plain else shallow
        encoded, smaller = self.encoder_layer1(tokens)
        stages = [encoded]
        for stage in (self.encoder_layer2, self.encoder_layer3):
            if self.plain:
                pooled = F.max_pool2d(cascade.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
                cascade = torch.cat([pooled, smaller], -1)
            else:
                cascade = torch.cat([F.max_pool2d(cascade, 2), smaller], 1)
            y, smaller = stage(cascade)
            stages.append(y)
        decoded, _ = self.decoder_layer1(self.bottleneck(shallow, stages) + encoded)
        decoded = self.norm(decoded) + tokens
        y = self.to_target(decoded.permute(0, 3, 1, 2) if self.plain else decoded) * self.std + self.mean
        return y[:, :, : h * self.scale, : w * self.scale]


class PlainMagicSR(MagicSR):
    """`MagicSR` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="magicsr",
        title="MagicSR-Light",
        team="MagicSR",
        team_id=18,
        section="4.26",
        parameters=1_019_156,
        flops=38_472_515_584,
        table1={
            "psnr_val": 27.03,
            "psnr_test": 27.17,
            "runtime_val_ms": 461.32,
            "runtime_test_ms": 443.38,
            "runtime_ms": 452.35,
            "params_m": 1.019,
            "flops_g": 38.47,
            "score_runtime": 2.4106999999999998e33,
            "score_params": 619.57,
            "score_flops": 49.98,
            "score": 1.6875e33,
            "rank": 26,
        },
    ),
    MagicSR,
    PlainMagicSR,
)
