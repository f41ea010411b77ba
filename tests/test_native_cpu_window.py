"""window_attention on the native CPU backend: every instruction set, threads, and what the engine refuses."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import HALF, LAYOUTS, rand
from test_native_cpu import _restore, capability, pytestmark  # noqa: F401
from test_window_attention import check, everything, maps

import esr_kernels
from esr_kernels.functional import window_attention


@pytest.fixture(autouse=True)
def native_cpu():
    with esr_kernels.use_backend("native-cpu"):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set(capability, layout):  # noqa: F811
    torch.manual_seed(8)
    for channels, heads, window, size in (
        (20, 1, (7, 7), (14, 14)),
        (26, 2, (4, 16), (8, 32)),
        (9, 9, (3, 5), (6, 15)),
        (24, 3, (8, 8), (16, 8)),
    ):
        for dtype in (torch.float32, *HALF):
            tensors = maps(channels, size, dtype=dtype, layout=layout)
            check("native-cpu", tensors, window, heads)
            check("native-cpu", tensors, window, heads, **everything(channels, heads, window, dtype, layout, size))


def test_sizes_at_random(capability):  # noqa: F811
    r = random.Random(1)
    for layout in LAYOUTS * 5:
        heads, depth = r.randint(1, 4), r.randint(1, 40)
        window = (r.randint(1, 12), r.randint(1, 20))
        size = (window[0] * r.randint(1, 3), window[1] * r.randint(1, 3))
        tensors = maps(heads * depth, size, layout=layout)
        check("native-cpu", tensors, window, heads)
        settings = everything(heads * depth, heads, window, layout=layout, size=size)
        settings["shift"] = (r.randrange(window[0]), r.randrange(window[1]))
        check("native-cpu", tensors, window, heads, **settings)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_threads_and_batches_do_not_change_bits(layout):
    torch.manual_seed(9)
    tensors = maps(30, (64, 96), batch=3, layout=layout)
    settings = everything(30, 3, (8, 8), layout=layout, size=(64, 96), batch=3)
    expected = window_attention(*tensors, (8, 8), 3, **settings)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(window_attention(*tensors, (8, 8), 3, **settings), expected)
    one = {**settings, "residual": settings["residual"][1:2]}
    assert torch.equal(window_attention(*(t[1:2] for t in tensors), (8, 8), 3, **one), expected[1:2])


def test_the_engine_refuses_wrong_arguments():
    x = rand(1, 6, 4, 8)
    good = {
        "q": x, "k": x, "v": x, "bias": None, "scales": None, "residual": None, "window": [2, 4], "heads": 2,
        "scale": 1.0, "cosine": False, "shift": [0, 0], "mask": 0.0, "outputs": [torch.empty_like(x)],
    }  # fmt: skip
    for change, message in (
        ({"k": x[:, :5]}, "k is"),
        ({"residual": x[:, :5]}, "residual is"),
        ({"bias": rand(2, 8, 7)}, "bias is"),
        ({"scales": rand(3)}, "scale is"),
        ({"window": [3, 4]}, "maps of 4x8 pixels are no whole windows of 3x4"),
        ({"window": [4]}, "window must be two numbers of at least 1"),
        ({"window": [0, 4]}, "window must be two numbers of at least 1"),
        ({"heads": 4}, "6 channels are no whole number for each of 4 heads"),
        ({"shift": [2, 0]}, "shift must be two numbers"),
        ({"outputs": []}, "0 results given, must be 1"),
        ({"outputs": [torch.empty(0)]}, "the result has 1 dimensions"),
        ({"outputs": [x[:, :5]]}, "the result is"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.esr_native.window_attention(**(good | change))
