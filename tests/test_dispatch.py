"""Which backend runs a call, and what is said when none can."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from helpers import kernel, rand

import esr_kernels
from esr_kernels import dispatch
from esr_kernels.functional import conv3x3

NAMES = ("reference", "native-cpu", "native-cuda", "triton")


def test_every_backend_is_listed_with_a_reason_when_it_cannot_run():
    found = esr_kernels.list_backends()
    assert tuple(b.name for b in found) == NAMES
    for b in found:
        assert b.available == (b.reason is None) == bool(b.operators)
    assert found[0].available


def test_the_reference_runs_everything():
    assert set(esr_kernels.list_backends()[0].operators) == set(esr_kernels.library.SCHEMAS)


@pytest.mark.parametrize("name", [b.name for b in esr_kernels.list_backends() if not b.available])
def test_choosing_an_unavailable_backend_is_an_error(name):
    with (
        pytest.raises(esr_kernels.BackendError, match=f"backend {name} cannot run here: "),
        esr_kernels.use_backend(name),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "hint"), [("refrence", "'reference'"), ("tritn", "'triton'"), ("native-gpu", "'native")]
)
def test_unknown_names_get_the_nearest_known_one(name, hint):
    with (
        pytest.raises(ValueError, match=f"unknown backend {name!r}.*did you mean {hint}"),
        esr_kernels.use_backend(name),
    ):
        pass


def test_a_chosen_backend_never_falls_back(monkeypatch):
    """float64 exists in the reference only."""
    fake = dispatch.Backend(
        "native-cpu", lambda: None, {"conv3x3": dispatch.Implementation(_never, frozenset({"cpu"}))}
    )
    monkeypatch.setitem(dispatch._backends(), "native-cpu", fake)
    monkeypatch.setattr(dispatch, "_decisions", {})
    x, weight = rand(1, 3, 5, 5).double(), kernel(4, 3).double()
    message = "backend native-cpu cannot run conv3x3: takes bfloat16, float16, float32, not float64"
    with esr_kernels.use_backend("native-cpu"), pytest.raises(esr_kernels.BackendError, match=message):
        conv3x3(x, weight)
    with esr_kernels.use_backend("native"), pytest.raises(esr_kernels.BackendError, match=message):
        conv3x3(x, weight)
    with (
        esr_kernels.use_backend("native"),
        pytest.raises(esr_kernels.BackendError, match="backend native-cpu cannot run bsconv: has no bsconv"),
    ):
        esr_kernels.functional.bsconv(x.float(), kernel(4, 3, 1), kernel(4, 1))
    assert conv3x3(x, weight).dtype == torch.float64


def test_a_refused_call_goes_to_the_next_backend(monkeypatch):
    refuses = dispatch.Implementation(_never, frozenset({"cpu"}), accepts=lambda x, *_: "too small")
    monkeypatch.setitem(
        dispatch._backends(), "native-cpu", dispatch.Backend("native-cpu", lambda: None, {"conv3x3": refuses})
    )
    monkeypatch.setattr(dispatch, "_decisions", {})
    x, weight = rand(1, 3, 5, 5), kernel(4, 3)
    torch.testing.assert_close(conv3x3(x, weight), torch.conv2d(x, weight, padding=1))
    with (
        esr_kernels.use_backend("native-cpu"),
        pytest.raises(esr_kernels.BackendError, match="native-cpu cannot run conv3x3: too small"),
    ):
        conv3x3(x, weight)


def _never(*args):
    raise AssertionError("this implementation must not be called")


def test_no_backend_at_all_lists_each_reason(monkeypatch):
    for name in NAMES:
        monkeypatch.setitem(dispatch._backends(), name, dispatch.Backend(name, lambda: "broken", {}))
    monkeypatch.setattr(dispatch, "_decisions", {})
    with pytest.raises(
        esr_kernels.BackendError, match="no backend can run conv3x3: native-cpu: broken; reference: broken"
    ):
        conv3x3(rand(1, 3, 5, 5), kernel(4, 3))


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("ESR_KERNELS_BACKEND", "reference")
    assert dispatch.chosen_backend() == "reference"
    monkeypatch.setenv("ESR_KERNELS_BACKEND", "fastest")
    with pytest.raises(ValueError, match="ESR_KERNELS_BACKEND: unknown backend 'fastest'"):
        conv3x3(rand(1, 3, 5, 5), kernel(4, 3))
    with esr_kernels.use_backend("reference"):
        conv3x3(rand(1, 3, 5, 5), kernel(4, 3))


def test_the_choice_nests_and_belongs_to_its_thread():
    seen = []
    with esr_kernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.chosen_backend()))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="unknown"), esr_kernels.use_backend("nothing"):
            pass
        assert dispatch.chosen_backend() == "reference"
    assert dispatch.chosen_backend() is None
    assert seen == [None]


def test_import_is_light_and_needs_nothing_optional():
    """No Pillow, no scikit-image behind the import, and no Triton but where PyTorch's FLOP counter imports it."""
    report = "print([m for m in ('triton', 'PIL', 'skimage', 'fvcore', 'tqdm') if m in sys.modules])"
    code = "import sys; import esr_kernels; " + report
    clean = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, torch.utils.flop_counter; " + report,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == clean.stdout
