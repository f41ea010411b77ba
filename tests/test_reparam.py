"""Folding of re-parameterised convolutions: exact, differentiable, once per parameter version."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esr_kernels
from esr_kernels import SPAB, Conv3XC
from esr_kernels.modules import (
    ECB,
    ERB,
    MBRB,
    RBSB,
    RRRB,
    CollapsibleConv,
    ConvBN,
    RepBlock,
    RepConv1x1,
    RepMBConv,
    RepMBConvPoint,
    RepMBConvSE,
)
from esr_kernels.reparam import (
    Reparameterized,
    base,
    compose,
    compose_depthwise,
    deploy,
    fold_conv3xc,
    fold_state_dict,
    merge,
)


def pad_with(x: Tensor, value: Tensor | None) -> Tensor:
    """One pixel of `value` [C] all around."""
    if value is None:
        return F.pad(x, (1, 1, 1, 1))
    value = value[:, None, None]
    return F.pad(x - value, (1, 1, 1, 1)) + value


def conv3xc_branches(m: Conv3XC, x: Tensor) -> Tensor:
    """The training form as the report draws it: pad first, then 1x1, 3x3, 1x1, plus the skip."""
    return m.conv(F.pad(x, (1, 1, 1, 1))) + m.sk(x)


def plus_input(m: Any, y: Tensor, x: Tensor) -> Tensor:
    return y + x if m.identity and m.in_channels == m.out_channels else y


def edge_branches(m: nn.Module, name: str, x: Tensor) -> Tensor:
    y = torch.zeros(())
    for edge in ("sbx", "sby", "lpl"):
        e: Any = m.get_submodule(name.format(edge))
        inner = pad_with(F.conv2d(x, e.k0, e.b0), e.b0)
        y = y + F.conv2d(inner, e.scale * e.mask, e.bias, groups=e.mask.shape[0])
    return y


def ecb_branches(m: ECB, x: Tensor) -> Tensor:
    pair: Any = m.conv1x1_3x3
    y = m.conv3x3(x) + F.conv2d(pad_with(F.conv2d(x, pair.k0, pair.b0), pair.b0), pair.k1, pair.b1)
    y = y + edge_branches(m, "conv1x1_{}", x)
    return plus_input(m, y, x)


def repblock_branches(m: RepBlock, x: Tensor) -> Tensor:
    y = m.rbr_3x3_branch(x) + m.rbr_1x1_3x3_branch_3x3(m.rbr_1x1_3x3_branch_1x1(x))
    y = y + edge_branches(m, "rbr_conv1x1_{}_branch", x)
    return plus_input(m, y, x)


def rrrb_branches(m: RRRB, x: Tensor) -> Tensor:
    t = m.expand_conv(x)
    return m.reduce_conv(m.fea_conv(pad_with(t, m.expand_conv.bias)) + t) + x


def repmbconv_branches(m: RepMBConv, x: Tensor) -> Tensor:
    return m.reduce_conv(m.fea_conv(pad_with(m.expand_conv(x), m.expand_conv.bias))) + m.identity_conv(x)


def repmbconv_point_branches(m: RepMBConvPoint, x: Tensor) -> Tensor:
    t = repmbconv_branches(m, x)
    return m.point_project(m.point_expand(t)) + t


def repmbconv_se_branches(m: RepMBConvSE, x: Tensor) -> Tensor:
    t, se = m.expand_conv(x), m.se
    s = torch.sigmoid(F.linear(F.silu(F.linear(se.tensor[:, :, 0, 0], se.se["1"].weight)), se.se["3"].weight))
    return m.reduce_conv(m.fea_conv(pad_with(t, m.expand_conv.bias)) * s[:, :, None, None] + t) + x


def repconv1x1_branches(m: RepConv1x1, x: Tensor) -> Tensor:
    return plus_input(m, m.ffn_project(m.ffn_expand(x)), x)


def collapsible_branches(m: CollapsibleConv, x: Tensor) -> Tensor:
    return plus_input(m, m.conv_squeeze(m.conv_expand(x)), x)


def rbsb_branches(m: RBSB, x: Tensor) -> Tensor:
    t = plus_input(m, m.pw_squeeze(m.pw_expand(x)), x)
    if m.padding_mode == "reflect":
        spatial = F.conv2d(F.pad(t, (1, 1, 1, 1), "reflect"), m.dw_3x3.weight, m.dw_3x3.bias, groups=m.out_channels)
    else:
        spatial = m.dw_3x3(t)
    return spatial + m.dw_1x1(t) + (t if m.identity else 0)


def mbrb_branches(m: MBRB, x: Tensor) -> Tensor:
    pair, point = m.branch_1x1_3x3, m.branch_1x1_avg
    y = m.branch_3x3(x) + m.branch_1x1(x)
    y = y + F.conv2d(pad_with(F.conv2d(x, pair.k0, pair.b0), pair.b0), pair.k1, pair.b1)
    return plus_input(m, y + F.avg_pool2d(pad_with(point(x), point.bias), 3, stride=1), x)


def conv_bn_branches(m: ConvBN, x: Tensor) -> Tensor:
    bn = m.bn
    return F.batch_norm(m.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


# What makes a module of the form, with a bias or without, and what its branches compute.
FORMS: dict[str, tuple[Callable[..., Reparameterized], Callable[[Any, Tensor], Tensor]]] = {
    "conv3xc": (lambda **k: Conv3XC(3, 4, **k), conv3xc_branches),
    "conv3xc-square": (lambda **k: Conv3XC(4, 4, gain=3, **k), conv3xc_branches),
    "ecb": (lambda **k: ECB(3, 4, depth_multiplier=1.5, **k), ecb_branches),
    "ecb-square": (lambda **k: ECB(4, 4, isotropic=True, **k), ecb_branches),
    "ecb-no-identity": (lambda **k: ECB(4, 4, identity=False, **k), ecb_branches),
    "repblock": (lambda **k: RepBlock(3, 4, **k), repblock_branches),
    "repblock-square": (lambda **k: RepBlock(4, 4, isotropic=True, **k), repblock_branches),
    "repblock-no-identity": (lambda **k: RepBlock(4, 4, identity=False, **k), repblock_branches),
    "rrrb": (lambda **k: RRRB(4, ratio=3, **k), rrrb_branches),
    "repmbconv": (lambda **k: RepMBConv(3, 4, **k), repmbconv_branches),
    "repmbconv-point": (lambda **k: RepMBConvPoint(3, 4, ratio=3, **k), repmbconv_point_branches),
    "repmbconv-se": (lambda **k: RepMBConvSE(4, **k), repmbconv_se_branches),
    "repconv1x1": (lambda **k: RepConv1x1(3, 4, **k), repconv1x1_branches),
    "repconv1x1-square": (lambda **k: RepConv1x1(4, 4, **k), repconv1x1_branches),
    "repconv1x1-no-identity": (lambda **k: RepConv1x1(4, 4, identity=False, **k), repconv1x1_branches),
    "collapsible": (lambda **k: CollapsibleConv(3, 4, width=9, **k), collapsible_branches),
    "collapsible-square": (lambda **k: CollapsibleConv(4, 4, width=9, **k), collapsible_branches),
    "collapsible-no-identity": (lambda **k: CollapsibleConv(4, 4, width=9, identity=False, **k), collapsible_branches),
    "rbsb": (lambda **k: RBSB(3, 4, width=9, **k), rbsb_branches),
    "rbsb-square": (lambda **k: RBSB(4, 4, width=9, **k), rbsb_branches),
    "rbsb-reflect-no-identity": (
        lambda **k: RBSB(4, 4, width=9, padding_mode="reflect", identity=False, **k),
        rbsb_branches,
    ),
    "mbrb": (lambda **k: MBRB(3, 4, **k), mbrb_branches),
    "mbrb-square": (lambda **k: MBRB(4, 4, **k), mbrb_branches),
    "mbrb-no-identity": (lambda **k: MBRB(4, 4, identity=False, **k), mbrb_branches),
    "conv-bn": (lambda **k: ConvBN(3, 4, eps=0.01, **k), conv_bn_branches),
    "conv-bn-1x1": (lambda **k: ConvBN(4, 4, 1, **k), conv_bn_branches),
}
every_form = pytest.mark.parametrize("name", FORMS)
# Batch normalisation in training mode is not linear in what it is given: it has tests of its own.
MODES = {name: (False,) if name.startswith("conv-bn") else (True, False) for name in FORMS}
every_mode = pytest.mark.parametrize(("name", "training"), [(n, mode) for n, modes in MODES.items() for mode in modes])


def make(name: str, **options: Any) -> Reparameterized:
    """With random weights of a size that lets every branch count, where initial ones are often small."""
    module = FORMS[name][0](**options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
        for key, buffer in module.named_buffers():
            if "running" in key:
                buffer.copy_(torch.rand_like(buffer) + 0.1)
    return module.train(MODES[name][0])


def branch_form(module: Reparameterized, x: Tensor, name: str = "conv3xc") -> Tensor:
    return FORMS[name][1](module, x)


def same(module: Any, x: Tensor) -> Tensor:
    """What the module's folded tensors compute in plain PyTorch."""
    weight, *rest, bias = module.fold()
    if not rest:
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.conv2d(F.pad(F.conv2d(x, weight), (1, 1, 1, 1), mode), *rest, bias, groups=weight.shape[0])


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of all foldings so far."""
    calls: list[torch.dtype] = []
    original = base._fold

    def counted(combine: Any, options: Any, parameters: Any, dtype: torch.dtype) -> Any:
        calls.append(dtype)
        return original(combine, options, parameters, dtype)

    monkeypatch.setattr(base, "_fold", counted)
    return calls


# --- the mathematics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["conv3xc_3_28", "conv3xc_28_28"])
def test_published_cases(shared_models: Path, case: str) -> None:
    data = np.load(shared_models / "fold" / f"{case}.npz")
    t = {k: torch.from_numpy(data[k]) for k in data}
    state = {k.replace("__", "."): v for k, v in t.items() if "__" in k}
    channels_out, channels_in = t["sk__weight"].shape[:2]
    trained, deployed = Conv3XC(channels_in, channels_out), Conv3XC(channels_in, channels_out, deploy=True)
    trained.load_state_dict(state)
    deployed.load_state_dict(state)
    for module in (trained, trained.eval(), deployed, deploy(trained)):
        assert close(module(t["x"]), t["y_train"], 1e-5)
    weight, bias = trained.fold()
    assert close(weight, t["eval_conv__weight"], 1e-6)
    assert bias is not None
    assert close(bias, t["eval_conv__bias"], 1e-6)


@pytest.mark.parametrize(("case", "form", "folded"), [("ecb_8_8", ECB, "RK RB"), ("repblock_8_8", RepBlock, "K B")])
def test_published_edge_cases(shared_models: Path, case: str, form: type[Reparameterized], folded: str) -> None:
    data = np.load(shared_models / "fold" / f"{case}.npz")
    t = {k: torch.from_numpy(data[k]) for k in data}
    state = {k.replace("__", "."): v for k, v in t.items() if "__" in k}
    trained, deployed = form(8, 8), form(8, 8, deploy=True)
    assert set(state) == set(trained.state_dict())
    trained.load_state_dict(state)
    deployed.load_state_dict(state)
    for module in (trained, trained.eval(), deployed, deploy(trained)):
        assert close(module(t["x"]), t["y_train"], 1e-5)
    for got, key in zip(trained.fold(), folded.split(), strict=True):
        assert got is not None
        assert close(got, t[key], 1e-6)


@pytest.mark.parametrize("network", ["rcn", "ifadnet", "lsanet"])
def test_published_networks(shared_models: Path, network: str) -> None:
    files = [shared_models / "fold" / f"{network}_{form}form_RANDOM.pth" for form in ("train", "deploy")]
    trained, deployed = (torch.load(file, weights_only=True) for file in files)
    folded = fold_state_dict(trained)
    if network == "rcn":  # its two forms call the blocks' convolutions by different names
        folded = {re.sub(r"\.c(\d)_r\.conv_infer\.", r".conv\1_r.", k): v for k, v in folded.items()}
    assert set(folded) == set(deployed)
    for key, value in deployed.items():
        assert close(folded[key], value, 1e-6)


def test_algebra() -> None:
    def kernel(o: int, i: int, k: int) -> tuple[Tensor, Tensor]:
        return torch.randn(o, i, k, k, dtype=torch.float64), torch.randn(o, dtype=torch.float64)

    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    point, wide, depthwise = kernel(4, 3, 1), kernel(5, 4, 5), kernel(4, 1, 3)
    inner = F.conv2d(F.pad(x, (2, 2, 2, 2)), *point)
    w, b = compose(point, wide)
    assert close(F.conv2d(x, w, b, padding=2), F.conv2d(inner, *wide), 1e-13)
    w, b = compose_depthwise(point, depthwise)
    expected = F.conv2d(F.conv2d(F.pad(x, (1, 1, 1, 1)), *point), *depthwise, groups=4)
    assert close(F.conv2d(x, w, b, padding=1), expected, 1e-13)
    first, second = kernel(4, 3, 3), kernel(2, 4, 1)
    w, b = compose(first, second)
    assert close(F.conv2d(x, w, b, padding=1), F.conv2d(F.conv2d(x, *first, padding=1), *second), 1e-13)
    w, b = merge(point, (first[0], None), kernel_5 := kernel(4, 3, 5))
    expected = F.conv2d(x, *point) + F.conv2d(x, first[0], padding=1) + F.conv2d(x, *kernel_5, padding=2)
    assert close(F.conv2d(x, w, b, padding=2), expected, 1e-13)
    assert merge((first[0], None))[1] is None


def test_algebra_refuses_what_is_not_exact() -> None:
    def kernel(*shape: int, bias: int | None = None) -> tuple[Tensor, Tensor | None]:
        return torch.zeros(shape), None if bias is None else torch.zeros(bias)

    with pytest.raises(ValueError, match=r"second: one of the two must be 1x1, got \[4, 3, 3, 3\] and \[5, 4, 3, 3\]"):
        compose(kernel(4, 3, 3, 3), kernel(5, 4, 3, 3))
    with pytest.raises(ValueError, match=r"second: expected weight \[\*, 4, \*, \*\], got \[5, 3, 3, 3\]"):
        compose(kernel(4, 3, 1, 1), kernel(5, 3, 3, 3))
    with pytest.raises(ValueError, match=r"first: expected weight \[O, I, k, k\] with k odd, got \[4, 3, 2, 2\]"):
        compose(kernel(4, 3, 2, 2), kernel(5, 4, 1, 1))
    with pytest.raises(ValueError, match=r"second: expected bias \[5\] or None, got \[4\]"):
        compose(kernel(4, 3, 1, 1), kernel(5, 4, 3, 3, bias=4))
    with pytest.raises(ValueError, match=r"depthwise: expected weights"):
        compose_depthwise(kernel(4, 3, 1, 1), kernel(4, 4, 3, 3))
    with pytest.raises(ValueError, match=r"kernels: the channels differ: \[4, 3, 1, 1\], \[4, 4, 3, 3\]"):
        merge(kernel(4, 3, 1, 1), kernel(4, 4, 3, 3))


@every_form
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (7, 5)])
def test_fold_is_exact_borders_included(name: str, bias: bool, size: tuple[int, int]) -> None:
    module = make(name, bias=bias).double()
    if "reflect" in name:
        size = max(2, size[0]), max(2, size[1])
    x = torch.randn(2, module.in_channels, *size, dtype=torch.float64)
    expected = branch_form(module, x, name)
    assert (module.fold()[-1] is not None) == (bias or name.startswith("conv-bn"))
    assert close(same(module, x), expected, 1e-13)
    for m in (module, module.eval(), deploy(module)):
        assert close(m(x), expected, 1e-13)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fold_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    module = make(name).to(dtype)
    exact = copy.deepcopy(module).double().fold()
    for folded, reference in zip(module.fold(), exact, strict=True):
        assert folded is not None
        assert reference is not None
        assert folded.dtype == dtype
        assert not folded.requires_grad
        assert torch.equal(folded, reference.to(dtype))


def test_fold_conv3xc_names_what_does_not_fit() -> None:
    p = dict(Conv3XC(3, 4).named_parameters())
    args = [p[f"{n}.{k}"] for n in ("conv.0", "conv.1", "conv.2", "sk") for k in ("weight", "bias")]
    names = ["w_expand", "b_expand", "w_spatial", "b_spatial", "w_project", "b_project", None, "b_skip"]
    for i, name in enumerate(names):
        if name is not None:
            wrong = [*args[:i], torch.zeros(2, 2, 5, 5) if name[0] == "w" else torch.zeros(3), *args[i + 1 :]]
            with pytest.raises(ValueError, match=f"{name}: expected shape"):
                fold_conv3xc(*wrong)  # type: ignore[arg-type]


# --- training -----------------------------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_branches(name: str, training: bool, bias: bool) -> None:
    module = make(name, bias=bias).double().train(training)
    x = torch.randn(2, module.in_channels, 5, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(branch_form(module, x, name), leaves, seed)
    for _ in range(2):  # the second time from kept weights
        got = torch.autograd.grad(module(x), leaves, seed)
        assert all(close(g, e, 1e-12) for g, e in zip(got, expected, strict=True))


@every_mode
def test_frozen_branches_get_no_gradient(name: str, training: bool) -> None:
    module = make(name).train(training)
    first, *others = module.parameters()
    first.requires_grad_(False)
    module(torch.randn(1, module.in_channels, 4, 4)).square().sum().backward()
    assert first.grad is None
    assert all(p.grad is not None for p in others)


@every_form
def test_folding_is_not_rounded_under_autocast(name: str) -> None:
    module = make(name)
    expected = module.folded()
    with torch.autocast("cpu", torch.bfloat16):
        got = module.folded()
        assert module(torch.randn(1, module.in_channels, 4, 4)).dtype == torch.bfloat16
    for g, e in zip(got, expected, strict=True):
        assert g is not None
        assert e is not None
        assert g.dtype == torch.float32
        assert torch.equal(g, e)


@every_mode
def test_functional_transforms(name: str, training: bool) -> None:
    module = make(name).train(training)
    x = torch.randn(1, module.in_channels, 4, 5)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    module.zero_grad()
    branch_form(module, x, name).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None
        assert close(got[key], p.grad, 1e-4)


@every_mode
def test_replicas_of_data_parallel(name: str, training: bool) -> None:
    module = SPAB(4) if name == "conv3xc" else make(name)
    module.train(training)
    modules = list(module.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        replica = replicas[id(m)]
        for name, child in m._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, p in m._parameters.items():
            setattr(replica, name, None if p is None else p.clone())
    x = torch.randn(1, getattr(module, "in_channels", 4), 6, 5)
    assert close(replicas[id(module)](x), module(x), 1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_batch_norm_trains_on_the_batch_and_folds_afterwards(kernel_size: int) -> None:
    module = ConvBN(3, 4, kernel_size, momentum=0.5, activation="silu").double()
    reference = nn.Sequential(copy.deepcopy(module.conv), copy.deepcopy(module.bn), nn.SiLU())
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    residual = torch.randn(4, 4, 5, 6, dtype=torch.float64)
    for _ in range(2):
        assert close(module(x), reference(x), 1e-13)
    module(x).square().sum().backward()
    reference(x).square().sum().backward()
    for p, r in zip(module.parameters(), reference.parameters(), strict=True):
        assert p.grad is not None
        assert r.grad is not None
        assert close(p.grad, r.grad, 1e-12)
    before = reference[1](reference[0](x))
    assert close(copy.deepcopy(module)(x, residual), F.silu(before) + residual, 1e-13)
    assert close(copy.deepcopy(module)(x, residual, "pre"), F.silu(before + residual), 1e-13)
    with pytest.raises(ValueError, match='residual_mode "attention" allows only "none"'):
        module(x, residual, "attention")
    with pytest.raises(RuntimeError, match=r"in training mode batch normalisation cannot be folded: call eval\(\)"):
        module.folded()
    reference[1].load_state_dict(module.bn.state_dict())
    module.eval(), reference.eval()
    assert close(module(x), reference(x), 1e-13)
    assert close(deploy(module)(x), reference(x), 1e-13)


def test_erb_is_two_convolutions() -> None:
    block = ERB(4).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = rrrb_branches(block.conv2, F.leaky_relu(rrrb_branches(block.conv1, x), 0.1))
    folded = deploy(block)
    assert close(block(x), expected, 1e-13)
    assert close(folded(x), expected, 1e-13)
    assert set(folded.state_dict()) == {f"conv{i}.rep_conv.{k}" for i in (1, 2) for k in ("weight", "bias")}
    again = ERB(4, deploy=True).double()
    again.load_state_dict(block.state_dict())
    assert close(again(x), expected, 1e-13)


# --- kept between calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_folded_once_in_eval_mode(folds: list[torch.dtype], context: Any) -> None:
    module = Conv3XC(3, 4).eval()
    x = torch.randn(1, 3, 5, 5)
    with context():
        for _ in range(4):
            module(x)
    assert folds == [torch.float64]


def test_folded_every_time_in_training_mode(folds: list[torch.dtype]) -> None:
    module = Conv3XC(3, 4)
    for _ in range(3):
        module(torch.randn(1, 3, 5, 5))
    assert folds == [torch.float32] * 3


def _load(m: Conv3XC) -> None:
    m.load_state_dict(Conv3XC(3, 4).state_dict())


def _assign(m: Conv3XC) -> None:
    m.load_state_dict(Conv3XC(3, 4).state_dict(), assign=True)


def _step(m: Conv3XC) -> None:
    m(torch.randn(1, 3, 5, 5)).square().sum().backward()
    torch.optim.Adam(m.parameters(), lr=0.1).step()


@torch.no_grad()
def _in_place(m: Conv3XC) -> None:
    m.conv[1].bias.add_(1)


def _data(m: Conv3XC) -> None:
    m.sk.weight.data = m.sk.weight.data + 1


@torch.no_grad()
def _moving_average(m: Conv3XC) -> None:
    for p in m.parameters():
        p.data.mul_(0.9)
    m.eval()


def _replace(m: Conv3XC) -> None:
    m.sk.weight = nn.Parameter(m.sk.weight.detach() * 2)


CHANGES = [_load, _assign, _step, _in_place, _data, _moving_average, _replace]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_every_change_is_seen(change: Any) -> None:
    module = Conv3XC(3, 4).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        before = module(x)
    for _ in range(2):
        change(module)
        with torch.no_grad():
            after = module(x)
            assert not close(after, before, 1e-4)
            assert close(after, branch_form(module, x), 1e-5)
        before = after


def test_dtype_changes_are_seen() -> None:
    module = Conv3XC(3, 4).eval()
    x = torch.randn(1, 3, 5, 5)
    module(x)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        module.to(dtype)
        assert module(x.to(dtype)).dtype == dtype


def test_first_fold_in_inference_mode_serves_training_inputs() -> None:
    module = Conv3XC(3, 4).eval().requires_grad_(False)
    x = torch.randn(1, 3, 5, 5)
    with torch.inference_mode():
        module(x)
    x.requires_grad_()
    module(x).sum().backward()
    assert x.grad is not None


def test_parameters_made_in_inference_mode(folds: list[torch.dtype]) -> None:
    with torch.inference_mode():
        module = Conv3XC(3, 4).eval()
        x = torch.randn(1, 3, 5, 5)
        for _ in range(3):
            assert close(module(x), branch_form(module, x), 1e-5)
        assert len(folds) == 1
        module.load_state_dict(Conv3XC(3, 4).state_dict())
        assert close(module(x), branch_form(module, x), 1e-5)
        assert len(folds) == 2


@every_form
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("form", [True, False], ids=["deploy", "training"])
def test_copies_are_independent(name: str, clone: Any, form: bool) -> None:
    module = make(name, deploy=form).eval()
    x = torch.randn(1, module.in_channels, 5, 5)
    before = module(x)
    other = clone(module)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    assert not torch.allclose(other(x), before)
    assert torch.equal(module(x), before)


# --- deploy -------------------------------------------------------------------------------------------------------


def test_deploy_is_a_folded_copy() -> None:
    model = nn.Sequential(Conv3XC(3, 6), SPAB(6), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)).train()
    names = list(model.state_dict())
    x = torch.randn(2, 3, 7, 6)
    folded = deploy(model)
    assert list(model.state_dict()) == names
    assert folded.training
    assert [n for n in folded.state_dict() if n.startswith(("0", "1"))] == [
        f"{p}.eval_conv.{k}" for p in ("0", "1.c1_r", "1.c2_r", "1.c3_r") for k in ("weight", "bias")
    ]
    assert close(folded.eval()(x), model.eval()(x), 1e-5)
    assert all(p.requires_grad for p in folded.parameters())
    assert not {p.data_ptr() for p in folded.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_deploy_of_a_single_module_and_of_nothing_to_fold() -> None:
    folded = deploy(Conv3XC(3, 4).requires_grad_(False).bfloat16().eval())
    assert folded.deployed
    assert folded.eval_conv.weight.dtype == torch.bfloat16
    assert not folded.eval_conv.weight.requires_grad
    assert not folded.eval_conv.training
    again = deploy(folded)
    assert torch.equal(again.eval_conv.weight, folded.eval_conv.weight)
    plain = nn.Conv2d(3, 4, 3)
    assert torch.equal(deploy(plain).weight, plain.weight)


def test_deploy_keeps_shared_modules_shared() -> None:
    shared = Conv3XC(4, 4)
    folded = deploy(nn.Sequential(shared, shared))
    assert folded[0] is folded[1]


def test_deploy_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        deploy({})  # type: ignore[type-var]


# --- state dicts --------------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("deploy_name", [None, "", "other"])
def test_every_form_loads_into_both(name: str, bias: bool, deploy_name: str | None) -> None:
    options = {"bias": bias, "deploy_name": deploy_name}
    trained, deployed = make(name, **options).double(), make(name, deploy=True, **options).double()
    state = trained.state_dict()
    stale = {k: v + 1 for k, v in deployed.state_dict().items()}
    x = torch.randn(1, trained.in_channels, 4, 5, dtype=torch.float64)
    expected = branch_form(trained, x, name)
    again = make(name, **options).double()
    for loaded in (state, {**state, **stale}):
        for module in (deployed, again.train(MODES[name][0]), again.eval()):
            module.load_state_dict(loaded)
            assert close(module(x), expected, 1e-13)
    slim = deploy(trained).state_dict()
    assert slim.keys() == deployed.state_dict().keys()
    deployed.load_state_dict(slim)
    assert close(deployed(x), expected, 1e-13)
    with pytest.raises(RuntimeError, match=r"the state dict is in slim form.*deploy=True"):
        again.load_state_dict(slim)

    network = nn.ModuleDict({"a": nn.Sequential(trained), "b": nn.Conv2d(3, 4, 3)})
    folded = fold_state_dict(network.state_dict(), network)
    assert folded.keys() == deploy(network).state_dict().keys()
    assert all(close(folded[f"a.0.{k}"], v, 1e-15) for k, v in slim.items())
    if trained.recognised and not name.endswith("no-identity"):
        alone = fold_state_dict(state).values()  # by the entries' names, under the published name
        assert all(close(t, v, 1e-15) for t, v in zip(alone, slim.values(), strict=True))


@every_form
def test_branches_that_do_not_fit(name: str) -> None:
    module = make(name)
    deployed = make(name, deploy=True)
    for key in module.branch_keys:
        state = module.state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match="Missing key"):
            deployed.load_state_dict(state)
    if len(module.bias_keys) > 1:
        for key in module.bias_keys:
            state = module.state_dict()
            del state[key]
            with pytest.raises(RuntimeError, match=rf"do not fit together: {re.escape(key)} missing"):
                deployed.load_state_dict(state)
    state = nn.ModuleDict({"a": module}).state_dict()
    key = f"a.{module.branch_keys[-1]}"
    state[key] = torch.zeros(7, 7, 3, 3)
    with pytest.raises(ValueError, match="a: the branches do not fit together"):
        fold_state_dict(state, nn.ModuleDict({"a": module}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of none, relu, .* got 'tanh'"),
        ({"deploy_name": "a.b"}, "deploy_name: expected a name without dots, or None, got 'a.b'"),
    ],
)
@every_form
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, **options)


@every_form
@pytest.mark.parametrize("deployed", [True, False])
def test_activation_and_residual(name: str, deployed: bool) -> None:
    module = make(name, activation="gelu", deploy=deployed).double()
    x = torch.randn(2, module.in_channels, 4, 5, dtype=torch.float64)
    residual = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    h = same(module, x)
    assert close(module(x), F.gelu(h), 1e-13)
    assert close(module(x, residual), F.gelu(h) + residual, 1e-13)
    assert close(module(x, residual, "pre"), F.gelu(h + residual), 1e-13)


def test_training_form_loads_into_the_deploy_form() -> None:
    trained = SPAB(4).eval()
    state = trained.state_dict()
    state["c2_r.eval_conv.weight"] = torch.full((4, 4, 3, 3), 7.0)  # stale: the branches count
    state["c2_r.eval_conv.bias"] = torch.full((4,), 7.0)
    deployed = SPAB(4, deploy=True)
    before = dict(state)
    deployed.load_state_dict(state)
    assert state.keys() == before.keys()
    x = torch.randn(1, 4, 6, 5)
    assert close(deployed(x), trained(x), 1e-5)
    again = SPAB(4).eval()
    again.load_state_dict(state)
    assert close(again(x), trained(x), 1e-6)


def test_slim_form_is_refused_by_the_training_form() -> None:
    slim = SPAB(4, deploy=True).state_dict()
    with pytest.raises(RuntimeError, match=r"c1_r: the state dict is in slim form.*deploy=True"):
        SPAB(4).load_state_dict(slim)
    with pytest.raises(RuntimeError, match="Conv3XC: the state dict is in slim form"):
        Conv3XC(4, 4).load_state_dict(Conv3XC(4, 4, deploy=True).state_dict())


def test_incomplete_and_unfitting_branches() -> None:
    state = Conv3XC(3, 4).state_dict()
    del state["conv.1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*eval_conv\.weight"):
        Conv3XC(3, 4, deploy=True).load_state_dict(state)
    state = Conv3XC(3, 4).state_dict()
    del state["conv.1.bias"]
    with pytest.raises(RuntimeError, match=r"do not fit together: conv\.1\.bias missing"):
        Conv3XC(3, 4, deploy=True).load_state_dict(state)
    state = Conv3XC(3, 4).state_dict()
    state["conv.1.weight"] = torch.zeros(8, 5, 3, 3)
    with pytest.raises(RuntimeError, match="do not fit together: w_spatial"):
        Conv3XC(3, 4, deploy=True).load_state_dict(state)


def test_fold_state_dict() -> None:
    model = nn.ModuleDict({"sk": nn.Conv2d(2, 2, 1), "a": SPAB(4).half(), "b": Conv3XC(4, 3, bias=False).double()})
    folded = fold_state_dict(model.state_dict())
    assert list(folded)[:2] == ["sk.weight", "sk.bias"]
    assert set(folded) == set(deploy(model).state_dict())
    assert folded["a.c1_r.eval_conv.weight"].dtype == torch.float32
    assert folded["b.eval_conv.weight"].dtype == torch.float64
    assert fold_state_dict(folded).keys() == folded.keys()


@pytest.mark.parametrize("name", ["spab", "ecb-square"])
def test_whole_module_compiles_and_exports_in_training_form(name: str) -> None:
    module = SPAB(4) if name == "spab" else nn.Sequential(make(name), make(name))
    x = torch.randn(1, 4, 6, 5, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    got = torch.autograd.grad(compiled(x).sum(), list(module.parameters()))
    assert all(close(g, e, 1e-4) for g, e in zip(got, expected, strict=True))
    torch._dynamo.reset()
    module.eval()
    exported = torch.export.export(module, (x.detach(),)).module()
    assert close(exported(x.detach()), module(x.detach()), 1e-5)
    assert esr_kernels.optimize(module)(x.detach()).shape == x.shape
