"""bench.census: which operators a network calls, and the share of its time in them."""

from __future__ import annotations

import pytest

pytest.importorskip("bench.census", reason="the benchmarks are not part of an installed package")
from bench.census import census, main


def test_calls_and_shares() -> None:
    found = census("pfdn_lite", 40, 41)
    # The first, three in two blocks and two in two, one in each of four gates; a 1x1 in each gate; the tail.
    assert found.calls == {"conv3x3": 15, "modulate": 4, "conv1x1": 4, "conv3x3_pixel_shuffle": 1}
    assert "max_pool2d" in [name for name, _ in found.plain]
    assert found.fused is not None and 0 < found.fused < 1
    assert found.fused + sum(share for _, share in found.plain) == pytest.approx(1, abs=0.1)
    assert "conv3x3 15x" in str(found) and "plain PyTorch: " in str(found)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--models", "rlfn", "--size", "15x16"])
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.startswith("| model | conv3x3 |")
    assert row.startswith("| `rlfn` | 14 |  | 1 | 4 | 4 |  | ")
