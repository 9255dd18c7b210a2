"""What every codec is: an immutable value with a spelling."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from fractions import Fraction

import torch
from torch import Tensor

from smallreduce._layout import BLOCK, ELEMENT_TYPES, Format

__all__ = ["Codec", "PacketCodec", "align16", "as_int", "check_elements", "check_group", "fraction_of"]

HEADER_NBYTES = 16
_MAX_GROUP = 32 * 65535


def align16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def as_int(value: object, name: str) -> int:
    """``value``, or TypeError unless it is an integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return operator.index(value)


def check_group(group: int) -> None:
    if isinstance(group, bool) or not isinstance(group, int):
        raise TypeError(f"group must be an int, got {type(group).__name__}")
    if group % BLOCK or not BLOCK <= group <= _MAX_GROUP:
        raise ValueError(f"group must be a multiple of {BLOCK} from {BLOCK} to {_MAX_GROUP}, got {group}")


def fraction_of(ratio: float) -> Fraction:
    """A ratio as the nearest fraction whose denominator is at most 10^9, so that every backend counts alike.

    Raises:
        TypeError: Not a number.
        ValueError: Not from 1e-9 to 1.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a float, got {type(ratio).__name__}")
    if not 1e-9 <= ratio <= 1:
        raise ValueError(f"ratio must be from 1e-9 to 1, got {ratio}")
    return _nearest_fraction(float(ratio))


@functools.lru_cache(maxsize=256)
def _nearest_fraction(ratio: float) -> Fraction:
    return Fraction(str(ratio)).limit_denominator(10**9)


def check_elements(x: Tensor, name: str) -> None:
    """Raises TypeError unless ``x`` is a dense tensor of a dtype that codecs take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in ELEMENT_TYPES:
        accepted = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
        raise TypeError(f"{name} must be of {accepted}, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


class Codec(ABC):
    """How a tensor is made smaller: an immutable value. See :class:`PacketCodec` for those that make packets."""

    @property
    @abstractmethod
    def spelling(self) -> str:
        """The short form that :func:`codec` parses back, such as ``"int4:group=64"``; also ``str()`` of the codec."""

    @property
    @abstractmethod
    def bits_per_element(self) -> float:
        """Bits on the wire for each element of a long tensor, headers left out."""

    def with_feedback(self) -> Codec:
        """The codec to be used where error feedback makes up for what it loses; most often itself."""
        return self

    def __str__(self) -> str:
        return self.spelling


class PacketCodec(Codec):
    """A codec that turns a tensor into a packet: one contiguous uint8 buffer whose size is known beforehand.

    See :class:`IntQuant`, :class:`Sign`, :class:`Cast` and :class:`TopK`. The formats are defined, to the bit, in
    docs/wire-formats.md.
    """

    @property
    @abstractmethod
    def format(self) -> Format:
        """What the kernels need to know of the codec."""

    @abstractmethod
    def packet_nbytes(self, numel: int) -> int:
        """Size in bytes of the packet of a flat tensor of ``numel`` elements."""

    def with_feedback(self) -> PacketCodec:
        return self


def check_numel(numel: int) -> int:
    """``numel`` as an int, or TypeError or ValueError if it is no number of elements."""
    numel = as_int(numel, "numel")
    if numel < 0:
        raise ValueError(f"numel must not be negative, got {numel}")
    return numel


def dense_nbytes(numel: int, code_bits: int, groups: int) -> int:
    """Size of a packet that holds a code for every element and a bf16 scale for every group."""
    blocks = -(-numel // BLOCK)
    return HEADER_NBYTES + align16(2 * groups) + align16(BLOCK // 8 * code_bits * blocks)
