"""Initial weights for short trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.upsampler import Conv3x3PixelShuffle

_LAST = 0.1
_RIDGE = 1e-6  # of the mean square of a feature


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


@torch.no_grad()
def linear(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """`he`, after which the network begins as the linear upscaler that fits the training patches best.

    The network's `only_shallow` leaves nothing but its first convolution between the image and the last one, which is
    then the solution of a least-squares problem: 5x5 pixels decide on each of the enlarged image, which is better than
    bicubic interpolation. The layers that were left out have gradients from the first step on.

    Args:
        model: in training form, on the CPU, its `data_range` known, its last layer a `Conv3x3PixelShuffle`.
        batches: of low-resolution [N, 3, h, w] and high-resolution [N, 3, h r, w r] patches, uint8.

    Raises:
        TypeError: the network has no `only_shallow`.
    """
    only_shallow: Callable[[], None] | None = getattr(model, "only_shallow", None)
    if only_shallow is None:
        raise TypeError(f"model: {type(model).__name__} has no way past its deep layers")
    he(model)
    only_shallow()
    tail = [m for m in model.modules() if isinstance(m, Conv3x3PixelShuffle)][-1]
    features: list[Tensor] = []
    hook = tail.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    size, outputs = tail.weight[0].numel() + 1, tail.weight.shape[0]
    gram, moments = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, outputs, dtype=torch.float64)
    for low, high in batches:
        model(low * (float(model.data_range) / 255))  # type: ignore[arg-type]
        columns = F.unfold(features.pop().double(), 3, padding=1)  # [N, C 9, h w]
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1).transpose(0, 1).flatten(1)
        wanted = F.pixel_unshuffle(high.double(), tail.upscale_factor) * (float(model.data_range) / 255)  # type: ignore[arg-type]
        gram += columns @ columns.T
        moments += columns @ wanted.flatten(2).transpose(1, 2).flatten(0, 1)
    hook.remove()
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()))
    solution = torch.linalg.solve(gram, moments)
    tail.weight.copy_(solution[:-1].T.reshape(tail.weight.shape))
    if tail.bias is not None:
        tail.bias.copy_(solution[-1])
