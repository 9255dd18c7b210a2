"""What a module can do once it is fully sharded: the methods of torch's ``FSDPModule``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

from torch import nn

from smallreduce.ragged._plan import Plan
from smallreduce.ragged._unit import Unit, unit_of

__all__ = ["RaggedModule", "make_ragged"]


class RaggedModule:
    """The class, beside its own, of a module that :func:`smallreduce.ragged.fully_shard` was applied to.

    Every method but :attr:`plans` is that of ``torch.distributed.fsdp.FSDPModule`` with its name.
    """

    @property
    def plans(self) -> tuple[Plan, ...]:
        """How the module's own parameters lie on the ranks: one plan for each dtype, with the parameters in the order
        of the module's. ``print(module.plans[0])`` draws it."""
        return tuple(bucket.plan for bucket in _unit(self).buckets)

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:
        """Gathers the module's own parameters, and gives them to it. All ranks call it.

        Args:
            async_op: Only start it, and return a handle to wait with.
        """
        unit = _unit(self)
        unit.unshard()
        if async_op:
            return UnshardHandle(unit)
        unit.wait()
        return None

    def reshard(self) -> None:
        """Frees the gathered parameters, and gives the module the sharded ones."""
        _unit(self).reshard()

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """Whether the next backward pass is the last before gradients are used."""
        _unit(self).schedule.is_last_backward = is_last_backward

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Whether backward passes reduce gradients, or accumulate them, unsharded, on every rank."""
        for unit in _units(self, recurse):
            unit.reduces = requires_gradient_sync

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """Whether what is reduced over the shards is averaged over replicas at once; else with the next that is."""
        for unit in _units(self, recurse):
            unit.averages_replicas = requires_all_reduce

    def set_reshard_after_forward(self, reshard_after_forward: bool, recurse: bool = True) -> None:
        """See ``reshard_after_forward`` of :func:`~smallreduce.ragged.fully_shard`."""
        if not isinstance(reshard_after_forward, bool):
            raise TypeError(f"reshard_after_forward must be a bool, got {type(reshard_after_forward).__name__}")
        for unit in _units(self, recurse):
            unit.reshard_after_forward = reshard_after_forward

    def set_reshard_after_backward(self, reshard_after_backward: bool, *, recurse: bool = True) -> None:
        """Whether a backward pass frees parameters; if not, they are those of before until :meth:`reshard`."""
        for unit in _units(self, recurse):
            unit.reshards_after_backward = reshard_after_backward

    def set_reduce_scatter_unused_params(self, enable: bool, *, recurse: bool = True) -> None:
        """Whether trainable parameters that had no part in the loss are reduced as zeros: needed where they are not the
        same on all ranks."""
        for unit in _units(self, recurse):
            unit.reduces_unused = enable

    def set_modules_to_forward_prefetch(self, modules: Sequence[nn.Module]) -> None:
        """What to gather when the module's forward pass begins; by default what came next the last time."""
        _unit(self).ahead_in_forward = [_unit(module) for module in modules]

    def set_modules_to_backward_prefetch(self, modules: Sequence[nn.Module]) -> None:
        """What to gather when its backward pass begins; by default what was used before it."""
        _unit(self).ahead_in_backward = [_unit(module) for module in modules]

    def reset_iter_state(self) -> None:
        """After an exception in a pass, on all ranks: waits for what is on its way, frees parameters and forgets
        gradients that have not been reduced. To be called on the root module."""
        unit = _unit(self)
        if unit.was_used:
            if not unit.is_root:
                raise RuntimeError("reset_iter_state must be called on the root module")
            unit.schedule.reset()
            for each in unit.schedule.units:
                each.reset()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What ``to``, ``half``, ``to_empty`` and the like do to parameters, they do to the sharded ones."""
        _unit(self).reshard()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a fully sharded module cannot be copied: copy it before fully_shard")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a fully sharded module cannot be pickled: save its state_dict() with dcp.save")


class UnshardHandle:
    """What ``unshard(async_op=True)`` returns."""

    def __init__(self, unit: Unit) -> None:
        self._unit: Unit | None = unit

    def wait(self) -> None:
        """Waits until the module has its parameters."""
        if self._unit is not None:
            self._unit.wait()
            self._unit = None


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def make_ragged(module: nn.Module) -> None:
    """Gives the module the methods."""
    own = type(module)
    if own not in _classes:  # one for all modules of a class, by which torch.compile knows them
        _classes[own] = type(f"Ragged{own.__name__}", (RaggedModule, own), {})
    module.__class__ = _classes[own]


def _unit(module: object) -> Unit:
    unit = unit_of(module) if isinstance(module, nn.Module) else None
    if unit is None:
        raise TypeError(f"{type(module).__name__} is no module that smallreduce.ragged.fully_shard was applied to")
    return unit


def _units(module: object, recurse: bool) -> Iterator[Unit]:
    if not recurse:
        yield _unit(module)
        return
    for each in cast(nn.Module, module).modules():
        if (unit := unit_of(each)) is not None:
            yield unit
