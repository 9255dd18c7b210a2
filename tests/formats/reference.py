"""The wire formats of ``docs/wire-formats.md``, a second time: NumPy, written from that page alone.

The kernels are compared with this package bit for bit, so it shares nothing with them and favours the words of the page
over speed. Buffers are arrays of bit patterns (``uint32`` or ``uint16``), which keeps NaN payloads and signed zeros
visible. Every operation acts on ``float32`` arrays and is therefore rounded on its own. The calling thread must not
flush denormals.

This module is its face: encoding, decoding and reducing in any codec.
"""

from __future__ import annotations

from collections.abc import Sequence

from formats import dense, sparse
from formats.conversions import (
    BF16,
    BUFFER_TYPES,
    CAST_TYPES,
    E4M3,
    E5M2,
    F32,
    FP16,
    FP32,
    Bits,
    ElementType,
    from_float,
    to_float,
)
from formats.dense import collective_seed, decode_add, encode_difference, random_bits, transform
from formats.packets import (
    BLOCK,
    HEADER_NBYTES,
    Codec,
    Packet,
    Segment,
    assemble,
    cast,
    cut,
    header,
    int_quant,
    mix64,
    sections,
    sign,
    tag,
    topk,
)
from formats.sparse import clear

__all__ = [
    "BF16", "BLOCK", "BUFFER_TYPES", "Bits", "CAST_TYPES", "Codec", "E4M3", "E5M2", "ElementType", "F32", "FP16",
    "FP32", "HEADER_NBYTES", "Packet", "Segment", "assemble", "cast", "clear", "collective_seed", "cut", "decode",
    "decode_add", "encode", "encode_difference", "from_float", "header", "int_quant", "mix64", "random_bits",
    "reduce", "reduce_encode", "sections", "sign", "tag", "to_float", "topk", "transform",
]  # fmt: skip


def encode(
    buffer: Bits,
    packets: Sequence[Packet],
    codec: Codec,
    element: ElementType,
    *,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    residual: F32 | None = None,
) -> tuple[list[bytes], F32 | None]:
    """Encode every packet; returns them and the new residual (None without one), fp32, 32 elements for each block."""
    if codec.is_sparse:
        return sparse.encode(buffer, packets, codec, element, residual=residual)
    return dense.encode(buffer, packets, codec, element, stochastic=stochastic, seed=seed, step=step, residual=residual)


def decode(data: Sequence[bytes], packets: Sequence[Packet], codec: Codec, element: ElementType, output: Bits) -> None:
    """Write the elements of every packet to `output`; everything between the segments stays as it is.

    ValueError if a packet is another's; nothing is written then.
    """
    (sparse if codec.is_sparse else dense).decode(data, packets, codec, element, output)


def reduce(
    data: Sequence[bytes], factor: float, packet: Packet, codec: Codec, element: ElementType, output: Bits
) -> None:
    """Add the packets of all ranks, each times `factor`, and write the sum to `output`."""
    (sparse if codec.is_sparse else dense).reduce(data, factor, packet, codec, element, output)


def reduce_encode(
    data: Sequence[bytes],
    factor: float,
    packet: Packet,
    codec: Codec,
    element: ElementType,
    *,
    into: tuple[Packet, Codec] | None = None,
    stochastic: bool = False,
    seed: int = 0,
    step: int = 0,
    residual: F32 | None = None,
) -> tuple[bytes, F32 | None]:
    """Add the packets of all ranks and encode the sum, in the format `into` where that is another (no TopK); the
    residual is in the order of the packet's blocks."""
    if codec.is_sparse:
        return sparse.reduce_encode(data, factor, packet, codec, element, residual=residual)
    return dense.reduce_encode(
        data, factor, packet, codec, element, into=into, stochastic=stochastic, seed=seed, step=step, residual=residual
    )
