"""The building blocks: published state-dict names, results equal to plain PyTorch, training, copies, bad arguments."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esr_kernels
from esr_kernels import ESA, RLFB, SPAB, BackendError, Conv3XC, PixelShuffleUpsampler
from esr_kernels.modules import (
    CCA,
    GDFN,
    SAFM,
    BSConv,
    BSConvS,
    Conv1x1,
    Conv3x3,
    DepthwiseConv,
    ElementScale,
    LayerNorm2d,
    PixelNorm,
    local_variance,
)

WB = ("weight", "bias")


def names(*modules: str, kinds: tuple[str, ...] = WB) -> set[str]:
    return {f"{m}.{k}" for m in modules for k in kinds}


def plain_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding, stride=conv.stride)


def plain_spab(m: SPAB, x: Tensor) -> tuple[Tensor, Tensor]:
    def conv(module: Conv3XC, x: Tensor) -> Tensor:
        if module.deployed:
            return plain_conv(module.eval_conv, x)
        return module.conv(F.pad(x, (1, 1, 1, 1))) + module.sk(x)

    mid = F.silu(conv(m.c1_r, x))
    h = conv(m.c3_r, F.silu(conv(m.c2_r, mid)))
    return (h + x) * (torch.sigmoid(h) - 0.5), mid


def plain_esa(m: ESA, x: Tensor) -> Tensor:
    c1 = plain_conv(m.conv1, x)
    y = F.max_pool2d(plain_conv(m.conv2, c1), kernel_size=7, stride=3)
    if m.conv_max is not None:
        y = F.relu(plain_conv(m.conv_max, y))
    y = plain_conv(m.conv3, y)
    if m.conv3_ is not None:
        y = plain_conv(m.conv3_, F.relu(y))
    y = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)
    y = y + (c1 if m.conv_f is None else plain_conv(m.conv_f, c1))
    return x * torch.sigmoid(plain_conv(m.conv4, y))


def plain_rlfb(m: RLFB, x: Tensor) -> Tensor:
    y = x
    for conv in (m.c1_r, m.c2_r, m.c3_r):
        h = plain_conv(conv, y)
        y = F.gelu(h) if conv.activation == "gelu" else F.leaky_relu(h, conv.negative_slope)
    return plain_esa(m.esa, plain_conv(m.c5, y + x))


def plain_upsampler(m: PixelShuffleUpsampler, x: Tensor) -> Tensor:
    return F.pixel_shuffle(plain_conv(m[0], x), m.upscale_factor)


def plain_rep_upsampler(m: PixelShuffleUpsampler, x: Tensor) -> Tensor:
    return F.pixel_shuffle(m[0].conv(F.pad(x, (1, 1, 1, 1))) + m[0].sk(x), m.upscale_factor)


# name: constructor, plain form, input channels
BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any], int]] = {
    "conv3x3": (lambda: Conv3x3(5, 7), plain_conv, 5),
    "conv1x1": (lambda: Conv1x1(5, 7, bias=False), plain_conv, 5),
    "conv3xc": (lambda: Conv3XC(5, 7), lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1))) + m.sk(x), 5),
    "spab": (lambda: SPAB(28), lambda m, x: plain_spab(m, x)[0], 28),
    "spab-deploy": (lambda: SPAB(28, deploy=True), lambda m, x: plain_spab(m, x)[0], 28),
    "spab-widths": (lambda: SPAB(9, 13, 9, bias=False, deploy=True), lambda m, x: plain_spab(m, x)[0], 9),
    "esa": (lambda: ESA(46, 16), plain_esa, 46),
    "esa-without-conv_f": (lambda: ESA(30, 16, conv_f=False), plain_esa, 30),
    "esa-rfdn": (lambda: ESA(50, 12, conv_max=True), plain_esa, 50),
    "esa-without-bias": (lambda: ESA(20, 8, conv_f=False, bias=False), plain_esa, 20),
    "rlfb": (lambda: RLFB(46, 48), plain_rlfb, 46),
    "rlfb-gelu": (lambda: RLFB(20, 12, esa_channels=8, activation="gelu", bias=False), plain_rlfb, 20),
    "upsampler": (lambda: PixelShuffleUpsampler(28), plain_upsampler, 28),
    "upsampler-x2": (lambda: PixelShuffleUpsampler(12, 1, 2, bias=False), plain_upsampler, 12),
    "upsampler-rep": (lambda: PixelShuffleUpsampler(9, 2, 3, conv=Conv3XC(9, 18)), plain_rep_upsampler, 9),
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[Any, Tensor], Any], Tensor]:
    torch.manual_seed(0)
    make, plain, channels = BLOCKS[request.param]
    return make(), plain, torch.randn(2, channels, 17, 22)


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12))


# --- state dicts --------------------------------------------------------------------------------------------------


def test_state_dict_names() -> None:
    assert set(SPAB(4, deploy=True).state_dict()) == names(*(f"c{i}_r.eval_conv" for i in (1, 2, 3)))
    branches = ("sk", "conv.0", "conv.1", "conv.2")
    assert set(SPAB(4).state_dict()) == names(*(f"c{i}_r.{b}" for i in (1, 2, 3) for b in branches))
    assert {k: tuple(v.shape) for k, v in Conv3XC(3, 5, bias=False).state_dict().items()} == {
        "sk.weight": (5, 3, 1, 1),
        "conv.0.weight": (6, 3, 1, 1),
        "conv.1.weight": (10, 6, 3, 3),
        "conv.2.weight": (5, 10, 1, 1),
    }
    esa = ("conv1", "conv2", "conv3", "conv4")
    assert set(ESA(8).state_dict()) == names(*esa, "conv_f")
    assert set(ESA(8, conv_f=False, bias=False).state_dict()) == names(*esa, kinds=("weight",))
    assert set(ESA(8, 2, conv_max=True).state_dict()) == names(*esa, "conv_f", "conv_max", "conv3_")
    rlfb = RLFB(8, bias=False)
    assert set(rlfb.state_dict()) == names("c1_r", "c2_r", "c3_r", "c5", kinds=("weight",)) | names(
        *(f"esa.{n}" for n in (*esa, "conv_f"))
    )
    model = nn.ModuleDict({"upsampler": PixelShuffleUpsampler(8, 3, 4)})
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        "upsampler.0.weight": (48, 8, 3, 3),
        "upsampler.0.bias": (48,),
    }


def test_state_dict_round_trip(block: Any) -> None:
    module, _, x = block
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other(x), module(x))


# --- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equal_to_plain(block: Any, backend: str, training: bool, channels_last: bool) -> None:
    module, plain, x = block
    module.train(training)
    exact = plain(copy.deepcopy(module).double(), x.double())
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = module(x)
    assert error(y, exact) < 1e-4
    last = channels_last and not isinstance(module, PixelShuffleUpsampler)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (16, 15)])
def test_small_images(block: Any, backend: str, size: tuple[int, int]) -> None:
    module, plain, x = block
    x = x[:, :, : size[0], : size[1]]
    smallest = getattr(module, "minimum_size", 1)
    if min(size) < smallest:
        with pytest.raises(ValueError, match=f"at least 15 x 15 pixels, got {size[0]} x {size[1]}"):
            module(x)
    else:
        with torch.no_grad():
            assert error(module(x), plain(copy.deepcopy(module).double(), x.double())) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules(block: Any, backend: str, dtype: torch.dtype) -> None:
    module, plain, x = block
    module.eval().to(dtype)
    x = x.to(dtype)
    exact = plain(copy.deepcopy(module).double(), x.double())
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    assert error(y, exact) < 16 * torch.finfo(dtype).eps


def test_spab_returns_the_activated_middle(backend: str) -> None:
    for module in (SPAB(6, 10), SPAB(6, 10, deploy=True)):
        x = torch.randn(2, 6, 9, 7)
        with torch.no_grad():
            out, mid = module(x, return_mid=True)
            expected, expected_mid = plain_spab(copy.deepcopy(module).double(), x.double())
        assert error(out, expected) < 1e-4
        assert error(mid, expected_mid) < 1e-4
        assert error(module(x).detach(), expected) < 1e-4


def test_residuals_activations_and_lists(backend: str) -> None:
    x, r = torch.randn(2, 5, 8, 9), torch.randn(2, 7, 8, 9)
    conv = Conv3x3(5, 7, activation="leaky_relu", negative_slope=0.1)
    with torch.no_grad():
        h = F.conv2d(x, conv.weight, conv.bias, padding=1)
        assert error(conv(x, residual=r), F.leaky_relu(h, 0.1) + r) < 1e-4
        assert error(conv(x, residual=r, residual_mode="pre"), F.leaky_relu(h + r, 0.1)) < 1e-4
        point = Conv1x1(12, 3, activation="gelu")
        expected = F.gelu(F.conv2d(torch.cat([x, r], 1), point.weight, point.bias))
        assert error(point([x, r]), expected) < 1e-4
        s = torch.randn(2, 3, 8, 9)
        assert error(point([x, r], s), expected + s) < 1e-4
        h = F.conv2d(torch.cat([x, r], 1), point.weight, point.bias)
        assert error(point([x, r], s, "pre"), F.gelu(h + s)) < 1e-4
        tail = PixelShuffleUpsampler(5, 3, 2)
        image = torch.randn(2, 3, 16, 18)
        assert error(tail(x, residual=image), plain_upsampler(tail, x) + image) < 1e-4


# --- training and copies ------------------------------------------------------------------------------------------


def test_one_step_trains(block: Any) -> None:
    module, plain, x = block
    module.train()
    twin = copy.deepcopy(module).double()
    x.requires_grad_()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    loss = module(x).square().mean()
    loss.backward()
    plain(twin, x.double()).square().mean().backward()
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert bool(torch.isfinite(p.grad).all())
        assert error(p.grad, q.grad) < 1e-3
    optimizer.step()
    assert float(module(x).square().mean().detach()) < float(loss.detach())


def test_copies(block: Any) -> None:
    module, _, x = block
    module.eval()
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}


@pytest.mark.parametrize("name", ["spab", "rlfb", "upsampler"])
def test_compiles_whole(name: str) -> None:
    make, _, channels = BLOCKS[name]
    module, x = make(), torch.randn(2, channels, 17, 22)
    torch._dynamo.reset()
    compiled = torch.compile(module.eval(), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for image in (x, x[:, :, :16, :19]):
            assert error(compiled(image), module(image)) < 1e-5
    torch._dynamo.reset()


def test_a_chosen_backend_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESR_KERNELS_BACKEND", "native-cpu")
    with pytest.raises(BackendError):  # it takes no float64, which the automatic choice would run elsewhere
        SPAB(4).double()(torch.randn(1, 4, 5, 5, dtype=torch.float64))


def test_exported_at_the_top() -> None:
    for name in ("SPAB", "ESA", "RLFB", "Conv3XC", "PixelShuffleUpsampler"):
        assert getattr(esr_kernels, name) is getattr(esr_kernels.modules, name)


# --- bad arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: SPAB(0), ValueError, "channels: must be at least 1, got 0"),
        (lambda: SPAB(4.0), TypeError, "channels: expected an int, got float"),  # type: ignore[arg-type]
        (lambda: SPAB(4, -1), ValueError, "mid_channels: must be at least 1, got -1"),
        (lambda: SPAB(4, 4, 5), ValueError, "out_channels: the block adds its input, so it must be 4, got 5"),
        (lambda: Conv3XC(3, 4, gain=0), ValueError, "gain: must be at least 1, got 0"),
        (lambda: Conv3XC(3, True), TypeError, "out_channels: expected an int, got bool"),
        (lambda: ESA(8, 0), ValueError, "esa_channels: must be at least 1"),
        (lambda: RLFB(8, activation="swish"), ValueError, "activation: expected one of none, .*, got 'swish'"),
        (lambda: PixelShuffleUpsampler(8, 3, 0), ValueError, "upscale_factor: must be at least 1"),
        (
            lambda: PixelShuffleUpsampler(4, 3, 2, conv=Conv3XC(4, 8)),
            ValueError,
            r"conv: expected 4 to 12 channels and no activation, got Conv3XC\(\s*4, 8",
        ),
        (
            lambda: PixelShuffleUpsampler(4, 1, 2, conv=Conv3XC(4, 4, activation="silu")),
            ValueError,
            "conv: expected 4 to 4 channels and no activation",
        ),
        (lambda: Conv1x1(0, 3), ValueError, "in_channels: must be at least 1"),
    ],
)
def test_bad_arguments(make: Callable[[], nn.Module], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        make()


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="x: expected 4 dimensions"):
        SPAB(4)(torch.randn(4, 5, 5))
    with pytest.raises(ValueError, match=r"w1: expected shape \[O, 5, 3, 3\], got \[4, 4, 3, 3\]"):
        SPAB(4)(torch.randn(1, 5, 5, 5))
    with pytest.raises(ValueError, match=r"residual: expected shape \[1, 3, 10, 10\], got \[1, 3, 5, 5\]"):
        PixelShuffleUpsampler(4, 3, 2)(torch.randn(1, 4, 5, 5), residual=torch.randn(1, 3, 5, 5))


# --- blocks of the pointwise and depthwise networks -----------------------------------------------------------------


def plain_bsconv(m: BSConv, x: Tensor) -> Tensor:
    y = F.conv2d(x, m.pw.weight)
    y = F.pad(y, (1, 1, 1, 1), mode="reflect" if m.dw.padding_mode == "reflect" else "constant")
    y = F.conv2d(y, m.dw.weight, m.dw.bias, stride=m.dw.stride, groups=y.shape[1])
    return F.gelu(y) if m.activation == "gelu" else y


def plain_bsconv_s(m: BSConvS, x: Tensor) -> Tensor:
    y = F.pad(F.conv2d(x, m.pw.weight), (0, 0, 1, 1), mode="reflect")
    y = F.conv2d(y, m.dw1.weight, m.dw1.bias, stride=m.stride, groups=y.shape[1])
    y = F.conv2d(F.pad(y, (1, 1, 0, 0), mode="reflect"), m.dw2.weight, m.dw2.bias, stride=m.stride, groups=y.shape[1])
    return F.gelu(y) if m.activation == "gelu" else y


def plain_layer_norm(m: LayerNorm2d, x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), m.weight.shape, m.weight, m.bias, m.eps).permute(0, 3, 1, 2)


def plain_gdfn(m: GDFN, x: Tensor) -> Tensor:
    t = F.conv2d(x, m.project_in.weight)
    a, b = F.conv2d(t, m.dwconv.weight, padding=1, groups=t.shape[1]).chunk(2, 1)
    return F.conv2d((F.gelu(a) if m.dwconv.activation == "gelu" else a) * b, m.project_out.weight)


def plain_safm(m: SAFM, x: Tensor) -> Tensor:
    levels = []
    for i, part in enumerate(x.chunk(4, 1)):
        conv = m.mfr[i]
        sides = [s if i == 0 else s // 2 ** (i + 1) for s in x.shape[2:]]
        y = F.conv2d(F.adaptive_max_pool2d(part, sides), conv.weight, conv.bias, padding=1, groups=part.shape[1])
        levels.append(F.interpolate(y, x.shape[2:], mode="nearest"))
    return F.gelu(F.conv2d(torch.cat(levels, 1), m.aggr.weight, m.aggr.bias)) * x


def plain_cca(m: CCA, x: Tensor) -> Tensor:
    v = x.std((2, 3), correction=0, keepdim=True) + x.mean((2, 3), keepdim=True)
    first, second = m.conv_du[0], m.conv_du[2]
    return x * torch.sigmoid(plain_conv(second, F.relu(plain_conv(first, v))))


PLAIN_BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Any], int]] = {
    "bsconv": (lambda: BSConv(12, 9), plain_bsconv, 12),
    "bsconv-reflect": (lambda: BSConv(12, 9, padding_mode="reflect", activation="gelu"), plain_bsconv, 12),
    "bsconv-stride": (lambda: BSConv(6, 7, padding_mode="reflect", stride=2), plain_bsconv, 6),
    "bsconv-s": (lambda: BSConvS(12, 9, activation="gelu"), plain_bsconv_s, 12),
    "bsconv-s-stride": (lambda: BSConvS(6, 7, stride=2), plain_bsconv_s, 6),
    "depthwise": (lambda: DepthwiseConv(7, (5, 3), activation="gelu"), lambda m, x: F.gelu(plain_depthwise(m, x)), 7),
    "depthwise-dilated": (lambda: DepthwiseConv(7, 5, dilation=3, bias=False), lambda m, x: plain_depthwise(m, x), 7),
    "depthwise-reflect": (lambda: DepthwiseConv(6, padding_mode="reflect"), lambda m, x: plain_depthwise(m, x), 6),
    "depthwise-gated": (lambda: DepthwiseConv(6, 5, activation="silu", gated=True), lambda m, x: plain_gate(m, x), 6),
    "depthwise-large": (lambda: DepthwiseConv(6, 9, activation="silu", gated=True), lambda m, x: plain_gate(m, x), 6),
    "layer-norm": (lambda: LayerNorm2d(24, 1e-5), plain_layer_norm, 24),
    "pixel-norm": (lambda: PixelNorm(24), plain_layer_norm, 24),
    "gdfn": (lambda: GDFN(10, 27), plain_gdfn, 10),
    "gdfn-without-gelu": (lambda: GDFN(10, 12, gelu=False), plain_gdfn, 10),
    "safm": (lambda: SAFM(20), plain_safm, 20),
    "cca": (lambda: CCA(20, 3), plain_cca, 20),
    "scale": (lambda: ElementScale(5), lambda m, x: x * m.scale, 5),
}


def plain_depthwise(m: DepthwiseConv, x: Tensor) -> Tensor:
    dilation = m.dilation[0]
    height, width = ((k // 2) * dilation for k in m.kernel_size)
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    x = F.pad(x, (width, width, height, height), mode)
    return F.conv2d(x, m.weight, m.bias, dilation=dilation, groups=x.shape[1])


def plain_gate(m: DepthwiseConv, x: Tensor) -> Tensor:
    a, b = plain_depthwise(m, x).chunk(2, 1)
    return F.silu(a) * b


@pytest.mark.parametrize("name", PLAIN_BLOCKS)
def test_blocks_of_pointwise_networks(name: str) -> None:
    torch.manual_seed(0)
    make, plain, channels = PLAIN_BLOCKS[name]
    module = make()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(2, channels, 19, 22)
    exact = copy.deepcopy(module).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.detach().contiguous(memory_format=layout).requires_grad_()
        z = x.double().requires_grad_()
        out, expected = module(y), plain(exact, z)
        assert error(out, expected) < 1e-4
        out.square().sum().backward()
        expected.square().sum().backward()
        assert error(y.grad, z.grad) < 1e-3
        assert all(error(a.grad, b.grad) < 1e-3 for a, b in zip(module.parameters(), exact.parameters(), strict=True))
        for p in (*module.parameters(), *exact.parameters()):
            p.grad = None


def test_local_variance() -> None:
    x = torch.randn(2, 3, 13, 17, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    y = local_variance(x, 5)
    assert y.shape == (2, 3, 4, 5)
    for i in range(4):
        for j in range(5):
            window = padded[:, :, 3 * i : 3 * i + 5, 3 * j : 3 * j + 5].flatten(2)
            torch.testing.assert_close(y[:, :, i, j], window.var(-1))


def test_bad_arguments_of_pointwise_blocks() -> None:
    with pytest.raises(ValueError, match="channels: must be a multiple of 4, got 6"):
        SAFM(6)
    with pytest.raises(ValueError, match="x: SAFM needs images of at least 16 x 16 pixels, got 15 x 20"):
        SAFM(8)(torch.randn(1, 8, 15, 20))
    with pytest.raises(ValueError, match=r"kernel_size: must be odd to keep the size, got \(3, 2\)"):
        DepthwiseConv(4, (3, 2))
    with pytest.raises(ValueError, match="channels: a gate needs an even number, got 5"):
        DepthwiseConv(5, gated=True)
    with pytest.raises(ValueError, match="padding_mode: expected one of zeros, reflect, got 'circular'"):
        BSConv(4, 4, padding_mode="circular")
    with pytest.raises(ValueError, match="activation: stride 2 allows only \"none\", got 'gelu'"):
        BSConv(4, 4, stride=2, activation="gelu")
    with pytest.raises(ValueError, match="activation: expected one of"):
        DepthwiseConv(4, activation="sine")
    for make in (lambda: CCA(0, 1), lambda: GDFN(4, 0), lambda: LayerNorm2d(0), lambda: ElementScale(0)):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            make()


def test_the_product_of_two_depthwise_convolutions() -> None:
    """In eval mode it is kept until a parameter changes; with a residual and traced it is the same function."""
    torch.manual_seed(0)
    module = BSConvS(5, 6, activation="gelu").eval().requires_grad_(False)
    x, r = torch.randn(1, 5, 2, 9), torch.randn(1, 6, 2, 9)

    def two_steps(m: BSConvS, x: Tensor, r: Tensor) -> Tensor:
        none = copy.copy(m)
        none.activation = "none"
        return F.gelu(plain_bsconv_s(none, x) + r)

    exact = copy.deepcopy(module).double()
    for _ in range(2):
        with torch.no_grad():
            got = module(x, r, "pre")
            assert module.depthwise()[0] is module.depthwise()[0]
            assert error(got, two_steps(exact, x.double(), r.double())) < 1e-5
            traced = torch.jit.trace(lambda x, r: module(x, r, "pre"), (x, r))
            assert error(traced(x, r), two_steps(exact, x.double(), r.double())) < 1e-5
            for m in (module, exact):
                m.dw1.weight.mul_(2)
                m.dw2.bias.add_(1)
    with pytest.raises(ValueError, match="residual: stride 2 takes none"):
        BSConvS(5, 6, stride=2)(torch.randn(1, 5, 8, 8), residual=r)
    with pytest.raises(ValueError, match="activation: stride 2 allows only \"none\", got 'gelu'"):
        BSConvS(5, 6, stride=2, activation="gelu")
