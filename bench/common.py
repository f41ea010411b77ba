"""What the benchmark files share: the engines that stand beside each other, and the check before each timing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import esr_kernels
from esr_kernels import cases
from esr_kernels.timing import thread_count

EAGER = "eager"
EAGER_CHANNELS_LAST = "eager channels_last"
# The reference is plain PyTorch inside: once is enough to see what the way through the operator costs.
_LEFT_OUT = ("reference", " channels_last")
# Training has no chosen backend: forward and backward each run on the first one that can.
TRAINING_ENGINES = ("fused", EAGER, EAGER_CHANNELS_LAST)


@dataclass(frozen=True)
class Settings:
    """The command line's choices."""

    device: str
    dtype: torch.dtype
    size: tuple[int, int] | None
    batch: int
    threads: int

    def shape(self, default: tuple[int, int]) -> tuple[int, int, int]:
        return (self.batch, *(self.size or default))


def backends(device: str, operator: str = "run_plan") -> list[str]:
    """Backends that can run the operator on the device."""
    found = esr_kernels.list_backends()
    return [b.name for b in found if operator in b.operators and device in cases.BACKEND_DEVICES[b.name]]


def operator_engines(device: str, operator: str) -> list[str]:
    """Every backend of the operator, all but the reference in both memory formats, then plain PyTorch in both."""
    names = backends(device, operator)
    fused = [f"{b}{suffix}" for b in names for suffix in ("", " channels_last") if (b, suffix) != _LEFT_OUT]
    return [*fused, EAGER, EAGER_CHANNELS_LAST]


def model_engines(device: str) -> list[str]:
    return [*backends(device), "modules", EAGER, EAGER_CHANNELS_LAST]


def _backend(engine: str) -> str | None:
    name = engine.removesuffix(" channels_last")
    return name if name in cases.BACKEND_DEVICES else None


def _chosen(engine: str) -> AbstractContextManager[None]:
    name = _backend(engine)
    return nullcontext() if name is None else esr_kernels.use_backend(name)


def _memory_format(engine: str) -> torch.memory_format:
    return torch.channels_last if engine.endswith("channels_last") else torch.contiguous_format


def _time(
    benchmark: Any, function: Callable[[], object], settings: Settings, group: str, flops: int, check: cases.Check
) -> None:
    shape = f"{settings.device}, {settings.threads} thread(s)" if settings.device == "cpu" else settings.device
    benchmark.group = f"{group} | {str(settings.dtype).removeprefix('torch.')}, {shape}"
    benchmark.extra_info.update(check=check.to_json(), gflop=flops / 1e9, threads=settings.threads)
    benchmark(function)


def _require(check: cases.Check, engine: str) -> None:
    if not check.ok:
        pytest.fail(f"{engine}: wrong result, not timed: {check}", pytrace=False)


def _count(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@lru_cache(maxsize=4)
def _exact(case: cases.OperatorCase, settings: Settings, shape: tuple[int, int, int]) -> tuple[Tensor, float]:
    """The result in float64, and the relative error of plain PyTorch in the dtype at hand."""
    arguments = case.arguments(*shape, dtype=settings.dtype, device=settings.device)
    exact = case.plain(cases.double(arguments))
    return exact, cases.relative_error(case.plain(arguments), exact)


def forward(benchmark: Any, case: cases.OperatorCase, engine: str, settings: Settings, size: tuple[int, int]) -> None:
    """Time one engine's forward call of an operator, after comparing it with float64."""
    shape = settings.shape(size)
    arguments = case.arguments(
        *shape, dtype=settings.dtype, device=settings.device, memory_format=_memory_format(engine)
    )
    call = case.plain if engine in (EAGER, EAGER_CHANNELS_LAST) else case.fused
    with thread_count(settings.threads), torch.inference_mode(), _chosen(engine):
        exact, plain_error = _exact(case, settings, shape)
        try:
            result = call(arguments)
        except esr_kernels.BackendError as error:
            pytest.skip(str(error))
        backend = _backend(engine)
        if backend is None:
            tolerance = cases.peer_tolerance(settings.dtype, plain_error)
        else:
            tolerance = cases.operator_tolerance(case.operator, backend, settings.dtype, plain_error)
        check = cases.compare(result, exact, tolerance, settings.dtype)
        _require(check, engine)
        group = f"{case.name} {'x'.join(map(str, shape))} forward"
        _time(benchmark, lambda: call(arguments), settings, group, _count(lambda: call(arguments)), check)


def _leaves(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call, lists opened, each asking for its gradient."""
    tensors = [t for value in arguments.values() for t in ([value] if isinstance(value, Tensor) else value)]
    return [t.requires_grad_() for t in tensors]


def training(benchmark: Any, case: cases.OperatorCase, engine: str, settings: Settings, size: tuple[int, int]) -> None:
    """Time forward and backward together, after comparing the gradients with float64."""
    shape = settings.shape(size)
    call = case.fused if engine == "fused" else case.plain
    arguments = case.arguments(
        *shape, dtype=settings.dtype, device=settings.device, memory_format=_memory_format(engine)
    )
    exact_arguments = cases.double(arguments)
    leaves, exact_leaves = _leaves(arguments), _leaves(exact_arguments)
    with thread_count(settings.threads):
        exact_result = case.plain(exact_arguments)
        generator = torch.Generator().manual_seed(1)
        seed = torch.randn(exact_result.shape, generator=generator).to(settings.device, settings.dtype)
        exact = torch.autograd.grad(exact_result, exact_leaves, cases.double(seed))

        def step() -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(arguments), leaves, seed)

        # Gradients are sums over all pixels: the allowance of a whole network, not of one call.
        tolerance = cases.NETWORK_TOLERANCE if settings.dtype == torch.float32 else cases.PEER_TOLERANCE
        checks = [cases.compare(g, e, tolerance) for g, e in zip(step(), exact, strict=True)]
        worst = max(checks, key=lambda check: (not check.ok, check.relative))
        _require(worst, engine)
        group = f"{case.name} {'x'.join(map(str, shape))} forward and backward"
        _time(benchmark, step, settings, group, _count(step), worst)


@lru_cache(maxsize=2)
def _model(
    name: str, settings: Settings, shape: tuple[int, int, int]
) -> tuple[nn.Module, nn.Module, Tensor, Tensor, float]:
    """Fused and plain network, an image, the float64 result and the relative error of plain PyTorch."""
    fused, plain = cases.model_pair(name)
    image = cases.random_image(fused, *shape).to(settings.device, settings.dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(cases.double(image))
    error = 0.0
    if settings.dtype != torch.float32:
        with torch.inference_mode():
            error = cases.relative_error(copy.deepcopy(plain).to(settings.device, settings.dtype)(image), exact)
    return fused, plain, image, exact, error


def network(benchmark: Any, name: str, engine: str, settings: Settings, size: tuple[int, int]) -> None:
    """Time one engine's run of a whole network, after comparing it with float64."""
    shape = settings.shape(size)
    fused, plain, image, exact, plain_error = _model(name, settings, shape)
    own = engine not in (EAGER, EAGER_CHANNELS_LAST)
    with thread_count(settings.threads), _chosen(engine):
        model: nn.Module
        if engine == "modules":
            model = copy.deepcopy(fused).to(settings.device, settings.dtype)
        elif own:
            model = esr_kernels.optimize(copy.deepcopy(fused).to(settings.device), dtype=settings.dtype)
        else:
            memory_format = _memory_format(engine)
            model = copy.deepcopy(plain).to(settings.device, settings.dtype).to(memory_format=memory_format)
            image = image.contiguous(memory_format=memory_format)
        with torch.inference_mode():
            try:
                result = model(image)
            except esr_kernels.BackendError as error:
                pytest.skip(str(error))
            allowed = cases.network_tolerance if own else cases.peer_tolerance
            check = cases.compare(result, exact, allowed(settings.dtype, plain_error), settings.dtype)
            _require(check, engine)
            group = f"{name} {'x'.join(map(str, shape))}"
            _time(benchmark, lambda: model(image), settings, group, _count(lambda: model(image)), check)


def parametrize(metafunc: Any, operator: str, training_case: str) -> None:
    """Parametrise `test_forward` over the operator's cases, `test_training` over one, both over engines."""
    device = metafunc.config.getoption("device")
    trains = metafunc.function.__name__ == "test_training"
    found = [case for case in cases.operator_cases(operator) if not trains or case.label == training_case]
    pairs = list(itertools.product(found, TRAINING_ENGINES if trains else operator_engines(device, operator)))
    metafunc.parametrize(
        ("case", "engine"),
        [(case.name, engine) for case, engine in pairs],
        ids=[f"{engine}-{case.label}" for case, engine in pairs],
        indirect=["case"],
    )
