"""RCN, RLFN with re-parameterised convolutions and layer normalisation.

Team MeowMeowMeow, rank 15, report section 4.19.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RCB     |   n = LN(x); three 3x3 with GELU of n, + n; LN, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

LN: layer normalisation over the channels of a pixel.

Particular: the residual of a block is its normalised input, not its input. In training form the 3x3 convolutions of
the blocks are ECBs (a 3x3, a 1x1 and 3x3, three edge filters and the identity), which the files call c1_r, c2_r, c3_r;
folded they are conv1_r, conv2_r, conv3_r.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from esr_kernels.modules import ECB, ESA

from .base import ResidualNetwork
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1

# A folded convolution in our blocks and in the published files.
_OURS, _THEIRS = re.compile(r"\bc([123])_r\.conv_infer\."), re.compile(r"\bconv([123])_r\.")


def _rename(state: dict[str, Any], prefix: str, pattern: re.Pattern[str], name: str) -> None:
    for key in [k for k in state if k.startswith(prefix) and pattern.match(k, len(prefix))]:
        state[prefix + pattern.sub(name, key[len(prefix) :])] = state.pop(key)


class _RCB(nn.Module):
    """Re-parameterised convolutional block, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        self.ln1 = b.layer_norm2d(channels)
        self.c1_r = b.rep(ECB, channels, channels, activation="gelu", deploy=deploy)
        self.c2_r = b.rep(ECB, channels, channels, activation="gelu", deploy=deploy)
        self.c3_r = b.rep(ECB, channels, channels, activation="gelu", deploy=deploy)
        self.ln2 = b.layer_norm2d(channels)
        self.c5 = b.conv1x1(channels, channels)
        self.esa = b.esa(channels, 16)

    def forward(self, x: Tensor) -> Tensor:
        n = self.ln1(x)
        y = self.c3_r(self.c2_r(self.c1_r(n)), residual=n)
        return self.esa(self.c5(self.ln2(y)))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        _rename(state, prefix, _OURS, r"conv\1_r.")
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _rename(state_dict, prefix, _THEIRS, r"c\1_r.conv_infer.")
        super()._load_from_state_dict(state_dict, prefix, *args)


class RCN(ResidualNetwork):
    """RCN (report section 4.19).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "rcn"
    minimum_size = ESA.minimum_size

    def __init__(self, *, feature_channels: int = 40, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", _RCB(b, c, deploy))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)

    @classmethod
    def fold(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_OURS.sub(r"conv\1_r.", key): value for key, value in super().fold(state).items()}


class PlainRCN(RCN):
    """`RCN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rcn",
        title="RCN",
        team="MeowMeowMeow",
        team_id=4,
        section="4.19",
        parameters=238_360,
        flops=14_474_577_920,
        table1=TABLE1[4],
    ),
    RCN,
    PlainRCN,
)
