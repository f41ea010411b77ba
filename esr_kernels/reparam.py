"""Re-parameterised convolutions: several branches in training, one 3x3 convolution in use.

The folding mathematics as plain functions, the base class of the modules that use it, and `deploy`, which folds a whole
network. All branches of these forms are linear, so their sum is one convolution exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Reparameterized", "deploy", "fold_conv3xc", "fold_state_dict"]

Module = TypeVar("Module", bound=nn.Module)
_Folded = tuple[Tensor, Tensor | None]


def fold_conv3xc(
    w_expand: Tensor,
    b_expand: Tensor | None,
    w_spatial: Tensor,
    b_spatial: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    w_skip: Tensor,
    b_skip: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """One 3x3 convolution equal to SPAN's Conv3XC (report section 4.1, Fig. 1).

    The training form zero-pads x by one pixel, applies 1x1 "expand", 3x3 without padding "spatial" and 1x1 "project",
    and adds the 1x1 "skip" of the unpadded x. The padding precedes the biased 1x1 convolution, so the ring around the
    image holds that bias and not zero, and the constant that reaches an output is the same in the middle and on the
    border: the folded convolution with zero padding 1 is equal everywhere.

    Args:
        w_expand, w_spatial, w_project, w_skip: [M, I, 1, 1], [K, M, 3, 3], [O, K, 1, 1], [O, I, 1, 1]; the published
            keys are conv.0, conv.1, conv.2 and sk.
        b_expand, b_spatial, b_project, b_skip: [M], [K], [O], [O], each may be None.
        dtype: what the products are computed in.

    Returns:
        weight [O, I, 3, 3] and bias [O] (None when no branch has one), in the dtype of `w_skip`. Differentiable.

    Raises:
        ValueError: the shapes do not fit together.
    """
    inner, middle, outputs, inputs = w_expand.shape[0], w_spatial.shape[0], w_skip.shape[0], w_skip.shape[1]
    for name, w, expected in (
        ("w_expand", w_expand, (inner, inputs, 1, 1)),
        ("w_spatial", w_spatial, (middle, inner, 3, 3)),
        ("w_project", w_project, (outputs, middle, 1, 1)),
        ("w_skip", w_skip, (outputs, inputs, 1, 1)),
    ):
        if tuple(w.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(w.shape)}")
    for name, b, size in (
        ("b_expand", b_expand, inner),
        ("b_spatial", b_spatial, middle),
        ("b_project", b_project, outputs),
        ("b_skip", b_skip, outputs),
    ):
        if b is not None and tuple(b.shape) != (size,):
            raise ValueError(f"{name}: expected shape [{size}] or None, got {list(b.shape)}")

    # Under autocast the products would be rounded to a half type.
    device = w_skip.device.type
    with torch.autocast(device, enabled=False) if _autocast(device) else nullcontext():
        project = w_project.to(dtype).flatten(1)  # [O, K]
        expand = w_expand.to(dtype).flatten(1)  # [M, I]
        taps = (project @ w_spatial.to(dtype).flatten(1)).view(outputs, inner, 9).transpose(1, 2)  # [O, 9, M]
        weight = (taps @ expand).transpose(1, 2).reshape(outputs, inputs, 3, 3)
        weight = weight + F.pad(w_skip.to(dtype), (1, 1, 1, 1))
        terms = [b.to(dtype) for b in (b_project, b_skip) if b is not None]
        if b_spatial is not None:
            terms.append(project @ b_spatial.to(dtype))
        if b_expand is not None:
            terms.append(taps.sum(1) @ b_expand.to(dtype))
        bias = torch.stack(terms).sum(0).to(w_skip.dtype) if terms else None
        return weight.to(w_skip.dtype), bias


def _autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


class Reparameterized(nn.Module):
    """A 3x3 convolution with a training form of several branches and a deploy form with one, `eval_conv`.

    A subclass registers the branches as submodules and says in `_fold` what they amount to.

    In training mode every forward pass folds the weights, differentiably, and runs one convolution: each branch gets
    the gradient it has in the branch form, at a fraction of the cost. In eval mode the folded weights are kept until a
    parameter changes. Writing through `parameter.data` leaves no trace that PyTorch shows: call `eval()` after it.

    Attributes:
        branch_names: the submodules of the training form.
        deployed: whether this is the deploy form.
    """

    branch_names: tuple[str, ...] = ()
    deployed: bool = False
    eval_conv: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self._kept: _Kept | None = None

    def _branch_parameters(self) -> dict[str, Tensor]:
        """The branches' parameters, named as in the state dict."""
        raise NotImplementedError

    @staticmethod
    def _fold(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> _Folded:
        """Weight and bias equal to the branches."""
        raise NotImplementedError

    def fold(self) -> _Folded:
        """The exact weight [O, I, 3, 3] and bias [O] or None: computed in float64, rounded once to the dtype."""
        if self.deployed:
            bias = self.eval_conv.bias
            return self.eval_conv.weight.detach(), None if bias is None else bias.detach()
        # Outside inference mode, so that the result may meet inputs that need a gradient.
        with torch.inference_mode(False), torch.no_grad():
            return self._fold(self._branch_parameters(), torch.float64)

    def folded(self) -> _Folded:
        """Weight and bias for a fused operator; gradients flow through them to the branches' parameters."""
        if self.deployed:
            return self.eval_conv.weight, self.eval_conv.bias
        parameters = self._branch_parameters()
        if self.training or torch.compiler.is_compiling():
            return self._fold(parameters, _working_dtype(parameters))
        values = list(parameters.values())
        try:
            stamp = [_stamp(p) for p in values]
        except RuntimeError:  # no storage: under torch.func, or a fake tensor
            return self._fold(parameters, _working_dtype(parameters))
        kept = self._kept
        if kept is None or kept.stamp != stamp:
            kept = self._kept = _Kept(stamp, [(p, p.detach()) for p in values], *self.fold())
        weight, bias = kept.weight, kept.bias
        if torch.is_grad_enabled() and not torch.jit.is_tracing() and any(p.requires_grad for p in values):
            results = _KeptFold.apply(self._fold, list(parameters), weight, bias, *values)
            return results[0], results[1] if bias is not None else None
        return weight, bias

    def switch_to_deploy(self) -> None:
        """Turn this module into its deploy form, in place."""
        if self.deployed:
            return
        weight, bias = self.fold()
        needs_grad = any(p.requires_grad for p in self.parameters())
        for name in self.branch_names:
            delattr(self, name)
        self._kept = None
        # The meta device spares the random initialisation of a tensor that is replaced at once.
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=bias is not None, device="meta")
        conv.weight = nn.Parameter(weight, needs_grad)
        if bias is not None:
            conv.bias = nn.Parameter(bias, needs_grad)
        self.eval_conv = conv.train(self.training)
        self.deployed = True

    def train(self, mode: bool = True) -> Self:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._kept = None
        branches = [k for k in state_dict if k.startswith(tuple(f"{prefix}{name}." for name in self.branch_names))]
        single = [k for k in state_dict if k.startswith(f"{prefix}eval_conv.")]
        if self.deployed and branches:
            try:
                folded = fold_state_dict({k: state_dict[k] for k in branches + single})
            except ValueError as error:
                error_msgs.append(str(error))
                return
            for k in branches + single:
                del state_dict[k]
            state_dict.update(folded)
        elif not self.deployed and single:
            for k in single:  # derived from the branches, and stale in a file saved in the middle of training
                del state_dict[k]
            if not branches:
                error_msgs.append(slim_message(prefix.rstrip(".") or type(self).__name__))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def slim_message(where: str) -> str:
    """Why a deploy-form state dict cannot enter a training-form module."""
    return (
        f"{where}: the state dict is in slim form (eval_conv only), from which the branches of the training form "
        "cannot be recovered; build the model with deploy=True to use it"
    )


def fold_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with every training-form Conv3XC replaced by its folded `eval_conv`.

    Other entries are kept, and so are incomplete sets of branches. The result is float32, or float64 where the branches
    are. `eval_conv` entries that stand beside their branches are recomputed: in training they lag behind.

    Raises:
        ValueError: the shapes of a set of branches do not fit together; names it.
    """
    state = dict(state)
    names = ("conv.0", "conv.1", "conv.2", "sk")
    for prefix in [k.removesuffix("sk.weight") for k in state if ("." + k).endswith(".sk.weight")]:
        if any(f"{prefix}{name}.weight" not in state for name in names):
            continue
        biases = [f"{prefix}{name}.bias" in state for name in names]
        if any(biases) and not all(biases):
            lacking = ", ".join(f"{name}.bias" for name, there in zip(names, biases, strict=True) if not there)
            raise ValueError(f"{prefix.rstrip('.')}: the branches do not fit together: {lacking} missing")
        branches: list[Tensor | None] = []
        for name in names:
            for kind in ("weight", "bias"):
                t = state.pop(f"{prefix}{name}.{kind}", None)
                branches.append(t if t is None or t.dtype == torch.float64 else t.float())
        try:
            weight, bias = fold_conv3xc(*branches)  # type: ignore[arg-type]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{prefix.rstrip('.')}: the branches do not fit together: {error}") from error
        state.pop(f"{prefix}eval_conv.bias", None)
        state[f"{prefix}eval_conv.weight"] = weight
        if bias is not None:
            state[f"{prefix}eval_conv.bias"] = bias
    return state


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


def _working_dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    """Folding in every step of training: float32, or float64 where the parameters are."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32


def _stamp(p: Tensor) -> tuple[Any, ...]:
    """Differs whenever the values may, except after writes through `.data` and, of inference tensors, in place."""
    return id(p), p.data_ptr(), -1 if p.is_inference() else p._version, p.dtype, p.device


@dataclass
class _Kept:
    """Folded weights and what they were folded from.

    `sources` holds each parameter and an alias of its storage alive, so that their addresses in `stamp` stay theirs.
    """

    stamp: list[tuple[Any, ...]]
    sources: list[tuple[Tensor, Tensor]]
    weight: Tensor
    bias: Tensor | None


class _KeptFold(torch.autograd.Function):
    """Hands out kept weights with the derivative of folding them now."""

    @staticmethod
    def forward(
        ctx: Any, fold: Callable[..., _Folded], names: list[str], weight: Tensor, bias: Tensor | None, *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.fold, ctx.names = fold, names
        ctx.save_for_backward(*values)
        return (weight.clone(),) if bias is None else (weight.clone(), bias.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = ctx.needs_input_grad[4:]
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_(need) for p, need in zip(ctx.saved_tensors, needs, strict=True)]
            parameters = dict(zip(ctx.names, leaves, strict=True))
            outputs = [t for t in ctx.fold(parameters, _working_dtype(parameters)) if t is not None]
        pairs = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [t for t, _ in pairs], [t for t in leaves if t.requires_grad], [g for _, g in pairs], allow_unused=True
            )
        )
        return (None,) * 4 + tuple(next(gradients) if need else None for need in needs)
