"""Into what a parameter may not be cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["Granularity", "block_of"]

Granularity = str | int | Callable[[str, nn.Parameter], str | int]
"""``"group"``, ``"rows"`` (the same as 1), a number of rows, ``"matrix"``; or a function that gives one of these for a
parameter's name in the module and the parameter."""

_SPELLINGS = 'must be "group", "rows", a number of rows, "matrix", or a function (name, parameter) -> one of these'


def block_of(granularity: Granularity, name: str, parameter: nn.Parameter, group: int) -> int:
    """Elements of a block of the parameter, which stays whole on one rank: as many as ``granularity`` says, made up to
    whole groups of the codecs.

    Args:
        name: Of the parameter, for messages and for a function.
        group: Elements of a group of the codecs, so that no group is cut; 1 without.

    Raises:
        TypeError: The granularity is of another type.
        ValueError: It is another string, or no positive number of rows.
    """
    asked = granularity
    if callable(asked):
        asked = asked(name, parameter)
    elements = _elements(asked, parameter.shape, name)
    return min(math.lcm(elements, group), max(parameter.numel(), 1))


def _elements(asked: object, shape: torch.Size, name: str) -> int:
    if isinstance(asked, bool) or not isinstance(asked, (str, int)):
        raise TypeError(f"granularity {_SPELLINGS}, got {type(asked).__name__} for {name}")
    row = shape[-1] if len(shape) > 1 else 1
    if asked == "group":
        return 1
    if asked == "rows":
        return max(row, 1)
    if asked == "matrix":
        return max(shape[-2:].numel(), 1)
    if isinstance(asked, str) or asked < 1:
        raise ValueError(f"granularity {_SPELLINGS}, got {asked!r} for {name}")
    return max(asked * row, 1)
