"""Blocks that all ranks choose alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from smallreduce._blocks import Blocks
from smallreduce._native import native
from smallreduce.codecs._codec import Codec, as_int, check_numel, fraction_of

__all__ = ["RandomBlocks"]

_MASK = (1 << 64) - 1


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

    def count(self, numel: int) -> int:
        """The number of blocks of ``numel`` elements.

        Raises:
            TypeError, ValueError: ``numel`` is no number of elements, or that of its blocks is 2^31 or more.
        """
        size = self.block or max(1, math.ceil(fraction_of(self.ratio) * check_numel(numel)))
        count = -(-check_numel(numel) // size)
        if count >= 1 << 31:
            raise ValueError(f"{numel} elements in blocks of {size} are {count}, expected fewer than 2^31")
        return count

    def choose(
        self, numel: int, seed: int, bucket: int, segment: int, step: int, device: torch.device | str = "cpu"
    ) -> Blocks:
        """What travels of one segment of ``numel`` elements, on tensors of ``device``, in one step.

        Every rank must give the same integers. Every element is chosen by the same share of all seeds: 1/B of them
        with ``block`` None, of B blocks of ``ceil(ratio * numel)`` elements; else ``ceil(ratio * B) / B``, of B blocks
        of ``block`` elements. The last block of a segment may be shorter.

        Raises:
            TypeError, ValueError: As :meth:`count`.
        """
        count = self.count(numel)
        if count == 0:
            return Blocks.one_slice(0, 0, device)
        ratio = fraction_of(self.ratio)
        size = self.block or math.ceil(ratio * numel)
        chosen = 1 if self.block is None else math.ceil(ratio * count)
        key = _key(seed, bucket, segment, step)
        # Steps that are coprime to the number of blocks come to each of them once before any twice.
        first = native.mix64(key ^ 1) % count
        stride = 1 + native.mix64(key ^ 2) % count
        while math.gcd(stride, count) != 1:
            stride = stride % count + 1
        if chosen in (1, count):
            offset = first * size if chosen == 1 else 0
            return Blocks.one_slice(offset, min(chosen * size, numel - offset), device)
        rows = ((first + stride * torch.arange(chosen, device=device)) % count).sort().values
        whole, left = divmod(numel, size)
        # A block of what is left is the last of all. Whether it is chosen is computed here: no device is waited for.
        if left and (whole - first) * pow(stride, -1, count) % count < chosen:
            return Blocks(size, rows[:-1], whole * size, left)
        return Blocks(size, rows, 0, 0)

    @property
    def bits_per_element(self) -> float:
        return 32 * self.ratio

    @property
    def spelling(self) -> str:
        block = "" if self.block is None else f",block={self.block}"
        return f"random-blocks:{self.ratio}{block}"

    __str__ = Codec.__str__


def _key(seed: int, bucket: int, segment: int, step: int) -> int:
    bucket_key = native.mix64(native.mix64(seed & _MASK) ^ (bucket & _MASK))
    return native.mix64(native.mix64(bucket_key ^ (segment & _MASK)) ^ native.mix64(step & _MASK))
