"""BlockAdam8bit in NumPy, tile by tile and in words other than the bits of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BlockAdamReference", "Format", "SIGNED", "UNSIGNED", "decoded", "encoded"]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]

_SHARES = 1 << 20


@dataclass(frozen=True)
class Format:
    largest: int
    row: float
    column: float
    step: float

    def threshold(self, row: int, column: int, step: int) -> int:
        """In shares of ``2**-20``. The parts of rows and of columns are rounded down each by itself."""
        a, b, c = (round(one * 2**32) for one in (self.row, self.column, self.step))
        return ((row * a % 2**32 >> 12) + ((column * b + step * c) % 2**32 >> 12)) % _SHARES


_CUBIC = 1.32471795724474602596  # x**3 = x + 1
_QUARTIC = 1.22074408460575947536  # x**4 = x + 1
SIGNED = Format(127, 1 / _QUARTIC, 1 / _QUARTIC**2, math.sqrt(2) - 1)
UNSIGNED = Format(255, 1 / _CUBIC, 1 / _CUBIC**2, (math.sqrt(5) - 1) / 2)


def encoded(
    values: Floats, height: int, width: int, form: Format, step: int, first_row: int = 0
) -> tuple[Codes, Floats]:
    """Codes and scales of a matrix."""
    rows, cols = values.shape
    codes = np.zeros(values.shape, np.int64)
    scales = np.zeros((-(-rows // height), -(-cols // width)), np.float32)
    for down, across in np.ndindex(*scales.shape):
        tile = np.s_[down * height : (down + 1) * height, across * width : (across + 1) * width]
        scales[down, across] = scale = _power_below(float(np.abs(values[tile]).max()))
        for i, j in np.ndindex(*values[tile].shape):
            row, col = down * height + i, across * width + j
            magnitude = abs(float(values[row, col])) / scale
            code = _code(magnitude, form, form.threshold(first_row + row, col, step))
            codes[row, col] = -code if values[row, col] < 0 else code
    return codes, scales


def _power_below(value: float) -> float:
    return max(2.0 ** (math.frexp(value)[1] - 1), 2.0**-126) if value else 2.0**-126


def _code(magnitude: float, form: Format, threshold: int) -> int:
    if magnitude == 0:
        return 0
    exponent = math.frexp(magnitude)[1] - 1
    eighths = magnitude / 2.0**exponent * 8
    lower = math.floor(eighths)
    number = 8 * exponent + lower - 8 + (math.floor((eighths - lower) * _SHARES) + threshold >= _SHARES)
    return min(max(number - 8 + form.largest, 1 if form is UNSIGNED else 0), form.largest)


def decoded(codes: Codes, scales: Floats, height: int, width: int, form: Format) -> Floats:
    values = np.zeros(codes.shape, np.float32)
    for row, col in np.ndindex(*codes.shape):
        number = abs(int(codes[row, col])) - form.largest + 8
        magnitude = 2.0 ** (number // 8) * (1 + number % 8 / 8) if codes[row, col] else 0.0
        values[row, col] = math.copysign(magnitude, codes[row, col]) * scales[row // height, col // width]
    return values


class BlockAdamReference:
    """Of one fp32 parameter; every operation in fp32 and rounded by itself."""

    def __init__(self, parameter: Floats, block: int = 32, **options: Any) -> None:
        self.shape = parameter.shape
        is_matrix = parameter.ndim > 1
        self.parameter = parameter.reshape(-1, parameter.shape[-1] if is_matrix else 1).copy()
        self.height, self.width = (block, min(block, self.parameter.shape[1])) if is_matrix else (256, 1)
        self.options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, **options}
        self.steps = 0
        zeros = np.zeros_like(self.parameter)
        self.exp_avg = encoded(zeros, self.height, self.width, SIGNED, 0)
        self.exp_avg_sq = encoded(zeros, self.height, self.width, UNSIGNED, 0)

    def step(self, gradient: Floats) -> None:
        self.steps += 1
        f = np.float32
        lr, (beta1, beta2) = self.options["lr"], self.options["betas"]
        g = gradient.reshape(self.parameter.shape)
        m = decoded(*self.exp_avg, self.height, self.width, SIGNED) * f(beta1) + g * f(1 - beta1)
        v = decoded(*self.exp_avg_sq, self.height, self.width, UNSIGNED) * f(beta2) + g * g * f(1 - beta2)
        with np.errstate(divide="ignore"):
            root = f(1) / (f(1) / np.sqrt(v))
        denominator = root * f(1 / math.sqrt(1 - beta2**self.steps)) + f(self.options["eps"])
        update = m * f(-lr / (1 - beta1**self.steps)) / denominator
        self.parameter = self.parameter * f(1 - lr * self.options["weight_decay"]) + update
        self.exp_avg = encoded(m, self.height, self.width, SIGNED, self.steps)
        self.exp_avg_sq = encoded(v, self.height, self.width, UNSIGNED, self.steps)
