"""Threads, processes, and the memory of many calls."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import OPERATOR_CASES, backends_with, environment, in_new_process, to
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import esr_kernels
import python_models
from esr_kernels import memory
from esr_kernels.cases import OperatorCase
from esr_kernels.timing import thread_count

ROOT = Path(__file__).resolve().parent.parent
NATIVE = "native-cpu" in backends_with("conv3x3")
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not compiled")
needs_statm = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="this system does not tell how much memory is used"
)


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return esr_kernels.optimize(python_models.create("span", feature_channels=16))


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return small_network()


def upscale(model: torch.nn.Module, seed: int, size: int = 20) -> Tensor:
    with torch.inference_mode():
        return model(torch.rand(1, 3, size, size + seed, generator=torch.Generator().manual_seed(seed)))


# --- threads --------------------------------------------------------------------------------------------------------


def in_threads(work: Callable[[int], Any], count: int = 8) -> None:
    """Runs work(0), work(1), ... at the same time and raises what any of them raised."""
    failures: list[BaseException] = []
    together = threading.Barrier(count)

    def run(i: int) -> None:
        try:
            together.wait(timeout=60)
            work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.name)
def test_one_operator_in_many_threads(case: OperatorCase) -> None:
    """Forward and backward at the same time, on tensors of different sizes and on shared weights."""
    arguments = [case.arguments(1, 16 + i, 17, seed=i) for i in range(4)]
    shared = {name: arguments[0][name] for name in case.parameters}

    def step(i: int) -> list[Tensor]:
        leaves: list[Tensor] = []

        def leaf(t: Tensor) -> Tensor:
            leaves.append(t.clone().requires_grad_())
            return leaves[-1]

        given = {
            name: [leaf(t) for t in value] if isinstance(value, list) else leaf(value)
            for name, value in (arguments[i] | shared).items()
        }
        out = case.fused(given)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = [step(i) for i in range(4)]

    def work(i: int) -> None:
        for _ in range(5):
            for got, want in zip(step(i % 4), expected[i % 4], strict=True):
                assert torch.equal(got, want)

    in_threads(work)


def test_two_models_in_many_threads(network: torch.nn.Module) -> None:
    other = esr_kernels.optimize(python_models.create("rlfn"))
    expected = [(upscale(network, i), upscale(other, i)) for i in range(4)]

    def work(i: int) -> None:
        for _ in range(3):
            for model, want in zip((network, other), expected[i % 4], strict=True):
                assert torch.equal(upscale(model, i % 4), want)

    in_threads(work)


def test_first_calls_at_the_same_time() -> None:
    """A network nobody has called yet: compiled and packed once or several times, with one result."""
    torch.manual_seed(1)
    model = esr_kernels.optimize(python_models.create("span", feature_channels=12))
    results: list[Tensor | None] = [None] * 8

    def work(i: int) -> None:
        results[i] = upscale(model, 3)

    in_threads(work)
    assert all(torch.equal(r, results[0]) for r in results)


# --- processes ------------------------------------------------------------------------------------------------------


def _in_child(model: Any, seed: int, queue: Any) -> None:
    queue.put(upscale(model, seed).numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("threads", [1, 2])
def test_child_processes(network: torch.nn.Module, method: str, threads: int) -> None:
    """A child has its parent's result, although OpenMP's threads have been running in the parent."""
    if method == "fork" and threads > 1:
        # GNU's OpenMP does not survive a fork once it has threads: its own limit, PyTorch's plain networks have it too.
        pytest.skip("a process that forks has used one thread")
    context = multiprocessing.get_context(method)
    torch.manual_seed(0)
    with thread_count(threads):
        model = network if method == "fork" else python_models.create("span", feature_channels=16)
        expected = [upscale(model, seed) for seed in range(2)]
        queue = context.Queue()
        children = [context.Process(target=_in_child, args=(model, seed, queue)) for seed in (0, 1)]
        for child in children:
            child.start()
        results = [torch.from_numpy(queue.get(timeout=120)) for _ in children]
        for child in children:
            child.join(timeout=60)
            assert child.exitcode == 0
    for want in expected:
        assert any(r.shape == want.shape and torch.equal(r, want) for r in results)


class Upscaled(Dataset):
    """Pictures that a worker upscales, as degradation pipelines do."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return upscale(self.model, 1, 16 + index)[0, :, :8, :8].clone()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method: str) -> None:
    torch.manual_seed(0)
    data = Upscaled(python_models.create("span", feature_channels=8))
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=method)
    got = torch.cat(list(loader))
    assert torch.equal(got, torch.stack([data[i] for i in range(6)]))


# --- modes of PyTorch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.name)
def test_inference_mode_inside_and_outside(case: OperatorCase) -> None:
    arguments = case.arguments(1, 16, 17)
    want = case.fused(arguments)
    with torch.inference_mode():
        made_inside = case.arguments(1, 16, 17)
        assert torch.equal(case.fused(arguments), want)
        assert torch.equal(case.fused(made_inside), want)
        with torch.inference_mode(False):
            assert torch.equal(case.fused(arguments), want)
    # Tensors of inference mode outside of it, where PyTorch keeps no gradients for them.
    assert torch.equal(case.fused(made_inside), want)


@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.name)
def test_autocast_nests(case: OperatorCase) -> None:
    """The innermost context counts: off inside of on, another dtype inside, and what a call was before."""
    arguments = case.arguments(1, 16, 17)
    float32 = case.fused(arguments)
    kept = case.parameters if case.operator == "selective_scan" else ()
    lower = {
        d: case.fused({name: t if name in kept else to(t, d) for name, t in arguments.items()})
        for d in (torch.float16, torch.bfloat16)
    }
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(case.fused(arguments), lower[torch.bfloat16])
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(case.fused(arguments), float32)
            with torch.autocast("cpu", torch.float16):
                assert torch.equal(case.fused(arguments), lower[torch.float16])
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(case.fused(arguments), lower[torch.float16])
        assert torch.equal(case.fused(arguments), lower[torch.bfloat16])
    assert torch.equal(case.fused(arguments), float32)


# --- memory ---------------------------------------------------------------------------------------------------------


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _growth_of_calls() -> tuple[int, int, int]:
    """Calls, and by how many bytes the workspaces and the process grew with them."""
    network = small_network()
    arguments = [(case, case.arguments(1, 15, 16)) for case in OPERATOR_CASES]
    weight = torch.randn(4, 5, 3, 3, requires_grad=True)
    x = torch.randn(1, 5, 9, 10)

    def calls(rounds: int) -> int:
        count = 0
        for number in range(rounds):
            for case, given in arguments:
                case.fused(given)
            out = esr_kernels.functional.conv3x3(x, weight, activation="gelu")
            out.sum().backward()
            with torch.no_grad():
                weight.sub_(1e-3 * weight.grad)
            weight.grad = None
            upscale(network, number % 5, 15)
            count += len(arguments) + 3
        return count

    calls(60)
    memory.release_unused()
    blocks, before = torch.ops.esr_native.workspace_bytes(), resident()
    made = calls(750)
    memory.release_unused()
    return made, torch.ops.esr_native.workspace_bytes() - blocks, resident() - before


@needs_native
@needs_statm
def test_ten_thousand_calls_do_not_grow() -> None:
    """Operators, gradients, a network at changing sizes, and a parameter that changes at every call: 10,500 calls."""
    made, workspaces, grown = in_new_process(_growth_of_calls)
    assert made >= 10_000
    assert workspaces <= 0
    assert grown < 2 * 2**20


def _growth_of_networks() -> int:
    def network(seed: int) -> list[weakref.ref[Any]]:
        torch.manual_seed(seed)
        wide = torch.nn.Conv2d(256, 256, 3, padding=1)
        first, last = torch.nn.Conv2d(3, 256, 3, padding=1), torch.nn.Conv2d(256, 12, 3, padding=1)
        model = esr_kernels.optimize(torch.nn.Sequential(first, torch.nn.ReLU(), wide, last, torch.nn.PixelShuffle(2)))
        assert model.plan is not None
        upscale(model, 1)
        return [weakref.ref(kept) for kept in (model, *model.parameters())]

    for seed in range(2):
        network(seed)
    memory.release_unused()
    before = resident()
    gone = [reference for seed in range(5) for reference in network(seed)]
    memory.release_unused()
    assert all(reference() is None for reference in gone)
    return resident() - before


@pytest.mark.slow
@needs_native
@needs_statm
def test_networks_that_come_and_go_give_their_memory_back() -> None:
    """Five networks with about 14 MB of weights each, packed ones included; a trace leaves about 1 MB in PyTorch."""
    assert in_new_process(_growth_of_networks) < 30 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["span", "rlfn", "errn", "rden"])
@needs_native
def test_peak_memory_is_not_above_eager(name: str) -> None:
    """Beyond weights and picture, on 256x256 pixels; docs/reliability.md has all networks."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", "--model", name, "--json", "-"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    (row,) = json.loads(done.stdout)
    if row["eager"] is None:
        pytest.skip("this system does not tell how much memory was used")
    assert 0 < row["fused"] <= row["eager"]
