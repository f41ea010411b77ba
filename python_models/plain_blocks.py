"""Blocks of the plain PyTorch twins: what the networks are compared with and timed against.

Written with `nn.Conv2d` and in-place activations as the published networks are, with the same state-dict names as the
fused modules in deploy form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import RBSB, RepConv1x1
from esr_kernels.reparam import Reparameterized

from .windows import from_windows, to_windows


def _same(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": _same,
    "relu": partial(F.relu, inplace=True),
    "silu": partial(F.silu, inplace=True),
    "gelu": F.gelu,
}


def _activation(name: str, slope: float) -> Callable[..., Tensor]:
    return partial(F.leaky_relu, negative_slope=slope, inplace=True) if name == "leaky_relu" else _ACTIVATIONS[name]


class PlainConv(nn.Conv2d):
    """Convolution that keeps the size, activation, residual: three steps."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, activation: str, slope: float, **conv: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, **conv)
        self._act = _activation(activation, slope)

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        y = super().forward(x)
        if residual is None:
            return self._act(y)
        return self._act(y + residual) if residual_mode == "pre" else self._act(y) + residual


class PlainConv3x3(PlainConv):
    def __init__(
        self, cin: int, cout: int, *, bias: bool = True, activation: str = "none", negative_slope: float = 0.05
    ) -> None:
        super().__init__(cin, cout, 3, activation, negative_slope, bias=bias)


class PlainConv1x1(PlainConv):
    def __init__(
        self, cin: int, cout: int, *, bias: bool = True, activation: str = "none", negative_slope: float = 0.05
    ) -> None:
        super().__init__(cin, cout, 1, activation, negative_slope, bias=bias)

    def forward(  # type: ignore[override]
        self, xs: Tensor | Sequence[Tensor], residual: Tensor | None = None, residual_mode: str = "post"
    ) -> Tensor:
        return super().forward(xs if isinstance(xs, Tensor) else torch.cat(list(xs), 1), residual, residual_mode)


class PlainModulatingConv1x1(PlainConv1x1):
    def forward(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:  # type: ignore[override]
        first, *rest = maps
        return super().forward([first, *(F.interpolate(t, size=x.shape[2:], mode="nearest") for t in rest)]) * x


def plain_modulate(x: Tensor, small: Tensor, *, mode: str = "nearest", activation: str = "none") -> Tensor:
    corners = False if mode == "bilinear" else None
    return _ACTIVATIONS[activation](F.interpolate(small, size=x.shape[2:], mode=mode, align_corners=corners)) * x


class PlainBSConv(nn.Module):
    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        padding_mode: str = "zeros",
        stride: int = 1,
        activation: str = "none",
        negative_slope: float = 0.05,
    ) -> None:
        super().__init__()
        self.pw = nn.Conv2d(cin, cout, 1, bias=False)
        self.dw = PlainConv(
            cout, cout, 3, activation, negative_slope, stride=stride, groups=cout, padding_mode=padding_mode
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        return self.dw(self.pw(x), residual, residual_mode)


class PlainBSConvS(nn.Module):
    def __init__(self, cin: int, cout: int, *, stride: int = 1, activation: str = "none") -> None:
        super().__init__()
        self.pw = nn.Conv2d(cin, cout, 1, bias=False)
        self.dw1 = nn.Conv2d(cout, cout, (3, 1), stride, (1, 0), groups=cout, padding_mode="reflect")
        self.dw2 = nn.Conv2d(cout, cout, (1, 3), stride, (0, 1), groups=cout, padding_mode="reflect")
        self._act = _ACTIVATIONS[activation]

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        h = self.dw2(self.dw1(self.pw(x)))
        if residual is None:
            return self._act(h)
        return self._act(h + residual) if residual_mode == "pre" else self._act(h) + residual


class PlainDepthwiseConv(nn.Conv2d):
    """Convolution, activation, product of the halves: a step each."""

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        dilation: int = 1,
        bias: bool = True,
        activation: str = "none",
        negative_slope: float = 0.05,
        gated: bool = False,
    ) -> None:
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        super().__init__(
            channels,
            channels,
            (height, width),
            padding=(height // 2 * dilation, width // 2 * dilation),
            dilation=dilation,
            groups=channels,
            bias=bias,
        )
        self._act = _activation(activation, negative_slope)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        if not self.gated:
            return self._act(h)
        a, b = h.chunk(2, 1)
        return self._act(a) * b


class PlainLayerNorm2d(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + self.eps)
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.view(-1, 1, 1))


class PlainPixelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class _Named(nn.Module):
    """A convolution under a name of its own."""

    def __init__(self, name: str, conv: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, conv)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.get_submodule(self.name)(x, residual)


def plain_rep(
    form: type[Reparameterized],
    cin: int,
    cout: int | None = None,
    *,
    deploy: bool = True,
    deploy_name: str | None = None,
    **conv: Any,
) -> nn.Module:
    """Deploy form of a re-parameterised convolution, whatever form is asked for, under its published name."""
    kind: type[nn.Module] = PlainConv3x3
    if form in (RBSB, RepConv1x1):
        kind = PlainBSConv if form is RBSB else PlainConv1x1
    name = form.default_deploy_name if deploy_name is None else deploy_name
    folded = kind(cin, cin if cout is None else cout, **conv)
    return _Named(name, folded) if name else folded


class PlainConv3XC(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.eval_conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.eval_conv(x)


class PlainSPAB(nn.Module):
    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.c1_r = PlainConv3XC(channels, channels, bias)
        self.c2_r = PlainConv3XC(channels, channels, bias)
        self.c3_r = PlainConv3XC(channels, channels, bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mid = F.silu(self.c1_r(x), inplace=True)
        h = self.c3_r(F.silu(self.c2_r(mid), inplace=True))
        return (h + x) * (h.sigmoid() - 0.5), mid


class PlainESA(nn.Module):
    def __init__(
        self, channels: int, esa_channels: int = 16, *, conv_f: bool = True, conv_max: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        f = esa_channels
        self.conv1 = nn.Conv2d(channels, f, 1, bias=bias)
        self.conv_f = nn.Conv2d(f, f, 1, bias=bias) if conv_f else None
        self.conv_max = nn.Conv2d(f, f, 3, padding=1, bias=bias) if conv_max else None
        self.conv2 = nn.Conv2d(f, f, 3, stride=2, bias=bias)
        self.conv3 = nn.Conv2d(f, f, 3, padding=1, bias=bias)
        self.conv3_ = nn.Conv2d(f, f, 3, padding=1, bias=bias) if conv_max else None
        self.conv4 = nn.Conv2d(f, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        c1 = self.conv1(x)
        y = F.max_pool2d(self.conv2(c1), 7, 3)
        if self.conv_max is not None and self.conv3_ is not None:
            y = F.relu(self.conv3(F.relu(self.conv_max(y), inplace=True)), inplace=True)
            y = self.conv3_(y)
        else:
            y = self.conv3(y)
        y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return x * self.conv4(y + (c1 if self.conv_f is None else self.conv_f(c1))).sigmoid()


class PlainRLFB(nn.Module):
    def __init__(
        self,
        channels: int,
        mid_channels: int | None = None,
        out_channels: int | None = None,
        esa_channels: int = 16,
        *,
        activation: str = "leaky_relu",
        negative_slope: float = 0.05,
        bias: bool = True,
        esa_bias: bool = True,
        esa_conv_f: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        mid = channels if mid_channels is None else mid_channels
        out = channels if out_channels is None else out_channels
        after: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope, "bias": bias}
        # A normalisation stands between the first convolution and its activation.
        self.c1_r = PlainConv3x3(channels, mid, bias=bias) if batch_norm else PlainConv3x3(channels, mid, **after)
        self.c2_r = PlainConv3x3(mid, mid, **after)
        self.c3_r = PlainConv3x3(mid, channels, **after)
        self.c5 = PlainConv1x1(channels, out, bias=bias)
        self.esa = PlainESA(out, esa_channels, conv_f=esa_conv_f, bias=esa_bias)
        self.bn1 = nn.BatchNorm2d(mid) if batch_norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.c1_r(x) if self.bn1 is None else self.c2_r._act(self.bn1(self.c1_r(x)))
        return self.esa(self.c5(self.c3_r(self.c2_r(y), residual=x)))


class PlainConv3x3PixelShuffle(nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int = 3, upscale_factor: int = 4, *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels * upscale_factor**2, 3, padding=1, bias=bias)
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.pixel_shuffle(super().forward(x), self.upscale_factor)
        return y if residual is None else y + residual


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def plain_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    heads: int,
    *,
    scale: float,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    q_tokens, k_tokens, v_tokens = (to_windows(t, *window, heads) for t in (q, k, v))
    y = from_windows(plain_attention(q_tokens, k_tokens, v_tokens, scale, bias), *window, q.shape[2], q.shape[3])
    return y if residual is None else y + residual


class PlainUpsampler(nn.Sequential):
    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        upscale_factor: int = 4,
        *,
        bias: bool = True,
        conv: nn.Module | None = None,
    ) -> None:
        if conv is None:
            conv = nn.Conv2d(in_channels, out_channels * upscale_factor**2, 3, padding=1, bias=bias)
        super().__init__(conv, nn.PixelShuffle(upscale_factor))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if residual is None else y + residual


def plain_causal_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """silu of a convolution over tokens [N, L, D] that pads as many tokens as it has taps before a token."""
    return F.silu(conv(x.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)


def plain_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mamba's recurrence h_t = exp(delta_t a) h_{t-1} + delta_t u_t b_t, y_t = c_t h_t + d u_t (Gu and Dao, Mamba).

    In about the square root of L steps twice: once through all segments of the sequence side by side for the state that
    each adds, then, after one pass over the segments, through all of them again from the right state.

    Args:
        u, delta: [N, L, D].
        a: [D, S], negative. b, c: [N, L, S]. d: [D].

    Returns:
        [N, L, D].
    """
    n, length, channels = u.shape
    steps = max(1, isqrt(length))
    segments = -(-length // steps)
    # A delta of zero keeps the state: what is appended changes nothing.
    u_, delta_, b_, c_ = (
        F.pad(t, (0, 0, 0, segments * steps - length)).view(n, segments, steps, t.shape[2]).unbind(2)
        for t in (u, delta, b, c)
    )

    def advance(state: Tensor, t: int) -> Tensor:
        decay = torch.exp(delta_[t].unsqueeze(-1) * a)
        return torch.addcmul((delta_[t] * u_[t]).unsqueeze(-1) * b_[t].unsqueeze(-2), decay, state)

    added = u.new_zeros(n, segments, channels, a.shape[1])
    for t in range(steps):
        added = advance(added, t)
    kept = torch.exp(sum(delta_).unsqueeze(-1) * a)  # type: ignore[union-attr, arg-type]
    starts = [torch.zeros_like(added[:, 0])]
    for i in range(segments - 1):
        starts.append(torch.addcmul(added[:, i], kept[:, i], starts[-1]))

    state, outputs = torch.stack(starts, 1), []
    for t in range(steps):
        state = advance(state, t)
        outputs.append((state * c_[t].unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, 2).view(n, segments * steps, channels)[:, :length]
    return torch.addcmul(y, u, d)


def plain_selective_scan(
    u: Tensor, dt: Tensor, dt_proj: nn.Linear, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor
) -> Tensor:
    """`plain_scan` with delta = softplus(dt_proj(dt)), times silu(z); z is [N, L, D]."""
    # The state is a sum over the whole image: never in half precision.
    delta = F.softplus(dt_proj(dt))
    y = plain_scan(*(t.to(a.dtype) for t in (u, delta, a, b, c, d)))
    return y.to(u.dtype) * F.silu(z)
