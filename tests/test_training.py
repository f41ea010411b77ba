"""`esr-kernels train`: configuration, runs, resuming, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import environment, torchrun
from safetensors.torch import load_file

import esr_kernels
import python_models
from esr_kernels.cli import main
from esr_kernels.errors import TrainingError
from esr_kernels.imaging import Picture, image_kind, read_image, write_image
from esr_kernels.training import config as configuration
from esr_kernels.training import evaluate, initialize, log, photographs
from esr_kernels.training.config import Config, ConfigError
from esr_kernels.training.data import Crops, Pictures, batches, find_pictures
from esr_kernels.training.distributed import Process
from esr_kernels.training.resize import bicubic, crop_to_multiple, downscale, resize
from esr_kernels.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
ALONE = Process(0, 1, torch.device("cpu"))
SMALL = {"feature_channels": 4, "num_blocks": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Smooth pictures, which a network can learn to enlarge: train and held out."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, count, seed in (("train", 3, 0), ("valid", 2, 9)):
        (folder / name).mkdir()
        for i in range(count):
            coarse = np.random.default_rng(seed + i).random((5, 6, 3))
            pixels = np.clip(resize(coarse, 40, 48) * 255, 0, 255).astype(np.uint8)
            write_image(folder / name / f"{name}{i}.png", Picture(pixels))
    return folder


def settings(folders, output, *changes):
    return configuration.load(
        None,
        [
            ("output", str(output)),
            ("model.options", SMALL),
            ("data.train", [str(folders / "train")]),
            ("data.validation", [str(folders / "valid")]),
            ("optimizer.ema", 0.9),
            ("run.log_every", 2),
            ("run.validate_every", 4),
            ("run.save_every", 3),
            ("stage", [{"name": "one", "patch": 16, "batch": 4, "iterations": 6, "rate": 1e-3}]),
            *changes,
        ],
    )


def start(config, **options):
    return Trainer(config, ALONE, say=lambda line: None, **options)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- configuration -------------------------------------------------------------------------------------------------


def written(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_configuration_is_read(tmp_path):
    path = written(
        tmp_path,
        """
        seed = 3
        [model]
        options = { feature_channels = 8 }
        [data]
        train = "a"
        scales = [1, 0.5]
        [[stage]]
        patch = 64
        iterations = 10
        rate = 1e-3
        loss = { l1 = 1, fft = 0.05 }
        schedule = { name = "multistep", milestones = [5, 8] }
        [[stage]]
        name = "fine"
        iterations = 5
        repeat = 3
        schedule = "cosine"
        """,
    )
    config = configuration.load(
        path, [("seed", 4), ("stage.fine.rate", 1e-5), ("stage.1.batch", 2), ("run.device", "cpu")]
    )
    assert config.seed == 4 and config.data.train == ("a",) and config.data.scales == (1.0, 0.5)
    first, fine = config.stage
    assert first.name == "1" and first.losses == {"l1": 1, "fft": 0.05} and first.batch == 2
    assert first.schedule.milestones == (5, 8) and fine.rate == 1e-5 and fine.schedule.name == "cosine"
    assert [s.name for s in configuration.expanded(config)] == ["1", "fine.1", "fine.2", "fine"]
    json.dumps(config.decisive())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed = 1", "unknown key 'sed', did you mean 'seed'"),
        ("[optimiser]", "unknown key 'optimiser', did you mean 'optimizer'"),
        ("[data]\ntrian = []", "unknown key 'data.trian', did you mean 'data.train'"),
        ("[[stage]]\npatsh = 1", "unknown key 'stage.1.patsh', did you mean 'stage.1.patch'"),
        (
            "[[stage]]\nschedule = {evry = 1}",
            "unknown key 'stage.1.schedule.evry', did you mean 'stage.1.schedule.every'",
        ),
        ("[run]\nzzz = 1", "unknown key 'run.zzz', known: device"),
        ("seed = 'x'", "seed: expected a whole number, got 'x'"),
        ("seed = true", "seed: expected a whole number"),
        ("[optimizer]\nclip = nan", "optimizer.clip: expected a finite number"),
        ("[data]\ntrain = 3", "data.train: expected a list"),
        ("model = 3", "model: expected a table"),
        ("[optimizer]\nname = 'sgd'", "optimizer.name: expected adam or adamw"),
        ("[optimizer]\nautocast = 'half'", "optimizer.autocast: expected none or bf16 or fp16"),
        ("[data]\nscales = [2.0]", "data.scales: expected numbers above 0 and up to 1"),
        ("[[stage]]\niterations = 0", "stage.1.iterations: expected at least 1"),
        ("[[stage]]\niterations = 1\nloss = 'l3'", "stage.1.loss: unknown 'l3', did you mean 'l2'"),
        ("[[stage]]\nschedule = 'step'", "stage.1.schedule.every: step needs"),
        ("[[stage]]\niterations = 1\nstart = 'x'", "stage.1: expected the name of an earlier stage, got 'x'"),
        ("[[stage]]\niterations = 1\nname = 'a/b'", "stage.a/b.name: expected letters"),
        ("[[stage]]\nname='a'\niterations = 1\n[[stage]]\nname='a'\niterations = 1", "a name no other stage has"),
        ("seed = 1", "stage: the configuration has none"),
        ("seed = ", "not a TOML file"),
    ],
)
def test_bad_configurations(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        configuration.load(written(tmp_path, text))
    assert message in str(error.value)


def test_bad_changes_of_a_configuration(tmp_path):
    path = written(tmp_path, "[[stage]]\niterations = 1")
    for key, message in [
        ("stage.2.rate", "there is no stage '2'"),
        ("stage.rate", r"name a key of a stage, as in stage\.1\.rate"),
        ("seed.x", "seed is a value"),
        ("model.nam", "did you mean 'model.name'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            configuration.load(path, [("seed", 1), (key, 1)])


def test_values_of_flags():
    assert [configuration.parse_value(t) for t in ("1e-3", "[1, 2]", "true", "{a = 1}", "adamw", "'x'")] == [
        1e-3,
        [1, 2],
        True,
        {"a": 1},
        "adamw",
        "x",
    ]


def test_recipes_are_valid_and_section_4_1_is_the_reports():
    names = sorted(p.stem for p in configuration.RECIPES.glob("*.toml"))
    assert "report_4_1" in names
    for name in names:
        configuration.load(configuration.find(name))
    stages = configuration.expanded(configuration.load(configuration.find("report_4_1")))
    base, fine, final = stages[:5], stages[5:9], stages[9]
    assert all((s.patch, s.batch, s.iterations, s.losses) == (256, 64, 10**6, {"l1": 1.0}) for s in base)
    rates = [base[0].schedule.rate(i, base[0].rate, 10**6) for i in (0, 199_999, 200_000, 999_999)]
    assert rates == [5e-4, 5e-4, 2.5e-4, 5e-4 / 16]
    assert {(next(iter(s.losses)), s.batch) for s in fine} == {(n, b) for n in ("l1", "l2") for b in (64, 128)}
    assert all((s.patch, s.iterations, s.rate, s.start) == (512, 500_000, 1e-5, "base") for s in fine)
    assert final.average == tuple(s.name for s in fine)
    with pytest.raises(FileNotFoundError, match=r"recipes by name: .*report_4_1"):
        configuration.find("report")


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_its_result(folders, tmp_path, capsys):
    status = main(
        [
            "train",
            "-o",
            str(tmp_path / "run"),
            "--train",
            str(folders / "train"),
            "--validation",
            str(folders / "valid"),
        ]
        + ["--seed", "1", "--set", "model.options={feature_channels = 4, num_blocks = 1, img_range = 1.0}"]
        + ["--set", "optimizer={name = 'adamw', betas = [0.9, 0.9], ema = 0.9, clip = 1.0}"]
        + ["--set", "run={log_every = 20, validate_every = 0, save_every = 50}"]
        + [
            "--set",
            "stage=[{patch = 32, batch = 4, iterations = 120, rate = 2e-2, schedule = 'cosine', loss = 'charbonnier'}]",
        ]
    )
    text = capsys.readouterr()
    assert status == 0, text.err
    rows = log.read(tmp_path / "run" / "log.csv")
    curve = [float(r["loss"]) for r in rows if r["loss"]]
    assert len(curve) == 6 and curve[-1] < 0.25 * curve[0]
    card = json.loads((tmp_path / "run" / "model.json").read_text())
    assert card["iterations"] == 120 and card["patches"] == 480 and card["trained_on"] == ["train0", "train1", "train2"]
    # The file is a usual one, although the network was trained with images in another range.
    model = python_models.create("span", weights=tmp_path / "run" / "model.safetensors")
    assert model.img_range == 255
    for name, value in card["psnr"].items():
        high = read_image(folders / "valid" / f"{name}.png").pixels
        low = downscale(high, 4)
        assert value["network"] == pytest.approx(
            evaluate.psnr(evaluate.upscaled(model, low, ALONE.device), high), abs=2e-3
        )
        assert f"{name}: {value['network']:.2f} dB, bicubic {value['bicubic']:.2f} dB" in text.out
    page = (tmp_path / "run" / "model.md").read_text()
    assert "| valid0 |" in page and "train0, train1, train2" in page and "| mean |" in page
    assert not list((tmp_path / "run").glob("*.part"))


def test_the_fused_operators_are_trained(folders, tmp_path, monkeypatch):
    called = []
    inner = esr_kernels.functional.spab
    monkeypatch.setattr(esr_kernels.functional, "spab", lambda *a, **k: called.append(1) or inner(*a, **k))
    start(settings(folders, tmp_path, ("stage.1.iterations", 1), ("data.validation", []))).run()
    assert called


@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_autocast(folders, tmp_path, autocast):
    trainer = start(settings(folders, tmp_path, ("optimizer.autocast", autocast), ("model.options.img_range", 1.0)))
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.run()
    assert torch.float16 in seen or torch.bfloat16 in seen
    assert trainer.scaler.is_enabled() == (autocast == "fp16")
    assert all(v.dtype == torch.float32 and bool(torch.isfinite(v).all()) for v in weights(tmp_path).values())


def test_the_whole_gradient_is_clipped(folders, tmp_path):
    found = []
    for clip in (0.0, 1e-3):
        trainer = start(settings(folders, tmp_path / str(clip), ("optimizer.clip", clip), ("stage.1.iterations", 1)))
        trainer.run()
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    whole, clipped = found
    assert float(whole.norm()) > 1e-3
    torch.testing.assert_close(clipped, whole * (1e-3 / whole.norm()), rtol=1e-3, atol=0)


def test_progress_is_shown(folders, tmp_path, capsys):
    start(settings(folders, tmp_path), progress=True).run()
    text = capsys.readouterr()
    assert "6/6" in text.err and "one loss" in text.err
    assert "iteration 4, " in text.out and "iteration 6, " in text.out


def test_stages(folders, tmp_path):
    """Repetition, a stage that starts from an earlier one, another optimizer state each, and the mean of two."""
    stage = {"patch": 16, "batch": 2, "iterations": 3, "rate": 1e-3}
    stages = [
        {"name": "base", "repeat": 2, **stage},
        {"name": "a", **stage, "start": "base", "loss": "l2", "patch": 24},
        {"name": "b", **stage, "start": "base", "loss": "psnr", "batch": 4},
        {"name": "mean", "average": ["a", "b"]},
    ]
    trainer = start(settings(folders, tmp_path, ("stage", stages)))
    first = {}
    inner = trainer._step

    def step(stage, low, high):
        if trainer.iteration == 0:
            first[stage.name] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
            assert not trainer.optimizer.state
        assert list(low.shape) == [stage.batch, 3, stage.patch // 4, stage.patch // 4]
        return inner(stage, low, high)

    trainer._step = step
    trainer.run()
    ends = {s: load_file(tmp_path / "stages" / f"{s}.safetensors") for s in ("base.1", "base", "a", "b", "mean")}
    assert same(first["base"], ends["base.1"]) and same(first["a"], ends["base"]) and same(first["b"], ends["base"])
    assert not same(ends["a"], ends["b"])
    for k, v in ends["mean"].items():
        torch.testing.assert_close(v, (ends["a"][k] + ends["b"][k]) / 2)
    assert trainer.steps == 12 and trainer.samples == 2 * 9 + 4 * 3
    result = python_models.create("span", deploy=False, **SMALL)
    result.load_state_dict(ends["mean"])
    assert same(esr_kernels.reparam.deploy(result).state_dict(), weights(tmp_path))


class Killed(BaseException):
    pass


def interrupt(trainer, at):
    """Every step draws a random number, as dropout would; step `at` ends the run with nothing saved."""
    inner, first = trainer._step, trainer.steps

    def step(*arguments):
        if at is not None and trainer.steps - first == at - 1:
            raise Killed
        torch.rand(1)
        return inner(*arguments)

    trainer._step = step


@pytest.mark.parametrize("at", [4, 7, 10])
def test_a_resumed_run_is_the_same_bit_for_bit(folders, tmp_path, at):
    """Killed in the middle of the first stage, just after its end and in the second; weights, average, log, RNG."""
    second = {"name": "two", "patch": 24, "batch": 2, "iterations": 6, "rate": 5e-4, "loss": "fft"}
    one = {
        "name": "one",
        "patch": 16,
        "batch": 4,
        "iterations": 6,
        "rate": 1e-3,
        "schedule": {"name": "cosine", "warmup": 2},
    }
    changes = ("stage", [one, second]), ("optimizer.autocast", "fp16"), ("model.options.img_range", 1.0)
    ends = []
    for name in ("whole", "parts"):
        torch.manual_seed(5)
        trainer = start(settings(folders, tmp_path / name, *changes))
        if name == "parts":
            interrupt(trainer, at)
            with pytest.raises(Killed):
                trainer.run()
            torch.manual_seed(77)
            trainer = start(settings(folders, tmp_path / name, *changes), resume=True)
            assert trainer.steps == (at - 1) // 3 * 3
        interrupt(trainer, None)
        trainer.run()
        ends.append((weights(tmp_path / name), trainer._state(), log.read(tmp_path / name / "log.csv")))
    (a, state_a, log_a), (b, state_b, log_b) = ends
    assert same(a, b) and same(state_a["model"], state_b["model"])
    assert torch.equal(state_a["rng"]["torch"], state_b["rng"]["torch"])
    for rows in (log_a, log_b):
        for row in rows:
            del row["seconds"]
    assert log_a == log_b


def test_a_finished_run_can_be_resumed_and_writes_its_result_again(folders, tmp_path):
    start(settings(folders, tmp_path)).run()
    before = weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    start(settings(folders, tmp_path), resume=True).run()
    assert same(before, weights(tmp_path))


def test_resume_refuses_another_configuration(folders, tmp_path):
    start(settings(folders, tmp_path)).run()
    with pytest.raises(ConfigError, match=r"of another configuration: stage\.1\.rate: 0\.001 there, 0\.002 here"):
        start(settings(folders, tmp_path, ("stage.1.rate", 2e-3)), resume=True)
    with pytest.raises(ConfigError, match=r"seed: 0 there, 5 here"):
        start(settings(folders, tmp_path, ("seed", 5)), resume=True)
    with pytest.raises(ConfigError, match="other training pictures"):
        start(settings(folders, tmp_path, ("data.train", [str(folders / "train" / "train0.png")])), resume=True)
    start(settings(folders, tmp_path, ("loading.workers", 1), ("run.log_every", 1)), resume=True)
    with pytest.raises(TrainingError, match="holds a run already"):
        start(settings(folders, tmp_path))
    with pytest.raises(TrainingError, match=r"there is no state\.pt"):
        start(settings(folders, tmp_path / "none"), resume=True)
    (tmp_path / "state.pt").write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="not the state of a run"):
        start(settings(folders, tmp_path), resume=True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_state(folders, tmp_path, what):
    trainer = start(settings(folders, tmp_path))
    inner = trainer.criterion

    def criterion(output, target):
        loss = inner(output, target)
        if trainer.iteration == 4:
            loss = loss * float("nan") if what == "loss" else (loss + (output - output).abs().sqrt().sum())
        return loss

    trainer.criterion = criterion
    with pytest.raises(TrainingError, match=rf"the {what}.* nan in iteration 5 of stage one; .*state\.pt keeps"):
        trainer.run()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["steps"] == 3 and all(bool(torch.isfinite(v).all()) for v in state["model"].values())


def test_a_write_that_fails_leaves_the_old_state(folders, tmp_path, monkeypatch):
    trainer = start(settings(folders, tmp_path))
    before = None
    inner = torch.save

    def save(state, path):
        nonlocal before
        if state["steps"] == 3:
            before = (tmp_path / "state.pt").read_bytes()
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        inner(state, path)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space"):
        trainer.run()
    assert (tmp_path / "state.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*part"))


def test_a_signal_stops_between_iterations_and_saves(folders, tmp_path):
    trainer = start(settings(folders, tmp_path, ("stage.1.iterations", 50)))
    inner = trainer._step

    def step(*arguments):
        if trainer.steps == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*arguments)

    trainer._step = step
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGTERM) == before
    assert torch.load(tmp_path / "state.pt", weights_only=True)["steps"] == 5


def test_training_goes_on_from_a_checkpoint(folders, tmp_path):
    torch.manual_seed(3)
    given = python_models.create("span", **SMALL)
    torch.save(given.state_dict(), tmp_path / "slim.pth")
    changes = [("model.weights", str(tmp_path / "slim.pth")), ("stage.1.rate", 1e-9), ("model.options", {})]
    with pytest.raises(ValueError, match="slim form"):
        start(settings(folders, tmp_path / "x", *changes))
    start(settings(folders, tmp_path / "x", *changes, ("model.deploy", True))).run()
    for k, v in weights(tmp_path / "x").items():
        torch.testing.assert_close(v, given.state_dict()[k], rtol=1e-5, atol=1e-6)


def test_bad_settings(folders, tmp_path, capsys):
    for changes, message in [
        ([("stage.1.patch", 18)], r"stage\.one\.patch: expected a multiple of 4"),
        ([("stage.1.patch", 64)], "3 of 3 pictures are smaller than 64 x 64"),
        ([("data.train", [])], r"data\.train: name folders"),
        (
            [("data.validation", [str(folders / "train" / "train1.png")])],
            r"data\.validation: .*train1\.png is trained on",
        ),
        ([("model.name", "spam")], "unknown model 'spam', did you mean 'span'"),
        ([("model.options", {"in_channels": 1, "norm": False})], "RGB"),
        ([("output", "")], "output: name the folder"),
    ]:
        with pytest.raises(ConfigError if "unknown model" not in message else ValueError, match=message):
            start(settings(folders, tmp_path, *changes))
    with pytest.raises(ConfigError, match=r"stage\.one\.batch: expected a multiple of the 3 processes"):
        Trainer(settings(folders, tmp_path), Process(0, 3, torch.device("cpu")))
    assert main(["train", "--demo-data", "--set", "stage=[{iterations = 1}]"]) == 2
    assert "error: --output" in capsys.readouterr().err
    assert main(["train", "nowhere.toml", "-o", str(tmp_path)]) == 1
    assert "nowhere.toml: no such configuration file" in capsys.readouterr().err
    assert main(["train", "-o", str(tmp_path), "--set", "stage=[{iterations = 1}]", "--device", "tpu"]) == 1
    assert "run.device: expected auto, cpu or cuda, got 'tpu'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--set", "seed"])
    assert "expected KEY=VALUE" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tensorboard(folders, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(settings(folders, tmp_path, ("run.tensorboard", True), ("run.samples", 1))).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "rate", "psnr"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("psnr")] == [4, 6]
    (shown,) = events.Tags()["images"]
    image = events.Images(shown)[0]
    assert shown == "valid0" and (image.height, image.width) == (40, 3 * 40)


def test_without_tensorboard_there_is_one_clear_error(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"run\.tensorboard: needs the package tensorboard \(pip install"):
        start(settings(folders, tmp_path, ("run.tensorboard", True))).run()


def test_a_loading_process_that_dies_ends_the_run(folders, tmp_path, monkeypatch):
    trainer = start(settings(folders, tmp_path, ("loading.workers", 1)))
    monkeypatch.setattr(trainer.train_pictures, "pixels", lambda index: os._exit(1))
    with pytest.raises(TrainingError, match=r"a loading process has ended.*state\.pt"):
        trainer.run()
    assert torch.load(tmp_path / "state.pt", weights_only=True)["steps"] == 0


# --- several processes ---------------------------------------------------------------------------------------------

_GRADIENTS = """
import sys, torch
from esr_kernels.training import config
from esr_kernels.training.distributed import joined
from esr_kernels.training.trainer import Trainer

folders, output = sys.argv[1:]
torch.set_num_threads(1)
loaded = config.load(None, [
    ("output", output), ("model.options", {"feature_channels": 4, "num_blocks": 1}),
    ("data.train", [folders + "/train"]),
    ("data.validation", [folders + "/valid"]), ("run.validate_every", 2),
    ("stage", [{"patch": 16, "batch": 4, "iterations": 2, "rate": 1e-3, "loss": {"l1": 1.0, "psnr": 0.01}}]),
])
with joined("cpu") as process:
    trainer = Trainer(loaded, process)
    step = trainer._step
    losses = []
    def recorded(*arguments):
        value = step(*arguments)
        losses.append(value)
        if trainer.iteration == 0:
            gradients = {k: p.grad.clone() for k, p in trainer.model.named_parameters()}
            torch.save(gradients, f"{output}/gradients{process.rank}.pt")
        return value
    trainer._step = recorded
    trainer.run()
    torch.save(losses, f"{output}/losses{process.rank}.pt")
"""


def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(folders, tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(_GRADIENTS)
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    run = torchrun(script, folders, tmp_path / "two")
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text
    alone = subprocess.run(
        [sys.executable, script, folders, tmp_path / "one"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == 0, alone.stderr
    expected = torch.load(tmp_path / "one" / "gradients0.pt")
    for rank in (0, 1):
        got = torch.load(tmp_path / "two" / f"gradients{rank}.pt")
        assert got.keys() == expected.keys()
        for k, v in expected.items():
            torch.testing.assert_close(got[k], v, rtol=1e-4, atol=1e-5 * float(v.abs().max()))
        losses = torch.load(tmp_path / "two" / f"losses{rank}.pt")
        np.testing.assert_allclose(losses, torch.load(tmp_path / "one" / "losses0.pt"), rtol=1e-4)
    cards = [json.loads((tmp_path / n / "model.json").read_text()) for n in ("one", "two")]
    for name, value in cards[0]["psnr"].items():
        assert cards[1]["psnr"][name]["network"] == pytest.approx(value["network"], abs=0.05)
    assert text.count("written ") == 1


def test_a_killed_process_ends_the_run_and_leaves_the_checkpoint(folders, tmp_path):
    output = tmp_path / "run"
    run = torchrun(
        *("-m", "esr_kernels", "train", "-o", output, "--train", folders / "train", "--device", "cpu"),
        *("--set", "model.options={feature_channels = 4, num_blocks = 1}", "--set", "run.save_every=2"),
        *("--set", "stage=[{patch = 16, batch = 2, iterations = 1000000, rate = 1e-4}]"),
    )
    try:
        deadline = time.monotonic() + 200
        steps = 0
        while steps < 2 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.2)
            if (output / "state.pt").exists():
                steps = torch.load(output / "state.pt", weights_only=True)["steps"]
        assert steps >= 2
        workers = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True
        ).stdout.split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        text, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode != 0
    assert "error: process 0 of 2: another process of the run has ended" in text, text
    assert "--resume goes on from it" in text and "Traceback" not in text.split("torch/distributed")[0]
    state = torch.load(output / "state.pt", weights_only=True)
    assert state["steps"] >= 2 and all(bool(torch.isfinite(v).all()) for v in state["model"].values())
    resumed = configuration.load(
        None,
        [
            ("output", str(output)),
            ("model.options", SMALL),
            ("data.train", [str(folders / "train")]),
            ("stage", [{"patch": 16, "batch": 2, "iterations": 1_000_000, "rate": 1e-4}]),
        ],
    )
    assert isinstance(resumed, Config) and start(resumed, resume=True).steps == state["steps"]


# --- photographs and the weights trained on them -------------------------------------------------------------------


def test_no_held_out_photograph_is_trained_on():
    assert not set(photographs.TRAIN) & set(photographs.HELD_OUT)
    for name in photographs.TRAIN + photographs.HELD_OUT:
        height, width, kind = image_kind(photographs.folder() / name)
        assert min(height, width) >= 128 and kind in ("RGB", "grey")
    with pytest.raises(ValueError, match=r"this release of scikit-image has no moon\.jpg"):
        photographs.files(("moon.png", "moon.jpg"))


@pytest.mark.parametrize("name", [n for n in python_models.list_models() if python_models.bundled(n)])
def test_weights_of_the_package_are_what_their_card_says(name):
    file = python_models.bundled(name)
    assert file.stat().st_size < 1_000_000 and file.with_suffix(".md").is_file()
    card = json.loads(file.with_suffix(".json").read_text())
    model = python_models.create(name, weights="bundled")
    assert card["model"] == name and card["parameters"] == sum(p.numel() for p in model.parameters())
    held_out = {Path(n).stem: photographs.folder() / n for n in photographs.HELD_OUT}
    assert card["psnr"].keys() == held_out.keys() and not card["psnr"].keys() & set(card["trained_on"])
    fast, gains = esr_kernels.optimize(model), []
    for name, value in card["psnr"].items():
        high = crop_to_multiple(read_image(held_out[name]).pixels, model.scale)
        low = downscale(high, model.scale)
        assert evaluate.psnr(bicubic(low, model.scale), high) == pytest.approx(value["bicubic"], abs=2e-3)
        network = evaluate.psnr(evaluate.upscaled(fast, low, ALONE.device), high)
        assert network == pytest.approx(value["network"], abs=5e-3) and network > value["bicubic"]
        gains.append(network - value["bicubic"])
    assert sum(gains) / len(gains) > 0.8


# --- initialisation ---------------------------------------------------------------------------------------------------


def test_a_network_can_begin_as_the_best_linear_upscaler(folders):
    torch.manual_seed(0)
    model = python_models.create("span", deploy=False, feature_channels=28, num_blocks=1, img_range=4.0).train()
    pictures = Pictures(find_pictures([folders / "train"], "data.train"), scale=4, smallest=16)
    crops = Crops(pictures, patch=16, scale=4, seed=0)
    sample = list(batches(crops, begin=0, batch=16, count=4))
    initialize.linear(model, sample)

    def error() -> float:
        with torch.no_grad():
            differences = [model(low / 255) - high / 255 for low, high in sample]
        return float(sum(d.double().square().sum() for d in differences))

    tail, best = model.upsampler[0], error()
    for seed in range(4):
        step = torch.randn(tail.weight.shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
        with torch.no_grad():
            tail.weight.add_(step)
            assert error() > best
            tail.weight.sub_(step)
    # It is better than interpolation on what it was fitted to, and the deep layers learn from the first step on.
    model.eval()
    ours = evaluate.validate(model, pictures, 4, ALONE)
    assert np.mean(ours) > np.mean(evaluate.bicubic_psnr(pictures, 4))
    model.train()
    (model(sample[0][0] / 255) - sample[0][1] / 255).abs().mean().backward()
    assert float(model.conv_cat.weight.grad[:, 28:].abs().max()) > 0


def test_only_some_networks_can_begin_linear(folders, tmp_path):
    changes = [("model.name", "rlfn"), ("model.options", {}), ("model.initialization", "linear")]
    with pytest.raises(ConfigError, match=r"model.initialization: rlfn cannot begin as a linear upscaler; use he"):
        Trainer(settings(folders, tmp_path / "run", *changes), ALONE)
    with pytest.raises(TypeError, match=r"model: RLFN has no way past its deep layers"):
        initialize.linear(python_models.create("rlfn"), [])
