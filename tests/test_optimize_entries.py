"""optimize on small networks in the styles of challenge entries and of the frameworks that users have theirs from."""

from __future__ import annotations

import pytest
import torch
from test_optimize_networks import Net, batch_norm, check, conv, ops_of
from torch import nn
from torch.nn import functional as F

from esr_kernels import functional
from esr_kernels.optimize import optimize


class Body(nn.Module):
    """Head, a body with a skip around it, and a pixel-shuffle tail with a resized input added."""

    def __init__(self, *body, channels=16, scale=2, skip="bilinear"):
        super().__init__()
        self.head, self.body = conv(3, channels), nn.Sequential(*body)
        self.tail = nn.Sequential(conv(channels, 3 * scale**2), nn.PixelShuffle(scale))
        self.options = {"scale_factor": scale, "mode": skip}

    def forward(self, x):
        y = self.head(x)
        return self.tail(self.body(y) + y) + F.interpolate(x, **self.options)


class RepVgg(nn.Module):
    """Three branches with batch normalisation, one of them without a convolution."""

    def __init__(self, c):
        super().__init__()
        self.dense = nn.Sequential(conv(c, c, bias=False), batch_norm(c))
        self.point = nn.Sequential(conv(c, c, 1, bias=False), batch_norm(c))
        self.identity = batch_norm(c)

    def forward(self, x):
        return F.relu(self.dense(x) + self.point(x) + self.identity(x), inplace=True)


def partial_convolution(m, x):
    a, b = torch.split(x, [4, x.shape[1] - 4], dim=1)
    return x + m.mlp(torch.cat((m.c(a), b), 1))


def partial_in_place(m, x):
    y = x.clone()
    y[:, :4] = m.c(y[:, :4])
    return x + m.mlp(y)


def channel_shuffle(m, x):
    a, b = x.chunk(2, 1)
    y = torch.cat([a, F.relu(m.c(b))], 1)
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def recursion(m, x):
    y = x
    for _ in range(3):
        y = y + 0.1 * m.b(m.act(m.a(y)))
    return y


def activation_of_a_view(m, x):
    y = m.a(x)
    F.leaky_relu_(y[:, : y.shape[1] // 2], 0.1)
    return m.b(y)


def distillation(m, x):
    """Splits what every convolution computes, as IMDN does; a gate from the mean of the image at the end."""
    first, rest = torch.split(F.leaky_relu(m.a(x), 0.05, inplace=True), (4, 12), dim=1)
    second, rest = torch.split(F.leaky_relu(m.b(rest), 0.05, inplace=True), (4, 12), dim=1)
    y = m.mix(torch.cat([first, second, m.c(rest)], dim=1))
    return y * torch.sigmoid(m.gate(F.adaptive_avg_pool2d(y, 1))) + x


def imdn(m, x):
    """IMDN's block as published: distillation in four steps, then attention from the contrast of every channel."""
    parts, rest = [], x
    for step in (m.a, m.b, m.c):
        part, rest = torch.split(F.leaky_relu(step(rest), 0.05), (4, 12), dim=1)
        parts.append(part)
    return m.mix(m.cca(torch.cat([*parts, m.d(rest)], dim=1))) + x


def spatial_mean(x):
    return x.sum(3, keepdim=True).sum(2, keepdim=True) / (x.size(2) * x.size(3))


class PublishedCca(nn.Module):
    def __init__(self, channels, reduction):
        super().__init__()
        hidden = channels // reduction
        self.conv_du = nn.Sequential(conv(channels, hidden, 1), nn.ReLU(True), conv(hidden, channels, 1), nn.Sigmoid())

    def forward(self, x):
        mean = spatial_mean(x)
        variance = (x - mean).pow(2).sum(3, keepdim=True).sum(2, keepdim=True) / (x.size(2) * x.size(3))
        return x * self.conv_du(variance.pow(0.5) + mean)


class SqueezeExcitation(nn.Module):
    """Hu et al., as published for classification: linear layers on numbers."""

    def __init__(self, channels, reduction, bias=False):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        hidden = channels // reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias), nn.ReLU(True), nn.Linear(hidden, channels, bias), nn.Sigmoid()
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class EfficientAttention(nn.Module):
    """Wang et al.: a convolution along the channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


def convnext(m, x):
    y = m.dw(x).permute(0, 2, 3, 1)
    y = m.gamma * m.down(F.gelu(m.up(m.norm(y))))
    return x + y.permute(0, 3, 1, 2)


def padded_before(m, x):
    return x + m.b(F.pad(F.silu(m.a(F.pad(x, (1, 1, 1, 1)))), (1, 1, 1, 1)))


def gated(variant):
    """Attention with a learned gate, (x + f) (W f + b)."""

    def run(m, x):
        f = m.b(F.silu(m.a(x)))
        if variant == "expanded":
            return f * m.w(f) + x * m.w(f)
        if variant == "by hand":
            return (x + f) * (F.conv2d(f, m.w.weight) + m.w.bias.view(1, -1, 1, 1))
        return (x + f) * (torch.sigmoid(m.w(f)) if variant == "sigmoid" else m.w(f))

    return run


def pixel_attention(m, x):
    return m.b(m.a(x) * torch.sigmoid(m.w(x))) + x


def own_dense(m, x):
    y = functional.conv3x3(x, m.a.weight, m.a.bias, activation="silu")
    return torch.add(x, functional.conv3x3(torch.cat([x, y], 1), m.b.weight, m.b.bias), alpha=0.2)


def before_the_activation(m, x):
    return x + m.b(F.relu(m.a(F.relu(m.norm(x)))))


def dense(m, x):
    y = F.leaky_relu(m.a(x), 0.2)
    z = F.leaky_relu(m.b(torch.cat([x, y], 1)), 0.2)
    return x + 0.2 * m.c(torch.cat((x, y, z), 1))


def repeated(m, x):
    return x + m.b(F.relu(m.a(torch.cat([x, x, F.relu(x), x], 1))))


def pair(function, **more):
    return Net(function, a=conv(16, 16), b=conv(16, 16), **more)


ATTENTION = ["conv3x3 silu", "conv3x3"]
# Blocks, what a plan has for them between head and tail (None: not looked at), and what stays plain.
BLOCKS = {
    "RepVGG": (lambda: RepVgg(16), ["conv3x3 relu post"], []),
    "the same map several times": (
        lambda: Net(repeated, a=conv(64, 16), b=conv(16, 16)),
        ["activate relu", "conv3x3", "conv3x3 relu pre", "conv3x3 post"],
        [],
    ),
    "partial convolution": (
        lambda: Net(partial_convolution, c=conv(4, 4), mlp=nn.Sequential(conv(16, 32, 1), nn.GELU(), conv(32, 16, 1))),
        None,
        [],
    ),
    "partial convolution in place": (
        lambda: Net(partial_in_place, c=conv(4, 4), mlp=nn.Sequential(conv(16, 32, 1), nn.GELU(), conv(32, 16, 1))),
        None,
        [],
    ),
    "channel shuffle": (lambda: Net(channel_shuffle, c=conv(8, 8)), None, []),
    "recursion": (lambda: pair(recursion, act=nn.LeakyReLU(0.1, True)), ["conv3x3 leaky_relu", "conv3x3 post"] * 3, []),
    "activation of a view": (lambda: Net(activation_of_a_view, a=conv(16, 16), b=conv(16, 16, 1)), None, []),
    "distillation": (
        lambda: Net(
            distillation,
            **{"a": conv(16, 16), "b": conv(12, 16), "c": conv(12, 8), "mix": conv(16, 16, 1), "gate": conv(16, 16, 1)},
        ),
        None,
        [],
    ),
    "IMDN": (
        lambda: Net(
            imdn,
            **{"a": conv(16, 16), "b": conv(12, 16), "c": conv(12, 16), "d": conv(12, 4), "mix": conv(16, 16, 1)},
            cca=PublishedCca(16, 4),
        ),
        [
            *["conv3x3 leaky_relu"] * 6,
            *["conv3x3", "conv1x1", "statistic", "conv1x1 relu", "conv1x1", "activate sigmoid", "modulate"],
            "conv1x1 post",
        ],
        [],
    ),
    "RCAN": (
        lambda: Net(
            lambda m, x: x + m.body(x) * m.gate(F.adaptive_avg_pool2d(m.body(x), 1)),
            body=nn.Sequential(conv(16, 16), nn.ReLU(True), conv(16, 16)),
            gate=nn.Sequential(conv(16, 4, 1), nn.ReLU(True), conv(4, 16, 1), nn.Sigmoid()),
        ),
        ["conv3x3 relu", "conv3x3", "statistic", "conv1x1 relu", "conv1x1", "activate sigmoid", "modulate"],
        [],
    ),
    "squeeze and excitation": (
        lambda: nn.Sequential(conv(16, 16), SqueezeExcitation(16, 4, True)),
        ["conv3x3", "statistic", "conv1x1 relu", "conv1x1", "activate sigmoid", "modulate"],
        [],
    ),
    "efficient channel attention": (
        lambda: nn.Sequential(conv(16, 16), EfficientAttention()),
        ["conv3x3", "statistic", "conv1x1", "activate sigmoid", "modulate"],
        [],
    ),
    "ConvNeXt": (
        lambda: Net(
            convnext,
            dw=conv(16, 16, 7, groups=16),
            norm=nn.LayerNorm(16, eps=1e-6),
            up=nn.Linear(16, 32),
            down=nn.Linear(32, 16),
            gamma=torch.rand(16),
        ),
        ["depthwise_conv", "layer_norm2d", "conv1x1 gelu", "conv1x1 post"],
        [],
    ),
    "padded before": (
        lambda: Net(padded_before, a=conv(16, 16, padding=0), b=conv(16, 16, padding=0)),
        ["conv3x3 silu", "conv3x3 post"],
        [],
    ),
    "gate": (lambda: pair(gated("plain"), w=conv(16, 16, 1)), [*ATTENTION, "add", "conv1x1", "multiply"], []),
    "gate expanded": (lambda: pair(gated("expanded"), w=conv(16, 16, 1)), None, []),
    "gate by hand": (lambda: pair(gated("by hand"), w=conv(16, 16, 1)), None, []),
    "gate sigmoid": (lambda: pair(gated("sigmoid"), w=conv(16, 16, 1)), None, []),
    "pixel attention": (lambda: pair(pixel_attention, w=conv(16, 16, 1)), None, []),
    "before the activation": (lambda: pair(before_the_activation, norm=batch_norm(16)), None, []),
    "dense": (
        lambda: Net(dense, a=conv(16, 8), b=conv(24, 8), c=conv(32, 16)),
        ["conv3x3 leaky_relu", "conv3x3", "conv3x3 leaky_relu pre", "conv3x3 post", "conv3x3 post", "conv3x3 pre"],
        [],
    ),
    "dense, activated and added": (
        lambda: Net(lambda m, x: x + F.relu(m.b(torch.cat([x, m.a(x)], 1))), a=conv(16, 8), b=conv(24, 16)),
        ["conv3x3", "conv3x3", "conv3x3 relu pre", "add"],
        [],
    ),
    "dense, of this library's convolutions": (
        lambda: Net(own_dense, a=conv(16, 8), b=conv(24, 16)),
        ["conv3x3 silu", "conv3x3 post", "conv3x3 pre"],
        [],
    ),
    "ReLU6 after batch norm": (
        lambda: nn.Sequential(conv(16, 16, bias=False), batch_norm(16), nn.ReLU6(True)),
        ["conv3x3", "activate clamp"],
        [],
    ),
    "PReLU of channels": (
        lambda: nn.Sequential(conv(16, 16), Net(lambda m, x: F.prelu(x, m.w), w=torch.linspace(0.1, 0.4, 16))),
        ["conv3x3", "activate leaky_relu"],
        [],
    ),
    "Mish": (lambda: nn.Sequential(conv(16, 16), nn.Mish()), ["conv3x3", "activate mish"], []),
}


def left(fast):
    return sorted({line.split()[0] for line in fast.report().left})


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name):
    make, expected, plain = BLOCKS[name]
    fast = check(Body(make()), [(1, 3, 12, 13)])
    assert left(fast) == sorted(plain)
    assert fast.report().share > 0.99
    if expected is not None:
        operators = [op for op in ops_of(fast) if op != "add"] if "add" not in expected else ops_of(fast)
        body = operators[1:-1]
        assert body[: len(expected)] == expected


class Anchor(nn.Module):
    """The input repeated for every pixel it becomes, instead of a resized one; clipped."""

    def __init__(self):
        super().__init__()
        self.body, self.tail = nn.Sequential(conv(3, 14), nn.ReLU()), conv(14, 27)

    def forward(self, x):
        y = self.tail(self.body(x)) + torch.cat([x[:, i : i + 1].repeat(1, 9, 1, 1) for i in range(3)], 1)
        return torch.clamp(F.pixel_shuffle(y, 3), 0.0, 1.0)


def two_steps():
    up = [m for _ in range(2) for m in (conv(12, 48), nn.PixelShuffle(2))]
    return nn.Sequential(conv(3, 12), *up, conv(12, 3))


def unshuffled():
    return nn.Sequential(
        nn.PixelUnshuffle(2), conv(12, 16), nn.ReLU(True), conv(16, 48), nn.PixelShuffle(4), nn.Hardtanh(0, 1)
    )


NETWORKS = {
    "upsampled in two steps": (two_steps, ["conv3x3", *["conv3x3_pixel_shuffle"] * 2, "conv3x3"], []),
    "unshuffled": (
        unshuffled,
        ["conv3x3 relu", "conv3x3_pixel_shuffle"],
        ["aten.pixel_unshuffle", "aten.hardtanh"],
    ),
    "anchor": (Anchor, None, None),
    "nearest": (lambda: Body(pair(recursion, act=nn.SiLU()), skip="nearest"), None, []),
    "bicubic": (lambda: Body(pair(recursion, act=nn.SiLU()), skip="bicubic"), None, []),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, expected, plain = NETWORKS[name]
    fast = check(make(), [(1, 3, 12, 14), (2, 3, 10, 16)])
    assert fast.report().share > 0.99
    if expected is not None:
        assert ops_of(fast) == expected
    if plain is not None:
        assert left(fast) == sorted(plain)


# --- networks as spandrel, neosr and traiNNer have them


class Conv3xc(nn.Module):
    """A convolution that folds its branches in `forward`, in evaluation only, as the frameworks' SPAN does."""

    def __init__(self, i, o, gain=2, relu=False):
        super().__init__()
        self.has_relu = relu
        self.sk = nn.Conv2d(i, o, 1)
        self.conv = nn.Sequential(
            nn.Conv2d(i, i * gain, 1), nn.Conv2d(i * gain, o * gain, 3), nn.Conv2d(o * gain, o, 1)
        )
        self.eval_conv = nn.Conv2d(i, o, 3, padding=1)
        self.eval_conv.weight.requires_grad = False
        self.update_params()

    def update_params(self):
        w1, w2, w3 = (c.weight.data.clone().detach() for c in self.conv)
        b1, b2, b3 = (c.bias.data.clone().detach() for c in self.conv)
        w = F.conv2d(w1.flip(2, 3).permute(1, 0, 2, 3), w2, padding=2).flip(2, 3).permute(1, 0, 2, 3)
        b = (w2 * b1.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b2
        weight = F.conv2d(w.flip(2, 3).permute(1, 0, 2, 3), w3).flip(2, 3).permute(1, 0, 2, 3)
        self.eval_conv.weight.data = weight + F.pad(self.sk.weight.data.clone().detach(), [1, 1, 1, 1])
        self.eval_conv.bias.data = (w3 * b.reshape(1, -1, 1, 1)).sum((1, 2, 3)) + b3 + self.sk.bias.data

    def forward(self, x):
        if self.training:
            out = self.conv(F.pad(x, (1, 1, 1, 1), "constant", 0)) + self.sk(x)
        else:
            self.update_params()
            out = self.eval_conv(x)
        return F.leaky_relu(out, negative_slope=0.05) if self.has_relu else out


class Span(nn.Module):
    """The frameworks' SPAN with two blocks: how it has its mean and range differs between them.

    Args:
        style: "published", as in neosr too: the mean is a tensor that is no buffer; "spandrel": it is one. Both convert
            it and write it back in `forward`. "none": no normalisation.
    """

    def __init__(self, style, channels=16, scale=2):
        super().__init__()
        self.img_range = 255.0
        mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
        if style == "published":
            self.mean = mean
        else:
            self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("no_norm", torch.zeros(1) if style == "none" else None)
        self.conv_1, self.conv_cat = Conv3xc(3, channels), nn.Conv2d(channels * 3, channels, 1)
        self.blocks = nn.ModuleList(nn.ModuleList(Conv3xc(channels, channels) for _ in range(3)) for _ in range(2))
        self.act, self.conv_2 = nn.SiLU(inplace=True), Conv3xc(channels, channels)
        self.upsampler = nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    @property
    def is_norm(self):
        return self.no_norm is None

    def block(self, convolutions, x):
        first = convolutions[0](x)
        out = convolutions[2](self.act(convolutions[1](self.act(first.clone()))))
        return (out + x) * (torch.sigmoid(out) - 0.5), first

    def forward(self, x):
        if self.is_norm:
            self.mean = self.mean.type_as(x)
            x = (x - self.mean) * self.img_range
        feature = self.conv_1(x)
        one, _ = self.block(self.blocks[0], feature)
        two, first = self.block(self.blocks[1], one)
        return self.upsampler(self.conv_cat(torch.cat([feature, self.conv_2(two), first], 1)))


class Descriptor:
    """As spandrel wraps a model: no module itself, it has one and calls it."""

    def __init__(self, model, scale):
        self.model, self.scale = model.eval(), scale

    def __call__(self, image):
        with torch.no_grad():
            return self.model(image).clamp_(0, 1)


@pytest.mark.parametrize("style", ["published", "spandrel", "none"])
def test_span_of_the_frameworks(style):
    model = Span(style)
    fast = check(model, [(1, 3, 17, 18)], tolerance=1e-4)
    operators = ops_of(fast)
    block = ["conv3x3", "activate silu", "conv3x3 silu", "conv3x3 attention"]
    assert fast.plan is not None and operators.count("conv3x3 attention") == 2
    assert operators[0] == ("conv3x3" if style == "none" else "normalize")
    assert set(operators) <= {*block, "conv3x3 silu", "normalize", "conv1x1", "conv3x3_pixel_shuffle"}


def test_a_descriptors_model_is_replaced():
    descriptor = Descriptor(Span("spandrel"), 2)
    x = torch.rand(1, 3, 19, 16)
    expected = descriptor(x)
    descriptor.model = optimize(descriptor.model)
    torch.testing.assert_close(descriptor(x), expected, rtol=0, atol=2e-4)


def test_spandrel():
    pytest.importorskip("spandrel")
    from spandrel.architectures.SPAN import SPAN

    model = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2).eval()
    fast = optimize(model)
    assert fast.report().share > 0.99
    x = torch.rand(1, 3, 21, 18)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-3 * float(model(x).abs().max()))
