"""Multi-level dispersion spatial attention and what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import positive
from .bsconv import BSConv
from .conv import Conv1x1


def local_variance(x: Tensor, kernel_size: int, stride: int = 3) -> Tensor:
    """Unbiased variance of each channel in square windows of [N, C, H, W], reflection-padded by one pixel.

    Returns:
        [N, C, (H + 2 - kernel_size) // stride + 1, the same of W].

    Raises:
        RuntimeError: height or width is below 2 or `kernel_size` - 2.
    """
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return x.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).var((-2, -1))


class Level(NamedTuple):
    """One branch of `MultiscaleGate`.

    Attributes:
        number: i of its convolutions conv2_i, conv_max_i, conv3_i.
        pool, padding: of the max-pooling, whose stride is 3.
        variance_number: i of the convolution conv2_i whose local variance, in windows as large as the pooling's, is
            added; None: nothing is.
    """

    number: int
    pool: int
    padding: int
    variance_number: int | None = None


class MultiscaleGate(nn.Module):
    """Gate of the multi-level dispersion spatial attention (Mao et al., MDRN; report sections 4.4 and 4.5).

    Like ESA's, with several branches of other pooling windows, some with the local variance added. With c =
    conv1(x), each branch is resize(conv3_i(conv_max_i(pool(conv2_i(c)) + variance))), where conv2_i has stride 2 and
    conv_max_i a GELU; result sigmoid(conv4(sum of branches + conv_f(c))).

    Args:
        channels: of input and output.
        hidden: width of the branches.
        levels: the branches.
        conv1x1: makes the 1x1 convolutions, with the arguments of `Conv1x1`.
        conv: makes the others: a `BSConv` with reflection, or what takes the same arguments.

    State dict: `conv1`, `conv_f`, `conv4` and for each branch `conv2_i`, `conv_max_i`, `conv3_i`.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        levels: Sequence[Level],
        *,
        conv1x1: Callable[..., Any] = Conv1x1,
        conv: Callable[..., Any] = BSConv,
    ) -> None:
        super().__init__()
        positive(channels=channels, hidden=hidden)
        self.levels = tuple(levels)
        self.conv1 = conv1x1(channels, hidden)
        self.conv_f = conv1x1(hidden, hidden)
        self.conv4 = conv1x1(hidden, channels)
        for level in self.levels:
            i, v = level.number, level.variance_number
            for j in (i,) if v is None else (i, v):
                self.add_module(f"conv2_{j}", conv(hidden, hidden, stride=2, padding_mode="reflect"))
            self.add_module(f"conv_max_{i}", conv(hidden, hidden, activation="gelu", padding_mode="reflect"))
            self.add_module(f"conv3_{i}", conv(hidden, hidden, padding_mode="reflect"))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the gate in (0, 1), of the same shape."""
        c = self.conv1(x)
        total = self.conv_f(c)
        for level in self.levels:
            i, v = level.number, level.variance_number
            y = F.max_pool2d(self.get_submodule(f"conv2_{i}")(c), level.pool, 3, level.padding)
            if v is not None:
                y = y + local_variance(self.get_submodule(f"conv2_{v}")(c), level.pool)
            y = self.get_submodule(f"conv3_{i}")(self.get_submodule(f"conv_max_{i}")(y))
            total = total + F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
        return torch.sigmoid(self.conv4(total))
