"""What every network here has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

# Mean of DIV2K's pixels in [0, 1].
RGB_MEAN = (0.4488, 0.4371, 0.4040)


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
    mean: Tensor

    def set_mean(self, rgb_mean: Sequence[float] = RGB_MEAN) -> None:
        """Register `mean`, [1, 3, 1, 1] in the images' range; it is not in the state dict."""
        self.register_buffer("mean", torch.tensor(rgb_mean).view(1, -1, 1, 1), persistent=False)

    @classmethod
    def infer_options(cls, state: Mapping[str, Tensor], slim: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that a state dict was made with, as far as its shapes tell; `slim` is its folded form.

        A network whose names are another's too infers nothing: its widths are what tells the two apart.
        """
        return {}

    def standard(self) -> Self:
        """This network with options that no checkpoint holds at their usual values; may change the weights in place.

        Computes the same function to rounding. Deploy form only, where the network has one.
        """
        return self

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
