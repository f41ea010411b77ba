"""Chains of convolutions in one launch whose blocks keep their tiles (ESR_KERNELS_CUDA_PERSISTENT)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import check_close, emulate, kernel, published, rand, to
from test_native_cuda import (  # noqa: F401
    DEVICE,
    PLAIN,
    described,
    emulated,
    on_cuda,
    only_emulated,
    pytestmark,
    run,
    spab_layers,
    spab_weights,
)
from torch.nn import functional as F

import esr_kernels
from esr_kernels.backends.native import cuda
from esr_kernels.plan import PlanBuilder

PERSISTENT = "ESR_KERNELS_CUDA_PERSISTENT"
# Compute capability, multiprocessors, KiB of shared memory of a block and of a multiprocessor.
GPUS = {"sm_80": (80, 108, 163, 164), "sm_90 with few": (90, 6, 227, 228), "sm_86 with few": (86, 3, 99, 100)}


@pytest.fixture
def on():
    """Chooses one of GPUS in the emulator; a GPU is what it is."""

    def choose(name):
        if not emulated:
            return
        cuda._compiled.clear()
        emulate(*GPUS[name])

    yield choose
    if emulated:
        cuda._compiled.clear()
        emulate()


def launches() -> list[str]:
    """Of the emulator, since the last call; elsewhere nothing tells."""
    return cuda.library().launches().split() if emulated else []


def together_and_apart(monkeypatch, plan, weights, inputs, order="forward"):
    """A plan's results by chains and by one launch per layer; both are to have the same bits."""
    monkeypatch.setenv("ESR_EMULATOR_ORDER", order)
    monkeypatch.delenv(PERSISTENT, raising=False)
    apart = run(plan, weights, inputs)
    monkeypatch.setenv(PERSISTENT, "1")
    launches()
    together = run(plan, weights, inputs)
    names = launches()
    assert all(map(torch.equal, together, apart))
    assert all(bool(t.isfinite().all()) for t in together)
    return together, names


def every_epilogue(channels):
    """Convolutions from `channels` to as many, and an odd number less; a 1x1 one, residuals of near and far layers."""
    b = PlanBuilder()
    silu, gelu = ({"activation": a, "negative_slope": 0.0} for a in ("silu", "gelu"))
    leaky = {"activation": "leaky_relu", "negative_slope": 0.05}
    n, m = channels, channels - 1
    x = b.add("conv3x3", [b.input(3)], n, {"weight": "w0", "bias": "b0"}, **PLAIN, residual_mode="post")
    y = b.add("conv3x3", [x], n, {"weight": "w1", "bias": "b1"}, **silu, residual_mode="post")
    z = b.add("conv3x3", [y], m, {"weight": "w2"}, **leaky, residual_mode="post")
    u = b.add("conv3x3", [z, x], n, {"weight": "w3", "bias": "b3"}, **PLAIN, residual_mode="attention")
    v = b.add("conv1x1", [u], n, {"weight": "w4", "bias": "b4"}, **gelu)
    w = b.add("conv3x3", [v, y], n, {"weight": "w5", "bias": "b5"}, **leaky, residual_mode="pre")
    t = b.add("conv3x3", [w, u], n, {"weight": "w6", "bias": "b6"}, **PLAIN, residual_mode="post")
    joined = b.add("conv1x1", [t, y, w], 9, {"weight": "w7"}, **PLAIN)
    plan = b.finish([joined, v, t])

    def weights(dtype):
        shapes = [(n, 3), (n, n), (m, n), (n, m), (n, n), (n, n), (n, n), (9, 3 * n)]
        tensors = []
        for k, (cout, cin) in enumerate(shapes):
            tensors.append(kernel(cout, cin, 1 if k in (4, 7) else 3, dtype))
            if k not in (2, 7):
                tensors.append(rand(cout, dtype=dtype))
        return [t.to(DEVICE) for t in tensors]

    def plain(image, p):
        w0, b0, w1, b1, w2, w3, b3, w4, b4, w5, b5, w6, b6, w7 = p
        x = F.conv2d(image, w0, b0, padding=1)
        y = F.silu(F.conv2d(x, w1, b1, padding=1))
        z = F.leaky_relu(F.conv2d(y, w2, padding=1), 0.05)
        h = F.conv2d(z, w3, b3, padding=1)
        u = (h + x) * (torch.sigmoid(h) - 0.5)
        v = F.gelu(F.conv2d(u, w4, b4))
        w = F.leaky_relu(F.conv2d(v, w5, b5, padding=1) + y, 0.05)
        t = F.conv2d(w, w6, b6, padding=1) + u
        return F.conv2d(torch.cat([t, y, w], 1), w7), v, t

    return plan, weights, plain


@pytest.mark.parametrize(
    ("gpu", "dtype", "channels", "size"),
    [
        ("sm_80", torch.float16, 28, (1, 1, 1)),
        ("sm_80", torch.bfloat16, 28, (2, 2, 5)),
        ("sm_80", torch.float16, 24, (1, 7, 300)),
        ("sm_80", torch.bfloat16, 40, (2, 19, 33)),
        ("sm_90 with few", torch.float16, 28, (1, 15, 31)),
        ("sm_90 with few", torch.float16, 32, (1, 40, 70)),
        ("sm_90 with few", torch.bfloat16, 48, (2, 17, 30)),
        ("sm_90 with few", torch.float16, 52, (1, 33, 31)),
        ("sm_86 with few", torch.bfloat16, 26, (3, 8, 16)),
    ],
)
def test_a_chain_has_the_bits_of_one_launch_per_layer(monkeypatch, on, gpu, dtype, channels, size):
    """One tile and several in both directions, three maps in shared memory and two, in any order of blocks."""
    on(gpu)
    seed = channels + sum(size)
    torch.manual_seed(seed)
    plan, weights, plain = every_epilogue(channels)
    batch, height, width = size
    x, parameters = rand(batch, 3, height, width, dtype=dtype).to(DEVICE), weights(dtype)
    got, names = together_and_apart(monkeypatch, plan, parameters, [x], f"random:{seed}")
    if emulated:
        chain = f"chain_{str(dtype).removeprefix('torch.')}"
        assert names.count(chain) == names.count("clear_flags") == 1
        # The first layer and the concatenation.
        assert len([n for n in names if n.startswith("convolution")]) == 2
    exact = plain(*to([x, parameters], torch.float64))
    check_close(got[1], exact[1], lambda: plain(x, parameters)[1], "native-cuda")
    for order in ("forward", "reverse", "random:1"):  # flags and borders of the runs before are still there
        monkeypatch.setenv("ESR_EMULATOR_ORDER", order)
        assert all(map(torch.equal, run(plan, parameters, [x]), got))


@only_emulated
def test_more_tiles_than_blocks_at_once_are_one_launch_per_layer(monkeypatch, on):
    """Blocks that wait for others that cannot begin would wait for ever."""
    on("sm_86 with few")
    torch.manual_seed(1)
    plan, weights, _ = every_epilogue(28)
    parameters = weights(torch.float16)
    for size, fits in (((8, 48), True), ((9, 48), True), ((17, 48), False), ((8, 97), False)):
        x = rand(1, 3, *size, dtype=torch.float16).to(DEVICE)
        _, names = together_and_apart(monkeypatch, plan, parameters, [x])
        assert ("chain_float16" in names) == fits, size


def test_the_chain_of_a_plan_is_described(monkeypatch, on):
    plan, weights, _ = every_epilogue(28)
    parameters, x = weights(torch.float16), rand(1, 3, 9, 9, dtype=torch.float16).to(DEVICE)
    assert "in one launch" not in "".join(described(plan, parameters, [x]))
    monkeypatch.setenv(PERSISTENT, "1")
    lines = described(plan, parameters, [x])
    there = [k for k, line in enumerate(lines) if "in one launch with layers 1 to 6 where" in line]
    assert there == [1, 2, 3, 4, 5, 6]


@only_emulated
def test_layers_that_are_no_chain(monkeypatch, on):
    """float32; other numbers of channels; few of them; reflected borders; a residual from outside in any layout."""
    on("sm_80")
    monkeypatch.setenv(PERSISTENT, "1")

    def pair(cin, middle, out, dtype, residual=False, **options):
        b = PlanBuilder()
        x = b.input(cin)
        more = [b.input(out)] if residual else []
        y = b.add("conv3x3", [x], middle, {"weight": "a"}, **PLAIN, residual_mode="post", **options)
        plan = b.finish([b.add("conv3x3", [y, *more], out, {"weight": "b"}, **PLAIN, residual_mode="post")])
        weights = [kernel(middle, cin, dtype=dtype).to(DEVICE), kernel(out, middle, dtype=dtype).to(DEVICE)]
        inputs = [rand(1, c, 9, 11, dtype=dtype).to(DEVICE) for c in (cin, *([out] if residual else []))]
        launches()
        (got,) = run(plan, weights, inputs)
        exact = F.conv2d(F.conv2d(inputs[0].double(), weights[0].double(), padding=1), weights[1].double(), padding=1)
        exact = exact + inputs[1].double() if residual else exact
        plain = F.conv2d(F.conv2d(inputs[0], weights[0], padding=1), weights[1], padding=1)
        check_close(got, exact, lambda: plain + inputs[1] if residual else plain, "native-cuda")
        return "chain_float16" in launches()

    assert pair(28, 28, 28, torch.float16)
    assert not pair(28, 28, 28, torch.float32)
    assert not pair(28, 36, 28, torch.float16)
    assert not pair(16, 16, 16, torch.float16)
    assert not pair(64, 64, 64, torch.float16)
    assert not pair(28, 28, 28, torch.float16, residual=True)


def test_two_chains_and_their_buffers(monkeypatch, on):
    """A convolution of other channels lies between; what the first chain leaves is read by and after the second."""
    on("sm_80")
    torch.manual_seed(3)
    b = PlanBuilder()
    x = b.add("conv3x3", [b.input(3)], 28, {"weight": "w", "bias": "b"}, **PLAIN, residual_mode="post")
    y, mid, _ = spab_layers(b, x, 28, "a", 28)
    wide = b.add("conv3x3", [y], 40, {"weight": "v"}, **PLAIN, residual_mode="post")
    narrow = b.add("conv3x3", [wide], 28, {"weight": "u"}, **PLAIN, residual_mode="post")
    z, _, inner = spab_layers(b, narrow, 28, "c", 28)
    u = b.add("conv3x3", [z, y], 28, {"weight": "t"}, **PLAIN, residual_mode="post")
    plan = b.finish([b.add("conv1x1", [u, mid, inner, x], 20, {"weight": "s"}, **PLAIN), z])
    dtype = torch.float16
    weights = [kernel(28, 3, dtype=dtype), rand(28, dtype=dtype), *spab_weights((28,) * 4, dtype)]
    weights += [kernel(40, 28, dtype=dtype), kernel(28, 40, dtype=dtype), *spab_weights((28,) * 4, dtype)]
    weights = [w.to(DEVICE) for w in [*weights, kernel(28, 28, dtype=dtype), kernel(20, 112, 1, dtype)]]
    x = rand(2, 3, 21, 35, dtype=dtype).to(DEVICE)
    _, names = together_and_apart(monkeypatch, plan, weights, [x], "random:5")
    if emulated:
        assert names.count("chain_float16") == 2


@pytest.mark.parametrize(("name", "chains"), [("span", 1), ("rlfn", 4)])
def test_whole_networks(monkeypatch, on, shared_models: Path, name, chains):
    """Published weights, a crop of the golden input: the bits of the usual launches, and the golden output's pixels."""
    on("sm_80")
    model, x, expected = published(name, shared_models, "B")
    fast = esr_kernels.optimize(model.to(DEVICE), dtype=torch.float16)
    x = x.half().to(DEVICE)
    with torch.no_grad():
        apart = fast(x)
        monkeypatch.setenv(PERSISTENT, "1")
        launches()
        together = fast(x)
        names = launches()
    assert torch.equal(together, apart)
    if emulated:
        assert names.count("chain_float16") == chains
    assert float((together.float().cpu() - expected).abs().max()) <= 0.01 * model.data_range
