"""Reading and writing pictures."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from esr_kernels import imaging
from esr_kernels.imaging import ImageError, Picture, PngWriter, read_image, write_image

ROOT = Path(__file__).resolve().parent.parent


def noise(height, width, channels, dtype, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("alpha", [False, True])
def test_png_keeps_everything(tmp_path, dtype, channels, alpha):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010E] = "a description"
    transparency = noise(13, 17, 1, dtype, 1)[..., 0] if alpha else None
    picture = Picture(noise(13, 17, channels, dtype), transparency, icc, exif.tobytes())
    write_image(tmp_path / "a.png", picture)
    back = read_image(tmp_path / "a.png")
    assert back.depth == picture.depth and back.grey == picture.grey
    np.testing.assert_array_equal(back.pixels, picture.pixels)
    if alpha:
        np.testing.assert_array_equal(back.alpha, transparency)
    else:
        assert back.alpha is None
    assert back.icc_profile == icc
    loaded = Image.Exif()
    loaded.load(back.exif)
    assert loaded[0x010E] == "a description"


@pytest.mark.parametrize(("name", "quality"), [("a.jpg", 95), ("a.jpeg", 100), ("a.webp", 90), ("a.webp", 100)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossy_formats(tmp_path, name, quality, dtype):
    ramp = np.linspace(0, np.iinfo(dtype).max, 40 * 40).reshape(40, 40, 1).astype(dtype)
    picture = Picture(np.repeat(ramp, 3, 2), icc_profile=b"not checked", exif=None)
    write_image(tmp_path / name, picture, quality=quality)
    back = read_image(tmp_path / name)
    assert back.depth == 8 and back.icc_profile == b"not checked"
    wanted = picture.pixels if dtype == np.uint8 else (picture.pixels / 257).round()
    difference = np.abs(back.pixels.astype(float) - wanted)
    assert difference.max() <= (0 if (name, quality) == ("a.webp", 100) else 6)


def test_grey_jpeg_stays_grey(tmp_path):
    Image.fromarray(noise(20, 20, 1, np.uint8)[..., 0]).save(tmp_path / "g.jpg")
    assert read_image(tmp_path / "g.jpg").grey


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_applied_and_reset(tmp_path, orientation, name):
    from PIL import ImageOps

    image = Image.fromarray(np.kron(noise(4, 6, 3, np.uint8), np.ones((8, 8, 1), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "kept"
    image.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as saved:
        expected = np.asarray(ImageOps.exif_transpose(saved).convert("RGB"))
    picture = read_image(tmp_path / name)
    np.testing.assert_array_equal(picture.pixels, expected)
    again = Image.Exif()
    again.load(picture.exif)
    assert 0x0112 not in again and again[0x010E] == "kept"


def test_deep_png_with_orientation(tmp_path):
    picture = Picture(noise(5, 9, 3, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.png", Picture(picture.pixels, None, None, exif.tobytes()))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, np.rot90(picture.pixels, 3))


def test_palettes_and_transparent_colours(tmp_path):
    rgba = Image.fromarray(np.concatenate([noise(9, 9, 3, np.uint8), noise(9, 9, 1, np.uint8)], -1))
    rgba.convert("P").save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").pixels.shape == (9, 9, 3)
    rgba.quantize(16).save(tmp_path / "pa.png")
    assert read_image(tmp_path / "pa.png").alpha is not None
    Image.fromarray(noise(9, 9, 3, np.uint8)).convert("1").save(tmp_path / "b.png")
    bits = read_image(tmp_path / "b.png")
    assert bits.grey and set(np.unique(bits.pixels)) <= {0, 255}
    pixels = noise(4, 5, 3, np.uint16)
    with (tmp_path / "t.png").open("wb") as file:
        writer = png.Writer(5, 4, greyscale=False, bitdepth=16, transparent=tuple(int(v) for v in pixels[2, 3]))
        writer.write(file, pixels.reshape(4, 15).tolist())
    keyed = read_image(tmp_path / "t.png")
    assert keyed.depth == 16 and keyed.alpha[2, 3] == 0 and keyed.alpha[0, 0] == 65535


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_16_bits_written_by_others(tmp_path, planes, interlace):
    pixels = noise(11, 13, planes, np.uint16)
    with (tmp_path / "a.png").open("wb") as file:
        writer = png.Writer(
            13, 11, greyscale=planes < 3, alpha=planes in (2, 4), bitdepth=16, interlace=interlace, chunk_limit=200
        )
        writer.write(file, pixels.reshape(11, -1).tolist())
    picture = read_image(tmp_path / "a.png")
    colours = 1 if planes < 3 else 3
    np.testing.assert_array_equal(picture.pixels, pixels[..., :colours])
    if planes in (2, 4):
        np.testing.assert_array_equal(picture.alpha, pixels[..., -1])
    else:
        assert picture.alpha is None


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_transparent_grey(tmp_path, bits):
    greys = np.arange(40).reshape(5, 8) % min(2**bits, 20)
    with (tmp_path / "a.png").open("wb") as file:
        png.Writer(8, 5, greyscale=True, bitdepth=bits, transparent=1).write(file, greys.tolist())
    picture = read_image(tmp_path / "a.png")
    assert picture.grey and picture.depth == max(bits, 8)
    np.testing.assert_array_equal(picture.alpha, np.where(greys == 1, 0, picture.largest))
    np.testing.assert_array_equal(picture.pixels[..., 0], greys * (255 // (2**bits - 1) if bits < 8 else 1))


def test_grey_profile_stays_with_greys_only(tmp_path):
    profile = bytes(16) + b"GRAY" + bytes(108)
    for name in ("a.png", "a.jpg", "a.webp"):
        write_image(tmp_path / name, Picture(noise(8, 8, 1, np.uint8), None, profile))
        assert read_image(tmp_path / name).icc_profile == (None if name == "a.webp" else profile)


def test_exif_that_jpeg_cannot_hold_is_left_out(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "d" * 100_000
    picture = Picture(noise(8, 8, 3, np.uint8), None, None, exif.tobytes())
    for name in ("a.jpg", "a.webp", "a.png"):
        write_image(tmp_path / name, picture)
        assert (read_image(tmp_path / name).exif is None) == (name == "a.jpg")


def test_opaque_alpha_does_not_keep_a_picture_from_jpeg(tmp_path):
    alpha = np.full((8, 8), 255, np.uint8)
    write_image(tmp_path / "a.jpg", Picture(noise(8, 8, 3, np.uint8), alpha))
    assert read_image(tmp_path / "a.jpg").alpha is None
    write_image(tmp_path / "a.png", Picture(noise(8, 8, 3, np.uint8), alpha))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").alpha, alpha)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 4),
    depth=st.sampled_from([8, 16]),
    smooth=st.booleans(),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    block=st.sampled_from([1, 100, 2**20]),
)
def test_png_written_row_by_row(height, width, channels, depth, smooth, cuts, block):
    dtype = np.uint8 if depth == 8 else np.uint16
    pixels = noise(height, width, channels, dtype, height * width)
    if smooth:
        pixels = (np.cumsum(pixels % 5, 0, dtype=np.int64) + np.cumsum(pixels % 3, 1, dtype=np.int64)).astype(dtype)
    file = io.BytesIO()
    edges = sorted(min(c, height) for c in cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imaging, "_FILTERED", block)
        writer = PngWriter(file, height, width, channels, depth, b"a profile", None)
        for rows in np.split(pixels, edges):
            writer.write(rows)
        writer.close()
    back_width, back_height, rows, info = png.Reader(bytes=file.getvalue()).read()
    assert (back_width, back_height, info["planes"], info["bitdepth"]) == (width, height, channels, depth)
    np.testing.assert_array_equal(np.array(list(rows)).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_png_filter_is_chosen_and_undone(dtype, channels):
    """Rows for which each filter leaves the least: noise, a ramp, a repeated row, corners that only Paeth follows."""
    step = 37 if dtype == np.uint8 else 37 * 257
    pixels = noise(48, 64, channels, dtype, 1)
    y, x = np.mgrid[:12, :64]
    pixels[12:24] = (np.arange(64) * 3 * (1 if dtype == np.uint8 else 257))[None, :, None]
    pixels[24:36] = pixels[24]
    # Steps along both diagonals: at some the pixel above is the same, at others the one to the left.
    pixels[36:48] = (((x + y) // 4 % 3 + (x - y) // 4 % 3) * step)[..., None]
    file = io.BytesIO()
    writer = PngWriter(file, 48, 64, channels, 8 * pixels.itemsize)
    for part in np.split(pixels, range(5, 48, 5)):
        writer.write(part)
    writer.close()
    _, _, rows, _ = png.Reader(bytes=file.getvalue()).read()
    np.testing.assert_array_equal(np.array(list(rows)).reshape(pixels.shape), pixels)
    data = b"".join(content for kind, content in png.Reader(bytes=file.getvalue()).chunks() if kind == b"IDAT")
    filters = np.frombuffer(zlib.decompress(data), np.uint8).reshape(48, -1)[:, 0]
    assert set(filters.tolist()) == {0, 1, 2, 4}


def test_png_writer_refuses_what_does_not_fit():
    for arguments, message in (
        ((5, 5, 5, 8), r"channels: expected 1\.\.4, got 5"),
        ((5, 5, 3, 12), "depth: expected 8 or 16, got 12"),
        ((0, 5, 3, 8), "height, width: expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PngWriter(io.BytesIO(), *arguments)
    writer = PngWriter(io.BytesIO(), 4, 5, 3, 8)
    with pytest.raises(TypeError, match="rows: expected uint8, got uint16"):
        writer.write(noise(1, 5, 3, np.uint16))
    with pytest.raises(ValueError, match=r"rows: expected \[h, 5, 3\], got shape \[1, 6, 3\]"):
        writer.write(noise(1, 6, 3, np.uint8))
    writer.write(noise(3, 5, 3, np.uint8))
    with pytest.raises(ValueError, match="rows: 1 more make the picture complete, got 2"):
        writer.write(noise(2, 5, 3, np.uint8))
    with pytest.raises(ValueError, match="rows: 1 are missing"):
        writer.close()


@pytest.mark.parametrize(
    ("pixels", "alpha", "error", "message"),
    [
        (np.zeros((4, 4, 3)), None, TypeError, "pixels: expected uint8 or uint16, got float64"),
        (np.zeros((4, 4), np.uint8), None, ValueError, r"pixels: expected \[H, W, 1\] or \[H, W, 3\]"),
        (np.zeros((4, 0, 3), np.uint8), None, ValueError, "pixels: expected"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint16), TypeError, "alpha: expected uint8"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), ValueError, r"alpha: expected \[4, 4\]"),
    ],
)
def test_no_picture(pixels, alpha, error, message):
    with pytest.raises(error, match=message):
        Picture(pixels, alpha)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_colour_spaces_become_rgb(tmp_path, mode):
    Image.new("RGB", (8, 8), (200, 30, 60)).convert(mode).save(tmp_path / "a.jpg", quality=100)
    picture = read_image(tmp_path / "a.jpg")
    assert np.abs(picture.pixels.astype(int) - [200, 30, 60]).max() <= 4


def bomb(width, height, depth=8):
    """A PNG header that promises a huge picture, with almost no data behind it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [8, 16])
def test_enormous_pictures_are_refused_before_decoding(tmp_path, depth):
    (tmp_path / "bomb.png").write_bytes(bomb(50_000, 50_000, depth))
    with pytest.raises(ImageError, match=r"50000 x 50000 is more than 100 million pixels; allow it with --max-pixels"):
        read_image(tmp_path / "bomb.png")
    (tmp_path / "small.png").write_bytes(bomb(20, 20, depth))
    with pytest.raises(ImageError, match=r"more than 0\.0003 million pixels"):
        read_image(tmp_path / "small.png", max_pixels=300)


def test_large_pictures_pass_with_the_flag_and_leave_pillow_alone(tmp_path, monkeypatch):
    """Pillow's limit would refuse what ours allows, and other threads rely on it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    write_image(tmp_path / "a.png", Picture(noise(30, 30, 3, np.uint8)))
    seen = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (seen.append(Image.MAX_IMAGE_PIXELS), load(self))[1])
    assert read_image(tmp_path / "a.png", max_pixels=900).pixels.shape == (30, 30, 3)
    assert set(seen) == {100}


@pytest.mark.parametrize(
    "chunk",
    [
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2,
        b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + bytes(5),
        b"VP8 " + struct.pack("<I", 10) + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383),
    ],
)
def test_webp_is_refused_before_its_decoder_is_made(tmp_path, monkeypatch, chunk):
    from PIL import WebPImagePlugin

    def opened(*args):
        raise AssertionError("the decoder takes memory for the whole picture")

    monkeypatch.setattr(WebPImagePlugin, "WebPImageFile", opened)
    (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk)
    with pytest.raises(ImageError, match="16383 x 16383 is more than 100 million pixels"):
        read_image(tmp_path / "a.webp")


@pytest.mark.parametrize(("options", "size"), [({}, (9, 7)), ({"lossless": True}, (300, 2)), ({"exif": True}, (5, 40))])
def test_webp_size_from_its_header(tmp_path, options, size):
    if options.pop("exif", False):
        exif = Image.Exif()
        exif[0x010E] = "makes the extended format"
        options["exif"] = exif
    Image.new("RGB", size).save(tmp_path / "a.webp", **options)
    assert imaging._webp_size((tmp_path / "a.webp").read_bytes()[:30]) == size


def test_compressed_bomb_in_a_small_picture(tmp_path):
    """A header of 20 x 20 pixels with 300 MB of zeros behind it."""
    deflate = zlib.compressobj(9)
    zeros = b"".join(deflate.compress(bytes(2**20)) for _ in range(300)) + deflate.flush()
    for depth in (8, 16):
        head = struct.pack(">IIBBBBB", 20, 20, depth, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n"
        for kind, content in ((b"IHDR", head), (b"IDAT", zeros), (b"IEND", b"")):
            data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        (tmp_path / f"{depth}.png").write_bytes(data)
    code = (
        "import resource; from esr_kernels import imaging\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = used(); imaging.read_image('8.png'); imaging.read_image('16.png'); print(used() - before)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100, "MiB"


def test_file_too_long_for_its_pixels(tmp_path):
    with (tmp_path / "a.webp").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(ImageError, match=r"a file of 16384 MiB is more than 100 million pixels can need.*--max-pixels"):
        read_image(tmp_path / "a.webp")


def test_not_a_file(tmp_path):
    with pytest.raises(ImageError, match="not a file"):
        read_image(tmp_path)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    write_image(tmp_path / "a.png", Picture(noise(4, 4, 3, np.uint8)))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match="cannot be read: Permission denied"):
        read_image(tmp_path / "a.png")


def test_reading_in_many_threads(tmp_path):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", Picture(noise(40, 30, 3, np.uint16 if i % 2 else np.uint8, i)))
    results = {}

    def read(i):
        results[i] = read_image(tmp_path / f"{i % 4}.png").pixels

    threads = [threading.Thread(target=read, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(16):
        expected = noise(40, 30, 3, np.uint16 if i % 2 else np.uint8, i % 4)
        np.testing.assert_array_equal(results[i], expected)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_image(tmp_path / "nothing.png")


@pytest.mark.parametrize("data", [b"", b"hello", b"GIF89a" + bytes(50), b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_not_pictures(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.png: (not a PNG, JPEG or WebP picture|damaged picture)"):
        read_image(tmp_path / "a.png")


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(noise(8, 8, 3, np.uint8, i)) for i in range(3)]
    for name in ("a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match="an animation of 3 pictures"):
            read_image(tmp_path / name)


def encoded(kind, deep=False):
    buffer = io.BytesIO()
    if deep:
        pixels = noise(12, 11, 3, np.uint16)
        png.Writer(11, 12, greyscale=False, bitdepth=16).write(buffer, pixels.reshape(12, 33).tolist())
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise(12, 11, 3, np.uint8)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


FILES = {"png": encoded("PNG"), "jpg": encoded("JPEG"), "webp": encoded("WEBP"), "deep.png": encoded("PNG", True)}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pictures(tmp_path, name, share):
    data = FILES[name]
    (tmp_path / f"a.{name}").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"damaged picture|not a PNG"):
        read_image(tmp_path / f"a.{name}")


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mutated_pictures_never_raise_anything_else(tmp_path, name, changes):
    data = bytearray(FILES[name])
    for position, value in changes:
        data[position % len(data)] = value
    file = tmp_path / f"a.{name}"
    file.write_bytes(data)
    message = ""
    try:
        assert read_image(file, max_pixels=10**6).pixels.ndim == 3
    except ImageError as error:
        message = str(error)
    assert "\n" not in message


def test_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    picture = Picture(noise(30, 30, 3, np.uint8))
    write_image(target, picture)
    before = target.read_bytes()

    def full_disk(file, *rest):
        file.write(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imaging, "_encode", full_disk)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written: No space left on device"):
        write_image(target, picture)

    def interrupted(file, *rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(imaging, "_encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(target, picture)
    assert target.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("name", "picture", "message"),
    [
        ("a.gif", Picture(noise(4, 4, 3, np.uint8)), "unknown extension '.gif', expected one of .png"),
        ("no/a.png", Picture(noise(4, 4, 3, np.uint8)), "there is no folder"),
        ("a.jpg", Picture(noise(4, 4, 3, np.uint8), noise(4, 4, 1, np.uint8)[..., 0]), "JPEG holds no transparency"),
        ("a.webp", Picture(np.zeros((2, 16384, 3), np.uint8)), "WEBP holds at most 16383 pixels a side"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, picture, message):
    with pytest.raises(ImageError, match=message):
        write_image(tmp_path / name, picture)


def test_longest_file_name(tmp_path):
    name = "n" * 251 + ".png"
    write_image(tmp_path / name, Picture(noise(4, 4, 3, np.uint8)))
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(ImageError, match=r"cannot be written: File name too long"):
        write_image(tmp_path / ("n" + name), Picture(noise(4, 4, 3, np.uint8)))


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ImageError, match="is a folder"):
        write_image(tmp_path / "a.png", Picture(noise(4, 4, 3, np.uint8)))
    with pytest.raises(ImageError, match=r"quality: expected 1\.\.100, got 0"):
        write_image(tmp_path / "b.png", Picture(noise(4, 4, 3, np.uint8)), quality=0)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_conversion_round_trip(data_range, dtype, channels):
    picture = Picture(noise(7, 9, channels, dtype))
    x = imaging.to_tensor(picture, data_range)
    assert x.shape == (1, 3, 7, 9) and x.dtype == torch.float32
    assert float(x.max()) <= data_range
    np.testing.assert_array_equal(imaging.quantize(x, data_range, picture.depth, picture.grey), picture.pixels)


def test_part_of_a_picture():
    picture = Picture(noise(9, 12, 3, np.uint16))
    whole = imaging.to_tensor(picture, 1.0)
    assert torch.equal(imaging.to_tensor(picture, 1.0, slice(2, 7), slice(3, 12)), whole[:, :, 2:7, 3:12])


def test_rounding_is_half_to_even_and_clamped():
    x = torch.tensor([-3.0, 0.5, 1.5, 2.5, 254.6, 300.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert imaging.quantize(x, 255.0, 8, True)[0, :, 0].tolist() == [0, 0, 2, 2, 255, 255]


def test_transparency_is_resized():
    opaque = np.full((5, 6), 65535, np.uint16)
    assert (imaging.resize_alpha(opaque, 20, 24) == 65535).all()
    ramp = np.tile(np.linspace(0, 255, 6).astype(np.uint8), (5, 1))
    resized = imaging.resize_alpha(ramp, 20, 24)
    assert resized.shape == (20, 24) and resized.dtype == np.uint8 and (np.diff(resized[10].astype(int)) >= 0).all()
