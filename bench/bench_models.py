"""Whole networks: optimised on every backend, as fused modules, and in plain PyTorch."""

from __future__ import annotations

from typing import Any

import common
import pytest
from common import Settings

from esr_kernels.cases import model_names

SIZE = (128, 128)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    engines = common.model_engines(metafunc.config.getoption("device"))
    pairs = [(name, engine) for name in model_names() for engine in engines]
    metafunc.parametrize(("name", "engine"), pairs, ids=[f"{engine}-{name}" for name, engine in pairs])


def test_forward(benchmark: Any, name: str, engine: str, settings: Settings) -> None:
    common.network(benchmark, name, engine, settings, SIZE)
