"""Every operator in plain PyTorch: the specification, the oracle of the tests and the fallback.

Imports torch and nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .adaptive_max_pool import adaptive_max_pool, adaptive_max_pool_backward
from .bsconv import bsconv, bsconv_backward
from .conv1x1 import conv1x1, conv1x1_backward
from .conv3x3 import conv3x3, conv3x3_backward
from .conv3x3_pixel_shuffle import conv3x3_pixel_shuffle, conv3x3_pixel_shuffle_backward
from .depthwise_conv import depthwise_conv, depthwise_conv_backward
from .esa import esa, esa_backward
from .layer_norm2d import layer_norm2d, layer_norm2d_backward
from .modulate import modulate, modulate_backward
from .run_plan import run_plan
from .selective_scan import selective_scan, selective_scan_backward
from .spab import spab, spab_backward
from .window_attention import window_attention, window_attention_backward

OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        conv3x3,
        conv3x3_backward,
        spab,
        spab_backward,
        conv3x3_pixel_shuffle,
        conv3x3_pixel_shuffle_backward,
        conv1x1,
        conv1x1_backward,
        esa,
        esa_backward,
        bsconv,
        bsconv_backward,
        depthwise_conv,
        depthwise_conv_backward,
        layer_norm2d,
        layer_norm2d_backward,
        adaptive_max_pool,
        adaptive_max_pool_backward,
        modulate,
        modulate_backward,
        selective_scan,
        selective_scan_backward,
        window_attention,
        window_attention_backward,
        run_plan,
    )
}
