"""What training does with operators, on every backend: wanted gradients, layouts, autocast, checkpointing, torch.func,
steps with a scaler and compiled whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import OPERATOR_CASES, expected_format
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import esr_kernels
from esr_kernels import SPAB, PixelShuffleUpsampler, cases
from esr_kernels.cases import OperatorCase
from esr_kernels.modules import Conv3x3

RUNS = [
    pytest.param(case, status.name, id=f"{case.name.strip().replace(' ', '-')}-{status.name}")
    for case in OPERATOR_CASES
    for status in esr_kernels.list_backends()
    if status.available and f"{case.operator}_backward" in status.operators
]
HALF = [torch.float16, torch.bfloat16]
every_operator = pytest.mark.parametrize(("case", "backend"), RUNS, indirect=["backend"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with esr_kernels.use_backend(request.param):
        yield request.param


def inputs(case: OperatorCase, layout: torch.memory_format = torch.contiguous_format) -> dict[str, Any]:
    shape = (2, 16, 17) if case.operator == "esa" else (2, 6, 7)
    return case.arguments(*shape, memory_format=layout)


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    """The tensors in order, also those in lists."""
    return [t for v in arguments.values() for t in (v if isinstance(v, list) else [v])]


def filled(arguments: dict[str, Any], values: list[Tensor]) -> dict[str, Any]:
    """The arguments with other tensors in their places."""
    given = iter(values)
    return {k: [next(given) for _ in v] if isinstance(v, list) else next(given) for k, v in arguments.items()}


def gradients(
    call: Callable[[dict[str, Any]], Tensor], arguments: dict[str, Any], wanted: list[bool] | None = None
) -> list[Tensor | None]:
    """Of a weighted sum of the result, to every tensor that is wanted."""
    values = [t.detach().clone() for t in leaves(arguments)]
    wanted = [True] * len(values) if wanted is None else wanted
    for t, needed in zip(values, wanted, strict=True):
        t.requires_grad_(needed)
    out = call(filled(arguments, values))
    found = iter(torch.autograd.grad(out, [t for t in values if t.requires_grad], seed(out)) if any(wanted) else ())
    return [next(found) if t.requires_grad else None for t in values]


def seed(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(out.shape, generator=generator).to(out.dtype)


def distance(actual: Tensor | None, expected: Tensor | None) -> float:
    """Norm of the difference, relative to that of what is expected."""
    assert actual is not None and expected is not None and actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# --- operators -------------------------------------------------------------------------------------------------------


@every_operator
def test_gradients_in_every_layout(case: OperatorCase, backend: str) -> None:
    """Against float64; each in the memory format of its tensor."""
    for layout in (torch.contiguous_format, torch.channels_last):
        arguments = inputs(case, layout)
        exact = gradients(case.plain, cases.convert(arguments, torch.float64))
        for got, expected, t in zip(gradients(case.fused, arguments), exact, leaves(arguments), strict=True):
            assert distance(got, expected) < 1e-4
            # A residual may get the result's gradient itself; a scan's maps get those of contiguous tokens.
            if t is not arguments.get("residual") and not (case.operator == "selective_scan" and t.dim() == 4):
                assert got is not None and got.is_contiguous(memory_format=expected_format(t))


class Masks(TorchDispatchMode):
    """Notes which gradients the backward operators are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "esr" and func._schema.name.endswith("_backward"):
            names = [argument.name for argument in func._schema.arguments]
            self.seen.append(list(args[names.index("output_mask")]))
        return func(*args, **(kwargs or {}))


@every_operator
def test_what_needs_no_gradient_is_not_computed(case: OperatorCase, backend: str) -> None:
    """Each tensor alone, as the input of a frozen layer or one thawed parameter, and none at all. Of the backends whose
    own tests ask for every gradient alone, a few."""
    arguments = inputs(case)
    everything = gradients(case.fused, arguments)
    every = range(len(everything))
    few = {0, 1, len(everything) - 1}.intersection(every) if backend in ("triton", "native-cuda") else every
    for i in sorted(few):
        wanted = [k == i for k in range(len(everything))]
        with Masks() as masks:
            got = gradients(case.fused, arguments, wanted)
        assert [sum(mask) for mask in masks.seen] == [1]
        assert [g is not None for g in got] == wanted
        assert distance(got[i], everything[i]) < 1e-6
    with Masks() as masks:
        assert not any(g is not None for g in gradients(case.fused, arguments, [False] * len(everything)))
    assert masks.seen == []


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_operator
def test_autocast(case: OperatorCase, backend: str, dtype: torch.dtype) -> None:
    """Results of the half type, gradients in float32 and about as near to float64 as PyTorch's."""
    arguments = inputs(case, torch.channels_last)

    def cast(call: Callable[[dict[str, Any]], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
        def run(arguments: dict[str, Any]) -> Tensor:
            with torch.autocast("cpu", dtype):
                return call(arguments)

        return run

    exact = gradients(case.plain, cases.convert(arguments, torch.float64))
    got, plain = (gradients(cast(call), arguments) for call in (case.fused, case.plain))
    assert cast(case.fused)(arguments).dtype == dtype
    for g, p, e, t in zip(got, plain, exact, leaves(arguments), strict=True):
        assert g is not None and g.dtype == t.dtype == torch.float32
        assert distance(g, e) <= max(2 * distance(p, e), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reentrant", [False, True])
@every_operator
def test_activation_checkpointing(case: OperatorCase, backend: str, reentrant: bool) -> None:
    arguments = inputs(case)

    def call(*given: Tensor) -> Tensor:
        return case.fused(filled(arguments, list(given)))

    # By `backward`, as a step does: the reentrant form refuses `torch.autograd.grad`.
    values = [t.requires_grad_() for t in leaves(arguments)]
    out = checkpoint(call, *values, use_reentrant=reentrant)
    out.backward(seed(out))
    for t, expected in zip(values, gradients(case.fused, arguments), strict=True):
        assert distance(t.grad, expected) < 1e-6


@every_operator
def test_func_grad(case: OperatorCase, backend: str) -> None:
    """`torch.func.grad` and `vjp` to all tensors at once; a map over gradients is refused, and not wrong."""
    arguments = inputs(case)
    values = leaves(arguments)

    def call(*given: Tensor) -> Tensor:
        return case.fused(filled(arguments, list(given)))

    def loss(*given: Tensor) -> Tensor:
        out = call(*given)
        return (out * seed(out)).sum()

    expected = gradients(case.fused, arguments)
    out, pull = torch.func.vjp(call, *values)
    for got in (torch.func.grad(loss, tuple(range(len(values))))(*values), pull(seed(out))):
        for g, e in zip(got, expected, strict=True):
            assert distance(g, e) < 1e-6
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda first: torch.func.grad(loss)(first, *values[1:]))(torch.stack([values[0], values[0]]))


# --- a network -------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, SPAN's block in training form and the tail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.tail = Conv3x3(3, 4), SPAB(4), PixelShuffleUpsampler(4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.block(self.first(x)))


@pytest.fixture(params=[b.name for b in esr_kernels.list_backends() if b.available])
def small(request: pytest.FixtureRequest) -> Iterator[tuple[Small, Tensor, Tensor]]:
    """The network, images and what to make of them, on every backend."""
    with esr_kernels.use_backend(request.param):
        yield Small().train(), torch.rand(2, 3, 6, 7), torch.rand(2, 3, 12, 14)


def test_steps_with_a_scaler(small: tuple[Small, Tensor, Tensor]) -> None:
    """float16: an overflow leaves a step out and halves the scale, the steps after it train."""
    net, x, y = small
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.detach().clone() for p in net.parameters()]
    losses = []
    for i in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(net(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
        if i == 0:
            assert scaler.get_scale() == 2.0**39 and all(map(torch.equal, before, net.parameters()))
            scaler.update(2.0**10)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters()) and losses[-1] < losses[1]


def test_frozen_layers(small: tuple[Small, Tensor, Tensor]) -> None:
    """The tail alone is tuned: the backward pass does not go beyond it."""
    net, x, y = small
    F.mse_loss(net(x), y).backward()
    expected = [p.grad for p in net.tail.parameters()]
    net.zero_grad()
    net.requires_grad_(False)
    net.tail.requires_grad_()
    with Masks() as masks:
        F.mse_loss(net(x), y).backward()
    assert masks.seen == [[False, True, True, False]]
    for p, e in zip(net.tail.parameters(), expected, strict=True):
        assert distance(p.grad, e) < 1e-6
    assert all(p.grad is None for m in (net.first, net.block) for p in m.parameters())


def test_a_step_compiled_whole(small: tuple[Small, Tensor, Tensor]) -> None:
    """Forward, loss, backward and optimiser under torch.compile: the parameters of eager steps."""
    net, x, y = small
    twin = copy.deepcopy(net)

    def trainer(model: Small) -> Callable[[Tensor, Tensor], Tensor]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)

        def step(x: Tensor, y: Tensor) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.l1_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    torch._dynamo.reset()
    eager, compiled = trainer(net), torch.compile(trainer(twin), backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x, y), eager(x, y))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)
    torch._dynamo.reset()
