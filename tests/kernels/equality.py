"""Bodies of the equality tests: each runs one kernel on one case and compares every byte with the reference.

Guards stand before and after every buffer that a kernel writes, and between the packets.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from formats import reference
from formats.reference import BF16, F32, FP16, FP32, Bits, Codec, ElementType
from kernels import cases
from kernels.cases import CODECS, Guarded, Table
from kernels.native import Kernels, Layout, build_layout

U8 = npt.NDArray[np.uint8]
Packets = Sequence[bytes]


@dataclass(frozen=True)
class Case:
    """One input. The buffer begins `skip` elements after a 64-byte boundary, the packets `packet_skip` bytes."""

    codec: Codec
    element: ElementType
    contents: str
    table: Table
    seed: int = 0
    stochastic: bool = False
    skip: int = 0
    packet_skip: int = 0
    stride_slack: int = 0  # bytes between two packets

    @property
    def buffer(self) -> Bits:
        return cases.contents(self.contents, self.seed, self.table.numel, self.element)

    @property
    def random_seed(self) -> int:
        return reference.mix64(self.seed)

    @property
    def step(self) -> int:
        return 3 * self.seed + 1

    def encoded(self, rank: int = 0) -> list[bytes]:
        """The reference's packets of one rank, rounded to nearest."""
        return _encoded(self.codec, self.element, self.contents, self.table, self.seed + 1000 * rank)


@functools.lru_cache(maxsize=4096)
def _encoded(codec: Codec, element: ElementType, contents: str, table: Table, seed: int) -> list[bytes]:
    buffer = cases.contents(contents, seed, table.numel, element)
    data, _ = reference.encode(buffer, table.cut(codec), codec, element)
    return data


class PacketMemory:
    """Packets `stride` bytes apart, with guard bytes in between."""

    def __init__(self, nbytes: Sequence[int], skip: int, slack: int) -> None:
        self.nbytes = list(nbytes)
        self.stride = max(self.nbytes) + slack
        self.guarded = Guarded(self.stride * len(self.nbytes), skip)

    @property
    def bytes(self) -> U8:
        return self.guarded.bytes

    def fill(self, packets: Packets) -> None:
        for p, data in enumerate(packets):
            self.bytes[p * self.stride :][: len(data)] = np.frombuffer(data, np.uint8)

    def assert_holds(self, expected: Packets, what: str) -> None:
        self.guarded.assert_intact()
        for p, data in enumerate(expected):
            assert self.nbytes[p] == len(data)
            slot = self.bytes[p * self.stride : (p + 1) * self.stride]
            assert_same(slot[: len(data)], np.frombuffer(data, np.uint8), f"{what}, packet {p}")
            assert (slot[len(data) :] == Guarded.GUARD).all(), f"{what}: wrote past packet {p}"


def assert_same(actual: npt.NDArray[Any], expected: npt.NDArray[Any], what: str) -> None:
    """Equality of bits, which tells NaNs and signed zeros apart."""
    actual, expected = _as_bits(actual), _as_bits(expected)
    assert actual.shape == expected.shape, what
    differing = np.flatnonzero(actual != expected)
    if len(differing):
        i = int(differing[0])
        raise AssertionError(
            f"{what}: {len(differing)} of {len(actual)} differ, the first at {i}: "
            f"{int(actual[i]):#x} instead of {int(expected[i]):#x}"
        )


def _as_bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.view(np.uint32) if array.dtype == np.float32 else array


def layout_of(module: Any, case: Case) -> Layout:
    table = case.table
    return build_layout(module, table.segments, case.codec, case.element, table.packets, table.packet_of)


def check_encode(module: Any, kernels: Kernels, case: Case, *, with_residual: bool = False) -> None:
    layout = layout_of(module, case)
    before = cases.residual(case.contents, case.seed, case.table.blocks) if with_residual else None
    expected, after = _expected_encoding(case, with_residual)
    input_guard, x = cases.guarded_copy(case.buffer, case.skip)
    residual_guard, residual = _residual_memory(before)
    out = PacketMemory(layout.nbytes, case.packet_skip, case.stride_slack)
    kernels.encode(
        x, case.element, layout, case.codec, out.bytes, out.stride,
        residual=residual, stochastic=case.stochastic, seed=case.random_seed, step=case.step,
    )  # fmt: skip
    out.assert_holds(expected, "packet")
    assert_same(x, case.buffer, "input")
    input_guard.assert_intact()
    if residual is not None:
        assert after is not None
        residual_guard.assert_intact()
        assert_same(residual, after, "residual")


@functools.lru_cache(maxsize=2)  # several kernels, one after the other, are compared on a case
def _expected_encoding(case: Case, with_residual: bool) -> tuple[list[bytes], F32 | None]:
    return reference.encode(
        case.buffer,
        case.table.cut(case.codec),
        case.codec,
        case.element,
        stochastic=case.stochastic,
        seed=case.random_seed,
        step=case.step,
        residual=cases.residual(case.contents, case.seed, case.table.blocks) if with_residual else None,
    )


# From here on a cast makes Inf of a finite magnitude: half a step beyond the largest that the type has.
_CAST_TO_INFINITY = {BF16: np.float32(float.fromhex("0x1.ffp127")), FP16: np.float32(65520)}


def as_cast(values: F32, element: ElementType) -> Bits:
    """fp32 values as torch casts them; ``from_float`` but for the finite values that it saturates."""
    if element in _CAST_TO_INFINITY:
        beyond = np.abs(values) >= _CAST_TO_INFINITY[element]
        values = np.where(beyond, np.copysign(np.float32(np.inf), values), values)
    return reference.from_float(values, element)


def check_encode_rounded(module: Any, kernels: Kernels, case: Case) -> None:
    layout = layout_of(module, case)
    original, expected = _expected_rounded(case)
    guard, x = cases.guarded_copy(original, case.skip)
    out = PacketMemory(layout.nbytes, case.packet_skip, case.stride_slack)
    kernels.encode_rounded(
        x.view(np.float32), case.element, layout, case.codec, out.bytes, out.stride,
        stochastic=case.stochastic, seed=case.random_seed, step=case.step,
    )  # fmt: skip
    out.assert_holds(expected, "packet")
    assert_same(x, original, "input")
    guard.assert_intact()


@functools.lru_cache(maxsize=2)
def _expected_rounded(case: Case) -> tuple[F32, list[bytes]]:
    """The fp32 input, with the case's contents of either type, and the packets."""
    narrow = reference.to_float(case.buffer, case.element)
    with np.errstate(all="ignore"):
        near = narrow + narrow * cases.contents("normal", case.seed, case.table.numel, FP32).view(np.float32) / 256
    wide = cases.contents(case.contents, case.seed + 500, case.table.numel, FP32).view(np.float32)
    original = np.where(np.arange(len(narrow)) % 7 == 0, wide, near)
    packets, _ = reference.encode(
        as_cast(original, case.element),
        case.table.cut(case.codec),
        case.codec,
        case.element,
        stochastic=case.stochastic,
        seed=case.random_seed,
        step=case.step,
    )
    return original, packets


def check_encode_difference(module: Any, kernels: Kernels, case: Case) -> None:
    layout = layout_of(module, case)
    minuend, expected = _expected_difference(case)
    minuend_guard, new = cases.guarded_copy(minuend, case.skip)
    subtrahend_guard, old = cases.guarded_copy(case.buffer, case.skip)
    out = PacketMemory(layout.nbytes, case.packet_skip, case.stride_slack)
    kernels.encode_difference(
        new.view(np.float32), old, case.element, layout, case.codec, out.bytes, out.stride,
        stochastic=case.stochastic, seed=case.random_seed, step=case.step,
    )  # fmt: skip
    out.assert_holds(expected, "packet")
    assert_same(new, minuend, "minuend")
    assert_same(old, case.buffer, "subtrahend")
    minuend_guard.assert_intact()
    subtrahend_guard.assert_intact()


@functools.lru_cache(maxsize=2)
def _expected_difference(case: Case) -> tuple[F32, list[bytes]]:
    """The minuend, mostly close to the subtrahend, and the packets."""
    old = reference.to_float(case.buffer, case.element)
    rest = cases.contents(case.contents, case.seed + 500, case.table.numel, FP32).view(np.float32)
    with np.errstate(all="ignore"):
        minuend = np.where(np.arange(len(old)) % 7 == 0, rest, old + rest * np.float32(2.0**-6))
    return minuend, reference.encode_difference(
        minuend,
        case.buffer,
        case.table.cut(case.codec),
        case.codec,
        case.element,
        stochastic=case.stochastic,
        seed=case.random_seed,
        step=case.step,
    )


def check_decode_add(module: Any, kernels: Kernels, case: Case) -> None:
    layout = layout_of(module, case)
    data = case.encoded()
    before = cases.contents(case.contents, case.seed + 77, case.table.numel, case.element)
    expected = before.copy()
    reference.decode_add(data, case.table.cut(case.codec), case.codec, case.element, expected)
    packets = PacketMemory(layout.nbytes, case.packet_skip, case.stride_slack)
    packets.fill(data)
    guard, output = cases.guarded_copy(before, case.skip)
    kernels.decode_add(packets.bytes, packets.stride, layout, case.codec, output, case.element)
    guard.assert_intact()
    assert_same(output, expected, "output")
    packets.assert_holds(data, "input")


def check_decode(module: Any, kernels: Kernels, case: Case) -> None:
    layout = layout_of(module, case)
    data = case.encoded()
    expected = _background(case)
    reference.decode(data, case.table.cut(case.codec), case.codec, case.element, expected)
    packets = PacketMemory(layout.nbytes, case.packet_skip, case.stride_slack)
    packets.fill(data)
    guard, output = cases.guarded_copy(_background(case), case.skip)
    kernels.decode(packets.bytes, packets.stride, layout, case.codec, output, case.element)
    guard.assert_intact()
    assert_same(output, expected, "output")
    packets.assert_holds(data, "input")


def check_clear(module: Any, kernels: Kernels, case: Case) -> None:
    """In buffers of every type, whatever that of the packets' elements is."""
    layout = layout_of(module, case)
    data = case.encoded()
    packets = PacketMemory(layout.nbytes, case.packet_skip, case.stride_slack)
    packets.fill(data)
    for element in reference.BUFFER_TYPES:
        before = cases.contents("any-bits", case.seed + 77, case.table.numel, element)
        expected = before.copy()
        reference.clear(data, case.table.cut(case.codec), case.codec, case.element, expected)
        guard, output = cases.guarded_copy(before, case.skip)
        kernels.clear(packets.bytes, packets.stride, layout, case.codec, case.element, output, element)
        guard.assert_intact()
        assert_same(output, expected, f"output of {element.name}")


def check_reduce(module: Any, kernels: Kernels, case: Case, ranks: int, factor: float) -> None:
    for p, (packet, layout, data, memory) in enumerate(_reductions(module, case, ranks)):
        expected = _background(case)
        reference.reduce(data, factor, packet, case.codec, case.element, expected)
        guard, output = cases.guarded_copy(_background(case), case.skip)
        kernels.reduce(memory.bytes, memory.stride, ranks, factor, layout, case.codec, output, case.element)
        guard.assert_intact()
        assert_same(output, expected, f"sum of packet {p}")


def check_reduce_encode(
    module: Any,
    kernels: Kernels,
    case: Case,
    ranks: int,
    factor: float,
    *,
    with_residual: bool = False,
    into: Codec | None = None,
) -> None:
    into = into or case.codec
    into_case = replace(case, codec=into)
    into_packets, into_layout = case.table.cut(into), layout_of(module, into_case)
    for p, (packet, layout, data, memory) in enumerate(_reductions(module, case, ranks)):
        assert packet.segments == into_packets[p].segments
        before = None
        if with_residual:
            before = cases.residual(case.contents, case.seed + p, packet.block_count)
            if not case.codec.hadamard:
                before[~packet.present.reshape(-1)] = 0
        expected, after = reference.reduce_encode(
            data,
            factor,
            packet,
            case.codec,
            case.element,
            into=(into_packets[p], into),
            stochastic=case.stochastic,
            seed=case.random_seed,
            step=case.step,
            residual=before,
        )
        guard, residual = _residual_memory(before)
        written = into_layout.only(p)
        out = PacketMemory(written.nbytes, case.packet_skip, 0)
        kernels.reduce_encode(
            memory.bytes, memory.stride, ranks, factor, layout, case.codec, out.bytes, case.element,
            into=(written, into),
            residual=residual, stochastic=case.stochastic, seed=case.random_seed, step=case.step,
        )  # fmt: skip
        out.assert_holds([expected], f"sum of packet {p}")
        if residual is not None:
            assert after is not None
            guard.assert_intact()
            assert_same(residual, after, f"residual of packet {p}")


# Beside the usual codecs a long group with Hadamard.
_INTO = [*CODECS.values(), reference.int_quant(4, group=2048, hadamard=True)]


def check_reduce_encode_into(module: Any, kernels: Kernels, case: Case, ranks: int, factor: float) -> None:
    """Into a packet of another codec, each in its turn as the case's seed says, with a residual and without."""
    others = [codec for codec in _INTO if codec.hadamard == case.codec.hadamard and codec != case.codec]
    into = others[case.seed % len(others)]
    case = replace(case, table=case.table.with_whole_segments())
    with_residual = case.seed // len(others) % 2 == 1
    check_reduce_encode(module, kernels, case, ranks, factor, with_residual=with_residual, into=into)


def _reductions(
    module: Any, case: Case, ranks: int
) -> list[tuple[reference.Packet, Layout, list[bytes], PacketMemory]]:
    """For each packet of the cut: what the reference and the kernels need to add that of all ranks."""
    layout = layout_of(module, case)
    encoded = [case.encoded(rank) for rank in range(ranks)]
    out = []
    for p, packet in enumerate(case.table.cut(case.codec)):
        data = [each[p] for each in encoded]
        memory = PacketMemory([len(each) for each in data], case.packet_skip, case.stride_slack)
        memory.fill(data)
        out.append((packet, layout.only(p), data, memory))
    return out


def _background(case: Case) -> Bits:
    """What the output holds before; it must stay between the segments."""
    return cases.contents("any-bits", case.seed + 77, case.table.numel, case.element)


def _residual_memory(before: F32 | None) -> tuple[Guarded, F32 | None]:
    if before is None:
        return Guarded(0), None
    guard, residual = cases.guarded_copy(before)
    return guard, residual.view(np.float32)
