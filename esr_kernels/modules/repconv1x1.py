"""R2Net's re-parameterised 1x1 convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..reparam.algebra import Kernel, add_identity, branch, compose
from ..reparam.base import Reparameterized
from .arguments import positive


class RepConv1x1(Reparameterized):
    """A 1x1 convolution trained as a transformer's feed-forward network without its activation (report section 4.2).

    ``y = project(expand(x)) + x``: the second half of R2Net's double re-parameterisation, and the re-parameterised
    point-wise convolution of PFDNLite (section 4.3). Two linear maps per pixel and the identity are one linear map,
    ``W = P E + I``, ``b = P b_E + b_P``; there is no border.

    Args:
        in_channels, out_channels: at least 1.
        ratio: how many times wider than the input the middle is.
        bias: whether both convolutions have one; R2Net's have none.
        identity: whether the input is added, where it is as wide as the output.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `ffn_expand.*`, `ffn_project.*` in training form, for want of published names; `weight` [O, I, 1, 1] and
    `bias` in deploy form, as in R2Net's `conv_2`.
    """

    branch_keys = ("ffn_expand.weight", "ffn_project.weight")
    bias_keys = ("ffn_expand.bias", "ffn_project.bias")
    default_deploy_name = ""

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
        super().__init__(in_channels, out_channels, 1, bias, **options)
        self.identity = bool(identity)
        if not self.deployed:
            self.ffn_expand = nn.Conv2d(in_channels, ratio * in_channels, 1, bias=bias)
            self.ffn_project = nn.Conv2d(ratio * in_channels, out_channels, 1, bias=bias)

    def options(self) -> dict[str, Any]:
        return {"identity": self.identity}

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], identity: bool = True) -> Kernel:  # type: ignore[override]
        return add_identity(compose(branch(parameters, "ffn_expand"), branch(parameters, "ffn_project")), identity)
