"""The CUDA kernels on a GPU give the reference's bytes: the cases of the emulated run, on a non-default stream.

What carries arrays to a device and back is itself tested here without one, with the emulated kernels and host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import smallreduce as sr
from formats import reference
from formats.reference import BF16, F32, FP32, Bits, Codec, ElementType
from kernels import cases
from kernels.cases import CODECS, CONTENTS, ELEMENTS, SPARSE_CONTENTS, U8, Guarded
from kernels.equality import (
    Case,
    PacketMemory,
    check_clear,
    check_decode,
    check_encode,
    check_reduce,
    check_reduce_encode,
    layout_of,
)
from kernels.native import Kernels, Layout, packing, type_number
from kernels.test_emulated_cuda import EACH_CODEC, EACH_KERNEL, EMULATED_CODECS, KERNELS, emulated
from kernels.test_emulated_topk import (
    LONG,
    OPERATIONS,
    REFUSED_CASE,
    SHORT_CASES,
    WORDS,
    assert_refused,
    packet_of,
    sections_of,
)
from kernels.test_topk import CHECKS, EACH_CHECK
from smallreduce import _C, ops
from smallreduce._layout import Layout as SmallreduceLayout

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
class DeviceKernels(Kernels):
    """The kernels of a module whose cuda_* functions take memory of ``device``."""

    module: Any
    device: torch.device
    stream: torch.cuda.Stream | None

    def _run(self, name: str, arguments: Callable[[Put], tuple[Any, ...]], checked: bool = True) -> None:
        error = np.zeros(1, np.int32)
        with mirrored(self.device, self.stream) as put:
            trailing = (put(error),) if checked else ()
            stream = 0 if self.stream is None else self.stream.cuda_stream
            getattr(self.module, name)(*arguments(put), *trailing, stream)
        if error[0]:
            raise ValueError(f"packet {error[0] - 1} was refused")

    def _room(self, put: Put, layout: Layout, codec: Codec, ranks: int = 1) -> tuple[int, int]:
        """Address and size of scratch memory."""
        if not codec.is_sparse:
            return 0, 0
        nbytes = self.module.cuda_scratch_nbytes(*layout.arguments, ranks)
        return put(Guarded(nbytes, offset=16).bytes), nbytes

    def encode(
        self, x: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            step_word = put(np.array([step], np.int64))
            return (
                put(x), type_number(element), put(residual), *tables(put, layout), *packing(codec), stochastic, seed,
                step_word, put(out), stride, *self._room(put, layout, codec),
            )  # fmt: skip

        self._run("cuda_encode", arguments, checked=False)

    def encode_rounded(
        self, x: F32, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int, *,
        stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            step_word = put(np.array([step], np.int64))
            return (
                put(x), type_number(element), *tables(put, layout), *packing(codec), stochastic, seed, step_word,
                put(out), stride,
            )  # fmt: skip

        self._run("cuda_encode_rounded", arguments, checked=False)

    def encode_difference(
        self, minuend: F32, subtrahend: Bits, element: ElementType, layout: Layout, codec: Codec, out: U8, stride: int,
        *, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            step_word = put(np.array([step], np.int64))
            return (
                put(minuend), put(subtrahend), type_number(element), *tables(put, layout), *packing(codec), stochastic,
                seed, step_word, put(out), stride,
            )  # fmt: skip

        self._run("cuda_encode_difference", arguments, checked=False)

    def decode(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        def arguments(put: Put) -> tuple[Any, ...]:
            return (
                put(packets), stride, *tables(put, layout), *packing(codec), put(output), type_number(element),
                *self._room(put, layout, codec),
            )  # fmt: skip

        self._run("cuda_decode", arguments)

    def decode_add(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, output: Bits, element: ElementType
    ) -> None:
        def arguments(put: Put) -> tuple[Any, ...]:
            return (
                put(packets), stride, *tables(put, layout), *packing(codec), put(output), type_number(element),
            )  # fmt: skip

        self._run("cuda_decode_add", arguments)

    def clear(
        self, packets: U8, stride: int, layout: Layout, codec: Codec, packet_type: ElementType, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            return (
                put(packets), stride, *tables(put, layout), *packing(codec), type_number(packet_type), put(output),
                type_number(element), *self._room(put, layout, codec),
            )  # fmt: skip

        self._run("cuda_clear", arguments)

    def reduce(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, output: Bits,
        element: ElementType,
    ) -> None:  # fmt: skip
        def arguments(put: Put) -> tuple[Any, ...]:
            return (
                put(packets), stride, ranks, factor, *tables(put, layout), *packing(codec), put(output),
                type_number(element), *self._room(put, layout, codec, ranks),
            )  # fmt: skip

        self._run("cuda_reduce", arguments)

    def reduce_encode(
        self, packets: U8, stride: int, ranks: int, factor: float, layout: Layout, codec: Codec, out: U8,
        element: ElementType, *, into: tuple[Layout, Codec] | None = None,
        residual: F32 | None = None, stochastic: bool = False, seed: int = 0, step: int = 0,
    ) -> None:  # fmt: skip
        into_layout, into_codec = into or (layout, codec)

        def arguments(put: Put) -> tuple[Any, ...]:
            step_word = put(np.array([step], np.int64))
            return (
                put(packets), stride, ranks, factor, *tables(put, layout), *packing(codec), *tables(put, into_layout),
                *packing(into_codec), stochastic, put(residual), seed, step_word, put(out), out.nbytes,
                type_number(element), *self._room(put, layout, codec, ranks),
            )  # fmt: skip

        self._run("cuda_reduce_encode", arguments)


def tables(put: Put, layout: Layout) -> tuple[int, int, int, int]:
    return put(layout.segments), len(layout.segments) - 1, put(layout.packets), len(layout.packets)


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


# TopK.


@EACH_CHECK
def test_carrying_topk(kernels: DeviceKernels, check: str) -> None:
    codec = reference.topk(Fraction(1, 20), BF16)
    CHECKS[check](kernels, Case(codec, FP32, "normal", cases.random_table(1, 4, 700, packets=2), skip=1))


@EACH_CHECK
@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_topk_contents(kernels: DeviceKernels, check: str) -> None:
    for case in SHORT_CASES:
        CHECKS[check](kernels, case)


@pytest.mark.parametrize("contents", SPARSE_CONTENTS)
@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_long_topk_contents(kernels: DeviceKernels, contents: str) -> None:
    """Segments long enough for a sample; and the selection is the same however the warps take turns."""
    for element, ratio in product((FP32, BF16), (Fraction(1, 1000), Fraction(1, 100))):
        for table in (LONG, cases.flat(3_000_001)):
            case = Case(reference.topk(ratio), element, contents, table)
            check_encode(_C, kernels, case, with_residual=element == FP32)
    check_reduce_encode(_C, kernels, case, 3, 1 / 3, with_residual=True)
    check_decode(_C, kernels, case)


@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_topk_of_many_ranks(kernels: DeviceKernels) -> None:
    """More ranks than a warp has lanes."""
    case = Case(reference.topk(Fraction(1, 10), BF16), FP32, "dyadic", cases.random_table(2, 9, 9000), skip=1)
    check_reduce(_C, kernels, case, 70, 1 / 70)
    check_reduce_encode(_C, kernels, case, 70, 1 / 70, with_residual=True)


@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_topk_of_many_segments(kernels: DeviceKernels) -> None:
    """More segments than ranges, in more packets than lanes."""
    case = Case(reference.topk(Fraction(1, 50)), BF16, "normal", cases.random_table(4, 5000, 600, packets=50))
    check_encode(_C, kernels, case, with_residual=True)
    check_decode(_C, kernels, case)
    check_clear(_C, kernels, case)


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kernels", ON_DEVICE, indirect=True)
def test_topk_words_that_do_not_fit_are_refused(kernels: DeviceKernels, operation: str, words: str) -> None:
    values, _ = sections_of(REFUSED_CASE)
    assert_refused(kernels, packet_of(REFUSED_CASE, values, np.array(WORDS[words], np.uint16)), operation)


# Graphs.


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
            layout.nbytes[0], 0, 0, torch.cuda.current_stream().cuda_stream,
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weight_differences_in_a_captured_graph() -> None:
    """Sum of int8 packets into int4, difference encoded, difference added: a replay does what the calls do."""
    if not _C.cuda_runtime_version():
        pytest.skip("smallreduce is built without CUDA")
    segments, device = [(1, 100_000), (100_005, 77)], torch.device("cuda")
    read, into, weights = (
        SmallreduceLayout.build(segments, sr.codec(codec).format, dtype)
        for codec, dtype in (
            ("int8-hadamard", torch.float32),
            ("int4-hadamard", torch.float32),
            ("int4:group=2048", torch.bfloat16),
        )
    )
    packets, packet, difference = (
        torch.zeros(count, layout.stride, dtype=torch.uint8, device=device)
        for count, layout in ((2, read), (1, into), (1, weights))
    )
    gradients, new = torch.zeros(2, 100_100, device=device), torch.zeros(100_100, device=device)
    held = torch.zeros(100_100, dtype=torch.bfloat16, device=device)
    count, error = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)

    def step() -> None:
        for rank in range(2):
            ops.encode(gradients[rank], read, packets[rank], seed=rank, step=count)
        ops.reduce_encode(
            packets.view(-1), read.stride, 2, 0.5, read, packet[0], seed=2, step=count, error=error, into=into
        )
        ops.encode_difference(new, held, weights, difference, seed=3, step=count)
        ops.decode_add(difference, weights, held, error)

    step()  # copies the tables and loads the kernels, which a graph must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        gradients.copy_(torch.randn(2, 100_100, generator=generator))
        new.copy_(torch.randn(100_100, generator=generator))
        count.fill_(number)
        before = held.clone()
        graph.replay()
        replayed = [tensor.clone() for tensor in (packet, difference, held)]
        held.copy_(before)
        step()
        assert all(torch.equal(a, b) for a, b in zip((packet, difference, held), replayed, strict=True))
        assert not torch.equal(held, before)
        assert error.item() == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ratio", ["0.001", "0.2"])
def test_topk_in_a_captured_graph(ratio: str) -> None:
    """Encoding for two ranks, reducing, reducing into a packet, decoding and clearing in one CUDA graph: a replay makes
    of new input what the same calls make of it."""
    if not _C.cuda_runtime_version():
        pytest.skip("smallreduce is built without CUDA")
    layout = SmallreduceLayout.build([(1, 100_000), (100_005, 77)], sr.TopK(float(ratio)).format, torch.float32)
    numel, nbytes, device = 100_100, layout.stride, torch.device("cuda")
    inputs = torch.zeros(2, numel, device=device)
    residuals, server = (
        torch.zeros(2, 32 * layout.blocks, device=device),
        torch.zeros(32 * layout.blocks, device=device),
    )
    packets = torch.zeros(2, nbytes, dtype=torch.uint8, device=device)
    packet = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    mean, decoded, cleared = (torch.zeros(numel, device=device) for _ in range(3))
    error = torch.zeros(1, dtype=torch.int32, device=device)
    states = (residuals, server, packets, packet, mean, decoded, cleared, error)

    def step() -> None:
        for rank in range(2):
            ops.encode(inputs[rank], layout, packets[rank], residuals[rank])
        ops.reduce(packets.view(-1), nbytes, 2, 0.5, layout, mean, error)
        ops.reduce_encode(packets.view(-1), nbytes, 2, 0.5, layout, packet, server, error=error)
        ops.decode(packet, layout, decoded, error)
        ops.clear(packet, layout, cleared, error)

    step()  # copies the tables and loads the kernels, which a graph must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(3):
        inputs.copy_(torch.randn(2, numel, generator=torch.Generator().manual_seed(number)))
        cleared.fill_(1)
        before = [state.clone() for state in states]
        graph.replay()
        replayed = [state.clone() for state in states]
        for state, value in zip(states, before, strict=True):
            state.copy_(value)
        step()
        assert all(torch.equal(state, value) for state, value in zip(states, replayed, strict=True))
        assert decoded.count_nonzero() == sum(sr.TopK(float(ratio)).kept(length) for length in (100_000, 77))
        assert error.item() == 0
