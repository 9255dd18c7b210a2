"""The native module, and what it was built with. The one place that imports ``_C``."""

from __future__ import annotations

from typing import Any

try:
    import smallreduce._C as native
except ModuleNotFoundError as error:
    raise ImportError(
        "smallreduce's native module is not built for this Python; run `pip install .` in a checkout, "
        "or `make build` to build it in place"
    ) from error

__all__ = ["build_info", "native"]


def build_info() -> dict[str, Any]:
    """How this copy of smallreduce was built and which kernels it runs.

    Returns:
        ``cpu``: the instruction set in use (``SMALLREDUCE_CPU`` forces one); ``cpus``: all that this machine can run;
        ``cuda``: the CUDA runtime's version as ``"13.0"``, or None where it was built without CUDA.
    """
    version = native.cuda_runtime_version()
    return {
        "cpu": native.cpu_isa(),
        "cpus": list(native.cpu_isas()),
        "cuda": f"{version // 1000}.{version % 1000 // 10}" if version else None,
    }
