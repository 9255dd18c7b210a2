"""Numbers in 8 bits: a power of two for each block, and codes with three bits of mantissa.

A block's scale is the largest power of two that is not above its largest magnitude. Magnitudes, divided by it, are
rounded to one of the values ``2**e * (1 + k/8)``, with k from 0 to 7, up to 2. The codes number these; 0 is zero:

========  =========================  =========================  ========================================
codes     dtype                      least value                what is smaller
========  =========================  =========================  ========================================
signed    int8, from -127 to 127     ``1.25 * 2**-15`` scales   becomes that or 0
unsigned  uint8, from 0 to 255       ``1.25 * 2**-31`` scales   becomes that, unless it is 0 itself
========  =========================  =========================  ========================================

Any other magnitude becomes one of its two neighbours, which is less than an eighth of it away, and the upper one as
often as it is near it. So what is added to a moment over many steps, at each much less than the neighbours are apart,
is not lost, as it would be if each step rounded to the nearest. What decides is no random number but, for each element,
a sequence that spreads more evenly (:class:`Dither`). And as scales are powers of two, what has been rounded stays what
it is when its block's scale changes, until it is too small for it.

All operations are exact, or on integers: a block has the same codes on every device, and whatever it was cut from. A
block with a NaN or an infinite element has no finite one when it is decoded.

Why the values are spread by magnitude: small second moments matter as much as large ones, and a linear code of 8 bits
makes them 0, or raises them to its least step. Dettmers et al., *8-bit Optimizers via Block-wise Quantization*,
arXiv:2110.02861, section 2.2, have a dynamic code for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from smallreduce.optim._block_tiles import Tiling

__all__ = ["SIGNED", "UNSIGNED", "Codes", "Dither"]

_DROPPED = 20  # of the 23 bits of an fp32 mantissa
_TWO = 0x40000000 >> _DROPPED  # what is left of 2.0
_EXPONENT = 0x7F800000
_LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Dither:
    """What share of the way to its upper neighbour a magnitude needs not to have gone to be rounded up: in row i and
    column j at step t the fraction of ``ai + bj + ct``.

    For each element it is a Kronecker sequence over the steps. With c that rational numbers approximate badly, of any n
    steps in a row all but a few times log n are as for evenly spread numbers (Kuipers, Niederreiter, *Uniform
    Distribution of Sequences*, 1974, chapter 2, theorem 3.4).

    Attributes:
        row, column, step: a, b and c, in units of 2**-32.
    """

    row: int
    column: int
    step: int

    def at(self, first_row: int, rows: int, cols: int, step: int, device: torch.device) -> Tensor:
        """int32, from 0 to less than ``2**20``, of shape (rows, cols)."""
        down = self._multiples(torch.arange(first_row, first_row + rows, device=device), self.row, 0)
        across = self._multiples(torch.arange(cols, device=device), self.column, step * self.step)
        return (down.unsqueeze(1) + across).bitwise_and_((1 << _DROPPED) - 1)

    @staticmethod
    def _multiples(numbers: Tensor, factor: int, offset: int) -> Tensor:
        fractions = (numbers * factor + offset % (1 << 32)).bitwise_and_((1 << 32) - 1)
        return fractions.bitwise_right_shift_(32 - _DROPPED).to(torch.int32)


@dataclass(frozen=True)
class Codes:
    """A format, see the module.

    Attributes:
        dtype: int8 or uint8.
        largest: Code of 2.
    """

    dtype: torch.dtype
    largest: int
    dither: Dither

    @property
    def is_signed(self) -> bool:
        return self.dtype == torch.int8

    def decode(self, codes: Tensor, scales: Tensor, tiling: Tiling) -> Tensor:
        """fp32 values of some rows, from a first one of a tile on.

        Args:
            codes: Of shape (rows, cols), contiguous.
            scales: Of their tiles, fp32.

        Returns:
            Of the shape of whole tiles, contiguous: what the tensor does not have is 0.
        """
        rows, cols = codes.shape
        values = _values(self, codes.device).index_select(0, codes.view(torch.uint8).view(-1).int()).view(rows, cols)
        down, across = scales.shape
        if (rows, cols) != (down * tiling.height, across * tiling.width):
            whole = values.new_zeros(down * tiling.height, across * tiling.width)
            whole[:rows, :cols] = values
            values = whole
        _tiles(values, tiling).mul_(scales.view(down, 1, across, 1))
        return values

    def encode(self, values: Tensor, codes: Tensor, scales: Tensor, tiling: Tiling, first_row: int, step: int) -> None:
        """Writes codes and scales of values as :meth:`decode` gives them, of which nothing is left.

        Args:
            first_row, step: Where and when, for the rounding.
        """
        rows, cols = values.shape
        magnitudes = _tiles(values, tiling).abs()
        largest = magnitudes.amax((1, 3))
        scales.copy_(largest.view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32).clamp_(min=_LEAST_SCALE))
        magnitudes.div_(scales.view(scales.shape[0], 1, scales.shape[1], 1))
        rounded = magnitudes.view(rows, cols).view(torch.int32)
        rounded.add_(self.dither.at(first_row, rows, cols, step, values.device)).bitwise_right_shift_(_DROPPED)
        rounded.sub_(_TWO - self.largest).clamp_(0, self.largest)
        if self.is_signed:
            rounded.mul_(values.sign().to(torch.int32))
        else:
            torch.maximum(rounded, values.sign().to(torch.int32), out=rounded)
        codes.copy_(rounded[: codes.shape[0], : codes.shape[1]])


SIGNED = Codes(torch.int8, 127, Dither(0xD1B54A33, 0xABC98388, 0x6A09E667))
UNSIGNED = Codes(torch.uint8, 255, Dither(0xC13FA9A9, 0x91E10DA5, 0x9E3779B9))
"""Of the steps: the square root of 2, and the golden ratio. Of rows and columns: the roots of ``x**4 = x + 1`` and
``x**3 = x + 1``, inverted, and their squares, by which points spread evenly in a plane."""


def _tiles(values: Tensor, tiling: Tiling) -> Tensor:
    return values.view(-1, tiling.height, values.shape[1] // tiling.width, tiling.width)


@cache
def _values(codes: Codes, device: torch.device) -> Tensor:
    """What each code stands for, by the code as a uint8."""
    numbers = torch.arange(256, dtype=torch.int32, device=device)
    magnitudes = 256 - numbers if codes.is_signed else numbers
    magnitudes = torch.where(numbers <= codes.largest, numbers, magnitudes)
    values = (magnitudes + (_TWO - codes.largest)).bitwise_left_shift_(_DROPPED).view(torch.float32).clone()
    values[magnitudes > codes.largest] = float("nan")  # no code
    values[0] = 0.0
    return torch.where(numbers <= codes.largest, values, -values)
