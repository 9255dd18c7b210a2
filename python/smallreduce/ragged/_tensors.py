"""The tensors in what a module is called with, and in what it returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["map_tensors", "tensors_in"]


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with other tensors in it, wherever they are in dicts, lists, tuples and dataclasses. What has none that
    changed is the very object that it was."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return _changed(value, dict(value), change, _set_items)
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _changed(value, fields, change, _set_fields)
    return value


def _changed(
    value: Any, parts: dict[Any, Any], change: Callable[[Tensor], Tensor], put: Callable[[Any, dict[Any, Any]], None]
) -> Any:
    new = {key: map_tensors(part, change) for key, part in parts.items()}
    changed = {key: part for key, part in new.items() if part is not parts[key]}
    if not changed:
        return value
    copied = copy.copy(value)
    put(copied, changed)
    return copied


def _set_items(value: Any, changed: dict[Any, Any]) -> None:
    for key, part in changed.items():
        value[key] = part


def _set_fields(value: Any, changed: dict[Any, Any]) -> None:
    for name, part in changed.items():
        object.__setattr__(value, name, part)  # it may be frozen


def tensors_in(value: Any) -> list[Tensor]:
    """All of them, in the order in which :func:`map_tensors` meets them."""
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, see)
    return found
