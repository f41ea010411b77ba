"""optimize on channels that are grouped, repeated, shuffled, concatenated or moved last, and on clamped images."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import largest_error
from test_optimize_networks import Net, channelwise, check, conv, layers_of, ops_of, plans_of, tail
from torch import nn
from torch.nn import functional as F

from esr_kernels.optimize import optimize


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- groups


def beside_the_body(m, x):
    """The image made wide by a grouped convolution, beside what the body makes of it: the tails of 2025 and 2026."""
    y = F.silu(m.body(x))
    return F.pixel_shuffle(m.tail(m.mix(torch.cat([m.near(x), y], 1))), 2)


def near(center):
    layer = nn.Conv2d(3, 12, 3, padding=1, groups=3, bias=False)
    if center:
        with torch.no_grad():
            layer.weight.zero_()[:, :, 1, 1] = torch.rand(12, 1)
    return layer


@pytest.mark.parametrize(
    ("center", "expected"),
    [
        (False, ["conv3x3 silu", "conv3x3", "conv1x1", "conv3x3_pixel_shuffle"]),
        (True, ["conv3x3 silu", "conv1x1", "conv3x3_pixel_shuffle"]),
    ],
    ids=["trained", "nearest"],
)
def test_a_grouped_convolution_of_the_image(center, expected):
    network = Net(beside_the_body, body=conv(3, 16), near=near(center), mix=conv(28, 16, 1), tail=conv(16, 12))
    fast = check(network)
    assert ops_of(fast) == expected and fast.plan is not None


def test_groups_as_convolutions_of_slices():
    """CARN-M's blocks: the second reads the first's parts as they are, the 1x1 all of them as a list."""
    body = nn.Sequential(conv(72, 72, groups=4), nn.ReLU(True), conv(72, 72, groups=4), nn.ReLU(True), conv(72, 72, 1))
    fast = check(
        Net(lambda m, x: m.tail(F.relu(m.body(y := m.head(x)) + y)), head=conv(3, 72), body=body, tail=tail(2, 72))
    )
    assert ops_of(fast) == ["conv3x3", *["slice", "conv3x3 relu"] * 4, *["conv3x3 relu"] * 4, "conv1x1 relu pre", TAIL]
    assert fast.plan is not None


TAIL = "conv3x3_pixel_shuffle"


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (conv(12, 24, groups=12), ["bsconv gelu", "conv1x1"]),
        (conv(12, 24, 5, groups=12), ["conv1x1", "depthwise_conv gelu", "conv1x1"]),
        (conv(12, 24, groups=6), ["conv3x3 gelu", "conv1x1"]),
        (conv(12, 24, 1, groups=3), ["conv1x1 gelu", "conv1x1"]),
    ],
    ids=["depthwise twice", "5x5", "two channels each", "1x1"],
)
def test_other_groups(layer, expected):
    network = Net(lambda m, x: m.tail(m.p(F.gelu(m.g(F.relu(m.head(x)))))), head=conv(3, 12), g=layer, tail=tail(2))
    network.p = conv(24, 12, 1)
    fast = check(network)
    assert ops_of(fast) == ["conv3x3 relu", *expected, TAIL] and fast.plan is not None


@pytest.mark.parametrize(
    "layer",
    [conv(12, 24, 9, groups=12), conv(12, 12, 5, groups=3), conv(12, 12, groups=3, stride=2), conv(90, 90, groups=18)],
    ids=["9x9", "dense 5x5", "stride", "many"],
)
def test_groups_that_stay_plain(layer):
    fast = check(
        Net(
            lambda m, x: m.tail(m.g(m.head(x))),
            head=conv(3, layer.in_channels),
            g=layer,
            tail=conv(layer.out_channels, 3),
        )
    )
    assert ops_of(fast) == ["conv3x3", "conv3x3"]
    assert f"{layer.groups} groups" in str(fast.report())


def test_kernels_with_a_middle_alone():
    """ELAN's shift of the channels that are not shifted, and a 3x3 layer that is a 1x1 one."""
    depthwise, dense = conv(12, 12, groups=12, bias=False), conv(12, 12)
    with torch.no_grad():
        for layer in (depthwise, dense):
            middle = layer.weight[:, :, 1, 1].clone()
            layer.weight.zero_()[:, :, 1, 1] = middle
    network = Net(lambda m, x: m.tail(m.b(F.relu(m.a(F.silu(m.head(x)))))), head=conv(3, 12), a=depthwise, b=dense)
    network.tail = tail(2)
    # The factors go into ... nothing: an activation is before and after them.
    assert ops_of(check(network)) == ["conv3x3 silu", "normalize", "activate relu", "conv1x1", TAIL]


@pytest.mark.parametrize("act", [nn.ReLU(True), nn.LeakyReLU(0.1), nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
def test_an_activation_before_a_pixel_shuffle(act):
    """CARN-M's enlargement: the image's shuffle in the convolution, the activation behind it."""
    network = Net(lambda m, x: m.c(F.pixel_shuffle(m.act(m.b(m.a(x))), 2)), a=conv(3, 12), b=conv(12, 48, groups=4))
    network.c, network.act = conv(12, 3), act
    fast = check(network)
    assert ops_of(fast)[:2] == ["conv3x3", TAIL] and ops_of(fast)[-1] == "conv3x3"
    assert fast.report().left == []


# --- selections

SHUFFLES = {
    "views": lambda x: x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "permuted": lambda x: x.reshape(x.shape[0], 4, 3, *x.shape[2:]).permute(0, 2, 1, 3, 4).flatten(1, 2),
    "module": nn.ChannelShuffle(3),
    "index": lambda x: x[:, torch.tensor([5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6])],
    "flipped": lambda x: torch.flip(x, [1]),
    "halves swapped": lambda x: torch.cat([x[:, 6:], x[:, :6]], 1),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_channel_shuffles(name):
    """Between an activation and a convolution: part of the convolution."""
    shuffle = SHUFFLES[name]
    network = Net(lambda m, x: m.tail(m.c(shuffle(F.relu(m.head(x))))), head=conv(3, 12), c=conv(12, 12), tail=tail(2))
    fast = check(network)
    assert ops_of(fast) == ["conv3x3 relu", "conv3x3", TAIL] or name == "halves swapped"
    assert fast.plan is not None


def test_a_shuffle_of_halves_that_went_different_ways():
    """ShuffleMixer's: one layer with the second 1x1 of the half that was mixed."""

    def mix(m, x):
        a, b = (y := m.head(x)).chunk(2, 1)
        return m.tail(m.dw(SHUFFLES["views"](torch.cat([m.two(F.silu(m.one(a))), b], 1))) + y)

    network = Net(
        mix, head=conv(3, 12), one=conv(6, 6, 1), two=conv(6, 6, 1), dw=conv(12, 12, 5, groups=12), tail=tail(2)
    )
    fast = check(network)
    assert fast.plan is not None
    assert [op for op in ops_of(fast) if op != "slice"] == [
        "conv3x3",
        "conv1x1 silu",
        "conv1x1",
        "depthwise_conv",
        "add",
        TAIL,
    ]


NO_SHUFFLES = {
    "rows": lambda x: torch.flip(x, [2]),
    "pixels": lambda x: x.reshape(x.shape[0], x.shape[1], -1).flip(2).reshape(x.shape),
    "images": lambda x: torch.flip(x, [0]),
    "turned": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3).flip(3),
}


@pytest.mark.parametrize("name", NO_SHUFFLES)
def test_what_only_looks_like_a_channel_shuffle(name):
    move = NO_SHUFFLES[name]
    fast = check(Net(lambda m, x: m.tail(m.c(move(F.relu(m.head(x))))), head=conv(3, 12), c=conv(12, 12), tail=tail(2)))
    assert fast.plan is None and "flip" in str(fast.report())


REPEATS = {
    "repeat_interleave": lambda x: torch.repeat_interleave(x, 9, dim=1),
    "tensor method": lambda x: x.repeat_interleave(repeats=9, dim=1),
    "parts": lambda x: torch.cat([x[:, i : i + 1].repeat(1, 9, 1, 1) for i in range(3)], 1),
    "stacked": lambda x: torch.stack([x] * 9, 2).flatten(1, 2),
    "expanded": lambda x: x.unsqueeze(2).expand(-1, -1, 9, -1, -1).reshape(x.shape[0], 27, *x.shape[2:]),
}


@pytest.mark.parametrize("name", REPEATS)
def test_the_image_repeated_for_the_pixels_it_becomes(name):
    """ABPN's and PLKSR's: what nearest neighbours give, so that the tail adds them."""
    repeat = REPEATS[name]
    network = Net(lambda m, x: F.pixel_shuffle(m.b(F.relu(m.a(x))) + repeat(x), 3), a=conv(3, 12), b=conv(12, 27))
    fast = check(network)
    assert ops_of(fast) == ["conv3x3 relu", "resize", f"{TAIL} post"] and fast.plan is not None
    alone = check(Net(lambda m, x: m.b(F.pixel_shuffle(repeat(m.a(x)), 3)), a=conv(3, 3), b=conv(3, 3)))
    assert ops_of(alone) == ["conv3x3", "resize", "conv3x3"] and alone.plan is not None


# --- concatenations


def depthwise_of_a_concatenation(m, x):
    y = F.relu(m.head(x))
    return F.pixel_shuffle(m.p(m.dw(torch.cat([m.near(x), y], 1))), 2)


def gate_of_a_concatenation(m, x):
    """MoSR's: a part of the channels convolved, all of them gated."""
    g, i, c = torch.split(m.up(y := m.head(x)), [16, 8, 8], dim=1)
    return m.tail(m.down(F.mish(g) * torch.cat((i, m.c(c)), dim=1)) + y)


def spellings(m, x):
    """Parts by `narrow`, sums by `lerp` and `addcmul`."""
    y = m.head(x)
    y = torch.lerp(y, F.relu(m.c(y)), 0.25)
    y = torch.cat([y.narrow(1, 0, 5), F.silu(y.narrow(1, 5, 7))], 1)
    return m.tail(torch.addcmul(y, m.s, F.relu(m.c(y))))


def activation_of_a_concatenation(m, x):
    y = torch.cat([m.a(x), m.b(x)], 1)
    return m.tail(F.prelu(torch.clamp(m.s * y, -1, 1), m.w))


def test_a_depthwise_convolution_of_a_concatenation():
    network = Net(depthwise_of_a_concatenation, head=conv(3, 16), near=near(False), dw=conv(28, 28, groups=28))
    network.p = conv(28, 12, 1)
    fast = check(network)
    assert [op for op in ops_of(fast) if op != "conv3x3"] == [
        "conv3x3 relu",
        "depthwise_conv",
        "depthwise_conv",
        "conv1x1",
    ]
    assert fast.report().share == 1.0 and len(plans_of(fast)) == 1


def test_a_gate_of_a_concatenation():
    network = Net(gate_of_a_concatenation, head=conv(3, 12), up=conv(12, 32, 1), c=conv(8, 8), down=conv(16, 12, 1))
    network.tail = tail(2)
    fast = check(network)
    assert fast.plan is not None and ops_of(fast).count("multiply") == 2 and ops_of(fast)[-2] == "conv1x1 post"


def test_an_activation_of_a_concatenation():
    network = Net(activation_of_a_concatenation, a=conv(3, 8), b=conv(3, 4), tail=tail(2))
    network.w, network.s = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12, 1, 1))
    assert check(network).plan is not None


def test_other_spellings_of_parts_and_sums():
    network = Net(spellings, head=conv(3, 12), c=conv(12, 12), tail=tail(2))
    network.s = nn.Parameter(torch.rand(12, 1, 1))
    assert check(network).plan is not None


def test_a_concatenation_that_is_read_twice_is_left():
    def run(m, x):
        y = torch.cat([m.a(x), torch.cumsum(m.b(x), 3)], 1)
        return m.tail(F.relu(y)) + torch.cumsum(m.tail(y), 2)

    fast = check(Net(run, a=conv(3, 8), b=conv(3, 4), tail=conv(12, 5)))
    assert "aten.cumsum" in str(fast.report())


def test_1x1_convolutions_among_the_parts():
    """Distilled parts without an activation go into the 1x1 that reads them all."""
    network = Net(
        lambda m, x: m.tail(m.mix(torch.cat([m.a(y := F.relu(m.head(x))), m.b(z := F.silu(m.c(y))), z], 1))),
        head=conv(3, 12), a=conv(12, 12, 1), b=conv(12, 12, 1, bias=False), c=conv(12, 12), mix=conv(36, 12, 1),
    )  # fmt: skip
    network.tail = tail(2)
    assert ops_of(check(network)) == ["conv3x3 relu", "conv3x3 silu", "conv1x1", TAIL]


# --- channels moved last


def flattened(function):
    return lambda m, x: function(m, x.flatten(2).transpose(1, 2)).transpose(1, 2).view(x.shape)


def rearranged(function):
    """As einops writes 'b c h w -> b (h w) c'."""

    def run(m, x):
        n, c, h, w = x.shape
        y = function(m, x.permute(0, 2, 3, 1).reshape(n, h * w, c))
        return y.reshape(n, h, w, -1).permute(0, 3, 1, 2)

    return run


def last(function):
    return lambda m, x: function(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def restormer_norm(m, y):
    mean, variance = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
    return (y - mean) / torch.sqrt(variance + 1e-5) * m.w + m.b


def linear_layers(m, y):
    a, b = m.up(m.norm(y)).chunk(2, dim=-1)
    return y + m.down(torch.cat([F.gelu(a), b * m.w], dim=-1))


@pytest.mark.parametrize("move", [flattened, rearranged, last])
def test_normalization_with_channels_last(move):
    network = Net(lambda m, x: m.tail(m.c(F.gelu(m.f(m, m.head(x))))), head=conv(3, 12), c=conv(12, 12), tail=tail(2))
    network.f, network.w, network.b = move(restormer_norm), nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))
    fast = check(network)
    assert channelwise(fast) == ["layer_norm2d: 12 channels"] and fast.plan is not None


@pytest.mark.parametrize("move", [flattened, rearranged, last])
def test_linear_layers_with_channels_last(move):
    network = Net(lambda m, x: m.tail(m.f(m, F.relu(m.head(x)))), head=conv(3, 12), tail=tail(2))
    network.f, network.w, network.norm = move(linear_layers), nn.Parameter(torch.rand(8)), nn.LayerNorm(12)
    network.up, network.down = nn.Linear(12, 16), nn.Linear(16, 12)
    fast = check(network)
    assert fast.plan is not None and channelwise(fast) == ["layer_norm2d: 12 channels"]
    assert ops_of(fast)[-2:] == ["conv1x1 post", TAIL]


def test_pixels_in_another_order_stay():
    """Columns one after the other: a sum along them is not what it is along rows."""

    def run(m, x):
        y = m.p(m.head(x).permute(0, 3, 2, 1).flatten(1, 2)).cumsum(1)
        return m.tail(y.transpose(1, 2).reshape(x.shape[0], 12, *x.shape[2:]))

    fast = check(Net(run, head=conv(3, 12), p=nn.Linear(12, 12), tail=tail(2)))
    assert "aten.linear" in str(fast.report())


def test_a_plan_is_not_given_up_for_a_small_map_in_it():
    """A map of another size that is read by the same layers: that one stays outside, the large ones are in the plan."""

    def run(m, x):
        y = m.head(x)
        small = m.low(F.adaptive_avg_pool2d(y, (x.shape[2] // 8, x.shape[3] // 8)))
        large = F.interpolate(F.gelu(small), size=x.shape[2:], mode="nearest")
        return m.tail(m.c(y) + m.p(F.relu(m.c(y)) * large))

    fast = check(Net(run, head=conv(3, 12), low=conv(12, 12, 1), c=conv(12, 12), p=conv(12, 12, 1), tail=tail(2)))
    assert max(len(plan.layers) for plan in plans_of(fast)) >= 3
    assert all(line.startswith(("aten.adaptive_avg_pool2d", "esr.")) for line in fast.report().left)


# --- the end

CLIPS = {
    "clamp": (lambda y: torch.clamp(y, 0.0, 1.0), (0.0, 1.0)),
    "in place": (lambda y: y.clamp_(0, 255), (0.0, 255.0)),
    "hardtanh": (nn.Hardtanh(-0.5, 0.5), (-0.5, 0.5)),
    "one side": (lambda y: y.clamp(max=0.25), (-float("inf"), 0.25)),
    "relu": (F.relu, (0.0, float("inf"))),
    "minimum and maximum": (lambda y: torch.minimum(torch.maximum(y, torch.zeros(1)), torch.ones(1)), (0.0, 1.0)),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clamped_image_is_one_operator(name):
    clip, expected = CLIPS[name]
    network = Net(lambda m, x: clip(m.tail(F.silu(m.head(x)))), head=conv(3, 12), tail=tail(2))
    fast = check(network)
    assert ops_of(fast) == ["conv3x3 silu", TAIL]
    assert fast.plan is not None and fast.clip == expected and fast.report().whole and fast.report().left == []
    assert "clamped" in str(fast.report())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_clamped_image_in_half_types(dtype):
    network = Net(lambda m, x: m.tail(F.silu(m.head(x))).clamp(-0.1, 0.1), head=conv(3, 12), tail=tail(2)).eval()
    fast, x = optimize(network, dtype=dtype), torch.rand(2, 3, 21, 18)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x.double())
        assert largest_error(fast(x), exact) <= 8 * torch.finfo(dtype).eps
    assert fast.plan is not None and fast.clip == (-0.1, 0.1)


def clamped(m, x):
    return F.pixel_shuffle(m.tail(m.head(x)), 2).clamp(0.0, 0.125)


@pytest.mark.parametrize("size", [1, 3])
def test_the_end_is_kept_by_copies_pickles_and_exports(size):
    network = Net(clamped, head=conv(3, 12), tail=conv(12, 12, size)).eval()
    fast, x = optimize(network), torch.rand(1, 3, 17, 19)
    expected = fast(x)
    assert float(expected.min()) == 0 and float(expected.max()) == 0.125
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    buffer = io.BytesIO(pickle.dumps(fast))
    assert torch.equal(pickle.load(buffer)(x), expected)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(fast, (torch.rand(2, 3, 20, 21),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    assert torch.equal(program.module()(x), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")(x), expected)
    torch._dynamo.reset()


def narrow(m, x):
    return (F.pixel_shuffle(m.p(F.relu(m.head(x - 0.5))), 2) + 0.5) * m.s


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_a_1x1_convolution_before_the_pixel_shuffle(clip):
    """As SPAN's 2026 successor ends; the mean that is added behind it is part of the convolution."""
    network = Net(lambda m, x: narrow(m, x) if clip is None else narrow(m, x).clamp(*clip), head=conv(3, 12))
    network.p = conv(12, 12, 1)
    network.s = nn.Parameter(torch.rand(1, 3, 1, 1))
    fast = check(network)
    assert ops_of(fast) == ["normalize", "conv3x3 relu", "conv1x1"]
    assert fast.plan is not None and (fast.shuffle, fast.clip) == (2, clip) and fast.report().whole
    assert "pixel shuffle by 2" in str(fast.report())


def test_ends_that_are_no_clamp():
    """Bounds that differ between channels, and an image that something else reads too."""
    bounds = Net(lambda m, x: torch.minimum(m.tail(m.head(x)), m.w), head=conv(3, 12), tail=tail(2))
    bounds.w = nn.Parameter(torch.rand(3, 1, 1))
    twice = Net(lambda m, x: (y := m.tail(m.head(x))).clamp(0, 1) + y.flip(3), head=conv(3, 12), tail=tail(2))
    for network in (bounds, twice):
        fast = check(network)
        assert fast.plan is None and fast.clip is None and [layer.op for layer in layers_of(fast)] == ["conv3x3", TAIL]


# --- weights that are computed


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalise", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_hooks_compute(normalise):
    """The weight that is no parameter cannot be copied as such."""
    network = Net(lambda m, x: m.tail(F.relu(m.head(x))), head=normalise(conv(3, 12)), tail=tail(2)).eval()
    x = torch.rand(1, 3, 17, 20)
    expected = network(x).detach()
    fast = optimize(network)
    assert ops_of(fast) == ["conv3x3 relu", TAIL] and fast.plan is not None
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5)


class FoldedByEval(nn.Module):
    """A convolution whose weight `eval` computes from two, as RepVGG's kin in the frameworks do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.both = conv(3, 12, bias=False), conv(3, 12, bias=False), conv(3, 12, bias=False)

    def train(self, mode=True):
        super().train(mode)
        if not mode:
            self.both.weight = nn.Parameter((self.a.weight + self.b.weight).detach())
        return self

    def forward(self, x):
        return self.a(x) + self.b(x) if self.training else self.both(x)


@pytest.mark.parametrize("changed", [False, True])
def test_a_network_that_eval_folds_is_not_folded_again(changed):
    network, x = nn.Sequential(FoldedByEval(), nn.ReLU(), tail(2)).eval(), torch.rand(1, 3, 17, 20)
    if changed:  # after it was folded: the network runs with what it has
        nn.init.zeros_(network[0].a.weight)
    torch.testing.assert_close(optimize(network)(x), network(x).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(optimize(network.train())(x), network.eval()(x).detach(), rtol=0, atol=1e-5)


# --- images that a network takes


def test_a_network_of_one_image_at_a_time():
    """As local statistics at test time have it, whose code asserts that."""

    def run(m, x):
        b, _c, _h, _w = x.shape
        assert b == 1
        return m.tail(F.silu(m.head(x)))

    fast = check(Net(run, head=conv(3, 12), tail=tail(2)), [(1, 3, 20, 22), (1, 3, 19, 27)])
    assert ops_of(fast) == ["conv3x3 silu", TAIL]
    with pytest.raises(AssertionError):
        fast(torch.rand(2, 3, 20, 22))
