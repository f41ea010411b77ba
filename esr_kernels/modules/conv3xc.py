"""SPAN's re-parameterised 3x3 convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import functional
from ..reparam import Reparameterized, fold_conv3xc
from .arguments import positive


class Conv3XC(Reparameterized):
    """SPAN's convolution (report section 4.1, Fig. 1): 1x1, 3x3, 1x1 and a 1x1 skip, all linear, folded into one 3x3.

    Args:
        in_channels, out_channels: at least 1.
        gain: how many times wider the middle is than input and output.
        bias: whether all its convolutions have one.
        deploy: only the folded convolution, for inference and for slim checkpoints.

    State dict: `sk.*`, `conv.0.*`, `conv.1.*`, `conv.2.*` in training form; `eval_conv.*` in deploy form. A
    training-form state dict loads into both, folded on the way into the deploy form; its `eval_conv.*` entries are
    ignored. A slim one loads into the deploy form only.
    """

    branch_names = ("sk", "conv")

    def __init__(
        self, in_channels: int, out_channels: int, *, gain: int = 2, bias: bool = True, deploy: bool = False
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, out_channels=out_channels, gain=gain)
        self.in_channels, self.out_channels, self.gain = in_channels, out_channels, gain
        self.deployed = bool(deploy)
        if deploy:
            self.eval_conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        else:
            wide_in, wide_out = in_channels * gain, out_channels * gain
            self.sk = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
            self.conv = nn.Sequential(
                nn.Conv2d(in_channels, wide_in, 1, bias=bias),
                nn.Conv2d(wide_in, wide_out, 3, bias=bias),
                nn.Conv2d(wide_out, out_channels, 1, bias=bias),
            )

    def _branch_parameters(self) -> dict[str, Tensor]:
        # By attribute, not from `named_parameters`: replicas of DataParallel have none.
        first, second, third = self.conv
        convs = (("conv.0", first), ("conv.1", second), ("conv.2", third), ("sk", self.sk))
        found = {f"{name}.{key}": getattr(conv, key) for name, conv in convs for key in ("weight", "bias")}
        return {key: p for key, p in found.items() if p is not None}

    @staticmethod
    def _fold(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        return fold_conv3xc(
            parameters["conv.0.weight"],
            parameters.get("conv.0.bias"),
            parameters["conv.1.weight"],
            parameters.get("conv.1.bias"),
            parameters["conv.2.weight"],
            parameters.get("conv.2.bias"),
            parameters["sk.weight"],
            parameters.get("sk.bias"),
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]."""
        # The branches are linear and see the same padded input (`fold_conv3xc` on the border), so convolving with
        # their folded weights is the branch form, gradients included.
        weight, bias = self.folded()
        return functional.conv3x3(x, weight, bias)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, deploy={self.deployed}"
