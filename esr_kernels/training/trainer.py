"""The training loop: stages, checkpoints, resuming, validation."""

from __future__ import annotations

import copy
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import python_models
from python_models.base import Network

from .. import reparam
from ..checkpoint import load_state_dict
from ..errors import TrainingError
from ..files import atomically
from ..timing import write_json
from . import initialize
from .config import Config, ConfigError, Stage, differences, expanded
from .data import Crops, Pictures, batches, find_pictures, worker_count
from .distributed import Process
from .ema import EMA
from .evaluate import validate
from .export import export, save_tensors
from .log import Log, Scalars
from .losses import WeightedLoss
from .photographs import HELD_OUT, TRAIN, files

STATE = "state.pt"
FORMAT = 1
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FIT_BATCH, _FIT_BATCHES = 16, 20  # patches for `initialize.linear`


class Trainer:
    """One run.

    Args:
        config: checked by `config.check`.
        process: this one among those of the run.
        resume: go on with the state in the run's folder.
        progress: show it on the terminal.
        say: takes the lines for the user.

    Raises:
        ConfigError: the configuration does not fit the pictures, the network or the state to go on with.
        TrainingError: the folder holds another run.
        ImageError, FileNotFoundError, CheckpointError: of pictures and weights.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        *,
        resume: bool = False,
        progress: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.process, self.say = config, process, say if process.first else _silent
        self.progress = progress and process.first
        self.stages = expanded(config)
        if not config.output:
            raise ConfigError("output: name the folder of the run")
        self.folder = Path(config.output)
        self.state_file = self.folder / STATE
        if resume and not self.state_file.is_file():
            raise TrainingError(f"{self.folder}: there is no {STATE} to go on with")
        if not resume and self.state_file.exists():
            raise TrainingError(f"{self.folder}: holds a run already; go on with --resume, or choose another --output")

        torch.manual_seed(config.seed)
        self.model = self._network()
        self.scale = self.model.scale
        self.train_pictures, self.held_out = self._pictures()
        self.stage, self.iteration, self.samples, self.steps, self.seconds = 0, 0, 0, 0, 0.0
        self.best = float("-inf")
        self.losses: list[float] = []  # since the last line of the log
        if config.model.initialization == "linear" and not config.model.weights and not resume:
            self._begin_linear()
        self.model.to(process.device)
        state = self._read_state() if resume else None
        if state is not None:
            self.model.load_state_dict(state["model"])
        self.network: nn.Module = self.model
        if process.world > 1:
            devices = [process.device] if process.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.model, device_ids=devices)
        self.criterion: WeightedLoss
        self.optimizer: torch.optim.Optimizer
        self.scaler: torch.amp.GradScaler
        self.ema: EMA | None = None
        self._begin_stage(fresh=state is None)
        if state is not None:
            self._restore(state)
        self._stop = False

    # --- making the run -------------------------------------------------------------------------------------------

    def _network(self) -> Network:
        settings = self.config.model
        model = python_models.create(
            settings.name, settings.weights or None, **{"deploy": settings.deploy, **settings.options}
        )
        if model.in_channels != 3:
            raise ConfigError(
                f"model.options: training takes RGB pictures, this network has {model.in_channels} channels"
            )
        if settings.initialization == "he" and not settings.weights:
            initialize.he(model)
        if settings.initialization == "linear" and not hasattr(model, "only_shallow"):
            raise ConfigError(f"model.initialization: {settings.name} cannot begin as a linear upscaler; use he")
        model.train()
        return model

    def _begin_linear(self) -> None:
        patch = next((s.patch for s in self.stages if s.iterations), None)
        if patch is None:
            return
        crops = Crops(self.train_pictures, patch=patch, scale=self.scale, seed=self.config.seed)
        initialize.linear(self.model, batches(crops, begin=0, batch=_FIT_BATCH, count=_FIT_BATCHES))

    def _pictures(self) -> tuple[Pictures, Pictures]:
        data, patches = self.config.data, [s.patch for s in self.stages if s.iterations]
        minimum = self.model.minimum_size
        for stage in self.stages:
            where = f"stage.{stage.name}"
            if stage.iterations and (stage.patch % self.scale or stage.patch < self.scale * minimum):
                raise ConfigError(
                    f"{where}.patch: expected a multiple of {self.scale} of at least {self.scale * minimum} pixels for "
                    f"{self.config.model.name}, got {stage.patch}"
                )
            if stage.iterations and stage.batch % self.process.world:
                raise ConfigError(
                    f"{where}.batch: expected a multiple of the {self.process.world} processes, got {stage.batch}"
                )
        train, held_out = find_pictures(data.train, "data.train"), find_pictures(data.validation, "data.validation")
        if data.photographs:
            train, held_out = train + files(TRAIN), held_out + files(HELD_OUT)
        if not train:
            raise ConfigError("data.train: name folders or files with pictures, or set data.photographs")
        both = {p.resolve() for p in train} & {p.resolve() for p in held_out}
        if both:
            raise ConfigError(f"data.validation: {min(both)} is trained on as well")
        cache = self.config.loading.cache_mib << 20
        convert = data.convert
        # Something must be left inside the border.
        validation = Pictures(
            held_out, scale=self.scale, smallest=max(self.scale * minimum, 16), convert=convert, cache_bytes=cache // 4
        )
        training = Pictures(
            train,
            scale=self.scale,
            smallest=max(patches, default=self.scale),
            convert=convert,
            sizes=data.scales,
            cache_bytes=cache,
        )
        return training, validation

    def _begin_stage(self, *, fresh: bool) -> None:
        """Optimizer, scaler and average of the current stage; `fresh`: with the weights it starts from."""
        if self.stage >= len(self.stages):
            return
        stage, settings = self.stages[self.stage], self.config.optimizer
        if fresh and stage.average:
            self.model.load_state_dict(_mean([load_state_dict(self._result_file(name)) for name in stage.average]))
        elif fresh and stage.start:
            self.model.load_state_dict(load_state_dict(self._result_file(stage.start)))
        self.criterion = WeightedLoss(stage.losses, self.model.data_range)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
        self.optimizer = kind(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=stage.rate,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=settings.autocast == "fp16")
        self.ema = EMA(self.model, settings.ema) if settings.ema else None

    # --- the state ------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        _, numbers, *rest = np.random.get_state(legacy=True)
        rng = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.process.device) if self.process.device.type == "cuda" else None,
            "python": random.getstate(),
            "numpy": [torch.from_numpy(np.asarray(numbers).astype(np.int64)), *rest],
        }
        return {
            "format": FORMAT,
            "config": self.config.decisive(),
            "pictures": self.train_pictures.fingerprint(),
            "stage": self.stage,
            "iteration": self.iteration,
            "samples": self.samples,
            "steps": self.steps,
            "seconds": self.seconds,
            "best": self.best,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "rng": rng,
        }

    def _save(self) -> None:
        if self.process.first:
            atomically(self.state_file, lambda path: torch.save(self._state(), path))

    def _read_state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self.state_file, map_location="cpu", weights_only=True)
            config, pictures = state["config"], state["pictures"]
            known = state["format"] == FORMAT
        except Exception as error:
            # A damaged file can make the reader raise nearly anything.
            raise TrainingError(f"{self.state_file}: not the state of a run: {str(error).splitlines()[0]}") from error
        if not known:
            raise TrainingError(f"{self.state_file}: written by another version (format {state['format']})")
        different = differences(config, self.config.decisive())
        if different:
            raise ConfigError(f"{self.state_file}: of another configuration: {'; '.join(different[:4])}")
        if pictures != self.train_pictures.fingerprint():
            raise ConfigError(
                f"{self.state_file}: of a run with other training pictures (names, sizes or order differ)"
            )
        for key in ("stage", "iteration", "samples", "steps", "seconds", "best", "losses"):
            setattr(self, key, state[key])
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        if self.stage < len(self.stages):
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.load_state_dict(state["ema"])
        rng = state["rng"]
        torch.set_rng_state(rng["torch"])
        if rng["cuda"] is not None and self.process.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.process.device)
        version, numbers, gauss = rng["python"]
        random.setstate((version, tuple(numbers), gauss))
        keys, *rest = rng["numpy"]
        np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))

    # --- running --------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the card of the result, which is in the run's folder.

        Raises:
            TrainingError: the loss or the gradient is not finite; the last state is kept.
            KeyboardInterrupt: after the state has been saved.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.process.first:
            write_json(self.folder / "config.json", asdict(self.config))
        kept = self.train_pictures.load(progress=self.progress)
        self.held_out.load()
        workers = worker_count(self.config.loading.workers, self.process.device.type, self.process.world)
        self.say(
            f"pictures  {len(self.train_pictures)} to train on ({kept} in memory), {len(self.held_out)} held out, "
            f"{workers} loading processes"
        )
        if not self.state_file.exists():
            self._save()
        wanted = self.config.run.tensorboard and self.process.first
        self.process.wait()
        with (
            self._stoppable(),
            Log(self.folder / "log.csv", self.steps, self.process.first) as self.log,
            Scalars(self.folder / "tensorboard", self.steps, wanted) as self.scalars,
            tqdm(
                total=sum(s.iterations for s in self.stages), initial=self.steps, unit="it", disable=not self.progress
            ) as self.bar,
        ):
            while self.stage < len(self.stages):
                self._run_stage(workers)
                self._end_stage()
                if self._stop:
                    self._halt()
        return export(self)

    def _run_stage(self, workers: int) -> None:
        stage = self.stages[self.stage]
        if not stage.iterations:
            return
        what = " + ".join(f"{w:g} {n}" if w != 1 else n for n, w in stage.losses.items())
        self.say(
            f"stage     {stage.name}: iteration {self.iteration} of {stage.iterations}, patches of {stage.patch}, "
            f"batch {stage.batch}, {what}, rate {stage.rate:g} {stage.schedule.name}"
        )
        crops = Crops(
            self.train_pictures,
            patch=stage.patch,
            scale=self.scale,
            seed=self.config.seed,
            augment=self.config.data.augment,
        )
        loader = batches(
            crops,
            begin=self.samples,
            batch=stage.batch,
            count=stage.iterations - self.iteration,
            rank=self.process.rank,
            world=self.process.world,
            workers=workers,
            pin=self.process.device.type == "cuda",
        )
        self.model.train()
        run = self.config.run
        begun = time.monotonic()
        for low, high in self._loaded(loader):
            self.losses.append(self._step(stage, low, high))
            self.seconds += time.monotonic() - begun
            self.iteration, self.steps, self.samples = self.iteration + 1, self.steps + 1, self.samples + stage.batch
            self.bar.update()
            last = self.iteration == stage.iterations
            if last or _due(self.iteration, run.log_every):
                mean = sum(self.losses) / len(self.losses)
                self.losses = []
                self.bar.set_postfix_str(f"{stage.name} loss {mean:.4g}")
                row = {"loss": mean, "rate": self.optimizer.param_groups[0]["lr"]}
                self.log.write(self.steps, stage.name, self.seconds, **row)
                self.scalars.write(self.steps, **row)
            if last or _due(self.iteration, run.validate_every):
                self._validate(stage)
            if not last and (self._stop or _due(self.iteration, run.save_every)):
                self._save()
            if self._stop and not last:
                self._halt()
            begun = time.monotonic()

    def _loaded(self, loader: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a loading process has ended: {str(error).splitlines()[0]}; {self.state_file} keeps the last state"
            ) from error

    def _halt(self) -> NoReturn:
        self.say(f"stopped   after iteration {self.steps}; the state is saved, --resume goes on from it")
        raise KeyboardInterrupt

    def _step(self, stage: Stage, low: Tensor, high: Tensor) -> float:
        """One iteration; returns the loss, the mean over all processes."""
        device, largest = self.process.device, 255 / self.model.data_range
        for group in self.optimizer.param_groups:
            group["lr"] = stage.schedule.rate(self.iteration, stage.rate, stage.iterations)
        low, high = (t.to(device, non_blocking=True).float() / largest for t in (low, high))
        dtype = _AUTOCAST.get(self.config.optimizer.autocast)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            output = self.network(low)
        loss = self.criterion(output, high)
        # All processes decide alike: on the mean of their losses, and to stop when one was asked to.
        mine = torch.stack([loss.detach().double(), torch.tensor(self._stop, device=device).double()])
        value, asked = self.process.sum(mine).tolist()
        value, self._stop = value / self.process.world, asked > 0
        if not np.isfinite(value):
            raise self._diverged(f"the loss is {value}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        clip = self.config.optimizer.clip
        if clip:
            norm = nn.utils.clip_grad_norm_(parameters, clip)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # With a scaler infinite gradients are part of its search for a factor, and it leaves such steps out.
        if not self.scaler.is_enabled() and not bool(torch.isfinite(norm)):
            raise self._diverged(f"the gradient's norm is {float(norm)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model)
        return value

    def _diverged(self, what: str) -> TrainingError:
        stage = self.stages[self.stage]
        return TrainingError(
            f"{what} in iteration {self.iteration + 1} of stage {stage.name}; {self.state_file} keeps the last saved "
            "state. A lower rate, a warm-up or optimizer.clip may help"
        )

    def _end_stage(self) -> None:
        stage = self.stages[self.stage]
        result = self.ema.averages if self.ema else self.model.state_dict()
        if stage.average:
            self._validate(stage)
        if self.process.first:
            file = self._result_file(stage.name)
            file.parent.mkdir(exist_ok=True)
            save_tensors(file, result, {"model": self.config.model.name, "stage": stage.name})
        # The next stage goes on with the average.
        self.model.load_state_dict(result)
        self.process.wait()
        self.stage, self.iteration = self.stage + 1, 0
        self._begin_stage(fresh=True)
        self._save()

    def _result_file(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.safetensors"

    def result(self) -> Network:
        """The network as it is validated and kept: the averaged weights in deploy form, in eval mode."""
        model = copy.deepcopy(self.model)
        if self.ema:
            model.load_state_dict(self.ema.averages)
        return reparam.deploy(model).eval().standard()

    def _validate(self, stage: Stage) -> None:
        if not len(self.held_out):
            return
        model, process = self.result(), self.process
        values = validate(model, self.held_out, self.scale, process)
        mean = sum(values) / len(values)
        self.best = max(self.best, mean)
        self.log.write(self.steps, stage.name, self.seconds, psnr=mean)
        self.scalars.write(self.steps, psnr=mean)
        self.scalars.pictures(self.steps, model, self.held_out, self.scale, process.device, self.config.run.samples)
        each = ", ".join(f"{self.held_out.name(i)} {values[i]:.2f}" for i in range(min(len(values), 4)))
        more = ", ..." if len(values) > 4 else ""
        message = f"iteration {self.steps}, {self.seconds:.0f} s: PSNR {mean:.3f} dB ({each}{more})"
        if self.progress:
            self.bar.write(message, file=sys.stdout)
        else:
            self.say(message)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run between two iterations, with its state saved; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: object) -> None:
            self._stop = True
            for n, handler in before.items():
                signal.signal(n, handler)

        try:
            for n, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(n, stop)
            yield
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)


def _silent(line: str) -> None:
    """In place of `print` on all processes but the first."""


def _due(iteration: int, every: int) -> bool:
    return every > 0 and iteration % every == 0


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor, computed in float64."""
    return {k: torch.stack([s[k].double() for s in states]).mean(0).to(v.dtype) for k, v in states[0].items()}
