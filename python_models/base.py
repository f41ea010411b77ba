"""What every network here has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A super-resolution network.

    Attributes:
        name: its name in the registry.
        scale: the output is this many times larger than the input.
        data_range: inputs and outputs are in [0, data_range]; outputs are not clamped.
        receptive_radius: low-resolution pixels to each side on which an output depends; None: on the whole image.
        minimum_size: smallest height and width of an input.
        in_channels: of the input image.
        options: the keyword arguments it was built with, as `python_models.create` and `plain` take them.
    """

    name: str = ""
    data_range: float = 1.0
    receptive_radius: int | None = None
    minimum_size: int = 1
    scale: int = 4
    in_channels: int = 3
    options: dict[str, Any]

    @classmethod
    def infer_options(cls, state: Mapping[str, Tensor], slim: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that a state dict was made with, as far as its shapes tell; `slim` is its folded form.

        A network whose names are another's too infers nothing: its widths are what tells the two apart.
        """
        return {}

    def check_input(self, x: Tensor) -> None:
        """Raise TypeError or ValueError unless x is a [N, in_channels, H, W] floating-point image, large enough."""
        if torch.jit.is_tracing():
            return
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: {self.name} takes images [N, {self.in_channels}, H, W], got shape {list(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x: {self.name} takes floating-point images in [0, {self.data_range:g}], got {x.dtype}")
        smallest = self.minimum_size
        if x.shape[2] < smallest or x.shape[3] < smallest:
            raise ValueError(
                f"x: {self.name} needs images of at least {smallest} x {smallest} pixels, "
                f"got {x.shape[2]} x {x.shape[3]}"
            )
