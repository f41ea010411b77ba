"""What `make test` runs of `make sanitize`: every operator, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def has_sanitizers() -> bool:
    """Whether the C++ compiler finds their libraries; it repeats the bare name of one that it has not."""
    command = [*os.environ.get("CXX", "c++").split(), "-print-file-name=libasan.so"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() != "libasan.so"
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.slow
@pytest.mark.skipif(not has_sanitizers(), reason="there is no C++ compiler with AddressSanitizer")
def test_operators_under_address_sanitizer() -> None:
    """The planted bugs are found, and drawn calls of every operator, forward and backward, have none."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "sanitize.py"), "--quick"],
        env={**os.environ, "MAX_JOBS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert done.stdout.count("planted bug found") == 2
    runs = re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert runs and all(int(passed) > 30 for passed in runs)
