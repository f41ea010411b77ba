"""Initial weights for short trainings."""

from __future__ import annotations

import torch
from torch import nn

_LAST = 0.1


@torch.no_grad()
def he(model: nn.Module) -> None:
    """Normally distributed weights with which the signal keeps its size through all layers (He et al., 2015).

    The variance is 2 / fan_in of spatial kernels, 1 / fan_in of 1x1 ones; biases are 0. PyTorch's own initialisation
    makes the signal smaller in every layer, and multiplicative attention as SPAN's, whose output is of the second
    order, then silences the deeper blocks for thousands of iterations. The last convolution gets a tenth, so that the
    first output is small.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for conv in convolutions:
        spatial = conv.kernel_size != (1, 1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu" if spatial else "linear")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    if convolutions:
        convolutions[-1].weight.mul_(_LAST)
