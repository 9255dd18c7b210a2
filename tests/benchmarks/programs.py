"""The benchmarks as modules, ``from programs import kernels``.

They are programs, which import each other from their own folder. It is on the path only while they are imported here:
folders of tests have the names of some of them.
"""

import sys
from pathlib import Path

__all__ = [
    "collectives",
    "comparison",
    "convergence",
    "error_bounds",
    "gpu_check",
    "kernel_operations",
    "kernels",
    "memory",
    "model_shapes",
    "plans",
    "plot",
    "sharded",
    "slow_network",
    "tables",
    "training",
]

ROOT = Path(__file__).parents[2]
FOLDER = str(ROOT / "benchmarks")

sys.path += [str(ROOT), FOLDER]
try:
    from benchmarks import (
        collectives,
        comparison,
        convergence,
        error_bounds,
        gpu_check,
        kernel_operations,
        kernels,
        memory,
        model_shapes,
        plans,
        plot,
        sharded,
        slow_network,
        tables,
        training,
    )
finally:
    sys.path.remove(FOLDER)
