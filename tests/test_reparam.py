"""Folding of re-parameterised convolutions: exact, differentiable, once per parameter version."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esr_kernels
from esr_kernels import SPAB, Conv3XC
from esr_kernels.reparam import deploy, fold_conv3xc, fold_state_dict


def branch_form(module: Conv3XC, x: Tensor) -> Tensor:
    """The training form as the report draws it: pad first, then 1x1, 3x3, 1x1, plus the skip."""
    return module.conv(F.pad(x, (1, 1, 1, 1))) + module.sk(x)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of all foldings so far."""
    calls: list[torch.dtype] = []
    original = Conv3XC._fold

    def counted(parameters: Any, dtype: torch.dtype) -> Any:
        calls.append(dtype)
        return original(parameters, dtype)

    monkeypatch.setattr(Conv3XC, "_fold", staticmethod(counted))
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [1, 2, 3])
@pytest.mark.parametrize(("cin", "cout"), [(3, 5), (4, 4), (1, 2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (7, 5)])
def test_fold_is_exact_borders_included(bias: bool, gain: int, cin: int, cout: int, size: tuple[int, int]) -> None:
    module = Conv3XC(cin, cout, gain=gain, bias=bias).double()
    x = torch.randn(2, cin, *size, dtype=torch.float64)
    weight, b = module.fold()
    assert (b is None) == (not bias)
    assert close(F.conv2d(x, weight, b, padding=1), branch_form(module, x), 1e-13)
    assert close(module(x), branch_form(module, x), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fold_is_rounded_once(dtype: torch.dtype) -> None:
    module = Conv3XC(12, 9).to(dtype)
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_branches(bias: bool, training: bool) -> None:
    module = Conv3XC(3, 4, bias=bias).double().train(training)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(branch_form(module, x), leaves, seed)
    for _ in range(2):  # the second time from kept weights
        got = torch.autograd.grad(module(x), leaves, seed)
        assert all(close(g, e, 1e-12) for g, e in zip(got, expected, strict=True))


def test_frozen_branches_get_no_gradient() -> None:
    module = Conv3XC(3, 4).eval()
    module.conv.requires_grad_(False)
    module(torch.randn(1, 3, 4, 4)).sum().backward()
    assert module.sk.weight.grad is not None
    assert all(p.grad is None for p in module.conv.parameters())


def test_folding_is_not_rounded_under_autocast() -> None:
    module = Conv3XC(8, 8)
    expected = module.folded()
    with torch.autocast("cpu", torch.bfloat16):
        got = module.folded()
    for g, e in zip(got, expected, strict=True):
        assert g is not None
        assert e is not None
        assert g.dtype == torch.float32
        assert torch.equal(g, e)


@pytest.mark.parametrize("training", [True, False])
def test_functional_transforms(training: bool) -> None:
    module = Conv3XC(2, 3).train(training)
    x = torch.randn(1, 2, 4, 5)
    parameters = {k: v.detach() for k, v in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    module.zero_grad()
    branch_form(module, x).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None
        assert close(got[name], p.grad, 1e-4)


def test_replicas_of_data_parallel() -> None:
    module = SPAB(4)
    modules = list(module.modules())
    replicas = {id(m): m._replicate_for_data_parallel() for m in modules}
    for m in modules:
        replica = replicas[id(m)]
        for name, child in m._modules.items():
            setattr(replica, name, replicas[id(child)])
        for name, p in m._parameters.items():
            setattr(replica, name, p.clone())  # type: ignore[union-attr]
    x = torch.randn(1, 4, 6, 5)
    assert close(replicas[id(module)](x), module(x), 1e-6)


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


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("form", [True, False], ids=["deploy", "training"])
def test_copies_are_independent(clone: Any, form: bool) -> None:
    module = SPAB(4, deploy=form).eval()
    x = torch.randn(1, 4, 5, 5)
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


def test_whole_module_compiles_and_exports_in_training_form() -> None:
    module = SPAB(4)
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
