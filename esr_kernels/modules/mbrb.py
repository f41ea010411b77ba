"""ERRN's multi-branch re-parameterised convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..reparam.algebra import Kernel, add_identity, branch, compose, compose_depthwise, merge
from ..reparam.base import Reparameterized
from .arguments import positive
from .ecb import Pair


class MBRB(Reparameterized):
    """Multi-branch re-parameterised block of ERRN (report section 4.20), after the diverse branch block (Ding et al.).

    The report names it and refers to the diverse branch block, whose branches these are, without their batch
    normalisation: ``y = conv3x3(x) + conv1x1(x) + conv3x3(conv1x1(x)) + average3x3(conv1x1(x)) + x``. Between a 1x1
    and what follows it the map is padded with the 1x1's bias, so the fold is exact on the border too: the average is a
    depthwise 3x3 convolution with nine equal weights, see `compose_depthwise`.

    Args:
        in_channels, out_channels: at least 1.
        ratio: how many times wider than the input the middle of the branch 1x1, 3x3 is.
        bias: whether all its convolutions have one.
        identity: whether the input is added, where it is as wide as the output.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: in training form `branch_3x3.{weight,bias}`, `branch_1x1.{weight,bias}`,
    `branch_1x1_3x3.{k0,b0,k1,b1}` and `branch_1x1_avg.{weight,bias}`, for want of published names; `rep_conv2.*` in
    deploy form.
    """

    branch_keys = (
        "branch_3x3.weight",
        "branch_1x1.weight",
        "branch_1x1_3x3.k0",
        "branch_1x1_3x3.k1",
        "branch_1x1_avg.weight",
    )
    bias_keys = (
        "branch_3x3.bias",
        "branch_1x1.bias",
        "branch_1x1_3x3.b0",
        "branch_1x1_3x3.b1",
        "branch_1x1_avg.bias",
    )
    default_deploy_name = "rep_conv2"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        ratio: int = 2,
        bias: bool = True,
        identity: bool = True,
        **options: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, ratio=ratio)
        super().__init__(in_channels, out_channels, bias=bias, **options)
        self.identity = bool(identity)
        if not self.deployed:
            self.branch_3x3 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
            self.branch_1x1 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
            self.branch_1x1_3x3 = Pair(in_channels, ratio * in_channels, out_channels, bias)
            self.branch_1x1_avg = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def options(self) -> dict[str, Any]:
        return {"identity": self.identity}

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], identity: bool = True) -> Kernel:  # type: ignore[override]
        averaged = branch(parameters, "branch_1x1_avg")
        average = averaged[0].new_full((averaged[0].shape[0], 1, 3, 3), 1 / 9)
        first, second = ((parameters[f"branch_1x1_3x3.k{i}"], parameters.get(f"branch_1x1_3x3.b{i}")) for i in (0, 1))
        branches = merge(
            branch(parameters, "branch_3x3"),
            branch(parameters, "branch_1x1"),
            compose(first, second),
            compose_depthwise(averaged, (average, None)),
        )
        return add_identity(branches, identity)
