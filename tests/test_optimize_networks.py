"""optimize on plain PyTorch networks written in many styles, against float64 of the original."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import largest_error
from torch import nn
from torch.nn import functional as F

import esr_kernels
import python_models
from esr_kernels import functional
from esr_kernels.optimize import OptimizedModel, optimize
from esr_kernels.plan import Layer, Plan

BACKENDS = [b.name for b in esr_kernels.list_backends() if b.available and b.name in ("reference", "native-cpu")]


def conv(i, o, k=3, **options):
    return nn.Conv2d(i, o, k, **{"padding": "same" if isinstance(k, tuple) else k // 2, **options})


class Net(nn.Module):
    """A network from modules and a function of them and the image."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, torch.Tensor):
                self.register_parameter(name, nn.Parameter(module))
            else:
                self.add_module(name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def plans_of(fast: OptimizedModel) -> list[Plan]:
    if fast.plan is not None:
        return [fast.plan]
    graphs = [module.graph for module in fast.modules() if isinstance(module, torch.fx.GraphModule)]
    return [Plan.from_json(n.args[2]) for graph in graphs for n in graph.nodes if "run_plan" in str(n.target)]


def layers_of(fast: OptimizedModel) -> list[Layer]:
    """The layers of its plans in order."""
    return [layer for plan in plans_of(fast) for layer in plan.layers]


def ops_of(fast: OptimizedModel) -> list[str]:
    """Operators of its plans in order, with activation and residual mode."""
    found = []
    for layer in layers_of(fast):
        a = layer.attributes
        words = [layer.op, *([a["function"]] if layer.op == "activate" else [])]
        if a.get("activation", "none") != "none":
            words.append(a["activation"])
        if layer.residual is not None:
            words.append(a.get("residual_mode", "post"))
        found.append(" ".join(words))
    return found


def check(network, images=None, tolerance=2e-5) -> OptimizedModel:
    """Optimise and compare on every backend, also for sizes that the comparison inside does not know."""
    network = network.eval()
    fast = optimize(network)
    exact = copy.deepcopy(network).double()
    for shape in images or [(1, 3, 20, 22), (2, 3, 19, 27), (1, 3, 33, 24)]:
        x = torch.randn(*shape)
        with torch.no_grad():
            wanted = exact(x.double())
        for backend in BACKENDS:
            with esr_kernels.use_backend(backend), torch.no_grad():
                got = fast(x)
            assert got.dtype == x.dtype and got.shape == wanted.shape
            assert largest_error(got, wanted) <= 5 * tolerance * max(float(wanted.abs().max()), 1e-3)
    return fast


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- activations, however they are written

ACTIVATIONS = {
    "relu F": (F.relu, "relu"),
    "relu clamp": (lambda x: x.clamp(min=0), "relu"),
    "relu max": (lambda x: torch.maximum(x, torch.zeros(1)), "relu"),
    "relu where": (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), "relu"),
    "relu abs": (lambda x: (x + x.abs()) / 2, "relu"),
    "relu in place": (lambda x: x.relu_(), "relu"),
    "leaky F": (lambda x: F.leaky_relu(x, 0.2, inplace=True), "leaky_relu"),
    "leaky max": (lambda x: torch.max(x, 0.1 * x), "leaky_relu"),
    "leaky sum": (lambda x: F.relu(x) - 0.3 * F.relu(-x), "leaky_relu"),
    "prelu one slope": (nn.PReLU(init=0.15), "leaky_relu"),
    "prelu equal slopes": (nn.PReLU(12, init=0.15), "leaky_relu"),
    "silu": (nn.SiLU(), "silu"),
    "silu product": (lambda x: x * torch.sigmoid(x), "silu"),
    "silu quotient": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "silu tanh": (lambda x: 0.5 * x * (1 + torch.tanh(x / 2)), "silu"),
    "silu in place": (lambda x: x.mul_(x.sigmoid()), "silu"),
    "gelu": (nn.GELU(), "gelu"),
    "gelu erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5)), "gelu"),
    "gelu tanh": (nn.GELU("tanh"), "gelu_tanh"),
    "gelu cubic": (
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3)))),
        "gelu_tanh",
    ),
    "scaled relu": (lambda x: 2.5 * F.relu(x), "relu"),
}


def activated(function):
    if isinstance(function, nn.Module):
        return Net(lambda m, x: m.act(m.c(x)), c=conv(3, 12), act=copy.deepcopy(function))
    return Net(lambda m, x: function(m.c(x)), c=conv(3, 12))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    function, expected = ACTIVATIONS[name]
    fast = check(activated(function), [(1, 3, 9, 12)])
    assert ops_of(fast) == [f"conv3x3 {expected}"] and fast.plan is not None


# Functions that no convolution takes in: layers of their own.
FUNCTIONS = {
    "relu6": (nn.ReLU6(), ["clamp"]),
    "hardtanh in place": (nn.Hardtanh(-0.5, 0.25, inplace=True), ["clamp"]),
    "clamped at a thousand": (lambda x: x.clamp(0, 1000.0), ["clamp"]),
    "clamped below": (lambda x: torch.clamp_min(x, -0.25), ["clamp"]),
    "minimum and maximum": (lambda x: torch.minimum(torch.maximum(x, -torch.ones(1)), torch.ones(1)), ["clamp"]),
    "different slopes": (Net(lambda m, x: F.prelu(x, m.w), w=torch.linspace(0.1, 0.3, 12)), ["leaky_relu"]),
    "different slopes by hand": (
        Net(lambda m, x: F.relu(x) - m.w.view(-1, 1, 1) * F.relu(-x), w=torch.linspace(0.1, 0.3, 12)),
        ["leaky_relu"],
    ),
    "hardswish": (nn.Hardswish(inplace=True), ["hardswish"]),
    "hardswish by hand": (lambda x: x * F.relu6(x + 3) / 6, ["hardswish"]),
    "hardsigmoid": (nn.Hardsigmoid(), ["clamp"]),
    "mish": (nn.Mish(), ["mish"]),
    "mish by hand": (lambda x: x * torch.tanh(F.softplus(x)), ["mish"]),
    "sigmoid": (nn.Sigmoid(), ["sigmoid"]),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), ["sigmoid"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, expected = FUNCTIONS[name]
    fast = check(activated(function), [(1, 3, 9, 12)])
    operators = ops_of(fast)
    assert operators[0] == "conv3x3" and fast.plan is not None
    assert [op for op in operators if op.startswith("activate")] == [f"activate {f}" for f in expected]


UNLIKE = {
    "soft shrink": lambda x: F.softshrink(x, 1e-2),
    "elu": nn.ELU(),
    "row weights": lambda x: F.relu(x) * x.mean(3, keepdim=True),
    "position": lambda x: F.relu(x + torch.linspace(0, 1, x.shape[-1])),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_only_looks_like_an_activation(name):
    function = UNLIKE[name]
    fast = check(activated(function), [(1, 3, 9, 12)])
    assert fast.plan is None and ops_of(fast)[0] == "conv3x3" and fast.report().left


# --- residuals and attention

RESIDUALS = {
    "post": (lambda m, x: F.relu(m.c(x)) + x, ["conv3x3 relu post"]),
    "post reversed": (lambda m, x: x + F.silu(m.c(x)), ["conv3x3 silu post"]),
    "pre": (lambda m, x: F.gelu(m.c(x) + x), ["conv3x3 gelu pre"]),
    "pre in place": (lambda m, x: F.leaky_relu_(m.c(x).add_(x), 0.05), ["conv3x3 leaky_relu pre"]),
    "scaled": (lambda m, x: x + 0.2 * m.c(x), ["conv3x3 post"]),
    "alpha": (lambda m, x: torch.add(x, m.c(x), alpha=0.2), ["conv3x3 post"]),
    "subtracted": (lambda m, x: x - m.c(x), ["conv3x3 post"]),
    "scaled relu": (lambda m, x: x + 0.1 * F.relu(m.c(x)), ["conv3x3 relu post"]),
    "two": (lambda m, x: m.d(m.c(x)) + x + m.c(x), ["conv3x3", "conv3x3 post", "add"]),
    "attention": (lambda m, x: attention(m.c(x), x), ["conv3x3 attention"]),
    "attention tanh": (lambda m, x: (m.c(x) + x) * torch.tanh(m.c(x) / 2) / 2, None),
    "attention expanded": (lambda m, x: expanded(m.c(x), x), ["conv3x3 attention"]),
    "attention doubled": (lambda m, x: doubled(m.c(x), x), ["conv3x3 attention", "normalize"]),
    "attention reversed": (lambda m, x: (torch.sigmoid(h := m.c(x)) - 0.5) * (x + h), ["conv3x3 attention"]),
}


def attention(h, x):
    return (h + x) * (torch.sigmoid(h) - 0.5)


def expanded(h, x):
    s = torch.sigmoid(h)
    return h * s + x * s - 0.5 * h - 0.5 * x


def doubled(h, x):
    return (h + x) * (2 * torch.sigmoid(h) - 1)


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals(name):
    function, expected = RESIDUALS[name]
    fast = check(Net(lambda m, x: function(m, m.head(x)), head=conv(3, 12), c=conv(12, 12), d=conv(12, 12)))
    if expected is not None:
        assert ops_of(fast) == ["conv3x3", *expected]


POINT_RESIDUALS = {
    "post": (lambda m, x: m.p(x) + x, ["conv1x1 post"]),
    "after an activation": (lambda m, x: x + F.gelu(m.p(x)), ["conv1x1 gelu post"]),
    "pre": (lambda m, x: F.leaky_relu(m.p(x) + x, 0.05), ["conv1x1 leaky_relu pre"]),
    "of a list": (lambda m, x: m.w(torch.cat([x, m.c(x)], 1)) + x, ["conv3x3", "conv1x1 post"]),
    "one that the network wrote": (
        lambda m, x: functional.conv1x1(x, m.p.weight, activation="silu", residual=x, residual_mode="pre"),
        ["conv1x1 silu pre"],
    ),
    "no attention": (lambda m, x: attention(m.p(x), x), None),
}


def strips(channels, bias=True, mode="reflect"):
    options = {"groups": channels, "bias": bias, "padding_mode": mode}
    column = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), **options)
    return column, nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), **options)


STRIPS = {
    "reflected": (strips(12), ["bsconv gelu pre"], []),
    "row first": (strips(12)[::-1], ["bsconv gelu pre"], []),
    "zeros": (strips(12, False, "zeros"), ["bsconv gelu pre"], []),
    "zeros around a bias": (strips(12, True, "zeros"), None, ["depthwise_conv: 3x1, 12 channels"]),
    "two columns": (
        (strips(12, False, "zeros")[0], strips(12, False, "zeros")[0]),
        None,
        ["depthwise_conv: 3x1, 12 channels"],
    ),
}


@pytest.mark.parametrize("name", STRIPS)
def test_depthwise_convolutions_of_one_row_and_one_column(name):
    (first, second), expected, apart = STRIPS[name]
    point = nn.Conv2d(12, 12, 1, bias=False)
    fast = check(
        Net(lambda m, x: F.gelu(m.b(m.a(m.p(h := m.head(x)))) + h), head=conv(3, 12), p=point, a=first, b=second)
    )
    if expected is not None:
        assert ops_of(fast) == ["conv3x3", *expected]
    assert channelwise(fast)[: len(apart)] == apart


SEPARABLE_RESIDUALS = {
    "post": (lambda m, x: m.s(x) + x, ["bsconv post"]),
    "pre": (lambda m, x: F.gelu(m.s(x) + x), ["bsconv gelu pre"]),
}


@pytest.mark.parametrize("name", SEPARABLE_RESIDUALS)
def test_residuals_of_separable_convolutions(name):
    function, expected = SEPARABLE_RESIDUALS[name]
    separable = Separable(12, 12, bias=False)
    fast = check(Net(lambda m, x: function(m, m.head(x)), head=conv(3, 12), s=separable))
    assert ops_of(fast) == ["conv3x3", *expected]


@pytest.mark.parametrize("name", POINT_RESIDUALS)
def test_residuals_of_1x1_convolutions(name):
    function, expected = POINT_RESIDUALS[name]
    layers = {"head": conv(3, 12), "c": conv(12, 12), "p": conv(12, 12, 1), "w": conv(24, 12, 1)}
    fast = check(Net(lambda m, x: function(m, m.head(x)), **layers))
    if expected is not None:
        assert ops_of(fast) == ["conv3x3", *expected]


NO_RESIDUALS = {
    "broadcast over the image": lambda m, x: F.relu(m.c(x) + x.mean((2, 3), keepdim=True)),
    "broadcast over channels": lambda m, x: m.c(x) + x[:, :1],
    "read again before": lambda m, x: torch.cat([F.relu(h := m.c(x)), h], 1),
    "activation of a sum read again": lambda m, x: (y := m.c(x) + x).relu() * y.sigmoid().sqrt(),
    "product": lambda m, x: m.c(x) * x,
    "half": lambda m, x: m.c(x) + 0.5 * x,
    "wrong gate": lambda m, x: (m.c(x) + x) * (torch.sigmoid(m.d(x)) - 0.5),
    "gate of 0.4": lambda m, x: ((h := m.c(x)) + x) * (torch.sigmoid(h) - 0.4),
}


@pytest.mark.parametrize("name", NO_RESIDUALS)
def test_what_only_looks_like_a_residual(name):
    function = NO_RESIDUALS[name]
    fast = check(Net(lambda m, x: function(m, m.head(x)), head=conv(3, 12), c=conv(12, 12), d=conv(12, 12)))
    operators = " ".join(ops_of(fast))
    assert "conv3x3" in operators and "attention" not in operators
    if name not in ("activation of a sum read again", "wrong gate"):
        assert "post" not in operators and "pre" not in operators


def test_sums_that_begin_with_zeros():
    """Neither a zero that is added nor a one that multiplies is a layer."""

    def total(net, x):
        y = net.head(x)
        sums = torch.zeros_like(y)
        for block in (net.a, net.b):
            y = F.relu(block(y))
            sums = sums + y
        return net.tail(sums * 1.0 - 0)

    network = Net(total, head=conv(3, 8), a=conv(8, 8), b=conv(8, 8), tail=conv(8, 3))
    assert ops_of(check(network)) == ["conv3x3", "conv3x3 relu", "conv3x3 relu post", "conv3x3"]


# --- linear layers


def batch_norm(channels):
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def padded(x, mode="constant"):
    return F.pad(x, (1, 1, 1, 1), mode)


class Branches(nn.Module):
    """Re-parameterisation nested twice, done in forward: blocks of branches, weights of a sum of weights."""

    def __init__(self, channels):
        super().__init__()
        self.three, self.one, self.norm = conv(channels, channels), conv(channels, channels, 1), batch_norm(channels)
        self.inner = Net(lambda m, x: m.a(x) + m.b(x), a=conv(channels, channels), b=conv(channels, channels, 1))
        self.a, self.b = (nn.Parameter(torch.randn(channels, channels, 3, 3) / 9) for _ in range(2))

    def forward(self, x):
        weight = self.a + torch.flip(self.b, [2, 3]) * self.a.std()
        weight = weight + F.pad(self.one.weight.mean((2, 3), keepdim=True), (1, 1, 1, 1))
        return self.three(x) + self.one(x) + self.norm(x) + self.inner(x) + F.conv2d(x, weight, padding=1)


class PublishedConv3XC(nn.Module):
    """As SPAN's authors wrote it: weights folded and assigned through `.data` on every forward pass."""

    def __init__(self, i, o, gain=2):
        super().__init__()
        self.sk = nn.Conv2d(i, o, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(i, i * gain, 1), nn.Conv2d(i * gain, o * gain, 3), nn.Conv2d(o * gain, o, 1)
        )
        self.eval_conv = nn.Conv2d(i, o, 3, padding=1)
        self.eval_conv.weight.requires_grad = False

    def update_params(self):
        w1, w2, w3 = (c.weight.data.clone().detach() for c in self.conv)
        b1, b2, b3 = (c.bias.data.clone().detach() for c in self.conv)
        w = F.conv2d(w1.flip(2, 3).permute(1, 0, 2, 3), w2, padding=2, stride=1).flip(2, 3).permute(1, 0, 2, 3)
        b = (w2 * b1.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b2
        weight = F.conv2d(w.flip(2, 3).permute(1, 0, 2, 3), w3).flip(2, 3).permute(1, 0, 2, 3)
        bias = (w3 * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b3
        self.eval_conv.weight.data = weight.contiguous() + F.pad(self.sk.weight.data, [1, 1, 1, 1])
        self.eval_conv.bias.data = bias.contiguous() + self.sk.bias.data

    def forward(self, x):
        self.update_params()
        return self.eval_conv(x)


class ExplicitConv3XC(nn.Module):
    """The same with its branches run: padding, 1x1, 3x3, 1x1 and a skip."""

    def __init__(self, i, o, gain=2):
        super().__init__()
        self.sk = nn.Conv2d(i, o, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(i, i * gain, 1), nn.Conv2d(i * gain, o * gain, 3), nn.Conv2d(o * gain, o, 1)
        )

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.sk(x)


ONE_CONVOLUTION = {
    "batch norm": lambda: nn.Sequential(conv(3, 12, bias=False), batch_norm(12)),
    "affine by hand": lambda: Net(
        lambda m, x: (m.c(x) - m.a.view(1, -1, 1, 1)) * m.b[None, :, None, None] / 3,
        c=conv(3, 12),
        a=torch.randn(12),
        b=torch.randn(12),
    ),
    "factor before": lambda: Net(lambda m, x: m.c(x * 255.0), c=conv(3, 12)),
    "padding": lambda: Net(lambda m, x: m.c(padded(x)), c=conv(3, 12, padding=0)),
    "ZeroPad2d": lambda: nn.Sequential(nn.ZeroPad2d(1), conv(3, 12, padding=0)),
    "same": lambda: conv(3, 12, padding="same"),
    "1x1 after": lambda: nn.Sequential(conv(3, 24), conv(24, 6, 1)),
    "1x1 before without a bias": lambda: nn.Sequential(conv(3, 12, 1, bias=False), conv(12, 7)),
    "branches": lambda: Branches(3),
    "published Conv3XC": lambda: PublishedConv3XC(3, 11),
    "explicit Conv3XC": lambda: ExplicitConv3XC(3, 11),
    "weight standardisation": lambda: Net(
        lambda m, x: F.conv2d(
            x, (m.w - m.w.mean((1, 2, 3), keepdim=True)) / m.w.std((1, 2, 3), keepdim=True), padding=1
        ),
        w=torch.randn(9, 3, 3, 3),
    ),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(conv(3, 12)),
    "difference": lambda: Net(lambda m, x: m.a(x) - m.b(x), a=conv(3, 8), b=conv(3, 8)),
    "groups": lambda: conv(3, 12, groups=3),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), conv(3, 12), nn.Identity(), nn.Dropout2d(0.5)),
}


@pytest.mark.parametrize("name", ONE_CONVOLUTION)
def test_linear_layers_that_are_one_convolution(name):
    assert ops_of(check(ONE_CONVOLUTION[name](), [(1, 3, 9, 12), (2, 3, 1, 5)])) == ["conv3x3"]


NOT_ONE = {
    "shift before zero padding": (lambda: Net(lambda m, x: m.c(x - 0.5), c=conv(3, 12)), ["normalize", "conv3x3"]),
    "biased 1x1 before zero padding": (lambda: nn.Sequential(conv(3, 12, 1), conv(12, 12)), ["conv1x1", "conv3x3"]),
    "activation between": (lambda: nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 4, 1)), ["conv3x3 relu", "conv1x1"]),
    "reused between": (lambda: Net(lambda m, x: (h := m.a(x)) + m.b(h), a=conv(3, 12), b=conv(12, 12, 1)), None),
    "wide in the middle is cheap": (
        lambda: nn.Sequential(conv(3, 2, 1, bias=False), conv(2, 32)),
        ["conv1x1", "conv3x3"],
    ),
    "stride": (lambda: nn.Sequential(conv(3, 12, stride=2), nn.ReLU()), []),
    "dilation": (lambda: conv(3, 12, padding=2, dilation=2), []),
    "groups of another kernel": (lambda: conv(3, 12, 5, groups=3, dilation=2, padding=4), []),
    "padding of 2": (lambda: conv(3, 12, padding=2), []),
    "no padding": (lambda: conv(3, 12, padding=0), []),
    "reflected": (lambda: conv(3, 12, padding_mode="reflect"), []),
    "one-sided padding": (lambda: Net(lambda m, x: m.c(F.pad(x, (2, 0, 2, 0))), c=conv(3, 12, padding=0)), []),
    "padding of ones": (lambda: Net(lambda m, x: m.c(F.pad(x, (1,) * 4, value=1.0)), c=conv(3, 12, padding=0)), []),
    "weights from the image": (
        lambda: Net(lambda m, x: F.conv2d(x, m.w * x.mean(), padding=1), w=torch.randn(3, 3, 3, 3)),
        [],
    ),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3, padding=1), []),
    "instance norm": (lambda: nn.Sequential(conv(3, 12), nn.InstanceNorm2d(12)), ["conv3x3"]),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_linear_layers_that_are_not(name):
    make, expected = NOT_ONE[name]
    fast = check(make(), [(1, 3, 9, 12), (2, 3, 11, 5)])
    if expected is not None:
        assert ops_of(fast) == expected
    if expected == []:
        assert fast.report().left and "fused form" in str(fast.report())


# --- whole networks


class Attention(nn.Module):
    """Enhanced spatial attention in its three forms."""

    def __init__(self, n, f=6, form="rlfn"):
        super().__init__()
        self.form = form
        self.conv1, self.conv_f, self.conv4 = conv(n, f, 1), conv(f, f, 1), conv(f, n, 1)
        self.conv2, self.conv3 = conv(f, f, stride=2, padding=0), conv(f, f)
        self.conv_max, self.conv3_ = conv(f, f), conv(f, f)
        self.relu, self.sigmoid = nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x):
        c1_ = self.conv1(x)
        v = F.max_pool2d(self.conv2(c1_), kernel_size=7, stride=3)
        if self.form == "rfdn":
            v = self.conv3_(self.relu(self.conv3(self.relu(self.conv_max(v)))))
        else:
            v = self.conv3(v)
        c3 = F.interpolate(v, (x.size(2), x.size(3)), mode="bilinear", align_corners=False)
        c4 = self.conv4(c3 + (c1_ if self.form == "r2net" else self.conv_f(c1_)))
        return x * self.sigmoid(c4)


class Separable(nn.Module):
    def __init__(self, i, o, mode="zeros", bias=False):
        super().__init__()
        self.pw = conv(i, o, 1, bias=bias)
        self.dw = conv(o, o, groups=o, padding_mode=mode)

    def forward(self, x):
        return self.dw(self.pw(x))


def space(x, r):
    n, c, h, w = x.shape
    return x.view(n, c // r**2, r, r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // r**2, h * r, w * r)


def windowed(m, x):
    h, w = x.shape[2:]
    x = F.pad(x, (0, -w % 4, 0, -h % 4), mode="reflect")
    return m.tail(F.relu(m.head(x)))[..., : 2 * h, : 2 * w]


def tail(r, c=12):
    return nn.Sequential(conv(c, 3 * r * r), nn.PixelShuffle(r))


def shared(m, x):
    y = m.head(x)
    for _ in range(3):
        y = y + m.act(m.body(y))
    return m.tail(y)


def dense(m, x):
    maps = [m.head(x)]
    for c in (m.a, m.b):
        maps.append(F.leaky_relu(c(torch.cat(maps, dim=1)), 0.1))
    return m.tail(torch.cat(maps, 1))


def clipped(m, x):
    return torch.clamp(m.tail(F.relu_(m.head(x))), 0.0, 1.0)


def by_size(m, x):
    y = F.relu(m.head(x))
    if x.shape[2] >= 30:
        y = m.body(y)
    return m.tail(y)


def repeated(x, r):
    n, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(-1, -1, -1, r, -1, r).reshape(n, c, h * r, w * r)


WHOLE = {
    "espcn": (
        lambda: nn.Sequential(conv(3, 12), nn.ReLU(True), conv(12, 27), nn.PixelShuffle(3)),
        ["conv3x3 relu", "conv3x3_pixel_shuffle"],
    ),
    "shuffle by views": (lambda: Net(lambda m, x: space(m.c(x), 2), c=conv(3, 12)), ["conv3x3_pixel_shuffle"]),
    "shuffle after the sum": (
        lambda: Net(lambda m, x: F.pixel_shuffle(m.c(x) + torch.repeat_interleave(x, 4, 1), 2), c=conv(3, 12)),
        ["resize", "conv3x3_pixel_shuffle post"],
    ),
    "bilinear skip": (
        lambda: Net(
            lambda m, x: m.tail(F.relu(m.head(x))) + F.interpolate(x, scale_factor=2, mode="bilinear"),
            head=conv(3, 12),
            tail=tail(2),
        ),
        ["conv3x3 relu", "resize", "conv3x3_pixel_shuffle post"],
    ),
    "nearest skip": (
        lambda: Net(lambda m, x: F.interpolate(x, scale_factor=3) + m.tail(m.head(x)), head=conv(3, 12), tail=tail(3)),
        ["conv3x3", "resize", "conv3x3_pixel_shuffle post"],
    ),
    "repeated rows and columns": (
        lambda: Net(
            lambda m, x: m.tail(m.head(x)) + x.repeat_interleave(2, 2).repeat_interleave(2, 3),
            head=conv(3, 12),
            tail=tail(2),
        ),
        ["conv3x3", "resize", "conv3x3_pixel_shuffle post"],
    ),
    "repeated pixels": (
        lambda: Net(lambda m, x: m.tail(m.head(x)) + repeated(x, 3), head=conv(3, 12), tail=tail(3)),
        ["conv3x3", "resize", "conv3x3_pixel_shuffle post"],
    ),
    "two upsamplings": (
        lambda: Net(
            lambda m, x: m.b(F.silu(m.a(m.head(x)))),
            head=conv(3, 16),
            a=nn.Sequential(conv(16, 64), nn.PixelShuffle(2)),
            b=tail(2, 16),
        ),
        ["conv3x3", "conv3x3_pixel_shuffle", "activate silu", "conv3x3_pixel_shuffle"],
    ),
    "mean and range": (
        lambda: Net(
            lambda m, x: m.tail((x - m.mean) * 255) / 255 + m.mean,
            tail=tail(2, 3),
            mean=torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1),
        ),
        ["normalize", "conv3x3_pixel_shuffle"],
    ),
    "shared": (
        lambda: Net(shared, head=conv(3, 12), body=conv(12, 12), act=nn.PReLU(), tail=tail(2)),
        ["conv3x3", *["conv3x3 leaky_relu post"] * 3, "conv3x3_pixel_shuffle"],
    ),
    "dense 1x1": (
        lambda: Net(dense, head=conv(3, 12), a=conv(12, 9, 1), b=conv(21, 5, 1), tail=conv(26, 8, 1)),
        ["conv3x3", "conv1x1 leaky_relu", "conv1x1 leaky_relu", "conv1x1"],
    ),
    "dense 3x3": (
        lambda: Net(dense, head=conv(3, 12), a=conv(12, 9), b=conv(21, 5), tail=conv(26, 8, 1)),
        ["conv3x3", "conv3x3 leaky_relu", "conv3x3", "conv3x3 leaky_relu pre", "conv1x1"],
    ),
    "padded to a multiple of four": (
        lambda: Net(windowed, head=conv(3, 12), tail=tail(2)),
        ["conv3x3 relu", "conv3x3_pixel_shuffle"],
    ),
    "clipped": (lambda: Net(clipped, head=conv(3, 13), tail=tail(2, 13)), ["conv3x3 relu", "conv3x3_pixel_shuffle"]),
    "branch on the size": (lambda: Net(by_size, head=conv(3, 12), body=conv(12, 12), tail=tail(2)), None),
    "esa": (
        lambda: nn.Sequential(conv(3, 10), Attention(10), tail(2, 10)),
        ["conv3x3", "esa", "conv3x3_pixel_shuffle"],
    ),
    "esa rfdn": (lambda: nn.Sequential(conv(3, 10), Attention(10, form="rfdn")), ["conv3x3", "esa"]),
    "esa r2net": (lambda: nn.Sequential(conv(3, 10), Attention(10, form="r2net")), ["conv3x3", "esa"]),
    "separable": (lambda: nn.Sequential(Separable(3, 9), nn.GELU(), Separable(9, 5)), ["bsconv gelu", "bsconv"]),
    "separable reflect": (lambda: nn.Sequential(Separable(3, 9, "reflect", bias=True), nn.SiLU()), ["bsconv silu"]),
    "separable with a bias between": (lambda: Separable(3, 9, bias=True), ["conv1x1", "depthwise_conv"]),
    "channel attention": (
        lambda: Net(
            lambda m, x: (y := F.relu(m.head(x))) * torch.sigmoid(m.a(F.adaptive_avg_pool2d(y, 1))),
            head=conv(3, 12),
            a=conv(12, 12, 1),
        ),
        None,
    ),
    "layer norm": (
        lambda: Net(
            lambda m, x: m.tail(F.layer_norm(m.head(x).permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2)),
            head=conv(3, 12),
            tail=tail(2),
        ),
        ["conv3x3", "layer_norm2d", "conv3x3_pixel_shuffle"],
    ),
    "slices in place": (
        lambda: Net(lambda m, x: partial(m, m.head(x)), head=conv(3, 12), c=conv(4, 4), tail=tail(2)),
        None,
    ),
}


def partial(m, x):
    x[:, :4] = m.c(x[:, :4])
    x += 1
    return m.tail(x)


def test_images_too_small_for_spatial_attention():
    fast = optimize(nn.Sequential(conv(3, 10), Attention(10)).eval())
    with pytest.raises(ValueError, match="at least 15 x 15 pixels, got 14 x 20"):
        fast(torch.zeros(1, 3, 14, 20))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks(name):
    make, expected = WHOLE[name]
    fast = check(make())
    if expected is not None:
        assert ops_of(fast) == expected
    assert fast.report().share > 0.2
    assert fast.report().exact_difference < 1e-5 and fast.report().samples


# --- channel by channel: depthwise convolutions, gates, normalisation over channels


class Norm(nn.Module):
    """Layer normalisation over channels, written in one of several ways."""

    def __init__(self, function, channels=12, eps=1e-6):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.function, self.eps = function, eps

    def forward(self, x):
        return self.function(x, self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1), self.eps)


def published_norm(x, w, b, eps):
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return w * ((x - u) / torch.sqrt(s + eps)) + b


def norm_by_permuting(x, w, b, eps):
    y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), w.flatten(), b.flatten(), eps)
    return y.permute(0, 3, 1, 2)


NORMS = {
    "mean, pow, sqrt": published_norm,
    "var": lambda x, w, b, eps: (
        w * (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True, unbiased=False) + eps) + b
    ),
    "permuted": norm_by_permuting,
    "no parameters": lambda x, w, b, eps: published_norm(x, 1.0, 0.0, eps),
    "power": lambda x, w, b, eps: (x - x.mean(1, True)) * (x.var(1, False, keepdim=True) + eps) ** -0.5 * w,
}
NOT_NORMS = {
    "unbiased variance": lambda x, w, b, eps: (x - x.mean(1, True)) / torch.sqrt(x.var(1, keepdim=True) + eps),
    "standard deviation plus epsilon": lambda x, w, b, eps: (
        (x - x.mean(1, True)) / (x.var(1, False, keepdim=True).sqrt() + 0.1)
    ),
    "no mean": lambda x, w, b, eps: x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + eps),
    "two groups": lambda x, w, b, eps: F.group_norm(x, 2, w.flatten(), b.flatten(), eps),
    "instance": lambda x, w, b, eps: (x - x.mean((2, 3), True)) / torch.sqrt(x.var((2, 3), False, keepdim=True) + eps),
}


CHANNELWISE = ("depthwise_conv", "layer_norm2d")


def channelwise(fast: OptimizedModel) -> list[str]:
    """What it computes channel by channel, in plans or by itself, as its report has the latter."""
    found = [line.split(" (")[0] for line in fast.report().fused if line.startswith(CHANNELWISE)]
    for layer in layers_of(fast):
        if layer.op in CHANNELWISE:
            a, words = layer.attributes, [f"{layer.channels} channels"]
            if layer.op == "depthwise_conv":
                words.insert(0, "x".join(map(str, a["kernel_size"])))
                words += [a["activation"]] * (a["activation"] != "none") + ["gated"] * a["gated"]
            found.append(f"{layer.op}: {', '.join(words)}")
    return found


@pytest.mark.parametrize("name", NORMS)
def test_normalization_over_channels(name):
    network = Net(
        lambda m, x: m.tail((y := m.head(x)) + m.c(m.norm(y)) * torch.sigmoid(y.mean(1, True))), head=conv(3, 12)
    )
    network.norm, network.c, network.tail = Norm(NORMS[name]), conv(12, 12, 1), conv(12, 5)
    assert channelwise(check(network)) == ["layer_norm2d: 12 channels"]


@pytest.mark.parametrize("name", NOT_NORMS)
def test_what_only_looks_like_normalization_over_channels(name):
    assert channelwise(check(nn.Sequential(conv(3, 12), Norm(NOT_NORMS[name]), conv(12, 5)))) == []


def gated(act, halves):
    def run(m, x):
        a, b = halves(m.dw(m.up(x)))
        return m.down(act(a) * b)

    return run


def chunks(y):
    return y.chunk(2, 1)


def same(x):
    return x


GATES = {
    "chunk, gelu": (gated(F.gelu, chunks), "3x3, 20 channels, gelu, gated"),
    "split, tanh gelu": (
        gated(lambda x: F.gelu(x, approximate="tanh"), lambda y: torch.split(y, y.shape[1] // 2, dim=1)),
        "3x3, 20 channels, gelu_tanh, gated",
    ),
    "slices": (gated(same, lambda y: (y[:, :20], y[:, 20:])), "3x3, 20 channels, gated"),
    "second times first": (
        lambda m, x: m.down((h := m.dw(m.up(x)).chunk(2, 1))[1] * F.silu(h[0])),
        "3x3, 20 channels, silu, gated",
    ),
    "x sigmoid(x)": (gated(lambda x: x * torch.sigmoid(x), chunks), "3x3, 20 channels, silu, gated"),
    # What is activated must be the first half, and nobody else may read the halves.
    "second half activated": (lambda m, x: m.down((h := m.dw(m.up(x)).chunk(2, 1))[0] * F.gelu(h[1])), None),
    "read twice": (lambda m, x: m.down((h := m.dw(m.up(x)).chunk(2, 1))[0] * h[1] + h[1]), None),
    "three parts": (lambda m, x: m.down((h := m.dw(m.up(x)).split([20, 10, 10], 1))[0] * torch.cat(h[1:], 1)), None),
}


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    function, expected = GATES[name]
    network = Net(function, up=conv(3, 40, 1), dw=conv(40, 40, groups=40), down=conv(20, 7, 1))
    found = channelwise(check(network))
    assert found == ([f"depthwise_conv: {expected}"] if expected else found)
    assert not any("gated" in line for line in found) or expected is not None


@pytest.mark.parametrize(
    ("options", "after", "expected"),
    [
        ({"k": 5}, nn.GELU(), "5x5, 12 channels, gelu"),
        ({"k": (3, 5)}, nn.LeakyReLU(0.2), "3x5, 12 channels, leaky_relu"),
        ({"k": 3, "dilation": 3, "padding": 3}, nn.Identity(), "3x3, 12 channels"),
        ({"k": 7, "bias": False}, nn.SiLU(), "7x7, 12 channels, silu"),
        ({"k": 9}, nn.GELU(), None),
        ({"k": 3, "padding": 0}, nn.GELU(), None),
        ({"k": 3, "stride": 2}, nn.GELU(), None),
        ({"k": 3, "padding_mode": "reflect"}, nn.GELU(), None),
    ],
)
def test_depthwise_convolutions(options, after, expected):
    options = dict(options)
    depthwise = conv(12, 12, options.pop("k"), groups=12, **options)
    # An activation before it, so that it is no part of a separable pair.
    fast = check(nn.Sequential(conv(3, 12, 1), nn.GELU(), depthwise, after, conv(12, 5)))
    assert channelwise(fast) == ([f"depthwise_conv: {expected}"] if expected else [])


def test_batch_normalization_before_the_activation_goes_into_a_depthwise_convolution():
    norm = nn.BatchNorm2d(12)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    fast = check(nn.Sequential(conv(3, 12, 1), nn.GELU(), conv(12, 12, groups=12), norm, nn.ReLU(), conv(12, 5)))
    assert channelwise(fast) == ["depthwise_conv: 3x3, 12 channels, relu"]


def test_a_network_of_depthwise_convolutions_and_normalization_is_one_plan():
    """ConvNeXt's block and a gated feed-forward network behind it, as RCN's and EGFMN's kin have them."""

    def block(m, x):
        y = x + m.down(F.gelu(m.up(m.norm1(m.wide(x)))))
        a, b = m.dw(m.expand(m.norm2(y))).chunk(2, 1)
        return y + m.project(F.gelu(a) * b)

    network = Net(block, wide=conv(12, 12, 7, groups=12), up=conv(12, 30, 1), down=conv(30, 12, 1))
    network.expand, network.dw, network.project = conv(12, 40, 1), conv(40, 40, groups=40), conv(20, 12, 1)
    network.norm1, network.norm2 = Norm(norm_by_permuting), Norm(published_norm)
    fast = check(nn.Sequential(conv(3, 12), network, conv(12, 5)))
    assert fast.plan is not None and fast.plan.receptive_radius == 1 + 3 + 1 + 1
    assert ops_of(fast) == [
        "conv3x3",
        "depthwise_conv",
        "layer_norm2d",
        "conv1x1 gelu",
        "conv1x1 post",
        "layer_norm2d",
        "conv1x1",
        "depthwise_conv gelu",
        "conv1x1 post",
        "conv3x3",
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_such_a_plan_in_half_types(dtype):
    network = Net(lambda m, x: x + m.dw(F.gelu(m.up(m.norm(x)))), norm=Norm(published_norm), up=conv(12, 12, 1))
    network.dw = conv(12, 12, 5, groups=12)
    network = nn.Sequential(conv(3, 12), network, conv(12, 5)).eval()
    fast = optimize(network, dtype=dtype)
    x = torch.rand(1, 3, 21, 18)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x.double())
        assert largest_error(fast(x), exact) <= 16 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert fast.plan is not None and fast.report().notes == []


def test_one_operator_channel_by_channel_is_called_by_itself():
    """In a plan of its own it would be brought to the plan's layout and back."""
    fast = check(Net(lambda m, x: torch.cumsum(m.dw(torch.cumsum(x, 1)), 1), dw=conv(3, 3, 5, groups=3)))
    assert layers_of(fast) == [] and channelwise(fast) == ["depthwise_conv: 5x5, 3 channels"]


def _beside_a_foreign_branch(m, x):
    aside = torch.cumsum(m.a(x), 3)
    return m.d(m.c(m.b(x)) + aside)


def _through_a_foreign_branch(m, x):
    y = m.b(x)
    return m.d(m.c(y) + torch.cumsum(m.a(y), 3))


@pytest.mark.parametrize(
    ("function", "expected"),
    [(_beside_a_foreign_branch, [1, 3]), (_through_a_foreign_branch, [2, 2])],
    ids=["beside", "through"],
)
def test_plans_are_joined_unless_something_else_is_between(function, expected):
    network = Net(function, a=conv(3, 8), b=conv(3, 8), c=conv(8, 8), d=conv(8, 8))
    if function is _through_a_foreign_branch:
        network.a = conv(8, 8)
    assert sorted(len(plan.layers) for plan in plans_of(check(network))) == expected


def test_a_map_times_one_channel_stays_in_the_plan():
    """ERRN's gate, the map last or first."""
    network = Net(
        lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))) + torch.sigmoid(m.b(x)) * m.a(x),
        a=conv(3, 8), b=conv(3, 1, 1), c=conv(8, 8),
    )  # fmt: skip
    fast = check(network)
    assert len(plans_of(fast)) == 1 and fast.plan is not None
    assert ops_of(fast).count("multiply") == 2


# --- several resolutions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("written", ["factor", "size", "module"])
def test_the_resized_image_in_the_tail(written, mode, dtype):
    corners = None if mode == "nearest" else False

    def enlarge(m, x):
        if written == "module":
            return m.up(x)
        where = {"scale_factor": 3} if written == "factor" else {"size": (3 * x.shape[2], 3 * x.shape[3])}
        return F.interpolate(x, mode=mode, align_corners=corners, **where)

    network = Net(
        lambda m, x: F.pixel_shuffle(m.c2(F.relu(m.c1(x))), 3) + enlarge(m, x), c1=conv(3, 12), c2=conv(12, 27)
    )
    network.up = nn.Upsample(scale_factor=3, mode=mode, align_corners=corners)
    if dtype == torch.float32:
        fast = check(network)
    else:
        fast = optimize(network.eval(), dtype=dtype)
        x = torch.rand(1, 3, 21, 18)
        with torch.no_grad():
            exact = copy.deepcopy(network).double()(x.double())
            assert largest_error(fast(x), exact) <= 16 * torch.finfo(dtype).eps * float(exact.abs().max())
    assert fast.plan is not None and fast.report().left == []
    assert ops_of(fast) == ["conv3x3 relu", "resize", "conv3x3_pixel_shuffle post"]


def test_maps_enlarged_between_convolutions():
    """Real-ESRGAN's tail."""
    network = Net(
        lambda m, x: m.c3(F.leaky_relu(m.c2(F.interpolate(m.c1(x), scale_factor=2)), 0.2)),
        c1=conv(3, 12),
        c2=conv(12, 12),
    )
    network.c3 = conv(12, 3)
    fast = check(network)
    assert ops_of(fast) == ["conv3x3", "resize", "conv3x3 leaky_relu", "conv3x3"] and fast.plan.scale == 2


@pytest.mark.parametrize(
    "resize",
    [
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=(2, 3)),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True),
    ],
)
def test_resizes_that_plans_do_not_have(resize):
    fast = check(Net(lambda m, x: m.c2(resize(m.c1(x))), c1=conv(3, 12), c2=conv(12, 3)))
    assert ops_of(fast) == ["conv3x3", "conv3x3"]


def test_a_resize_at_the_end_stays_plain():
    """Its result would be copied out of the plan's layout."""
    fast = check(Net(lambda m, x: F.interpolate(m.c2(F.relu(m.c1(x))), scale_factor=2), c1=conv(3, 12), c2=conv(12, 3)))
    assert ops_of(fast) == ["conv3x3 relu", "conv3x3"]
    assert [line.split(" has ")[0] for line in fast.report().left] == ["aten.upsample_nearest2d.vec"]


class SpatiallyAdaptive(nn.Module):
    """SAFMN's attention, as it is published."""

    def __init__(self, channels, levels=4, mode="nearest", act=None):
        super().__init__()
        self.levels, self.mode = levels, mode
        part = channels // levels
        self.mfr = nn.ModuleList(conv(part, part, groups=part) for _ in range(levels))
        self.aggr = conv(channels, channels, 1)
        self.act = act or nn.GELU()

    def forward(self, x):
        h, w = x.size()[-2:]
        out = []
        for i, part in enumerate(x.chunk(self.levels, dim=1)):
            if i > 0:
                pooled = F.adaptive_max_pool2d(part, (h // 2**i, w // 2**i))
                s = F.interpolate(self.mfr[i](pooled), size=(h, w), mode=self.mode)
            else:
                s = self.mfr[i](part)
            out.append(s)
        return self.act(self.aggr(torch.cat(out, dim=1))) * x


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    "act", [nn.GELU(), nn.Identity(), nn.SiLU(), nn.LeakyReLU(0.1)], ids=lambda m: type(m).__name__
)
def test_modulation_by_pooled_maps(mode, act):
    network = Net(lambda m, x: m.tail((y := m.head(x)) + m.safm(m.norm(y))), head=conv(3, 12), tail=conv(12, 3))
    network.norm, network.safm = Norm(published_norm), SpatiallyAdaptive(12, mode=mode, act=act)
    fast = check(network)
    assert fast.plan is not None and fast.report().left == []
    names = [layer.op for layer in layers_of(fast)]
    assert names.count("adaptive_max_pool") == 3 and names.count("modulate") == 1 and names.count("slice") == 4
    (modulate,) = (layer for layer in layers_of(fast) if layer.op == "modulate")
    expected = {"GELU": "gelu", "Identity": "none", "SiLU": "silu", "LeakyReLU": "leaky_relu"}[type(act).__name__]
    assert (modulate.attributes["mode"], modulate.attributes["activation"]) == (mode, expected)
    assert fast.minimum_size == 8
    with pytest.raises(ValueError, match="at least 8"):
        fast(torch.rand(1, 3, 7, 9))


def test_one_resized_gate():
    network = Net(
        lambda m, x: m.tail(
            F.gelu(F.interpolate(m.dw(F.adaptive_max_pool2d(y := m.head(x), size(x, 4))), x.shape[2:])) * y
        ),
        head=conv(3, 12),
        dw=conv(12, 12, groups=12),
        tail=conv(12, 3),
    )
    fast = check(network)
    assert ops_of(fast) == ["conv3x3", "adaptive_max_pool", "depthwise_conv", "modulate gelu", "conv3x3"]
    assert fast.plan is not None


def size(x, divisor):
    return x.shape[2] // divisor, x.shape[3] // divisor


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        # The pooled map is read outside: by the mean, or returned with a size of its own.
        (
            lambda m, y: (
                F.interpolate(p := m.c(F.adaptive_max_pool2d(y, size(y, 4))), y.shape[2:]) * y + p.cumsum(2).mean()
            ),
            1,
        ),
        (lambda m, y: F.interpolate(m.c(F.adaptive_max_pool2d(y, (8, 8))), y.shape[2:]) * y, 1),
        (lambda m, y: F.interpolate(m.c(F.adaptive_avg_pool2d(y, 4)), y.shape[2:], mode="bicubic") * y, 0),
    ],
)
def test_pooled_maps_outside_of_plans(gate, expected):
    fast = check(Net(lambda m, x: m.tail(gate(m, m.head(x))), head=conv(3, 12), c=conv(12, 12), tail=conv(12, 3)))
    names = [layer.op for layer in layers_of(fast)]
    assert "adaptive_max_pool" not in names and "modulate" not in names and names.count("conv3x3") >= 2
    assert sum(line.startswith("modulate: ") for line in fast.report().fused) == expected


# --- statistics of the whole image, and what is made of values of one pixel


def spatial(x, mean=lambda t: t.mean((2, 3), keepdim=True)):
    return mean((x - mean(x)) ** 2)


def by_sums(x):
    return x.sum(3, keepdim=True).sum(2, keepdim=True) / (x.size(2) * x.size(3))


STATISTICS = {
    "adaptive_avg_pool2d": (lambda y: F.adaptive_avg_pool2d(y, 1), "mean", 0),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((1, 1)), "mean", 0),
    "mean": (lambda y: y.mean([-2, -1], True), "mean", 0),
    "mean of means": (lambda y: y.mean(3, keepdim=True).mean(2, keepdim=True), "mean", 0),
    "mean of flattened": (lambda y: y.flatten(2).mean(2)[..., None, None], "mean", 0),
    "mean of a view": (lambda y: y.view(*y.shape[:2], -1).mean(-1).view(*y.shape[:2], 1, 1), "mean", 0),
    "sums": (by_sums, "mean", 0),
    "avg_pool2d": (lambda y: F.avg_pool2d(y, y.shape[2:]), "mean", 0),
    "avg_pool2d by name": (lambda y: F.avg_pool2d(y, kernel_size=(y.size(2), y.size(3)), stride=1), "mean", 0),
    "adaptive_max_pool2d": (lambda y: F.adaptive_max_pool2d(y, 1), "maximum", 0),
    "amax": (lambda y: torch.amax(y, (2, 3), keepdim=True), "maximum", 0),
    "max of flattened": (lambda y: y.flatten(2).max(2)[0][..., None, None], "maximum", 0),
    "max_pool2d": (lambda y: F.max_pool2d(y, y.size()[2:]), "maximum", 0),
    "var": (lambda y: y.var((2, 3), keepdim=True), "variance", 1),
    "var without correction": (lambda y: torch.var(y, (2, 3), unbiased=False, keepdim=True), "variance", 0),
    "squared differences": (spatial, "variance", 0),
    "differences of sums": (lambda y: spatial(y, by_sums), "variance", 0),
    "mean of squares": (lambda y: y.square().mean((2, 3), True) - y.mean((2, 3), True).square(), "variance", 0),
    "std": (lambda y: y.std((2, 3), keepdim=True), "std", 1),
    "root of var": (lambda y: y.var((2, 3), correction=0, keepdim=True).sqrt(), "std", 0),
    "root by pow": (lambda y: spatial(y).pow(0.5), "std", 0),
    "root by **": (lambda y: y.flatten(2).var(2, keepdim=True)[..., None] ** 0.5, "std", 1),
    "std_mean": (lambda y: sum(torch.std_mean(y, (2, 3), keepdim=True)), "contrast", 1),
    "contrast": (lambda y: spatial(y, by_sums).pow(0.5) + by_sums(y), "contrast", 0),
}


def statistics_of(fast):
    found = [layer.attributes for layer in layers_of(fast) if layer.op == "statistic"]
    return [(a["kind"], a["correction"]) for a in found]


def gated_by(statistic):
    return Net(
        lambda m, x: m.tail((y := m.head(x)) * torch.sigmoid(m.gate(statistic(y)))),
        head=conv(3, 12),
        gate=conv(12, 12, 1),
        tail=conv(12, 3),
    )


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics(name):
    statistic, kind, correction = STATISTICS[name]
    fast = check(gated_by(statistic), [(1, 3, 9, 12), (2, 3, 8, 8)])
    assert ops_of(fast) == ["conv3x3", "statistic", "conv1x1", "activate sigmoid", "modulate", "conv3x3"]
    assert statistics_of(fast) == [(kind, correction)]
    assert fast.plan is not None and fast.report().left == []


WINDOWS = {
    "of the last axes": (lambda y: y.unfold(2, 5, 3).unfold(3, 5, 3).var((-2, -1)), True),
    "of others": (lambda y: y.unfold(2, 5, 2).unfold(3, 3, 1).var((5, 4), correction=0), True),
    "without correction": (lambda y: y.unfold(-2, 3, 1).unfold(-2, 4, 2).var((4, 5), unbiased=False), True),
    "of rows": (lambda y: y.unfold(2, 5, 1).var(-1), False),
    "kept": (lambda y: y.unfold(2, 5, 1).unfold(3, 5, 1).var((-2, -1), keepdim=True)[..., 0, 0], False),
    "columns first": (lambda y: y.unfold(3, 5, 2).unfold(2, 3, 1).var((-2, -1)), False),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_variances_of_windows(name):
    function, recognized = WINDOWS[name]
    model = Net(lambda m, x: m.tail(function(m.head(x))), head=conv(3, 12), tail=conv(12, 3))
    fast = check(model, [(1, 3, 9, 12), (2, 3, 8, 8)])
    targets = [getattr(n.target, "__name__", "") for n in fast.fallback.body.graph.nodes]
    assert ("local_variance" in targets) == recognized
    x = torch.randn(2, 3, 11, 13)
    assert torch.equal(pickle.loads(pickle.dumps(fast.fallback.body))(x), fast(x))


LENGTHS = {
    "normalize": F.normalize,
    "over the norm": lambda y: y / y.norm(dim=1, keepdim=True).clamp_min(1e-3),
    "over the vector norm": lambda y: y / torch.linalg.vector_norm(y, dim=1, keepdim=True),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_of_pixels(name):
    model = Net(lambda m, x: m.tail(LENGTHS[name](m.head(x))), head=conv(3, 12), tail=conv(12, 3))
    fast = check(model, [(1, 3, 9, 12), (2, 3, 8, 8)])
    assert ops_of(fast) == ["conv3x3", "multiply", "conv1x1", "activate rsqrt", "multiply", "conv3x3"]
    assert fast.plan is not None and fast.report().left == []


@pytest.mark.parametrize(
    "other",
    [
        lambda y: F.normalize(y, p=1.0),
        lambda y: F.normalize(y, dim=2),
        lambda y: y.relu() / y.norm(dim=1, keepdim=True).clamp_min(1e-3),
    ],
)
def test_other_lengths_stay(other):
    model = Net(lambda m, x: m.tail(other(m.head(x))), head=conv(3, 12), tail=conv(12, 3))
    assert "activate rsqrt" not in ops_of(check(model, [(1, 3, 9, 12), (2, 3, 8, 8)]))


UNLIKE_STATISTICS = {
    "of the batch": lambda y: y.mean((0, 2, 3), keepdim=True),
    "of rows": lambda y: y.mean(3, keepdim=True),
    "with something below the root": lambda y: (spatial(y) + 1e-5).sqrt(),
    "of one size": lambda y: y.sum((2, 3), keepdim=True) / 100,
    "of a window": lambda y: F.avg_pool2d(y, 3, stride=2),
    "norm": lambda y: y.square().sum((2, 3), keepdim=True).sqrt(),
    "absolute mean": lambda y: y.mean((2, 3), keepdim=True).abs(),
    "smallest": lambda y: y.amin((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", UNLIKE_STATISTICS)
def test_what_only_looks_like_a_statistic(name):
    def function(m, x):
        y = m.head(x)
        s = UNLIKE_STATISTICS[name](y)
        return m.tail(y * torch.sigmoid(F.interpolate(s, y.shape[2:])))

    fast = check(Net(function, head=conv(3, 12), tail=conv(12, 3)), [(1, 3, 9, 12), (2, 3, 8, 8)])
    assert {kind for kind, _ in statistics_of(fast)} <= {"variance", "mean"} and fast.plan is None
    assert fast.report().wrong == []


def deviating(m, x):
    """What deviates from the image's mean, amplified, as MogaNet and GFMN have it."""
    t = m.point(F.relu(m.head(x)))
    t = F.gelu(t + m.sigma * (t - F.adaptive_avg_pool2d(t, 1)))
    p = F.silu(m.body(t))
    return m.tail(m.last(p + m.scale * (p - F.gelu(m.one(p)))))


def test_deviations_from_the_mean_and_from_one_channel_go_into_convolutions():
    network = Net(
        deviating,
        **{"head": conv(3, 12), "point": conv(12, 16, 1), "body": conv(16, 20), "one": conv(20, 1, 1)},
        **{"last": conv(20, 8, 1), "tail": conv(8, 3)},
        sigma=torch.linspace(-1, 0.5, 16).view(1, 16, 1, 1),
        scale=torch.rand(1, 20, 1, 1),
    )
    fast = check(network)
    operators = ["conv3x3 relu", "conv1x1", "statistic", "conv1x1", "add", "activate gelu", "conv3x3 silu"]
    assert sorted(ops_of(fast)) == sorted([*operators, "conv1x1 gelu", "conv1x1", "conv3x3"])
    assert fast.plan is not None and statistics_of(fast) == [("mean", 0)]
    (last,) = (layer for layer in layers_of(fast) if layer.op == "conv1x1" and len(layer.inputs) == 2)
    assert [fast.plan.channels[i] for i in last.inputs] == [20, 1]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: y - y.mean((2, 3), keepdim=True),
        lambda m, y: 3 - 2 * (y - y.mean((2, 3), keepdim=True)) + y.var((2, 3), keepdim=True) * m.w,
        lambda m, y: torch.sub(F.silu(y), y.amax((2, 3), keepdim=True), alpha=0.5),
        lambda m, y: y.std((2, 3), keepdim=True) + y,
        lambda m, y: (y - y.mean((2, 3), True)) * m.w + y.mean((2, 3), True) * torch.sigmoid(y.amax((2, 3), True)),
    ],
)
def test_statistics_added_to_every_pixel(function):
    network = Net(lambda m, x: m.tail(function(m, m.head(x))), head=conv(3, 12), tail=conv(12, 3))
    network.w = nn.Parameter(torch.rand(12, 1, 1))
    fast = check(network)
    assert fast.plan is not None and "statistic" in ops_of(fast)


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        # Numbers that meet what plans do not have: a softmax of them, and more than one image.
        (lambda m, y: y * F.softmax(m.gate(y.mean((2, 3), keepdim=True)), 1), True),
        (lambda m, y: y * m.gate(y.mean((2, 3), keepdim=True)).mean(0, keepdim=True), True),
        (lambda m, y: y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))).sum(1, keepdim=True), True),
        (lambda m, y: y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True)) + m.gate(y.amax((2, 3), True))), False),
    ],
)
def test_gates_that_plans_do_and_do_not_have(function, plain):
    network = Net(lambda m, x: m.tail(function(m, m.head(x))), head=conv(3, 12), gate=conv(12, 12, 1), tail=conv(12, 3))
    fast = check(network)
    assert (fast.plan is None) == plain and ops_of(fast).count("conv3x3") == 2


def test_a_gate_between_plain_operations_stays_plain():
    """A plan of it would cost two conversions of the map."""
    network = Net(
        lambda m, x: m.tail(((y := m.head(x).cumsum(2)) * torch.sigmoid(m.gate(y.mean((2, 3), True)))).cumsum(3)),
        **{"head": conv(3, 12), "gate": conv(12, 12, 1), "tail": conv(12, 3)},
    )
    fast = check(network)
    assert ops_of(fast) == ["conv3x3", "conv3x3"]


def test_channels_of_a_sum():
    """Read in parts by layers of the plan, by others, and from outside."""

    def run(m, x):
        y = m.a(x) + F.silu(m.b(x))
        first, second, third = y.split([4, 5, 3], 1)
        return m.tail(torch.cat([m.c(first), F.relu(second)], 1)) + m.d(torch.cumsum(third, 2))

    network = Net(run, a=conv(3, 12), b=conv(3, 12), c=conv(4, 6), d=conv(3, 3), tail=conv(11, 3))
    fast = check(network)
    assert sorted(layer.attributes["start"] for layer in layers_of(fast) if layer.op == "slice") == [0, 4]


# --- failing rewrites


def test_what_no_rewrite_foresaw_runs_as_it_was(monkeypatch):
    from esr_kernels.optimize import model as optimizer

    def rewrite(*_):
        raise ValueError("no such pattern")

    monkeypatch.setattr(optimizer, "rewrite", rewrite)
    network = Net(lambda m, x: F.relu(m.c(x)), c=conv(3, 16))
    fast = optimize(network)
    x = torch.rand(1, 3, 9, 8)
    assert torch.equal(fast(x), network(x))
    assert "the whole network: its graph cannot be rewritten (ValueError: no such pattern)" in fast.report().left


def test_a_selective_scan_is_one_call_in_a_graph_for_every_size():
    """In plain PyTorch it is a loop whose length depends on the image."""
    model = python_models.create("dvmsr", channels=8, num_layers=1)
    fast = optimize(model)
    assert "other images" not in str(fast.report())
    for size in ((1, 24, 24), (2, 9, 14), (1, 1, 1)):
        x = torch.rand(size[0], 3, *size[1:])
        with torch.inference_mode(), torch.profiler.profile() as profile:
            out = fast(x)
        assert {e.key: e.count for e in profile.key_averages()}["esr::selective_scan"] == 2
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_networks_that_take_too_long_to_trace_are_taken_module_by_module(monkeypatch):
    from esr_kernels.optimize import model as optimizer

    network = nn.Sequential(nn.Sequential(conv(3, 12), nn.ReLU()), nn.Sequential(conv(12, 5), nn.ReLU()))
    complete = optimizer.build
    whole = []

    def build(module, example, scale_limit=None, deadline=None):
        if not whole:
            whole.append(module)
            deadline = 0.0  # has passed
        return complete(module, example, scale_limit, deadline)

    monkeypatch.setattr(optimizer, "build", build)
    fast = check(network)
    assert len(fast.report().fused) == 2
    assert "the whole network: torch.export failed: TimeoutError: tracing takes too long" in fast.report().left[0]


def test_modules_with_little_to_fuse_stay_plain_and_are_traced_once(monkeypatch):
    from esr_kernels.optimize import model as optimizer

    def attend(m, x):
        tokens = m.c(x).flatten(2)
        return x + (tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)).view(x.shape)

    complete = optimizer.build
    traced = []

    def build(module, *args):
        traced.append(module)
        if len(traced) == 1:
            raise optimizer.CaptureError("not today")
        return complete(module, *args)

    monkeypatch.setattr(optimizer, "build", build)
    blocks = [Net(attend, c=conv(12, 12)) for _ in range(3)]
    fast = check(nn.Sequential(conv(3, 12), *blocks, conv(12, 5)))
    assert "1 and 2 more: less than 10% of its arithmetic has a fused form" in fast.report().left
    assert len(traced) == 4 and len(fast.report().fused) == 2


def _two_plans(again):
    """Something plain between two plans, and a map that the second plan reads last, unless it is read again."""

    def forward(m, x):
        a = m.head(x)
        b = F.relu(m.body(a))
        y = m.join(b * F.softmax(b, 1)) + a
        z = m.more(F.relu(y))
        return m.tail(z) + (F.softmax(a, 1).sum() if again else 0)

    return Net(forward, head=conv(3, 12), body=conv(12, 12), join=conv(12, 12), more=conv(12, 12), tail=conv(12, 3))


@pytest.mark.parametrize("again", [False, True])
def test_plans_use_the_memory_of_what_nothing_reads_afterwards(again):
    fast = check(_two_plans(again))
    (body,) = [module for module in fast.modules() if isinstance(module, torch.fx.GraphModule)]
    calls = [n for n in body.graph.nodes if n.name.startswith("run_plan")]
    place = {n: i for i, n in enumerate(body.graph.nodes)}
    spent = [(call, call.args[0][i]) for call in calls for i in call.args[3]]
    for call, value in spent:
        assert all(user is call or place[user] < place[call] for user in value.users)
        # The softmax may have returned what it was given, as far as is known; the image is the caller's.
        assert value.op == "call_function" and not any("softmax" in str(user.target) for user in value.users)
    assert bool(spent) != again
    for call in calls:
        for result in call.users:
            kept = any("softmax" in str(u.target) or u.op == "output" for u in result.users)
            assert not (kept and result.args[1] in call.args[4])
    x = torch.rand(2, 3, 610, 590)  # large enough to be worth it
    before = x.clone()
    with torch.no_grad():
        first = fast(x)
        wanted = first.clone()
        second = fast(x)
        alone = fast(x[:1])
        loaded = pickle.loads(pickle.dumps(fast))
        assert [n.args[3:5] for n in calls] == [
            n.args[3:5] for m in loaded.modules() if isinstance(m, torch.fx.GraphModule)
            for n in m.graph.nodes if n.name.startswith("run_plan")
        ]  # fmt: skip
        assert torch.equal(loaded(x), wanted)
    assert torch.equal(first, wanted) and torch.equal(second, wanted) and torch.equal(x, before)
    assert first.data_ptr() != second.data_ptr()
    for result in (first, alone):
        assert result.untyped_storage().nbytes() == result.nbytes
        file = io.BytesIO()
        torch.save(result, file)
        assert file.tell() < result.nbytes + 4096
        assert torch.equal(result.clone().resize_(result.numel() + 1)[:-1], result.flatten())


def test_plans_that_share_memory_run_where_operators_are_watched():
    from torch.utils.flop_counter import FlopCounterMode

    network = _two_plans(False)
    fast = check(network)
    x = torch.rand(1, 3, 24, 21)
    with torch.no_grad():
        wanted = fast(x)
        with FlopCounterMode(display=False) as counter:
            assert torch.equal(fast(x), wanted)
        exported = torch.export.export(fast, (x,)).module()
        assert torch.equal(exported(x), wanted)
        torch.testing.assert_close(torch.jit.trace(fast, x, check_trace=False)(x), wanted)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        network(x)
    assert counter.get_total_flops() == plain.get_total_flops()
    with pytest.raises(RuntimeError, match="has no derivative"):
        fast(x.requires_grad_()).sum().backward()


def test_layer_norms_are_repeated_rather_than_handed_on():
    """Where what they normalise is handed on anyway."""

    def network(hands_on):
        def forward(m, x):
            a = m.head(x)
            n = m.norm(a)
            b = F.softmax(m.body(n), 1)
            return m.tail(m.join(b) * n + (a if hands_on else 0))

        return Net(
            forward, head=conv(3, 12), norm=Norm(published_norm), body=conv(12, 12), join=conv(12, 12), tail=conv(12, 3)
        )

    for hands_on in (False, True):
        layers = [line.split() for line in check(network(hands_on)).report().fused]
        norms = [line[1] for line in layers if "layer_norm2d" in line]
        assert norms == (["1:", "2:"] if hands_on else ["1:"])


def test_pooling_of_single_pixels_is_no_view():
    from esr_kernels.optimize.pooling import max_pool2d

    x = torch.rand(1, 2, 6, 6)
    y = max_pool2d(x, (1, 1), (2, 2))
    assert torch.equal(y, x[..., ::2, ::2]) and y.data_ptr() != x.data_ptr()
