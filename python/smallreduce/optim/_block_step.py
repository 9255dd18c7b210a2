"""A step of AdamW on moments in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from smallreduce.optim._block_state import MOMENTS
from smallreduce.optim._block_tiles import Tiling
from smallreduce.ragged import RaggedTensor

__all__ = ["Step", "take_step"]

# Elements that are computed at a time; on CPU what stays in the cache of a core.
_CPU_NUMEL = 1 << 16
_DEVICE_NUMEL = 1 << 24


@dataclass(frozen=True)
class Step:
    """The numbers of a step.

    Attributes:
        number: Counted from 1.
        shrink: What is left of a parameter after weight decay.
        rate: The learning rate, negative, with the correction of the first moment's bias.
        widen: What the root of the second moment is multiplied by, to correct its bias.
    """

    number: int
    beta1: float
    beta2: float
    eps: float
    shrink: float
    rate: float
    widen: float

    @classmethod
    def of(cls, group: Mapping[str, Any], number: int) -> Step:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return cls(
            number,
            beta1,
            beta2,
            group["eps"],
            shrink=1 - lr * group["weight_decay"],
            rate=-lr / (1 - beta1**number),
            widen=1 / math.sqrt(1 - beta2**number),
        )

    def take(self, parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Of tensors of one shape, the moments in fp32; all but the gradient change.

        Each operation is rounded by itself. What multiplies and adds in one may round once or twice, by device and, on
        CPU, by where in a vector an element lies.
        """
        gradient = gradient.float()
        exp_avg.mul_(self.beta1).add_(gradient * (1 - self.beta1))
        exp_avg_sq.mul_(self.beta2).add_(gradient.square().mul_(1 - self.beta2))
        # On CPU torch's sqrt is that of MKL, whose last bit is not that of IEEE 754, unlike these two.
        root = exp_avg_sq.rsqrt().reciprocal_()
        update = (exp_avg * self.rate).div_(root.mul_(self.widen).add_(self.eps))
        wide = parameter if parameter.dtype.itemsize > 2 else parameter.float()
        wide.mul_(self.shrink).add_(update)
        if wide is not parameter:
            parameter.copy_(wide)


def take_step(parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], tiling: Tiling, step: Step) -> None:
    """Of what this rank has of a parameter, strip by strip.

    Args:
        state: As :func:`smallreduce.optim._block_state.new_state` makes it.
    """
    begin, end = parameter.range if isinstance(parameter, RaggedTensor) else (0, parameter.numel())
    first, last = tiling.rows_of(begin, end)
    own = _local(parameter)
    weights = own.contiguous()
    gradients = _local(gradient).contiguous()

    def rows(tensor: Tensor, row: int, stop: int) -> Tensor:
        return tensor.view(-1)[(row - first) * tiling.cols : (stop - first) * tiling.cols].view(-1, tiling.cols)

    def scales(tensor: Tensor, row: int, stop: int) -> Tensor:
        height = tiling.height
        return tensor.view(-1, tiling.grid[1])[(row - first) // height : -(-(stop - first) // height)]

    for row, stop in tiling.strips(first, last, _CPU_NUMEL if own.device.type == "cpu" else _DEVICE_NUMEL):
        stored = [
            (
                moment.format,
                rows(_local(state[moment.codes]), row, stop),
                scales(_local(state[moment.scales]), row, stop),
            )
            for moment in MOMENTS
        ]
        moments = [form.decode(codes, of_tiles, tiling) for form, codes, of_tiles in stored]
        step.take(
            rows(weights, row, stop),
            rows(gradients, row, stop),
            *(values[: stop - row, : tiling.cols] for values in moments),
        )
        for values, (form, codes, of_tiles) in zip(moments, stored, strict=True):
            form.encode(values, codes, of_tiles, tiling, row, step.number)
    if weights is not own:
        own.copy_(weights)
    increment_version(parameter)


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, RaggedTensor) else tensor
