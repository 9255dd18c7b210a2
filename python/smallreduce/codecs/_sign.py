"""One bit for each element."""

from __future__ import annotations

from dataclasses import dataclass

from smallreduce._layout import Format
from smallreduce.codecs._codec import Codec, PacketCodec, check_group, check_numel, dense_nbytes

__all__ = ["Sign"]


@dataclass(frozen=True)
class Sign(PacketCodec):
    """One bit for each element, and the mean magnitude of each group as bf16 (1-bit SGD and its successors).

    Biased: for training use it with error feedback.

    Args:
        group: Elements that share a scale: a multiple of 32 up to 2 097 120.

    Raises:
        ValueError, TypeError: An impossible group.
    """

    group: int = 1024

    def __post_init__(self) -> None:
        check_group(self.group)

    @property
    def format(self) -> Format:
        return Format(8, self.group, False, False)

    @property
    def bits_per_element(self) -> float:
        return 1 + 16 / self.group

    def packet_nbytes(self, numel: int) -> int:
        numel = check_numel(numel)
        return dense_nbytes(numel, 1, -(-numel // self.group))

    @property
    def spelling(self) -> str:
        return "sign" if self.group == 1024 else f"sign:group={self.group}"

    __str__ = Codec.__str__
