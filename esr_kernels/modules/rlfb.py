"""RLFN's block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional
from ..backends.reference._common import activate
from ..reparam.network import fold_batch_norm_entries, fuse_batch_norm
from .arguments import positive
from .conv import Conv1x1, Conv3x3
from .esa import ESA


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
        batch_norm: batch normalisation between the first convolution and its activation (RLFN_BN, report section 4.17),
            which `reparam.deploy` folds into the convolution.

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

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]; height and width at least `minimum_size`."""
        first = self.c1_r
        if self.bn1 is None:
            y = first(x)
        else:
            h = self.bn1(functional.conv3x3(x, first.weight, first.bias))
            y = activate(h, first.activation, first.negative_slope)
        return self.esa(self.c5(self.c3_r(self.c2_r(y), residual=x)))

    def switch_to_deploy(self) -> None:
        """Fold the batch normalisation into the first convolution, in place."""
        if self.bn1 is not None:
            fuse_batch_norm(self.c1_r, self.bn1)
            self.bn1 = None

    def fold_entries(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """The same for this block's entries of a network's state dict, where it is called `prefix`."""
        fold_batch_norm_entries(state, f"{prefix}c1_r.", f"{prefix}bn1.", nn.BatchNorm2d(1).eps)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.bn1 is None:
            try:
                self.fold_entries(state_dict, prefix)
            except ValueError as error:
                error_messages = args[-1]
                error_messages.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)
