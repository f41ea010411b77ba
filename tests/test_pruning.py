"""Kernel, bias and channel pruning, and batch normalisation folded into the convolution before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esr_kernels import RLFB, SPAB, Conv3XC, PixelShuffleUpsampler
from esr_kernels.modules import ECB, RBSB, CollapsibleConv, Conv1x1, Conv3x3, DepthwiseConv, LayerNorm2d
from esr_kernels.reparam import deploy, fuse_batch_norms
from esr_kernels.reparam.pruning import centre_share, channel_scores, prune_biases, prune_channels, prune_kernels


class Small(nn.Module):
    """RLFN in small: a map of 6 channels with a skip around the block, one of 8 inside it."""

    def __init__(self, channels: int = 6, mid: int = 8, **options: Any) -> None:
        super().__init__()
        self.conv_1 = Conv3x3(3, channels)
        self.block = RLFB(channels, mid, esa_channels=4, activation="gelu", **options)
        self.conv_2 = Conv3XC(channels, channels, deploy=True)
        self.upsampler = PixelShuffleUpsampler(channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        shallow = self.conv_1(x)
        return self.upsampler(self.conv_2(self.block(shallow)) + shallow)


WIDTH = {  # the names that share the network's map
    "outputs": ["conv_1", "block.c3_r", "block.c5", "block.esa.conv4", "conv_2"],
    "inputs": ["block.c1_r", "block.c5", "block.esa.conv1", "conv_2.eval_conv", "upsampler.0"],
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    a, b = a.detach(), b.detach()
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())))


def image() -> Tensor:
    return torch.randn(2, 3, 16, 17, dtype=torch.float64)


# --- kernels and biases -------------------------------------------------------------------------------------------


KERNELS = ["conv_1", "block.c2_r", "block.c3_r", "conv_2", "upsampler.0"]


@torch.no_grad()
def test_pruned_kernel_of_a_deployed_upsampler() -> None:
    tail = PixelShuffleUpsampler(4, 1, 2, conv=ECB(4, 4, deploy_name="")).double()
    x, residual = torch.randn(1, 4, 5, 6).double(), torch.randn(1, 1, 10, 12).double()
    tail[0].switch_to_deploy()
    pruned = prune_kernels(tail, ["0"])
    expected = nn.functional.conv2d(x, tail[0].weight[:, :, 1:2, 1:2], tail[0].bias)
    assert close(pruned(x, residual), nn.functional.pixel_shuffle(expected, 2) + residual)


@torch.no_grad()
def test_pruned_kernels_are_the_centre_taps() -> None:
    model = Small().double()
    centred = copy.deepcopy(model)
    for name in ("conv_1", "block.c2_r", "block.c3_r", "conv_2.eval_conv", "upsampler.0"):
        centre = torch.zeros(3, 3)
        centre[1, 1] = 1
        centred.get_submodule(name).weight.mul_(centre)  # type: ignore[operator, union-attr]
    before = copy.deepcopy(model.state_dict())
    x = image()
    pruned = prune_kernels(model, KERNELS)
    assert close(pruned(x), centred(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert pruned.state_dict().keys() == before.keys()
    for name in ("conv_1", "block.c2_r"):
        conv = pruned.get_submodule(name)
        assert isinstance(conv, Conv1x1)
        assert conv.activation == model.get_submodule(name).activation
        assert conv.weight.requires_grad
    assert pruned.state_dict()["upsampler.0.weight"].shape == (12, 6, 1, 1)
    assert close(
        pruned.upsampler(y := torch.randn(1, 6, 4, 5).double(), r := torch.randn(1, 3, 8, 10).double()),
        centred.upsampler(y, r),
    )


@torch.no_grad()
def test_kernels_and_channels_of_a_deployed_convolution_with_a_weight_of_its_own() -> None:
    module = nn.Sequential(CollapsibleConv(3, 4, width=8, activation="silu", deploy=True), nn.Conv2d(4, 2, 1)).double()
    x = image()
    pruned = prune_kernels(module, ["0"])
    assert close(
        pruned(x),
        module[1](nn.functional.silu(nn.functional.conv2d(x, module[0].weight[:, :, 1:2, 1:2], module[0].bias))),
    )
    assert centre_share(module).keys() == {"0"}
    assert centre_share(pruned) == {}
    fewer = prune_channels(module, [0, 3], ["0"], ["1"])
    module[0].weight[1:3] = 0
    module[0].bias[1:3] = 0
    assert close(fewer(x), module(x))
    assert prune_biases(module, ["0"])[0].bias is None


@pytest.mark.parametrize("mode", ["pre", "post", "attention"])
def test_a_1x1_convolution_takes_the_residual_of_a_3x3(mode: str) -> None:
    conv = Conv3x3(3, 4, activation="none" if mode == "attention" else "gelu").double()
    with torch.no_grad():
        mask = torch.zeros(3, 3)
        mask[1, 1] = 1
        conv.weight.mul_(mask)
    x, residual = image(), torch.randn(2, 4, 16, 17, dtype=torch.float64)
    pruned = prune_kernels(nn.ModuleDict({"a": conv}), ["a"])["a"]
    assert close(pruned(x, residual, mode), conv(x, residual, mode))
    with pytest.raises(ValueError, match="residual_mode: expected one of pre, post, attention, got 'after'"):
        pruned(x, residual, "after")
    pruned.activation = "gelu"
    with pytest.raises(ValueError, match='activation: residual_mode "attention" allows only "none", got \'gelu\''):
        pruned(x, residual, "attention")


@torch.no_grad()
def test_centre_share() -> None:
    model = Small().double().eval()
    model.block.c2_r.weight[:, :, 0] = 0
    model.block.c2_r.weight[:, :, 2] = 0
    model.block.c2_r.weight[:, :, 1, ::2] = 0
    shares = centre_share(model)
    assert set(shares) == {"conv_1", "block.c1_r", "block.c2_r", "block.c3_r", "conv_2.eval_conv", "upsampler.0"} | {
        "block.esa.conv3"
    }
    assert next(iter(shares)) == "block.c2_r"
    assert shares["block.c2_r"] == 1
    weight = model.conv_1.weight.abs()
    assert shares["conv_1"] == pytest.approx(float(weight[:, :, 1, 1].sum() / weight.sum()))
    assert list(shares.values()) == sorted(shares.values(), reverse=True)

    x = image()
    measured = centre_share(model, x)
    w = model.conv_1.weight
    centre = nn.functional.conv2d(x, w[:, :, 1:2, 1:2])
    rest = nn.functional.conv2d(x, w, padding=1) - centre
    c, r = centre.square().sum(), rest.square().sum()
    assert measured["conv_1"] == pytest.approx(float(c / (c + r)))
    assert measured["block.c2_r"] == pytest.approx(1)
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_pruned_biases() -> None:
    model = Small().double()
    zero = copy.deepcopy(model)
    names = ["conv_1", "block.c1_r", "conv_2", "upsampler.0"]
    for name in ("conv_1", "block.c1_r", "conv_2.eval_conv", "upsampler.0"):
        zero.get_submodule(name).bias.zero_()  # type: ignore[operator, union-attr]
    pruned = prune_biases(model, [*names, "conv_1"])
    x = image()
    assert close(pruned(x), zero(x))
    assert len(pruned.state_dict()) == len(model.state_dict()) - 4
    assert model.conv_1.bias is not None


# --- channels -----------------------------------------------------------------------------------------------------


def zero_channels(model: nn.Module, gone: list[int], outputs: list[str]) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name in outputs:
            conv: Any = model.get_submodule(name)
            conv = getattr(conv, "eval_conv", conv)
            conv.weight[gone] = 0
            conv.bias[gone] = 0
    return model


def test_pruned_channels_of_the_whole_width() -> None:
    model = Small().double()
    pruned = prune_channels(model, [0, 1, 3, 5], **WIDTH)
    x = image()
    assert close(pruned(x), zero_channels(model, [2, 4], WIDTH["outputs"])(x))
    assert {k: v.shape for k, v in pruned.state_dict().items()} == {
        k: v.shape for k, v in Small(4).state_dict().items()
    }
    conv: Any = pruned.block.c1_r
    assert (conv.in_channels, conv.out_channels) == (4, 8)
    pruned(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())


def test_iterative_pruning_inside_a_block() -> None:
    model = Small().double()
    group = {"outputs": ["block.c1_r"], "inputs": ["block.c2_r"]}
    with torch.no_grad():
        model.block.c1_r.weight[[1, 6]] *= 1e-12
        model.block.c1_r.bias[[1, 6]] = 0
    pruned = model
    for _ in range(2):
        scores = channel_scores(pruned, **group)
        keep = scores.argsort()[1:].tolist()
        pruned = prune_channels(pruned, keep, **group)
    assert pruned.block.c1_r.out_channels == pruned.block.c2_r.in_channels == 6
    assert close(pruned(image_ := image()), model(image_), 1e-10)
    made = model.block.c1_r.weight.flatten(1).norm(dim=1)
    read = model.block.c2_r.weight.transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(channel_scores(model, **group), made * read)
    assert torch.allclose(channel_scores(model, ["block.c1_r"]), made)


@torch.no_grad()
def test_channels_through_depthwise_normalisation_and_concatenation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 1)
            self.dw, self.norm = DepthwiseConv(4, 3), nn.BatchNorm2d(4)
            self.cat = Conv1x1(5 + 4 + 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.cat([self.b(x), a, self.norm(self.dw(a))])

    model = Net().double().eval()
    model.norm.running_mean.uniform_()
    model.norm.bias.uniform_()
    pruned = prune_channels(model, (i for i in (3, 0)), ["a"], [("cat", 5), ("cat", 9)], ["dw", "norm"])
    x = image()
    a = model.a(x)
    kept = [0, 3]
    d = model.norm(model.dw(a))
    w = model.cat.weight[:, [*range(5), 5, 8, 9, 12]]
    expected = nn.functional.conv2d(torch.cat([model.b(x), a[:, kept], d[:, kept]], 1), w, model.cat.bias)
    assert close(pruned(x), expected)
    assert (pruned.dw.groups, pruned.norm.num_features, pruned.cat.in_channels) == (2, 2, 9)
    layer = prune_channels(nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "n": LayerNorm2d(4)}), [1, 2], ["a"], [], ["n"])
    assert layer["n"].weight.shape == (2,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: prune_kernels({}, []), TypeError, r"model: expected a torch\.nn\.Module, got dict"),
        (lambda m: prune_kernels(m, "conv_1"), TypeError, "names: expected several names, got 'conv_1'"),
        (lambda m: prune_kernels(m, ["conv_3"]), ValueError, "'conv_3': Small has no such module"),
        (lambda m: prune_kernels(m, ["block"]), TypeError, "'block': expected a convolution, got RLFB"),
        (lambda m: prune_kernels(m, ["block.c5"]), ValueError, "'block.c5': expected a 3x3 convolution of stride 1"),
        (lambda m: prune_kernels(m, ["block.esa.conv2"]), ValueError, "'block.esa.conv2': expected a 3x3"),
        (lambda m: prune_kernels(SPAB(4, deploy=True), ["c1_r"]), ValueError, "SPAB runs its three 3x3"),
        (lambda m: prune_kernels(SPAB(4), ["c1_r"]), ValueError, "'c1_r': in training form, deploy the network first"),
        (lambda m: prune_biases(nn.Sequential(RBSB(3, 3, deploy=True)), ["0"]), TypeError, "convolution, got RBSB"),
        (lambda m: prune_channels(m, [0], ["conv_1", "block.c1_r"], []), ValueError, "equally many output channels"),
        (
            lambda m: prune_channels(m, [], ["conv_1"], []),
            ValueError,
            r"keep: expected at least one .* 0 to 5, got \[\]",
        ),
        (lambda m: prune_channels(m, [6], ["conv_1"], []), ValueError, r"index of 0 to 5, got \[6\]"),
        (lambda m: prune_channels(m, [0], ["conv_1"], ["block.c2_r"]), ValueError, "'block.c2_r' reads 8 channels"),
        (lambda m: prune_channels(m, [0], ["conv_1"], [("block.c2_r", 3)]), ValueError, "not 6 of the group from 3 on"),
        (lambda m: prune_channels(m, [0], ["conv_1"], [], ["block.c5"]), ValueError, "between: 'block.c5'"),
        (
            lambda m: channel_scores(nn.ModuleDict({"d": DepthwiseConv(4, 3)}), ["d"]),
            ValueError,
            "belongs into `between`",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(Small())


# --- batch normalisation ------------------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    """Statistics and scales as after training."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.running_mean, m.running_var, m.weight, m.bias):
                    if t is not None:
                        t.uniform_(0.2, 2)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_block_with_batch_normalisation(bias: bool) -> None:
    block = shaken(RLFB(6, 8, esa_channels=4, bias=bias, batch_norm=True)).double()
    x = torch.randn(3, 6, 16, 15, dtype=torch.float64)
    reference = copy.deepcopy(block)

    def plain(x: Tensor) -> Tensor:
        r = reference
        y = nn.functional.leaky_relu(r.bn1(nn.functional.conv2d(x, r.c1_r.weight, r.c1_r.bias, padding=1)), 0.05)
        return r.esa(r.c5(r.c3_r(r.c2_r(y), residual=x)))

    assert close(block(x), plain(x))  # with the batch's statistics
    block.eval(), reference.eval()
    reference.bn1.load_state_dict(block.bn1.state_dict())
    expected = plain(x)
    assert close(block(x), expected)
    assert deploy(block).state_dict().keys() == block.state_dict().keys()  # as published
    folded = fuse_batch_norms(block)
    assert close(folded(x), expected)
    assert folded.bn1 is None
    assert block.bn1 is not None
    assert "bn1" not in str(list(folded.state_dict()))

    state = block.state_dict()
    seed = torch.randn_like(expected)
    leaves = [p for p in block.parameters() if p.requires_grad]
    for _ in range(2):  # the second time from kept weights
        for a, b in zip(
            torch.autograd.grad(block(x), leaves, seed),
            torch.autograd.grad(plain(x), [p for p in reference.parameters() if p.requires_grad], seed),
            strict=True,
        ):
            assert close(a, b)
    with torch.no_grad():
        before = block(x)
        block.bn1.running_mean += 1
        assert not torch.allclose(block(x), before)
        block.bn1.running_mean -= 1
    again = RLFB(6, 8, esa_channels=4, batch_norm=True).double().eval()
    if bias:
        plain_block = RLFB(6, 8, esa_channels=4).double()
        plain_block.load_state_dict(state)
        assert close(plain_block(x), expected)
        again.load_state_dict(state)
        assert close(again(x), expected)
        state["bn1.bias"] = torch.zeros(5)
        with pytest.raises(RuntimeError, match="bn1: expected 8 channels, as c1_r gives"):
            plain_block.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
def test_batch_normalisations_in_sequence(options: dict[str, Any]) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4, **options),
        nn.Sequential(Conv3x3(4, 4), nn.BatchNorm2d(4, **options), nn.ReLU()),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="reflect"),
        nn.BatchNorm2d(4, **options),
        nn.BatchNorm2d(4, **options),
        Conv3x3(4, 4, activation="relu"),
        nn.BatchNorm2d(4, **options),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    model = shaken(model).double().eval()
    folded = fuse_batch_norms(model)
    kinds = [type(m).__name__ for m in folded.modules() if isinstance(m, nn.BatchNorm2d | nn.Identity)]
    assert kinds == ["Identity", "Identity", "Identity", "BatchNorm2d", "BatchNorm2d", "BatchNorm2d"]
    x = image()
    assert close(folded(x), model(x))
    assert len([m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]) == 6


def test_batch_normalisations_by_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    model = shaken(Net()).eval()
    x = image().float()
    assert close(fuse_batch_norms(model, [("conv", "norm")])(x), model(x), 1e-5)
    half = fuse_batch_norms(copy.deepcopy(model).bfloat16(), [("conv", "norm")])
    assert half.conv.bias.dtype == torch.bfloat16
    assert isinstance(fuse_batch_norms(model).norm, nn.BatchNorm2d)
    with pytest.raises(TypeError, match="expected Conv2d and BatchNorm2d, got BatchNorm2d and Conv2d"):
        fuse_batch_norms(model, [("norm", "conv")])
    with pytest.raises(ValueError, match="'bn': Net has no such module"):
        fuse_batch_norms(model, [("conv", "bn")])
    model.norm = nn.BatchNorm2d(5)
    with pytest.raises(ValueError, match="'conv', 'norm': norm: expected 4 channels, got 5"):
        fuse_batch_norms(model, [("conv", "norm")])
    model.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="norm: keeps no running statistics"):
        fuse_batch_norms(model, [("conv", "norm")])
    model.conv = Conv3x3(3, 4, activation="relu")
    with pytest.raises(ValueError, match="'conv' has an activation before 'norm'"):
        fuse_batch_norms(model, [("conv", "norm")])


def test_a_convolution_used_twice_keeps_its_normalisation() -> None:
    conv = nn.Conv2d(4, 4, 1)
    model = shaken(nn.Sequential(conv, nn.BatchNorm2d(4), conv)).eval()
    assert isinstance(fuse_batch_norms(model)[1], nn.BatchNorm2d)


@torch.no_grad()
def test_pruning_follows_deploying() -> None:
    model = nn.Sequential(ECB(3, 4, activation="gelu"), ECB(4, 3)).double()
    folded = deploy(model)
    x = image()
    pruned = prune_channels(folded, [0, 2, 3], ["0"], ["1"])
    conv = folded[0].conv_infer
    conv.weight[1] = 0
    conv.bias[1] = 0
    assert close(pruned(x), folded(x))
