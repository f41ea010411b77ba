"""What surrounds optimize: the command, a challenge entry, torch.compile, ONNX, copies, module by module, refusals."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import largest_error
from torch import nn
from torch.nn import functional as F

import esr_kernels
from esr_kernels.cli import main
from esr_kernels.optimize import optimize

MODEL = """
import torch
from torch import nn

class Network(nn.Module):
    data_range = 1.0
    def __init__(self, channels=12):
        super().__init__()
        self.head, self.body = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 5, padding=2)
        self.tail = nn.Sequential(nn.Conv2d(channels, 12, 3, padding=1), nn.PixelShuffle(2))
    def forward(self, x):
        y = torch.relu(self.head(x))
        return self.tail(self.body(y) + y)

def number():
    return 3
"""


class Mixed(nn.Module):
    """Two plans with a softmax, which no plan has, between them."""

    def __init__(self):
        super().__init__()
        self.head, self.gate = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 10, 1)
        self.tail = nn.Sequential(nn.Conv2d(10, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        y = F.silu(self.head(x))
        y = y * torch.softmax(self.gate(y.mean((2, 3), keepdim=True)), 1)
        return self.tail(y) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "network_of_a_test.py"
    path.write_text(MODEL)
    yield path
    sys.modules.pop("network_of_a_test", None)


def test_command(file, tmp_path, capsys):
    result = tmp_path / "result.json"
    arguments = [f"{file}:Network", "--input", "1,3,20,24", "--rounds", "1", "--json", str(result)]
    assert main(["optimize", *arguments]) == 0
    text = capsys.readouterr().out
    assert "partly fused" in text and "conv2d 5x5, padding 2 has no fused form yet" in text
    assert re.search(r"optimized +[\d.]+ +[\d.]+x", text)
    saved = json.loads(result.read_text())
    assert saved["check"]["ok"] and 0 < saved["report"]["share"] < 1 and saved["speedup"] > 0
    assert len(saved["report"]["samples"]) >= 4


def test_command_with_weights(file, tmp_path, capsys):
    namespace = {}
    exec(MODEL, namespace)
    torch.manual_seed(1)
    torch.save(namespace["Network"]().state_dict(), tmp_path / "good.pth")
    torch.save({"other": torch.zeros(1)}, tmp_path / "bad.pth")
    arguments = [f"{file}:Network", "--input", "1,3,16,16", "--rounds", "1", "--weights"]
    assert main(["optimize", *arguments, str(tmp_path / "good.pth")]) == 0
    assert main(["optimize", *arguments, str(tmp_path / "bad.pth")]) == 1
    assert "is not a checkpoint of Network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "status", "message"),
    [
        ("Nothing", [], 1, "has no 'Nothing'; modules in it: Network"),
        ("number", [], 1, r"number\(\) returned int, not a torch.nn.Module"),
        ("Network", ["--strict", "--input", "1,3,16,16"], 1, "strict=True: operations stayed plain PyTorch"),
        ("Network", ["--input", "3,16,16"], 2, "expected N,C,H,W such as 1,3,256,256"),
        ("Network", ["--weights", "nowhere.pth"], 2, "there is no file"),
    ],
)
def test_command_refuses(file, capsys, name, options, status, message):
    try:
        got = main(["optimize", f"{file}:{name}", *options])
    except SystemExit as stop:
        got = stop.code
    assert got == status
    assert re.search(message, capsys.readouterr().err)


def test_strict(mixed):
    assert optimize(mixed, strict=True).report().share > 0.9
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 5, padding=2)).eval()
    with pytest.raises(esr_kernels.OptimizeError, match="conv2d 5x5, padding 2 has no fused form yet"):
        optimize(grouped, strict=True)


def test_copies_of_a_mixed_network(mixed):
    fast = optimize(mixed)
    x = torch.rand(1, 3, 17, 22)
    expected = fast(x)
    assert fast.plan is None and fast.report().fused
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
        copy.deepcopy(fast).to(torch.float64).to(torch.float32),
    ):
        torch.testing.assert_close(other(x), expected)
    state = {k: v.clone() for k, v in fast.state_dict().items()}
    other = optimize(Mixed().eval())
    assert not torch.equal(other(x), expected)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    assert fast.to("meta")(x.to("meta")).shape == expected.shape


def test_a_mixed_network_exports_and_compiles(mixed):
    fast = optimize(mixed)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(fast, (torch.rand(2, 3, 20, 21),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((17, 22), (40, 16)):
        x = torch.rand(1, 3, *size)
        expected = fast(x)
        torch.testing.assert_close(program.module()(x), expected)
        torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


def test_half_types_keep_islands_in_float32():
    class Loud(nn.Module):
        """Sums of squares beyond float16's range."""

        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            y = self.c(x)
            return self.d(3000 * y * torch.rsqrt((y * 100).pow(2).sum((1, 2, 3), keepdim=True)))

    torch.manual_seed(0)
    model = Loud().eval()
    fast = optimize(model, dtype=torch.float16)
    x = torch.rand(1, 3, 35, 41)
    assert "float32" in str(fast.report().notes)
    assert largest_error(fast(x.half()), model.double()(x.half().double())) < 2e-3 * float(
        model(x.double()).abs().max()
    )


def test_modules_that_can_be_captured_where_the_whole_cannot():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())
            self.c = self.a

        def forward(self, x):
            y = self.a(x)
            if float(y.mean()) > 1e9:  # depends on values: no graph can have it
                y = -y
            return self.b(y) + self.c(x)

    torch.manual_seed(0)
    model = Stubborn().eval()
    fast = optimize(model)
    text = str(fast.report())
    assert "captured module by module: a, b" in text and "torch.export failed" in text
    x = torch.rand(1, 3, 19, 23)
    assert largest_error(fast(x), copy.deepcopy(model).double()(x.double())) < 1e-5


def test_what_differs_is_refused(monkeypatch):
    from esr_kernels.optimize import model as module

    def wrong(ws, limit=None):
        for node in ws.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.abs.default

    monkeypatch.setattr(module, "merge_linear", wrong)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    fast = optimize(model)
    assert "differs from the original" in str(fast.report())
    x = torch.randn(1, 3, 9, 9)
    assert torch.equal(fast(x), model(x))
    with pytest.raises(esr_kernels.OptimizeError, match="differs from the original"):
        optimize(model, strict=True)


def test_a_counter_in_forward_is_left_alone():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 3, padding=1)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.c(x) * self.calls

    fast = optimize(Counter().eval())
    x = torch.rand(1, 3, 8, 8)
    assert not torch.equal(fast(x), fast(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile(mixed, dynamic):
    from esr_kernels.optimize.dynamo import esr

    torch._dynamo.reset()
    model = mixed.requires_grad_(True)
    compiled = torch.compile(model, backend=esr, dynamic=dynamic)
    x = torch.rand(2, 3, 20, 22)
    with torch.no_grad():
        for image in (x, x[:, :, :17].contiguous(), x):
            exact = copy.deepcopy(model).double()(image.double())
            assert largest_error(compiled(image), exact) < 1e-4 * float(exact.abs().max())
        model.head.weight.mul_(2)
        exact = copy.deepcopy(model).double()(x.double())
        assert largest_error(compiled(x), exact) < 1e-4 * float(exact.abs().max())
        with torch.profiler.profile() as profile:
            compiled(x)
        assert any(event.name == "esr::run_plan" for event in profile.events())
    compiled(x).sum().backward()
    assert model.head.weight.grad is not None
    torch._dynamo.reset()


def test_torch_compile_knows_the_backend_by_name():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    where = project["project"]["entry-points"]["torch_dynamo_backends"]["esr"]
    module, name = where.split(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


@pytest.mark.parametrize("form", ["plain", "mixed", "whole"])
def test_onnx(mixed, form, tmp_path):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = mixed if form != "whole" else nn.Sequential(mixed.head, nn.GELU(), mixed.tail).eval()
    exported = model if form == "plain" else optimize(model)
    dynamic = {i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)}
    with torch.no_grad():
        program = torch.onnx.export(
            exported, (torch.rand(2, 3, 20, 22),), dynamo=True, dynamic_shapes=(dynamic,), verbose=False
        )
    path = tmp_path / "model.onnx"
    program.save(path)
    assert {i.domain for i in onnx.load(path).opset_import} <= {"", "ai.onnx"}
    assert not any(f.domain not in ("", "ai.onnx") for f in onnx.load(path).graph.node)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.rand(1, 3, 17, 25)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    exact = copy.deepcopy(model).double()(x.double())
    assert largest_error(torch.from_numpy(got), exact) < 1e-5 * float(exact.abs().max())


def test_onnx_has_every_activation_right_behind_its_convolution(tmp_path):
    """As TensorRT fuses them: one node, or for SiLU the product of a convolution and its own sigmoid."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.1)]
    layers += [nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6()]
    layers += [nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)]
    fast = optimize(nn.Sequential(*layers).eval())
    with torch.no_grad():
        torch.onnx.export(fast, (torch.rand(1, 3, 20, 22),), tmp_path / "model.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "model.onnx").graph
    expected = ["Conv", "Relu", "Conv", "LeakyRelu", "Conv", "Sigmoid", "Mul", "Conv", "Clip", "Conv", "DepthToSpace"]
    assert [node.op_type for node in graph.node] == expected
    for before, after in itertools.pairwise(graph.node):
        assert before.output[0] in after.input
    assert set(graph.node[6].input) == {graph.node[4].output[0], graph.node[5].output[0]}


def test_the_table_of_plain_networks(tmp_path, monkeypatch, capsys):
    """Every network is measured apart and recorded at once; another run measures what is missing."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from bench import optimize_plain

    path, measured = tmp_path / "table.json", []

    def measure_apart(name, options, limit):
        measured.append(name)
        if name == "rlfn" and len(measured) < 3:
            return {"error": f"not finished after {limit:.0f} s"}
        timing = {"median": 0.002}
        check = {"ok": True, "max_abs": 1e-6, "relative": 1e-6}
        timings = {"plain": timing, "optimized": timing}
        report = {"whole": name == "span", "share": 0.5, "left": ["a"]}
        return {**report, "check": check, "timings": timings, "speedup": 1.0}

    monkeypatch.setattr(optimize_plain, "measure_apart", measure_apart)
    arguments = ["optimize_plain", "--model", "span", "rlfn", "--limit", "7", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert optimize_plain.main() == 1
    assert "not finished after 7 s" in capsys.readouterr().out
    assert optimize_plain.main() == 0
    assert measured == ["span", "rlfn", "rlfn"]
    printed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["optimize_plain", "--table", str(path)])
    assert optimize_plain.main() == 0
    assert capsys.readouterr().out == printed
    assert re.search(r"span +one operator +50.0%", printed) and re.search(r"rlfn +1 kinds plain", printed)
    monkeypatch.setattr(sys, "argv", [*arguments, "--threads", "2"])  # another measurement
    assert optimize_plain.main() == 0
    assert measured[3:] == ["span", "rlfn"]


def test_a_network_that_takes_too_long_has_a_limit(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    from bench import optimize_plain

    options = {"size": [8, 8], "threads": 1, "rounds": 1, "budget": 1.0}
    assert optimize_plain.measure_apart("span", options, 0.1) == {"error": "not finished after 0 s"}


def test_the_challenge_way(tmp_path, monkeypatch):
    """The code of docs/optimize.md: the entry's file, the harness' branch, what the harness then does."""
    fvcore = pytest.importorskip("fvcore.nn")
    text = (Path(__file__).parent.parent / "docs" / "optimize.md").read_text()
    blocks = dict(re.findall(r"```python\n# (models/team00\.py|test_demo\.py)\n(.*?)```", text, re.DOTALL))
    (tmp_path / "models").mkdir()
    (tmp_path / "model_zoo").mkdir()
    (tmp_path / "models" / "team00.py").write_text(blocks["models/team00.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        from models.team00 import Entry

        torch.manual_seed(0)
        original = Entry().eval()
        torch.save(original.state_dict(), tmp_path / "model_zoo" / "team00.pth")
        namespace = {}
        exec(blocks["test_demo.py"], namespace)
        model, name, data_range, _tile = namespace["select_model"](0, torch.device("cpu"))
        assert name == "00_Entry" and data_range == 1.0
        x = torch.rand(1, 3, 24, 20)
        with torch.no_grad():
            exact = copy.deepcopy(original).double()(x.double())
            assert largest_error(model(x), exact) < 1e-4 * float(exact.abs().max())
        flops = [
            fvcore.FlopCountAnalysis(m, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
            for m in (original, model)
        ]
        assert flops[0] == flops[1]
        parameters = [sum(p.numel() for p in m.parameters()) for m in (original, model)]
        assert parameters[0] == parameters[1]
    finally:
        for name in [n for n in sys.modules if n == "models" or n.startswith("models.")]:
            del sys.modules[name]
