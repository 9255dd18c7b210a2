"""``smallreduce.optim.BlockAdam8bit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from smallreduce.codecs import as_int
from smallreduce.optim._block_state import check_state, new_state
from smallreduce.optim._block_step import Step, take_step
from smallreduce.optim._block_tiles import VECTOR_BLOCK, Tiling
from smallreduce.optim._param_groups import Place, check_added, check_lr, check_number, places
from smallreduce.ragged import RaggedTensor

__all__ = ["BlockAdam8bit"]

_BLOCK = 32


class BlockAdam8bit(Optimizer):
    """AdamW whose moments take two bytes for each element instead of eight, on whole and on sharded parameters.

        smallreduce.ragged.fully_shard(model, granularity=smallreduce.optim.BlockAdam8bit.granularity)
        optimizer = smallreduce.optim.BlockAdam8bit(model.parameters(), lr=3e-4)

    The moments are kept as 8-bit codes with three bits of mantissa, and one fp32 scale for each block: of a matrix, or
    of the last dimension of a larger tensor against all others, a tile of 32 by 32; of a vector 256 elements. In each
    step they are decoded, updated in fp32, and encoded anew, rounded up or down so that what is lost is made good over
    the steps (:mod:`smallreduce.optim._block_codes`); a second moment never becomes zero. With sides that are multiples
    of 32 the state is ``2 + 8/1024`` bytes for each element of a matrix. A step works on about 16 million elements at a
    time (on CPU 65,536), which bounds what it takes in fp32 beside.

    Of a :class:`smallreduce.ragged.RaggedTensor` every block must lie on one rank, as with :attr:`granularity`. Then
    nothing is sent, and parameters and state have the bits that they would have on one rank, wherever they were cut.
    State is saved and loaded by ``torch.distributed.checkpoint`` for any number of ranks.

    Args:
        params: Parameters or groups of them; plain tensors, RaggedTensors or both, of any floating-point dtype.
        lr: Learning rate; a number or a tensor of one element.
        betas: Decay of the first and of the second moment in a step.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: the parameters shrink by ``lr * weight_decay``.
        block: Rows and columns of a tile.

    Raises:
        TypeError, ValueError: Impossible values; parameters that are not floating-point numbers, or are sharded
            otherwise; or RaggedTensors with a block that lies on two ranks.

    Source: AdamW: Loshchilov, Hutter, arXiv:1711.05101, algorithm 2; 8-bit moments in blocks: Dettmers, Lewis,
    Shleifer, Zettlemoyer, *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861; tiles of 32 rows that
    sharding does not cut: *veScale-FSDP*, arXiv:2602.22437. The codes and their rounding are this project's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        block: int = _BLOCK,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, block=block))

    @staticmethod
    def granularity(name: str, parameter: Tensor, block: int = _BLOCK) -> int:
        """What keeps the blocks of a parameter whole, for :func:`smallreduce.ragged.fully_shard`: rows of a matrix,
        elements of a vector. With another ``block`` give ``functools.partial(BlockAdam8bit.granularity, block=...)``.
        """
        return block if parameter.dim() > 1 else VECTOR_BLOCK

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch's optimizers; on all ranks alike.

        Raises:
            TypeError, ValueError: As the class.
        """
        super().add_param_group(param_group)
        check_added(self.param_groups, _check_options, _check_place)

    # ---- a step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes a step of all parameters that have a gradient. Nothing is sent.

        Args:
            closure: Computes the loss anew, backward pass included, and returns it.

        Raises:
            ValueError: A gradient is not sharded as its parameter is.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for label, parameter, group in places(self.param_groups):
            if parameter.grad is not None:
                self._update(label, parameter, parameter.grad, group)
        return loss

    def _update(self, label: str, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        _check_gradient(label, parameter, gradient)
        tiling = Tiling.of(parameter.shape, group["block"])
        state = self.state[parameter]
        if not state:
            state.update(new_state(parameter, tiling))
        state["step"] += 1
        step = Step.of(group, int(state["step"].item()))
        take_step(parameter, gradient, state, tiling, step)

    # ---- state ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a copy of what :meth:`state_dict` gave, which hooks see, and may change, as with torch's own.

        Raises:
            ValueError: It is of other parameters, of another optimizer, or of blocks that the ranks cut. Nothing has
                changed then.
        """
        before = {"state": self.state, "param_groups": self.param_groups}
        seal = self.register_load_state_dict_pre_hook(_seal)  # after all others
        try:
            super().load_state_dict(dict(state_dict))
        except Exception:
            self.__dict__.update(before)
            raise
        finally:
            seal.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what torch calls with what is loaded, before its hooks that come after."""
        super().__setstate__(state)
        sealed = {owner: dict(saved.state) for owner, saved in self.state.items() if isinstance(saved, _Sealed)}
        self.state.update(sealed)
        for group in self.param_groups:
            if "block" not in group:
                raise ValueError(f"not a state of BlockAdam8bit: its groups have {', '.join(sorted(group))}")
            _check_options(group)
        for place in places(self.param_groups):
            _check_place(place)
            label, parameter, group = place
            if sealed.get(parameter):
                check_state(label, parameter, sealed[parameter], Tiling.of(parameter.shape, group["block"]))
                self.state[parameter] = {
                    name: value.detach().to(value.device if name == "step" else parameter.device, copy=True)
                    for name, value in sealed[parameter].items()
                }


class _Sealed:
    """What is loaded for a parameter, kept from torch, which would give all of it the dtype of the parameter."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.state = state


def _seal(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "state": {number: _Sealed(state) for number, state in state_dict["state"].items()}}


def _check_place(place: Place) -> None:
    _check_parameter(place.label, place.parameter, Tiling.of(place.parameter.shape, place.group["block"]))


def _check_gradient(label: str, parameter: Tensor, gradient: Tensor) -> None:
    if gradient.layout is not torch.strided:
        raise ValueError(f"the gradient of {label} must be dense, got {gradient.layout}")
    placements = [one.placement if isinstance(one, RaggedTensor) else None for one in (parameter, gradient)]
    if placements[0] != placements[1]:
        raise ValueError(f"{label} is sharded by {placements[0]}, but its gradient by {placements[1]}")


def _check_parameter(label: str, parameter: Tensor, tiling: Tiling) -> None:
    if not parameter.is_floating_point():
        raise TypeError(
            f"BlockAdam8bit takes parameters of floating-point numbers, but {label} is of {parameter.dtype}"
        )
    if isinstance(parameter, RaggedTensor):
        for rank, (begin, end) in enumerate(parameter.placement.ranges(parameter.shape)):
            if not tiling.fits(begin, end):
                rows = "elements" if parameter.dim() < 2 else "rows"
                raise ValueError(
                    f"BlockAdam8bit needs whole blocks of {tiling.height} {rows}, but rank {rank} holds elements "
                    f"{begin} to {end} of {label}, of shape {tuple(parameter.shape)}: shard it with fully_shard("
                    "granularity=BlockAdam8bit.granularity), or, where block is not 32, with "
                    "functools.partial(BlockAdam8bit.granularity, block=...)"
                )
    elif is_traceable_wrapper_subclass(parameter):
        raise TypeError(
            f"BlockAdam8bit takes plain tensors and RaggedTensors, but {label} is a {type(parameter).__name__}"
        )


def _check_options(options: Mapping[str, Any]) -> None:
    """Of a parameter group."""
    check_lr(options["lr"])
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for beta in betas:
        check_number("betas", beta)
        if beta >= 1:
            raise ValueError(f"betas must be below 1, got {beta}")
    check_number("eps", options["eps"])
    check_number("weight_decay", options["weight_decay"])
    if as_int(options["block"], "block") < 1:
        raise ValueError(f"block must be at least 1, got {options['block']}")
