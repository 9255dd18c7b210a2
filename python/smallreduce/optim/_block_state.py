"""The two moments of a parameter in 8 bits, as an optimizer's state holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from smallreduce.optim._block_codes import SIGNED, UNSIGNED, Codes
from smallreduce.optim._block_tiles import Tiling
from smallreduce.ragged import RaggedShard, RaggedTensor

__all__ = ["MOMENTS", "Moment", "check_state", "new_state"]


class Moment(NamedTuple):
    """The names in the state of its codes and of its scales, and the format."""

    codes: str
    scales: str
    format: Codes


MOMENTS = (Moment("exp_avg", "exp_avg_scale", SIGNED), Moment("exp_avg_sq", "exp_avg_sq_scale", UNSIGNED))


class _Entry(NamedTuple):
    """A tensor of the state. ``placement`` is None where the parameter is not sharded."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    placement: RaggedShard | None


def new_state(parameter: Tensor, tiling: Tiling) -> dict[str, Tensor]:
    """Moments of zero. Codes have the shape of the parameter, scales that of the grid of tiles, and both lie on the
    rank that has the elements."""
    state = {"step": torch.zeros(())}
    for name, dtype, shape, placement in _entries(parameter, tiling):
        if placement is None:
            state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        else:
            assert isinstance(parameter, RaggedTensor)
            begin, end = placement.ranges(shape)[parameter.group.rank()]
            zeros = torch.zeros(end - begin, dtype=dtype, device=parameter.device)
            state[name] = RaggedTensor(zeros, shape, placement, parameter.group)
    return state


def _entries(parameter: Tensor, tiling: Tiling) -> Iterator[_Entry]:
    of_codes = of_scales = None
    if isinstance(parameter, RaggedTensor):
        of_codes = parameter.placement
        of_scales = tiling.placement_of_scales(of_codes.ranges(parameter.shape))
    for moment in MOMENTS:
        yield _Entry(moment.codes, moment.format.dtype, tuple(parameter.shape), of_codes)
        yield _Entry(moment.scales, torch.float32, tiling.grid, of_scales)


def check_state(label: str, parameter: Tensor, state: Mapping[str, object], tiling: Tiling) -> None:
    """Checks the state of a parameter that comes from elsewhere.

    Raises:
        ValueError: It is not what :func:`new_state` makes, but for the values.
    """
    entries = list(_entries(parameter, tiling))
    names = {"step", *(entry.name for entry in entries)}
    if state.keys() != names:
        raise ValueError(f"the state of {label} must have {', '.join(sorted(names))}, got {', '.join(sorted(state))}")
    if not isinstance(state["step"], Tensor) or state["step"].dim() > 0:
        raise ValueError(f"step of {label} must be a tensor without dimensions, got {_describe(state['step'])}")
    for name, dtype, shape, placement in entries:
        tensor = state[name]
        found = tensor.placement if isinstance(tensor, RaggedTensor) else None
        if not isinstance(tensor, Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} of {label} must be of {dtype} and shape {shape}, got {_describe(tensor)}")
        if found != placement:
            raise ValueError(
                f"{name} of {label} must be sharded as the parameter is, by {placement}, got {found}: load it with "
                "torch.distributed.checkpoint, which takes from a checkpoint what each rank needs"
            )


def _describe(tensor: object) -> str:
    return f"{tensor.dtype} and {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
