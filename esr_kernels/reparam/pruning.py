"""Pruning of networks in deploy form: 3x3 kernels to 1x1, biases, channels.

Unlike folding, pruning changes what a network computes, unless what it removes is zero: train on afterwards.
Modules are named as in `model.named_modules()`, convolutions are `nn.Conv2d` or deployed `Reparameterized`. Every
function returns a changed copy, or numbers. Channel counts that a network keeps in attributes of its own are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules import SPAB, Conv1x1, Conv3x3, Conv3x3PixelShuffle
from .base import Reparameterized
from .network import Module, copied, named, replace

__all__ = ["centre_share", "channel_scores", "prune_biases", "prune_channels", "prune_kernels"]


@torch.no_grad()
def centre_share(model: nn.Module, inputs: Tensor | None = None) -> dict[str, float]:
    """How much of each 3x3 convolution its centre tap does, 0 to 1: what to prune first (report section 4.11).

    Args:
        model: any network; its convolutions with 3x3 kernels, stride 1 and padding 1 are looked at.
        inputs: one input of the network. None: the share is of the weights' absolute values. Otherwise it is of the
            responses' energy, ``|c|^2 / (|c|^2 + |r|^2)`` with c what the centre tap makes of the convolution's input
            and r what the other eight do; convolutions that are not called as modules are then left out.

    Returns:
        shares by name, the largest first; without the convolutions whose weights or responses are all zero.
    """
    convs: dict[str, Any] = {name: m for name, m in model.named_modules() if _is_conv3x3(m)}
    parts: dict[str, Tensor] = {}  # the centre's and the other taps'
    if inputs is None:
        for name, conv in convs.items():
            size = conv.weight.abs().double().sum((0, 1))
            parts[name] = torch.stack([size[1, 1], size.sum() - size[1, 1]])
    else:

        def measure(name: str, conv: Any, args: tuple[Any, ...]) -> None:
            x, w, groups = args[0].double(), conv.weight.double(), getattr(conv, "groups", 1)
            centre = F.conv2d(x, w[:, :, 1:2, 1:2], groups=groups)
            rest = F.conv2d(x, w, padding=1, groups=groups) - centre
            parts[name] = parts.get(name, 0) + torch.stack([centre.square().sum(), rest.square().sum()])

        handles = [conv.register_forward_pre_hook(partial(measure, name)) for name, conv in convs.items()]
        try:
            model(inputs)
        finally:
            for handle in handles:
                handle.remove()
    shares = {name: float(part[0] / part.sum()) for name, part in parts.items() if part.sum() > 0}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def prune_kernels(model: Module, names: Iterable[str]) -> Module:
    """A copy with 3x3 convolutions replaced by the 1x1 of their centre taps (AdvancedSR, report section 4.11).

    Exact where the other eight taps are zero. A `Conv3x3` becomes a `Conv1x1` with the same activation,
    `Conv3x3PixelShuffle` is then a 1x1 operator and a pixel shuffle.

    Args:
        model: a network in deploy form.
        names: of convolutions with 3x3 kernels, stride 1 and padding 1. Not those of `SPAB`, which runs three of them
            as one operator, nor of other modules that use a convolution's weight without calling it.

    Raises:
        TypeError, ValueError: `model` is not a module, or a name is not that of such a convolution.
    """
    kinds = (nn.Conv2d, Conv3x3, Conv3x3PixelShuffle)
    model = copied(model)
    for name in _listed(names):
        name, conv = _convolution(model, name)
        parents = [".".join(name.split(".")[:i]) for i in range(name.count(".") + 1)]
        if any(isinstance(named(model, parent), SPAB) for parent in parents):
            raise ValueError(f"names: {name!r}: SPAB runs its three 3x3 convolutions as one operator")
        if not _is_conv3x3(conv) or not (isinstance(conv, Reparameterized) or type(conv) in kinds):
            raise ValueError(f"names: {name!r}: expected a 3x3 convolution of stride 1 and padding 1, got {conv}")
        if isinstance(conv, Reparameterized):
            conv.weight, conv.kernel_size = _centre(conv.weight), 1
            continue
        if isinstance(conv, Conv3x3PixelShuffle):
            conv.weight, conv.kernel_size, conv.padding = _centre(conv.weight), (1, 1), (0, 0)
            continue
        pruned: nn.Conv2d
        if isinstance(conv, Conv3x3):
            how = partial(Conv1x1, activation=conv.activation, negative_slope=conv.negative_slope)
            pruned = how(conv.in_channels, conv.out_channels, device="meta")
        else:
            pruned = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, device="meta")
        pruned.weight, pruned.bias = _centre(conv.weight), conv.bias
        replace(model, name, pruned.train(conv.training))
    return model


def prune_biases(model: Module, names: Iterable[str]) -> Module:
    """A copy without the biases of some convolutions (AdvancedSR's second stage, report section 4.11).

    Exact where they are zero. Convolutions without a bias are left as they are.

    Raises:
        TypeError, ValueError: `model` is not a module, or a name is not that of a convolution.
    """
    model = copied(model)
    for name in _listed(names):
        _convolution(model, name)[1].bias = None
    return model


@torch.no_grad()
def channel_scores(model: nn.Module, outputs: Sequence[str], inputs: Sequence[str | tuple[str, int]] = ()) -> Tensor:
    """How much each channel of a group matters, [C] in float64; the lowest are to be pruned (sections 4.9, 4.13).

    The norm of the weights that make it times the norm of those that read it, so that a channel scaled up in one and
    down in the other keeps its score; without `inputs` the former alone. Arguments and errors as of `prune_channels`.
    """
    makers = [_maker(model, name) for name in _listed(outputs)]
    width = _width(makers)
    score = sum(conv.weight.double().flatten(1).square().sum(1) for _, conv in makers)
    readers = [_reader(model, entry, width) for entry in inputs]
    if readers:
        score = score * sum(
            conv.weight[:, first : first + width].double().square().sum((0, 2, 3)) for conv, first in readers
        )
    return score.sqrt()


def prune_channels(
    model: Module,
    keep: Iterable[int],
    outputs: Sequence[str],
    inputs: Sequence[str | tuple[str, int]],
    between: Sequence[str] = (),
) -> Module:
    """A copy with fewer of a group of channels, as RDEN (38 to 37) and SlimRLFN have (report sections 4.9, 4.13).

    A group is a map with C channels, or several that must be pruned alike since they are added to or multiplied with
    one another. Exact where the pruned channels are zero: where their makers' weights and biases are, since all
    activations here return 0 for 0.

    Args:
        model: a network in deploy form.
        keep: indices of the channels to keep, 0 to C - 1, at least one.
        outputs: all convolutions that make the channels, with C output channels.
        inputs: all convolutions that read them; of those that read a concatenation a pair of the name and of the index
            of the group's first channel in it.
        between: what works on each of the C channels by itself on the way: depthwise convolutions, normalisations.

    Raises:
        TypeError, ValueError: `model` is not a module, a name is not that of such a module, the numbers of channels do
            not fit together, or `keep` is empty or not of indices.
    """
    model = copied(model)
    makers = [_maker(model, name) for name in _listed(outputs)]
    width = _width(makers)
    kept = sorted(set(keep))
    if not kept or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < width for i in kept):
        raise ValueError(f"keep: expected at least one index of 0 to {width - 1}, got {kept}")
    index = torch.tensor(kept)
    readers = [_reader(model, entry, width) for entry in inputs]
    for name in _listed(between):
        _select_each(name, named(model, name), index, width)
    for _, conv in makers:
        _select(conv, "weight", index)
        _select(conv, "bias", index)
        conv.out_channels = len(kept)
    for conv, first in sorted(readers, key=lambda reader: -reader[1]):  # later parts first: indices stay true
        channels = torch.arange(conv.weight.shape[1])
        channels = torch.cat([channels[:first], channels[first : first + width][index], channels[first + width :]])
        _select(conv, "weight", channels, 1)
        conv.in_channels = len(channels)
    return model


def _is_conv3x3(module: nn.Module) -> bool:
    if isinstance(module, Reparameterized):
        weight = getattr(module, "weight", None)  # of the deploy form without a submodule
        return isinstance(weight, Tensor) and weight.shape[2] == 3
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.dilation) == ((3, 3), (1, 1), (1, 1))
        and module.padding in ((1, 1), "same")
    )


def _listed(names: Iterable[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"names: expected several names, got {names!r}")
    return list(names)


def _convolution(model: nn.Module, name: str) -> tuple[str, Any]:
    """What has the weight and bias of the convolution called `name`, and its own name."""
    module = named(model, name)
    if isinstance(module, Reparameterized):
        if not module.deployed:
            raise ValueError(f"{name!r}: in training form, deploy the network first")
        if module.deploy_name:
            return _convolution(model, f"{name}.{module.deploy_name}")
        if module.deploy_keys == Reparameterized.deploy_keys:
            return name, module
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"{name!r}: expected a convolution, got {type(module).__name__}")
    return name, module


def _maker(model: nn.Module, name: str) -> tuple[str, Any]:
    conv = _convolution(model, name)[1]
    if getattr(conv, "groups", 1) != 1:
        raise ValueError(f"outputs: {name!r} has groups; a depthwise convolution belongs into `between`")
    return name, conv


def _width(makers: list[tuple[str, Any]]) -> int:
    widths = {name: conv.weight.shape[0] for name, conv in makers}
    if len(set(widths.values())) != 1:
        raise ValueError(f"outputs: expected convolutions with equally many output channels, got {widths}")
    return next(iter(widths.values()))


def _reader(model: nn.Module, entry: str | tuple[str, int], width: int) -> tuple[Any, int]:
    name, first = (entry, 0) if isinstance(entry, str) else entry
    conv = _convolution(model, name)[1]
    if getattr(conv, "groups", 1) != 1:
        raise ValueError(f"inputs: {name!r} has groups; a depthwise convolution belongs into `between`")
    there = conv.weight.shape[1]
    if first < 0 or first + width > there or (isinstance(entry, str) and there != width):
        raise ValueError(f"inputs: {name!r} reads {there} channels, not {width} of the group from {first} on")
    return conv, first


def _select_each(name: str, module: Any, index: Tensor, width: int) -> None:
    """Keep the channels `index` of a module that works on each by itself."""
    own = [key for key, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)) if t.ndim]
    wrong = [key for key in own if getattr(module, key).shape[0] != width]
    depthwise = not isinstance(module, nn.Conv2d) or module.groups == width == module.in_channels
    if wrong or not own or not depthwise:
        raise ValueError(f"between: {name!r}: expected a module with parameters of {width} channels, got {module}")
    for key in own:
        _select(module, key, index)
    for key in ("in_channels", "out_channels", "groups", "num_features", "channels"):
        if getattr(module, key, None) == width:
            setattr(module, key, len(index))
    if getattr(module, "normalized_shape", None) == (width,):
        module.normalized_shape = (len(index),)


def _select(module: nn.Module, key: str, index: Tensor, dim: int = 0) -> None:
    t = getattr(module, key)
    if t is None:
        return
    selected = t.detach().index_select(dim, index.to(t.device))
    setattr(module, key, nn.Parameter(selected, t.requires_grad) if isinstance(t, nn.Parameter) else selected)


def _centre(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach()[:, :, 1:2, 1:2].clone(), weight.requires_grad)
