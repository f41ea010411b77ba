"""Tiles cover the picture exactly once, and give what the whole picture gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import esr_kernels
import python_models
from esr_kernels.tiling import AUTO_PIXELS, exact_overlap, plan_tiles, tile_size, upscale_tensor, upscale_tiles


class Network(nn.Module):
    """Three convolutions and a pixel shuffle in float64."""

    scale, minimum_size, receptive_radius = 2, 1, 3

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(5, 5, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(5, 12, 3, padding=1),
            nn.PixelShuffle(2),
        ).double()
        self.calls = []

    def forward(self, x):
        self.calls.append(tuple(x.shape[2:]))
        return self.body(x)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    tile=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    overlap=st.integers(0, 6),
)
def test_tiles_cover_every_pixel_once(height, width, tile, overlap):
    tile, overlap = (8 * tile[0], 8 * tile[1]), 8 * overlap
    covered = torch.zeros(height, width, dtype=torch.int32)
    for t in plan_tiles(height, width, tile, overlap):
        covered[t.top : t.bottom, t.left : t.right] += 1
        assert t.window_top % 8 == 0 and t.window_left % 8 == 0
        assert t.window_top in (0, t.top - overlap) and t.window_bottom in (height, t.bottom + overlap)
        assert 0 <= t.window_left <= t.left < t.right <= t.window_right <= width
    assert (covered == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (7, 40), (33, 41), (48, 32)])
@pytest.mark.parametrize("tile", [8, 16, 40, "auto", None])
def test_tiled_equals_untiled(size, tile):
    model = Network()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    whole = model(x)
    torch.testing.assert_close(upscale_tensor(model, x, tile=tile), whole, rtol=1e-12, atol=1e-12)


def test_too_little_overlap_shows():
    model = Network()
    x = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    assert (upscale_tensor(model, x, tile=16, overlap=0) - model(x)).abs().max() > 1e-3


@pytest.mark.skipif(
    not any(b.name == "native-cpu" and b.available for b in esr_kernels.list_backends()), reason="no compiled library"
)
@pytest.mark.parametrize("tile", [64, 96])
def test_native_backend_is_bit_equal(tile):
    torch.manual_seed(0)
    model = esr_kernels.optimize(python_models.create("span"))
    assert exact_overlap(model) == 88
    x = torch.rand(1, 3, 203, 150)
    with esr_kernels.use_backend("native-cpu"):
        assert torch.equal(upscale_tensor(model, x, tile=tile), upscale_tensor(model, x, tile=None))


def test_a_network_without_a_bound_is_close():
    torch.manual_seed(0)
    model = esr_kernels.optimize(python_models.create("rlfn"))
    assert exact_overlap(model) == 64
    x = torch.rand(1, 3, 140, 100) * 255
    whole, tiled = upscale_tensor(model, x, tile=None), upscale_tensor(model, x, tile=80)
    assert 0 < (tiled - whole).abs().max() < 0.05 * whole.abs().max()


def test_automatic_choice_is_bounded():
    for height, width in ((100, 100), (1024, 1024), (1025, 1024), (20_000, 20_000), (50, 100_000), (100_000, 50)):
        for overlap in (0, 64, 88, 168):
            tile = tile_size(height, width, "auto", overlap)
            tiles = plan_tiles(height, width, tile, overlap)
            largest = max((t.window_bottom - t.window_top) * (t.window_right - t.window_left) for t in tiles)
            assert largest <= AUTO_PIXELS
    assert tile_size(1000, 1000, "auto", 88) == (1000, 1000)


def test_progress_and_order():
    model, seen = Network(), []
    x = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    parts = list(upscale_tiles(model, x, tile=16, progress=lambda done, total: seen.append((done, total))))
    assert [(top, left) for top, left, _ in parts] == [(0, 0), (0, 32), (32, 0), (32, 32)]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert model.calls == [(20, 20)] * 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tile": 12}, ValueError, "tile: expected a multiple of 8 pixels, got 12"),
        ({"tile": 0}, ValueError, "tile: expected a multiple of 8 pixels, got 0"),
        ({"tile": "big"}, TypeError, 'tile: expected a number of pixels, "auto" or None'),
        ({"overlap": 3}, ValueError, "overlap: expected a multiple of 8 pixels, got 3"),
        ({"overlap": -8}, ValueError, "overlap: expected a multiple of 8 pixels"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        upscale_tensor(Network(), torch.zeros(1, 3, 20, 20, dtype=torch.float64), **options)


def test_small_pictures_and_small_tiles():
    model = Network()
    model.minimum_size = 15
    with pytest.raises(ValueError, match="the network needs pictures of at least 15 x 15 pixels, got 14 x 20"):
        upscale_tensor(model, torch.zeros(1, 3, 14, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match="tile: tiles and their overlap must reach 15 pixels"):
        upscale_tensor(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64), tile=8, overlap=0)
    with pytest.raises(ValueError, match="x: expected 4 dimensions"):
        upscale_tensor(model, torch.zeros(3, 64, 64, dtype=torch.float64))
