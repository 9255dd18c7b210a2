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
]
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
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 31, 32, 33, 127, 128, 129, 1025, 5000]


@pytest.mark.parametrize(("codec", "spelling"), list(zip(CODECS, SPELLINGS, strict=True)), ids=SPELLINGS)
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
    for other in (sr.Sign(), sr.Cast(torch.bfloat16)):
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
    ],
)
def test_impossible_codec(make: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_packet_size(codec: sr.Codec) -> None:
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
def test_encode_and_decode(codec: sr.Codec | None, dtype: torch.dtype) -> None:
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
        elif numel:
            # A step of int2 is the largest magnitude of a group, and no codec errs by more than one step and a rounding
            # of the scale (1/128) and of the result; Sign by less than the largest magnitude and the mean together.
            limit = 2.02 * x.abs().max().float() * (6**0.5 if codec.format.hadamard else 1)
            assert (x.float() - y.float()).abs().max() < limit


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
