"""The native module's kernels as functions of NumPy arrays: their addresses are taken here, and nothing is checked.

``CpuKernels`` and ``CudaKernels`` are ``Kernels``, so that one test body serves both; the latter is for a module that
runs the CUDA kernels on host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.reference import BUFFER_TYPES, F32, Bits, Codec, ElementType
from kernels.cases import U8, Guarded

SEGMENT_FIELDS = (
    "first_group", "offset", "length", "packet", "block", "group", "origin", "kept", "value", "word",
)  # fmt: skip
PACKET_FIELDS = ("digest", "groups", "blocks", "nbytes", "values")


@dataclass(frozen=True)
class Layout:
    """The two int64 tables; `segments` has [S + 1, 10] entries, the last row the sentinel, `packets` [P, 5]."""

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
        *packing(codec),
        *codec.ratio.as_integer_ratio(),
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


def packing(codec: Codec) -> tuple[int, int, bool]:
    return codec.kind, codec.group, codec.hadamard


@contextmanager
def scratch_memory(nbytes: int) -> Iterator[tuple[int, int]]:
    """Address and size of scratch memory that is aligned to no more than 16 bytes, holds no zeros, and has guards."""
    memory = Guarded(nbytes, offset=16)
    try:
        yield (address(memory.bytes), nbytes) if nbytes else (0, 0)
    finally:
        memory.assert_intact()


class Kernels:
    """Outputs and residuals are written in place. A refused packet is a ValueError."""

    def encode(
        self, x: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        with self._scratch(layout, codec) as scratch, self._step(step) as at:
            self._call(
                "encode", address(x), type_number(element), address(residual), *layout.arguments, *packing(codec),
                stochastic, seed, at, address(out), stride, *scratch, checked=False,
            )  # fmt: skip

    def encode_rounded(
        self, x: F32, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        with self._step(step) as at:
            self._call(
                "encode_rounded", address(x), type_number(element), *layout.arguments, *packing(codec), stochastic,
                seed, at, address(out), stride, checked=False,
            )  # fmt: skip

    def encode_difference(
        self, minuend: F32, subtrahend: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int,
        *, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        with self._step(step) as at:
            self._call(
                "encode_difference", address(minuend), address(subtrahend), type_number(element), *layout.arguments,
                *packing(codec), stochastic, seed, at, address(out), stride, checked=False,
            )  # fmt: skip

    def decode(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        with self._scratch(layout, codec) as scratch:
            self._call(
                "decode", address(packets), stride, *layout.arguments, *packing(codec), address(output),
                type_number(element), *scratch,
            )  # fmt: skip

    def decode_add(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        self._call(
            "decode_add", address(packets), stride, *layout.arguments, *packing(codec), address(output),
            type_number(element),
        )  # fmt: skip

    def clear(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, packet_type: ElementType, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        with self._scratch(layout, codec) as scratch:
            self._call(
                "clear", address(packets), stride, *layout.arguments, *packing(codec), type_number(packet_type),
                address(output), type_number(element), *scratch,
            )  # fmt: skip

    def reduce(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        with self._scratch(layout, codec, ranks) as scratch:
            self._call(
                "reduce", address(packets), stride, ranks, factor, *layout.arguments, *packing(codec),
                address(output), type_number(element), *scratch,
            )  # fmt: skip

    def reduce_encode(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, out: U8,
        element: ElementType, *, into: tuple[Layout, Codec] | None = None,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        """`out` is whole, and of the layout and codec `into`; None: those of the packets read."""
        into_layout, into_codec = into or (layout, codec)
        with self._scratch(layout, codec, ranks) as scratch, self._step(step) as at:
            self._call(
                "reduce_encode", address(packets), stride, ranks, factor, *layout.arguments, *packing(codec),
                *into_layout.arguments, *packing(into_codec), stochastic, address(residual), seed, at, address(out),
                out.nbytes, type_number(element), *scratch,
            )  # fmt: skip

    def _scratch_nbytes(self, layout: Layout, ranks: int) -> int:
        raise NotImplementedError

    @contextmanager
    def _scratch(self, layout: Layout, codec: Codec, ranks: int = 1) -> Iterator[tuple[int, int]]:
        with scratch_memory(self._scratch_nbytes(layout, ranks) if codec.is_sparse else 0) as scratch:
            yield scratch

    @contextmanager
    def _step(self, step: int) -> Iterator[int]:
        """The step as the kernels take it: the number, or its address."""
        raise NotImplementedError

    def _call(self, name: str, *arguments: Any, checked: bool = True) -> None:
        """`checked`: the call may refuse a packet."""
        raise NotImplementedError


@dataclass(frozen=True)
class CpuKernels(Kernels):
    module: Any
    threads: int = 1

    def _scratch_nbytes(self, layout: Layout, ranks: int) -> int:
        return int(self.module.cpu_scratch_nbytes(*layout.arguments, ranks, self.threads))

    @contextmanager
    def _step(self, step: int) -> Iterator[int]:
        yield step

    def _call(self, name: str, *arguments: Any, checked: bool = True) -> None:
        getattr(self.module, f"cpu_{name}")(*arguments, self.threads)


@dataclass(frozen=True)
class CudaKernels(Kernels):
    """For a module whose cuda_* functions take host memory; every call is complete when it returns."""

    module: Any
    stream: int = 0

    def _scratch_nbytes(self, layout: Layout, ranks: int) -> int:
        return int(self.module.cuda_scratch_nbytes(*layout.arguments, ranks))

    @contextmanager
    def _step(self, step: int) -> Iterator[int]:
        word = np.array([step], np.int64)
        yield address(word)

    def _call(self, name: str, *arguments: Any, checked: bool = True) -> None:
        error = np.zeros(1, np.int32)
        trailing = (address(error),) if checked else ()
        getattr(self.module, f"cuda_{name}")(*arguments, *trailing, self.stream)
        if error[0]:
            raise ValueError(f"packet {error[0] - 1} was refused")
