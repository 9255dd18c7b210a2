"""The largest elements and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from smallreduce._layout import BLOCK, Format
from smallreduce.codecs._codec import HEADER_NBYTES, Codec, PacketCodec, align16, check_numel, fraction_of

__all__ = ["TopK"]

_SKIP = 65535  # elements that one word can skip


@dataclass(frozen=True)
class TopK(PacketCodec):
    """The ``ceil(ratio * n)`` elements of a tensor that are largest in magnitude, and 16-bit gaps that say which.

    Exactly so many, ties broken in favour of the lower index; NaN and Inf count as largest. All others decode to zero:
    for training use it with error feedback, or through :class:`smallreduce.optim.DGC`.

    Args:
        ratio: The share of elements that travel, from 1e-9 to 1.
        values: Their type on the wire: torch.float32, bfloat16 or float16.

    Raises:
        ValueError: ``ratio`` is out of range.
        TypeError: A value of another type.
    """

    ratio: float
    values: torch.dtype = torch.float32

    # dtype -> (kind, bytes, spelling)
    _VALUES: ClassVar[dict[torch.dtype, tuple[int, int, str]]] = {
        torch.float32: (32, 4, "fp32"),
        torch.bfloat16: (33, 2, "bf16"),
        torch.float16: (34, 2, "fp16"),
    }

    def __post_init__(self) -> None:
        fraction_of(self.ratio)
        object.__setattr__(self, "ratio", float(self.ratio))
        if self.values not in self._VALUES:
            accepted = ", ".join(str(dtype) for dtype in self._VALUES)
            raise TypeError(f"values must be one of {accepted}, got {self.values!r}")

    @property
    def format(self) -> Format:
        fraction = fraction_of(self.ratio)
        # There are no groups on the wire; these are only the grain in which packets are cut.
        return Format(self._VALUES[self.values][0], BLOCK, False, False, (fraction.numerator, fraction.denominator))

    @property
    def bits_per_element(self) -> float:
        return self.ratio * (8 * self._VALUES[self.values][1] + 16) + 16 / _SKIP

    def kept(self, numel: int) -> int:
        """How many of ``numel`` elements travel."""
        fraction = fraction_of(self.ratio)
        return -(-check_numel(numel) * fraction.numerator // fraction.denominator)

    def packet_nbytes(self, numel: int) -> int:
        kept = self.kept(numel)
        words = kept + -(-numel // _SKIP)
        return HEADER_NBYTES + align16(self._VALUES[self.values][1] * kept) + align16(2 * words)

    @property
    def spelling(self) -> str:
        values = "" if self.values == torch.float32 else f",values={self._VALUES[self.values][2]}"
        return f"topk:{self.ratio}{values}"

    __str__ = Codec.__str__
