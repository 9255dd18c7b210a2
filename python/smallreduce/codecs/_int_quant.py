"""Integers of a few bits with a scale for each group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from smallreduce._layout import Format
from smallreduce.codecs._codec import Codec, PacketCodec, check_group, check_numel, dense_nbytes

__all__ = ["IntQuant"]


@dataclass(frozen=True)
class IntQuant(PacketCodec):
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
        check_group(self.group)
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
    def bits_per_element(self) -> float:
        return self.bits + 16 / self.group

    def packet_nbytes(self, numel: int) -> int:
        numel = check_numel(numel)
        return dense_nbytes(numel, self.bits, -(-numel // self.group))

    @property
    def spelling(self) -> str:
        options = [f"group={self.group}"] if self.group != 128 else []
        options += [f"rounding={self.rounding}"] if self.rounding is not None else []
        name = f"int{self.bits}" + ("-hadamard" if self.hadamard else "")
        return ":".join([name, ",".join(options)]) if options else name

    __str__ = Codec.__str__
