"""What the format promises, shown on the reference: error bounds, harmless cuts, feedback that telescopes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from formats import reference, sparse
from formats.reference import BF16, FP16, FP32, Codec, ElementType
from formats.sparse import SKIP
from kernels import cases
from kernels.cases import CODECS, CONTENTS, ELEMENTS, SPARSE_CODECS, SPARSE_CONTENTS

ALL_CODECS = {**CODECS, **SPARSE_CODECS}
EACH_CODEC = pytest.mark.parametrize("codec", ALL_CODECS)
EACH_DENSE = pytest.mark.parametrize("codec", CODECS)
EACH_SPARSE = pytest.mark.parametrize("codec", SPARSE_CODECS)
EACH_INT = pytest.mark.parametrize("codec", cases.INT_CODECS)

F32 = npt.NDArray[np.float32]


def decoded(data: list[bytes], packets: list[reference.Packet], codec: Codec, element: ElementType, numel: int) -> F32:
    output = np.zeros(numel, element.dtype)
    reference.decode(data, packets, codec, element, output)
    return reference.to_float(output, element)


def test_the_butterfly_is_the_sylvester_matrix() -> None:
    sylvester = np.ones((1, 1))
    for _ in range(5):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    np.testing.assert_array_equal(reference.transform(np.eye(32, dtype=np.float32)), sylvester)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@EACH_INT
def test_error_is_less_than_a_step(codec: str, rounding: str) -> None:
    """Half a step, or a whole one: the scale rounds up, so no code is limited. fl(v·inv), fl(1/s) and fl(y + c + u)
    each err by at most 2^-24 of their magnitude, none above 2c steps: 2^-24 · 6c together. With Hadamard the errors
    of 32 coefficients add up.
    """
    c = ALL_CODECS[codec]
    packets = reference.cut([(0, 5000)], c.group)
    x = cases.contents("normal", 1, 5000, FP32)
    data, _ = reference.encode(x, packets, c, FP32, stochastic=rounding == "stochastic", seed=3)
    scales = np.frombuffer(data[0], "<u2", packets[0].group_count, 16).astype(np.uint16)
    steps = reference.to_float(scales, BF16).repeat(c.group)[:5000].astype(np.float64)
    share = (0.5 if rounding == "nearest" else 1) + 2**-24 * 6 * c.zero_code
    error = np.abs(decoded(data, packets, c, FP32, 5000).astype(np.float64) - x.view(np.float32))
    assert (error <= share * steps * (32 * (1 + 2**-20) if c.hadamard else 1)).all()


@pytest.mark.parametrize("element", ELEMENTS)
@EACH_CODEC
def test_finite_input_decodes_to_finite_output(codec: str, element: str) -> None:
    c, e = ALL_CODECS[codec], ELEMENTS[element]
    packets = reference.cut([(0, 3000)], c.group)
    for contents in ("largest", "wide", "denormals", "tiny", "zeros", "normal"):
        for stochastic in (False, True):
            x = cases.contents(contents, 5, 3000, e)
            data, _ = reference.encode(x, packets, c, e, stochastic=stochastic)
            assert np.isfinite(decoded(data, packets, c, e, 3000)).all(), contents


@pytest.mark.parametrize("contents", ["nan", "infinite"])
@EACH_DENSE
def test_groups_that_are_not_finite_decode_to_nan(codec: str, contents: str) -> None:
    """The whole group, and no other; a Cast element for element. Their residuals stay as they were."""
    c = ALL_CODECS[codec]
    size = 6 * c.group + 40
    packets = reference.cut([(0, size)], c.group)
    x = cases.contents(contents, 2, size, FP32)
    before = cases.residual("normal", 2, packets[0].block_count)
    data, after = reference.encode(x, packets, c, FP32, residual=before)
    assert after is not None
    bad = ~np.isfinite(x.view(np.float32))
    assert bad.any()
    if not c.is_cast:
        first = np.arange(0, size, c.group)
        bad = np.logical_or.reduceat(bad, first).repeat(c.group)[:size]
    np.testing.assert_array_equal(~np.isfinite(decoded(data, packets, c, FP32, size)), bad)
    np.testing.assert_array_equal(after[:size][bad], before[:size][bad])
    assert np.isfinite(after).all()


@EACH_DENSE
def test_a_cut_changes_no_code(codec: str) -> None:
    """Scales and codes of the packets, one after the other, are those of the uncut list."""
    c = ALL_CODECS[codec]
    table = cases.random_table(1, 20, 3 * c.group)
    x = cases.contents("normal", 1, table.numel, FP32)

    def sections(packets: list[reference.Packet]) -> tuple[bytes, bytes]:
        data, _ = reference.encode(x, packets, c, FP32, stochastic=True, seed=11, step=12)
        scales, codes = b"", b""
        for each, packet in zip(data, packets, strict=True):
            start = 16 if c.is_cast else 16 + -(-2 * packet.group_count // 16) * 16
            scales += b"" if c.is_cast else each[16 : 16 + 2 * packet.group_count]
            codes += each[start : start + 4 * c.bits * packet.block_count]
        return scales, codes

    whole = sections(reference.cut(table.segments, c.group))
    for packets in (2, 3, 7, 1000):
        assert sections(reference.cut(table.segments, c.group, packets)) == whole


@pytest.mark.parametrize("packets", [1, 2, 3, 7, 100])
def test_a_cut_is_even_and_whole(packets: int) -> None:
    table = cases.random_table(4, 25, 700)
    cut = reference.cut(table.segments, 64, packets)
    counts = [packet.group_count for packet in cut]
    assert max(counts) - min(counts) <= 1
    index = np.concatenate([packet.index[packet.present] for packet in cut])
    expected = np.concatenate([np.arange(o, o + n) for o, n in table.segments])
    np.testing.assert_array_equal(index, expected)
    origin = np.concatenate([packet.origin for packet in cut])
    np.testing.assert_array_equal(origin, np.arange(table.blocks))


@EACH_CODEC
def test_what_lies_between_segments_is_neither_read_nor_written(codec: str) -> None:
    c = ALL_CODECS[codec]
    table = cases.random_table(2, 20, 500)
    packets = table.cut(c)
    gaps = np.ones(table.numel, np.bool_)
    for packet in packets:
        gaps[packet.index[packet.present]] = False
    assert gaps.any()
    x = cases.contents("normal", 1, table.numel, FP32)
    other = np.where(gaps, cases.contents("any-bits", 9, table.numel, FP32), x)
    data, _ = reference.encode(x, packets, c, FP32)
    assert reference.encode(other, packets, c, FP32)[0] == data
    output = other.copy()
    reference.decode(data, packets, c, FP32, output)
    np.testing.assert_array_equal(output[gaps], other[gaps])


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@EACH_CODEC
def test_feedback_telescopes(codec: str, stochastic: bool) -> None:
    """Outputs plus residual equal inputs, exactly: every value here is a multiple of 2^-16 (a bf16 scale of at least
    2^-9 is one) and less than 2^6, so that fl(x + e) and fl(v - d) lose nothing; in the transformed domain 2^-21 and
    2^2.
    """
    c = ALL_CODECS[codec]
    rng = np.random.default_rng(6)
    packets = reference.cut([(0, 640)], c.group)
    e = np.zeros(640, np.float32)
    total_in, total_out = np.zeros(640), np.zeros(640)
    for step in range(4):
        x = (rng.integers(-32, 33, 640) / 16).astype(np.float32)
        data, after = reference.encode(
            x.view(np.uint32), packets, c, FP32, residual=e, stochastic=stochastic, seed=8, step=step
        )
        assert after is not None
        total_in += x
        total_out += decoded(data, packets, c, FP32, 640)
        e = after
    np.testing.assert_array_equal(total_out + e, total_in)


@pytest.mark.parametrize("contents", ["largest", "wide"])
@EACH_CODEC
def test_finite_input_and_residual_leave_a_finite_residual(codec: str, contents: str) -> None:
    """x + e and, with Hadamard, v - d would overflow: both are limited to the largest finite magnitude."""
    c = ALL_CODECS[codec]
    packets = reference.cut([(0, 4096)], c.group)
    x = cases.contents(contents, 1, 4096, FP32)
    residual: F32 | None = cases.residual(contents, 1, 128)
    for step in range(3):
        data, residual = reference.encode(x, packets, c, FP32, residual=residual, stochastic=True, step=step)
        assert residual is not None
        assert np.isfinite(residual).all()
        assert np.isfinite(decoded(data, packets, c, FP32, 4096)).all()


@pytest.mark.parametrize("contents", CONTENTS)
def test_cast_fp32_is_the_identity(contents: str) -> None:
    """But for the payload of NaNs."""
    c = CODECS["cast-fp32"]
    packets = reference.cut([(0, 1000)], c.group)
    x = cases.contents(contents, 3, 1000, FP32)
    data, _ = reference.encode(x, packets, c, FP32)
    out = np.zeros_like(x)
    reference.decode(data, packets, c, FP32, out)
    np.testing.assert_array_equal(out, np.where(np.isnan(x.view(np.float32)), np.uint32(0x7FC00000), x))


@pytest.mark.parametrize("element", [BF16, FP16], ids=lambda e: e.name)
def test_cast_to_the_type_of_the_buffer_is_the_identity(element: ElementType) -> None:
    c = reference.cast(element)
    x = np.arange(2 * element.sign, dtype=np.int64).astype(element.dtype)
    packets = reference.cut([(0, len(x))], c.group)
    data, _ = reference.encode(x, packets, c, element)
    out = np.zeros_like(x)
    reference.decode(data, packets, c, element, out)
    nan = np.isnan(reference.to_float(x, element))
    np.testing.assert_array_equal(out, np.where(nan, element.nan, x))


@pytest.mark.parametrize("name", ["codec", "group", "hadamard", "element", "length", "short"])
def test_another_packet_is_refused(name: str) -> None:
    c = CODECS["int4"]
    packets = reference.cut([(0, 100)], c.group)
    (data,), _ = reference.encode(cases.contents("normal", 1, 100, FP32), packets, c, FP32)
    given: dict[str, Any] = dict(codec=c, packets=packets, element=FP32, data=data)
    others: dict[str, dict[str, Any]] = {
        "codec": dict(codec=CODECS["int2"]),
        "group": dict(codec=CODECS["int4-group32"]),
        "hadamard": dict(codec=CODECS["int4-hadamard"]),
        "element": dict(element=BF16),
        "length": dict(packets=reference.cut([(0, 99)], c.group)),
        "short": dict(data=data[:-1]),
    }
    given |= others[name]
    output = np.zeros(100, given["element"].dtype)
    with pytest.raises(ValueError):
        reference.decode([given["data"]], given["packets"], given["codec"], given["element"], output)
    assert not output.any()


# TopK.


@pytest.mark.parametrize("contents", SPARSE_CONTENTS)
def test_selection_is_the_first_of_all_in_order(contents: str) -> None:
    """Against a sort of Python's, whose keys are the words of the page: NaN, then the magnitude, then the index."""

    def key(i: int) -> tuple[bool, float, int]:
        return (not np.isnan(v[i]), -abs(float(v[i])) if not np.isnan(v[i]) else 0, i)

    v = cases.contents(contents, 4, 700, FP32).view(np.float32)
    order = sorted(range(700), key=key)
    for kept in (0, 1, 7, 350, 699, 700):
        np.testing.assert_array_equal(sparse.selection(v, kept), sorted(order[:kept]))


@pytest.mark.parametrize(
    ("index", "length", "words"),
    [
        ([], 0, []),
        ([0], 1, [0, SKIP]),
        ([0, 1, 5], 6, [0, 0, 3, SKIP]),
        ([65534], 65535, [65534, SKIP]),
        ([65535], 65536, [SKIP, 0, SKIP]),
        ([65536], 65537, [SKIP, 1, SKIP]),
        ([131069], 131070, [SKIP, 65534, SKIP]),
        ([131070], 131071, [SKIP, SKIP, 0, SKIP]),
        ([3, 65538, 65539], 200_000, [3, 65534, 0, SKIP, SKIP, SKIP, SKIP]),
        ([3, 65539, 65540], 200_000, [3, SKIP, 0, 0, SKIP, SKIP, SKIP]),
    ],
)
def test_words(index: list[int], length: int, words: list[int]) -> None:
    written = sparse.words_of(np.array(index, np.int64), length)
    np.testing.assert_array_equal(written, words)
    np.testing.assert_array_equal(sparse.indices_of(written, length, len(index)), index)


@EACH_SPARSE
def test_what_is_selected_is_what_is_decoded(codec: str) -> None:
    """As many elements as the ratio says and no smaller ones; each is its rounded self, every other +0."""
    c, size = SPARSE_CODECS[codec], 5000
    packets = reference.cut([(0, size)], c.group)
    x = cases.contents("normal", 3, size, FP32)
    data, _ = reference.encode(x, packets, c, FP32)
    out = decoded(data, packets, c, FP32, size)
    held = np.zeros(size, np.uint32) + 7
    reference.clear(data, packets, c, FP32, held)
    assert (held == 0).sum() == -(-size * c.ratio.numerator // c.ratio.denominator)
    magnitude = np.abs(x.view(np.float32))
    assert magnitude[held == 0].min() >= magnitude[held == 7].max(initial=0)
    rounded = reference.to_float(reference.from_float(x.view(np.float32), c.value_type), c.value_type)
    np.testing.assert_array_equal(out.view(np.uint32), np.where(held == 0, rounded, np.float32(0)).view(np.uint32))


def test_a_sum_is_taken_in_the_order_of_the_ranks() -> None:
    """(2^24 + 1) + 1 is 2^24, (1 + 1) + 2^24 is not; an element that one rank alone holds is its value times the
    factor, and -0 + 0 is +0."""
    c = reference.topk(Fraction(2, 3))
    (packet,) = reference.cut([(0, 3)], c.group)
    ranks = [[2.0**24, 3, 0], [1, 0, -0.5], [1, -0.0, -0.0]]
    data = [reference.encode(np.array(each, np.float32).view(np.uint32), [packet], c, FP32)[0][0] for each in ranks]
    sums = []
    for order in (data, data[::-1]):
        output = np.zeros(3, np.uint32)
        reference.reduce(order, 0.5, packet, c, FP32, output)
        sums.append(output.view(np.float32).tolist())
    assert sums == [[2.0**23, 1.5, -0.25], [2.0**23 + 1, 1.5, -0.25]]


def test_residuals_where_values_are_not_finite_stay() -> None:
    """Selected or not; of the other elements v, or what rounding takes from it."""
    c = reference.topk(Fraction(2, 5), BF16)
    packets = reference.cut([(0, 5)], c.group)
    x = np.array([np.inf, 1, np.nan, -np.inf, 2], np.float32)
    before = np.full(32, 0.25, np.float32)
    data, after = reference.encode(x.view(np.uint32), packets, c, FP32, residual=before)
    assert after is not None
    np.testing.assert_array_equal(decoded(data, packets, c, FP32, 5), [np.inf, 0, np.nan, 0, 0])
    np.testing.assert_array_equal(after, [0.25, 1.25, 0.25, 0.25, 2.25] + [0.25] * 27)


def test_collective_seeds_differ_by_rank_stage_and_bucket() -> None:
    seeds = {
        reference.collective_seed(base, bucket, rank, stage)
        for base in range(3)
        for bucket in range(5)
        for rank in range(8)
        for stage in range(2)
    }
    assert len(seeds) == 3 * 5 * 8 * 2
