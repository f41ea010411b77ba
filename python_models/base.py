"""What every network here has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.reparam import fold_state_dict

from .layers import FUSED, Layers

if TYPE_CHECKING:
    from typing_extensions import Self

# Mean of DIV2K's pixels in [0, 1].
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class Network(nn.Module):
    """A super-resolution network.

    Attributes:
        kit: what it is built from: its twin in plain PyTorch has `PLAIN` here.
        name: its name in the registry.
        scale: the output is this many times larger than the input.
        data_range: inputs and outputs are in [0, data_range]; outputs are not clamped.
        receptive_radius: low-resolution pixels to each side on which an output depends; None: on the whole image.
        minimum_size: smallest height and width of an input.
        in_channels: of the input image.
        options: the keyword arguments it was built with, as `python_models.create` and `plain` take them.
    """

    kit: ClassVar[Layers] = FUSED
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

    @classmethod
    def fold(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in any form in the slim one, with the published names; ValueError where branches do not fit."""
        return fold_state_dict(state)

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

    def enlarged(self, x: Tensor) -> Tensor:
        """The image resized bilinearly to the size of the result: [N, C, H, W] -> [N, C, scale H, scale W]."""
        return F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)


class ResidualNetwork(Network):
    """A network of RLFN's shape, which several others share; a subclass defines the layers.

    Layers: `conv_1`, blocks `block_1`, `block_2`, ... in a row, `conv_2`, a skip from `conv_1` over all of them, and
    `upsampler`. With `image_skip` the bilinearly enlarged image is added to the result.
    """

    conv_1: nn.Module
    conv_2: nn.Module
    upsampler: nn.Module
    num_blocks: int = 4
    image_skip: ClassVar[bool] = False

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, scale H, scale W]."""
        self.check_input(x)
        shallow = self.conv_1(x)
        y = shallow
        for i in range(1, self.num_blocks + 1):
            y = self.get_submodule(f"block_{i}")(y)
        return self.upsampler(self.conv_2(y, residual=shallow), self.enlarged(x) if self.image_skip else None)
