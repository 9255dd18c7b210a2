"""Packets as literal bytes, small enough to be checked by hand against docs/wire-formats.md.

Each packet is written as digest, tag, scales, codes; of TopK as digest, tag, values, words. In the codes of
IntQuant(4), for instance, a byte ``8f`` holds code 15 (the largest, +7 steps) for its low element and code 8 (zero) for
its high one; ``88`` is two zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from formats.reference import (
    BF16,
    E4M3,
    E5M2,
    FP16,
    FP32,
    Codec,
    ElementType,
    cast,
    int_quant,
    sign,
    topk,
)

NAN, INF = float("nan"), float("inf")
FP32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Golden:
    name: str
    codec: Codec
    element: ElementType
    values: Sequence[float]  # the buffer, converted to `element`
    packet: str
    decoded: Sequence[float]  # 0 between the segments
    segments: tuple[tuple[int, int], ...] | None = None  # None: the whole buffer
    stochastic: bool = False
    seed: int = 0
    step: int = 0

    @property
    def table(self) -> tuple[tuple[int, int], ...]:
        return ((0, len(self.values)),) if self.segments is None else self.segments

    @property
    def bytes(self) -> bytes:
        return bytes.fromhex(self.packet)


GOLDEN = [
    Golden(
        # absmax 127 gives a scale of 1; halves go up, towards +Inf.
        "int8 nearest",
        int_quant(8, group=32),
        FP32,
        [127, -127, 1, -1, 0, 0.5, -0.5, 1.5, 63.25],
        """a62c20581d4b4c7d 534d523118000100 803f0000000000000000000000000000
        ff01817f808180 82bf 8080808080808080808080808080808080808080808080""",
        [127, -127, 1, -1, 0, 1, 0, 2, 63],
    ),
    Golden(
        "int4 nearest",
        int_quant(4, group=32),
        FP32,
        [7, -7, 1, -1, 0, 0.5, -0.5, 1.5, -3.25],
        """59bb76dac6b637cc 534d523114000100 803f0000000000000000000000000000
        8f818987888988 8a85 88888888888888""",
        [7, -7, 1, -1, 0, 1, 0, 2, -3],
    ),
    Golden(
        # 8 bytes of codes, 8 of padding.
        "int2 nearest",
        int_quant(2, group=32),
        FP32,
        [1, -1, 0.25, -0.25, 0, 0.5, -0.5, -0.75, 0.75],
        """699677cd1138ae9c 534d523112000100 803f0000000000000000000000000000
        afa9aaaaaaabaaa9 0000000000000000""",
        [1, -1, 0, 0, 0, 1, 0, -1, 1],
    ),
    Golden(
        # A half goes up where its 16 random bits reach 32768. The three widths share their random bits.
        "int8 stochastic",
        int_quant(8, group=32),
        FP32,
        [127] + [0.5] * 31,
        """69c32bdeae83738c 534d523118000100 803f0000000000000000000000000000
        ff80808081808081 8080808180818081 8080818081808080 8181818081818180""",
        [127, *map(float, "0001001000101010010100011101110"[:31])],
        stochastic=True,
        seed=1,
        step=2,
    ),
    Golden(
        "int4 stochastic",
        int_quant(4, group=32),
        FP32,
        [7] + [0.5] * 31,
        """0fc05b32288d4697 534d523114000100 803f0000000000000000000000000000
        8f88988899888889 9898988998999889""",
        [7, *map(float, "0001001000101010010100011101110"[:31])],
        stochastic=True,
        seed=1,
        step=2,
    ),
    Golden(
        "int2 stochastic",
        int_quant(2, group=32),
        FP32,
        [1] + [0.5] * 31,
        """abd82d9a03a9cef0 534d523112000100 803f0000000000000000000000000000
        ebeafaaefbeeeaaf 0000000000000000""",
        [1, *map(float, "0001001000101010010100011101110"[:31])],
        stochastic=True,
        seed=1,
        step=2,
    ),
    Golden(
        # (112 + 112)/32 = 7 at even positions, 0 at odd ones.
        "int4-hadamard, partial block",
        int_quant(4, group=32, hadamard=True),
        FP32,
        [112, 112],
        """0a91d4438d7193ee 534d523114010100 803f0000000000000000000000000000
        ff88ff88ff88ff88 ff88ff88ff88ff88""",
        [112, 112],
    ),
    Golden(
        # The mean of 1 2 3 4 0 0 6 4 is 2.5; -0, +0 and the missing elements are set.
        "sign",
        sign(group=32),
        FP32,
        [1, -2, 3, -4, -0.0, 0.0, 6, -4],
        """91dd15cd6fdc76e3 534d523108000100 20400000000000000000000000000000
        75ffffff 000000000000000000000000""",
        [2.5, -2.5, 2.5, -2.5, 2.5, 2.5, 2.5, -2.5],
    ),
    Golden(
        # No scales: the elements follow the header.
        "cast fp32",
        cast(FP32),
        FP32,
        [1, -1.5, 0.1, -0.0, 65504, FP32_MAX, INF, -INF, NAN, 2**-9],
        """468d672ee68d41b1 534d523100000000
        0000803f 0000c0bf cdcccc3d 00000080 00e07f47 ffff7f7f 0000807f 000080ff 0000c07f 0000003b"""
        + "00000000" * 22,
        [1, -1.5, 0.10000000149011612, -0.0, 65504, FP32_MAX, INF, -INF, NAN, 2**-9],
    ),
    Golden(
        "cast bf16",
        cast(BF16),
        FP32,
        [1, -1.5, 0.1, -0.0, 65504, FP32_MAX, INF, -INF, NAN, 2**-9],
        """9415a81207823fc8 534d523101000000
        803f c0bf cd3d 0080 8047 7f7f 807f 80ff c07f 003b"""
        + "0000" * 22,
        [1, -1.5, 0.10009765625, -0.0, 65536, 3.3895313892515355e38, INF, -INF, NAN, 2**-9],
    ),
    Golden(
        "cast fp16",
        cast(FP16),
        FP32,
        [1, -1.5, 0.1, -0.0, 65504, FP32_MAX, INF, -INF, NAN, 2**-9],
        """40306e328c5cc8c5 534d523102000000
        003c 00be 662e 0080 ff7b ff7b 007c 00fc 007e 0018"""
        + "0000" * 22,
        [1, -1.5, 0.0999755859375, -0.0, 65504, 65504, INF, -INF, NAN, 2**-9],
    ),
    Golden(
        # No Inf: it becomes NaN. 2^-9 is the smallest denormal.
        "cast e4m3",
        cast(E4M3),
        FP32,
        [1, -1.5, 0.1, -0.0, 65504, FP32_MAX, INF, -INF, NAN, 2**-9],
        """4d5c81125eb4ea4a 534d523103000000
        38 bc 1d 80 7e 7e 7f 7f 7f 01"""
        + "00" * 22,
        [1, -1.5, 0.1015625, -0.0, 448, 448, NAN, NAN, NAN, 2**-9],
    ),
    Golden(
        "cast e5m2",
        cast(E5M2),
        FP32,
        [1, -1.5, 0.1, -0.0, 65504, FP32_MAX, INF, -INF, NAN, 2**-9],
        """f932ef0df402fbd3 534d523104000000
        3c be 2e 80 7b 7b 7c fc 7e 18"""
        + "00" * 22,
        [1, -1.5, 0.09375, -0.0, 57344, 57344, INF, -INF, NAN, 2**-9],
    ),
    Golden(
        # The last group has one element and a scale of its own, 0.5.
        "partial group",
        int_quant(4, group=32),
        BF16,
        [7] * 32 + [3.5],
        """c3b4b4c2f74155e8 534d523114020100 803f003f000000000000000000000000
        ffffffffffffffff ffffffffffffffff
        8f88888888888888 8888888888888888""",
        [7] * 32 + [3.5],
    ),
    Golden(
        # Each segment begins a block and a group. 1/7 rounds up to the scale 3e13, 0.1435546875: 1 is 6.97 steps,
        # 0.25 is 1.74.
        "two segments and a gap",
        int_quant(4, group=32),
        BF16,
        [99, 7, -7, 99, 99, 1, 0.25, -1, 99],
        """f7bb2913aaa14ce7 534d523114020100 803f133e000000000000000000000000
        8f81888888888888 8888888888888888
        8f8a818888888888 8888888888888888""",
        [0, 7, -7, 0, 0, 1.0078125, 0.287109375, -1.0078125, 0],
        segments=((1, 2), (5, 3)),
    ),
    Golden(
        "group with a NaN",
        int_quant(4, group=32),
        FP32,
        [NAN] + [5] * 31 + [7, -1],
        """f6a52080c9bb2d72 534d523114000100 c07f803f000000000000000000000000
        8888888888888888 8888888888888888
        8f87888888888888 8888888888888888""",
        [NAN] * 32 + [7, -1],
    ),
    Golden(
        # The bits still tell the signs.
        "sign of a group with an Inf",
        sign(group=32),
        FP32,
        [-INF] + [5] * 31 + [7, -1],
        """d6dbb0e431eed988 534d523108000100 c07f8040000000000000000000000000
        feffffff fdffffff 0000000000000000""",
        [NAN] * 32 + [4, -4],
    ),
    Golden(
        "group of zeros",
        int_quant(4, group=32),
        FP32,
        [0, -0.0] * 16 + [7, -1],
        """f6a52080c9bb2d72 534d523114000100 0000803f000000000000000000000000
        8888888888888888 8888888888888888
        8f87888888888888 8888888888888888""",
        [0] * 32 + [7, -1],
    ),
    Golden(
        # The largest scales: rounded up, 127·s, 7·s or s would overflow.
        "largest finite, int8",
        int_quant(8, group=32),
        FP32,
        [FP32_MAX, -FP32_MAX, 1e38],
        """d5a34da7e3b76f60 534d523118000100 017c0000000000000000000000000000
        ff01a58080808080 8080808080808080 8080808080808080 8080808080808080""",
        [3.4026159773350432e38, -3.4026159773350432e38, 9.913133162314693e37],
    ),
    Golden(
        "largest finite, int4",
        int_quant(4, group=32),
        FP32,
        [FP32_MAX, -FP32_MAX, 1e38],
        """7358e9bd926e1271 534d523114000100 127e0000000000000000000000000000
        8f818a8888888888 8888888888888888""",
        [3.39617752923046e38, -3.39617752923046e38, 9.703364369229886e37],
    ),
    Golden(
        "largest finite, int2",
        int_quant(2, group=32),
        FP32,
        [FP32_MAX, -FP32_MAX, 1e38],
        """e04042a621eb7d58 534d523112000100 7f7f0000000000000000000000000000
        aba9aaaaaaaaaaaa 0000000000000000""",
        [3.3895313892515355e38, -3.3895313892515355e38, 0],
    ),
    Golden(
        # 7·9408 = 65856 saturates at fp16's 65504.
        "largest finite, fp16",
        int_quant(4, group=32),
        FP16,
        [65504, -65504, 100],
        """8c58d6371a3fb060 534d523114040100 13460000000000000000000000000000
        8f81888888888888 8888888888888888""",
        [65504, -65504, 0],
    ),
    Golden(
        # The smallest scale, 2^-126: half of it goes up, the smallest denormal to zero.
        "denormals, int8",
        int_quant(8, group=32),
        FP32,
        [2**-127, -(2**-149), 2**-126],
        """d5a34da7e3b76f60 534d523118000100 80000000000000000000000000000000
        8180818080808080 8080808080808080 8080808080808080 8080808080808080""",
        [2**-126, 0, 2**-126],
    ),
    Golden(
        # A scale that is itself a denormal of bf16, the smallest.
        "denormals, sign",
        sign(group=32),
        FP32,
        [2**-133, -(2**-133)],
        """635694eadd94b4de 534d523108000100 01000000000000000000000000000000
        fdffffff 000000000000000000000000""",
        [2**-133, -(2**-133)],
    ),
    Golden(
        "no elements",
        int_quant(4, group=128),
        FP32,
        [],
        "b2ea7565347a884d 534d523114000400",
        [],
    ),
    Golden(
        # Three of nine: of the four that are largest the first three. A word is the number of elements skipped.
        "topk, equal magnitudes",
        topk(Fraction(1, 3)),
        FP32,
        [1, -2, 2, 0.5, 1, -2, 0, 2, 1.5],
        """1f018f76aec1f1fe 534d523120000000 000000c0000000400000 00c000000000
        010000000200ffff 0000000000000000""",
        [0, -2, 2, 0, 0, -2, 0, 0, 0],
    ),
    Golden(
        # Seven of ten: 6.01 rounds up. With nothing else left, zeros; -0 travels, and decodes to +0.
        "topk, zeros",
        topk(Fraction(601, 1000)),
        FP32,
        [0, -0.0, 0, 3, 0, 0, 0, 0, 0, -(2**-149)],
        """c55c5a880dda27b5 534d523120000000 0000000000000080 00000000 00004040 00000000 00000000 01000080 00000000
        0000 0000 0000 0000 0000 0000 0300 ffff""",
        [0, 0, 0, 3, 0, 0, 0, 0, 0, -(2**-149)],
    ),
    Golden(
        # NaN before Inf before all others; the two segments select for themselves.
        "topk, NaN and Inf",
        topk(Fraction(1, 2), FP16),
        FP16,
        [65504, INF, NAN, -INF, 2, 7, NAN, 9],
        """66890357ed898c91 534d523122040000 007c007e00fc007e 0000000000000000
        0100 0000 0000 ffff 0100 ffff 00000000""",
        [0, INF, NAN, -INF, 0, 0, NAN, 0],
        segments=((0, 5), (5, 2)),
    ),
    Golden(
        # 1.00390625 is halfway between two values of bf16, and goes to the even one; 1e6 would not fit into fp16.
        "topk, values rounded to bf16",
        topk(Fraction(1, 2), BF16),
        FP32,
        [1.00390625, 0, -1.01171875, 0],
        """ef0fdfb290cd5a23 534d523121000000 803f82bf 000000000000000000000000
        0000 0100 ffff 00000000000000000000""",
        [1, 0, -1.015625, 0],
    ),
    Golden(
        "topk, values rounded to fp16",
        topk(Fraction(1, 2), FP16),
        FP32,
        [1e6, 0, -(2**-25), 2**-24],
        """486c01002dc29117 534d523122000000 ff7b0100 000000000000000000000000
        0000 0200 ffff 00000000000000000000""",
        [65504, 0, 0, 2**-24],
    ),
    Golden(
        # 65535 zeros, 4, 65534 zeros, -5, 131071 zeros, 6: FFFF and 0; 65534; FFFF, FFFF and 1; two FFFF are left.
        "topk, long gaps",
        topk(Fraction(3, 262143)),
        FP32,
        [0] * 65535 + [4] + [0] * 65534 + [-5] + [0] * 131071 + [6],
        """018515481b718088 534d523120000000 00008040 0000a0c0 0000c040 00000000
        ffff 0000 feff ffff ffff 0100 ffff ffff""",
        [0] * 65535 + [4] + [0] * 65534 + [-5] + [0] * 131071 + [6],
    ),
    Golden(
        "topk of no elements",
        topk(Fraction(1, 2), BF16),
        BF16,
        [],
        "55fd65c7cf5fce7d 534d523121020000",
        [],
    ),
]


@dataclass(frozen=True)
class GoldenSum:
    """Packets that are summed, each this one, with a factor that makes the sum one of them, and the sum encoded."""

    read: Codec
    packet: bytes
    written: Codec
    sum: bytes


# 127 -127 1 -1 0 1 0 2 63: 127/7 rounds up to the scale 4192, 18.25, of which 63 is 3.45 steps.
INTO_INT4 = GoldenSum(
    int_quant(8, group=32),
    GOLDEN[0].bytes,
    int_quant(4, group=32),
    bytes.fromhex(
        """59bb76dac6b637cc 534d523114000100 92410000000000000000000000000000
        8f81888888888888 8b88888888888888"""
    ),
)
