"""The kernels on a :class:`~smallreduce._layout.Layout`: what the layers above call.

These are the operators ``torch.ops.smallreduce``, on CPU and CUDA, with the tables of a layout put in and the scratch
memory that sparse formats need. Each writes into tensors that the caller owns and returns nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smallreduce._layout import ELEMENT_TYPES, Layout
from smallreduce._native import native
from smallreduce._operators import SEED_MASK, require_cuda

__all__ = ["clear", "decode", "decode_add", "encode", "encode_difference", "encode_rounded", "reduce", "reduce_encode"]


def _signed(seed: int) -> int:
    # Operators take signed 64-bit integers; a seed is any 64 bits.
    seed &= SEED_MASK
    return seed - (1 << 64) if seed >> 63 else seed


def _check_stride(stride: int, layout: Layout) -> None:
    # The CUDA kernels cannot: the tables are on the device.
    if stride < layout.stride:
        raise ValueError(f"stride must be at least the packet's {layout.stride} bytes, got {stride}")


def _scratch_for(layout: Layout, device: torch.device, ranks: int = 1) -> Tensor | None:
    if device.type == "cuda":
        require_cuda()
    nbytes = layout.scratch_nbytes(device, ranks)
    return torch.empty(nbytes, dtype=torch.uint8, device=device) if nbytes else None


def _check_dtype(tensor: Tensor, layout: Layout) -> None:
    if tensor.dtype != layout.dtype:
        raise TypeError(f"the layout is for {layout.dtype}, got a tensor of {tensor.dtype}")


def _check_dense(layout: Layout, what: str) -> None:
    if layout.format.is_sparse:
        raise ValueError(f"{_describe(layout)}: packets of a sparse codec {what}; use one that sends every element")


def _describe(layout: Layout) -> str:
    kind, group, hadamard, _, _ = layout.format
    return native.describe_format(kind, group, hadamard, ELEMENT_TYPES[layout.dtype])


def _check_into(layout: Layout, into: Layout) -> None:
    """That packets of ``layout`` can be summed into one of ``into``."""
    if into is layout:
        return
    both = f"packets of {_describe(layout)} cannot be summed into one of {_describe(into)}"
    if layout.format.is_sparse or into.format.is_sparse:
        raise ValueError(f"{both}: where the formats differ, both must send every element")
    if layout.format.hadamard != into.format.hadamard:
        raise ValueError(f"{both}: both must have the Hadamard transform, or neither")
    if layout.dtype != into.dtype:
        raise TypeError(f"{both}: the dtypes differ")
    if not into.has_blocks_of(layout):
        raise ValueError(f"{both}: the layouts have different segments, or cut them elsewhere")


def encode(
    input: Tensor,
    layout: Layout,
    packets: Tensor,
    residual: Tensor | None = None,
    seed: int = 0,
    step: Tensor | None = None,
) -> None:
    """Encodes the segments of ``input`` into ``packets``, ``layout.stride`` bytes apart.

    Args:
        input: Contiguous, of ``layout.dtype``.
        packets: Contiguous uint8, at least ``layout.packet_count * layout.stride``.
        residual: fp32 in block order by origin (``32 * layout.origin_end`` at least): added first, and replaced by
            what the packets lose.
        seed: Any 64-bit integer.
        step: int64, one element, on the device of the data (read by the kernel, so that a captured graph sees it
            advance); None is step 0.
    """
    _check_dtype(input, layout)
    segments, table = layout.on(input.device)
    kind, group, hadamard, stochastic, _ = layout.format
    torch.ops.smallreduce.encode(
        input, residual, segments, table, kind, group, hadamard, stochastic, layout.extent, layout.origin_end,
        _signed(seed), step, packets, layout.stride, _scratch_for(layout, input.device),
    )  # fmt: skip


def encode_rounded(
    input: Tensor,
    layout: Layout,
    packets: Tensor,
    seed: int = 0,
    step: Tensor | None = None,
) -> None:
    """Encodes an fp32 ``input``, cast to ``layout.dtype``, into ``packets``, ``layout.stride`` bytes apart.

    The packets are those that :func:`encode` makes of ``input.to(layout.dtype)``, to the bit, without that buffer: a
    finite value that torch's cast makes Inf is Inf here too. For a shard kept in fp32 and gathered in the dtype in
    which it is computed with.

    Args:
        input: Contiguous, fp32, indexed by the segments of ``layout``.
        layout: Of a codec that sends every element. With an fp32 ``layout.dtype`` this is :func:`encode`.
        packets, seed, step: As for :func:`encode`.
    """
    _check_dense(layout, "cannot be made of rounded elements")
    segments, table = layout.on(input.device)
    kind, group, hadamard, stochastic, _ = layout.format
    torch.ops.smallreduce.encode_rounded(
        input, segments, table, kind, group, hadamard, stochastic, layout.extent, _signed(seed), step, packets,
        layout.stride, ELEMENT_TYPES[layout.dtype],
    )  # fmt: skip


def encode_difference(
    minuend: Tensor,
    subtrahend: Tensor,
    layout: Layout,
    packets: Tensor,
    seed: int = 0,
    step: Tensor | None = None,
) -> None:
    """Encodes ``minuend - subtrahend``, subtracted in fp32, into ``packets``, ``layout.stride`` bytes apart.

    Every code and scale is what :func:`encode` would make of the fp32 buffer of the differences. What the packets say
    of their buffer is ``layout.dtype``: they are for :func:`decode_add` to one of that type. Weight differences, as
    SDP4Bit sends them (arXiv:2410.15526, Algorithm 2).

    Args:
        minuend: Contiguous, fp32.
        subtrahend: Contiguous, of ``layout.dtype``. Both are indexed by the segments of ``layout``.
        layout: Of a codec that sends every element.
        packets, seed, step: As for :func:`encode`.
    """
    _check_dense(layout, "cannot hold a difference")
    _check_dtype(subtrahend, layout)
    segments, table = layout.on(subtrahend.device)
    kind, group, hadamard, stochastic, _ = layout.format
    torch.ops.smallreduce.encode_difference(
        minuend, subtrahend, segments, table, kind, group, hadamard, stochastic, layout.extent, _signed(seed), step,
        packets, layout.stride,
    )  # fmt: skip


def decode(packets: Tensor, layout: Layout, output: Tensor, error: Tensor | None = None) -> None:
    """Decodes ``packets``, ``layout.stride`` bytes apart, into the segments of ``output``.

    On the CPU a packet whose tag or digest is not the layout's raises ValueError before anything is written. On CUDA
    ``error`` (int32, one element) receives one more than the number of the first such packet.
    """
    _check_dtype(output, layout)
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.decode(
        packets, layout.stride, segments, table, kind, group, hadamard, layout.extent, output, error,
        _scratch_for(layout, packets.device),
    )  # fmt: skip


def decode_add(packets: Tensor, layout: Layout, output: Tensor, error: Tensor | None = None) -> None:
    """As :func:`decode`, but adds what it decodes, in fp32, to what the segments of ``output`` hold.

    The sum is rounded to ``layout.dtype`` once; that of two finite values saturates. A codec that sends every element.
    """
    _check_dense(layout, "cannot be added")
    _check_dtype(output, layout)
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.decode_add(
        packets, layout.stride, segments, table, kind, group, hadamard, layout.extent, output, error
    )


def clear(packets: Tensor, layout: Layout, output: Tensor, error: Tensor | None = None) -> None:
    """Sets to zero the elements of ``output`` that sparse ``packets``, ``layout.stride`` bytes apart, hold.

    ``output`` may be of any dtype that codecs take. Packets are refused as by :func:`decode`.
    """
    if not layout.format.is_sparse:
        raise ValueError("only sparse packets name elements")
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.clear(
        packets, layout.stride, segments, table, kind, group, hadamard, ELEMENT_TYPES[layout.dtype], layout.extent,
        output, error, _scratch_for(layout, packets.device),
    )  # fmt: skip


def reduce(
    packets: Tensor,
    stride: int,
    ranks: int,
    factor: float,
    layout: Layout,
    output: Tensor,
    error: Tensor | None = None,
) -> None:
    """Decodes the packets of ``ranks`` ranks, ``stride`` bytes apart, all of the one packet of ``layout``; writes their
    sum in rank order times ``factor`` into the segments of ``output``."""
    _check_dtype(output, layout)
    _check_stride(stride, layout)
    segments, table = layout.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.reduce(
        packets, stride, ranks, factor, segments, table, kind, group, hadamard, layout.extent, output, error,
        _scratch_for(layout, packets.device, ranks),
    )  # fmt: skip


def reduce_encode(
    packets: Tensor,
    stride: int,
    ranks: int,
    factor: float,
    layout: Layout,
    packet: Tensor,
    residual: Tensor | None = None,
    seed: int = 0,
    step: Tensor | None = None,
    error: Tensor | None = None,
    into: Layout | None = None,
) -> None:
    """As :func:`reduce`, but encodes the sum again into ``packet`` (``into.nbytes[0]`` bytes at least).

    ``into`` is the layout of the packet written, None for that of the packets read. They may differ in kind, among the
    codecs that send every element, in group and in rounding; the segments are the same, and either both have the
    Hadamard transform, in whose domain the sum stays, or neither. ``residual`` is fp32 in the order of the packet's
    blocks (``32 * layout.blocks``), in the codec's domain.
    """
    _check_stride(stride, layout)
    into = layout if into is None else into
    _check_into(layout, into)
    segments, table = layout.on(packets.device)
    into_segments, into_table = into.on(packets.device)
    kind, group, hadamard, _, _ = layout.format
    torch.ops.smallreduce.reduce_encode(
        packets, stride, ranks, factor, segments, table, kind, group, hadamard, into_segments, into_table,
        into.format.kind, into.format.group, into.format.hadamard, into.format.stochastic, residual, into.blocks,
        _signed(seed), step, packet, into.stride, ELEMENT_TYPES[layout.dtype], error,
        _scratch_for(layout, packets.device, ranks),
    )  # fmt: skip
