"""x times an activation of the sum of maps that are resized to it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._common import activate, activation_backward, aten, finish, masked, upcast


def _resize(t: Tensor, x: Tensor, mode: str) -> Tensor:
    t = upcast(t)
    if t.shape[2:] == x.shape[2:]:
        return t
    corners = False if mode == "bilinear" else None
    return F.interpolate(t, size=x.shape[2:], mode=mode, align_corners=corners)


def _sum(x: Tensor, maps: list[Tensor], mode: str) -> Tensor:
    total = _resize(maps[0], x, mode)
    for t in maps[1:]:
        total = total + _resize(t, x, mode)
    return total


def modulate(x: Tensor, maps: list[Tensor], mode: str, activation: str, negative_slope: float) -> Tensor:
    return finish(activate(_sum(x, maps, mode), activation, negative_slope) * upcast(x), x)


def modulate_backward(
    grad: Tensor,
    x: Tensor,
    maps: list[Tensor],
    mode: str,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to x and to each map; the sum is computed again, not stored."""
    grad = upcast(grad)
    total = _sum(x, maps, mode)
    gx = grad * activate(total, activation, negative_slope) if output_mask[0] else None
    gradients = [masked(gx, x)]
    to_sum = activation_backward(grad * upcast(x), total, activation, negative_slope) if any(output_mask[1:]) else grad
    size = list(x.shape[2:])
    for t, wanted in zip(maps, output_mask[1:], strict=True):
        g: Tensor | None = to_sum
        if not wanted:
            g = None
        elif t.shape[0] == 0:
            g = t
        elif t.shape[2:] != x.shape[2:] and mode == "bilinear":
            g = aten.upsample_bilinear2d_backward(to_sum, size, list(t.shape), False, None, None)
        elif t.shape[2:] != x.shape[2:]:
            g = aten.upsample_nearest2d_backward(to_sum, size, list(t.shape), None, None)
        gradients.append(masked(g, t))
    return gradients
