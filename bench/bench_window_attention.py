"""Attention in windows: every backend against plain PyTorch."""

from __future__ import annotations

from typing import Any

import common
import pytest
from common import Settings

from esr_kernels.cases import OperatorCase

SIZE = (128, 128)
TRAINING_SIZE = (64, 64)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    common.parametrize(metafunc, "window_attention", training_case="craft 24 of 3 heads 16x4")


def test_forward(benchmark: Any, case: OperatorCase, engine: str, settings: Settings) -> None:
    common.forward(benchmark, case, engine, settings, SIZE)


def test_training(benchmark: Any, case: OperatorCase, engine: str, settings: Settings) -> None:
    common.training(benchmark, case, engine, settings, TRAINING_SIZE)
