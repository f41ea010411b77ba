"""Resizing with MATLAB's meaning, pairs of patches, losses, schedules, averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from esr_kernels import imaging
from esr_kernels.imaging import ImageError, Picture, write_image
from esr_kernels.training import evaluate, losses
from esr_kernels.training.config import ConfigError
from esr_kernels.training.data import Crops, Pictures, batches, find_pictures, worker_count
from esr_kernels.training.ema import EMA
from esr_kernels.training.resize import bicubic, downscale, resize, taps, to_8_bits
from esr_kernels.training.schedules import Schedule


def picture(height, width, channels=3, seed=0, dtype=np.uint8):
    generator = np.random.default_rng(seed)
    return generator.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def save(path, pixels, alpha=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, Picture(pixels, alpha))
    return path


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate([(40, 44), (51, 37), (64, 48)]):
        save(tmp_path / "hr" / f"{i}.png", picture(*size, seed=i))
    return tmp_path / "hr"


# --- resizing ------------------------------------------------------------------------------------------------------


def cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def slow_matrix(length, resized):
    """[resized, length] from the definition, one source pixel and one mirror image after the other."""
    scale = resized / length
    shrink = min(1.0, scale)
    matrix = np.zeros((resized, length))
    for out in range(resized):
        centre = (out + 0.5) / scale - 0.5
        for i in range(-3 * length, 4 * length):
            weight = cubic(shrink * (centre - i))
            folded = i % (2 * length)
            matrix[out, folded if folded < length else 2 * length - 1 - folded] += weight
        matrix[out] /= matrix[out].sum()
    return matrix


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((36, 52), (9, 13)),
        ((9, 13), (36, 52)),
        ((30, 21), (15, 7)),
        ((17, 23), (11, 31)),
        ((4, 8), (1, 2)),
        ((5, 3), (5, 3)),
    ],
)
def test_resize_is_the_definition(size, resized):
    pixels = np.random.default_rng(0).random((*size, 3))
    rows, columns = slow_matrix(size[0], resized[0]), slow_matrix(size[1], resized[1])
    expected = np.einsum("ai,ijc,bj->abc", rows, pixels, columns)
    np.testing.assert_allclose(resize(pixels, *resized), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(resize(pixels[..., 0], *resized), expected[..., 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("resized", [(16, 24), (256, 384), (21, 50)])
def test_resize_is_pillows_away_from_the_border(resized):
    """Pillow has the same kernel; beyond the border it has nothing instead of the mirror image."""
    pixels = picture(64, 96, 1)[..., 0].astype(np.float32)
    theirs = np.asarray(Image.fromarray(pixels).resize(resized[::-1], Image.Resampling.BICUBIC))
    reach = [math.ceil(2 * max(1, r / s)) + 1 for r, s in zip(resized, pixels.shape, strict=True)]
    inner = tuple(slice(r, -r) for r in reach)
    np.testing.assert_allclose(resize(pixels, *resized)[inner], theirs[inner], rtol=0, atol=2e-3)


def test_resize_keeps_constants_and_mirrors():
    assert np.array_equal(to_8_bits(resize(np.full((21, 33), 77), 5, 8)), np.full((5, 8), 77))
    pixels = picture(32, 48)
    assert np.array_equal(downscale(pixels[::-1], 4), downscale(pixels, 4)[::-1])
    assert np.array_equal(downscale(np.rot90(pixels), 4), np.rot90(downscale(pixels, 4)))


def test_weights_sum_to_one_and_no_tap_is_idle():
    for length, resized in [(64, 16), (16, 64), (100, 33), (7, 9)]:
        indices, weights = taps(length, resized)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
        assert indices.min() >= 0 and indices.max() < length and (weights != 0).any(0).all()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_part_is_part_of_the_whole(scale):
    pixels = picture(24 * scale, 30 * scale)
    whole = downscale(pixels, scale)
    for top, left, height, width in [(0, 0, 24, 30), (0, 21, 9, 9), (15, 0, 9, 1), (7, 11, 8, 8), (23, 29, 1, 1)]:
        rows, columns = slice(top, top + height), slice(left, left + width)
        assert np.array_equal(downscale(pixels, scale, rows, columns), whole[rows, columns])


def test_halves_are_rounded_upwards_and_overshoot_is_clamped():
    assert to_8_bits(np.array([-9.0, 0.49, 0.5, 1.5, 254.5, 300.0])).tolist() == [0, 0, 1, 2, 255, 255]
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    assert bicubic(edge, 4).min() == 0 and bicubic(edge, 4).max() == 255


def test_resize_refuses():
    with pytest.raises(ValueError, match=r"pixels: expected \[H, W\]"):
        resize(np.zeros(4), 2, 2)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        resize(np.zeros((0, 4)), 2, 2)
    with pytest.raises(ValueError, match="begin, end"):
        resize(np.zeros((4, 4)), 2, 2, slice(2, 2))
    with pytest.raises(ValueError, match="multiples of 4"):
        downscale(np.zeros((8, 9, 3), np.uint8), 4)
    with pytest.raises(TypeError, match="uint8"):
        downscale(np.zeros((8, 8, 3)), 4)


# --- pictures ------------------------------------------------------------------------------------------------------


def test_patches_are_parts_of_the_picture_and_of_its_small_version(folder):
    paths = find_pictures([folder], "data.train")
    pictures = Pictures(paths, scale=4, smallest=16)
    assert [pictures.shape(i) for i in range(3)] == [(40, 44), (48, 36), (64, 48)]
    crops = Crops(pictures, patch=16, scale=4, seed=3, augment=False)
    for n in range(12):
        low, high = (t.permute(1, 2, 0).numpy() for t in crops[n])
        assert low.shape == (4, 4, 3) and high.shape == (16, 16, 3)
        found = 0
        for i in range(3):
            pixels = pictures.pixels(i)
            small = downscale(pixels, 4)
            for top in range(small.shape[0] - 3):
                for left in range(small.shape[1] - 3):
                    if np.array_equal(pixels[4 * top : 4 * top + 16, 4 * left : 4 * left + 16], high):
                        assert np.array_equal(small[top : top + 4, left : left + 4], low)
                        found += 1
        assert found == 1


def test_augmentation_turns_both_alike_in_eight_ways(tmp_path):
    save(tmp_path / "a.png", picture(16, 16))
    pictures = Pictures([tmp_path / "a.png"], scale=4, smallest=16)
    crops = Crops(pictures, patch=16, scale=4, seed=0)
    seen = set()
    for n in range(64):
        low, high = (t.permute(1, 2, 0).numpy() for t in crops[n])
        assert np.array_equal(downscale(np.ascontiguousarray(high), 4), low)
        seen.add(high.tobytes())
    assert len(seen) == 8


def test_samples_depend_on_the_seed_and_their_number_alone(folder):
    pictures = Pictures(find_pictures([folder], "data.train"), scale=4, smallest=16, cache_bytes=1 << 20)
    pictures.load()

    def drawn(world, workers, begin=0):
        parts = []
        for rank in range(world):
            crops = Crops(pictures, patch=16, scale=4, seed=1)
            got = list(batches(crops, begin=begin, batch=4, count=3, rank=rank, world=world, workers=workers))
            parts.append(torch.stack([high for _, high in got]))
        return torch.cat(parts, 1)

    once = drawn(1, 0)
    assert torch.equal(once, drawn(1, 2)) and torch.equal(once, drawn(2, 0))
    assert torch.equal(once[1:], drawn(1, 0, begin=4)[:2])
    other = Crops(pictures, patch=16, scale=4, seed=2)
    assert not torch.equal(once[0], torch.stack([other[n][1] for n in range(4)]))


def test_every_picture_is_drawn_before_any_is_drawn_again(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    pictures = Pictures(find_pictures([tmp_path], "data.train"), scale=4, smallest=16)
    crops = Crops(pictures, patch=16, scale=4, seed=0)
    for epoch in range(3):
        assert sorted(int(crops[n][1][0, 0, 0]) for n in range(5 * epoch, 5 * epoch + 5)) == list(range(5))


def test_a_picture_is_decoded_once_while_memory_lasts(folder, monkeypatch):
    read = []
    monkeypatch.setattr(imaging, "read_image", lambda path, inner=imaging.read_image: read.append(path) or inner(path))
    paths = find_pictures([folder], "data.train")
    pictures = Pictures(paths, scale=4, smallest=16, cache_bytes=(40 * 44 + 48 * 36) * 3)
    assert pictures.load() == 2 and len(read) == 2
    for _ in range(3):
        for i in range(3):
            pictures.pixels(i)
    assert len(read) == 2 + 3 and read[2:] == [paths[2]] * 3


def test_reduced_sizes(folder):
    pictures = Pictures(find_pictures([folder], "data.train"), scale=4, smallest=32, sizes=(1.0, 0.8))
    assert [pictures.shape(i) for i in range(len(pictures))] == [(40, 44), (32, 32), (48, 36), (64, 48), (48, 36)]
    whole = imaging.read_image(folder / "0.png").pixels
    assert np.array_equal(pictures.pixels(1), to_8_bits(resize(whole, 32, 32)))


def test_kinds_are_told_from_the_header(tmp_path):
    cases = {
        "RGB": (picture(8, 6), None),
        "grey": (picture(8, 6, 1), None),
        "RGB with alpha": (picture(8, 6), picture(8, 6, 1)[..., 0]),
        "grey with alpha": (picture(8, 6, 1), picture(8, 6, 1)[..., 0]),
        "RGB of 16 bits": (picture(8, 6, 3, dtype=np.uint16), None),
        "grey of 16 bits": (picture(8, 6, 1, dtype=np.uint16), None),
        "RGB with alpha of 16 bits": (picture(8, 6, 3, dtype=np.uint16), picture(8, 6, 1, dtype=np.uint16)[..., 0]),
    }
    for kind, (pixels, alpha) in cases.items():
        assert imaging.image_kind(save(tmp_path / f"{kind}.png", pixels, alpha)) == (8, 6, kind)
    turned = Image.fromarray(picture(8, 6))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert imaging.image_kind(tmp_path / "turned.jpg") == (6, 8, "RGB")
    Image.fromarray(picture(8, 6)).convert("P").save(tmp_path / "palette.png")
    assert imaging.image_kind(tmp_path / "palette.png") == (8, 6, "palette")
    with pytest.raises(FileNotFoundError):
        imaging.image_kind(tmp_path / "none.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ImageError, match=r"bad\.png"):
        imaging.image_kind(tmp_path / "bad.png")


def test_other_kinds_are_converted_when_wanted(tmp_path):
    grey, deep = picture(16, 16, 1), picture(16, 16, 3, dtype=np.uint16)
    opaque = np.full((16, 16), 255, np.uint8)
    colour = picture(16, 16)
    paths = [save(tmp_path / "a.png", grey), save(tmp_path / "b.png", deep), save(tmp_path / "c.png", colour, opaque)]
    got = Pictures(paths, scale=4, smallest=16, convert=True)
    assert np.array_equal(got.pixels(0), np.repeat(grey, 3, 2)) and np.array_equal(got.pixels(2), colour)
    assert np.array_equal(got.pixels(1), np.rint(deep / 257).astype(np.uint8))
    see_through = save(tmp_path / "d.png", colour, picture(16, 16, 1)[..., 0])
    with pytest.raises(ImageError, match=r"d\.png: has transparent pixels"):
        Pictures([see_through], scale=4, smallest=16, convert=True).pixels(0)


def test_bad_pictures(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.train: no pictures .* in folder .*empty"):
        find_pictures([folder, tmp_path / "empty"], "data.train")
    with pytest.raises(FileNotFoundError, match=r"data\.train: .*nowhere"):
        find_pictures([tmp_path / "nowhere"], "data.train")
    paths = find_pictures([folder, folder / "0.png"], "data.train")
    assert len(paths) == 3
    with pytest.raises(ConfigError, match=r"2 of 3 pictures are smaller than 48 x 48.*0\.png \(44 x 40\)"):
        Pictures(paths, scale=4, smallest=48)
    mixed = [*paths, save(tmp_path / "grey.png", picture(32, 32, 1))]
    with pytest.raises(ConfigError, match=r"mixed kinds of pictures: 3 RGB \(0\.png, \.\.\.\), 1 grey \(grey\.png\)"):
        Pictures(mixed, scale=4, smallest=16)
    with pytest.raises(ConfigError, match="not 8-bit RGB: 1 grey"):
        Pictures(mixed[3:], scale=4, smallest=16)


def test_workers_leave_the_cores_of_a_cpu_to_the_network():
    assert worker_count(3, "cpu", 1) == 3 and worker_count(0, "cuda", 1) == 0
    assert worker_count(-1, "cpu", 1) == 0
    assert 1 <= worker_count(-1, "cuda", 1) <= 8


# --- measures ------------------------------------------------------------------------------------------------------


def test_psnr_leaves_out_four_pixels_a_side():
    a = picture(20, 24)
    b = a.copy()
    b[:4], b[-4:], b[:, :4], b[:, -4:] = 0, 0, 0, 0
    assert evaluate.psnr(a, b) == math.inf
    b = np.clip(a.astype(int) + np.where(np.arange(24) % 2, 3, 0)[None, :, None], 0, 255).astype(np.uint8)
    error = np.mean((a[4:-4, 4:-4].astype(float) - b[4:-4, 4:-4]) ** 2)
    assert evaluate.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        evaluate.psnr(a, b[:-1])
    with pytest.raises(ValueError, match="nothing is left"):
        evaluate.psnr(a[:8], b[:8])


def test_losses_are_their_formulas():
    x, y = np.random.default_rng(0).random((2, 3, 3, 10, 7))
    d = x - y
    spectrum = np.fft.rfft2(d, norm="ortho")
    expected = {
        "l1": np.abs(d).mean(),
        "l2": (d**2).mean(),
        "charbonnier": np.sqrt(d**2 + 1e-6).mean(),
        "fft": (np.abs(spectrum.real).mean() + np.abs(spectrum.imag).mean()) / 2,
        "psnr": np.mean([10 * np.log10((e**2).mean() + 1e-8) for e in d]),
    }
    a, b = torch.from_numpy(x), torch.from_numpy(y)
    assert losses.LOSSES.keys() == expected.keys()
    for name, value in expected.items():
        assert float(losses.LOSSES[name](a, b)) == pytest.approx(value, rel=1e-12)
        assert float(losses.WeightedLoss({name: 1.0}, 255.0)(a * 255, b * 255)) == pytest.approx(value, rel=1e-9)
    both = losses.WeightedLoss({"l1": 0.5, "fft": 0.1})
    assert float(both(a, b)) == pytest.approx(0.5 * expected["l1"] + 0.1 * expected["fft"])


@pytest.mark.parametrize("name", list(losses.LOSSES))
def test_losses_have_gradients_also_where_nothing_differs(name):
    x = torch.rand(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: losses.LOSSES[name](a, torch.zeros_like(a)), x)
    loss = losses.LOSSES[name](x, x.detach())
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool(torch.isfinite(gradient).all()) and math.isfinite(float(loss))


def test_half_types_are_compared_in_float32():
    x, y = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    loss = losses.WeightedLoss({"l2": 1.0})(x.half(), y)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float((x.half().float() - y).square().mean()), rel=1e-6)


def test_losses_refuse():
    with pytest.raises(ValueError, match="unknown 'charbonier', did you mean 'charbonnier'"):
        losses.WeightedLoss({"charbonier": 1.0})
    with pytest.raises(ValueError, match="factor of 'l1'"):
        losses.WeightedLoss({"l1": -1.0})
    with pytest.raises(ValueError, match="at least one"):
        losses.WeightedLoss({})


# --- schedules, averages -------------------------------------------------------------------------------------------


def reference(scheduler, count):
    """Rates of one of PyTorch's schedulers."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    made = scheduler(optimizer)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [
        (Schedule(), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        (Schedule("step", every=7), lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.5)),
        (
            Schedule("multistep", milestones=(3, 20), factor=0.1),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 20]),
        ),
        (Schedule("cosine", minimum=1e-3), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30, 1e-3)),
        (Schedule("cosine", period=10), lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 10)),
    ],
)
def test_schedules_are_pytorchs(schedule, scheduler):
    rates = [schedule.rate(i, 0.1, 30) for i in range(30)]
    np.testing.assert_allclose(rates, reference(scheduler, 30), rtol=1e-9)


def test_warm_up():
    schedule = Schedule("cosine", warmup=4)
    rates = [schedule.rate(i, 0.1, 12) for i in range(12)]
    np.testing.assert_allclose(rates[:5], [0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "linear"}, r"schedule\.name: unknown 'linear'"),
        ({"name": "step"}, r"schedule\.every"),
        ({"name": "multistep", "milestones": (5, 5)}, r"schedule\.milestones"),
        ({"factor": 0.0}, r"schedule\.factor"),
        ({"minimum": -1.0}, r"schedule\.minimum"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_schedules_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**values)


def test_ema_is_its_formula():
    model = torch.nn.BatchNorm2d(2)
    ema = EMA(model, 0.5)
    expected = {k: v.clone().double() for k, v in model.state_dict().items()}
    for n in range(12):
        with torch.no_grad():
            model.weight.add_(torch.rand(2))
        model(torch.rand(2, 2, 3, 3))
        ema.update(model)
        decay = min(0.5, (1 + n) / (10 + n))
        for k, v in model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v.double()
    for k, v in ema.averages.items():
        if v.is_floating_point():
            torch.testing.assert_close(v.double(), expected[k], rtol=1e-5, atol=1e-6)
    assert int(ema.averages["num_batches_tracked"]) == 12
    other = EMA(torch.nn.BatchNorm2d(2), 0.5)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 12 and all(torch.equal(v, other.averages[k]) for k, v in ema.averages.items())
    with pytest.raises(ValueError, match="decay"):
        EMA(model, 1.0)
