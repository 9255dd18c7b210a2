"""Narrower floating-point types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from smallreduce._layout import Format
from smallreduce.codecs._codec import Codec, PacketCodec, check_numel, dense_nbytes

__all__ = ["Cast"]


@dataclass(frozen=True)
class Cast(PacketCodec):
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
    def bits_per_element(self) -> float:
        return self._TYPES[self.dtype][1]

    def packet_nbytes(self, numel: int) -> int:
        numel = check_numel(numel)
        return dense_nbytes(numel, self._TYPES[self.dtype][1], 0)

    @property
    def spelling(self) -> str:
        return self._TYPES[self.dtype][2]

    __str__ = Codec.__str__
