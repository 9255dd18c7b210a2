"""What optimizers ask of their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Place", "check_added", "check_lr", "check_number", "places"]


class Place(NamedTuple):
    """A parameter and its group. ``label`` is its name, where groups have names, or else its number."""

    label: str
    parameter: Tensor
    group: dict[str, Any]


def places(param_groups: Sequence[dict[str, Any]]) -> Iterator[Place]:
    """All parameters, in the order in which they are numbered."""
    number = 0
    for group in param_groups:
        for at, parameter in enumerate(group["params"]):
            label = group["param_names"][at] if "param_names" in group else f"parameter {number}"
            yield Place(label, parameter, group)
            number += 1


def check_added(
    param_groups: list[dict[str, Any]],
    check_options: Callable[[dict[str, Any]], None],
    check_parameter: Callable[[Place], None],
) -> None:
    """Checks the group that was added last, and takes it away again if it is refused."""
    added = param_groups[-1]
    try:
        check_options(added)
        for place in places(param_groups):
            if place.group is added:
                check_parameter(place)
    except Exception:
        param_groups.pop()
        raise


def check_number(name: str, value: object, most: float = math.inf) -> None:
    """Checks a number from 0 to ``most``.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite, negative, or larger.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name} must be {'at least 0' if most == math.inf else f'from 0 to {most:g}'}, got {value}")


def check_lr(lr: object) -> None:
    """Checks a learning rate: a number of at least 0, or a tensor of one.

    Raises:
        TypeError, ValueError: It is not.
    """
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be one number, got a tensor of shape {tuple(lr.shape)}")
    check_number("lr", lr.item() if isinstance(lr, Tensor) else lr)
