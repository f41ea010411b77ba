"""`esr-kernels` info, upscale and demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import python_models
from esr_kernels import imaging
from esr_kernels.cli import main
from esr_kernels.imaging import Picture, read_image, write_image


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
            "unknown command 'upscal', expected one of demo, upscale, verify, bench, info; did you mean 'upscale'?",
        ),
        (["upscale"], "the following arguments are required"),
        (["upscale", "a.png", "-o", "b.png", "--model", "spam"], "did you mean 'span'"),
        (["upscale", "a.png", "-o", "b.png", "--backend", "refrence"], "did you mean 'reference'"),
        (["upscale", "a.png", "-o", "b.png", "--dtype", "float8"], "float8"),
        (["upscale", "a.png", "-o", "b.png", "--tile", "100"], 'expected "auto", "none" or a multiple of 8'),
        (["upscale", "a.png", "-o", "b.png", "--quality", "0"], "expected 1..100"),
        (["upscale", "a.png", "-o", "b.png", "--max-pixels", "-1"], "expected millions of pixels above 0"),
        (["upscale", "a.png", "-o", "b.png", "--weights", "nothing.pth"], "there is no file 'nothing.pth'"),
        (["upscale", "a.png", "-o", "b.png"], "--weights: span needs a checkpoint"),
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
    assert "verified  largest difference from plain PyTorch" in text
    assert "PyTorch eager, channels_last" in text and "esr_kernels" in text
    assert f"written   {Path('outputs') / 'mine_x4.png'} (96 x 80)" in text
    assert read_image(tmp_path / "outputs" / "mine_x4.png").width == 96


def test_demo_says_that_weights_are_random(tmp_path, capsys, monkeypatch):
    from esr_kernels.commands import demo

    monkeypatch.setattr(demo, "_nearby_weights", lambda name: None)
    assert command("demo", "--photo", "chelsea", "--rounds", "1", "--output", tmp_path / "o.png") == 0
    text = capsys.readouterr().out
    assert "weights   RANDOM: the picture will be noise" in text and "PSNR" in text


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


def test_as_a_program(tmp_path):
    run = lambda *argv: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "esr_kernels", *argv], capture_output=True, text=True, cwd=tmp_path
    )
    result = run("upscale", "nothing.png", "-o", "b.png", "--random-weights")
    assert result.returncode == 1 and result.stderr == "error: nothing.png: no such file or folder\n"
    assert run("inf").returncode == 2
