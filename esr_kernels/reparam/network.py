"""Folding of whole networks and whole state dicts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from .algebra import fold_batch_norm
from .base import published_forms

Module = TypeVar("Module", bound=nn.Module)


@runtime_checkable
class Deployable(Protocol):
    """A module with something to fold, as `Reparameterized`."""

    def switch_to_deploy(self) -> None:
        """Fold, in place."""

    def fold_entries(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Fold this module's entries of a network's state dict, in which their names start with `prefix`."""


@runtime_checkable
class Normalised(Protocol):
    """A block that can fold its batch normalisation into the convolution before it."""

    def fuse_batch_norm(self) -> None:
        """Fold, in place."""


def deploy(model: Module) -> Module:
    """A copy of the network in which every re-parameterised module is folded into one convolution.

    Computes the same function to rounding, with the state-dict names of the slim published files. Modules that have
    nothing to fold are copied as they are, so any `nn.Module` may be given. Batch normalisation that published files
    have (`RLFB`), or that is not ours, stays: see `fuse_batch_norms`.

    Raises:
        TypeError: `model` is not a module.
    """
    model = copied(model)
    for module in list(model.modules()):
        if isinstance(module, Deployable):
            module.switch_to_deploy()
    return model


def fold_state_dict(state: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The state dict with the branches of every training-form convolution replaced by the folded one.

    Other entries are kept, and so are incomplete sets of branches. The result is float32, or float64 where the branches
    are. Folded entries that stand beside their branches are recomputed: in training they lag behind.

    Args:
        state: of a network in training form, in deploy form or mixed.
        model: a network with the same names, in either form: says which convolutions have which form, where the names
            alone do not, with what options, and what their folded entries are called. Without one the forms are
            recognised by their entries and taken to have their default options.

    Raises:
        ValueError: the shapes of a set of branches do not fit together; names it.
    """
    state = dict(state)
    if model is not None:
        for name, module in model.named_modules():
            if isinstance(module, Deployable):
                module.fold_entries(state, f"{name}." if name else "")
        return state
    for form in published_forms():
        anchor = form.branch_keys[0]
        for prefix in [k.removesuffix(anchor) for k in state if ("." + k).endswith("." + anchor)]:
            form.fold_defaults(state, prefix)
    return state


@torch.no_grad()
def fuse_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a batch normalisation with running statistics into the convolution before it, in place, in float64.

    Raises:
        ValueError: the normalisation keeps no running statistics, or has other channels than the convolution gives.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: keeps no running statistics, so what it computes depends on the batch")
    if norm.num_features != conv.out_channels:
        raise ValueError(f"norm: expected {conv.out_channels} channels, got {norm.num_features}")
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    w, b, mean, variance, scale, shift = (None if t is None else t.double() for t in tensors)
    assert w is not None
    assert mean is not None
    assert variance is not None
    weight, bias = fold_batch_norm((w, b), mean, variance, scale, shift, norm.eps)
    assert bias is not None
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)


def fuse_batch_norms(model: Module, pairs: Iterable[tuple[str, str]] | None = None) -> Module:
    """A copy of any network in which batch normalisations are folded into the convolutions before them (section 4.17).

    Computes what the network computes in eval mode, to rounding. In place of each normalisation there is an
    `nn.Identity`. `torch.nn.Conv2d` and our modules without activation count as convolutions.

    Args:
        model: any network.
        pairs: names of a convolution and of the normalisation that alone reads its result. None: those that follow one
            another in an `nn.Sequential`, and those inside of blocks that can fold their own (`RLFB`); a network that
            reads in the middle of an `nn.Sequential` must name its pairs.

    Raises:
        TypeError: `model` is not a module, or a pair is not a convolution and a normalisation.
        ValueError: there is no module of a name, a convolution and a normalisation do not belong together, or the
            convolution has an activation.
    """
    model = copied(model)
    if pairs is None:
        for module in list(model.modules()):
            if isinstance(module, Normalised):
                module.fuse_batch_norm()
    for first, second in list(_in_sequence(model)) if pairs is None else list(pairs):
        conv, norm = named(model, first), named(model, second)
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            kinds = f"{type(conv).__name__} and {type(norm).__name__}"
            raise TypeError(f"pairs: {first!r}, {second!r}: expected Conv2d and BatchNorm2d, got {kinds}")
        if getattr(conv, "activation", "none") != "none":
            raise ValueError(f"pairs: {first!r} has an activation before {second!r}, which stands in the way")
        try:
            fuse_batch_norm(conv, norm)
        except ValueError as error:
            raise ValueError(f"pairs: {first!r}, {second!r}: {error}") from error
        replace(model, second, nn.Identity())
    return model


def fold_batch_norm_entries(state: dict[str, Tensor], conv: str, norm: str, eps: float) -> None:
    """`fuse_batch_norm` in a state dict, in place, if the normalisation is in it.

    Args:
        state: of a network.
        conv, norm: what the names of the convolution's and of the normalisation's entries start with.
        eps: the normalisation's, which is not in a state dict.

    Raises:
        ValueError: the shapes do not fit together.
    """
    keys = [f"{conv}weight", f"{norm}running_mean", f"{norm}running_var"]
    if any(key not in state for key in keys):
        return
    keys += [f"{conv}bias", f"{norm}weight", f"{norm}bias"]
    found = [state.pop(key, None) for key in keys]
    state.pop(f"{norm}num_batches_tracked", None)
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in found) else torch.float32
    w, mean, variance, b, scale, shift = (None if t is None else t.double() for t in found)
    assert w is not None
    assert mean is not None
    assert variance is not None
    if any(t is not None and t.shape != w.shape[:1] for t in (mean, variance, b, scale, shift)):
        raise ValueError(f"{norm.rstrip('.')}: expected {w.shape[0]} channels, as {conv.rstrip('.')} gives")
    weight, bias = fold_batch_norm((w, b), mean, variance, scale, shift, eps)
    assert bias is not None
    state[f"{conv}weight"], state[f"{conv}bias"] = weight.to(dtype), bias.to(dtype)


def _in_sequence(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of the convolutions in an `nn.Sequential` that a normalisation follows, both used once."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        children = list(module.named_children())
        for (first, conv), (second, norm) in pairwise(children):
            plain = isinstance(conv, nn.Conv2d) and getattr(conv, "activation", "none") == "none"
            kept = isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
            if plain and kept and uses[id(conv)] == uses[id(norm)] == 1:
                yield (f"{prefix}.{first}", f"{prefix}.{second}") if prefix else (first, second)


def copied(model: Module) -> Module:
    """A deep copy of a module; TypeError of anything else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # What is computed from parameters cannot be copied: `torch.nn.utils.weight_norm` leaves that in its module.
    attributes = (value for module in model.modules() for value in vars(module).values())
    computed = {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, computed)


def named(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that name; ValueError where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name!r}: {type(model).__name__} has no such module") from None


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent).add_module(leaf, module)
