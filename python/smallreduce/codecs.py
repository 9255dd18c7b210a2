"""Codecs: what a wire format is, how many bytes it takes, and how it is spelled.

A codec is an immutable value; equal codecs make equal packets. The formats are defined, to the bit, in
docs/wire-formats.md.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import BLOCK, ELEMENT_TYPES, Format, Layout

__all__ = ["Cast", "Codec", "IntQuant", "Sign", "codec", "decode", "encode"]

_HEADER_BYTES = 16
_MAX_GROUP = 32 * 65535


def _align16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def as_int(value: object, name: str) -> int:
    """``value``, or TypeError unless it is an integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return operator.index(value)


def _check_group(group: int) -> None:
    if isinstance(group, bool) or not isinstance(group, int):
        raise TypeError(f"group must be an int, got {type(group).__name__}")
    if group % BLOCK or not BLOCK <= group <= _MAX_GROUP:
        raise ValueError(f"group must be a multiple of {BLOCK} from {BLOCK} to {_MAX_GROUP}, got {group}")


class Codec(ABC):
    """A wire format. See :class:`IntQuant`, :class:`Sign` and :class:`Cast`."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """What the kernels need to know of the codec."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits of one element's code, without its share of the scale."""

    @property
    @abstractmethod
    def spelling(self) -> str:
        """The short form that :func:`codec` parses back, such as ``"int4:group=64"``; also ``str()`` of the codec."""

    def with_feedback(self) -> Codec:
        """The codec to be used where error feedback makes up for what it loses; most often itself."""
        return self

    @property
    def bits_per_element(self) -> float:
        """Bits on the wire for each element of a long tensor: code and share of the scale, headers left out."""
        return self.code_bits + (0 if isinstance(self, Cast) else 16 / self.format.group)

    def packet_nbytes(self, numel: int) -> int:
        """Size in bytes of the packet of a flat tensor of ``numel`` elements."""
        numel = as_int(numel, "numel")
        if numel < 0:
            raise ValueError(f"numel must not be negative, got {numel}")
        groups = 0 if isinstance(self, Cast) else -(-numel // self.format.group)
        blocks = -(-numel // BLOCK)
        return _HEADER_BYTES + _align16(2 * groups) + _align16(BLOCK // 8 * self.code_bits * blocks)

    def __str__(self) -> str:
        return self.spelling


@dataclass(frozen=True)
class IntQuant(Codec):
    """Symmetric integers of 8, 4 or 2 bits with one bf16 scale for each group of elements.

    Args:
        bits: 8, 4 or 2.
        group: Elements that share a scale: a multiple of 32 up to 2 097 120. Smaller is more exact and larger on the
            wire: ``bits + 16 / group`` bits for each element.
        rounding: ``"stochastic"`` (unbiased), ``"nearest"`` (half the variance, and faster), or None: nearest where
            error feedback makes up for the bias, stochastic where nothing does. Packets do not tell one from the other.
        hadamard: Multiply every 32 elements by a Hadamard matrix first, which spreads an outlier over its block
            (SDP4Bit, arXiv:2410.15526, section 3.3). Sums are taken in the transformed domain.

    Raises:
        ValueError: A value that is not listed here.
        TypeError: A value of another type.
    """

    bits: Literal[8, 4, 2]
    group: int = 128
    rounding: Literal["stochastic", "nearest"] | None = None
    hadamard: bool = False

    _KINDS: ClassVar[dict[int, int]] = {2: 18, 4: 20, 8: 24}

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"bits must be an int, got {type(self.bits).__name__}")
        if self.bits not in self._KINDS:
            raise ValueError(f"bits must be 8, 4 or 2, got {self.bits}")
        _check_group(self.group)
        if self.rounding not in ("stochastic", "nearest", None):
            raise ValueError(f"rounding must be 'stochastic', 'nearest' or None, got {self.rounding!r}")
        if not isinstance(self.hadamard, bool):
            raise TypeError(f"hadamard must be a bool, got {type(self.hadamard).__name__}")

    @property
    def format(self) -> Format:
        return Format(self._KINDS[self.bits], self.group, self.hadamard, self.rounding != "nearest")

    def with_feedback(self) -> IntQuant:
        return replace(self, rounding="nearest") if self.rounding is None else self

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def spelling(self) -> str:
        options = [f"group={self.group}"] if self.group != 128 else []
        options += [f"rounding={self.rounding}"] if self.rounding is not None else []
        name = f"int{self.bits}" + ("-hadamard" if self.hadamard else "")
        return ":".join([name, ",".join(options)]) if options else name

    __str__ = Codec.__str__


@dataclass(frozen=True)
class Sign(Codec):
    """One bit for each element, and the mean magnitude of each group as bf16 (1-bit SGD and its successors).

    Biased: for training use it with error feedback.

    Args:
        group: Elements that share a scale: a multiple of 32 up to 2 097 120.

    Raises:
        ValueError, TypeError: An impossible group.
    """

    group: int = 1024

    def __post_init__(self) -> None:
        _check_group(self.group)

    @property
    def format(self) -> Format:
        return Format(8, self.group, False, False)

    @property
    def code_bits(self) -> int:
        return 1

    @property
    def spelling(self) -> str:
        return "sign" if self.group == 1024 else f"sign:group={self.group}"

    __str__ = Codec.__str__


@dataclass(frozen=True)
class Cast(Codec):
    """A narrower floating-point type, rounded to nearest even and saturating at its largest finite value.

    Args:
        dtype: torch.float32, bfloat16, float16, float8_e4m3fn or float8_e5m2. With float32 on fp32 data the
            collectives are torch's own.

    Raises:
        TypeError: ``dtype`` is none of these.
    """

    dtype: torch.dtype

    # dtype -> (kind, bits, spelling)
    _TYPES: ClassVar[dict[torch.dtype, tuple[int, int, str]]] = {
        torch.float32: (0, 32, "fp32"),
        torch.bfloat16: (1, 16, "bf16"),
        torch.float16: (2, 16, "fp16"),
        torch.float8_e4m3fn: (3, 8, "fp8-e4m3"),
        torch.float8_e5m2: (4, 8, "fp8-e5m2"),
    }

    def __post_init__(self) -> None:
        if self.dtype not in self._TYPES:
            accepted = ", ".join(str(dtype) for dtype in self._TYPES)
            raise TypeError(f"dtype must be one of {accepted}, got {self.dtype!r}")

    @property
    def format(self) -> Format:
        # A cast has no groups on the wire; this one is only the grain in which its packets are cut.
        return Format(self._TYPES[self.dtype][0], 1024, False, False)

    @property
    def code_bits(self) -> int:
        return self._TYPES[self.dtype][1]

    @property
    def spelling(self) -> str:
        return self._TYPES[self.dtype][2]

    __str__ = Codec.__str__


# ---- spellings -----------------------------------------------------------------------------------------------------

_CASTS = {name: dtype for dtype, (_, _, name) in Cast._TYPES.items()}
_NAMES = ("int8", "int4", "int2", "int8-hadamard", "int4-hadamard", "int2-hadamard", "sign", *_CASTS)


def codec(spelling: str | Codec | None) -> Codec | None:
    """The codec that a short spelling stands for, as in command lines and configuration files.

    ``int8``, ``int4``, ``int2``, each also with ``-hadamard`` and with options (``int4:group=64,rounding=nearest``);
    ``sign``, ``sign:group=512``; ``fp32``, ``bf16``, ``fp16``, ``fp8-e4m3``, ``fp8-e5m2``.

    Args:
        spelling: The spelling; a codec and None (plain torch) are returned as they are.

    Raises:
        ValueError: An unknown name or option, or an impossible value.
        TypeError: Neither a string, a codec nor None.
    """
    if spelling is None or isinstance(spelling, Codec):
        return spelling
    if not isinstance(spelling, str):
        raise TypeError(f"a codec is a string such as 'int4', a Codec or None, got {type(spelling).__name__}")
    name, colon, rest = spelling.strip().partition(":")
    if name not in _NAMES:
        raise ValueError(f"unknown codec {spelling!r}; known are {', '.join(_NAMES)}")
    options = _options(spelling, rest.split(",")) if colon else {}
    if name in _CASTS:
        _refuse_unknown(spelling, options, ())
        return Cast(_CASTS[name])
    if name == "sign":
        _refuse_unknown(spelling, options, ("group",))
        return Sign(**_group(spelling, options))
    _refuse_unknown(spelling, options, ("group", "rounding"))
    return IntQuant(
        int(name[3]),  # type: ignore[arg-type]
        rounding=options.get("rounding"),  # type: ignore[arg-type]
        hadamard=name.endswith("-hadamard"),
        **_group(spelling, options),
    )


def _options(spelling: str, items: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"options are written key=value and separated by commas, got {item!r} in {spelling!r}")
        if key in options:
            raise ValueError(f"option {key!r} stands twice in {spelling!r}")
        options[key] = value
    return options


def _refuse_unknown(spelling: str, options: dict[str, str], accepted: tuple[str, ...]) -> None:
    for key in options:
        if key not in accepted:
            known = " and ".join(accepted) if accepted else "no options"
            raise ValueError(f"unknown option {key!r} in {spelling!r}; {spelling.split(':')[0]} takes {known}")


def _group(spelling: str, options: dict[str, str]) -> dict[str, int]:
    if "group" not in options:
        return {}
    if not options["group"].isdecimal():
        raise ValueError(f"group must be a whole number, got {options['group']!r} in {spelling!r}")
    return {"group": int(options["group"])}


# ---- one tensor ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _flat_layout(numel: int, format: Format, dtype: torch.dtype) -> Layout:
    return Layout.build([(0, numel)], format, dtype)


def check_elements(x: Tensor, name: str) -> None:
    """Raises TypeError unless ``x`` is a dense tensor of a dtype that codecs take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in ELEMENT_TYPES:
        accepted = ", ".join(str(dtype) for dtype in ELEMENT_TYPES)
        raise TypeError(f"{name} must be of {accepted}, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")


def _codec_for(spelling: str | Codec | None, dtype: torch.dtype) -> Codec:
    # No compression is the cast to the type that the data have.
    parsed = codec(spelling)
    return Cast(dtype) if parsed is None else parsed


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
    numel = as_int(numel, "numel")
    if numel < 0:
        raise ValueError(f"numel must not be negative, got {numel}")
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
