"""TopK's CUDA kernels, run on the CPU lane by lane (tests/cpp): the reference's bytes, and refusals of bad packets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import cycle, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from formats import reference
from formats.reference import BF16, FP16, FP32, Codec
from kernels import cases
from kernels.cases import ELEMENTS, RATIOS, SPARSE_CODECS, SPARSE_CONTENTS, SPARSE_SIZES, Guarded, Table
from kernels.equality import Case, PacketMemory, assert_same, check_encode, check_reduce_encode, layout_of
from kernels.native import (
    PACKET_FIELDS,
    SEGMENT_FIELDS,
    CpuKernels,
    CudaKernels,
    Kernels,
    Layout,
    address,
    build_layout,
    packing,
)
from kernels.test_emulated_cuda import emulated, kernels
from kernels.test_topk import CHECKS, EACH_CHECK, REFUSED_CASE, WORDS, packet_of, sections_of
from smallreduce import _C

__all__ = ["emulated", "kernels"]

TYPES = list(ELEMENTS.values())


def short_case(turn: int, contents: str, element: str, codec: Codec) -> Case:
    return Case(
        codec,
        ELEMENTS[element],
        contents,
        cases.random_table(turn, 7, (700, 7000)[turn % 2], packets=2),
        seed=turn,
        skip=turn % 3,
        packet_skip=turn % 5,
        stride_slack=turn % 4,
    )


SHORT_CASES = [
    short_case(turn, contents, element, codec)
    for turn, ((contents, element), codec) in enumerate(
        zip(product(SPARSE_CONTENTS, ELEMENTS), cycle(SPARSE_CODECS.values()), strict=False)
    )
]


@EACH_CHECK
def test_contents(kernels: CudaKernels, check: str) -> None:
    """Every content in every element type (of reductions, which take longest, in half of them), in segments with gaps;
    ratios, types of values and starts take turns."""
    for case in SHORT_CASES[:: 2 if check.startswith("reduce") else 1]:
        CHECKS[check](kernels, case)


@EACH_CHECK
def test_sizes_and_ratios(kernels: CudaKernels, check: str) -> None:
    contents, types = cycle(SPARSE_CONTENTS), cycle(product(TYPES, TYPES))
    for size in SPARSE_SIZES[:-1]:
        for ratio in RATIOS if size <= 1000 else RATIOS[size % 2 :: 4]:
            element, values = next(types)
            case = Case(reference.topk(ratio, values), element, next(contents), cases.flat(size), skip=size % 2)
            CHECKS[check](kernels, case)


@EACH_CHECK
def test_many_segments_in_any_number_of_packets(kernels: CudaKernels, check: str) -> None:
    codecs = cycle(SPARSE_CODECS.values())
    for seed, (packets, assigned) in enumerate(product((1, 3, 40), (False, True))):
        table = cases.random_table(seed, 30, 400, packets=packets, assigned=assigned)
        CHECKS[check](kernels, Case(next(codecs), FP16, "normal", table, seed=seed))


@EACH_CHECK
@pytest.mark.parametrize("processors", [1, 3, 7])
def test_any_grid(emulated: Any, processors: int, check: str) -> None:
    """Fewer warps than packets, about as many as tiles, many more than tiles."""
    emulated.configure(processors, processors)
    table = cases.random_table(processors, 12, 3000, packets=25)
    codec = reference.topk(Fraction(1, 20), BF16)
    CHECKS[check](CudaKernels(emulated), Case(codec, FP32, "outliers", table))


# Segments long enough for a sample and candidates, which sixteen times the processors share.


def is_sampled(length: int, kept: int) -> bool:
    """As in csrc/cuda/topk.cuh."""
    return length >= 4 * (2 * kept + 8192)


LONG = Table(((3, 70_001), (70_010, 90), (70_200, 50_000)), 121_000)


@pytest.mark.parametrize("contents", SPARSE_CONTENTS)
def test_long_contents(kernels: CudaKernels, contents: str) -> None:
    number = list(SPARSE_CONTENTS).index(contents)
    codec = reference.topk((Fraction(1, 1000), Fraction(1, 100))[number % 2], TYPES[number % 3])
    assert all(is_sampled(length, codec.kept(length)) for _, length in (LONG.segments[0], LONG.segments[2]))
    for element in (FP32, BF16):
        case = Case(codec, element, contents, LONG, seed=number, skip=number % 2)
        check_encode(_C, kernels, case)
        check_encode(_C, kernels, case, with_residual=True)
    check_reduce_encode(_C, kernels, case, 3, 1 / 3, with_residual=number % 4 == 0)


def test_sampled_segments_within_a_range(emulated: Any) -> None:
    """Sixteen warps, so that whole segments fall to one of them, among parts of others."""
    emulated.configure(1, 5)
    lengths = [36_000, 34_000, 100, 40_000] * 12
    offsets = np.cumsum([0, *lengths])
    table = Table(tuple(zip(offsets[:-1].tolist(), lengths, strict=True)), int(offsets[-1]))
    assert offsets[-1] > 16 * 2 * max(lengths)
    codec = reference.topk(Fraction(1, 500))
    assert is_sampled(34_000, codec.kept(34_000))
    for contents in ("normal", "few"):
        check_encode(_C, CudaKernels(emulated), Case(codec, BF16, contents, table), with_residual=True)


@dataclass(frozen=True)
class CrampedKernels(CudaKernels):
    """With scratch memory for no more than `room` candidates, of a layout of one segment."""

    room: int = 0

    def _scratch_nbytes(self, layout: Layout, ranks: int) -> int:
        length, kept = (int(layout.segments[0, SEGMENT_FIELDS.index(field)]) for field in ("length", "kept"))
        assert len(layout.segments) == 2
        assert is_sampled(length, kept)
        candidates = 2 * (2 * kept + 8192) + 128 * -(-length // 1024)  # as in csrc/cuda/kernels.cu
        return super()._scratch_nbytes(layout, ranks) - 8 * (candidates - self.room)


@pytest.mark.parametrize("room", [0, 128, 2000, 8000])
def test_more_candidates_than_there_is_room_for(emulated: Any, room: int) -> None:
    emulated.configure(2, room)
    for contents in ("normal", "levels", "infinite"):
        case = Case(reference.topk(Fraction(1, 100)), FP32, contents, cases.flat(70_001))
        check_encode(_C, CrampedKernels(emulated, room=room), case)
        check_encode(_C, CrampedKernels(emulated, room=room), case, with_residual=True)
        check_reduce_encode(_C, CrampedKernels(emulated, room=room), case, 2, 1.0, with_residual=True)


def sampled_elements(length: int, kept: int) -> npt.NDArray[np.int64]:
    """The elements that are sampled, as in csrc/cuda/topk_work.cuh."""
    samples = -(-256 * length // (2 * kept + 8192))
    quads, parts = length // 4, -(-samples // 4)
    part = np.arange(parts)
    begin, end = quads * part // parts, quads * (part + 1) // parts
    random = (part * 0x9E3779B9 & 0xFFFFFFFF).astype(np.uint64)
    quad = begin + (random * (end - begin).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    elements: npt.NDArray[np.int64] = (4 * quad[:, None] + np.arange(4)).reshape(-1)
    return elements


@pytest.mark.parametrize("others", [0.0, 0.001])
def test_a_sample_that_meets_only_what_is_large(kernels: CudaKernels, others: float) -> None:
    """Fewer elements than are wanted reach its threshold, whether the others are zeros or not."""
    length, codec = 70_001, reference.topk(Fraction(1, 100))
    sampled = sampled_elements(length, codec.kept(length))
    assert 256 < 400 < codec.kept(length) < len(sampled)
    x = (np.random.default_rng(1).standard_normal(length) * others).astype(np.float32)
    x[sampled[:400]] = np.arange(400) + 1
    layout, cut = build_layout(_C, [(0, length)], codec, FP32), cases.flat(length).cut(codec)
    for residual in (None, np.zeros(32 * -(-length // 32), np.float32)):
        (expected,), after = reference.encode(x.view(np.uint32), cut, codec, FP32, residual=residual)
        out = PacketMemory(layout.nbytes, 0, 0)
        kernels.encode(x.view(np.uint32), FP32, layout, codec, out.bytes, out.stride, residual=residual)
        out.assert_holds([expected], "packet")
        if residual is not None and after is not None:
            assert_same(residual, after, "residual")


@pytest.mark.parametrize("values", ELEMENTS)
def test_gaps_longer_than_a_word(kernels: CudaKernels, values: str) -> None:
    """Nine values, with up to three words FFFF before each."""
    size = 9 * 131_072
    case = Case(reference.topk(Fraction(1, 131_072), ELEMENTS[values]), FP32, "far-apart", cases.flat(size))
    for check in ("encode", "decode", "reduce-2"):
        CHECKS[check](kernels, case)


# What a packet from the network may hold.

OPERATIONS = ("decode", "clear", "reduce", "reduce_encode")


def assert_refused(kernels: Kernels, data: bytes, operation: str) -> None:
    """As the only packet, or as number 34 of 40 ranks', it is named, and nothing is written but a header of zeros."""
    case = REFUSED_CASE
    layout, (right,) = layout_of(_C, case), case.encoded()
    ranks, refused = (1, 0) if operation in ("decode", "clear") else (40, 34)
    memory = PacketMemory([len(right)] * ranks, 0, 0)
    memory.fill([data if rank in (refused, 39) else right for rank in range(ranks)])
    output = cases.contents("any-bits", 1, case.table.numel, case.element)
    residual = cases.residual("normal", 1, case.table.blocks)
    out = PacketMemory([len(right)], 0, 0)
    output_before, residual_before = output.copy(), residual.copy()
    packets, stride, codec, element = memory.bytes, memory.stride, case.codec, case.element
    calls: dict[str, Callable[[], None]] = {
        "decode": lambda: kernels.decode(packets, stride, layout, codec, output, element),
        "clear": lambda: kernels.clear(packets, stride, layout, codec, element, output, element),
        "reduce": lambda: kernels.reduce(packets, stride, ranks, 1.0, layout, codec, output, element),
        "reduce_encode": lambda: kernels.reduce_encode(
            packets, stride, ranks, 1.0, layout, codec, out.bytes, element, residual=residual
        ),
    }
    with pytest.raises(ValueError, match=f"packet {refused} was refused"):
        calls[operation]()
    assert_same(output, output_before, "output")
    assert_same(residual, residual_before, "residual")
    header = 0 if operation == "reduce_encode" else Guarded.GUARD
    assert (out.bytes[: reference.HEADER_NBYTES] == header).all()
    out.guarded.assert_intact()


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_words_that_do_not_fit_are_refused(kernels: CudaKernels, operation: str, words: str) -> None:
    values, _ = sections_of(REFUSED_CASE)
    assert_refused(kernels, packet_of(REFUSED_CASE, values, np.array(WORDS[words], np.uint16)), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_corrupted_header_is_refused(kernels: CudaKernels, operation: str) -> None:
    for byte in range(reference.HEADER_NBYTES):
        data = bytearray(REFUSED_CASE.encoded()[0])
        data[byte] ^= 1 << byte % 8
        assert_refused(kernels, bytes(data), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_sections_are_refused_or_do_as_on_the_cpu(kernels: CudaKernels, operation: str) -> None:
    """Random bytes under right headers: hardly ever a packet. With few changes: often one. Guards watch all memory."""
    rng = np.random.default_rng(OPERATIONS.index(operation))
    case = Case(reference.topk(Fraction(1, 300), BF16), FP16, "normal", Table(((1, 140_000), (140_005, 99)), 140_110))
    layout, (right,) = layout_of(_C, case), case.encoded()
    (packet,) = case.table.cut(case.codec)
    first, _ = packet.section_nbytes(case.codec)
    refused = 0
    for turn in range(12):
        ranks = [bytearray(right) for _ in range(1 if operation in ("decode", "clear") else 3)]
        for data in ranks if turn % 6 else ranks[:1]:
            begin = reference.HEADER_NBYTES + first
            if turn % 3 == 0:
                data[begin:] = rng.bytes(len(data) - begin)
                continue
            for at in begin + 2 * rng.integers(0, (len(data) - begin) // 2, turn % 3):
                data[at : at + 2] = int(rng.choice((0, 1, 7, 0xFFFF))).to_bytes(2, "little")
        outcomes = []
        for each in (CpuKernels(_C), kernels):
            outcomes.append(run_guarded(each, layout, case, [bytes(data) for data in ranks], operation))
        (cpu_refuses, *expected), (cuda_refuses, *results) = outcomes
        assert cuda_refuses == cpu_refuses
        refused += cpu_refuses
        for name, result, other in zip(("output", "residual", "packet"), results, expected, strict=True):
            if not (cpu_refuses and name == "packet"):
                assert_same(result, other, name)
    assert 4 <= refused < 12


def run_guarded(
    kernels: Kernels, layout: Layout, case: Case, ranks: list[bytes], operation: str
) -> tuple[bool, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Whether it was refused; output, residual and packet afterwards."""
    memory = PacketMemory([len(data) for data in ranks], 2, 0)
    memory.fill(ranks)
    guard, output = cases.guarded_copy(cases.contents("any-bits", 1, case.table.numel, case.element))
    before = np.where(case.table.cut(case.codec)[0].present, 0.001, 0).astype(np.float32).reshape(-1)
    residual_guard, residual = cases.guarded_copy(before)
    out = PacketMemory(layout.nbytes, 0, 0)
    packets, stride, codec, element = memory.bytes, memory.stride, case.codec, case.element
    calls: dict[str, Callable[[], None]] = {
        "decode": lambda: kernels.decode(packets, stride, layout, codec, output, element),
        "clear": lambda: kernels.clear(packets, stride, layout, codec, element, output, element),
        "reduce": lambda: kernels.reduce(packets, stride, len(ranks), 0.5, layout, codec, output, element),
        "reduce_encode": lambda: kernels.reduce_encode(
            packets, stride, len(ranks), 0.5, layout, codec, out.bytes, element, residual=residual.view(np.float32)
        ),
    }
    refused = False
    try:
        calls[operation]()
    except ValueError:
        refused = True
    for each in (guard, residual_guard, out.guarded):
        each.assert_intact()
    return refused, output, residual, out.bytes


@pytest.mark.parametrize("corrupt", [0, 1, 2])
def test_a_refused_packet_is_skipped(kernels: CudaKernels, corrupt: int) -> None:
    case = Case(reference.topk(Fraction(1, 10)), FP32, "normal", cases.flat(9000, packets=3))
    layout, data = layout_of(_C, case), case.encoded()
    memory = PacketMemory(layout.nbytes, 0, 0)
    memory.fill(data)
    begin = reference.HEADER_NBYTES + -(-4 * int(layout.packets[corrupt, PACKET_FIELDS.index("values")]) // 16) * 16
    memory.bytes[corrupt * memory.stride + begin :][:2] = 0xFF  # a value too few
    whole = np.full(9000, 0x7FC00123, np.uint32)
    output, expected = whole.copy(), whole.copy()
    reference.decode(data, case.table.cut(case.codec), case.codec, FP32, expected)
    _, offset, length, packet, *_ = layout.segments[:-1].T
    (own,) = np.flatnonzero(packet == corrupt)
    expected[offset[own] : offset[own] + length[own]] = 0x7FC00123
    with pytest.raises(ValueError, match=f"packet {corrupt} was refused"):
        kernels.decode(memory.bytes, memory.stride, layout, case.codec, output, FP32)
    assert_same(output, expected, "output")


def test_an_empty_table(kernels: CudaKernels) -> None:
    codec, nothing = reference.topk(Fraction(1, 10)), np.zeros(0, np.uint32)
    layout = build_layout(_C, [], codec, FP32, packets=2)
    packets, expected = np.full(2 * 16, 0xA5, np.uint8), np.zeros(2 * 16, np.uint8)
    kernels.encode(nothing, FP32, layout, codec, packets, 16)
    CpuKernels(_C).encode(nothing, FP32, layout, codec, expected, 16)
    assert_same(packets, expected, "packets")
    kernels.decode(packets, 16, layout, codec, nothing, FP32)
    packets[16] ^= 1
    with pytest.raises(ValueError, match="packet 1 was refused"):
        kernels.decode(packets, 16, layout, codec, nothing, FP32)


# Arguments.


def test_arguments_that_no_kernel_takes(emulated: Any) -> None:
    case = Case(reference.topk(Fraction(1, 10)), FP32, "normal", cases.flat(100))
    layout, codec, x = layout_of(_C, case), case.codec, case.buffer
    out = np.zeros(layout.nbytes[0], np.uint8)

    def encode(group: int, scratch: int) -> None:
        emulated.cuda_encode(
            address(x), 0, 0, *layout.arguments, codec.kind, group, False, False, 0, 0, address(out), 0, scratch, 0, 0
        )

    with pytest.raises(ValueError, match="top-k needs scratch memory, given none"):
        encode(32, 0)
    with pytest.raises(ValueError, match="top-k has groups of 32 elements, given 64"):
        encode(64, address(out))
    dense = reference.int_quant(4)
    with pytest.raises(ValueError, match="only packets of top-k name elements to clear"):
        emulated.cuda_clear(
            address(out), 0, *layout.arguments, *packing(dense), 0, address(x), 0, address(out), 0, 0, 0
        )
    with pytest.raises(ValueError, match="ranks is 0, expected at least 1"):
        emulated.cuda_scratch_nbytes(*layout.arguments, 0)
