"""Codecs as values: validation, sizes, spellings, and encode/decode of one tensor."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch

import smallreduce as sr
from smallreduce._layout import Layout

CODECS = [
    sr.IntQuant(8),
    sr.IntQuant(4, group=64, rounding="nearest"),
    sr.IntQuant(2, group=32),
    sr.IntQuant(4, hadamard=True),
    sr.IntQuant(8, group=2097120, rounding="nearest", hadamard=True),
    sr.Sign(),
    sr.Sign(group=512),
    sr.Cast(torch.float32),
    sr.Cast(torch.bfloat16),
    sr.Cast(torch.float16),
    sr.Cast(torch.float8_e4m3fn),
    sr.Cast(torch.float8_e5m2),
    sr.TopK(0.001),
    sr.TopK(1e-9),
    sr.TopK(1),
    sr.TopK(0.07, torch.bfloat16),
    sr.TopK(1 / 3, values=torch.float16),
]
WITHOUT_PACKETS = [sr.RandomBlocks(0.01), sr.RandomBlocks(0.25, block=4096)]
SPELLINGS = [
    "int8",
    "int4:group=64,rounding=nearest",
    "int2:group=32",
    "int4-hadamard",
    "int8-hadamard:group=2097120,rounding=nearest",
    "sign",
    "sign:group=512",
    "fp32",
    "bf16",
    "fp16",
    "fp8-e4m3",
    "fp8-e5m2",
    "topk:0.001",
    "topk:1e-09",
    "topk:1.0",
    "topk:0.07,values=bf16",
    "topk:0.3333333333333333,values=fp16",
    "random-blocks:0.01",
    "random-blocks:0.25,block=4096",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 31, 32, 33, 127, 128, 129, 1025, 5000]


@pytest.mark.parametrize(
    ("codec", "spelling"), list(zip([*CODECS, *WITHOUT_PACKETS], SPELLINGS, strict=True)), ids=SPELLINGS
)
def test_spelling(codec: sr.Codec, spelling: str) -> None:
    assert str(codec) == spelling
    assert sr.codec(spelling) == codec
    assert sr.codec(codec) is codec
    assert hash(sr.codec(spelling)) == hash(codec)
    assert pickle.loads(pickle.dumps(codec)) == codec


def test_rounding_left_open_is_stochastic_until_feedback_repays_a_bias() -> None:
    for bits, hadamard in itertools.product((8, 4, 2), (False, True)):
        left_open, nearest, stochastic = (
            sr.IntQuant(bits, 64, rounding, hadamard) for rounding in (None, "nearest", "stochastic")
        )
        assert left_open.format == stochastic.format != nearest.format
        assert left_open.with_feedback() == nearest.with_feedback() == nearest
        assert stochastic.with_feedback() == stochastic
    for other in (sr.Sign(), sr.Cast(torch.bfloat16), sr.TopK(0.01), sr.RandomBlocks(0.01)):
        assert other.with_feedback() == other


def test_no_codec() -> None:
    assert sr.codec(None) is None


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("int3", "known are int8"),
        ("", "known are int8"),
        ("int4:", "key=value"),
        ("int4:group", "key=value"),
        ("int4:group=", "key=value"),
        ("int4:group=x", "whole number"),
        ("int4:group=-32", "whole number"),
        ("int4:group=33", "multiple of 32"),
        ("int4:group=64,group=64", "twice"),
        ("int4:rounding=up", "'stochastic', 'nearest' or None"),
        ("int4:ratio=1", "group and rounding"),
        ("sign:rounding=nearest", "takes group"),
        ("sign-hadamard", "known are"),
        ("bf16:group=32", "no options"),
        ("topk", "must begin with its ratio, as in 'topk:0.001', got ''"),
        ("topk:", "must begin with its ratio"),
        ("topk:values=bf16", "must begin with its ratio"),
        ("topk:0", "from 1e-9 to 1, got 0.0"),
        ("topk:1.5", "from 1e-9 to 1, got 1.5"),
        ("topk:-0.1", "from 1e-9 to 1"),
        ("topk:nan", "from 1e-9 to 1, got nan"),
        ("topk:inf", "from 1e-9 to 1, got inf"),
        ("topk:0.1,values=int8", "fp32, bf16, fp16, got 'int8'"),
        ("topk:0.1,block=3", "takes values"),
        ("topk:0.1,0.1", "key=value"),
        ("random-blocks", "as in 'random-blocks:0.001'"),
        ("random-blocks:2", "from 1e-9 to 1, got 2.0"),
        ("random-blocks:0.1,values=bf16", "takes block"),
        ("random-blocks:0.1,block=0", "at least 1, got 0"),
        ("random-blocks:0.1,block=1.5", "whole number"),
    ],
)
def test_impossible_spelling(spelling: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sr.codec(spelling)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: sr.IntQuant(3), ValueError),  # type: ignore[arg-type]
        (lambda: sr.IntQuant(4.0), TypeError),  # type: ignore[arg-type]
        (lambda: sr.IntQuant(True), TypeError),
        (lambda: sr.IntQuant(4, group=0), ValueError),
        (lambda: sr.IntQuant(4, group=48), ValueError),
        (lambda: sr.IntQuant(4, group=2097152), ValueError),
        (lambda: sr.IntQuant(4, group=64.0), TypeError),  # type: ignore[arg-type]
        (lambda: sr.IntQuant(4, rounding="up"), ValueError),  # type: ignore[arg-type]
        (lambda: sr.IntQuant(4, hadamard=1), TypeError),  # type: ignore[arg-type]
        (lambda: sr.Sign(group=31), ValueError),
        (lambda: sr.Sign(group="32"), TypeError),  # type: ignore[arg-type]
        (lambda: sr.Cast(torch.int8), TypeError),
        (lambda: sr.Cast("bf16"), TypeError),  # type: ignore[arg-type]
        (lambda: sr.codec(4), TypeError),  # type: ignore[arg-type]
        (lambda: sr.TopK(0), ValueError),
        (lambda: sr.TopK(1.01), ValueError),
        (lambda: sr.TopK(float("nan")), ValueError),
        (lambda: sr.TopK(9e-10), ValueError),
        (lambda: sr.TopK("0.1"), TypeError),  # type: ignore[arg-type]
        (lambda: sr.TopK(True), TypeError),
        (lambda: sr.TopK(0.1, values=torch.float8_e5m2), TypeError),
        (lambda: sr.TopK(0.1, values="bf16"), TypeError),  # type: ignore[arg-type]
        (lambda: sr.TopK(0.1).packet_nbytes(2.0), TypeError),  # type: ignore[arg-type]
        (lambda: sr.TopK(0.1).kept(-1), ValueError),
        (lambda: sr.RandomBlocks(0), ValueError),
        (lambda: sr.RandomBlocks(None), TypeError),  # type: ignore[arg-type]
        (lambda: sr.RandomBlocks(0.1, block=0), ValueError),
        (lambda: sr.RandomBlocks(0.1, block=2.0), TypeError),  # type: ignore[arg-type]
    ],
)
def test_impossible_codec(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_packet_size(codec: sr.PacketCodec) -> None:
    for numel in [*SIZES, 1_000_003]:
        assert Layout.build([(0, numel)], codec.format, torch.float32).nbytes == (codec.packet_nbytes(numel),)
    numel = 2**27
    assert abs(codec.packet_nbytes(numel) * 8 / numel - codec.bits_per_element) < 0.01
    with pytest.raises(ValueError, match="negative"):
        codec.packet_nbytes(-1)
    with pytest.raises(TypeError, match="numel must be an int, got float"):
        codec.packet_nbytes(33.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codec", [*CODECS, None], ids=str)
def test_encode_and_decode(codec: sr.PacketCodec | None, dtype: torch.dtype) -> None:
    for numel in SIZES:
        x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
        packet = sr.encode(x, codec, seed=1)
        assert packet.dtype == torch.uint8
        assert packet.dim() == 1
        assert torch.equal(sr.encode(x, codec, seed=1), packet)
        y = sr.decode(packet, codec, numel, dtype)
        assert y.shape == (numel,)
        assert y.dtype == dtype
        if codec is None or codec == sr.Cast(dtype) or codec == sr.Cast(torch.float32):
            assert torch.equal(x, y)
        elif isinstance(codec, sr.TopK):
            assert_top_k(x, y, codec)
        elif numel:
            # A step of int2 is the largest magnitude of a group, and no codec errs by more than one step and a rounding
            # of the scale (1/128) and of the result; Sign by less than the largest magnitude and the mean together.
            limit = 2.02 * x.abs().max().float() * (6**0.5 if codec.format.hadamard else 1)
            assert (x.float() - y.float()).abs().max() < limit


def assert_top_k(x: torch.Tensor, y: torch.Tensor, codec: sr.TopK) -> None:
    """``y`` holds the largest elements of ``x``, as the codec's type of values gives them, and zeros."""
    kept = y.nonzero().view(-1)
    assert len(kept) == codec.kept(x.numel())  # normally distributed: none is zero, or becomes zero
    assert torch.equal(y[kept], x[kept].to(codec.values).to(x.dtype))
    left = x.clone()
    left[kept] = 0
    assert x.numel() == 0 or x[kept].abs().min() >= left.abs().max()


def test_how_many_are_kept() -> None:
    """ceil(ratio * numel), of the ratio as it is written: 0.07 · 100 is more than 7 in binary floating point."""
    for ratio, numel, kept in (
        (0.07, 100, 7), (0.07, 101, 8), (0.001, 1000, 1), (0.001, 1001, 2), (0.001, 1, 1), (1e-9, 10**9, 1),
        (1e-9, 10**9 + 1, 2), (1 / 3, 3, 1), (1 / 3, 300_000_000, 100_000_000), (1, 7, 7), (1.0, 0, 0), (0.5, 0, 0),
    ):  # fmt: skip
        assert sr.TopK(ratio).kept(numel) == kept


def test_packets_tell_how_many_values_they_have_not_the_ratio() -> None:
    x = torch.randn(1000)
    packet = sr.encode(x, "topk:0.1")
    assert torch.equal(sr.encode(x, "topk:0.0999"), packet)
    assert torch.equal(sr.decode(packet, "topk:0.0999", 1000, x.dtype), sr.decode(packet, "topk:0.1", 1000, x.dtype))


def test_a_ratio_is_a_number() -> None:
    assert sr.TopK(1) == sr.TopK(1.0)
    assert hash(sr.TopK(1)) == hash(sr.TopK(1.0))
    assert sr.TopK(0.1) != sr.TopK(0.1, torch.bfloat16)
    assert sr.RandomBlocks(0.1) != sr.TopK(0.1)


def test_ties_zeros_and_what_is_not_finite() -> None:
    x = torch.tensor([0.0, -1, 1, float("nan"), 0, -float("inf"), 1, -1])
    expected = {0.125: [3], 0.25: [3, 5], 0.5: [1, 2, 3, 5], 0.7: [1, 2, 3, 5, 6, 7]}
    for ratio, kept in expected.items():
        y = sr.decode(sr.encode(x, sr.TopK(ratio)), sr.TopK(ratio), 8, torch.float32)
        wanted = torch.zeros(8)
        wanted[kept] = x[kept]
        assert torch.equal(y.nan_to_num(nan=9.0), wanted.nan_to_num(nan=9.0))


@pytest.mark.parametrize("codec", WITHOUT_PACKETS, ids=str)
def test_a_codec_without_packets(codec: sr.Codec) -> None:
    assert not isinstance(codec, sr.PacketCodec)
    with pytest.raises(TypeError, match=f"{codec} makes no packets: it is for all_reduce"):
        sr.encode(torch.zeros(10), codec)
    with pytest.raises(TypeError, match=f"{codec} makes no packets: it is for all_reduce"):
        sr.decode(torch.zeros(16, dtype=torch.uint8), str(codec), 10, torch.float32)


def test_shapes_and_out() -> None:
    x = torch.randn(6, 50)
    flat = sr.encode(x.reshape(-1), "int8", seed=3)
    assert torch.equal(sr.encode(x, "int8", seed=3), flat)
    assert torch.equal(sr.encode(x.t().contiguous().t(), "int8", seed=3), flat)
    out = torch.empty(sr.IntQuant(8).packet_nbytes(300), dtype=torch.uint8)
    assert sr.encode(torch.nn.Parameter(x), "int8", seed=3, out=out) is out
    assert torch.equal(out, flat)
    into = torch.empty(3, 100)
    assert sr.decode(flat, "int8", 300, torch.float32, out=into) is into
    assert torch.equal(into.view(-1), sr.decode(flat, "int8", 300, torch.float32))
    twice = torch.stack([flat, flat], dim=1)[:, 0]
    assert torch.equal(sr.decode(twice, "int8", 300, torch.float32), into.view(-1))


def test_seeds_are_any_64_bits() -> None:
    x = torch.randn(500)
    assert torch.equal(sr.encode(x, "int4", seed=-1), sr.encode(x, "int4", seed=2**64 - 1))
    assert torch.equal(sr.encode(x, "int4", seed=-(2**63)), sr.encode(x, "int4", seed=2**63))
    assert not torch.equal(sr.encode(x, "int4", seed=0), sr.encode(x, "int4", seed=1))
    assert torch.equal(sr.encode(x, "topk:0.1", seed=0), sr.encode(x, "topk:0.1", seed=1))
