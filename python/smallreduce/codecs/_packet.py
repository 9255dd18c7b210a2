"""One tensor into one packet, and back."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import ELEMENT_TYPES, Format, Layout
from smallreduce.codecs._cast import Cast
from smallreduce.codecs._codec import Codec, PacketCodec, as_int, check_elements, check_numel
from smallreduce.codecs._spelling import codec as parse

__all__ = ["decode", "encode"]


@functools.lru_cache(maxsize=256)
def _flat_layout(numel: int, format: Format, dtype: torch.dtype) -> Layout:
    return Layout.build([(0, numel)], format, dtype)


def _codec_for(spelling: str | Codec | None, dtype: torch.dtype) -> PacketCodec:
    # No compression is the cast to the type that the data have.
    chosen = Cast(dtype) if spelling is None else parse(spelling)
    if not isinstance(chosen, PacketCodec):
        raise TypeError(f"{chosen} makes no packets: it is for all_reduce, the DDP hook and the optimizers")
    return chosen


def encode(x: Tensor, codec: str | Codec | None, seed: int = 0, out: Tensor | None = None) -> Tensor:
    """Compresses a tensor into one packet.

    Args:
        x: fp32, bf16 or fp16, of any shape, taken in row-major order (a tensor that is not contiguous is copied).
        codec: A codec or its spelling; None sends the elements as they are.
        seed: Any 64-bit integer; selects the random bits of stochastic rounding.
        out: Where to put the packet: contiguous uint8 of ``codec.packet_nbytes(x.numel())`` bytes, on ``x``'s device.

    Returns:
        The packet, 1-D uint8: the same bytes on every device and instruction set.

    Raises:
        TypeError: Wrong types or dtypes.
        ValueError: Wrong sizes or devices, or an impossible codec.
    """
    check_elements(x, "x")
    seed = as_int(seed, "seed")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    layout = _flat_layout(x.numel(), _codec_for(codec, x.dtype).format, x.dtype)
    nbytes = layout.stride
    if out is None:
        out = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
    elif out.dtype == torch.uint8 and out.numel() != nbytes:
        raise ValueError(f"out must have {nbytes} bytes for {x.numel()} elements, got {out.numel()}")
    ops.encode(x.detach().contiguous().view(-1), layout, out, seed=seed)
    return out


def decode(
    packet: Tensor, codec: str | Codec | None, numel: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Decompresses what :func:`encode` made.

    On CUDA this waits for the device, to be able to refuse a packet; inside a captured graph it does not, and a wrong
    packet leaves ``out`` as it was.

    Args:
        packet: 1-D uint8.
        codec, numel, dtype: Those that it was encoded with; dtype is that of the elements.
        out: Where to put the elements: contiguous, ``numel`` elements of ``dtype``, any shape, on the packet's device.

    Returns:
        The elements, 1-D (``out``, where it was given).

    Raises:
        TypeError: Wrong types or dtypes.
        ValueError: Wrong sizes or devices, or a packet of another codec, size or dtype; nothing has been written.
    """
    if not isinstance(packet, Tensor):
        raise TypeError(f"packet must be a tensor, got {type(packet).__name__}")
    if dtype not in ELEMENT_TYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, ELEMENT_TYPES))}, got {dtype}")
    if out is not None and not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    numel = check_numel(numel)
    chosen = _codec_for(codec, dtype)
    layout = _flat_layout(numel, chosen.format, dtype)
    if packet.dtype == torch.uint8 and packet.numel() != layout.stride:
        raise ValueError(
            f"a packet of {numel} elements of {dtype} in {chosen} has {layout.stride} bytes, got {packet.numel()}"
        )
    if out is None:
        out = torch.empty(numel, dtype=dtype, device=packet.device)
    elif out.dtype == dtype and out.numel() != numel:
        raise ValueError(f"out must have {numel} elements, got {out.numel()}")
    if packet.device.type != "cuda":
        ops.decode(packet.contiguous(), layout, out)
        return out
    error = torch.zeros(1, dtype=torch.int32, device=packet.device)
    ops.decode(packet.contiguous(), layout, out, error)
    if not torch.cuda.is_current_stream_capturing() and error.item():
        raise ValueError(f"the packet is not one of {numel} elements of {dtype} in {chosen}")
    return out
