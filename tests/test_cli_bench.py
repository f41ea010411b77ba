"""`esr-kernels bench` and `esr-kernels verify`, and the cases and tolerances under them. Speeds are never asserted."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import esr_kernels
from esr_kernels import cases, dispatch
from esr_kernels.cli import main
from esr_kernels.commands import _bench_train
from esr_kernels.optimize.model import _Optimizer


def command(*argv: str) -> int:
    """Exit status of the command line."""
    try:
        return main(list(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def corrupt(monkeypatch: pytest.MonkeyPatch, operator: str, damage: Any) -> None:
    """From now on the results of one registered operator go through `damage` first.

    Not while `optimize` compares: it refuses what it finds wrong, and the commands have to find what it missed.
    """
    run, optimize = dispatch.run, esr_kernels.optimize
    optimizing = False

    def whole(*args: Any, **options: Any) -> Any:
        nonlocal optimizing
        optimizing = True
        try:
            return optimize(*args, **options)
        finally:
            optimizing = False

    monkeypatch.setattr(esr_kernels, "optimize", whole)

    def damaged(name: str, args: tuple[Any, ...]) -> Any:
        result = run(name, args)
        if name != operator or optimizing:
            return result
        return damage(result) if isinstance(result, Tensor) else type(result)(damage(t) for t in result)

    monkeypatch.setattr(dispatch, "run", damaged)


def slightly_wrong(t: Tensor) -> Tensor:
    return t * 1.01


def one_nan(t: Tensor) -> Tensor:
    t = t.clone()
    t[..., -1, -1] = math.nan
    return t


# --- what is timed and how it is judged ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_plain_twin_computes_what_the_operator_does(case: cases.OperatorCase):
    arguments = cases.double(case.arguments(2, 17, 19))
    with esr_kernels.use_backend("reference"):
        fused = case.fused(arguments)
    assert cases.compare(fused, case.plain(arguments), 1e-12).ok


def test_cases_cover_every_operator_and_have_distinct_names():
    assert {case.operator for case in cases.CASES} == set(cases.OPERATORS) == set(esr_kernels.functional.__all__)
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)


def test_case_arguments_are_reproducible_and_laid_out_as_asked():
    case = cases.operator_cases("conv1x1")[0]
    a, b = (case.arguments(1, 4, 6, memory_format=torch.channels_last, dtype=torch.float16) for _ in range(2))
    other = case.arguments(1, 4, 6, dtype=torch.float16, seed=1)
    for x, y, z in zip(a["xs"], b["xs"], other["xs"], strict=True):
        assert x.shape == (1, 28, 4, 6)
        assert x.dtype == torch.float16
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, y)
        assert not torch.equal(x, z)


def test_compare_measures_relative_to_the_largest_value():
    reference = torch.tensor([[-4.0, 1.0]], dtype=torch.float64)
    check = cases.compare(torch.tensor([[-4.0, 1.5]]), reference, 0.2)
    assert (check.max_abs, check.relative, check.ok) == (0.5, 0.125, True)
    assert not cases.compare(torch.tensor([[-4.0, 1.5]]), reference, 0.1).ok


@pytest.mark.parametrize(
    ("result", "dtype", "problem"),
    [
        (torch.tensor([[math.nan, 1.0]]), None, "1 of 2 values are not finite"),
        (torch.tensor([[math.inf, 1.0]]), None, "1 of 2 values are not finite"),
        (torch.tensor([1.0, 1.0]), None, "shape"),
        (torch.tensor([[1.0, 1.0]]), torch.float16, "dtype"),
    ],
)
def test_compare_refuses_what_no_tolerance_allows(result: Tensor, dtype: torch.dtype | None, problem: str):
    check = cases.compare(result, torch.ones(1, 2, dtype=torch.float64), math.inf, dtype)
    assert not check.ok
    assert problem in str(check)
    assert json.loads(json.dumps(check.to_json(), allow_nan=False))["ok"] is False


def test_compare_with_a_reference_of_zeros_or_nothing():
    zeros = torch.zeros(2, dtype=torch.float64)
    assert cases.compare(torch.zeros(2), zeros, 1e-5).ok
    assert not cases.compare(torch.tensor([0.0, 1e-9]), zeros, 1e-5).ok
    assert cases.compare(torch.zeros(0), torch.zeros(0, dtype=torch.float64), 1e-5).ok


def test_half_types_may_be_twice_as_far_as_plain_pytorch():
    assert cases.operator_tolerance("conv3x3", "native-cpu", torch.bfloat16, 0.01) == 0.02
    assert cases.network_tolerance(torch.float16, 0.01) == 0.02
    one_rounding = torch.finfo(torch.float16).eps / 2
    assert cases.network_tolerance(torch.float16, 0.0) == one_rounding
    assert math.isfinite(cases.network_tolerance(torch.float16, math.inf))


def test_float32_tolerances():
    assert cases.operator_tolerance("conv3x3", "reference", torch.float32, 1.0) == 1e-5
    assert cases.operator_tolerance("conv3x3", "native-cpu", torch.float32, 1.0) == 1e-4
    assert cases.operator_tolerance("conv1x1", "native-cpu", torch.float32, 1.0) == 1e-5
    assert cases.network_tolerance(torch.float32, 1.0) == 1e-4


def test_backend_of_a_call_is_named():
    with esr_kernels.use_backend("reference"):
        assert cases.resolve_backend("conv3x3", "cpu", torch.float32) == "reference"
    assert cases.resolve_backend("conv3x3", "cpu", torch.float64) == "reference"
    with pytest.raises(esr_kernels.BackendError):
        cases.resolve_backend("conv3x3", "cpu", torch.int64)


def test_model_pair_has_the_same_weights_every_time():
    a, plain = cases.model_pair("span")
    b, _ = cases.model_pair("span")
    for key, value in plain.state_dict().items():
        assert torch.equal(value, a.state_dict()[key])
        assert torch.equal(value, b.state_dict()[key])


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--model", "spam"], "unknown model 'spam', did you mean 'span'?"),
        (["bench", "--op", "conv3x4"], "unknown operator 'conv3x4', did you mean 'conv3x3'?"),
        (["bench", "--op", "zzz"], "unknown operator 'zzz', known: conv3x3, spab"),
        (["bench", "--model", "span", "--op", "spab"], "not allowed with argument"),
        (["bench", "--size", "64"], "expected HEIGHTxWIDTH in pixels such as 256x256, got '64'"),
        (["bench", "--size", "0x64"], "expected HEIGHTxWIDTH"),
        (["bench", "--threads", "0"], "expected a whole number of at least 1, got '0'"),
        (["bench", "--rounds", "many"], "expected a whole number of at least 1, got 'many'"),
        (["bench", "--budget", "-1"], "expected seconds above 0, got '-1'"),
        (["bench", "--against", "eager,inductr"], "unknown engine 'inductr', did you mean 'inductor'?"),
        (["bench", "--dtype", "float23"], "unknown dtype 'float23', did you mean 'float32'?"),
        (["bench", "--backend", "nativ-cpu"], "unknown backend 'nativ-cpu', did you mean 'native-cpu'?"),
        (["bench", "--weights", "no/such.pth"], "there is no file 'no/such.pth'"),
        (["bench", "--json", "no/such/folder.json"], "there is no folder"),
        (["verify", "--model", "spann"], "unknown model 'spann', did you mean 'span'?"),
        (["verify", "--json", "."], "expected a file, '.' is a folder"),
        (["verify", "--backend", "tritn"], "did you mean 'triton'?"),
    ],
)
def test_bad_arguments_get_one_clear_message(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert command(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--op", "spab", "--weights", __file__], "--weights: operators have none"),
        (["bench", "--model", "all", "--weights", __file__], "--weights: a checkpoint belongs to one model"),
        (["verify", "--model", "all", "--weights", __file__], "--weights: a checkpoint belongs to one model"),
        (["bench", "--op", "spab", "--against", "modules"], "--against: modules stands for a model's modules"),
        (["bench", "--model", "rlfn", "--size", "14x40"], "at least 15x15 pixels, got 14x40"),
        (["verify", "--model", "rlfn", "--size", "40x14"], "at least 15x15 pixels, got 40x14"),
    ],
)
def test_arguments_that_do_not_fit_together(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert command(*argv) != 0
    assert message in capsys.readouterr().err


# --- bench -----------------------------------------------------------------------------------------------------------


def check_record(record: dict[str, Any], ours: list[str], peers: list[str]) -> None:
    """Every number of a record follows from its samples, and every engine was right."""
    assert record["ok"] is True
    assert record["problem"] is None
    assert set(record["engines"]) == {*ours, *peers}
    for engine in record["engines"].values():
        assert engine["check"]["ok"] is True
        assert len(engine["samples"]) == engine["rounds"] == 3
        assert engine["median"] == sorted(engine["samples"])[1]
        assert engine["minimum"] == min(engine["samples"]) > 0
        assert engine["gflops"] == pytest.approx(record["gflop"] / engine["median"])
    assert set(record["speedup"]) == set(ours)
    for name, ratios in record["speedup"].items():
        assert set(ratios) == set(peers)
        for peer, ratio in ratios.items():
            assert ratio == pytest.approx(record["engines"][peer]["median"] / record["engines"][name]["median"])


def test_bench_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    threads = torch.get_num_threads()
    target = tmp_path / "span.json"
    argv = [
        "bench",
        "--model",
        "span",
        "--size",
        "16x24",
        "--threads",
        "1",
        "2",
        "--rounds",
        "3",
        "--json",
        str(target),
    ]
    assert command(*argv, "--against", "channels_last,modules") == 0
    assert torch.get_num_threads() == threads
    written = json.loads(target.read_text())
    assert set(written) == {"command", "machine", "settings", "results"}
    assert written["command"][0] == "esr-kernels"
    assert written["machine"]["versions"]["esr_kernels"] == esr_kernels.__version__
    assert written["settings"] == {"rounds": 3, "budget": 60.0, "weights": None}

    assert [record["threads"] for record in written["results"]] == [1, 2]
    _, plain = cases.model_pair("span")
    multiplications = sum(p.numel() for p in plain.parameters() if p.dim() == 4) * 16 * 24
    for record in written["results"]:
        check_record(record, ["esr_kernels"], ["eager", "channels_last", "modules"])
        assert (record["kind"], record["name"], record["shape"]) == ("model", "span", [1, 16, 24])
        assert record["not_fused"] == []
        assert record["backend"] == cases.resolve_backend("run_plan", "cpu", torch.float32)
        assert record["gflop"] == pytest.approx(2 * multiplications / 1e9)

    lines = capsys.readouterr().out.splitlines()
    backend = written["results"][0]["backend"]
    assert f"span on {backend}: run_plan 1x, 100% of the time" in lines
    assert written["results"][0]["operators"]["calls"] == {"run_plan": 1}
    rows = [line.split() for line in lines if line.startswith("span ") and " on " not in line]
    assert [row[3] for row in rows] == ["1", "2"]
    for row, record in zip(rows, written["results"], strict=True):
        assert [cell for cell in row if cell.endswith("x")] == [
            f"{ratio:.2f}x" for ratio in record["speedup"]["esr_kernels"].values()
        ]


def test_bench_of_operators_in_both_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "ops.json"
    argv = ["bench", "--op", "conv1x1", "bsconv", "--size", "8x9", "--batch", "2", "--threads", "1", "--rounds", "3"]
    assert command(*argv, "--backend", "reference", "--json", str(target)) == 0
    results = json.loads(target.read_text())["results"]
    expected = [case.name for operator in ("conv1x1", "bsconv") for case in cases.operator_cases(operator)]
    assert [record["name"] for record in results] == expected
    for record in results:
        check_record(record, ["esr_kernels", "esr_kernels channels_last"], ["eager", "channels_last"])
        assert (record["kind"], record["shape"], record["backend"]) == ("operator", [2, 8, 9], "reference")
    assert results[0]["gflop"] == pytest.approx(2 * 112 * 28 * 2 * 8 * 9 / 1e9)
    out = capsys.readouterr().out
    assert out.count(" NCHW ") == out.count(" NHWC ") == len(expected)


def test_bench_in_a_half_type_stands_beside_float32(tmp_path: Path):
    target = tmp_path / "half.json"
    argv = ["bench", "--op", "conv1x1", "--size", "8x9", "--threads", "1", "--rounds", "3", "--device", "cpu"]
    assert command(*argv, "--dtype", "bfloat16", "--json", str(target)) == 0
    for record in json.loads(target.read_text())["results"]:
        peers = ["eager", "channels_last", "channels_last_float32"]
        check_record(record, ["esr_kernels", "esr_kernels channels_last"], peers)
        plain = record["engines"]["eager"]["check"]["relative"]
        allowed = record["engines"]["esr_kernels"]["check"]["tolerance"]
        assert allowed == pytest.approx(max(2 * plain, torch.finfo(torch.bfloat16).eps / 2))


@pytest.mark.parametrize(
    ("what", "operator"), [(["--op", "conv1x1"], "conv1x1"), (["--model", "span"], "run_plan")], ids=["op", "model"]
)
@pytest.mark.parametrize("damage", [slightly_wrong, one_nan], ids=["slightly_wrong", "one_nan"])
def test_bench_shows_no_speed_of_a_wrong_result(
    what: list[str],
    operator: str,
    damage: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    corrupt(monkeypatch, operator, damage)
    target = tmp_path / "wrong.json"
    argv = ["bench", *what, "--size", "16x16", "--threads", "1", "--rounds", "3", "--json", str(target)]
    assert command(*argv) == 1
    captured = capsys.readouterr()
    assert "wrong result, not timed" in captured.err
    assert "FAILED" in captured.out
    table = captured.out[captured.out.index("GFLOP/s") :]
    assert not any(word.endswith("x") and word[:-1].replace(".", "").isdecimal() for word in table.split())
    for record in json.loads(target.read_text())["results"]:
        assert record["ok"] is False
        assert "wrong result" in record["problem"]
        assert record["speedup"] == {}
        assert not any("median" in engine for engine in record["engines"].values())


def test_bench_leaves_out_a_peer_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def no_compiler(_: Any) -> Any:
        def call(*__: Any) -> Any:
            raise RuntimeError("no compiler here\nwith a long explanation")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    target = tmp_path / "peers.json"
    argv = ["bench", "--op", "conv1x1", "--size", "8x8", "--threads", "1", "--rounds", "3", "--json", str(target)]
    assert command(*argv, "--against", "inductor") == 0
    assert "inductor left out: RuntimeError: no compiler here" in capsys.readouterr().err
    for record in json.loads(target.read_text())["results"]:
        assert record["ok"] is True
        assert record["engines"].pop("inductor") == {"skipped": "RuntimeError: no compiler here"}
        check_record(record, ["esr_kernels", "esr_kernels channels_last"], ["eager"])


def test_bench_refuses_a_network_without_a_flop_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("esr_kernels.commands.bench._flops", lambda engine: 0)
    assert command("bench", "--op", "conv1x1", "--size", "8x8", "--threads", "1", "--rounds", "3") == 1
    assert "FLOP count is 0" in capsys.readouterr().err


# --- verify ----------------------------------------------------------------------------------------------------------

SMALL = ("--size", "16x21", "--dtype", "float32")


@pytest.fixture(autouse=True)
def small_photograph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esr_kernels.commands.verify.PHOTOGRAPH", 12)
    monkeypatch.setattr("esr_kernels.commands.verify.EXTREME", 8)


def test_verify_compares_on_every_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "verify.json"
    argv = ["verify", "--model", "span", "--size", "9x13", "--dtype", "float32", "bfloat16", "--json", str(target)]
    assert command(*argv) == 0
    out = capsys.readouterr().out
    written = json.loads(target.read_text())
    assert set(written) == {"machine", "comparisons", "could_not_run"}
    comparisons = written["comparisons"]
    for backend in esr_kernels.list_backends():
        ran = {(r["form"], r["dtype"]) for r in comparisons if r["backend"] == backend.name}
        if backend.available:
            assert ran == {(form, t) for form in ("modules", "optimized") for t in ("float32", "bfloat16")}
        else:
            assert not ran
            assert written["could_not_run"][backend.name] == [backend.reason]
            assert f"{backend.name}: {backend.reason}" in out
    inputs = {r["input"] for r in comparisons}
    assert {"noise 9x13", "noise 2x9x13 channels_last", "checkerboard", "black", "white"} <= inputs
    for r in comparisons:
        assert r["ok"] is True
        assert r["relative"] <= r["tolerance"]
        assert r["not_fused"] == []
        if r["dtype"] == "float32":
            assert r["tolerance"] == 1e-4
    rows = [line for line in out.splitlines() if line.startswith("span ")]
    assert len(rows) == len({(r["form"], r["backend"], r["device"], r["dtype"]) for r in comparisons})
    assert "FAILED" not in out
    assert f"all {len(comparisons)} comparisons" in out


def test_verify_prints_every_input_when_asked(capsys: pytest.CaptureFixture[str]):
    assert command("verify", "--backend", "reference", *SMALL, "--verbose") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("span ")]
    assert len(rows) >= 2 * 5
    assert all(row.endswith("ok") for row in rows)
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("operator", "form", "damage", "word"),
    [("run_plan", "optimized", one_nan, "not finite"), ("spab", "modules", slightly_wrong, "FAILED")],
    ids=["optimized", "modules"],
)
def test_verify_fails_on_a_wrong_result(
    operator: str,
    form: str,
    damage: Any,
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    corrupt(monkeypatch, operator, damage)
    target = tmp_path / "verify.json"
    assert command("verify", "--backend", "reference", *SMALL, "--json", str(target)) == 1
    captured = capsys.readouterr()
    assert word in captured.out
    assert "FAILED" in captured.err
    for r in json.loads(target.read_text())["comparisons"]:
        assert r["ok"] is (r["form"] != form)


def test_verify_fails_where_optimize_refuses_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def compare(self: Any, candidate: Any) -> list[tuple[int, str]]:
        return [(2, "[2x3x35x41] planted")]

    monkeypatch.setattr(_Optimizer, "_compare", compare)
    target = tmp_path / "verify.json"
    assert command("verify", "--backend", "reference", *SMALL, "--json", str(target)) == 1
    assert "differs from the original: [2x3x35x41] planted" in capsys.readouterr().out
    comparisons = json.loads(target.read_text())["comparisons"]
    assert {(r["form"], r["ok"]) for r in comparisons} == {("modules", True), ("optimized", False)}


def test_verify_of_a_backend_that_cannot_run_is_a_failure(capsys: pytest.CaptureFixture[str]):
    unavailable = [b for b in esr_kernels.list_backends() if not b.available]
    if not unavailable:
        pytest.skip("every backend can run here")
    assert command("verify", "--backend", unavailable[0].name, *SMALL) == 1
    captured = capsys.readouterr()
    assert f"{unavailable[0].name}: {unavailable[0].reason}" in captured.out
    assert "nothing could be compared" in captured.err
    assert command("verify", "--backend", unavailable[0].name, "reference", *SMALL) == 1
    assert f"asked for, but could not run: {unavailable[0].name}" in capsys.readouterr().err


def test_verify_with_published_weights(shared_models: Path, capsys: pytest.CaptureFixture[str]):
    weights = shared_models / "weights" / "team38_span_ch28_slim.pth"
    assert command("verify", "--model", "span", "--weights", str(weights), "--backend", "reference", *SMALL) == 0
    assert "weights: team38_span_ch28_slim.pth" in capsys.readouterr().out


# --- training steps --------------------------------------------------------------------------------------------------


def test_train_times_steps(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(_bench_train, "peak_memory", lambda training, engine, threads: 5_000_000)
    file = tmp_path / "steps.json"
    options = ["--size", "16x16", "--batch", "2", "--threads", "1", "--rounds", "1", "--against", "eager"]
    assert command("bench", "--train", "--op", "spab", *options, "--json", str(file)) == 0
    assert "5.0" in capsys.readouterr().out
    for record in json.loads(file.read_text())["results"]:
        assert record["ok"] and set(record["engines"]) == {"esr_kernels", "esr_kernels channels_last", "eager"}
        for entry in record["engines"].values():
            assert entry["median"] > 0 and entry["error"] < 1e-4


def test_peak_memory_of_a_step():
    case = cases.operator_cases("conv3x3")[0]
    training = _bench_train.Training("operator", case.name, (4, 64, 64), torch.float32, "cpu", None)
    peak = _bench_train.peak_memory(training, "eager", 1)
    if sys.platform == "linux":
        assert peak is not None
        # At least the result and the gradient to the input, at most what no convolution needs.
        feature_map = 4 * case.arguments(1, 64, 64)["x"].nbytes
        assert feature_map < peak < 100 * feature_map


def test_train_steps_a_network_with_its_training_form():
    training = _bench_train.Training("model", "span", (1, 9, 10), torch.float32, "cpu", None)
    assert training.engines(["eager"]) == ["esr_kernels", "training form", "eager"]
    exact = training.exact()
    for engine in ("esr_kernels", "eager", "channels_last"):
        step, gradients = training.make(engine)
        for g, e in zip(gradients(), exact, strict=True):
            assert cases.relative_error(g, e) < 1e-3
        assert torch.isfinite(step()).all()
    assert torch.isfinite(training.make("training form")[0]()).all()


def test_train_does_not_time_wrong_gradients(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    corrupt(monkeypatch, "spab_backward", slightly_wrong)
    options = ["--size", "16x16", "--threads", "1", "--rounds", "1", "--against", "eager"]
    assert command("bench", "--train", "--op", "spab", *options) == 1
    assert "wrong gradients" in capsys.readouterr().err


def test_train_takes_no_weights(capsys: pytest.CaptureFixture[str]):
    assert command("bench", "--train", "--weights", __file__) == 1
    assert "--train: takes neither --weights" in capsys.readouterr().err
