"""The CUDA kernels on a GPU give the reference's bytes: the cases of the emulated run, on a non-default stream.

What carries arrays to a device and back is itself tested here without one, with the emulated kernels and host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from formats.reference import BF16, F32, FP32, Bits, Codec, ElementType
from kernels import cases
from kernels.cases import CODECS, CONTENTS, ELEMENTS, U8
from kernels.equality import Case, PacketMemory, check_decode, check_encode, layout_of
from kernels.native import Layout, type_number
from kernels.test_emulated_cuda import EACH_CODEC, EACH_KERNEL, EMULATED_CODECS, KERNELS, emulated
from smallreduce import _C

__all__ = ["emulated"]

GUARD = 0xA5
GUARD_NBYTES = 64

Put = Callable[[npt.NDArray[Any] | None], int]


@contextmanager
def mirrored(device: torch.device, stream: torch.cuda.Stream | None) -> Iterator[Put]:
    """Gives a function that copies an array to the device and returns its address there; at the end all come back.

    A copy is as misaligned as its original, and has guards on both sides.
    """
    copies: list[tuple[npt.NDArray[Any], torch.Tensor, int]] = []

    def put(array: npt.NDArray[Any] | None) -> int:
        if array is None:
            return 0
        memory = torch.full((array.nbytes + 3 * GUARD_NBYTES,), GUARD, dtype=torch.uint8, device=device)
        begin = GUARD_NBYTES + (array.ctypes.data - memory.data_ptr()) % GUARD_NBYTES
        memory[begin : begin + array.nbytes] = torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy())
        copies.append((array, memory, begin))
        return memory.data_ptr() + begin

    with torch.cuda.stream(stream):
        yield put
        for array, memory, begin in copies:
            returned = memory.cpu().numpy()
            array[...] = returned[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
            assert (returned[:begin] == GUARD).all(), "wrote before a buffer"
            assert (returned[begin + array.nbytes :] == GUARD).all(), "wrote after a buffer"


@dataclass(frozen=True)
class DeviceKernels:
    """The kernels of ``kernels.native.Kernels`` for a module whose cuda_* functions take memory of ``device``."""

    module: Any
    device: torch.device
    stream: torch.cuda.Stream | None

    def _call(self, name: str, arguments: Callable[[Put], tuple[Any, ...]], checked: bool = True) -> None:
        error = np.zeros(1, np.int32)
        with mirrored(self.device, self.stream) as put:
            trailing = (put(error),) if checked else ()
            stream = 0 if self.stream is None else self.stream.cuda_stream
            getattr(self.module, name)(*arguments(put), *trailing, stream)
        if error[0]:
            raise ValueError(f"packet {error[0] - 1} was refused")

    def encode(
        self, x: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            step_word = put(np.array([step], np.int64))
            return (
                put(x), type_number(element), put(residual), *tables(put, layout), *packing(codec), stochastic, seed,
                step_word, put(out), stride,
            )  # fmt: skip

        self._call("cuda_encode", arguments, checked=False)

    def decode(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        def arguments(put: Put) -> tuple[Any, ...]:
            return put(packets), stride, *tables(put, layout), *packing(codec), put(output), type_number(element)

        self._call("cuda_decode", arguments)

    def reduce(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            return (
                put(packets), stride, ranks, factor, *tables(put, layout), *packing(codec), put(output),
                type_number(element),
            )  # fmt: skip

        self._call("cuda_reduce", arguments)

    def reduce_encode(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, out: U8,
        element: ElementType, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            step_word = put(np.array([step], np.int64))
            return (
                put(packets), stride, ranks, factor, *tables(put, layout), *packing(codec), stochastic, put(residual),
                seed, step_word, put(out), type_number(element),
            )  # fmt: skip

        self._call("cuda_reduce_encode", arguments)


def tables(put: Put, layout: Layout) -> tuple[int, int, int, int]:
    return put(layout.segments), len(layout.segments) - 1, put(layout.packets), len(layout.packets)


def packing(codec: Codec) -> tuple[int, int, bool]:
    return codec.kind, codec.group, codec.hadamard


ON_DEVICE = [pytest.param("device", marks=pytest.mark.cuda)]


@pytest.fixture(params=["emulated", *ON_DEVICE])
def kernels(request: pytest.FixtureRequest) -> DeviceKernels:
    if request.param == "emulated":
        return DeviceKernels(request.getfixturevalue("emulated"), torch.device("cpu"), None)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not _C.cuda_runtime_version():
        pytest.skip("smallreduce is built without CUDA")
    return DeviceKernels(_C, torch.device("cuda"), torch.cuda.Stream())


@EACH_KERNEL
def test_carrying(kernels: DeviceKernels, kernel: str) -> None:
    KERNELS[kernel](kernels, Case(CODECS["int4"], FP32, "normal", cases.random_table(1, 4, 700, packets=2), skip=1))


@EACH_KERNEL
@EACH_CODEC
@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_contents(kernels: DeviceKernels, codec: str, kernel: str) -> None:
    """Every content in every element type; nearest and stochastic, aligned and misaligned starts take turns."""
    for turn, (contents, element) in enumerate((c, e) for c in CONTENTS for e in ELEMENTS):
        case = Case(
            EMULATED_CODECS[codec],
            ELEMENTS[element],
            contents,
            cases.random_table(turn, 4, 700, packets=2),
            seed=turn,
            stochastic=turn % 2 == 1,
            skip=turn % 3,
            packet_skip=turn % 5,
            stride_slack=turn % 4,
        )
        KERNELS[kernel](kernels, case)


@EACH_KERNEL
@EACH_CODEC
@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_sizes(kernels: DeviceKernels, codec: str, kernel: str) -> None:
    for size in cases.sizes(EMULATED_CODECS[codec]):
        for element in (FP32, BF16):
            KERNELS[kernel](kernels, Case(EMULATED_CODECS[codec], element, "outliers", cases.flat(size), seed=size))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_a_million_elements(kernels: DeviceKernels, codec: str) -> None:
    case = Case(CODECS[codec], FP32, "normal", cases.flat(cases.LARGE_SIZE, packets=3), stochastic=True)
    check_encode(_C, kernels, case, with_residual=True)
    check_decode(_C, kernels, case)


def test_a_refused_packet_is_named(kernels: DeviceKernels) -> None:
    case = Case(CODECS["int4"], FP32, "normal", cases.flat(9000, packets=3))
    layout = layout_of(_C, case)
    memory = PacketMemory(layout.nbytes, 0, 0)
    memory.fill(case.encoded())
    memory.bytes[memory.stride] ^= 1
    with pytest.raises(ValueError, match="packet 1 was refused"):
        kernels.decode(memory.bytes, memory.stride, layout, case.codec, np.zeros(9000, np.uint32), FP32)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["int4", "int4-hadamard", "sign"])
def test_a_captured_graph_replays_with_fresh_rounding(codec: str) -> None:
    """Encode and decode in one CUDA graph: a replay works on new input, and its step is the device's."""
    if not _C.cuda_runtime_version():
        pytest.skip("smallreduce is built without CUDA")
    case = Case(CODECS[codec], FP32, "normal", cases.flat(10_000))
    layout = layout_of(_C, case)
    segments, packets = (torch.from_numpy(table).cuda() for table in (layout.segments, layout.packets))
    layout_arguments = segments.data_ptr(), len(layout.segments) - 1, packets.data_ptr(), len(layout.packets)
    x = torch.zeros(10_000, device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    out = torch.zeros(layout.nbytes[0], dtype=torch.uint8, device="cuda")

    def encode() -> None:
        _C.cuda_encode(
            x.data_ptr(), 0, 0, *layout_arguments, *packing(case.codec), True, 7, step.data_ptr(), out.data_ptr(),
            layout.nbytes[0], torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode()
    host = torch.from_numpy(case.buffer.view(np.float32).copy())
    for number in (0, 1, 5):
        x.copy_(host * (number + 1))
        step.fill_(number)
        graph.replay()
        replayed = out.clone()
        out.zero_()
        encode()
        assert torch.equal(replayed, out)
