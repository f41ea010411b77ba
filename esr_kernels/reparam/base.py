"""The base class of re-parameterised convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .. import functional
from ..library import ACTIVATIONS

if TYPE_CHECKING:
    from typing_extensions import Self

_Tensors = tuple[Tensor | None, ...]
_Folding = Callable[[Mapping[str, Tensor], torch.dtype], _Tensors]


class Reparameterized(nn.Module):
    """A convolution with a training form of several linear branches and a deploy form with one convolution.

    A subclass registers the branches as submodules unless `deployed`, names their tensors in `branch_keys` and
    `bias_keys`, and says in `combine` what they amount to.

    In training mode every forward pass folds the weights, differentiably, and runs one convolution: each branch gets
    the gradient it has in the branch form, at a fraction of the cost. In eval mode the folded weights are kept until a
    parameter changes. Writing through `parameter.data` leaves no trace that PyTorch shows: call `eval()` after it.

    State dict: the branches' entries in training form; weight and bias of the submodule `deploy_name` in deploy form. A
    training-form state dict loads into both, folded on the way into the deploy form; deploy-form entries beside
    branches are ignored. A slim one, without branches, loads into the deploy form only.

    Args:
        in_channels, out_channels: at least 1.
        kernel_size: of the deploy form.
        bias: whether the deploy form has one.
        activation, negative_slope: after the convolution, as in `functional.conv3x3`.
        deploy: only the folded convolution, for inference and for slim checkpoints.
        deploy_name: of the submodule that holds the folded convolution, or "" for a weight and bias of the module's
            own, as `nn.Conv2d` has; None: as the form's published files call it.

    Attributes:
        deployed: whether this is the deploy form.
        branch_keys: state-dict entries of the training form that it always has.
        bias_keys: entries it has all or none of.
        extra_keys: entries that say nothing about the convolution.
        deploy_keys: entries of the deploy form, below `deploy_name`.
    """

    branch_keys: ClassVar[tuple[str, ...]] = ()
    bias_keys: ClassVar[tuple[str, ...]] = ()
    extra_keys: ClassVar[tuple[str, ...]] = ()
    deploy_keys: ClassVar[tuple[str, ...]] = ("weight", "bias")
    default_deploy_name: ClassVar[str] = "eval_conv"
    recognised: ClassVar[bool] = True
    """Whether the entries' names alone tell this form."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        *,
        activation: str = "none",
        negative_slope: float = 0.05,
        deploy: bool = False,
        deploy_name: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if deploy_name is not None and (not isinstance(deploy_name, str) or "." in deploy_name):
            raise ValueError(f"deploy_name: expected a name without dots, or None, got {deploy_name!r}")
        if deploy_name in self._branch_names():
            raise ValueError(f"deploy_name: the training form has {deploy_name!r} already, take another")
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.activation, self.negative_slope = activation, float(negative_slope)
        self.deploy_name = self.default_deploy_name if deploy_name is None else deploy_name
        self.deployed = bool(deploy)
        self._cache = FoldCache()
        if deploy:
            self._build_deployed(bias)

    # --- what a subclass says -------------------------------------------------------------------------------------

    @staticmethod
    def combine(parameters: Mapping[str, Tensor], **options: Any) -> _Tensors:
        """The deploy form's tensors, one per entry of `deploy_keys`, from the branches', all of one dtype."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """What `combine` has to know beyond the parameters; where it is left out, the form's defaults hold."""
        return {}

    def _build_deployed(self, bias: bool) -> None:
        """Register the deploy form's parameters, with random values."""
        size = self.kernel_size
        conv = nn.Conv2d(self.in_channels, self.out_channels, size, padding=size // 2, bias=bias)
        if self.deploy_name:
            self.add_module(self.deploy_name, conv)
        else:
            self.weight, self.bias = conv.weight, conv.bias

    # --- folding --------------------------------------------------------------------------------------------------

    def fold(self) -> tuple[Tensor, Tensor | None]:
        """The exact weight [O, I, k, k] and bias [O] or None: computed in float64, rounded once to the dtype."""
        if self.deployed:
            return tuple(None if t is None else t.detach() for t in self._deployed_tensors())  # type: ignore[return-value]
        return _exactly(self._folding(), self._branch_parameters())  # type: ignore[return-value]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for a fused operator; gradients flow through them to the branches' parameters."""
        return self._folded()  # type: ignore[return-value]

    def _folded(self) -> _Tensors:
        if self.deployed:
            return self._deployed_tensors()
        fold, parameters = self._folding(), self._branch_parameters()
        if self.training:
            return fold(parameters, _working_dtype(parameters.values()))
        return self._cache.folded(fold, parameters)

    def _folding(self) -> _Folding:
        return partial(_fold, self.combine, self.options())

    def _branch_parameters(self) -> dict[str, Tensor]:
        # By attribute, not from `named_parameters`: replicas of DataParallel have none.
        found = {key: _attribute(self, key) for key in (*self.branch_keys, *self.bias_keys)}
        return {key: p for key, p in found.items() if p is not None}

    @classmethod
    def _branch_names(cls) -> set[str]:
        return {key.partition(".")[0] for key in (*cls.branch_keys, *cls.bias_keys)}

    def _deployed_tensors(self) -> _Tensors:
        return tuple(_attribute(self, key) for key in self._deployed_keys())

    def _deployed_keys(self) -> list[str]:
        return [f"{self.deploy_name}.{key}" if self.deploy_name else key for key in self.deploy_keys]

    def switch_to_deploy(self) -> None:
        """Turn this module into its deploy form, in place."""
        if self.deployed:
            return
        tensors = self.fold()
        needs_grad = any(p.requires_grad for p in self.parameters())
        for name in self._branch_names():
            delattr(self, name)
        self._cache = FoldCache()
        # The meta device spares the random initialisation of tensors that are replaced at once.
        with torch.device("meta"):
            self._build_deployed(bias=tensors[-1] is not None)
        for key, tensor in zip(self._deployed_keys(), tensors, strict=True):
            owner, _, leaf = key.rpartition(".")
            if tensor is not None:
                setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor, needs_grad))
        self.deployed = True
        self.train(self.training)

    # --- use ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        """[N, C, H, W] -> [N, O, H, W].

        Args:
            residual: [N, O, H, W], with its mode as in `functional.conv3x3`; None where the deploy form is 1x1.
        """
        # The branches are linear and see the same padded input, so convolving with their folded weights is the branch
        # form, gradients included.
        weight, bias = self.folded()
        conv = functional.conv1x1 if weight.shape[2] == 1 else functional.conv3x3
        return conv(
            x,
            weight,
            bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_mode=residual_mode,
        )

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{self.in_channels}, {self.out_channels}, deploy={self.deployed}{activation}"

    def train(self, mode: bool = True) -> Self:
        self._cache = FoldCache()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache = FoldCache()
        return super()._apply(*args, **kwargs)

    # --- state dicts ----------------------------------------------------------------------------------------------

    def fold_entries(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Replace this module's branches in the state dict of a network, where it is called `prefix`, if all are there.

        Raises:
            ValueError: their shapes do not fit together; names it.
        """
        _fold_entries(type(self), self.options(), self._deployed_keys(), state, prefix)

    @classmethod
    def fold_defaults(cls, state: dict[str, Tensor], prefix: str = "") -> None:
        """`fold_entries` of a module of this form with default options."""
        name = cls.default_deploy_name
        _fold_entries(cls, {}, [f"{name}.{key}" if name else key for key in cls.deploy_keys], state, prefix)

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
        self._cache = FoldCache()
        branches = any(f"{prefix}{key}" in state_dict for key in (*self.branch_keys, *self.bias_keys))
        single = [key for key in (f"{prefix}{key}" for key in self._deployed_keys()) if key in state_dict]
        if self.deployed and branches:
            try:
                self.fold_entries(state_dict, prefix)
            except ValueError as error:
                error_msgs.append(str(error))
                return
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
        f"{where}: the state dict is in slim form (the folded convolution only), from which the branches of the "
        "training form cannot be recovered; build the model with deploy=True to use it"
    )


def published_forms() -> list[type[Reparameterized]]:
    """The forms that are told by the names of their entries, those with most entries first."""
    forms: list[type[Reparameterized]] = []
    waiting = [Reparameterized]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        waiting.extend(subclasses)
        forms.extend(c for c in subclasses if "branch_keys" in vars(c) and c.recognised)
    return sorted(forms, key=lambda form: -len(form.branch_keys))


class FoldCache:
    """Folded weights of a module in eval mode, kept until what they were folded from changes. Copies start empty."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}

    def folded(self, fold: _Folding, parameters: Mapping[str, Tensor]) -> _Tensors:
        """What `fold` makes of the parameters in float64, with the derivative of folding them.

        Args:
            fold: takes the parameters and the dtype to compute in.
            parameters: by name, of one dtype.
        """
        values = list(parameters.values())
        if torch.compiler.is_compiling():
            return fold(parameters, _working_dtype(values))
        try:
            stamp = [_stamp(p) for p in values]
        except RuntimeError:  # no storage: under torch.func, or a fake tensor
            return fold(parameters, _working_dtype(values))
        kept = self._kept
        if kept is None or kept.stamp != stamp:
            kept = self._kept = _Kept(stamp, [(p, p.detach()) for p in values], _exactly(fold, parameters))
        if torch.is_grad_enabled() and not torch.jit.is_tracing() and any(p.requires_grad for p in values):
            there = [t for t in kept.tensors if t is not None]
            results = iter(_KeptFold.apply(fold, list(parameters), there, *values))
            return tuple(None if t is None else next(results) for t in kept.tensors)
        return kept.tensors


def _exactly(fold: _Folding, parameters: Mapping[str, Tensor]) -> _Tensors:
    # Outside inference mode, so that the result may meet inputs that need a gradient.
    with torch.inference_mode(False), torch.no_grad():
        return fold(parameters, torch.float64)


def _fold(
    combine: Callable[..., _Tensors], options: dict[str, Any], parameters: Mapping[str, Tensor], dtype: torch.dtype
) -> _Tensors:
    result = next(iter(parameters.values())).dtype
    tensors = combine({key: p.to(dtype) for key, p in parameters.items()}, **options)
    return tuple(None if t is None else t.to(result) for t in tensors)


def _fold_entries(
    form: type[Reparameterized],
    options: dict[str, Any],
    deployed_keys: list[str],
    state: dict[str, Tensor],
    prefix: str,
) -> None:
    if any(f"{prefix}{key}" not in state for key in form.branch_keys):
        return
    where = prefix.rstrip(".") or form.__name__
    lacking = [key for key in form.bias_keys if f"{prefix}{key}" not in state]
    if lacking and len(lacking) < len(form.bias_keys):
        raise ValueError(f"{where}: the branches do not fit together: {', '.join(lacking)} missing")
    keys = [key for key in (*form.branch_keys, *form.bias_keys) if key not in lacking]
    branches = {key: state.pop(f"{prefix}{key}") for key in keys}
    for key in form.extra_keys:
        state.pop(f"{prefix}{key}", None)
    dtype = _working_dtype(branches.values())
    try:
        with torch.no_grad():
            tensors = _fold(form.combine, options, {k: t.to(dtype) for k, t in branches.items()}, torch.float64)
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{where}: the branches do not fit together: {error}") from error
    for key, tensor in zip(deployed_keys, tensors, strict=True):
        state.pop(f"{prefix}{key}", None)
        if tensor is not None:
            state[f"{prefix}{key}"] = tensor


def _attribute(module: nn.Module, key: str) -> Any:
    """`module.a.0.weight` for "a.0.weight", of replicas too, which have attributes in place of parameters."""
    *path, leaf = key.split(".")
    for name in path:
        module = getattr(module, name)
    return getattr(module, leaf)


def _working_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """Folding in every step of training: float32, or float64 where the parameters are."""
    return torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32


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
    tensors: _Tensors


class _KeptFold(torch.autograd.Function):
    """Hands out kept weights with the derivative of folding them now."""

    @staticmethod
    def forward(
        ctx: Any, fold: Callable[..., _Tensors], names: list[str], kept: list[Tensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.fold, ctx.names = fold, names
        ctx.save_for_backward(*values)
        return tuple(t.clone() for t in kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_(need) for p, need in zip(ctx.saved_tensors, needs, strict=True)]
            parameters = dict(zip(ctx.names, leaves, strict=True))
            outputs = [t for t in ctx.fold(parameters, _working_dtype(leaves)) if t is not None]
        pairs = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [t for t, _ in pairs], [t for t in leaves if t.requires_grad], [g for _, g in pairs], allow_unused=True
            )
        )
        return (None,) * 3 + tuple(next(gradients) if need else None for need in needs)
