"""The measurements of `bench.gpu_report`, one process per part: `python -m bench.gpu_parts JOB`, a `Job` as JSON."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import esr_kernels
from bench import common, jobs, roofline
from bench.gpu_engines import (
    PRECISIONS,
    Engine,
    Options,
    Subject,
    captured,
    measure,
    microseconds,
    precision,
    require_device,
    synchronize,
)
from bench.jobs import Item
from esr_kernels import cases
from esr_kernels.optimize import OptimizedModel
from esr_kernels.timing import alternate, write_json

INDUCTOR = "inductor"
INDUCTOR_CHANNELS_LAST = "inductor channels_last"
# One case per operator that has kernels for GPUs, for what is timed of one only.
ONE_CASE_EACH = (
    "conv3x3 span 28>28 silu",
    "spab span 28",
    "conv3x3_pixel_shuffle span 28 x4",
    "conv1x1 span 4x28>28",
    "esa rlfn 46 16",
    "bsconv smrn 48>48 gelu",
    "depthwise_conv egfmn 144 gated",
    "layer_norm2d rcn 40",
    "adaptive_max_pool smfan 24 to 16x16",
    "modulate egfmn 36",
)
# What is off until a GPU shows that it pays -> the cases, precisions and networks that it is for.
SWITCHES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "ESR_KERNELS_CUDA_SPAB": (
        ("spab span_tiny 26", "spab span 28", "spab span 52"),
        ("float16", "bfloat16"),
        ("span",),
    ),
    # Of many layers.
    "ESR_KERNELS_CUDA_PERSISTENT": ((), ("float16", "bfloat16"), ("span", "rlfn")),
    # For networks only: a single operator packs its weights in every call.
    "ESR_KERNELS_CUDA_WINOGRAD": ((), ("float16", "bfloat16"), ("span", "rlfn")),
    "ESR_KERNELS_CUDA_WGMMA": (
        ("conv3x3 span 28>28 silu", "conv3x3 rlfn 48>46 leaky_relu post", "conv3x3_pixel_shuffle span 28 x4"),
        ("float16", "bfloat16"),
        ("span", "rlfn"),
    ),
    "ESR_KERNELS_CUDA_HALF_SUMS": (
        ("conv3x3 span 28>28 silu", "conv3x3 rlfn 48>46 leaky_relu post"),
        ("float16",),
        ("span", "rlfn"),
    ),
}
SWITCHED = "native-cuda"
INDUCTOR_CASES = ONE_CASE_EACH[:3]
TRAINING_PRECISIONS = ("bfloat16", "float32")
# Ends the names of the engines that replay the graphs of `optimize(cuda_graphs=True)`.
OWN_GRAPHS = " cuda_graphs"
TUNING = "esr_kernels.backends.triton.tuning"
# Seconds that must be left for an item that compiles with max-autotune.
COMPILE_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """A part to run on the state in a file, for some seconds."""

    part: str
    options: Options
    state: str
    seconds: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        values = json.loads(text)
        return Job(**{**values, "options": Options(**values["options"])})


def _compiled(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Inductor's best; its own CUDA graphs are left out because they copy the inputs, `captured` does not."""
    return torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)


def _allowed(name: str, eager_error: float, exact: float) -> float:
    """The package's own tolerance at a precision; TF32 has the mantissa of float16."""
    return cases.half_tolerance(eager_error, torch.float16) if name == "tf32" else exact


def _peers_first(engines: Sequence[str], inductor: bool) -> list[str]:
    compiled = [INDUCTOR, INDUCTOR_CHANNELS_LAST] if inductor else []
    peers = [e for e in engines if roofline.is_peer(e)]
    return [*peers, *compiled, *(e for e in engines if e not in peers)]


# --- parts ------------------------------------------------------------------------------------------------------


def ceilings(options: Options) -> dict[str, Item]:
    """Bandwidth of memory and of the L2 cache, rates of matrix products, costs of a launch."""
    cuda = options.device == "cuda"

    def seconds(function: Callable[[], object]) -> float:
        return alternate({"it": function}, warmup=3, **options.timing)["it"].median

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=options.device).to(dtype)

    def copy_rate() -> dict[str, Any]:
        source = random(1 << 28 if cuda else 1 << 20)
        target = torch.empty_like(source)
        return {"value": 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9, "unit": "GB/s"}

    def cache_rate() -> dict[str, Any]:
        # Source and target together take a third of the cache: the L2 of a large GPU is two halves.
        source = random(_cache(options.device) // 6 // 4)
        target, copies = torch.empty_like(source), 20
        replay = captured(Engine(lambda _: target.copy_(source), range(copies)))
        size = 2 * source.nbytes
        return {"value": copies * size / seconds(replay) / 1e9, "unit": "GB/s", "working_set_bytes": size}

    def product_rate(name: str) -> dict[str, Any]:
        n = (4096 if options.quick else 8192) if cuda else 128
        with precision(name):
            a, b = (random(n, n, dtype=PRECISIONS[name]) for _ in range(2))
            return {"value": 2 * n**3 / seconds(lambda: a @ b) / 1e12, "unit": "TFLOP/s", "n": n}

    tiny = torch.zeros(32, device=options.device)

    def graph_gap() -> dict[str, Any]:
        few, many = (seconds(captured(Engine(lambda _: tiny.add_(1), range(n)))) for n in (10, 110))
        return {"value": (many - few) / 100 * 1e6, "unit": "us"}

    def launch() -> dict[str, Any]:
        every = Engine(lambda _: tiny.add_(1), range(100)).every
        return {"value": seconds(every) / 100 * 1e6, "unit": "us"}

    items = {"copy": Item(copy_rate)}
    items |= {f"matmul {name}": Item(functools.partial(product_rate, name)) for name in PRECISIONS}
    items["eager launch"] = Item(launch)
    if cuda:
        items |= {"L2 copy": Item(cache_rate), "gap in a graph": Item(graph_gap)}
    return items


def _cache(device: str) -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size if device == "cuda" else 0


def tune(seconds: float) -> dict[str, Item]:
    """The fastest configuration of every Triton kernel; a fifth of the time is left for what tuning overruns."""

    def run() -> dict[str, Any]:
        return {"configs": importlib.import_module(TUNING).tune(seconds=0.8 * seconds, log=print)}

    return {"triton": Item(run)}


def _laid_out(
    case: cases.OperatorCase, arguments: dict[str, Any], memory_format: torch.memory_format
) -> dict[str, Any]:
    """The arguments with their feature maps in a memory format."""

    def lay_out(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.contiguous(memory_format=memory_format)
        return [lay_out(v) for v in value]

    return {name: lay_out(v) if name in case.features else v for name, v in arguments.items()}


def _redrawn(case: cases.OperatorCase, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with other random feature maps, drawn on their device."""

    def redraw(value: Any) -> Any:
        return torch.randn_like(value) if isinstance(value, Tensor) else [redraw(v) for v in value]

    return {name: redraw(v) if name in case.features else v for name, v in arguments.items()}


def _case(name: str) -> cases.OperatorCase:
    return next(case for case in cases.CASES if case.name == name)


def _switch(engine: str) -> tuple[str, str | None]:
    """An engine's name and its switch: "native-cuda with VARIABLE"."""
    name, _, switch = engine.partition(" with ")
    return name, switch or None


def _operator(
    case: cases.OperatorCase, name: str, inductor: bool, options: Options, switch: str | None = None
) -> dict[str, Any]:
    dtype, shape = PRECISIONS[name], (1, *options.sizes[0])
    first = case.arguments(*shape, dtype=dtype, device=options.device)
    exact = case.plain(cases.double(first))
    size = roofline.total_bytes(first) + exact.numel() * dtype.itemsize
    count = roofline.rotation(size, _cache(options.device))
    nchw = [first, *(_redrawn(case, first) for _ in range(count - 1))]
    nhwc = [_laid_out(case, arguments, torch.channels_last) for arguments in nchw]

    def make(engine: str) -> Engine:
        engine, on = _switch(engine)
        inputs = nhwc if engine.endswith("channels_last") else nchw
        if engine in (INDUCTOR, INDUCTOR_CHANNELS_LAST):
            return Engine(_compiled(case.plain), inputs)
        backend = common._backend(engine)
        return Engine(case.plain if backend is None else case.fused, inputs, backend, switch=on)

    def tolerance(engine: str, eager_error: float) -> float:
        backend = common._backend(_switch(engine)[0])
        if backend is None:
            return cases.peer_tolerance(dtype, eager_error)
        return _allowed(name, eager_error, cases.operator_tolerance(case.operator, backend, dtype, eager_error))

    if switch is None:
        engines = _peers_first(common.operator_engines(options.device, case.operator), inductor)
    else:
        own = f"{SWITCHED} channels_last"
        engines = [common.EAGER, own, f"{own} with {switch}"]
    subject = Subject({e: functools.partial(make, e) for e in engines}, [exact], tolerance, dtype)
    torch._dynamo.reset()
    with precision(name):
        flop = common._count(lambda: case.fused(case.arguments(*shape, dtype=dtype, device="meta")))
        described = {"name": case.name, "precision": name, "shape": list(shape), "flop": flop, "bytes": size}
        return described | measure(subject, options)


def operators(options: Options) -> dict[str, Item]:
    """Every case at every precision; a few with Inductor at the first, last because it takes long."""
    items = {}
    for name in options.dtypes:
        for case in cases.CASES:
            items[f"{case.name} | {name}"] = Item(functools.partial(_operator, case, name, False, options))
    if not options.quick:
        for label in INDUCTOR_CASES:
            run = functools.partial(_operator, _case(label), options.dtypes[0], True, options)
            items[f"{label} | {options.dtypes[0]} | with Inductor"] = Item(run, COMPILE_SECONDS)
    return items


def switches(options: Options) -> dict[str, Item]:
    """Every way that is off by default on against off: operators at the first size, then networks."""
    items = {}
    for switch, (labels, precisions, _) in SWITCHES.items():
        chosen = [name for name in precisions if name in options.dtypes]
        for name, label in itertools.product(chosen, labels):
            run = functools.partial(_operator, _case(label), name, False, options, switch)
            items[f"{switch} | {label} | {name}"] = Item(run)
    for switch, (_, precisions, networks) in SWITCHES.items():
        chosen = [name for name in precisions[:1] if name in options.dtypes]
        models = [m for m in networks if m in options.models]
        for name, size, model in itertools.product(chosen, options.sizes, models):
            run = functools.partial(_model, model, (size[0], size[1]), name, False, options, switch)
            items[f"{switch} | {model} {'x'.join(map(str, size))} | {name}"] = Item(run, 3.0)
    return items


def _training(case: cases.OperatorCase, name: str, options: Options) -> dict[str, Any]:
    """Forward and backward of a batch whose maps outgrow the cache, so that one input is enough."""
    dtype, shape = PRECISIONS[name], (2, 16, 16) if options.quick else (64, 64, 64)
    first = case.arguments(*shape, dtype=dtype, device=options.device)
    doubles = cases.convert(first, torch.float64)
    leaves = common._leaves(doubles)
    result = case.plain(doubles)
    seed = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(options.device, dtype)
    exact = [g.cpu() for g in torch.autograd.grad(result, leaves, seed.double())]

    def make(engine: str) -> Engine:
        call = case.fused if engine == "fused" else case.plain
        arguments = cases.convert(_laid_out(case, first, common._memory_format(engine)), dtype)
        leaves = common._leaves(arguments)
        return Engine(lambda _: torch.autograd.grad(call(arguments), leaves, seed), [None])

    def tolerance(engine: str, eager_error: float) -> float:
        # Gradients are sums over all pixels, and a tie in a max pool may fall the other way: more than for one call.
        if roofline.is_peer(engine) or dtype != torch.float32:
            return cases.peer_tolerance(dtype, eager_error)
        return max(cases.NETWORK_TOLERANCE, 2 * eager_error)

    engines = _peers_first(common.TRAINING_ENGINES, False)
    subject = Subject({e: functools.partial(make, e) for e in engines}, exact, tolerance, dtype, inference=False)
    size = 2 * roofline.total_bytes(first) + seed.nbytes  # every argument read and its gradient written
    with precision(name):
        flop = common._count(make(common.EAGER).first)
        described = {"name": case.name, "precision": name, "shape": list(shape), "flop": flop, "bytes": size}
        return described | measure(subject, options)


def training(options: Options) -> dict[str, Item]:
    """Forward and backward of one case per operator."""
    chosen = [name for name in TRAINING_PRECISIONS if name in options.dtypes]
    return {
        f"{label} | {name}": Item(functools.partial(_training, _case(label), name, options))
        for name in chosen
        for label in ONE_CASE_EACH
    }


@functools.cache
def _traced(model: str, dtype: torch.dtype, graphs: bool) -> OptimizedModel:
    """To be copied, for tracing takes seconds; on the CPU, so that no kernel of a GPU is needed for it."""
    fused, _ = cases.model_pair(model)
    return esr_kernels.optimize(fused, dtype=dtype, cuda_graphs=graphs)


def _model(
    model: str, size: tuple[int, int], name: str, inductor: bool, options: Options, switch: str | None = None
) -> dict[str, Any]:
    dtype, shape, device = PRECISIONS[name], (1, *size), options.device
    fused, plain = (network.to(device) for network in cases.model_pair(model))
    cases.check_size(fused, *size)
    first = cases.random_image(fused, *shape).to(device, dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(first.double()).cpu()
    described: dict[str, Any] = {"name": model, "precision": name, "shape": list(shape)}
    optimized = _traced(model, dtype, False)
    weights = roofline.total_bytes([*optimized.parameters(), *optimized.buffers()])
    described["bytes"] = first.nbytes + weights + exact.numel() * dtype.itemsize
    described["not_fused"] = optimized.report().left
    count = roofline.rotation(described["bytes"], _cache(device))
    nchw = [first, *(cases.random_image(fused, *shape, seed).to(device, dtype) for seed in range(1, count))]
    nhwc = [x.contiguous(memory_format=torch.channels_last) for x in nchw]

    def make(engine: str) -> Engine:
        engine, on = _switch(engine)
        if roofline.is_peer(engine):
            memory_format = common._memory_format(engine)
            twin = copy.deepcopy(plain).to(dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
            inputs = nchw if memory_format == torch.contiguous_format else nhwc
            return Engine(_compiled(twin) if engine.startswith(INDUCTOR) else twin, inputs)
        if engine == "modules":
            return Engine(copy.deepcopy(fused).to(dtype), nchw)
        graphs = engine.endswith(OWN_GRAPHS)
        network = copy.deepcopy(_traced(model, dtype, graphs)).to(device)
        return Engine(network, nchw, engine.removesuffix(OWN_GRAPHS), graph=not graphs, switch=on)

    def tolerance(engine: str, eager_error: float) -> float:
        if roofline.is_peer(engine):
            return cases.peer_tolerance(dtype, eager_error)
        return _allowed(name, eager_error, cases.network_tolerance(dtype, eager_error))

    if switch is None:
        engines = _peers_first(common.model_engines(device), inductor)
    else:
        engines = [common.EAGER, SWITCHED, f"{SWITCHED} with {switch}"]
    if options.graphs and switch is None:
        engines += [backend + OWN_GRAPHS for backend in common.backends(device) if backend != "reference"]
    subject = Subject({e: functools.partial(make, e) for e in engines}, [exact], tolerance, dtype)
    torch._dynamo.reset()
    with precision(name):
        if optimized.plan is None:
            described["flop"] = common._count(make(common.EAGER).first)
        else:
            described["flop"] = optimized.plan.flops(*shape)
            described["layer_bytes"] = weights + roofline.layer_bytes(optimized.plan, *shape, dtype.itemsize)
        return described | measure(subject, options)


def models(options: Options) -> dict[str, Item]:
    """Every network at every precision and size, then once more with Inductor, the first precision first."""
    items = {}
    for inductor in (False,) if options.quick else (False, True):
        for name, size, model in itertools.product(options.dtypes, options.sizes, options.models):
            key = f"{model} {'x'.join(map(str, size))} | {name}{' | with Inductor' if inductor else ''}"
            run = functools.partial(_model, model, (size[0], size[1]), name, inductor, options)
            items[key] = Item(run, COMPILE_SECONDS if inductor else 3.0)
    return items


def _calls(label: str, options: Options) -> dict[str, Any]:
    """Host time per call, on maps so small that the GPU is never waited for: the functions return no tensor, so
    `alternate` uses the wall clock and nothing is synchronised."""
    case = _case(label)
    arguments = case.arguments(1, 32, 32, dtype=PRECISIONS[options.dtypes[0]], device=options.device)
    weight = next(v for name, v in arguments.items() if name in case.parameters)
    x = torch.randn(1, weight.shape[1], 32, 32, device=options.device).to(weight)

    def silent(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            call()

        return run

    calls = {"esr_kernels": lambda: case.fused(arguments), "eager": lambda: case.plain(arguments)}
    calls["one F.conv2d"] = lambda: F.conv2d(x, weight, padding="same")
    with torch.inference_mode():
        for call in calls.values():
            call()
        synchronize(options.device)
        timings = alternate({name: silent(call) for name, call in calls.items()}, warmup=20, **options.timing)
        synchronize(options.device)
    return {"engines": {name: microseconds(timing) for name, timing in timings.items()}}


def first_call(model: str, device: str) -> None:
    """Print, as the last line, the seconds that a new process takes for the first call and the second."""
    network, _ = cases.model_pair(model)
    dtype = torch.float16 if device == "cuda" else torch.float32
    image = cases.random_image(network, 1, 256, 256).to(device, dtype)
    synchronize(device)
    marks = [time.perf_counter()]
    optimized = esr_kernels.optimize(network.to(device), dtype=dtype, cuda_graphs=False)
    synchronize(device)
    marks.append(time.perf_counter())
    with torch.inference_mode():
        for _ in range(2):
            optimized(image)
            synchronize(device)
            marks.append(time.perf_counter())
    seconds = dict(zip(("optimize", "first", "second"), (b - a for a, b in itertools.pairwise(marks)), strict=True))
    print(json.dumps(seconds))


def _first_calls(options: Options) -> dict[str, Any]:
    code = f"from bench.gpu_parts import first_call; first_call('span', {options.device!r})"
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("empty Triton cache", "filled Triton cache"):
            finished = jobs.run_command([sys.executable, "-c", code], 120, environment={"TRITON_CACHE_DIR": folder})
            if finished.returncode != 0:
                raise RuntimeError("\n".join([f"status {finished.returncode}", *finished.tail[-10:]]))
            found[cache] = json.loads(finished.tail[-1])
    return {"first_call_seconds": found}


def overhead(options: Options) -> dict[str, Item]:
    """Host time of a call, and the first call of a new process."""
    items = {label: Item(functools.partial(_calls, label, options)) for label in ONE_CASE_EACH}
    items["first call of span"] = Item(functools.partial(_first_calls, options), 20.0)
    return items


# --- the process ------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Job], dict[str, Item]]] = {
    "ceilings": lambda job: ceilings(job.options),
    "tune": lambda job: tune(job.seconds),
    "operators": lambda job: operators(job.options),
    "switches": lambda job: switches(job.options),
    "training": lambda job: training(job.options),
    "models": lambda job: models(job.options),
    "overhead": lambda job: overhead(job.options),
}


def _guarded(item: Item, device: str) -> Item:
    """An item that, where it fails, finds out whether the GPU failed for good."""

    def run() -> dict[str, Any]:
        try:
            return item.run()
        except Exception:
            require_device(device)
            raise

    return Item(run, item.seconds)


def work(job: Job) -> None:
    """Run a part's items on the state in the job's file."""
    start = time.monotonic()
    state = json.loads(Path(job.state).read_text(encoding="utf-8"))
    items = {key: _guarded(item, job.options.device) for key, item in PARTS[job.part](job).items()}
    left = job.seconds - (time.monotonic() - start)
    jobs.run_items(items, state, left, functools.partial(write_json, job.state))


if __name__ == "__main__":
    work(Job.from_json(sys.argv[1]))
