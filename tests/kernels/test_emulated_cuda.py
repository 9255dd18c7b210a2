"""The CUDA kernels' own source, run on the CPU lane by lane (tests/cpp), gives the reference's bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cpp.build import load
from formats import reference
from formats.reference import BF16, FP32, Codec
from kernels import cases
from kernels.cases import CODECS, CONTENTS, ELEMENTS, Table
from kernels.equality import (
    Case,
    PacketMemory,
    assert_same,
    check_decode,
    check_decode_add,
    check_encode,
    check_encode_difference,
    check_encode_rounded,
    check_reduce,
    check_reduce_encode,
    check_reduce_encode_into,
    layout_of,
)
from kernels.native import CpuKernels, CudaKernels, build_layout
from smallreduce import _C

# Beside the usual ones those that take another way through the kernels: groups that fill no power of two of lanes, that
# need several slots of a lane, a whole tile, or several tiles with a rest.
EMULATED_CODECS: dict[str, Codec] = {
    **CODECS,
    "int4-group256": reference.int_quant(4, group=256),
    "int4-group480": reference.int_quant(4, group=480),
    "int2-group1024": reference.int_quant(2, group=1024),
    "int8-group1056-hadamard": reference.int_quant(8, group=1056, hadamard=True),
    "int4-group4096": reference.int_quant(4, group=4096),
    "sign-group32": reference.sign(group=32),
    "sign-group3200": reference.sign(group=3200),
}


@pytest.fixture(scope="session")
def emulated() -> Any:
    return load()


@pytest.fixture
def kernels(emulated: Any, request: pytest.FixtureRequest) -> CudaKernels:
    """On a device of two processors; each test has its own order of warps and lanes."""
    emulated.configure(2, len(request.node.name))
    return CudaKernels(emulated)


KERNELS: dict[str, Callable[[CudaKernels, Case], None]] = {
    "encode": lambda kernels, case: check_encode(_C, kernels, case),
    "encode-residual": lambda kernels, case: check_encode(_C, kernels, case, with_residual=True),
    "encode-rounded": lambda kernels, case: check_encode_rounded(_C, kernels, case),
    "encode-difference": lambda kernels, case: check_encode_difference(_C, kernels, case),
    "decode": lambda kernels, case: check_decode(_C, kernels, case),
    "decode-add": lambda kernels, case: check_decode_add(_C, kernels, case),
    "reduce": lambda kernels, case: check_reduce(_C, kernels, case, 3, 1 / 3),
    "reduce-encode": lambda kernels, case: check_reduce_encode(_C, kernels, case, 2, 1.0),
    "reduce-encode-residual": lambda kernels, case: check_reduce_encode(
        _C, kernels, case, 3, 1 / 3, with_residual=True
    ),
    "reduce-encode-into": lambda kernels, case: check_reduce_encode_into(_C, kernels, case, 3, 1 / 3),
}

EACH_CODEC = pytest.mark.parametrize("codec", EMULATED_CODECS)
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS)


@EACH_KERNEL
@EACH_CODEC
def test_contents(kernels: CudaKernels, codec: str, kernel: str) -> None:
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
def test_sizes(kernels: CudaKernels, codec: str, kernel: str) -> None:
    group = EMULATED_CODECS[codec].group
    whole_blocks = [64, group + 32, 3 * group + 64]  # whose last group ends with a whole block
    for size in cases.sizes(EMULATED_CODECS[codec]) + whole_blocks:
        for element in (FP32, BF16):
            KERNELS[kernel](kernels, Case(EMULATED_CODECS[codec], element, "outliers", cases.flat(size), seed=size))


@EACH_KERNEL
@EACH_CODEC
def test_many_segments_in_any_number_of_packets(kernels: CudaKernels, codec: str, kernel: str) -> None:
    for seed, packets in enumerate((1, 3, 40)):
        table = cases.random_table(seed, 30, 400, packets=packets, assigned=seed == 1)
        KERNELS[kernel](kernels, Case(EMULATED_CODECS[codec], FP32, "normal", table, seed=seed, stochastic=True))


@EACH_KERNEL
@pytest.mark.parametrize("codec", ["int4", "int8-hadamard", "sign", "cast-e4m3"])
def test_any_grid(emulated: Any, codec: str, kernel: str) -> None:
    """Fewer warps than packets, about as many as groups, many more than groups."""
    for processors in (1, 3, 7):
        emulated.configure(processors, processors)
        table = cases.random_table(processors, 12, 900, packets=11)
        KERNELS[kernel](CudaKernels(emulated), Case(CODECS[codec], FP32, "outliers", table, stochastic=True))


@pytest.mark.parametrize("codec, element", [("int4-hadamard", "fp32"), ("sign", "bf16")])
def test_a_million_elements(kernels: CudaKernels, codec: str, element: str) -> None:
    case = Case(CODECS[codec], ELEMENTS[element], "normal", cases.flat(cases.LARGE_SIZE, packets=3), stochastic=True)
    check_encode(_C, kernels, case, with_residual=True)
    check_decode(_C, kernels, case)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_group(kernels: CudaKernels, bits: int) -> None:
    """One group of 2 097 120 elements and a short one after it; compared with the CPU kernels."""
    codec = reference.int_quant(bits, group=32 * 65535)
    case = Case(codec, FP32, "normal", Table(((0, codec.group + 100),), codec.group + 100), stochastic=True)
    layout = layout_of(_C, case)
    packets = [PacketMemory(layout.nbytes, 0, 0) for _ in range(2)]
    for run, memory in zip((kernels, CpuKernels(_C)), packets, strict=True):
        run.encode(
            case.buffer, FP32, layout, codec, memory.bytes, memory.stride, stochastic=True, seed=case.random_seed
        )
    assert_same(packets[0].bytes, packets[1].bytes, "packet")


@EACH_CODEC
def test_a_refused_packet_leaves_its_elements(kernels: CudaKernels, emulated: Any, codec: str) -> None:
    """Each byte of a header in turn; the other packets are decoded, the error word names the lowest."""
    case = Case(EMULATED_CODECS[codec], FP32, "normal", cases.flat(9000, packets=3))
    layout, data = layout_of(_C, case), case.encoded()
    for byte in range(reference.HEADER_NBYTES):
        memory = PacketMemory(layout.nbytes, 0, 0)
        memory.fill(data)
        refused = {byte % 3, 2}
        for p in refused:
            memory.bytes[p * memory.stride + byte] ^= 1 << byte % 8
        output = np.full(case.table.numel, 0x7FC00123, np.uint32)
        expected = output.copy()
        whole = output.copy()
        reference.decode(data, case.table.cut(case.codec), case.codec, FP32, whole)
        segments = layout.segments[:-1]
        for offset, length, packet in zip(segments[:, 1], segments[:, 2], segments[:, 3], strict=True):
            if packet not in refused:
                expected[offset : offset + length] = whole[offset : offset + length]
        with pytest.raises(ValueError, match=f"packet {min(refused)} was refused"):
            kernels.decode(memory.bytes, memory.stride, layout, case.codec, output, FP32)
        assert_same(output, expected, f"byte {byte}")


def test_a_refused_packet_without_an_error_word(kernels: CudaKernels, emulated: Any) -> None:
    case = Case(CODECS["int4"], FP32, "normal", cases.flat(100))
    layout = layout_of(_C, case)
    packet, output = np.zeros(layout.nbytes[0], np.uint8), np.full(100, 0x7FC00123, np.uint32)
    codec = case.codec
    emulated.cuda_decode(
        packet.ctypes.data, 0, *layout.arguments, codec.kind, codec.group, False, output.ctypes.data, 0, 0, 0, 0, 0
    )
    assert (output == 0x7FC00123).all()


@EACH_CODEC
def test_a_refused_rank_stops_a_reduction(kernels: CudaKernels, codec: str) -> None:
    """Nothing is written; the packet that should hold the sum is one that every receiver refuses."""
    case = Case(EMULATED_CODECS[codec], FP32, "normal", cases.flat(5000))
    layout = layout_of(_C, case)
    memory = PacketMemory(layout.nbytes * 40, 0, 0)
    memory.fill(case.encoded() * 40)
    memory.bytes[37 * memory.stride + 3] ^= 0x10
    memory.bytes[39 * memory.stride + 9] ^= 0x10
    output = np.full(case.table.numel, 0x7FC00123, np.uint32)
    residual = np.full(32 * case.table.blocks, 0.25, np.float32)
    out = PacketMemory(layout.nbytes, 0, 0)
    out.bytes[:] = np.frombuffer(case.encoded()[0], np.uint8)
    with pytest.raises(ValueError, match="packet 37 was refused"):
        kernels.reduce(memory.bytes, memory.stride, 40, 1.0, layout, case.codec, output, FP32)
    assert (output == 0x7FC00123).all()
    with pytest.raises(ValueError, match="packet 37 was refused"):
        kernels.reduce_encode(
            memory.bytes, memory.stride, 40, 1.0, layout, case.codec, out.bytes, FP32, residual=residual
        )
    assert (residual == 0.25).all()
    assert (out.bytes[: reference.HEADER_NBYTES] == 0).all()


@pytest.mark.parametrize("into", ["int4", "sign", "cast-bf16"])
def test_a_refused_rank_stops_a_reduction_into_another_format(kernels: CudaKernels, into: str) -> None:
    case = Case(CODECS["int8"], FP32, "normal", cases.flat(5000))
    layout, into_layout = (layout_of(_C, replace(case, codec=codec)) for codec in (case.codec, CODECS[into]))
    memory = PacketMemory(layout.nbytes * 3, 0, 0)
    memory.fill(case.encoded() * 3)
    memory.bytes[memory.stride + 3] ^= 0x10
    residual = np.full(32 * case.table.blocks, 0.25, np.float32)
    out = PacketMemory(into_layout.nbytes, 0, 0)
    with pytest.raises(ValueError, match="packet 1 was refused"):
        kernels.reduce_encode(
            memory.bytes, memory.stride, 3, 1.0, layout, case.codec, out.bytes, FP32,
            into=(into_layout, CODECS[into]), residual=residual,
        )  # fmt: skip
    assert (residual == 0.25).all()
    assert (out.bytes[: reference.HEADER_NBYTES] == 0).all()


@EACH_CODEC
def test_a_refused_packet_adds_nothing(kernels: CudaKernels, codec: str) -> None:
    case = Case(EMULATED_CODECS[codec], FP32, "normal", cases.flat(9000, packets=3))
    layout = layout_of(_C, case)
    memory = PacketMemory(layout.nbytes, 0, 0)
    memory.fill(case.encoded())
    memory.bytes[memory.stride + 9] ^= 0x10
    output = np.ones(case.table.numel, np.float32).view(np.uint32)
    expected = output.copy()
    packets = case.table.cut(case.codec)
    for p in (0, 2):
        reference.decode_add(case.encoded()[p : p + 1], packets[p : p + 1], case.codec, FP32, expected)
    with pytest.raises(ValueError, match="packet 1 was refused"):
        kernels.decode_add(memory.bytes, memory.stride, layout, case.codec, output, FP32)
    assert_same(output, expected, "output")


@EACH_CODEC
def test_any_packet_is_decoded_within_bounds(kernels: CudaKernels, codec: str) -> None:
    """Random bytes under a right header: the CPU's answer, and no byte beside the output."""
    rng = np.random.default_rng(5)
    case = Case(EMULATED_CODECS[codec], BF16, "normal", cases.random_table(4, 9, 700, packets=2))
    layout = layout_of(_C, case)
    memory = PacketMemory(layout.nbytes, 0, 0)
    data = [header[:16] + rng.bytes(len(header) - 16) for header in case.encoded()]
    memory.fill(data)
    background = cases.contents("any-bits", 6, case.table.numel, BF16)
    (guard, output), (_, expected) = cases.guarded_copy(background), cases.guarded_copy(background)
    kernels.decode(memory.bytes, memory.stride, layout, case.codec, output, BF16)
    CpuKernels(_C).decode(memory.bytes, memory.stride, layout, case.codec, expected, BF16)
    guard.assert_intact()
    assert_same(output, expected, "output")


def test_step_zero_without_a_pointer(kernels: CudaKernels, emulated: Any) -> None:
    case = Case(CODECS["int4"], FP32, "normal", cases.flat(1000))
    layout = layout_of(_C, case)
    packets = [np.zeros(layout.nbytes[0], np.uint8) for _ in range(2)]
    kernels.encode(case.buffer, FP32, layout, case.codec, packets[0], 0, stochastic=True, seed=7, step=0)
    x = case.buffer
    emulated.cuda_encode(
        x.ctypes.data, 0, 0, *layout.arguments, case.codec.kind, case.codec.group, False, True, 7, 0,
        packets[1].ctypes.data, 0, 0, 0, 0,
    )  # fmt: skip
    assert_same(packets[0], packets[1], "packet")


def test_an_empty_table(kernels: CudaKernels) -> None:
    layout = build_layout(_C, [], CODECS["int4"], FP32, packets=2)
    packets = np.full(2 * 16, 0xA5, np.uint8)
    nothing = np.zeros(0, np.uint32)
    kernels.encode(nothing, FP32, layout, CODECS["int4"], packets, 16)
    expected = np.zeros(2 * 16, np.uint8)
    CpuKernels(_C).encode(nothing, FP32, layout, CODECS["int4"], expected, 16)
    assert_same(packets, expected, "packets")
    packets[16] ^= 1
    with pytest.raises(ValueError, match="packet 1 was refused"):
        kernels.decode(packets, 16, layout, CODECS["int4"], nothing, FP32)


def test_divergence_is_found(emulated: Any) -> None:
    emulated.run_diverging_kernel(32)
    with pytest.raises(RuntimeError, match=r"the lanes of a warp part ways: lane 0 is at a xor shuffle .* the end"):
        emulated.run_diverging_kernel(16)


def test_shared_memory_is_poisoned(emulated: Any) -> None:
    """Before each block; and there is only so much of it."""
    assert emulated.peek_shared_memory(5, 128) == [0xA5A5A5A5] * 5 * 32
    with pytest.raises(RuntimeError, match="more shared memory than there is: 50000"):
        emulated.peek_shared_memory(5, 50_000)


@pytest.mark.parametrize("ranks", [0, -1])
def test_a_reduction_of_no_ranks_is_refused(emulated: Any, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks is {ranks}, expected at least 1"):
        emulated.cuda_reduce(0, 0, ranks, 1.0, 0, 0, 0, 1, 20, 128, False, 0, 0, 0, 0, 0, 0)
