"""Blocks that all ranks choose alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smallreduce._native import native
from smallreduce.codecs._codec import Codec, as_int, check_numel, fraction_of

__all__ = ["RandomBlocks"]


@dataclass(frozen=True)
class RandomBlocks(Codec):
    """A share of the tensor's blocks, chosen pseudo-randomly and alike on all ranks: GRBS of CSER (arXiv:2007.13221).

    Since all ranks keep the same elements the sum needs no indices and no packets: it is a plain all-reduce of the
    chosen blocks in fp32. All other elements become zero, so for training use it with error feedback, or through
    :class:`smallreduce.optim.CSER`. For all-reduce alone. Which blocks is defined in docs/wire-formats.md, section 12.

    Args:
        ratio: The share of the blocks that travel, from 1e-9 to 1.
        block: Elements of a block. None: ``ceil(ratio * n)`` of a tensor of ``n`` elements, so that one contiguous
            slice travels.

    Raises:
        ValueError: A value out of range.
        TypeError: A value of another type.
    """

    ratio: float
    block: int | None = None

    def __post_init__(self) -> None:
        fraction_of(self.ratio)
        object.__setattr__(self, "ratio", float(self.ratio))
        if self.block is not None:
            object.__setattr__(self, "block", as_int(self.block, "block"))
            if self.block < 1:
                raise ValueError(f"block must be at least 1, got {self.block}")

    @staticmethod
    def key(seed: int, bucket: int, segment: int, step: int) -> int:
        """64 bits that choose the blocks of one segment in one step; every rank must give the same four integers."""
        mask = (1 << 64) - 1
        bucket_key = native.mix64(native.mix64(seed & mask) ^ (bucket & mask))
        return native.mix64(native.mix64(bucket_key ^ (segment & mask)) ^ native.mix64(step & mask))

    def spans(self, numel: int, key: int) -> list[tuple[int, int]]:
        """``(offset, length)`` of what a key chooses of ``numel`` elements: ascending, neighbours made one.

        Every element is chosen by the same share of all keys: 1/B of them with ``block`` None, of B blocks of
        ``ceil(ratio * numel)`` elements; else ``ceil(ratio * B) / B``, of B blocks of ``block`` elements. The last
        block of a tensor may be shorter.
        """
        if check_numel(numel) == 0:
            return []
        ratio = fraction_of(self.ratio)
        size = self.block or math.ceil(ratio * numel)
        blocks = -(-numel // size)
        chosen = 1 if self.block is None else math.ceil(ratio * blocks)
        # Steps that are coprime to the number of blocks come to each of them once before any twice.
        first = native.mix64(key ^ 1) % blocks
        stride = 1 + native.mix64(key ^ 2) % blocks
        while math.gcd(stride, blocks) != 1:
            stride = stride % blocks + 1
        spans: list[tuple[int, int]] = []
        for block in sorted((first + number * stride) % blocks for number in range(chosen)):
            offset = block * size
            length = min(size, numel - offset)
            if spans and sum(spans[-1]) == offset:
                offset, before = spans.pop()
                length += before
            spans.append((offset, length))
        return spans

    @property
    def bits_per_element(self) -> float:
        return 32 * self.ratio

    @property
    def spelling(self) -> str:
        block = "" if self.block is None else f",block={self.block}"
        return f"random-blocks:{self.ratio}{block}"

    __str__ = Codec.__str__
