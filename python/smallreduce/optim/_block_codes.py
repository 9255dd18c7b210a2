"""Numbers in 8 bits: a power of two for each block, and codes with three bits of mantissa.

A block's scale is the largest power of two that is not above its largest magnitude. Divided by it, magnitudes are
rounded to values ``2**e * (1 + k/8)``, which the codes count downwards from 2, so that the largest may be rounded up:

========  ===============================  ==========================================================
codes     dtype                            of values below 1.25
========  ===============================  ==========================================================
signed    int8: sign, 127 magnitudes       ``2**-15`` scales some become 0
unsigned  uint8: 0 and 255 magnitudes      ``2**-31`` scales all but 0 become that: none becomes 0
========  ===============================  ==========================================================

Any other value becomes one of its two neighbours, less than an eighth of it away. It becomes the upper one as often as
it is near it, so that what is added to a value over many steps, at each less than half of their distance, is not lost.
And since scales are powers of two, a value that has been rounded stays what it is when its block's scale changes.
What decides is no random number, but a sequence in the golden ratio for each element (:class:`Dither`), which spreads
more evenly.

All operations are exact, or on integers: a block has the same codes on every device, whatever it was cut from. A block
with a NaN or an infinite element, or one of ``2**128`` after rounding, has no finite element when it is decoded.

Formats of this kind keep small second moments, which a linear one would make 0 or raise to its least value: Dettmers
et al., *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861, section 2.2. The three bits are those of fp8.
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
    """What is added before the dropped bits are: of row i, column j and step t the fraction of ``ai + bj + ct``.

    Over the steps it is a Kronecker sequence, of an irrational number that rational ones approximate worst, so that of
    any run of n steps every share s rounds up ``sn`` times, but for a few.

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
