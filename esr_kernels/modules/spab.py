"""SPAN's block."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor, nn

from .. import functional
from .arguments import positive
from .conv3xc import Conv3XC


class SPAB(nn.Module):
    """Swift parameter-free attention block (report section 4.1, Eq. 3) as one fused operator.

    With the convolutions c1_r, c2_r, c3_r: ``mid = silu(c1_r(x)); h = c3_r(silu(c2_r(mid)));
    out = (h + x) * (sigmoid(h) - 0.5)``.

    Args:
        channels: of input and output.
        mid_channels: of the two inner maps; None: as many as `channels`.
        out_channels: None or `channels`, since the input is added to the result.
        bias: whether the convolutions have one.
        deploy: convolutions in deploy form, for inference and slim checkpoints, instead of the training form.
        gain: of the training form, see `Conv3XC`.

    State dict: `c1_r.*`, `c2_r.*`, `c3_r.*`, each as `Conv3XC`'s.
    """

    def __init__(
        self,
        channels: int,
        mid_channels: int | None = None,
        out_channels: int | None = None,
        *,
        bias: bool = True,
        deploy: bool = False,
        gain: int = 2,
    ) -> None:
        super().__init__()
        mid = channels if mid_channels is None else mid_channels
        positive(channels=channels, mid_channels=mid)
        if out_channels not in (None, channels):
            raise ValueError(f"out_channels: the block adds its input, so it must be {channels}, got {out_channels!r}")
        self.c1_r = Conv3XC(channels, mid, gain=gain, bias=bias, deploy=deploy)
        self.c2_r = Conv3XC(mid, mid, gain=gain, bias=bias, deploy=deploy)
        self.c3_r = Conv3XC(mid, channels, gain=gain, bias=bias, deploy=deploy)

    @overload
    def forward(self, x: Tensor, return_mid: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_mid: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, return_mid: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """[N, C, H, W] -> out of the same shape, or (out, mid [N, M, H, W]) with the activated first convolution."""
        w1, b1 = self.c1_r.folded()
        w2, b2 = self.c2_r.folded()
        w3, b3 = self.c3_r.folded()
        return functional.spab(x, w1, b1, w2, b2, w3, b3, return_mid=return_mid)
