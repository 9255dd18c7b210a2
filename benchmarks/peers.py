"""What other libraries have on the CPU, for ``kernels.py`` to time beside the codecs: same buffer, same run.

None of them computes quite the same thing. piquant and ``torch.quantize_per_tensor`` have one scale for a whole tensor
and take it as an argument: finding it is another pass over the data, timed as well where the library offers one.
``numpy.packbits`` packs signs without any scale, and ``torch.topk`` packs nothing. All are given what favours them:
outputs made beforehand where the API allows, and scales where it wants them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class PeerCall:
    """A call to time: of which library, which of our operations it answers to, and the bits it writes per element."""

    name: str
    operation: str
    bits: float
    call: Callable[[], object]


def piquant_calls(x: Tensor, threads: int) -> list[PeerCall]:
    """pypiquant's C entry points, without its Python-side allocation; empty if it is not installed."""
    try:
        import piquant
    except ImportError:
        return []
    context = piquant.Context(threads)
    fp32 = piquant.DataType.F32
    calls: list[PeerCall] = []

    def add(bits: int) -> None:
        dtype = {2: piquant.DataType.UINT2, 4: piquant.DataType.UINT4, 8: piquant.DataType.UINT8}[bits]
        packed = torch.empty(x.numel() * bits // 8, dtype=torch.uint8)
        output = torch.empty_like(x)
        scale, zero_point = context.compute_quant_params_ptr_float32(x.data_ptr(), dtype, x.numel())

        def quantize(mode: piquant.RoundMode, scale: float, zero_point: int) -> None:
            context.quantize_ptr(x.data_ptr(), fp32, packed.data_ptr(), dtype, x.numel(), scale, zero_point, mode)

        def quantize_with_scale(mode: piquant.RoundMode) -> None:
            quantize(mode, *context.compute_quant_params_ptr_float32(x.data_ptr(), dtype, x.numel()))

        def dequantize() -> None:
            context.dequantize_ptr(
                packed.data_ptr(), dtype, output.data_ptr(), fp32, x.numel(), scale, zero_point, piquant.ReduceOp.SET
            )

        for mode in (piquant.RoundMode.NEAREST, piquant.RoundMode.STOCHASTIC):
            name = f"piquant uint{bits} {mode.name.lower()}"
            given, found = partial(quantize, mode, scale, zero_point), partial(quantize_with_scale, mode)
            calls.append(PeerCall(f"{name}, scale given", "encode", bits, given))
            calls.append(PeerCall(f"{name}, scale found", "encode", bits, found))
        calls.append(PeerCall(f"piquant uint{bits}", "decode", bits, dequantize))

    for bits in (8, 4, 2):
        add(bits)
    return calls


def torch_calls(x: Tensor) -> list[PeerCall]:
    """``torch.quantize_per_tensor`` to 8 bits, the scale given, and its inverse; both allocate their result."""
    scale = float(x.abs().max()) / 127
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 deprecates these functions; it does so once for each process
        quantized = torch.quantize_per_tensor(x, scale, 0, torch.qint8)
    return [
        PeerCall(
            "torch.quantize_per_tensor, scale given",
            "encode",
            8,
            lambda: torch.quantize_per_tensor(x, scale, 0, torch.qint8),
        ),
        PeerCall("torch dequantize", "decode", 8, quantized.dequantize),
    ]


def topk_calls(x: Tensor) -> list[PeerCall]:
    """``torch.topk`` of a thousandth of the elements, of the values and of the magnitudes; the result is not packed."""
    kept = -(-x.numel() // 1000)
    bits = 0.001 * (32 + 64)  # a value and an int64 index
    magnitudes, values, indices = torch.empty_like(x), x.new_empty(kept), torch.empty(kept, dtype=torch.int64)

    def select(of: Tensor) -> None:
        torch.topk(of, kept, sorted=False, out=(values, indices))

    return [
        PeerCall("torch.topk 0.1 %", "encode", bits, lambda: select(x)),
        PeerCall("torch.topk 0.1 % of magnitudes", "encode", bits, lambda: select(torch.abs(x, out=magnitudes))),
    ]


def numpy_calls(x: Tensor) -> list[PeerCall]:
    """``numpy.packbits`` of the signs, without a scale; the comparison that makes the bits is part of it."""
    array = x.numpy()
    is_set = numpy.empty(array.shape, dtype=bool)

    def pack() -> None:
        numpy.greater_equal(array, 0, out=is_set)
        numpy.packbits(is_set, bitorder="little")

    return [PeerCall("numpy.packbits of signs, no scale", "encode", 1, pack)]


def all_calls(x: Tensor, threads: int) -> list[PeerCall]:
    """Every peer that is installed, on the 1-D fp32 CPU tensor ``x``."""
    return piquant_calls(x, threads) + torch_calls(x) + topk_calls(x) + numpy_calls(x)
