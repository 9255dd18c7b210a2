"""What a plan is by definition, from benchmarks/plan_checks.py, where the planner is measured against it too.

Its folder is on the path only while it is imported: folders of tests have the names of some programs there.
"""

import sys
from pathlib import Path

__all__ = ["Case", "brute_force", "illegal", "is_legal", "lower_bound", "random_cases"]

FOLDER = str(Path(__file__).parents[2] / "benchmarks")

sys.path.append(FOLDER)
try:
    from plan_checks import Case, brute_force, illegal, is_legal, lower_bound, random_cases
finally:
    sys.path.remove(FOLDER)
