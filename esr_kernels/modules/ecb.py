"""Edge-oriented re-parameterised convolutions: ECB, and RepBlock of IFADNet and LSANet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..reparam.algebra import Kernel, add_identity, compose, compose_depthwise, merge
from ..reparam.base import Reparameterized
from .arguments import positive

_EDGES = ("sbx", "sby", "lpl")


def edge_mask(edge: str, isotropic: bool = False) -> Tensor:
    """The fixed [3, 3] kernel "sbx" (Sobel-x), "sby" (its transpose) or "lpl" (Laplacian).

    The isotropic Sobel kernels weigh the middle row with the square root of 2 in place of 2, so that the two gradients'
    length is the same for an edge along an axis and along a diagonal.
    """
    if edge == "lpl":
        return torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    middle = math.sqrt(2) if isotropic else 2.0
    sobel = torch.tensor([1.0, middle, 1.0])[:, None] * torch.tensor([1.0, 0.0, -1.0])
    return sobel if edge == "sbx" else sobel.T.contiguous()


class Pair(nn.Module):
    """The parameters of a 1x1 and a 3x3 convolution, named as in ECB's files: k0, b0, k1, b1."""

    def __init__(self, inputs: int, middle: int, outputs: int, bias: bool) -> None:
        super().__init__()
        first, second = nn.Conv2d(inputs, middle, 1, bias=bias), nn.Conv2d(middle, outputs, 3, bias=bias)
        self.k0, self.b0 = first.weight, first.bias
        self.k1, self.b1 = second.weight, second.bias


class _Edge(nn.Module):
    """1x1 convolution and a depthwise one whose kernel is a fixed mask times a learned number per channel."""

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, mask: Tensor, bias: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.k0, self.b0 = conv.weight, conv.bias
        self.scale = nn.Parameter(torch.randn(outputs, 1, 1, 1) * 1e-3)
        self.bias = nn.Parameter(torch.randn(outputs) * 1e-3) if bias else None
        self.register_buffer("mask", mask.repeat(outputs, 1, 1, 1))


def _edges(parameters: Mapping[str, Tensor], name: str) -> list[Kernel]:
    """The three edge branches, `name` with the edge in place of {}."""
    kernels = []
    for branch in (name.format(edge) for edge in _EDGES):
        first = parameters[f"{branch}.k0"], parameters.get(f"{branch}.b0")
        edge = parameters[f"{branch}.scale"] * parameters[f"{branch}.mask"]
        kernels.append(compose_depthwise(first, (edge, parameters.get(f"{branch}.bias"))))
    return kernels


class ECB(Reparameterized):
    """Edge-oriented convolution block (Zhang et al., ECBSR; report sections 4.9 and 4.19).

    ``y = conv3x3(x) + conv3x3(conv1x1(x)) + sum over edges of edge(conv1x1(x)) + x``, with the edges Sobel-x, Sobel-y
    and Laplacian. Between a 1x1 and a 3x3 the map is padded with the 1x1's bias and not with zero, so the fold is exact
    on the border too, see `compose`.

    Args:
        in_channels, out_channels: at least 1.
        depth_multiplier: how many times wider than the output the middle of the branch 1x1, 3x3 is.
        bias: whether all its convolutions have one.
        identity: whether the input is added, where it is as wide as the output.
        isotropic: whether the Sobel kernels are the isotropic ones, see `edge_mask`. They are in the state dict: a
            loaded one brings its own.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: in training form `conv3x3.{weight,bias}`, `conv1x1_3x3.{k0,b0,k1,b1}` and
    `conv1x1_{sbx,sby,lpl}.{k0,b0,scale,bias,mask}` (the mask is a buffer); `conv_infer.*` in deploy form.
    """

    branch_keys = (
        "conv3x3.weight",
        "conv1x1_3x3.k0",
        "conv1x1_3x3.k1",
        *(f"conv1x1_{edge}.{key}" for edge in _EDGES for key in ("k0", "scale", "mask")),
    )
    bias_keys = (
        "conv3x3.bias",
        "conv1x1_3x3.b0",
        "conv1x1_3x3.b1",
        *(f"conv1x1_{edge}.{key}" for edge in _EDGES for key in ("b0", "bias")),
    )
    default_deploy_name = "conv_infer"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        depth_multiplier: float = 2.0,
        bias: bool = True,
        identity: bool = True,
        isotropic: bool = False,
        **options: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels)
        middle = int(out_channels * depth_multiplier)
        if middle < 1:
            raise ValueError(f"depth_multiplier: leaves no channel of {out_channels}, got {depth_multiplier}")
        super().__init__(in_channels, out_channels, bias=bias, **options)
        self.identity = bool(identity)
        if not self.deployed:
            self.conv3x3 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
            self.conv1x1_3x3 = Pair(in_channels, middle, out_channels, bias)
            for edge in _EDGES:
                mask = edge_mask(edge, isotropic)
                self.add_module(f"conv1x1_{edge}", _Edge(in_channels, out_channels, mask, bias))

    def options(self) -> dict[str, Any]:
        return {"identity": self.identity}

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], identity: bool = True) -> Kernel:  # type: ignore[override]
        plain = parameters["conv3x3.weight"], parameters.get("conv3x3.bias")
        first, second = ((parameters[f"conv1x1_3x3.k{i}"], parameters.get(f"conv1x1_3x3.b{i}")) for i in (0, 1))
        edges = _edges(parameters, "conv1x1_{}")
        return add_identity(merge(plain, compose(first, second), *edges), identity)


class RepBlock(Reparameterized):
    """The edge-oriented convolution of IFADNet's and LSANet's attention blocks (report sections 4.12 and 4.14).

    ``y = conv3x3(x) + conv3x3(conv1x1(x)) + sum over edges of edge(conv1x1(x)) + x`` as `ECB`, but the branch 1x1, 3x3
    has no biases and is padded with zeros in between, which is then the same thing.

    Args:
        in_channels, out_channels: at least 1.
        bias: whether the plain convolution and the edge branches have one.
        identity: whether the input is added, where it is as wide as the output.
        isotropic: as in `ECB`. The report speaks of isotropic Sobel kernels; the published networks have the usual.
        options: `activation`, `negative_slope`, `deploy`, `deploy_name` of `Reparameterized`.

    State dict: in training form `rbr_3x3_branch.{weight,bias}`, `rbr_1x1_3x3_branch_{1x1,3x3}.weight` and
    `rbr_conv1x1_{sbx,sby,lpl}_branch.{k0,b0,scale,bias,mask}` (the mask is a buffer); `rbr_reparam.*` in deploy form.
    """

    branch_keys = (
        "rbr_3x3_branch.weight",
        "rbr_1x1_3x3_branch_1x1.weight",
        "rbr_1x1_3x3_branch_3x3.weight",
        *(f"rbr_conv1x1_{edge}_branch.{key}" for edge in _EDGES for key in ("k0", "scale", "mask")),
    )
    bias_keys = (
        "rbr_3x3_branch.bias",
        *(f"rbr_conv1x1_{edge}_branch.{key}" for edge in _EDGES for key in ("b0", "bias")),
    )
    default_deploy_name = "rbr_reparam"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        identity: bool = True,
        isotropic: bool = False,
        **options: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels)
        super().__init__(in_channels, out_channels, bias=bias, **options)
        self.identity = bool(identity)
        if not self.deployed:
            self.rbr_3x3_branch = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
            self.rbr_1x1_3x3_branch_1x1 = nn.Conv2d(in_channels, 2 * in_channels, 1, bias=False)
            self.rbr_1x1_3x3_branch_3x3 = nn.Conv2d(2 * in_channels, out_channels, 3, padding=1, bias=False)
            for edge in _EDGES:
                mask = edge_mask(edge, isotropic)
                self.add_module(f"rbr_conv1x1_{edge}_branch", _Edge(in_channels, out_channels, mask, bias))

    def options(self) -> dict[str, Any]:
        return {"identity": self.identity}

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], identity: bool = True) -> Kernel:  # type: ignore[override]
        plain = parameters["rbr_3x3_branch.weight"], parameters.get("rbr_3x3_branch.bias")
        first, second = ((parameters[f"rbr_1x1_3x3_branch_{k}.weight"], None) for k in ("1x1", "3x3"))
        edges = _edges(parameters, "rbr_conv1x1_{}_branch")
        return add_identity(merge(plain, compose(first, second), *edges), identity)
