"""The skeleton of the blocks that descend from RFDN and BSRN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import CCA

from .layers import Layers


class Distillation(nn.Module):
    """Three steps of refinement, from each of which half the channels are set aside; the halves are mixed at the end.

    State dict: `c1_d`, `c1_r`, ... `c3_d`, `c3_r`, `c4`, `c5`.
    """

    def __init__(self, layers: Layers, c: int, refine: Callable[[int], Any], last: Any) -> None:
        super().__init__()
        for j in (1, 2, 3):
            self.add_module(f"c{j}_d", layers.conv1x1(c, c // 2, activation="gelu"))
            self.add_module(f"c{j}_r", refine(j))
        self.c4 = last
        self.c5 = layers.conv1x1(4 * (c // 2), c)

    def distill(self, t: Tensor) -> Tensor:
        parts = []
        for j in (1, 2, 3):
            parts.append(self.get_submodule(f"c{j}_d")(t))
            t = self.refine(self.get_submodule(f"c{j}_r"), t)
        return self.c5([*parts, self.last(t)])

    def last(self, t: Tensor) -> Tensor:
        return self.c4(t)

    def refine(self, conv: nn.Module, t: Tensor) -> Tensor:
        return F.gelu(conv(t) + t)


class EnhancedCCA(nn.Module):
    """`CCA` to one channel and back, between a 1x1 and a depthwise convolution, + input.

    State dict: `body.0`, `body.2`, `body.3`.
    """

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        first = layers.conv1x1(c, c, activation="gelu")
        self.body = nn.Sequential(first, nn.Identity(), CCA(c, 1), layers.depthwise_conv(c))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x
