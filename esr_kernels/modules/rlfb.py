"""RLFN's block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from ..backends.reference._common import activate
from ..reparam.algebra import Kernel, fold_batch_norm
from ..reparam.base import FoldCache
from ..reparam.network import fold_batch_norm_entries, fuse_batch_norm
from .arguments import positive
from .conv import Conv1x1, Conv3x3
from .esa import ESA

if TYPE_CHECKING:
    from typing_extensions import Self


class RLFB(nn.Module):
    """Residual local feature block (Kong et al., RLFN; report section 2.2).

    Three times 3x3 convolution and activation, the input added, a 1x1 convolution, enhanced spatial attention. There is
    no residual around the attention.

    Args:
        channels: of input and output.
        mid_channels: of the two inner maps; None: as many as `channels`.
        out_channels: of the result; None: as many as `channels`.
        esa_channels: of the attention's branch.
        activation, negative_slope: after each 3x3 convolution, as in `functional.conv3x3`.
        bias: whether the block's own convolutions have one.
        esa_bias: whether the attention's have one.
        esa_conv_f: see `ESA`.
        batch_norm: batch normalisation between the first convolution and its activation (RLFN_BN, report section 4.17).
            In eval mode the two are one convolution, for good after `reparam.fuse_batch_norms`.

    State dict: `c1_r`, `c2_r`, `c3_r`, `c5` and `esa.*`; `bn1.*` with batch normalisation. A block without it takes a
    state dict with it, folded on the way.
    """

    minimum_size = ESA.minimum_size

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
        positive(channels=channels, mid_channels=mid, out_channels=out)
        self.c1_r = Conv3x3(channels, mid, bias=bias, activation=activation, negative_slope=negative_slope)
        self.c2_r = Conv3x3(mid, mid, bias=bias, activation=activation, negative_slope=negative_slope)
        self.c3_r = Conv3x3(mid, channels, bias=bias, activation=activation, negative_slope=negative_slope)
        self.c5 = Conv1x1(channels, out, bias=bias)
        self.esa = ESA(out, esa_channels, conv_f=esa_conv_f, bias=esa_bias)
        self.bn1 = nn.BatchNorm2d(mid) if batch_norm else None
        self._cache = FoldCache()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]; height and width at least `minimum_size`."""
        return self.esa(self.c5(self.c3_r(self.c2_r(self._first(x)), residual=x)))

    def _first(self, x: Tensor) -> Tensor:
        conv, norm = self.c1_r, self.bn1
        if norm is None:
            return conv(x)
        # fvcore's trace counts the normalisation, as it does in the published network.
        if self.training or torch.jit.is_tracing():
            h = norm(functional.conv3x3(x, conv.weight, conv.bias))
            return activate(h, conv.activation, conv.negative_slope)
        sources = {
            "weight": conv.weight,
            "bias": conv.bias,
            "mean": norm.running_mean,
            "variance": norm.running_var,
            "scale": norm.weight,
            "shift": norm.bias,
        }
        there = {key: t for key, t in sources.items() if t is not None}
        weight, bias = self._cache.folded(partial(_fold, norm.eps), there)
        assert weight is not None
        return functional.conv3x3(x, weight, bias, activation=conv.activation, negative_slope=conv.negative_slope)

    def train(self, mode: bool = True) -> Self:
        self._cache = FoldCache()
        return super().train(mode)

    def fuse_batch_norm(self) -> None:
        """Fold the batch normalisation into the first convolution, in place."""
        if self.bn1 is not None:
            fuse_batch_norm(self.c1_r, self.bn1)
            self.bn1 = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.bn1 is None:
            try:
                fold_batch_norm_entries(state_dict, f"{prefix}c1_r.", f"{prefix}bn1.", nn.BatchNorm2d(1).eps)
            except ValueError as error:
                error_messages = args[-1]
                error_messages.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _fold(eps: float, sources: Mapping[str, Tensor], dtype: torch.dtype) -> Kernel:
    t = {key: value.to(dtype) for key, value in sources.items()}
    conv = t["weight"], t.get("bias")
    weight, bias = fold_batch_norm(conv, t["mean"], t["variance"], t["scale"], t["shift"], eps)
    result = sources["weight"].dtype
    return weight.to(result), None if bias is None else bias.to(result)
