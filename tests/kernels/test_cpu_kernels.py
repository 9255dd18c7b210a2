"""Every CPU instruction set gives the reference's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from formats import reference
from formats.golden import GOLDEN, INTO_INT4, Golden
from formats.reference import BF16, E4M3, FP16, FP32
from kernels import cases
from kernels.cases import CODECS, CONTENTS, ELEMENTS, Table
from kernels.equality import (
    Case,
    PacketMemory,
    as_cast,
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
from kernels.native import SEGMENT_FIELDS, CpuKernels, build_layout
from smallreduce import _C

ISAS = _C.cpu_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set forced for one test."""
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    assert _C.cpu_isa() == request.param
    yield request.param
    _C.set_cpu_isa(before)


ONE_THREAD = CpuKernels(_C)

KERNELS: dict[str, Callable[[CpuKernels, Case], None]] = {
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

EACH_CODEC = pytest.mark.parametrize("codec", CODECS)
EACH_ELEMENT = pytest.mark.parametrize("element", ELEMENTS)
EACH_KERNEL = pytest.mark.parametrize("kernel", KERNELS)


def table_for(codec: reference.Codec, seed: int) -> Table:
    """A few segments, of which some hold more than a group; the longest groups stay longer than the segments."""
    return cases.random_table(seed, 7, min(3 * codec.group, 1500), packets=2)


@EACH_KERNEL
@EACH_CODEC
def test_contents(isa: str, codec: str, kernel: str) -> None:
    """Every content in every element type; nearest and stochastic, aligned and misaligned starts take turns."""
    for turn, (contents, element) in enumerate((c, e) for c in CONTENTS for e in ELEMENTS):
        case = Case(
            CODECS[codec],
            ELEMENTS[element],
            contents,
            table_for(CODECS[codec], turn),
            seed=turn,
            stochastic=turn % 2 == 1,
            skip=turn % 3,
            packet_skip=turn % 5,
            stride_slack=turn % 4,
        )
        KERNELS[kernel](ONE_THREAD, case)


@EACH_KERNEL
@EACH_CODEC
def test_sizes(isa: str, codec: str, kernel: str) -> None:
    for size in cases.sizes(CODECS[codec]):
        for element in ELEMENTS.values():
            case = Case(CODECS[codec], element, "outliers", cases.flat(size), seed=size)
            KERNELS[kernel](ONE_THREAD, case)


@EACH_KERNEL
@pytest.mark.parametrize(
    "codec, element", [("int4", "fp32"), ("int8-hadamard", "bf16"), ("sign", "fp16"), ("cast-bf16", "fp32")]
)
def test_a_million_elements(isa: str, codec: str, element: str, kernel: str) -> None:
    """Long enough for streaming stores and for the pool to split the work."""
    case = Case(CODECS[codec], ELEMENTS[element], "normal", cases.flat(cases.LARGE_SIZE), stochastic=True)
    KERNELS[kernel](CpuKernels(_C, threads=2), case)


@EACH_KERNEL
@EACH_CODEC
def test_many_segments_in_any_number_of_packets(isa: str, codec: str, kernel: str) -> None:
    for seed, packets in enumerate((1, 3, 40)):
        table = cases.random_table(seed, 30, 400, packets=packets)
        KERNELS[kernel](ONE_THREAD, Case(CODECS[codec], FP32, "normal", table, seed=seed, stochastic=True))


@EACH_KERNEL
@EACH_CODEC
def test_segments_assigned_to_packets(isa: str, codec: str, kernel: str) -> None:
    table = cases.random_table(3, 30, 400, packets=5, assigned=True)
    KERNELS[kernel](ONE_THREAD, Case(CODECS[codec], BF16, "normal", table, seed=3))


@EACH_KERNEL
@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "int4-hadamard", "sign", "cast-fp32", "cast-e4m3"])
def test_misaligned_starts(isa: str, codec: str, kernel: str) -> None:
    """Buffers that begin at any element, packets at any byte, and an odd number of bytes between two packets."""
    for skip in (1, 3, 7):
        for element in ELEMENTS.values():
            table = cases.flat(1025, packets=2)
            case = Case(CODECS[codec], element, "normal", table, skip=skip, packet_skip=skip, stride_slack=5)
            KERNELS[kernel](ONE_THREAD, case)


@EACH_KERNEL
@EACH_CODEC
def test_thread_counts_agree(codec: str, kernel: str) -> None:
    """Long enough to be split: 2, 3 and 7 threads against the reference, and so against each other and one thread."""
    table = Table(((1, 70_000), (70_010, 33), (70_050, 130_001)), 200_060, packets=3)
    for threads in (1, 2, 3, 7):
        case = Case(CODECS[codec], BF16, "outliers", table, seed=threads, stochastic=True)
        KERNELS[kernel](CpuKernels(_C, threads), case)


class Flushing:
    """A CpuKernels whose calls, and theirs alone, run in a thread that flushes denormals."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self.kernels, name)

        def flushing(*args: object, **kwargs: object) -> None:
            assert torch.set_flush_denormal(True)
            try:
                method(*args, **kwargs)
                assert flushes_denormals(), "the kernel changed the mode of its caller"
            finally:
                torch.set_flush_denormal(False)

        return flushing


def flushes_denormals() -> bool:
    return bool((torch.full((1,), 2.0**-126) * 0.5).item() == 0)


@EACH_KERNEL
@EACH_CODEC
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot flush denormals")
def test_flushing_denormals_changes_nothing(isa: str, codec: str, kernel: str) -> None:
    for threads in (1, 2):
        flushing: Any = Flushing(CpuKernels(_C, threads))
        for contents in ("denormals", "tiny", "normal"):
            for element in ELEMENTS.values():
                table = cases.flat(70_001 if threads > 1 and contents == "denormals" else 300)
                KERNELS[kernel](flushing, Case(CODECS[codec], element, contents, table))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_golden_packets(isa: str, golden: Golden) -> None:
    buffer = reference.from_float(np.array(golden.values, np.float32), golden.element)
    layout = build_layout(_C, golden.table, golden.codec, golden.element)
    out = PacketMemory(layout.nbytes, 0, 0)
    ONE_THREAD.encode(
        buffer, golden.element, layout, golden.codec, out.bytes, out.stride,
        stochastic=golden.stochastic, seed=golden.seed, step=golden.step,
    )  # fmt: skip
    out.assert_holds([golden.bytes], "packet")
    output = np.zeros_like(buffer)
    ONE_THREAD.decode(out.bytes, out.stride, layout, golden.codec, output, golden.element)
    assert_same(output, reference.from_float(np.array(golden.decoded, np.float32), golden.element), "decoded")


@pytest.mark.parametrize("golden", [g for g in GOLDEN if not g.codec.is_sparse], ids=lambda golden: golden.name)
def test_golden_packets_of_differences(isa: str, golden: Golden) -> None:
    """The difference from zeros is the buffer itself; added to zeros (-0, which changes no sign), it is decoded."""
    minuend = reference.to_float(
        reference.from_float(np.array(golden.values, np.float32), golden.element), golden.element
    )
    zeros = np.zeros(len(minuend), golden.element.dtype)
    layout = build_layout(_C, golden.table, golden.codec, golden.element)
    out = PacketMemory(layout.nbytes, 0, 0)
    ONE_THREAD.encode_difference(
        minuend, zeros, golden.element, layout, golden.codec, out.bytes, out.stride,
        stochastic=golden.stochastic, seed=golden.seed, step=golden.step,
    )  # fmt: skip
    out.assert_holds([golden.bytes], "packet")
    output = zeros | golden.element.sign
    ONE_THREAD.decode_add(out.bytes, out.stride, layout, golden.codec, output, golden.element)
    expected = reference.from_float(np.array(golden.decoded, np.float32), golden.element)
    for offset, length in golden.table:
        assert_same(output[offset : offset + length], expected[offset : offset + length], "sum")


@pytest.mark.parametrize(("element", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16)], ids=["bf16", "fp16"])
def test_elements_are_rounded_as_torch_casts_them(isa: str, element: reference.ElementType, dtype: torch.dtype) -> None:
    """On either side of every tie and on it, of every exponent: Cast to fp32 shows what was made of them."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = [0x0000, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    values = (high[:, None] | np.array(ties, np.uint32)).reshape(-1).view(np.float32)
    cast = torch.from_numpy(values).to(dtype).view(torch.uint16).numpy()
    expected = reference.to_float(cast, element)  # which has but one NaN
    assert_same(reference.to_float(as_cast(values, element), element), expected, "the reference")
    codec = CODECS["cast-fp32"]
    layout = build_layout(_C, [(0, len(values))], codec, element)
    out = PacketMemory(layout.nbytes, 0, 0)
    ONE_THREAD.encode_rounded(values, element, layout, codec, out.bytes, out.stride)
    written = out.bytes[reference.HEADER_NBYTES :].view(np.float32)
    assert_same(written[: len(values)], expected, "the kernel")


def test_golden_sum_in_another_format(isa: str) -> None:
    layouts = [build_layout(_C, [(0, 9)], codec, FP32) for codec in (INTO_INT4.read, INTO_INT4.written)]
    memory = PacketMemory(layouts[0].nbytes * 2, 0, 0)
    memory.fill([INTO_INT4.packet] * 2)
    out = PacketMemory(layouts[1].nbytes, 0, 0)
    ONE_THREAD.reduce_encode(
        memory.bytes, memory.stride, 2, 0.5, layouts[0], INTO_INT4.read, out.bytes, FP32,
        into=(layouts[1], INTO_INT4.written),
    )  # fmt: skip
    out.assert_holds([INTO_INT4.sum], "packet")


# What a packet from the network may hold.

# Zero, denormals, the smallest and the largest scale, Inf, NaN, and with a sign.
ODD_SCALES = (0x0000, 0x0001, 0x007F, 0x0080, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF, 0x8000, 0x8080, 0xBF80, 0xFF80)


def arbitrary_packets(case: Case, seed: int) -> list[bytes]:
    """Packets with the right header and random bytes everywhere else; half of the scales are odd ones."""
    rng = np.random.default_rng(seed)
    out = []
    for packet in case.table.cut(case.codec):
        body = rng.integers(0, 256, packet.nbytes(case.codec) - reference.HEADER_NBYTES).astype(np.uint8)
        if not case.codec.is_cast:
            scales = body[: 2 * packet.group_count].view(np.uint16)
            scales[::2] = rng.choice(ODD_SCALES, len(scales[::2]))
        out.append(reference.header(packet, case.codec, case.element) + body.tobytes())
    return out


@EACH_ELEMENT
@EACH_CODEC
def test_any_scale_and_any_code_decode_as_in_the_reference(isa: str, codec: str, element: str) -> None:
    case = Case(CODECS[codec], ELEMENTS[element], "zeros", cases.random_table(5, 20, 2 * CODECS[codec].group))
    layout = layout_of(_C, case)
    (packet,) = case.table.cut(case.codec)
    for seed in range(3):
        ranks = [arbitrary_packets(case, 10 * seed + rank)[0] for rank in range(3)]
        memory = PacketMemory(layout.nbytes * 3, 0, 0)
        memory.fill(ranks)

        expected = np.zeros(case.table.numel, case.element.dtype)
        output = expected.copy()
        reference.decode(ranks[:1], [packet], case.codec, case.element, expected)
        ONE_THREAD.decode(memory.bytes, memory.stride, layout, case.codec, output, case.element)
        assert_same(output, expected, "decoded")

        reference.reduce(ranks, 1 / 3, packet, case.codec, case.element, expected)
        ONE_THREAD.reduce(memory.bytes, memory.stride, 3, 1 / 3, layout, case.codec, output, case.element)
        assert_same(output, expected, "sum")

        before = cases.residual("normal", seed, packet.block_count)
        if not case.codec.hadamard:
            before[~packet.present.reshape(-1)] = 0
        again, after = reference.reduce_encode(
            ranks, 1 / 3, packet, case.codec, case.element, stochastic=True, residual=before
        )
        assert after is not None
        out = PacketMemory(layout.nbytes, 0, 0)
        ONE_THREAD.reduce_encode(
            memory.bytes, memory.stride, 3, 1 / 3, layout, case.codec, out.bytes, case.element,
            residual=before, stochastic=True,
        )  # fmt: skip
        out.assert_holds([again], "encoded sum")
        assert_same(before, after, "residual")

        output = cases.contents("wide", seed, case.table.numel, case.element)
        expected = output.copy()
        reference.decode_add(ranks[:1], [packet], case.codec, case.element, expected)
        ONE_THREAD.decode_add(memory.bytes, memory.stride, layout, case.codec, output, case.element)
        assert_same(output, expected, "added")


REFUSED_CASE = Case(CODECS["int4"], FP32, "normal", cases.flat(1000, packets=3))


def corrupt(case: Case, packet: int, byte: int) -> PacketMemory:
    data = case.encoded()
    memory = PacketMemory([len(each) for each in data], 0, 0)
    memory.fill(data)
    memory.bytes[packet * memory.stride + byte] ^= 0x10
    return memory


def assert_refused_everywhere(packets: PacketMemory, case: Case) -> None:
    """To decode and to add raise and write nothing."""
    layout = layout_of(_C, case)
    output = cases.contents("any-bits", 1, case.table.numel, case.element)
    before = output.copy()
    for decode in (ONE_THREAD.decode, ONE_THREAD.decode_add):
        with pytest.raises(ValueError):
            decode(packets.bytes, packets.stride, layout, case.codec, output, case.element)
        assert_same(output, before, "output")


@pytest.mark.parametrize("packet", [0, 1, 2])
@pytest.mark.parametrize("byte", range(reference.HEADER_NBYTES))
def test_a_corrupted_header_is_refused(packet: int, byte: int) -> None:
    assert_refused_everywhere(corrupt(REFUSED_CASE, packet, byte), REFUSED_CASE)


@pytest.mark.parametrize("byte", range(reference.HEADER_NBYTES))
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_corrupted_header_of_any_rank_is_refused(rank: int, byte: int) -> None:
    case = replace(REFUSED_CASE, table=cases.flat(1000))
    layout = layout_of(_C, case)
    memory = PacketMemory(layout.nbytes * 3, 0, 0)
    memory.fill(case.encoded() * 3)
    memory.bytes[rank * memory.stride + byte] ^= 0x01
    output = cases.contents("any-bits", 1, 1000, FP32)
    before = output.copy()
    with pytest.raises(ValueError):
        ONE_THREAD.reduce(memory.bytes, memory.stride, 3, 1.0, layout, case.codec, output, case.element)
    assert_same(output, before, "output")

    out = PacketMemory(layout.nbytes, 0, 0)
    residual = cases.residual("normal", 1, 32)
    residual_before = residual.copy()
    with pytest.raises(ValueError):
        ONE_THREAD.reduce_encode(
            memory.bytes, memory.stride, 3, 1.0, layout, case.codec, out.bytes, case.element, residual=residual
        )
    assert (out.bytes == cases.Guarded.GUARD).all()
    assert_same(residual, residual_before, "residual")


OTHERS = {
    "codec": replace(REFUSED_CASE, codec=CODECS["int8"]),
    "group": replace(REFUSED_CASE, codec=CODECS["int4-group32"]),
    "hadamard": replace(REFUSED_CASE, codec=CODECS["int4-hadamard"]),
    "element type": replace(REFUSED_CASE, element=BF16),
    "other element type": replace(REFUSED_CASE, element=FP16),
    "one element less": replace(REFUSED_CASE, table=cases.flat(999, packets=3)),
    "other segments": replace(REFUSED_CASE, table=Table(((0, 488), (488, 512)), 1000, packets=3)),
    "cast": replace(REFUSED_CASE, codec=reference.cast(E4M3)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_packet_of_something_else_is_refused(other: str) -> None:
    data = OTHERS[other].encoded()
    room = 2 * max(layout_of(_C, REFUSED_CASE).nbytes + [len(each) for each in data])
    memory = PacketMemory([room] * 3, 0, 0)
    memory.fill(data)
    assert_refused_everywhere(memory, REFUSED_CASE)


@pytest.mark.parametrize("missing", [1, 16, 100])
def test_packets_too_short_are_refused(missing: int) -> None:
    """A stride that does not hold a whole packet."""
    case = replace(REFUSED_CASE, table=cases.flat(1024, packets=2))
    layout = layout_of(_C, case)
    data = case.encoded()
    memory = PacketMemory(layout.nbytes, 0, 0)
    memory.fill(data)
    stride = memory.stride - missing
    output = np.zeros(1024, np.uint32)
    out = PacketMemory(layout.nbytes, 0, 0)
    with pytest.raises(ValueError):
        ONE_THREAD.encode(case.buffer, FP32, layout, case.codec, out.bytes, stride)
    with pytest.raises(ValueError):
        ONE_THREAD.encode_rounded(output.view(np.float32), FP32, layout, case.codec, out.bytes, stride)
    with pytest.raises(ValueError):
        ONE_THREAD.encode_difference(output.view(np.float32), output, FP32, layout, case.codec, out.bytes, stride)
    for decode in (ONE_THREAD.decode, ONE_THREAD.decode_add):
        with pytest.raises(ValueError):
            decode(memory.bytes, stride, layout, case.codec, output, FP32)
    one = layout.only(0)
    memory.fill([data[0], data[0]])
    with pytest.raises(ValueError):
        ONE_THREAD.reduce(memory.bytes, stride, 2, 1.0, one, case.codec, output, FP32)
    with pytest.raises(ValueError):
        ONE_THREAD.reduce_encode(memory.bytes, stride, 2, 1.0, one, case.codec, out.bytes, FP32)
    assert not output.any()
    assert (out.bytes == cases.Guarded.GUARD).all()


# The tables and small functions of the module.


@EACH_ELEMENT
@EACH_CODEC
def test_tag(codec: str, element: str) -> None:
    c = CODECS[codec]
    number = list(ELEMENTS).index(element)
    assert _C.packet_tag(c.kind, c.group, c.hadamard, number) == reference.tag(c, ELEMENTS[element])


def test_mix64() -> None:
    for z in (0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15):
        assert _C.mix64(z) == reference.mix64(z)


@EACH_CODEC
def test_packet_sizes(codec: str) -> None:
    c = CODECS[codec]
    for seed, packets in enumerate((1, 2, 7)):
        table = cases.random_table(seed, 12, 3 * c.group, packets=packets)
        expected = [packet.nbytes(c) for packet in table.cut(c)]
        assert build_layout(_C, table.segments, c, FP32, packets).nbytes == expected


@pytest.mark.parametrize(
    "arguments",
    [
        dict(kind=5), dict(kind=99), dict(kind=-1), dict(group=0), dict(group=33), dict(group=-32),
        dict(group=32 * 65536), dict(element_type=3), dict(element_type=-1), dict(kind=8, hadamard=True),
        dict(kind=0, hadamard=True), dict(lengths=[-1]), dict(offsets=[-1]), dict(offsets=[0, 1]),
        dict(packet_count=0), dict(packet_of=[1]), dict(packet_of=[-1]), dict(packet_of=[0, 0]),
        dict(kind=32, hadamard=True), dict(kind=35), dict(kind=32, ratio_numerator=0),
        dict(kind=33, ratio_numerator=-1), dict(kind=34, ratio_numerator=2),
        dict(kind=32, ratio_denominator=10**9 + 1), dict(kind=32, lengths=[2**32]),
        dict(kind=32, lengths=[2**33 - 32], packet_count=2, packet_of=[1]),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_layouts_are_refused(arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = dict(
        offsets=[0], lengths=[10], packet_of=None, packet_count=1, kind=20, group=128, hadamard=False,
        ratio_numerator=1, ratio_denominator=1, element_type=0,
    )  # fmt: skip
    _C.build_layout(*given.values())
    with pytest.raises(ValueError):
        _C.build_layout(*(given | arguments).values())


def test_a_segment_of_more_elements_than_a_packet_takes() -> None:
    """TopK limits what of a segment falls into one packet, not what is cut into several."""
    layout = build_layout(_C, [(0, 2**33)], reference.topk(Fraction(1, 1000)), FP32, packets=3)
    lengths = layout.segments[:-1, SEGMENT_FIELDS.index("length")]
    assert len(lengths) == 3
    assert lengths.sum() == 2**33


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _C.cpu_isa()
    with pytest.raises(ValueError):
        _C.set_cpu_isa("avx1024")
    assert _C.cpu_isa() == before
