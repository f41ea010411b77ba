"""Large pictures: read, upscaled and written a few rows at a time, and what happens when that is stopped half way."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
import torch
from helpers import environment, in_new_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import python_models
from esr_kernels import imaging, memory, streaming, tiling
from esr_kernels.cli import main
from esr_kernels.commands import upscale
from esr_kernels.imaging import Picture, read_image, write_image
from esr_kernels.streaming import PngRows, WholePicture, open_rows

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"grey": (1, False), "grey with alpha": (1, True), "colour": (3, False), "colour with alpha": (3, True)}


def picture(height, width, kind="colour", dtype=np.uint8, seed=0):
    """Shades with some noise, so that every PNG filter has rows to which it suits."""
    generator = np.random.default_rng(seed)
    colours, alpha = KINDS[kind]
    y, x = np.mgrid[:height, :width]
    shades = np.stack([y * 3 + x, y + x * 2, y * x // 7, x * 5 - y][: colours + alpha], -1) % 251
    shades = shades + generator.integers(0, 3, shades.shape) * (y[..., None] // 8 % 2)
    values = (shades * (1 if dtype == np.uint8 else 257)).astype(dtype)
    return Picture(values[..., :colours], values[..., -1] if alpha else None, b"a profile")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small SPAN checkpoint."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(python_models.create("span", feature_channels=4, num_blocks=1).state_dict(), file)
    return file


@pytest.fixture
def small_tiles(monkeypatch):
    """Pictures of few pixels count as large, their tiles as small."""
    for module in (tiling, upscale):
        monkeypatch.setattr(module, "AUTO_PIXELS", 2**14)
    monkeypatch.setattr(tiling, "BAND_PIXELS", 2**11)
    monkeypatch.setattr(streaming, "_STRIP", 2**10)


# --- reading --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(list(KINDS)),
    deep=st.booleans(),
    size=st.tuples(st.integers(1, 60), st.integers(1, 40)),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12),
    strip=st.sampled_from([1, 100, 2**22]),
    by=st.sampled_from(["Pillow", "PngWriter", "pypng"]),
)
def test_rows_are_those_of_the_whole_picture(tmp_path, kind, deep, size, steps, strip, by):
    whole = picture(*size, kind, np.uint16 if deep else np.uint8)
    file = tmp_path / "a.png"
    if by == "pypng":
        planes = imaging._planes(whole, slice(None))
        options = {"greyscale": whole.grey, "alpha": whole.alpha is not None, "bitdepth": whole.depth}
        with file.open("wb") as out:
            png.Writer(size[1], size[0], **options).write(out, planes.reshape(size[0], -1).tolist())
    elif by == "PngWriter":
        with file.open("wb") as out:
            streaming_writer = imaging.PngWriter(out, *size, 1 + 2 * (not whole.grey) + KINDS[kind][1], whole.depth)
            streaming_writer.write(imaging._planes(whole, slice(None)))
            streaming_writer.close()
    else:
        write_image(file, whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_STRIP", strip)
        with open_rows(file) as rows:
            assert isinstance(rows, PngRows)
            assert (rows.height, rows.width, rows.grey, rows.depth) == (*size, whole.grey, whole.depth)
            assert rows.has_alpha == (whole.alpha is not None)
            top = 0
            for back, count, skipped in steps:
                top = max(top - min(back, streaming.KEPT_ABOVE), 0)
                bottom = min(top + count, size[0])
                part = rows.read(top, bottom)
                np.testing.assert_array_equal(part.pixels, whole.pixels[top:bottom])
                if whole.alpha is not None:
                    np.testing.assert_array_equal(part.alpha, whole.alpha[top:bottom])
                top = min(top + count // 2 + skipped, size[0] - 1)


def test_rows_that_were_given_up_cannot_be_read_again(tmp_path):
    write_image(tmp_path / "a.png", picture(60, 20))
    with open_rows(tmp_path / "a.png") as rows:
        rows.read(30, 40)
        with pytest.raises(ValueError, match=r"rows 10\.\.20: rows 22\.\.60 are left"):
            rows.read(10, 20)
        with pytest.raises(ValueError, match=r"rows 50\.\.61"):
            rows.read(50, 61)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_what_rows_cannot_show_alone_is_decoded_as_a_whole(tmp_path):
    """Interlacing, palettes, transparent colours, orientation, and what a file tells after its pixels."""
    pixels = picture(20, 30).pixels
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.convert("P").save(tmp_path / "palette.png")
    image.save(tmp_path / "transparent.png", transparency=(1, 2, 3))
    image.save(tmp_path / "a.jpg")
    with (tmp_path / "interlaced.png").open("wb") as out:
        png.Writer(30, 20, greyscale=False, interlace=True).write(out, pixels.reshape(20, -1).tolist())
    image.save(buffer, "PNG")
    end = chunk(b"IEND", b"")
    (tmp_path / "late.png").write_bytes(buffer.getvalue().removesuffix(end) + chunk(b"eXIf", exif.tobytes()[6:]) + end)
    for file in sorted(tmp_path.iterdir()):
        with open_rows(file) as rows:
            assert isinstance(rows, WholePicture), file.name
            np.testing.assert_array_equal(rows.read(3, 9).pixels, read_image(file).pixels[3:9])
    assert read_image(tmp_path / "late.png").height == 30
    image.save(tmp_path / "plain.png")
    with open_rows(tmp_path / "plain.png", above=600) as rows:
        assert isinstance(rows, WholePicture)
    with open_rows(tmp_path / "plain.png", above=599) as rows:
        assert isinstance(rows, PngRows)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_damage_half_way_is_one_line_and_the_old_result_stays(tmp_path, weights, small_tiles, capsys, share):
    write_image(tmp_path / "a.png", picture(300, 200, seed=1))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: int(len(data) * share)])
    (tmp_path / "b.png").write_bytes(b"old")
    argv = ["upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights, "--overwrite"]
    assert main([str(a) for a in argv]) == 1
    errors = capsys.readouterr().err
    assert errors == f"error: {tmp_path / 'a.png'}: damaged picture: image file is truncated\n"
    assert (tmp_path / "b.png").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


# --- upscaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_result_is_that_of_the_whole_picture(tmp_path, weights, small_tiles, monkeypatch, kind, dtype):
    write_image(tmp_path / "a.png", picture(230, 190, kind, dtype))
    argv = ["upscale", str(tmp_path / "a.png"), "--weights", str(weights)]
    shapes, write = [], imaging.PngWriter.write
    monkeypatch.setattr(imaging.PngWriter, "write", lambda self, rows: [shapes.append(rows.shape), write(self, rows)])
    assert main([*argv, "-o", str(tmp_path / "streamed.png")]) == 0
    assert len(shapes) > 10 and sum(s[0] for s in shapes) == 920, "written in bands of rows"
    assert main([*argv, "-o", str(tmp_path / "whole.png"), "--tile", "none"]) == 0
    streamed, whole = read_image(tmp_path / "streamed.png"), read_image(tmp_path / "whole.png")
    np.testing.assert_array_equal(streamed.pixels, whole.pixels)
    assert streamed.icc_profile == whole.icc_profile and (streamed.alpha is None) == (whole.alpha is None)
    if whole.alpha is not None:
        np.testing.assert_array_equal(streamed.alpha, whole.alpha)


def _peaks(weights: Path, files: list[Path]) -> list[int | None]:
    for module in (tiling, upscale):
        module.AUTO_PIXELS = 2**14
    tiling.BAND_PIXELS, streaming._STRIP = 2**15, 2**16
    memory.return_freed_blocks()
    found = []
    for file in files:
        argv = ["upscale", str(file), "-o", f"{file}.x4.png", "--weights", str(weights), "--overwrite"]
        found.append(memory.peak(lambda argv=argv: main(argv)))
    return found


def test_memory_is_bounded_by_tiles_not_by_the_picture(tmp_path, weights):
    """A result of 72 MB takes no more than one of 14 MB, but for noise."""
    heights = (300, 1500)
    files = [tmp_path / f"{height}.png" for height in heights]
    for file, height in zip(files, heights, strict=True):
        write_image(file, picture(height, 1000))
    _, small, large = in_new_process(_peaks, weights, [files[0], *files])  # the first call allocates what stays
    assert read_image(f"{files[1]}.x4.png").pixels.nbytes == 72_000_000
    if large is None:
        pytest.skip("this system does not tell how much memory was used")
    assert large < small + 30e6, "the height costs nothing"


def test_where_memory_ends_tiles_are_halved(tmp_path, weights, monkeypatch, capsys):
    """The result has the same bits, and the command says what it did."""
    write_image(tmp_path / "a.png", picture(150, 210))
    argv = ["upscale", str(tmp_path / "a.png"), "--weights", str(weights), "-o"]
    assert main([*argv, str(tmp_path / "whole.png")]) == 0
    capsys.readouterr()
    convert, refused = imaging.to_tensor, []

    def scarce(part, *rest):
        t = convert(part, *rest)
        if t.shape[2] * t.shape[3] > 20_000:
            refused.append(t.shape)
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return t

    monkeypatch.setattr(imaging, "to_tensor", scarce)
    assert main([*argv, str(tmp_path / "tiled.png")]) == 0
    errors = capsys.readouterr().err
    assert errors.count("not enough memory for 210 x 150 pixels at once; going on in smaller tiles") == 1
    assert 1 <= len(refused) <= 3, "a size that failed is not tried again"
    np.testing.assert_array_equal(read_image(tmp_path / "tiled.png").pixels, read_image(tmp_path / "whole.png").pixels)
    # Tiles of a given size are not divided.
    assert main([*argv, str(tmp_path / "given.png"), "--tile", "160"]) == 1
    assert "not enough memory; smaller tiles need less (--tile)" in capsys.readouterr().err


LIMITED = """
import resource, sys
from esr_kernels.cli import main

more, folder, *options = sys.argv[1:]
# What a process makes once is there before the limit is.
assert main(["upscale", f"{folder}/small.png", "-o", "small_x4.png", *options]) == 0
with open("/proc/self/status") as file:
    size = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmSize"))
limit = size + int(more) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(["upscale", f"{folder}/a.png", "-o", "limited.png", *options]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory, weights):
    """A folder with a picture that needs about 250 MB as a whole, its result, and a picture that needs little."""
    folder = tmp_path_factory.mktemp("large")
    write_image(folder / "a.png", picture(600, 800))
    write_image(folder / "small.png", picture(40, 40))
    assert main(["upscale", str(folder / "a.png"), "--weights", str(weights), "-o", str(folder / "whole.png")]) == 0
    return folder, read_image(folder / "whole.png").pixels


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell how much memory is used")
@pytest.mark.parametrize("megabytes", [80, 160])
def test_a_process_under_a_real_limit_goes_on_in_smaller_tiles(tmp_path, large, weights, megabytes):
    """The result alone has 23 MB."""
    folder, whole = large
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(megabytes), str(folder), "--weights", str(weights)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not enough memory for 800 x 600 pixels at once; going on in smaller tiles") == 1
    np.testing.assert_array_equal(read_image(tmp_path / "limited.png").pixels, whole)


def start(folder, weights, *argv, before=""):
    """The command in a process of its own, in which small pictures count as large."""
    # Whoever starts the tests in the background has interruptions ignored.
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from esr_kernels import tiling
from esr_kernels.cli import main
from esr_kernels.commands import upscale
tiling.AUTO_PIXELS = upscale.AUTO_PIXELS = 2 ** 14
tiling.BAND_PIXELS = 2 ** 14
{before}
sys.exit(main(sys.argv[1:]))
"""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "upscale",
            "a.png",
            "-o",
            "b.png",
            "--weights",
            str(weights),
            "--overwrite",
            *argv,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("number", "word"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGKILL, "")],
)
def test_a_stopped_process_leaves_the_old_result(tmp_path, weights, number, word):
    write_image(tmp_path / "a.png", picture(1600, 1000))
    write_image(tmp_path / "b.png", picture(8, 8))
    before = (tmp_path / "b.png").read_bytes()
    process = start(tmp_path, weights)
    deadline = time.monotonic() + 300
    # Until rows of the result have been written, and to another file than the result's.
    while not any(p.stat().st_size > 100_000 for p in tmp_path.glob(".esr-*.part")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert word in errors and "Traceback" not in errors
    assert (tmp_path / "b.png").read_bytes() == before
    left = {p.name for p in tmp_path.iterdir()} - {"a.png", "b.png"}
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    if number == signal.SIGKILL:
        # What a killed process left does not stand in the way.
        write_image(tmp_path / "a.png", picture(8, 8))
        assert start(tmp_path, weights).wait(timeout=300) == 0
        assert read_image(tmp_path / "b.png").height == 32


def test_a_full_disk_leaves_the_old_result(tmp_path, weights):
    write_image(tmp_path / "a.png", picture(300, 300, seed=2))
    write_image(tmp_path / "b.png", picture(8, 8))
    before = (tmp_path / "b.png").read_bytes()
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = start(tmp_path, weights, before=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors == "error: b.png: cannot be written: File too large\n"
    assert (tmp_path / "b.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
