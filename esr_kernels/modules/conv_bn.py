"""Convolution and batch normalisation, folded into the convolution for use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..backends.reference._common import epilogue
from ..reparam.algebra import Kernel, branch, fold_batch_norm
from ..reparam.base import Reparameterized
from .arguments import known_residual_mode, positive


class ConvBN(Reparameterized):
    """3x3 or 1x1 convolution, batch normalisation and activation, as after RLFN_BN's first convolutions (section 4.17).

    In training mode the normalisation takes the batch's statistics, which depend on the picture: the two run one after
    the other. In eval mode it takes the running ones, and the two are one convolution, see `fold_batch_norm`.

    Args:
        in_channels, out_channels: at least 1.
        kernel_size: 1 or 3.
        bias: whether the convolution has one; the folded one always does.
        eps, momentum: of the normalisation.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `conv.{weight,bias}`, `bn.{weight,bias,running_mean,running_var,num_batches_tracked}` in training form;
    `weight` and `bias` in deploy form. Since `eps` is not in it, `fold_state_dict` needs the model.
    """

    branch_keys = ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
    bias_keys = ("conv.bias",)
    extra_keys = ("bn.num_batches_tracked",)
    default_deploy_name = ""
    recognised = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.1,
        **options: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels)
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size: expected 1 or 3, got {kernel_size!r}")
        super().__init__(in_channels, out_channels, kernel_size, True, **options)
        self.eps = float(eps)
        if not self.deployed:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
            self.bn = nn.BatchNorm2d(out_channels, eps, momentum)

    def options(self) -> dict[str, Any]:
        return {"eps": self.eps}

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], eps: float = 1e-5) -> Kernel:  # type: ignore[override]
        mean, variance = parameters["bn.running_mean"], parameters["bn.running_var"]
        conv = branch(parameters, "conv")
        return fold_batch_norm(conv, mean, variance, parameters["bn.weight"], parameters["bn.bias"], eps)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """As `Reparameterized.folded`, in eval mode.

        Raises:
            RuntimeError: in training mode, where the normalisation depends on the input.
        """
        if self.training and not self.deployed:
            raise RuntimeError("in training mode batch normalisation cannot be folded: call eval() or deploy the model")
        return super().folded()

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        """As `Reparameterized.forward`."""
        if self.deployed or not self.training:
            return super().forward(x, residual, residual_mode)
        known_residual_mode(residual_mode, self.activation)
        conv = functional.conv1x1 if self.kernel_size == 1 else functional.conv3x3
        h = self.bn(conv(x, self.conv.weight, self.conv.bias))
        return epilogue(h, residual, self.activation, self.negative_slope, residual_mode)
