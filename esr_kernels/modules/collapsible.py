"""SMRN's re-parameterised convolutions: the collapsible block of its RIMB, and RBSB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..library import PADDING_MODES
from ..reparam.algebra import Kernel, add_identity, branch, compose, merge
from ..reparam.base import Reparameterized
from .arguments import PaddingMode, positive


class CollapsibleConv(Reparameterized):
    """SESR's collapsible linear block (Bhardwaj et al.), the convolution of SMRN's RIMB (report section 4.10).

    ``y = squeeze(expand(x)) + x``: a 3x3 convolution without a bias into many channels, a 1x1 back, and SESR's short
    residual, collapsed too. No convolution follows a padded map but the first, so zero padding is exact:
    ``W = Q E + I at the centre tap``, b that of `squeeze`. RIMB is `CollapsibleConv(48, 48, bias=False,
    activation="gelu")`.

    Args:
        in_channels, out_channels: at least 1.
        width: of the expanded space.
        bias: whether `squeeze` has one.
        identity: whether the input is added, where it is as wide as the output.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `conv_expand.weight`, `conv_squeeze.{weight,bias}` in training form, for want of published names;
    `weight` and `bias` in deploy form.
    """

    branch_keys = ("conv_expand.weight", "conv_squeeze.weight")
    bias_keys = ("conv_squeeze.bias",)
    default_deploy_name = ""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 256,
        bias: bool = True,
        identity: bool = True,
        **options: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, width=width)
        super().__init__(in_channels, out_channels, bias=bias, **options)
        self.identity = bool(identity)
        if not self.deployed:
            self.conv_expand = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.conv_squeeze = nn.Conv2d(width, out_channels, 1, bias=bias)

    def options(self) -> dict[str, Any]:
        return {"identity": self.identity}

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], identity: bool = True) -> Kernel:  # type: ignore[override]
        return add_identity(compose(branch(parameters, "conv_expand"), branch(parameters, "conv_squeeze")), identity)


class RBSB(Reparameterized):
    """SMRN's re-parameterised blueprint separable convolution (report section 4.10), folded into one `BSConv`.

    The report names it and refers to SESR; this is a blueprint separable convolution whose halves have branches:
    ``t = squeeze(expand(x)) + x`` (1x1, 1x1), ``y = depthwise3x3(t) + depthwise1x1(t) + t``. The 1x1 halves have no
    bias, so that t is zero where x is, and padding t with zeros is padding x; by reflection it is the same t for every
    branch of the second half. Hence ``P = Q E + I``, ``D = D3 + (D1 + 1) at the centre tap``, b that of `depthwise3x3`.

    Args:
        in_channels, out_channels: at least 1.
        width: of the 1x1's expanded space.
        bias: whether there is one.
        identity: whether t is added in the second half, and x in the first where it is as wide as the output.
        padding_mode: "zeros" or "reflect", of t.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `pw_expand.weight`, `pw_squeeze.weight`, `dw_1x1.weight`, `dw_3x3.{weight,bias}` in training form, for
    want of published names; `pw.weight`, `dw.{weight,bias}` in deploy form, as `BSConv`.
    """

    branch_keys = ("pw_expand.weight", "pw_squeeze.weight", "dw_3x3.weight", "dw_1x1.weight")
    bias_keys = ("dw_3x3.bias",)
    deploy_keys = ("pw.weight", "dw.weight", "dw.bias")
    default_deploy_name = ""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 256,
        bias: bool = True,
        identity: bool = True,
        padding_mode: PaddingMode = "zeros",
        **options: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, width=width)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        super().__init__(in_channels, out_channels, bias=bias, **options)
        self.identity, self.padding_mode = bool(identity), padding_mode
        if not self.deployed:
            o = out_channels
            self.pw_expand = nn.Conv2d(in_channels, width, 1, bias=False)
            self.pw_squeeze = nn.Conv2d(width, o, 1, bias=False)
            self.dw_3x3 = nn.Conv2d(o, o, 3, padding=1, groups=o, bias=bias)
            self.dw_1x1 = nn.Conv2d(o, o, 1, groups=o, bias=False)

    def options(self) -> dict[str, Any]:
        return {"identity": self.identity}

    def _build_deployed(self, bias: bool) -> None:
        holder: nn.Module = self
        if self.deploy_name:
            holder = nn.Module()
            self.add_module(self.deploy_name, holder)
        o = self.out_channels
        holder.pw = nn.Conv2d(self.in_channels, o, 1, bias=False)
        holder.dw = nn.Conv2d(o, o, 3, padding=1, groups=o, bias=bias)

    @staticmethod
    def combine(  # type: ignore[override]
        parameters: Mapping[str, Tensor], identity: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pointwise = compose(branch(parameters, "pw_expand"), branch(parameters, "pw_squeeze"))
        depthwise = [branch(parameters, "dw_3x3"), branch(parameters, "dw_1x1")]
        if identity:
            depthwise.append((torch.ones_like(depthwise[1][0]), None))
        return (add_identity(pointwise, identity)[0], *merge(*depthwise))

    def fold(self) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        """Weights [O, I, 1, 1] and [O, 1, 3, 3] and bias [O] or None: computed in float64, rounded to the dtype."""
        return super().fold()  # type: ignore[return-value]

    def folded(self) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        """What `functional.bsconv` takes; gradients flow through it to the branches' parameters."""
        return self._folded()  # type: ignore[return-value]

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]; a residual [N, O, H, W] with its mode as in `functional.bsconv`."""
        return functional.bsconv(
            x,
            *self.folded(),
            padding_mode=self.padding_mode,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_mode=residual_mode,
        )
