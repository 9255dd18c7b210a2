"""Damaged packets under AddressSanitizer: tests/cpp/fuzz with fewer of them than one would try by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.timeout(600)  # most of it compiles
def test_damaged_packets_are_refused_or_harmless() -> None:
    done = subprocess.run([ROOT / "tests/cpp/fuzz", "20000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20000 packets" in done.stdout
