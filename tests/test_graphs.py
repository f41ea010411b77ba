"""CUDA graphs: when they are captured, kept, replayed and dropped. Without a GPU a fake one records and replays."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import kernel, rand
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import esr_kernels
from esr_kernels import functional as E
from esr_kernels import graphs
from esr_kernels.errors import OptimizeError
from esr_kernels.graphs import GraphCache


class FakeRecorder:
    """Replays by running the captured function again, into the tensor that the capture returned."""

    captures = replays = 0
    failure: Exception | None = None
    outer = False

    def __init__(self, device):
        self.busy = threading.Lock()

    @staticmethod
    def takes(x):
        return x.device.type == "cpu" and not FakeRecorder.outer

    def warm_up(self, function):
        return function()

    def capture(self, function):
        if FakeRecorder.failure is not None:
            raise FakeRecorder.failure
        FakeRecorder.captures += 1
        with torch.no_grad():
            output = function()

        def replay():
            assert self.busy.locked()
            FakeRecorder.replays += 1
            with torch.no_grad():
                output.copy_(function())

        return replay, output

    @contextmanager
    def turn(self):
        assert self.busy.acquire(blocking=False), "two calls use the same memory"
        try:
            yield
        finally:
            self.busy.release()


@pytest.fixture
def fake():
    FakeRecorder.captures = FakeRecorder.replays = 0
    FakeRecorder.failure, FakeRecorder.outer = None, False
    return FakeRecorder


def double(x):
    return 2 * x


def image(*size, channels=3, **options):
    return torch.rand(1, channels, *size, **options)


# --- the cache ----------------------------------------------------------------------------------------------------


def test_captures_when_a_size_comes_again(fake):
    cache = GraphCache(recorder=fake)
    a, b = image(5, 6), image(6, 5)
    assert cache.run(double, a, []) is None
    assert cache.run(double, b, []) is None
    assert (len(cache), fake.captures) == (0, 0)
    assert torch.equal(cache.run(double, a, []), 2 * a)
    assert torch.equal(cache.run(double, a + 1, []), 2 * (a + 1))
    assert (len(cache), fake.captures, fake.replays) == (1, 1, 2)
    assert cache.report() == ["cpu: [1, 3, 5, 6] float32"]


@pytest.mark.parametrize(("options", "call"), [({"required": True}, {}), ({}, {"at_once": True})])
def test_captures_at_once(fake, options, call):
    cache = GraphCache(recorder=fake, **options)
    assert torch.equal(cache.run(double, image(4, 4) * 0 + 3, [], **call), torch.full((1, 3, 4, 4), 6.0))
    assert fake.captures == 1


def test_results_are_new_tensors(fake):
    cache = GraphCache(True, recorder=fake)
    xs = [image(4, 4) for _ in range(3)]
    ys = [cache.run(double, x, []) for x in xs]
    assert all(torch.equal(y, 2 * x) for x, y in zip(xs, ys, strict=True))
    assert len({y.data_ptr() for y in ys}) == 3


def test_casts_and_memory_format(fake):
    cache = GraphCache(True, recorder=fake)
    x = image(4, 5)
    half = {"dtype": torch.float16}
    y = cache.run(double, x, [], memory_format=torch.channels_last, **half)
    assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, (2 * x.half()).float())
    assert torch.equal(cache.run(double, x.double(), [], **half), (2 * x.half()).double())
    assert fake.captures == 1


@contextmanager
def setting(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@pytest.mark.parametrize(
    "change",
    [
        "shape",
        "batch",
        "layout",
        "dtype",
        "backend",
        "convolutions",
        "products",
        "deterministic",
    ],
)
def test_what_needs_a_graph_of_its_own(fake, change):
    cache = GraphCache(True, recorder=fake)
    x, context = torch.rand(2, 3, 4, 5), nullcontext()
    cache.run(double, x, [])
    if change == "shape":
        x = x.transpose(2, 3).contiguous()
    elif change == "batch":
        x = x[:1]
    elif change == "layout":
        x = x.to(memory_format=torch.channels_last)
    elif change == "dtype":
        x = x.half()
    elif change == "backend":
        context = esr_kernels.use_backend("reference")
    elif change == "convolutions":
        context = torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32)
    elif change == "products":
        other = "ieee" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32"
        context = setting(torch.backends.cuda.matmul, "fp32_precision", other)
    elif change == "deterministic":
        torch.use_deterministic_algorithms(False)  # the fixture of the suite resets it
    with context:
        for _ in range(2):
            assert torch.equal(cache.run(double, x, []), 2 * x)
    assert fake.captures == 2


def test_tiles_of_any_strides_share_a_graph(fake):
    cache = GraphCache(True, recorder=fake)
    whole = torch.rand(1, 3, 40, 50)
    for tile in (whole[..., :8, :8], whole[..., 9:17, 3:11], whole[..., :16:2, ::6][..., :8]):
        assert torch.equal(cache.run(double, tile, []), 2 * tile)
    expanded = torch.rand(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.equal(cache.run(double, expanded, []), 2 * expanded)
    assert fake.captures == 1


def test_the_least_recently_used_goes(fake):
    cache = GraphCache(True, limit=2, recorder=fake)
    a, b, c = image(4, 4), image(5, 5), image(6, 6)
    for x in (a, b, a, c, a):
        cache.run(double, x, [])
    assert (len(cache), fake.captures) == (2, 3)
    cache.run(double, b, [])
    assert fake.captures == 4
    cache.reserve(3)
    for x in (c, a, b):
        cache.run(double, x, [])
    assert (len(cache), fake.captures) == (3, 5)
    cache.reserve(1)
    assert cache.limit == 3


def test_large_images_only_when_asked(fake, monkeypatch):
    monkeypatch.setattr(graphs, "AUTO_PIXELS", 100)
    cache = GraphCache(recorder=fake)
    x = image(10, 11)
    assert [cache.run(double, x, []) for _ in range(3)] == [None] * 3
    assert cache.run(double, x, [], at_once=True) is not None
    assert cache.run(double, x, []) is not None


def test_sizes_seen_once_do_not_pile_up(fake):
    cache = GraphCache(recorder=fake)
    for i in range(1, 2 * graphs._SEEN):
        cache.run(double, image(1, i), [])
    (device,) = cache._devices.values()
    assert len(device.seen) == graphs._SEEN and fake.captures == 0


def test_changed_weights(fake):
    cache = GraphCache(True, recorder=fake)
    w, x = torch.rand(3, 1, 1), image(4, 4)

    def scaled(weight):
        return cache.run(lambda x: x * weight, x, [weight])

    assert torch.equal(scaled(w), x * w)
    assert torch.equal(scaled(w), x * w)
    w.add_(1)
    assert torch.equal(scaled(w), x * w)
    assert (len(cache), fake.captures) == (1, 2)
    with torch.inference_mode():
        w.mul_(2)
    assert torch.equal(scaled(w), x * w)
    assert fake.captures == 3
    for _ in range(20):  # the allocator would hand out the same address again
        w = torch.rand(3, 1, 1)
        assert torch.equal(scaled(w), x * w)
    assert (len(cache), fake.captures) == (1, 23)


def test_weights_of_inference_mode_are_refused(fake):
    with torch.inference_mode():
        w = torch.rand(3, 1, 1)
    cache = GraphCache(recorder=fake)
    assert [cache.run(double, image(4, 4), [w], at_once=True) for _ in range(2)] == [None, None]
    assert "inference_mode" in cache.report()[0]
    with pytest.raises(OptimizeError, match=r"cuda_graphs=True: a weight was made in torch\.inference_mode"):
        GraphCache(True, recorder=fake).run(double, image(4, 4), [w])


def test_failed_capture(fake):
    cache = GraphCache(recorder=fake)
    fake.failure = RuntimeError("operation not permitted when stream is capturing\nCompile with ...")
    for x in (image(4, 4), image(5, 5)):
        assert [cache.run(double, x, []) for _ in range(3)] == [None] * 3
    reason = "cpu: [1, 3, 4, 4] float32 not captured: operation not permitted when stream is capturing"
    assert cache.report() == [reason]
    fake.failure = None  # one failure is enough: not tried again, until somebody asks
    assert cache.run(double, image(4, 4), [], at_once=True) is None
    cache.clear()
    assert cache.report() == []
    assert cache.run(double, image(4, 4), [], at_once=True) is not None


def test_failed_capture_where_it_is_required(fake):
    cache = GraphCache(True, recorder=fake)
    fake.failure = RuntimeError("no")
    with pytest.raises(OptimizeError, match=r"cuda_graphs=True: cpu: \[1, 3, 4, 4\] float32 not captured: no") as e:
        cache.run(double, image(4, 4), [])
    assert e.value.__cause__ is fake.failure
    fake.failure = None
    assert cache.run(double, image(4, 4), []) is not None


def test_lack_of_memory_stops_one_size(fake):
    cache = GraphCache(recorder=fake)
    fake.failure = torch.OutOfMemoryError("too little")
    assert cache.run(double, image(9, 9), [], at_once=True) is None
    fake.failure = None
    assert cache.run(double, image(9, 9), [], at_once=True) is None
    assert cache.run(double, image(4, 4), [], at_once=True) is not None
    assert cache.report()[1] == "cpu: [1, 3, 9, 9] float32 not captured: too little"

    def greedy(x):
        raise torch.OutOfMemoryError("on a stream of its own")

    assert cache.run(greedy, image(8, 8), [], at_once=True) is None


def test_errors_of_the_function_are_its_own(fake):
    def broken(x):
        raise ValueError("x: bad")

    cache = GraphCache(True, recorder=fake)
    with pytest.raises(ValueError, match="x: bad"):
        cache.run(broken, image(4, 4), [])
    assert torch.equal(cache.run(double, image(4, 4) * 0, []), torch.zeros(1, 3, 4, 4))


def runs_without(cache, x, weights=()):
    return cache.run(double, x, weights) is None


def test_calls_that_something_watches(fake):
    cache = GraphCache(True, recorder=fake)
    x = image(4, 4)
    seen = []

    def call(x, weights=()):
        seen.append(runs_without(cache, x, weights))
        return x * 2

    with FlopCounterMode(display=False):
        call(x)
    call(x.clone().requires_grad_())
    call(x, [torch.zeros(1, requires_grad=True)])
    call(nn.Parameter(x, requires_grad=False))
    torch.vmap(call)(x[None])
    torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level():
        call(forward_ad.make_dual(x, x))
    for options in ({}, {"tracing_mode": "fake"}, {"tracing_mode": "symbolic"}, {"pre_dispatch": True}):
        torch.fx.experimental.proxy_tensor.make_fx(lambda x: call(x), **options)(x)
    call(x[:0])
    call(x.to("meta"))
    fake.outer = True
    call(x)
    assert seen == [True] * len(seen) and len(seen) == 14
    fake.outer = False
    with torch.no_grad():
        assert not runs_without(cache, x.clone().requires_grad_())


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_on_and_off(fake, first):
    cache = GraphCache(True, recorder=fake)
    x = image(4, 4)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            y = cache.run(double, x + 1, [])
            assert torch.equal(y, 2 * (x + 1)) and y.is_inference() is mode
    assert fake.captures == 1


def test_threads(fake):
    cache = GraphCache(limit=3, recorder=fake)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(60):
            x = torch.rand(1, 3, 4, 4 + (seed + i) % 4, generator=generator)
            y = cache.run(double, x, [])
            if y is not None and not torch.equal(y, 2 * x):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and fake.replays > 50 and len(cache) <= 3


def test_copies_and_pickles_are_empty(fake):
    cache = GraphCache(True, limit=5, recorder=fake)
    cache.run(double, image(4, 4), [])
    for other in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(other), other.required, other.limit) == (0, True, 5)
        assert other.run(double, image(4, 4), []) is not None


# --- the CUDA calls, without CUDA ---------------------------------------------------------------------------------


class FakeCuda:
    """torch.cuda as far as `CudaRecorder` uses it, writing down what is called; torch.cuda.graph is the real one."""

    def __init__(self, monkeypatch):
        self.log, self.pools, self.capturing, self.invalid, self.allocating = [], 0, None, False, None
        self.default = self.stream = FakeStream(self, "default")
        streams = iter("abcdef")
        replaced = {
            "Stream": lambda *_: FakeStream(self, next(streams)),
            "Event": lambda: FakeEvent(self),
            "CUDAGraph": lambda: FakeGraph(self),
            "current_stream": lambda *_: self.stream,
            "stream": self.use,
            "device": lambda _: nullcontext(),
            "synchronize": lambda *_: None,
            "graph_pool_handle": self.new_pool,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocation, raising=False)
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda _, pool: self.log.append(f"release {pool}"), raising=False
        )

    def end_allocation(self, _, pool):
        assert self.allocating == pool
        self.allocating = None
        self.log.append(f"end in {pool}")

    def new_pool(self):
        self.pools += 1
        return self.pools

    @contextmanager
    def use(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.cuda.log.append(f"{self.name} waits for the event of {event.at}")


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, "nothing"

    def record(self, stream):
        self.at = stream.name


class FakeGraph:
    def __init__(self, cuda):
        self.cuda = cuda

    def capture_begin(self, pool=None, capture_error_mode="global", **_):
        assert self.cuda.stream is not self.cuda.default and self.cuda.capturing is None and not gc.isenabled()
        assert capture_error_mode == "thread_local"
        self.cuda.capturing, self.cuda.allocating = self, pool
        self.cuda.log.append(f"capture on {self.cuda.stream.name} in {pool}")

    def capture_end(self):
        self.cuda.capturing = None
        if self.cuda.invalid:
            self.cuda.invalid = False
            raise RuntimeError("capture invalidated")
        self.cuda.allocating = None

    def replay(self):
        self.cuda.log.append(f"replay on {self.cuda.stream.name}")


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def test_the_order_of_streams(cuda):
    recorder = graphs.CudaRecorder(torch.device("cpu"))
    assert recorder.warm_up(lambda: cuda.stream.name) == "a"
    assert cuda.log == ["a waits for default", "default waits for a"]
    cuda.log.clear()
    replay, output = recorder.capture(lambda: torch.zeros(1))
    assert torch.equal(output, torch.zeros(1)) and cuda.stream is cuda.default and gc.isenabled()
    for stream in (cuda.default, FakeStream(cuda, "other"), cuda.default):
        with cuda.use(stream), recorder.turn():
            replay()
    assert cuda.log == [
        "capture on a in 1",
        "default waits for the event of nothing",
        "replay on default",
        "a waits for the event of default",
        "other waits for the event of default",
        "replay on other",
        "a waits for the event of other",
        "default waits for the event of other",
        "replay on default",
        "a waits for the event of default",
    ]


def test_graphs_share_a_pool_while_one_lives(cuda):
    recorder = graphs.CudaRecorder(torch.device("cpu"))
    first = recorder.capture(lambda: torch.zeros(1))
    second = recorder.capture(lambda: torch.zeros(1))
    del first
    third = recorder.capture(lambda: torch.zeros(1))
    del second, third
    recorder.capture(lambda: torch.zeros(1))
    assert [entry[-1] for entry in cuda.log] == ["1", "1", "1", "2"]


@pytest.mark.parametrize("invalid", [True, False])
def test_what_a_failed_capture_leaves(cuda, invalid):
    recorder = graphs.CudaRecorder(torch.device("cpu"))
    kept = recorder.capture(lambda: torch.zeros(1))

    def fails():
        cuda.invalid = invalid
        raise ValueError("the first reason")

    with pytest.raises(ValueError, match="the first reason"):
        recorder.capture(fails)
    assert cuda.stream is cuda.default and cuda.capturing is None and gc.isenabled()
    if invalid:
        assert cuda.log[1:] == ["capture on a in 1", "end in 1", "release 1", "capture on a in None"]
    else:
        assert cuda.log[1:] == ["capture on a in 1"]
    for _ in range(2):  # nothing keeps the first of the two, nor its pool
        recorder.capture(lambda: torch.zeros(1))
    assert [entry[-1] for entry in cuda.log[-2:]] == (["2", "3"] if invalid else ["1", "1"])
    assert kept


# --- OptimizedModel -----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """What every backend can capture: no constants that come from the host."""

    scale = 2

    def __init__(self, channels=12):
        super().__init__()
        c = channels
        weights = {"head": kernel(c, 3), "tail": kernel(12, c), "bias": rand(12)}
        weights |= {f"w{i}": kernel(c, c) for i in (1, 2, 3)}
        self.p = nn.ParameterDict(weights)

    def forward(self, x):
        p = self.p
        f = E.conv3x3(x, p["head"], activation="relu")
        f = E.spab(f, p["w1"], None, p["w2"], None, p["w3"], None)
        return E.conv3x3_pixel_shuffle(f, p["tail"], p["bias"], upscale_factor=2)


def network():
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture
def graphed(fake):
    """An optimized network that takes the CPU for a device with graphs."""

    def make(required=True, **options):
        fast = esr_kernels.optimize(network(), cuda_graphs=True if required else "auto", **options)
        fast._graphs = GraphCache(required, recorder=fake)
        return fast

    return make


@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}, {"dtype": torch.float32}]
)
def test_same_result_with_and_without(graphed, fake, options):
    fast = graphed(**options)
    plain = esr_kernels.optimize(network(), cuda_graphs=False, **options)
    assert plain._graphs is None
    for i, dtype in enumerate((torch.float32, torch.float32, torch.float64)):
        x = image(9, 8 + i).to(dtype)
        if options.get("dtype") is None and dtype == torch.float64:
            continue
        a, b = fast(x), plain(x)
        assert torch.equal(a, b) and a.dtype == dtype and a.stride() == b.stride()
    assert fake.replays >= 2


def test_the_argument_reaches_the_model():
    caches = {mode: esr_kernels.optimize(network(), cuda_graphs=mode)._graphs for mode in ("auto", True, False)}
    assert caches[False] is None and caches[True].required and not caches["auto"].required
    fast = esr_kernels.optimize(network(), cuda_graphs=True)
    fast(image(8, 8))
    assert not fast.report().graphs  # a CPU has none


def test_warmup_captures_each_size(graphed, fake):
    fast = graphed(required=False)
    sizes = [(5, 5 + i) for i in range(10)]
    assert fast.warmup(sizes) is fast
    assert fake.captures == 10 == len(fast._graphs)
    for size in sizes:
        fast(image(*size))
    assert fake.captures == 10
    text = str(fast.report())
    assert "CUDA graphs:" in text and "cpu: [1, 3, 5, 14] float32" in text


def test_failure_shows_in_the_report(graphed, fake):
    fast = graphed(required=False)
    fake.failure = RuntimeError("cannot")
    x = image(8, 8)
    outputs = [fast(x) for _ in range(3)]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert "[1, 3, 8, 8] float32 not captured: cannot" in str(fast.report())
    with pytest.raises(OptimizeError, match="cannot"):
        graphed()(x)


def test_unfused_network_with_graphs_required():
    model = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU()).eval()
    assert "only a fused network is captured" in str(esr_kernels.optimize(model, cuda_graphs=True).report())
    assert not esr_kernels.optimize(model).report().graphs


def test_model_weights_change(graphed, fake):
    fast, x = graphed(), image(8, 8)
    state = {k: v.clone() for k, v in fast.state_dict().items()}
    before = fast(x)
    fast.weight_0.mul_(2)
    assert not torch.equal(fast(x), before)
    assert not fast.load_state_dict(state).missing_keys
    assert torch.equal(fast(x), before)
    fast.load_state_dict({k: 0 * v for k, v in state.items()}, assign=True)
    assert torch.equal(fast(x), torch.zeros_like(before))
    assert fake.captures == 4
    fast.load_state_dict(state, assign=True)
    assert torch.equal(fast(x), before)
    fast.clear_graphs()
    assert len(fast._graphs) == 0
    assert torch.equal(fast(x), before)


def test_moving_drops_the_graphs(graphed):
    fast = graphed()
    fast(image(8, 8))
    assert len(fast._graphs) == 1
    fast.to(torch.float64)
    assert len(fast._graphs) == 0


def test_models_of_inference_mode_can_have_graphs(graphed, fake):
    with torch.inference_mode():
        fast = graphed().to(torch.float64).float()
        x = image(8, 8)
        first = fast(x)
        fast.weight_0.mul_(2)
        assert not torch.equal(fast(x), first)
    fast(image(8, 8))
    assert fake.captures == 2


def test_model_copies_and_pickles_without_graphs(graphed, fake):
    fast, x = graphed(), image(8, 8)
    expected = fast(x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert len(other._graphs) == 0
        assert torch.equal(other(x), expected)
        assert len(other._graphs) == 1
    assert len(fast._graphs) == 1
    assert "_graphs" not in fast.state_dict()


def test_operator_stays_visible(graphed, fake):
    fast, x = graphed(), image(8, 8)
    expected = fast(x)
    replays = fake.replays
    with FlopCounterMode(display=False) as counter:
        fast(x)
    assert counter.get_total_flops() == fast.plan.flops(1, 8, 8)
    torch.testing.assert_close(torch.jit.trace(fast, x, check_trace=False)(x), expected)
    traced = torch.fx.experimental.proxy_tensor.make_fx(fast)(x)
    assert any(node.target is torch.ops.esr.run_plan.default for node in traced.graph.nodes)
    assert torch.equal(torch.export.export(fast, (x,)).module()(x), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="for inference"):
        fast(x.clone().requires_grad_()).sum().backward()
    assert fake.replays == replays


# --- on a GPU -----------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def gpu(test):
    return pytest.mark.gpu(needs_cuda(test))


@pytest.fixture
def pair():
    """A model that needs graphs and one that has none."""
    return [esr_kernels.optimize(network().cuda(), cuda_graphs=mode) for mode in (True, False)]


def check(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_equals_the_ungraphed_result(layout, dtype):
    fast, plain = (esr_kernels.optimize(network().cuda(), dtype=dtype, cuda_graphs=mode) for mode in (True, False))
    for size in ((1, 1), (16, 16), (33, 47), (64, 80), (33, 47)):
        xs = [image(*size, device="cuda").to(memory_format=layout) for _ in range(3)]
        ys = [fast(x) for x in xs]
        for x, y in zip(xs, ys, strict=True):
            check(y, plain(x))
    assert len(fast._graphs) in (4, 5)  # one pixel has both layouts


@gpu
def test_cuda_captures_the_second_time():
    fast = esr_kernels.optimize(network().cuda(), sizes=[(20, 20)])
    assert len(fast.report().graphs) == 1 and "not captured" not in str(fast.report())
    x = image(24, 24, device="cuda")
    first = fast(x)
    assert len(fast._graphs) == 1
    check(fast(x), first)
    assert len(fast._graphs) == 2 and "[1, 3, 24, 24] float32" in str(fast.report())


@gpu
def test_cuda_streams_and_threads(pair):
    fast, plain = pair
    images = [image(40, 40 + 8 * i, device="cuda") for i in range(3)]
    expected = [plain(x) for x in images]
    torch.cuda.synchronize()
    wrong = []

    def work(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            outputs = [(i % 3, fast(images[i % 3])) for i in range(seed, seed + 50)]
        stream.synchronize()
        wrong.extend(i for i, y in outputs if not torch.allclose(y, expected[i], rtol=1e-4, atol=1e-4))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and len(fast._graphs) == 3


@gpu
def test_cuda_two_streams_in_turn(pair):
    fast, plain = pair
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.default_stream()]
    xs = [image(96, 96, device="cuda") for _ in range(30)]
    expected = [plain(x) for x in xs]
    torch.cuda.synchronize()
    ys = []
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 3]):
            ys.append(fast(x))
    torch.cuda.synchronize()
    for y, e in zip(ys, expected, strict=True):
        check(y, e)


@gpu
def test_cuda_weights_change(pair):
    fast, plain = pair
    x = image(24, 24, device="cuda")
    check(fast(x), plain(x))
    for model in pair:
        with torch.inference_mode():
            model.weight_0.mul_(1.5)
    check(fast(x), plain(x))
    for model in pair:
        model.half().float()
    check(fast(x), plain(x))
    assert len(fast._graphs) == 1


@gpu
def test_cuda_inside_a_capture_of_the_caller(pair):
    fast, plain = pair
    static = image(24, 24, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plain(static), fast(static)
    torch.cuda.current_stream().wait_stream(side)
    fast.clear_graphs()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(static)
    assert len(fast._graphs) == 0
    x = image(24, 24, device="cuda")
    static.copy_(x)
    graph.replay()
    check(out, plain(x))


@gpu
def test_cuda_copies_pickles_and_moves(pair):
    fast, plain = pair
    x = image(24, 24, device="cuda")
    expected = plain(x)
    check(fast(x), expected)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        check(other(x), expected)
        assert len(other._graphs) == 1
    del other
    gc.collect()
    check(fast(x), expected)
    check(fast.cpu()(x.cpu()), expected.cpu())
    assert len(fast._graphs) == 0
    check(fast.cuda()(x), expected)


@gpu
def test_cuda_survives_eviction_of_all_graphs():
    cache = GraphCache(True, limit=1)
    for i in range(6):
        x = image(16, 16 + i % 2, device="cuda")
        assert torch.equal(cache.run(double, x, []), 2 * x)
    cache.clear()
    x = image(16, 16, device="cuda")
    assert torch.equal(cache.run(double, x, []), 2 * x)


@gpu
def test_cuda_failed_capture_leaves_no_trace():
    def waits(x):
        return x * x.sum().item()

    cache = GraphCache()
    x = image(16, 16, device="cuda")
    assert torch.equal(cache.run(double, x[..., :8], [], at_once=True), 2 * x[..., :8])
    assert cache.run(waits, x, [], at_once=True) is None
    assert "not captured" in cache.report()[1]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.rand(5, device="cuda").sum() > 0
    assert torch.equal(cache.run(double, x[..., :8], []), 2 * x[..., :8])
    cache.clear()
    assert torch.equal(cache.run(double, x, [], at_once=True), 2 * x)
    with pytest.raises(OptimizeError, match="not captured"):
        GraphCache(True).run(waits, x, [])


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_cuda_other_than_the_current_device():
    fast, plain = (esr_kernels.optimize(network().to("cuda:1"), cuda_graphs=mode) for mode in (True, False))
    x = image(24, 24, device="cuda:1")
    check(fast(x), plain(x))
    assert torch.cuda.current_device() == 0
