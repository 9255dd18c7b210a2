"""TopK on every CPU instruction set gives the reference's bytes, and what is no packet is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import cycle, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from formats import reference
from formats.reference import BF16, FP16, FP32
from formats.sparse import SKIP, words_of
from kernels import cases
from kernels.cases import ELEMENTS, RATIOS, SPARSE_CODECS, SPARSE_CONTENTS, SPARSE_SIZES, Guarded, Table
from kernels.equality import (
    Case,
    PacketMemory,
    assert_same,
    check_clear,
    check_decode,
    check_encode,
    check_reduce,
    check_reduce_encode,
    layout_of,
)
from kernels.native import (
    PACKET_FIELDS,
    SEGMENT_FIELDS,
    CpuKernels,
    Kernels,
    build_layout,
    packing,
    scratch_memory,
)
from kernels.test_cpu_kernels import Flushing
from smallreduce import _C

TYPES = list(ELEMENTS.values())
ONE_THREAD = CpuKernels(_C)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set forced for one test."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(before)


CHECKS: dict[str, Callable[[Kernels, Case], None]] = {
    "encode": lambda kernels, case: check_encode(_C, kernels, case),
    "encode-residual": lambda kernels, case: check_encode(_C, kernels, case, with_residual=True),
    "decode": lambda kernels, case: check_decode(_C, kernels, case),
    "clear": lambda kernels, case: check_clear(_C, kernels, case),
    "reduce-1": lambda kernels, case: check_reduce(_C, kernels, case, 1, 0.1),
    "reduce-2": lambda kernels, case: check_reduce(_C, kernels, case, 2, 1.0),
    "reduce-5": lambda kernels, case: check_reduce(_C, kernels, case, 5, 1 / 5),
    "reduce-encode": lambda kernels, case: check_reduce_encode(_C, kernels, case, 2, 1.0),
    "reduce-encode-residual": lambda kernels, case: check_reduce_encode(
        _C, kernels, case, 3, 1 / 3, with_residual=True
    ),
}
EACH_CHECK = pytest.mark.parametrize("check", CHECKS)
EACH_ISA = pytest.mark.parametrize("isa", _C.cpu_isas(), indirect=True)


@EACH_CHECK
@EACH_ISA
def test_contents(isa: str, check: str) -> None:
    """Every content in every element type, in segments with gaps. Ratios, types of values, threads and misaligned
    starts take turns; the rounding, which TopK has none of, too."""
    codecs = cycle(SPARSE_CODECS.values())
    for turn, (contents, element) in enumerate(product(SPARSE_CONTENTS, ELEMENTS)):
        case = Case(
            next(codecs),
            ELEMENTS[element],
            contents,
            cases.random_table(turn, 7, (700, 7000)[turn % 2], packets=2),
            seed=turn,
            stochastic=turn % 2 == 1,
            skip=turn % 3,
            packet_skip=turn % 5,
            stride_slack=turn % 4,
        )
        CHECKS[check](CpuKernels(_C, threads=1 + turn % 3), case)


@pytest.mark.parametrize("check", ["encode", "encode-residual", "decode", "reduce-2", "reduce-encode-residual"])
@EACH_ISA
def test_sizes_and_ratios(isa: str, check: str) -> None:
    """Every ratio of the small sizes, half of them of each of the larger ones."""
    contents, types, threads = cycle(SPARSE_CONTENTS), cycle(product(TYPES, TYPES)), cycle((1, 3))
    for size in SPARSE_SIZES:
        for ratio in RATIOS if size <= 1000 else RATIOS[size % 2 :: 2]:
            element, values = next(types)
            case = Case(reference.topk(ratio, values), element, next(contents), cases.flat(size), skip=size % 2)
            CHECKS[check](CpuKernels(_C, next(threads)), case)


@pytest.mark.parametrize("check", ["encode", "encode-residual"])
@pytest.mark.parametrize("contents", SPARSE_CONTENTS)
@EACH_ISA
def test_long_contents(isa: str, contents: str, check: str) -> None:
    """Long enough to be sampled, and for three threads to share."""
    number = list(SPARSE_CONTENTS).index(contents)
    codec = reference.topk((Fraction(1, 1000), Fraction(1, 100))[number % 2], TYPES[number % 3])
    for threads in (1, 3):
        CHECKS[check](CpuKernels(_C, threads), Case(codec, FP32, contents, cases.flat(300_001)))


@pytest.mark.parametrize("check", ["encode-residual", "decode", "reduce-2", "reduce-encode"])
@EACH_ISA
def test_three_million_elements(isa: str, check: str) -> None:
    case = Case(reference.topk(Fraction(1, 100)), FP32, "normal", Table(((1, 3_000_001),), 3_000_007))
    CHECKS[check](CpuKernels(_C, threads=3), case)


@EACH_ISA
def test_gaps_longer_than_a_word(isa: str) -> None:
    """Nine values, with up to three words FFFF before each."""
    size = 9 * 131_072
    case = Case(reference.topk(Fraction(1, 131_072)), FP32, "far-apart", cases.flat(size))
    assert np.count_nonzero(np.abs(case.buffer.view(np.float32)) > 0.5) == case.codec.kept(size) == 9
    for check in ("encode-residual", "decode", "reduce-2", "reduce-encode"):
        CHECKS[check](ONE_THREAD, case)


@EACH_ISA
def test_samples_that_mislead(isa: str) -> None:
    """A hundred tensors whose large elements stand in clumps: whether a sample met far too many of them or hardly any,
    the selection is exact."""
    for seed in range(100):
        case = Case(reference.topk(Fraction(1, 100)), FP32, "clumps", cases.flat(20_000), seed=seed)
        check_encode(_C, ONE_THREAD, case, with_residual=seed % 2 == 1)


@EACH_CHECK
@EACH_ISA
def test_many_segments_in_any_number_of_packets(isa: str, check: str) -> None:
    codecs = cycle(SPARSE_CODECS.values())
    for seed, (packets, assigned) in enumerate(product((1, 3, 40), (False, True))):
        table = cases.random_table(seed, 30, 400, packets=packets, assigned=assigned)
        CHECKS[check](ONE_THREAD, Case(next(codecs), FP16, "normal", table, seed=seed))


@pytest.mark.parametrize("check", ["encode-residual", "decode", "reduce-2", "reduce-encode-residual"])
@EACH_ISA
def test_many_segments_that_threads_share(isa: str, check: str) -> None:
    """Enough elements for three threads, in segments none of which is cut between them."""
    table = cases.random_table(1, 60, 5000, packets=1 if check.startswith("reduce") else 3)
    assert sum(length for _, length in table.segments) > 3 << 15
    case = Case(reference.topk(Fraction(1, 100), BF16), FP16, "normal", table)
    for threads in (2, 3):
        CHECKS[check](CpuKernels(_C, threads), case)


@EACH_CHECK
@EACH_ISA
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_flushing_denormals_changes_nothing(isa: str, check: str) -> None:
    for contents, element, values in product(("denormals", "tiny"), TYPES, TYPES):
        kernels: Any = Flushing(ONE_THREAD)
        codec = reference.topk(Fraction(1, 3), values)
        CHECKS[check](kernels, Case(codec, element, contents, cases.flat(5000)))


# Several steps.


@pytest.mark.parametrize("values", ELEMENTS)
@EACH_ISA
def test_feedback_over_several_steps(isa: str, values: str) -> None:
    """The residual of each step is what the next one begins with."""
    codec = reference.topk(Fraction(1, 50), ELEMENTS[values])
    table = cases.random_table(3, 6, 9000, packets=2)
    packets = table.cut(codec)
    layout = build_layout(_C, table.segments, codec, BF16, packets=2)
    residual = np.zeros(32 * table.blocks, np.float32)
    expected: npt.NDArray[np.float32] | None = residual.copy()
    for step in range(6):
        x = cases.contents(("normal", "outliers", "infinite")[step % 3], step, table.numel, BF16)
        data, expected = reference.encode(x, packets, codec, BF16, residual=expected)
        assert expected is not None
        out = PacketMemory(layout.nbytes, 0, 0)
        ONE_THREAD.encode(x, BF16, layout, codec, out.bytes, out.stride, residual=residual)
        out.assert_holds(data, f"packet of step {step}")
        assert_same(residual, expected, f"residual of step {step}")
    assert np.count_nonzero(residual) > len(residual) // 2


@pytest.mark.parametrize("values", ELEMENTS)
@EACH_ISA
def test_nothing_is_lost(isa: str, values: str) -> None:
    """Four steps of three workers and a server: the outputs, the server's residual and those of the workers add up to
    the inputs, exactly. Every value is a multiple of 2^-4 and below 2^8, also what rounding to 8 or 11 bits leaves."""
    codec, size, workers = reference.topk(Fraction(1, 20), ELEMENTS[values]), 10_000, 3
    layout = build_layout(_C, [(0, size)], codec, FP32)
    residuals = [np.zeros(32 * -(-size // 32), np.float32) for _ in range(workers)]
    server = np.zeros_like(residuals[0])
    total_in, total_out = np.zeros(size), np.zeros(size)
    for step in range(4):
        sent = PacketMemory(layout.nbytes * workers, 0, 0)
        for worker in range(workers):
            x = cases.contents("dyadic", 10 * step + worker, size, FP32)
            own = sent.bytes[worker * sent.stride :]
            ONE_THREAD.encode(x, FP32, layout, codec, own, sent.stride, residual=residuals[worker])
            total_in += x.view(np.float32)
        back, output = PacketMemory(layout.nbytes, 0, 0), np.zeros(size, np.uint32)
        ONE_THREAD.reduce_encode(
            sent.bytes, sent.stride, workers, 1.0, layout, codec, back.bytes, FP32, residual=server
        )
        ONE_THREAD.decode(back.bytes, back.stride, layout, codec, output, FP32)
        assert np.count_nonzero(output) == codec.kept(size)
        total_out += output.view(np.float32)
    kept_back = sum(residual[:size].astype(np.float64) for residual in [*residuals, server])
    np.testing.assert_array_equal(total_out + kept_back, total_in)


# What a packet from the network may hold.

U16 = npt.NDArray[np.uint16]
REFUSED_CASE = Case(reference.topk(Fraction(1, 10)), FP32, "normal", Table(((3, 150), (160, 40)), 210))
OPERATIONS = ("decode", "clear", "reduce", "reduce_encode")


def packet_of(case: Case, values: npt.NDArray[Any], words: U16) -> bytes:
    """The packet of these sections, under the right header."""
    (packet,) = case.table.cut(case.codec)
    return reference.assemble(
        packet, case.codec, case.element, values.astype(case.codec.value_type.dtype).tobytes(), words.tobytes()
    )


def sections_of(case: Case) -> tuple[npt.NDArray[Any], U16]:
    """Copies of the values and the words that the reference encodes."""
    (packet,), (data,) = case.table.cut(case.codec), case.encoded()
    values, words = reference.sections(data, packet, case.codec, case.element)
    return np.frombuffer(values, case.codec.value_type.dtype).copy(), np.frombuffer(words, np.uint16).copy()


def arbitrary_packet(case: Case, seed: int) -> bytes:
    """Any indices in ascending order, and any bits as values."""
    rng = np.random.default_rng(seed)
    words = [
        words_of(np.sort(rng.choice(length, case.codec.kept(length), replace=False)), length)
        for _, length in case.table.segments
    ]
    kept = sum(case.codec.kept(length) for _, length in case.table.segments)
    return packet_of(case, cases.contents("any-bits", seed, kept, case.codec.value_type), np.concatenate(words))


@pytest.mark.parametrize("values", ELEMENTS)
@EACH_ISA
def test_any_indices_and_any_values_decode_as_in_the_reference(isa: str, values: str) -> None:
    for element, ratio, length in product(TYPES, (Fraction(1, 50), Fraction(9, 10)), (300, 70_000)):
        table = Table(((1, length), (length + 5, 99)), length + 110)
        case = Case(reference.topk(ratio, ELEMENTS[values]), element, "zeros", table)
        (packet,) = case.table.cut(case.codec)
        ranks = [arbitrary_packet(case, seed) for seed in range(3)]
        memory = PacketMemory([len(each) for each in ranks], 3, 0)
        memory.fill(ranks)
        layout = layout_of(_C, case)

        expected = np.zeros(case.table.numel, element.dtype)
        output = expected.copy()
        reference.decode(ranks[:1], [packet], case.codec, element, expected)
        ONE_THREAD.decode(memory.bytes, memory.stride, layout, case.codec, output, element)
        assert_same(output, expected, "decoded")
        reference.reduce(ranks, 1 / 3, packet, case.codec, element, expected)
        ONE_THREAD.reduce(memory.bytes, memory.stride, 3, 1 / 3, layout, case.codec, output, element)
        assert_same(output, expected, "sum")

        before = np.where(packet.present, 0.5, 0).astype(np.float32).reshape(-1)
        again, after = reference.reduce_encode(ranks, 1 / 3, packet, case.codec, element, residual=before)
        assert after is not None
        out = PacketMemory(layout.nbytes, 0, 0)
        ONE_THREAD.reduce_encode(
            memory.bytes, memory.stride, 3, 1 / 3, layout, case.codec, out.bytes, element, residual=before
        )
        out.assert_holds([again], "encoded sum")
        assert_same(before, after, "residual")


def assert_refused(case: Case, data: bytes, operation: str, stride: int | None = None) -> None:
    """As the only packet, or as the second of three ranks', it is a ValueError and nothing is written. The packets are
    as far apart as they must be, unless `stride` says how far the kernel believes they are."""
    (packet,), layout = case.table.cut(case.codec), layout_of(_C, case)
    ranks = 1 if operation in ("decode", "clear") else 3
    memory = PacketMemory([max(len(data), packet.nbytes(case.codec))] * ranks, 0, 0)
    (right,) = case.encoded()
    memory.fill([data] if ranks == 1 else [right, data, right])
    stride = memory.stride if stride is None else stride
    output = cases.contents("any-bits", 1, case.table.numel, case.element)
    residual = cases.residual("normal", 1, packet.block_count)
    out = PacketMemory([memory.stride], 0, 0)
    output_before, residual_before = output.copy(), residual.copy()
    packets, codec, element = memory.bytes, case.codec, case.element
    calls: dict[str, Callable[[], None]] = {
        "decode": lambda: ONE_THREAD.decode(packets, stride, layout, codec, output, element),
        "clear": lambda: ONE_THREAD.clear(packets, stride, layout, codec, element, output, element),
        "reduce": lambda: ONE_THREAD.reduce(packets, stride, ranks, 1.0, layout, codec, output, element),
        "reduce_encode": lambda: ONE_THREAD.reduce_encode(
            packets, stride, ranks, 1.0, layout, codec, out.bytes, element, residual=residual
        ),
    }
    with pytest.raises(ValueError):
        calls[operation]()
    assert_same(output, output_before, "output")
    assert_same(residual, residual_before, "residual")
    assert (out.bytes == Guarded.GUARD).all(), "packet"


# A case's first segment has 15 values, its second 4; each has one word FFFF, at the end.
WORDS = {
    "an index at the end": (*[0] * 15, SKIP, 0, 0, 0, 37, SKIP),
    "an index past the end": (*[0] * 15, SKIP, 0, 0, 0, 65534, SKIP),
    "an index past the end of the first segment": (65534, *[0] * 14, SKIP, *[0] * 4, SKIP),
    "a value after FFFF": (*[0] * 15, SKIP, 0, 0, 0, SKIP, 0),
    "FFFF before all values": (SKIP, *[0] * 15, *[0] * 4, SKIP),
    "a value too few": (*[0] * 14, SKIP, SKIP, *[0] * 4, SKIP),
    "a value too many": (*[0] * 16, *[0] * 4, SKIP),
    "a value in the other segment": (*[0] * 16, *[0] * 3, SKIP, SKIP),
    "no values": (*[SKIP] * 21,),
    "nothing but values": (*[0] * 21,),
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("operation", OPERATIONS)
@EACH_ISA
def test_words_that_do_not_fit_are_refused(isa: str, operation: str, words: str) -> None:
    values, _ = sections_of(REFUSED_CASE)
    assert_refused(REFUSED_CASE, packet_of(REFUSED_CASE, values, np.array(WORDS[words], np.uint16)), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_words_that_just_fit_are_not_refused(operation: str) -> None:
    """As a check of the test above: the last element of the segment is one."""
    values, _ = sections_of(REFUSED_CASE)
    words = np.array((*[0] * 15, SKIP, 0, 0, 0, 36, SKIP), np.uint16)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_refused(REFUSED_CASE, packet_of(REFUSED_CASE, values, words), operation)


def test_any_words_are_refused_or_decoded_as_in_the_reference() -> None:
    """Words with one or two of them changed at random."""
    rng = np.random.default_rng(8)
    values, words = sections_of(REFUSED_CASE)
    layout, packets = layout_of(_C, REFUSED_CASE), REFUSED_CASE.table.cut(REFUSED_CASE.codec)
    refused = 0
    for _ in range(500):
        changed = words.copy()
        for at in rng.integers(0, len(words), rng.integers(1, 3)):
            changed[at] = rng.choice((0, 1, 5, 30, SKIP, changed[at] ^ 1 << rng.integers(0, 16)))
        data = packet_of(REFUSED_CASE, values, changed)
        expected = np.full(REFUSED_CASE.table.numel, 0x7FC00123, np.uint32)
        output = expected.copy()
        try:
            reference.decode([data], packets, REFUSED_CASE.codec, FP32, expected)
        except ValueError:
            refused += 1
            assert_refused(REFUSED_CASE, data, OPERATIONS[refused % 4])
        else:
            memory = np.frombuffer(data, np.uint8)
            ONE_THREAD.decode(memory, len(data), layout, REFUSED_CASE.codec, output, FP32)
            assert_same(output, expected, "decoded")
    assert 100 < refused < 400


OTHERS = {
    "ratio": replace(REFUSED_CASE, codec=reference.topk(Fraction(1, 11))),
    "larger ratio": replace(REFUSED_CASE, codec=reference.topk(Fraction(1, 9))),
    "values": replace(REFUSED_CASE, codec=reference.topk(Fraction(1, 10), BF16)),
    "element type": replace(REFUSED_CASE, element=BF16),
    "one element less": replace(REFUSED_CASE, table=Table(((3, 149), (160, 40)), 210)),
    "other segments": replace(REFUSED_CASE, table=Table(((3, 140), (160, 50)), 210)),
    "dense": replace(REFUSED_CASE, codec=reference.int_quant(8)),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_packet_of_something_else_is_refused(operation: str, other: str) -> None:
    assert_refused(REFUSED_CASE, OTHERS[other].encoded()[0], operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_corrupted_header_is_refused(operation: str) -> None:
    for byte in range(reference.HEADER_NBYTES):
        data = bytearray(REFUSED_CASE.encoded()[0])
        data[byte] ^= 1 << byte % 8
        assert_refused(REFUSED_CASE, bytes(data), operation)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_packets_cut_short_are_refused(operation: str) -> None:
    """Whatever the distance between two packets, if it is less than a packet."""
    data = REFUSED_CASE.encoded()[0]
    for stride in range(len(data)):
        assert_refused(REFUSED_CASE, data, operation, stride)
    layout, out = layout_of(_C, REFUSED_CASE), PacketMemory([len(data)], 0, 0)
    with pytest.raises(ValueError):
        ONE_THREAD.encode(REFUSED_CASE.buffer, FP32, layout, REFUSED_CASE.codec, out.bytes, len(data) - 1)
    assert (out.bytes == Guarded.GUARD).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("corrupt", [0, 1, 2])
def test_one_packet_of_several_keeps_all_from_being_decoded(corrupt: int, threads: int) -> None:
    case = Case(reference.topk(Fraction(1, 10)), FP32, "normal", cases.flat(96 << 10, packets=3))
    layout, data = layout_of(_C, case), case.encoded()
    memory = PacketMemory(layout.nbytes, 0, 0)
    memory.fill(data)
    words = reference.HEADER_NBYTES + -(-4 * case.codec.kept(32 << 10) // 16) * 16
    memory.bytes[corrupt * memory.stride + words :][:2] = 0xFF  # a value too few
    output = cases.contents("any-bits", 1, case.table.numel, FP32)
    before = output.copy()
    kernels = CpuKernels(_C, threads)
    with pytest.raises(ValueError, match=f"packet {corrupt} "):
        kernels.decode(memory.bytes, memory.stride, layout, case.codec, output, FP32)
    with pytest.raises(ValueError, match=f"packet {corrupt} "):
        kernels.clear(memory.bytes, memory.stride, layout, case.codec, FP32, output, FP32)
    assert_same(output, before, "output")


# The tables.


@pytest.mark.parametrize("codec", SPARSE_CODECS)
def test_layout(codec: str) -> None:
    """Of each segment, how many values travel, and where its values and words begin in its packet."""
    c, column = SPARSE_CODECS[codec], SEGMENT_FIELDS.index
    for seed, packets in enumerate((1, 2, 7)):
        table = cases.random_table(seed, 12, 3000, packets=packets, assigned=seed == 1)
        layout = build_layout(_C, table.segments, c, FP32, packets, table.packet_of)
        cut = table.cut(c)
        assert layout.nbytes == [packet.nbytes(c) for packet in cut]
        lengths = [length for packet in cut for length in packet.lengths]
        rows = layout.segments[:-1]
        rows = rows[rows[:, column("length")] > 0]
        np.testing.assert_array_equal(rows[:, column("length")], lengths)
        np.testing.assert_array_equal(rows[:, column("kept")], list(map(c.kept, lengths)))
        for p, packet in enumerate(cut):
            own = rows[rows[:, column("packet")] == p]
            kept, words = list(map(c.kept, packet.lengths)), list(map(c.words, packet.lengths))
            np.testing.assert_array_equal(own[:, column("value")], np.cumsum([0, *kept])[:-1])
            np.testing.assert_array_equal(own[:, column("word")], np.cumsum([0, *words])[:-1])
            assert layout.packets[p, PACKET_FIELDS.index("values")] == sum(kept)


def test_scratch_memory_that_is_too_small_is_refused() -> None:
    """As the CPU kernels can tell."""
    case = Case(reference.topk(Fraction(1, 10)), FP32, "normal", cases.flat(9000))
    layout, out = layout_of(_C, case), PacketMemory([case.table.cut(case.codec)[0].nbytes(case.codec)], 0, 0)
    nbytes = _C.cpu_scratch_nbytes(*layout.arguments, 1, 1)
    assert nbytes > 0
    buffer = case.buffer
    for given in (0, nbytes - 1):
        with scratch_memory(nbytes) as (address, _), pytest.raises(ValueError, match=f"{given} bytes, expected"):
            _C.cpu_encode(
                buffer.ctypes.data, 0, 0, *layout.arguments, *packing(case.codec), False, 0, 0, out.bytes.ctypes.data,
                out.stride, address, given, 1,
            )  # fmt: skip
    assert (out.bytes == Guarded.GUARD).all()
