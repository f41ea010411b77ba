"""Folding of whole networks and whole state dicts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from .base import Reparameterized, published_forms

Module = TypeVar("Module", bound=nn.Module)


def deploy(model: Module) -> Module:
    """A copy of the network in which every re-parameterised module is folded into one convolution.

    Computes the same function to rounding, with the state-dict names of the slim published files. Modules that have
    nothing to fold are copied as they are, so any `nn.Module` may be given.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, Reparameterized):
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
            if isinstance(module, Reparameterized):
                module.fold_entries(state, f"{name}." if name else "")
        return state
    for form in published_forms():
        anchor = form.branch_keys[0]
        for prefix in [k.removesuffix(anchor) for k in state if ("." + k).endswith("." + anchor)]:
            form.fold_defaults(state, prefix)
    return state
