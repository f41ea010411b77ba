"""FMEN's re-parameterised convolution and its block of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..reparam.algebra import Kernel, add_identity, branch, compose
from ..reparam.base import Reparameterized
from .arguments import positive


class RRRB(Reparameterized):
    """Residual in residual re-parameterised block (Du et al., FMEN), R2Net's and ERRN's (report sections 4.2, 4.20).

    ``t = expand(x); y = reduce(spatial(t) + t) + x`` with a 1x1, a 3x3 and a 1x1 convolution and nothing in between. t
    is padded with the bias of `expand`, as if x had been padded with zeros before it, so that the constant an output
    gets is the same on the border and elsewhere and the fold is exact:
    ``W = R (S + I at the centre tap) E + I at the centre tap``. R2Net's has no biases, and pads with zeros.

    Args:
        channels: of input and output.
        ratio: how many times wider the middle is.
        bias: whether all its convolutions have one.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: `expand_conv.*`, `fea_conv.*`, `reduce_conv.*` in training form; `rep_conv.*` in deploy form (ERRN's
    files; R2Net's have the weight itself, `deploy_name=""`).
    """

    branch_keys = ("expand_conv.weight", "fea_conv.weight", "reduce_conv.weight")
    bias_keys = ("expand_conv.bias", "fea_conv.bias", "reduce_conv.bias")
    default_deploy_name = "rep_conv"

    def __init__(self, channels: int, *, ratio: int = 2, bias: bool = True, **options: Any) -> None:
        positive(channels=channels, ratio=ratio)
        super().__init__(channels, channels, bias=bias, **options)
        if not self.deployed:
            self.expand_conv = nn.Conv2d(channels, ratio * channels, 1, bias=bias)
            self.fea_conv = nn.Conv2d(ratio * channels, ratio * channels, 3, bias=bias)
            self.reduce_conv = nn.Conv2d(ratio * channels, channels, 1, bias=bias)

    @staticmethod
    def combine(parameters: Mapping[str, Tensor]) -> Kernel:  # type: ignore[override]
        expand, spatial, reduce = (branch(parameters, f"{name}_conv") for name in ("expand", "fea", "reduce"))
        return add_identity(compose(expand, compose(add_identity(spatial), reduce)))


class ERB(nn.Module):
    """Enhanced residual block (FMEN; report section 4.20): two `RRRB` with a leaky ReLU of slope 0.1 in between.

    Args:
        channels, ratio, bias, deploy: as in `RRRB`.

    State dict: `conv1.*` and `conv2.*`, each as `RRRB`'s.
    """

    def __init__(self, channels: int, *, ratio: int = 2, bias: bool = True, deploy: bool = False) -> None:
        super().__init__()
        self.conv1 = RRRB(channels, ratio=ratio, bias=bias, deploy=deploy, activation="leaky_relu", negative_slope=0.1)
        self.conv2 = RRRB(channels, ratio=ratio, bias=bias, deploy=deploy)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return self.conv2(self.conv1(x))
