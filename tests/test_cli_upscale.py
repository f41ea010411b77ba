"""`esr-kernels` info, upscale and demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import python_models
from esr_kernels import imaging
from esr_kernels.cli import main
from esr_kernels.imaging import Picture, read_image, write_image
from esr_kernels.optimize.report import Report
from python_models import registry

ROOT = Path(__file__).resolve().parent.parent


def command(*argv):
    """Exit status of the command line."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def noise(height, width, channels=3, dtype=np.uint8):
    generator = np.random.default_rng(height)
    return generator.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small SPAN checkpoint."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(python_models.create("span", feature_channels=4).state_dict(), file)
    return file


def test_info(capsys):
    assert command("info") == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "reference" in text and "native-cuda" in text
    assert command("info", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert [b["name"] for b in info["backends"]] == ["reference", "native-cpu", "native-cuda", "triton"]
    assert all(b["available"] == (b["reason"] is None) for b in info["backends"])


def test_version_and_help(capsys):
    assert command("--version") == 0
    assert capsys.readouterr().out == "esr-kernels 0.1.0\n"
    assert command("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("demo", "upscale", "verify", "bench", "info"))
    assert command() == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["upscal"],
            "unknown command 'upscal', expected one of demo, upscale, train, verify, bench, challenge, optimize, info; "
            "did you mean 'upscale'?",
        ),
        (["upscale"], "the following arguments are required"),
        (["upscale", "a.png", "-o", "b.png", "--model", "spam"], "did you mean 'span'"),
        (["upscale", "a.png", "-o", "b.png", "--model", "all"], "expected one model, got 'all'"),
        (["demo", "--size-limit", "0"], "expected a whole number of at least 1"),
        (["demo", "--photo", "astronout"], "astronout"),
        (["upscale", "a.png", "-o", "b.png", "--backend", "refrence"], "did you mean 'reference'"),
        (["upscale", "a.png", "-o", "b.png", "--dtype", "float8"], "float8"),
        (["upscale", "a.png", "-o", "b.png", "--tile", "100"], 'expected "auto", "none" or a multiple of 8'),
        (["upscale", "a.png", "-o", "b.png", "--quality", "0"], "expected 1..100"),
        (["upscale", "a.png", "-o", "b.png", "--max-pixels", "-1"], "expected millions of pixels above 0"),
        (["upscale", "a.png", "-o", "b.png", "--weights", "nothing.pth"], "there is no file 'nothing.pth'"),
        (["upscale", "a.png", "-o", "b.png", "--model", "rlfn"], "--weights: rlfn needs a checkpoint"),
    ],
)
def test_wrong_usage(argv, message, capsys):
    assert command(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("tile", ["auto", "none", "8"])
def test_one_picture(tmp_path, weights, capsys, tile):
    write_image(tmp_path / "a.png", Picture(noise(21, 30)))
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights, "--tile", tile) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b.png'}\n"
    result = read_image(tmp_path / "b.png")
    model = python_models.create("span", weights=weights)
    with torch.no_grad():
        expected = model(imaging.to_tensor(read_image(tmp_path / "a.png"), 1.0))
    difference = np.abs(result.pixels.astype(int) - imaging.quantize(expected, 1.0, 8, False))
    assert difference.max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_depth_grey_and_transparency_are_kept(tmp_path, weights, dtype, channels):
    alpha = noise(9, 12, 1, dtype)[..., 0]
    write_image(tmp_path / "a.png", Picture(noise(9, 12, channels, dtype), alpha, b"a profile"))
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights) == 0
    result = read_image(tmp_path / "b.png")
    assert result.pixels.shape == (36, 48, channels) and result.pixels.dtype == dtype
    assert result.alpha.shape == (36, 48) and result.icc_profile == b"a profile"


def test_a_folder_with_bad_files(tmp_path, weights, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deeper").mkdir(parents=True)
    write_image(folder / "a.png", Picture(noise(9, 12)))
    write_image(folder / "c.jpg", Picture(noise(16, 12)))
    write_image(folder / "deeper" / "d.webp", Picture(noise(9, 9)))
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:100])
    (folder / "notes.txt").write_text("not a picture")
    assert command("upscale", folder, "-o", out, "--weights", weights) == 1
    streams = capsys.readouterr()
    assert "b.png: damaged picture" in streams.err and "2 of 3 pictures upscaled" in streams.err
    assert "Traceback" not in streams.err
    assert sorted(p.name for p in out.iterdir()) == ["a_x4.png", "c_x4.jpg"]
    assert command("upscale", folder, "-o", out, "--weights", weights) == 1
    assert "exists; replace it with --overwrite" in capsys.readouterr().err
    (folder / "b.png").unlink()
    again = ["upscale", folder, "-o", out, "--weights", weights, "--overwrite", "--recursive", "--format", "png"]
    assert command(*again) == 0
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == ["a_x4.png", "c_x4.png", "deeper/d_x4.png"]


def test_names_that_collide_or_replace_their_source(tmp_path, weights, capsys):
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))
    write_image(tmp_path / "a.jpg", Picture(noise(9, 12)))
    out = tmp_path / "out"
    both = [tmp_path / "a.png", tmp_path / "a.jpg", "-o", out, "--weights", weights, "--format", "png"]
    assert command("upscale", *both) == 1
    assert "would both be written to" in capsys.readouterr().err
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "a.png", "--weights", weights, "--overwrite") == 1
    assert "the result would replace the picture itself" in capsys.readouterr().err
    assert (
        command("upscale", tmp_path / "a.png", tmp_path / "a.jpg", "-o", tmp_path / "a.jpg", "--weights", weights) == 1
    )
    assert "exists and is not a folder" in capsys.readouterr().err


def test_failures_before_any_work(tmp_path, weights, capsys):
    for argv, message in (
        ([tmp_path / "nothing.png", "-o", tmp_path / "b.png"], "no such file or folder"),
        ([tmp_path, "-o", tmp_path / "out"], "no pictures"),
    ):
        assert command("upscale", *argv, "--weights", weights) == 1
        assert message in capsys.readouterr().err
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.tiff", "--weights", weights) == 1
    assert "unknown extension '.tiff'" in capsys.readouterr().err
    assert (
        command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights, "--device", "tpu") == 1
    )
    assert "device: 'tpu' cannot be used" in capsys.readouterr().err
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--random-weights", "--model", "rlfn") == 1
    assert "at least 15 x 15 pixels, got 9 x 12" in capsys.readouterr().err
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    argv = [tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", tmp_path / "broken.pth"]
    assert command("upscale", *argv) == 1
    assert "broken.pth" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "broken.pth"]


def test_picture_above_the_limit(tmp_path, weights, capsys):
    write_image(tmp_path / "a.png", Picture(noise(40, 40)))
    argv = ["upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights, "--max-pixels", "0.001"]
    assert command(*argv) == 1
    assert "40 x 40 is more than 0.001 million pixels; allow it with --max-pixels" in capsys.readouterr().err


def test_interruption_leaves_nothing_behind(tmp_path, weights, monkeypatch, capsys):
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(imaging, "_encode", interrupt)
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_that_python_discards(tmp_path, weights, monkeypatch, capsys, number, status):
    """A weak reference's callback is where an exception is lost; the command stops all the same."""
    write_image(tmp_path / "a.png", Picture(noise(9, 50)))
    convert, handlers = imaging.to_tensor, (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    calls = []

    class Object:
        pass

    def to_tensor(*args):
        calls.append(args)
        thing = Object()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
        del thing
        assert reference() is None
        return convert(*args)

    monkeypatch.setattr(imaging, "to_tensor", to_tensor)
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    argv = ["upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights, "--tile", "8"]
    assert command(*argv) == status
    assert not lost, "nothing is printed of it"
    assert len(calls) == 1 and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    monkeypatch.setattr(imaging, "to_tensor", convert)
    assert command(*argv) == 0, "the next run knows nothing of it"


def test_recursion_leaves_earlier_results_alone(tmp_path, weights, capsys):
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", Picture(noise(9, 12)))
    argv = ["upscale", tmp_path, "-o", tmp_path / "out", "--recursive", "--overwrite", "--weights", weights]
    for _ in range(2):
        assert command(*argv) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'out' / 'in' / 'a_x4.png'}\n"


def test_folders_that_cannot_be_made(tmp_path, weights, capsys):
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "b.png"
    for argv in (
        ["upscale", tmp_path / "a.png", "-o", out, "--weights", weights],
        ["demo", "--image", tmp_path / "a.png", "--output", out, "--weights", weights],
    ):
        assert command(*argv) == 1
        errors = capsys.readouterr().err
        assert "cannot be made: Not a directory" in errors and errors.count("\n") == 1


def test_nothing_is_made_for_a_failure(tmp_path, capsys):
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    argv = ["upscale", tmp_path / "a.png", "-o", tmp_path / "new" / "folder", "--weights", tmp_path / "broken.pth"]
    assert command(*argv) == 1
    assert "broken.pth" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_opaque_pictures_become_jpeg(tmp_path, weights, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_image(folder / "opaque.png", Picture(noise(9, 12), np.full((9, 12), 255, np.uint8)))
    write_image(folder / "clear.png", Picture(noise(9, 12), np.full((9, 12), 254, np.uint8)))
    assert command("upscale", folder, "-o", tmp_path / "out", "--weights", weights, "--format", "jpg") == 1
    assert "clear_x4.jpg: JPEG holds no transparency" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["opaque_x4.jpg"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]
)
def test_out_of_memory_in_one_picture(tmp_path, weights, monkeypatch, capsys, error):
    from esr_kernels.commands import upscale

    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", Picture(noise(20, 20)))
    write_image(tmp_path / "in" / "b.png", Picture(noise(9, 12)))
    whole = upscale.upscale_picture

    def scarce(model, picture, **options):
        if picture.height == 20:
            raise error
        return whole(model, picture, **options)

    monkeypatch.setattr(upscale, "upscale_picture", scarce)
    assert command("upscale", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights) == 1
    assert "a.png: not enough memory; smaller tiles need less (--tile)" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b_x4.png"]


def test_a_bug_keeps_its_traceback(tmp_path, weights, monkeypatch):
    from esr_kernels.commands import upscale

    def wrong(*args, **options):
        raise RuntimeError("shapes cannot be broadcast")

    monkeypatch.setattr(upscale, "upscale_picture", wrong)
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))
    with pytest.raises(RuntimeError, match="shapes"):
        command("upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights)


def test_no_more_than_a_window_is_converted_at_once(tmp_path, weights, monkeypatch):
    write_image(tmp_path / "a.png", Picture(noise(90, 200)))
    sizes, convert = [], imaging.to_tensor

    def to_tensor(*args):
        part = convert(*args)
        sizes.append(tuple(part.shape[2:]))
        return part

    monkeypatch.setattr(imaging, "to_tensor", to_tensor)
    argv = ["upscale", tmp_path / "a.png", "-o", tmp_path / "b.png", "--weights", weights]
    assert command(*argv, "--tile", "32", "--overlap", "8") == 0
    assert len(sizes) == 21 and max(max(s) for s in sizes) == 48


def test_names_that_are_no_text(tmp_path, weights, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    write_image(tmp_path / "a.png", Picture(noise(9, 12)))
    os.rename(tmp_path / "a.png", os.fsencode(folder) + b"/\xff.png")
    monkeypatch.chdir(tmp_path)
    assert command("upscale", "in", "-o", "out", "--weights", weights) == 0
    assert capsys.readouterr().out == "out/\\xff_x4.png\n"


def test_a_broken_command_does_not_take_the_others_with_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "esr_kernels.commands.bench", None)
    assert command("info") == 0
    assert command("--help") == 0
    assert "cannot run here" in capsys.readouterr().out
    assert command("bench") == 1
    streams = capsys.readouterr()
    assert streams.err.startswith("error: bench cannot run here: ") and streams.err.count("\n") == 1


def test_half_types_and_a_chosen_backend(tmp_path, weights):
    write_image(tmp_path / "a.png", Picture(noise(12, 12)))
    results = []
    for i, options in enumerate(([], ["--dtype", "bfloat16"], ["--backend", "reference", "--threads", "1"])):
        argv = ["upscale", tmp_path / "a.png", "-o", tmp_path / f"{i}.png", "--weights", weights, *options]
        assert command(*argv) == 0
        results.append(read_image(tmp_path / f"{i}.png").pixels.astype(int))
    assert np.abs(results[2] - results[0]).max() <= 1
    assert not np.array_equal(results[1], results[0])


@pytest.mark.parametrize("photo", ["astronaut", "coffee", "chelsea", "rocket", "motorcycle"])
def test_every_photograph_of_the_demo_is_there(photo):
    from esr_kernels.commands.demo import _photograph

    original, small = _photograph(photo, 4)
    assert (small.height * 4, small.width * 4) == (original.height, original.width)
    assert min(small.height, small.width) >= 75 and original.pixels.std() > 20


def test_demo(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "mine.png", Picture(noise(20, 24)))
    assert command("demo", "--image", "mine.png", "--weights", weights, "--rounds", "2") == 0
    text = capsys.readouterr().out
    assert "verified  largest difference from plain PyTorch" in text and "of the data range" in text
    assert "PyTorch eager, channels_last" in text and "esr_kernels" in text
    assert f"written   {Path('outputs') / 'mine_x4.png'} (96 x 80)" in text
    assert read_image(tmp_path / "outputs" / "mine_x4.png").width == 96


def test_demo_of_a_large_picture_measures_a_part(tmp_path, weights, capsys):
    write_image(tmp_path / "mine.png", Picture(noise(50, 70)))
    argv = ["demo", "--image", tmp_path / "mine.png", "--weights", weights, "--rounds", "1", "--size-limit", "32"]
    assert command(*argv, "--output", tmp_path / "o.png") == 0
    assert "part      32 x 32 from its middle" in capsys.readouterr().out
    assert read_image(tmp_path / "o.png").width == 280


def test_demo_says_that_weights_are_random(tmp_path, capsys, monkeypatch):
    from esr_kernels.commands import demo

    monkeypatch.setattr(demo, "published", lambda name: None)
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    assert command("demo", "--photo", "chelsea", "--rounds", "1", "--output", tmp_path / "o.png") == 0
    text = capsys.readouterr().out
    assert "weights   RANDOM: the picture will be noise" in text and "PSNR" in text


def test_without_a_checkpoint_the_packages_own_weights_are_taken(tmp_path, weights, capsys, monkeypatch):
    from esr_kernels.commands import demo

    (tmp_path / "weights").mkdir()
    own = tmp_path / "weights" / "span_x4.safetensors"
    save_file(torch.load(weights, weights_only=True), own)
    monkeypatch.setattr(registry, "WEIGHTS", own.parent)
    monkeypatch.setattr(demo, "published", lambda name: None)
    write_image(tmp_path / "a.png", Picture(noise(20, 24)))
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "own.png") == 0
    assert "published ones are better: the challenge's repository" in capsys.readouterr().err
    assert command("upscale", tmp_path / "a.png", "-o", tmp_path / "given.png", "--weights", weights) == 0
    assert capsys.readouterr().err == ""
    assert np.array_equal(read_image(tmp_path / "own.png").pixels, read_image(tmp_path / "given.png").pixels)
    argv = ["demo", "--image", tmp_path / "a.png", "--rounds", "1", "--output", tmp_path / "demo.png"]
    assert command(*argv) == 0
    assert "weights   this package's, trained on a few photographs; the published ones" in capsys.readouterr().out
    assert np.array_equal(read_image(tmp_path / "own.png").pixels, read_image(tmp_path / "demo.png").pixels)
    assert python_models.create("span", weights="bundled").options["feature_channels"] == 4
    with pytest.raises(ValueError, match="weights: this package has none for 'rlfn', only for span"):
        python_models.create("rlfn", weights="bundled")


def test_demo_refuses_a_wrong_network(tmp_path, weights, capsys, monkeypatch):
    from esr_kernels.commands import demo

    monkeypatch.setattr(demo, "optimize", lambda model: _Wrong(model))
    write_image(tmp_path / "mine.png", Picture(noise(20, 24)))
    argv = ["demo", "--image", tmp_path / "mine.png", "--weights", weights, "--output", tmp_path / "o.png"]
    assert command(*argv) == 1
    streams = capsys.readouterr()
    assert "the fused network differs from plain PyTorch" in streams.err and "median ms" not in streams.out
    assert not (tmp_path / "o.png").exists()


class _Wrong(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) * 1.01

    def report(self):
        return Report()


def start(folder, *argv):
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "esr_kernels", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_as_a_program(tmp_path):
    process = start(tmp_path, "upscale", "nothing.png", "-o", "b.png", "--random-weights")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors == "error: nothing.png: no such file or folder\n"


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_leave_no_file_and_no_traceback(tmp_path, weights, number, status, word):
    write_image(tmp_path / "a.png", Picture(noise(800, 800)))
    argv = ["upscale", "a.png", "-o", "b.png", "--weights", str(weights), "--tile", "8", "--progress"]
    process = start(tmp_path, *argv)
    # The name of the picture in the progress line: it is being computed, in 10,000 tiles.
    seen = ""
    while "a.png" not in seen:
        seen += process.stderr.read(1)
        assert process.poll() is None, seen
    time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert word in errors and "Traceback" not in errors and output == ""
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
