"""PFDNLite's re-parameterised convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reparam.algebra import Kernel, add_identity, branch, compose, merge
from ..reparam.base import Reparameterized
from .arguments import positive


class RepMBConv(Reparameterized):
    """An inverted bottleneck without activations as one 3x3 convolution, PFDNLite's RepMBConv (report section 4.3).

    ``y = reduce(spatial(expand(x))) + skip(x)``: MobileNetV3's block, 1x1, 3x3, 1x1, with a plain 3x3 in place of the
    depthwise one and a 1x1 skip, so that it may change the number of channels (48 to 24 in the pruned block). The map
    between `expand` and the 3x3 is padded with the bias of `expand`; the fold is then Conv3XC's, exact on the border.

    Args:
        in_channels, out_channels: at least 1.
        ratio: how many times wider the middle is than input and output.
        bias: whether all its convolutions have one.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `expand_conv.*`, `fea_conv.*`, `reduce_conv.*`, `identity_conv.*` in training form; `weight` and `bias`
    in deploy form.
    """

    branch_keys: ClassVar[tuple[str, ...]] = (
        "identity_conv.weight",
        "expand_conv.weight",
        "fea_conv.weight",
        "reduce_conv.weight",
    )
    bias_keys: ClassVar[tuple[str, ...]] = (
        "identity_conv.bias",
        "expand_conv.bias",
        "fea_conv.bias",
        "reduce_conv.bias",
    )
    default_deploy_name = ""

    def __init__(
        self, in_channels: int, out_channels: int, *, ratio: int = 2, bias: bool = True, **options: Any
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, ratio=ratio)
        super().__init__(in_channels, out_channels, bias=bias, **options)
        if not self.deployed:
            self.identity_conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
            self.expand_conv = nn.Conv2d(in_channels, ratio * in_channels, 1, bias=bias)
            self.fea_conv = nn.Conv2d(ratio * in_channels, ratio * out_channels, 3, bias=bias)
            self.reduce_conv = nn.Conv2d(ratio * out_channels, out_channels, 1, bias=bias)

    @staticmethod
    def combine(parameters: Mapping[str, Tensor]) -> Kernel:  # type: ignore[override]
        names = ("expand", "fea", "reduce", "identity")
        expand, spatial, reduce, skip = (branch(parameters, f"{name}_conv") for name in names)
        return merge(compose(expand, compose(spatial, reduce)), skip)


class RepMBConvPoint(RepMBConv):
    """`RepMBConv` and the re-parameterised point-wise convolution that PFDNLite has after some (report section 4.3).

    ``t = RepMBConv(x); y = project(expand(t)) + t``: with nothing in between it is the same 3x3 convolution of x, whose
    outputs are mixed: ``W = (P E + I) W_t``, ``b = (P E + I) b_t + P b_E + b_P``.

    Args: as of `RepMBConv`; `ratio` is that of the point-wise pair too.

    State dict: as `RepMBConv`'s, and `point_expand.*`, `point_project.*` in training form.
    """

    branch_keys = (*RepMBConv.branch_keys, "point_expand.weight", "point_project.weight")
    bias_keys = (*RepMBConv.bias_keys, "point_expand.bias", "point_project.bias")

    def __init__(
        self, in_channels: int, out_channels: int, *, ratio: int = 2, bias: bool = True, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, ratio=ratio, bias=bias, **options)
        if not self.deployed:
            self.point_expand = nn.Conv2d(out_channels, ratio * out_channels, 1, bias=bias)
            self.point_project = nn.Conv2d(ratio * out_channels, out_channels, 1, bias=bias)

    @staticmethod
    def combine(parameters: Mapping[str, Tensor]) -> Kernel:  # type: ignore[override]
        expand, project = (branch(parameters, f"point_{name}") for name in ("expand", "project"))
        return compose(RepMBConv.combine(parameters), add_identity(compose(expand, project)))


class _StaticExcitation(nn.Module):
    # Not ones, as elsewhere: they saturate the sigmoid of a wide middle, and it never learns.
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.tensor = nn.Parameter(torch.full((1, channels, 1, 1), 0.1))
        squeezed = max(1, channels // reduction)
        first = nn.Linear(channels, squeezed, bias=False)
        second = nn.Linear(squeezed, channels, bias=False)
        self.se = nn.ModuleDict({"1": first, "3": second})


class RepMBConvSE(Reparameterized):
    """`RepMBConv` with the squeeze-and-excitation of MobileNetV3's block (report section 4.3, Fig. 5).

    ``t = expand(x); y = reduce(s * spatial(t) + t) + x``. Excitation that depends on the picture is not linear in it
    and could not be folded; here it depends on a learned vector v alone: ``s = sigmoid(W2 silu(W1 v))``, a number per
    channel of the middle. t is padded with the bias of `expand`. ``W = R (s S + I at the centre) E + I at the centre``.

    Args:
        channels: of input and output.
        ratio: how many times wider the middle is.
        reduction: of the middle's width, inside the excitation.
        bias: whether all its convolutions have one.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `expand_conv.*`, `fea_conv.*`, `reduce_conv.*`, `se.tensor`, `se.se.1.weight` and `se.se.3.weight` in
    training form; `weight` and `bias` in deploy form.
    """

    branch_keys = (
        "expand_conv.weight",
        "fea_conv.weight",
        "reduce_conv.weight",
        "se.tensor",
        "se.se.1.weight",
        "se.se.3.weight",
    )
    bias_keys = ("expand_conv.bias", "fea_conv.bias", "reduce_conv.bias")
    default_deploy_name = ""

    def __init__(self, channels: int, *, ratio: int = 2, reduction: int = 4, bias: bool = True, **options: Any) -> None:
        positive(channels=channels, ratio=ratio, reduction=reduction)
        super().__init__(channels, channels, bias=bias, **options)
        if not self.deployed:
            self.expand_conv = nn.Conv2d(channels, ratio * channels, 1, bias=bias)
            self.fea_conv = nn.Conv2d(ratio * channels, ratio * channels, 3, bias=bias)
            self.reduce_conv = nn.Conv2d(ratio * channels, channels, 1, bias=bias)
            self.se = _StaticExcitation(ratio * channels, reduction)

    @staticmethod
    def combine(parameters: Mapping[str, Tensor]) -> Kernel:  # type: ignore[override]
        expand, (weight, bias), reduce = (branch(parameters, f"{name}_conv") for name in ("expand", "fea", "reduce"))
        # Sums of products and not matrix products, which autocast would round.
        squeezed = F.silu((parameters["se.se.1.weight"] * parameters["se.tensor"].flatten()).sum(1))
        excitation = (parameters["se.se.3.weight"] * squeezed).sum(1).sigmoid()
        spatial = weight * excitation[:, None, None, None], None if bias is None else bias * excitation
        return add_identity(compose(expand, compose(add_identity(spatial), reduce)))
