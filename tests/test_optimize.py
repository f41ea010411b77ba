"""optimize: a network as one operator."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from helpers import LAYOUTS, check_close, kernel, lay_out, rand
from torch import nn

import esr_kernels
from esr_kernels import functional as E
from esr_kernels.optimize import optimize
from esr_kernels.optimize.pooling import convolution, max_pool2d


class Block(nn.Module):
    """A small network with everything a plan knows, written with the functional operators."""

    def __init__(self, channels=20, scale=2, attention=True):
        super().__init__()
        c = channels
        self.scale, self.data_range, self.minimum_size = scale, 1.0, 15 if attention else 1
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        p = {"head": kernel(c, 3), "tail": kernel(3 * scale**2, c), "tail_bias": rand(3 * scale**2)}
        for i in (1, 2, 3):
            p |= {f"w{i}": kernel(c, c), f"b{i}": rand(c)}
        p |= {"mix": kernel(c, 3 * c, 1), "pointwise": kernel(c, c, 1), "depthwise": kernel(c, 1)}
        p |= {"e1": kernel(6, c, 1), "e2": kernel(6, 6), "e3": kernel(6, 6), "e4": kernel(c, 6, 1)}
        self.p = nn.ParameterDict(p)
        self.attention = attention

    def forward(self, x):
        p = self.p
        f = E.conv3x3((x - self.mean) * 255 / 2.0, p["head"])
        y, mid = E.spab(f, p["w1"], p["b1"], p["w2"], p["b2"], p["w3"], p["b3"], return_mid=True)
        if self.attention:
            y = E.esa(y, p["e1"], None, p["e2"], None, p["e3"], None, p["e4"], None)
        z = E.conv1x1([f, y, mid], p["mix"], activation="leaky_relu", negative_slope=0.1)
        z = E.bsconv(z, p["pointwise"], p["depthwise"], padding_mode="reflect", activation="gelu")
        z = E.conv3x3(z, p["w1"], p["b1"], activation="relu", residual=f) + y
        return E.conv3x3_pixel_shuffle(z, p["tail"], p["tail_bias"], upscale_factor=self.scale)


def network(**options):
    torch.manual_seed(0)
    return Block(**options).eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(15, 15), (16, 33), (41, 23)])
def test_same_function(backend, layout, size):
    model = network()
    fast = optimize(model)
    assert fast.plan is not None and not fast.report().left
    x = lay_out(torch.rand(2, 3, *size), layout)
    with torch.no_grad(), esr_kernels.use_backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
    check_close(fast(x), exact, lambda: model(x), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(backend, dtype):
    model = network(attention=False)
    fast = optimize(model, dtype=dtype)
    x = torch.rand(1, 3, 20, 24)
    out = fast(x)
    assert out.dtype == x.dtype
    with torch.no_grad(), esr_kernels.use_backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
        plain = copy.deepcopy(model).to(dtype)(x.to(dtype))
    check_close(out.to(dtype), exact, lambda: plain, backend)


def test_the_model_is_not_changed():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimize(model, dtype=torch.bfloat16)
    assert model.p["head"].requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_report_and_attributes():
    fast = optimize(network())
    text = str(fast.report())
    assert text.startswith("fused into 11 layers, run as one operator:")
    assert "esa" in text and "bsconv" in text and "x2" in text
    assert (fast.scale, fast.data_range, fast.minimum_size) == (2, 1.0, 15)
    assert "11 layers, x2" in repr(fast)
    normalize = fast.plan.layers[0]
    assert normalize.op == "normalize"
    torch.testing.assert_close(normalize.attributes["scale"], [127.5] * 3)


def test_what_the_plan_cannot_express_runs_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU()).eval()
    fast = optimize(model, memory_format=torch.channels_last)
    assert fast.plan is None
    assert "conv2d" in str(fast.report())
    x = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(fast(x), model(x))
    assert fast(x).is_contiguous(memory_format=torch.channels_last)


def test_values_and_constants_are_told_apart():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(kernel(3, 3))

        def forward(self, x):
            y = E.conv3x3(x, self.weight)
            return y * E.conv3x3(x, self.weight + 1)

    model = Gate().eval()
    fast = optimize(model)
    assert [layer.op for layer in fast.plan.layers] == ["conv3x3", "conv3x3", "multiply"]
    x = torch.rand(1, 3, 8, 9)
    torch.testing.assert_close(fast(x), model(x))


def test_weight_arithmetic_is_folded():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(kernel(3, 3)), nn.Parameter(kernel(3, 3))

        def forward(self, x):
            return E.conv3x3(2 * x + 1, self.a * 2 + self.b)

    model = Folded().eval()
    fast = optimize(model)
    assert [layer.op for layer in fast.plan.layers] == ["normalize", "conv3x3"]
    x = torch.rand(1, 3, 8, 9)
    torch.testing.assert_close(fast(x), model(x))


def test_copies_pickles_exports_and_compiles(backend):
    fast = optimize(network())
    x = torch.rand(1, 3, 17, 19)
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), expected)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(fast, (torch.rand(2, 3, 20, 21),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    assert torch.equal(program.module()(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((17, 19), (22, 31), (40, 16)):
        y = torch.rand(1, 3, *size)
        assert torch.equal(compiled(y), fast(y))
    torch._dynamo.reset()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((20, 17), {"kernel_size": 7, "stride": 3}),
        ((9, 14), {"kernel_size": 3, "stride": 1, "padding": 1}),
        ((9, 14), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
        ((10, 11), {"kernel_size": 2}),
        ((10, 11), {"kernel_size": 1, "stride": 2}),
        ((10, 11), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
        ((10, 11), {"kernel_size": 3, "stride": 2, "dilation": 2}),
        ((7, 7), {"kernel_size": 7, "stride": 3}),
    ],
)
def test_maxima_of_windows_bit_by_bit(memory_format, size, options):
    x = torch.randn(2, 5, *size).to(memory_format=memory_format)
    x[0, 1, 3, 4], x[1, 2, 5, 6], x[1, 3] = float("nan"), float("inf"), float("-inf")
    expected = nn.functional.max_pool2d(x, **options)
    kernel_size, stride, *rest = (
        options.get(name, default)
        for name, default in (("kernel_size", 0), ("stride", ()), ("padding", 0), ("dilation", 1), ("ceil_mode", False))
    )
    lists = [[v] if isinstance(v, int) and not isinstance(v, bool) else v for v in (kernel_size, stride, *rest)]
    got = max_pool2d(x, *lists)
    assert got.shape == expected.shape
    assert torch.equal(got.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("size", "taps", "options"),
    [
        ((9, 12), (3, 1), {"stride": 2}),
        ((10, 11), (1, 3), {"stride": (2, 3)}),
        ((3, 1), (3, 1), {"stride": 2}),
        ((10, 11), (3, 1), {"stride": 2, "padding": 1}),
        ((10, 11), (3, 1), {"stride": 2, "dilation": 2}),
        ((10, 11), (3, 3), {"stride": 2}),
        ((10, 11), (1, 3), {}),
    ],
)
def test_strided_taps_channel_by_channel(memory_format, bias, size, taps, options):
    torch.manual_seed(0)
    x = torch.randn(2, 5, *size).to(memory_format=memory_format)
    x[0, 1, 2, 0], x[1, 2, 1, 0] = float("nan"), float("inf")
    weight, b = torch.randn(5, 1, *taps), torch.randn(5) if bias else None
    expected = nn.functional.conv2d(x.double(), weight.double(), None if b is None else b.double(), groups=5, **options)
    pairs = [options.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in pairs)
    arguments = (weight, b, stride, padding, dilation, False, [0, 0], 5)
    got = convolution(x, *arguments)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    if size == (9, 12):
        inputs = [x.nan_to_num(0.0, 0.0).double().requires_grad_(), weight.double().requires_grad_()]
        rest = (None if b is None else b.double().requires_grad_(), *arguments[2:])
        assert torch.autograd.gradcheck(lambda x, w: convolution(x, w, *rest), inputs)


def test_windows_too_large_are_refused():
    for shape, kernel_size, padding in (((1, 2, 5, 9), [7], [0]), ((1, 2, 9, 9), [3], [2])):
        with pytest.raises(RuntimeError):
            max_pool2d(torch.zeros(shape), kernel_size, [1], padding)


def test_pooling_between_plans_exports():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

        def forward(self, x):
            return self.b(nn.functional.max_pool2d(self.a(x), 3, 1, 1))

    model = Pooled().eval()
    fast = optimize(model)
    assert fast.plan is None
    x = torch.rand(2, 3, 17, 19)
    expected = fast(x)
    torch.testing.assert_close(expected, model(x))
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), expected)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(fast, (torch.rand(2, 3, 20, 21),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    assert torch.equal(program.module()(x), expected)


def test_flops_through_the_plan():
    fvcore = pytest.importorskip("fvcore.nn")
    model = network()
    fast, x = optimize(model), torch.rand(1, 3, 32, 48)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        fast(x)
    counts = [
        fvcore.FlopCountAnalysis(m, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        for m in (model, fast)
    ]
    assert counter.get_total_flops() == 2 * counts[0].total() == 2 * counts[1].total() == fast.plan.flops(1, 32, 48)


def test_gradients_are_refused():
    fast = optimize(network())
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference"):
        fast(x).sum().backward()


def test_warmup_and_sizes():
    model = network()
    fast = optimize(model, sizes=[(16, 20), (15, 15)])
    assert fast.warmup([(30, 30)]) is fast
    with pytest.raises(ValueError, match="at least 15 x 15 pixels, got 3 x 4"):
        fast.warmup([(3, 4)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.relu}, TypeError, "model: expected a torch.nn.Module, got"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected float32, float16, bfloat16 or None"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: expected"),
        ({"cuda_graphs": "always"}, ValueError, "cuda_graphs: expected"),
        ({"model": nn.Linear(3, 3)}, esr_kernels.OptimizeError, "model: running it on an example"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        optimize(**({"model": network()} | change))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (3, TypeError, "x: expected a torch.Tensor, got int"),
        (torch.zeros(3, 20, 20), ValueError, r"x: expected shape \[N, 3, H, W\]"),
        (torch.zeros(1, 4, 20, 20), ValueError, r"x: expected shape \[N, 3, H, W\]"),
        (torch.zeros(1, 3, 20, 20, dtype=torch.uint8), TypeError, "x: expected float32, float16"),
        (torch.zeros(1, 3, 14, 20), ValueError, "x: the network needs images of at least 15 x 15 pixels, got 14 x 20"),
    ],
)
def test_bad_images(x, error, message):
    fast = optimize(network())
    with pytest.raises(error, match=message):
        fast(x)


def test_garbage_collected_during_a_trace_leaves_no_trace():
    """Plans that die while a graph is recorded must not put their release into it."""

    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = optimize(network())

        def forward(self, x):
            with torch._C._DisableTorchDispatch():
                other = optimize(network())
                other(torch.rand(1, 3, 16, 16))
            del other
            gc.collect()
            return self.inner(x)

    model = Careless().eval()
    graph = torch.fx.experimental.proxy_tensor.make_fx(model)(torch.rand(1, 3, 16, 17))
    assert {node.target for node in graph.graph.nodes if "esr" in str(node.target)} == {torch.ops.esr.run_plan.default}
