"""gpu_check.py: how a stage ends is what its command did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from programs import gpu_check


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("print('=== 263 passed in 21.87s ==='); print('ERROR SUMMARY: 0 errors')", "passed"),
        ("print('=== 2 passed, 3 skipped in 1s ===')", "passed"),
        ("print('=== 3 skipped in 1s ===')", "failed"),
        ("print('=== 2 passed in 1s ==='); raise SystemExit(1)", "failed"),
        ("import time; print('=== 2 passed ===', flush=True); time.sleep(60)", "timed out"),
    ],
)
def test_a_stage_of_tests(program: str, outcome: str, tmp_path: Path) -> None:
    limit_s = 1.0 if outcome == "timed out" else 60.0
    stage = gpu_check.run("tests", [sys.executable, "-c", program, "pytest"], limit_s, tmp_path)
    assert stage.outcome == outcome
    assert stage.is_failure == (outcome != "passed")
