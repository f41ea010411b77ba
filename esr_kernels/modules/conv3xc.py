"""SPAN's re-parameterised 3x3 convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..reparam.algebra import Kernel, fold_conv3xc
from ..reparam.base import Reparameterized
from .arguments import positive


class Conv3XC(Reparameterized):
    """SPAN's convolution (report section 4.1, Fig. 1): 1x1, 3x3, 1x1 and a 1x1 skip, all linear, folded into one 3x3.

    Args:
        in_channels, out_channels: at least 1.
        gain: how many times wider the middle is than input and output.
        bias: whether all its convolutions have one.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `sk.*`, `conv.0.*`, `conv.1.*`, `conv.2.*` in training form; `eval_conv.*` in deploy form.
    """

    branch_keys = ("sk.weight", "conv.0.weight", "conv.1.weight", "conv.2.weight")
    bias_keys = ("sk.bias", "conv.0.bias", "conv.1.bias", "conv.2.bias")

    def __init__(
        self, in_channels: int, out_channels: int, *, gain: int = 2, bias: bool = True, **options: Any
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, gain=gain)
        super().__init__(in_channels, out_channels, bias=bias, **options)
        self.gain = gain
        if not self.deployed:
            wide_in, wide_out = in_channels * gain, out_channels * gain
            self.sk = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
            self.conv = nn.Sequential(
                nn.Conv2d(in_channels, wide_in, 1, bias=bias),
                nn.Conv2d(wide_in, wide_out, 3, bias=bias),
                nn.Conv2d(wide_out, out_channels, 1, bias=bias),
            )

    @staticmethod
    def combine(parameters: Mapping[str, Tensor]) -> Kernel:  # type: ignore[override]
        return fold_conv3xc(
            parameters["conv.0.weight"],
            parameters.get("conv.0.bias"),
            parameters["conv.1.weight"],
            parameters.get("conv.1.bias"),
            parameters["conv.2.weight"],
            parameters.get("conv.2.bias"),
            parameters["sk.weight"],
            parameters.get("sk.bias"),
            dtype=parameters["sk.weight"].dtype,
        )
