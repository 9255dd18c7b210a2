"""The native module's kernels as functions of NumPy arrays: their addresses are taken here, and nothing is checked.

``CpuKernels`` and ``CudaKernels`` have the same methods, so that one test body serves both; the latter is for a module
that runs the CUDA kernels on host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from formats.reference import BUFFER_TYPES, F32, Bits, Codec, ElementType

U8 = npt.NDArray[np.uint8]

SEGMENT_FIELDS = ("first_group", "offset", "length", "packet", "block", "group", "origin")
PACKET_FIELDS = ("digest", "groups", "blocks", "nbytes")


@dataclass(frozen=True)
class Layout:
    """The two int64 tables; `segments` has [S + 1, 7] entries, the last row the sentinel, `packets` [P, 4]."""

    segments: npt.NDArray[np.int64]
    packets: npt.NDArray[np.int64]

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        return self.segments.ctypes.data, len(self.segments) - 1, self.packets.ctypes.data, len(self.packets)

    @property
    def nbytes(self) -> list[int]:
        return [int(n) for n in self.packets[:, PACKET_FIELDS.index("nbytes")]]

    def only(self, packet: int) -> Layout:
        """The layout of one of the packets, whose blocks keep their origins."""
        column = SEGMENT_FIELDS.index
        body = self.segments[:-1]
        rows = body[body[:, column("packet")] == packet]
        row = self.packets[packet : packet + 1]
        groups = int(row[0, PACKET_FIELDS.index("groups")])
        rows = np.concatenate((rows, self.segments[-1:]))
        rows[:-1, column("first_group")] = rows[:-1, column("group")]
        rows[-1, column("first_group")] = groups
        rows[:, column("packet")] = 0
        return Layout(rows, row.copy())


def build_layout(
    module: Any,
    segments: Sequence[tuple[int, int]],
    codec: Codec,
    element: ElementType,
    packets: int = 1,
    packet_of: Sequence[int] | None = None,
) -> Layout:
    offsets = [offset for offset, _ in segments]
    lengths = [length for _, length in segments]
    segment_rows, packet_rows = module.build_layout(
        offsets,
        lengths,
        None if packet_of is None else list(packet_of),
        packets,
        *_packing(codec),
        type_number(element),
    )
    return Layout(
        np.frombuffer(segment_rows, np.int64).reshape(-1, len(SEGMENT_FIELDS)).copy(),
        np.frombuffer(packet_rows, np.int64).reshape(-1, len(PACKET_FIELDS)).copy(),
    )


def type_number(element: ElementType) -> int:
    return BUFFER_TYPES.index(element)


def address(array: npt.NDArray[Any] | None) -> int:
    return 0 if array is None else array.ctypes.data


def _packing(codec: Codec) -> tuple[int, int, bool]:
    return codec.kind, codec.group, codec.hadamard


class Kernels(Protocol):
    """Outputs and residuals are written in place. A refused packet is a ValueError."""

    def encode(
        self, x: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None: ...  # fmt: skip

    def decode(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None: ...

    def reduce(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, output: Bits,
        element: ElementType,
    ) -> None: ...  # fmt: skip

    def reduce_encode(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, out: U8,
        element: ElementType, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class CpuKernels:
    module: Any
    threads: int = 1

    def encode(
        self, x: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        self.module.cpu_encode(
            address(x), type_number(element), address(residual), *layout.arguments, *_packing(codec), stochastic,
            seed, step, address(out), stride, self.threads,
        )  # fmt: skip

    def decode(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        self.module.cpu_decode(
            address(packets), stride, *layout.arguments, *_packing(codec), address(output), type_number(element),
            self.threads,
        )  # fmt: skip

    def reduce(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        self.module.cpu_reduce(
            address(packets), stride, ranks, factor, *layout.arguments, *_packing(codec), address(output),
            type_number(element), self.threads,
        )  # fmt: skip

    def reduce_encode(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, out: U8,
        element: ElementType, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        self.module.cpu_reduce_encode(
            address(packets), stride, ranks, factor, *layout.arguments, *_packing(codec), stochastic,
            address(residual), seed, step, address(out), type_number(element), self.threads,
        )  # fmt: skip


@dataclass(frozen=True)
class CudaKernels:
    """For a module whose cuda_* functions take host memory; every call is complete when it returns."""

    module: Any
    stream: int = 0

    def encode(
        self, x: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        step_word = np.array([step], np.int64)
        self.module.cuda_encode(
            address(x), type_number(element), address(residual), *layout.arguments, *_packing(codec), stochastic,
            seed, address(step_word), address(out), stride, self.stream,
        )  # fmt: skip

    def decode(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        error = np.zeros(1, np.int32)
        self.module.cuda_decode(
            address(packets), stride, *layout.arguments, *_packing(codec), address(output), type_number(element),
            address(error), self.stream,
        )  # fmt: skip
        _raise_if_refused(error)

    def reduce(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        error = np.zeros(1, np.int32)
        self.module.cuda_reduce(
            address(packets), stride, ranks, factor, *layout.arguments, *_packing(codec), address(output),
            type_number(element), address(error), self.stream,
        )  # fmt: skip
        _raise_if_refused(error)

    def reduce_encode(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, out: U8,
        element: ElementType, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        error = np.zeros(1, np.int32)
        step_word = np.array([step], np.int64)
        self.module.cuda_reduce_encode(
            address(packets), stride, ranks, factor, *layout.arguments, *_packing(codec), stochastic,
            address(residual), seed, address(step_word), address(out), type_number(element), address(error),
            self.stream,
        )  # fmt: skip
        _raise_if_refused(error)


def _raise_if_refused(error: npt.NDArray[np.int32]) -> None:
    if error[0]:
        raise ValueError(f"packet {error[0] - 1} was refused")
