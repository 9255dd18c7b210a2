"""One module that is fully sharded: when its parameters are gathered, freed, and their gradients reduced.

The passes are those of torch's ``fully_shard``: hooks around the forward pass of the module, a hook on its outputs
for the beginning of its backward pass, and an autograd function on its inputs for the end.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from smallreduce.ragged._bucket import Bucket
from smallreduce.ragged._policy import Policy
from smallreduce.ragged._schedule import Schedule
from smallreduce.ragged._tensors import map_tensors, tensors_in

__all__ = ["Unit", "unit_of"]

_ATTRIBUTE = "_smallreduce_unit"


class _Phase(enum.Enum):
    IDLE = enum.auto()
    FORWARD = enum.auto()
    PRE_BACKWARD = enum.auto()
    POST_BACKWARD = enum.auto()


def unit_of(module: nn.Module) -> Unit | None:
    """That of a module itself, if it is fully sharded."""
    return module.__dict__.get(_ATTRIBUTE)


class Unit:
    """Of one call of :func:`smallreduce.ragged.fully_shard`.

    Args:
        buckets: Of its parameters, one for each dtype.
        policy: Of all of them.
        reshard_after_forward: None: True, but for the root.

    Attributes:
        reduces: Whether gradients are reduced in backward passes; else they accumulate.
        averages_replicas: Whether reduced gradients are averaged over replicas; else they are kept.
        reshards_after_backward: Whether parameters are freed after a backward pass.
        reduces_unused: Whether trainable parameters without a gradient are reduced as zeros.
        ahead_in_forward, ahead_in_backward: Units to be gathered when this one begins, instead of those that the
            schedule knows.
    """

    def __init__(
        self,
        module: nn.Module,
        buckets: Sequence[Bucket],
        policy: Policy,
        reshard_after_forward: bool | None,
    ) -> None:
        self.module = module
        self.buckets = list(buckets)
        self.reshard_after_forward = reshard_after_forward
        self.reshards_after_backward = True
        self.reduces = self.averages_replicas = True
        self.reduces_unused = False
        self.ahead_in_forward: list[Unit] = []
        self.ahead_in_backward: list[Unit] = []
        self.policy = policy
        self._precision = policy.precision
        self._phase = _Phase.IDLE
        self._in_backward = False  # from the beginning of its backward pass to the end of that of the model
        self._is_ahead = False  # whether it was gathered for a forward pass that has not come yet
        self._coming: list[Unit] = []  # what is to be gathered while this computes its gradients
        self._schedule: Schedule | None = None
        for bucket in buckets:
            bucket.on_gradients = self._make_room
        module.__dict__[_ATTRIBUTE] = self
        module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(self._after_forward, with_kwargs=True)
        for owner in {id(m): m for bucket in buckets for slot in bucket.slots for m, _ in slot.places}.values():
            owner.register_state_dict_pre_hook(self._before_state)
            owner.register_load_state_dict_pre_hook(self._before_state)

    def _before_state(self, *args: Any) -> None:
        self.reshard()

    # ---- the model --------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """Made when the model, of which this is the outermost unit, is used for the first time."""
        if self._schedule is None:
            units = [unit for module in self.module.modules() if (unit := unit_of(module)) is not None]
            for unit in units:
                if unit._schedule is not None:
                    raise RuntimeError(
                        f"{type(unit.module).__name__}, inside {type(self.module).__name__}, was used before it: the "
                        "first forward pass must be that of the root module"
                    )
            schedule = Schedule(units)
            for unit in units:
                unit._schedule = schedule
        return self._schedule  # type: ignore[return-value]

    @property
    def was_used(self) -> bool:
        """Whether the model has come as far as to its first forward pass."""
        return self._schedule is not None

    @property
    def is_root(self) -> bool:
        return self._schedule is not None and self._schedule.units[0] is self

    @property
    def reshards_after_forward(self) -> bool:
        if self.reshard_after_forward is None:
            # Its backward pass is the first: what it frees it would gather again at once.
            return not self.is_root or not torch.is_grad_enabled()
        return self.reshard_after_forward

    # ---- memory -----------------------------------------------------------------------------------------------------

    def unshard(self) -> None:
        """Starts to gather the parameters."""
        step = 0 if self._schedule is None else self._schedule.step
        for bucket in self.buckets:
            bucket.unshard(_in_backward(), step)

    def wait(self) -> None:
        """Waits for them."""
        for bucket in self.buckets:
            bucket.wait()

    def reshard(self) -> None:
        """Frees them."""
        for bucket in self.buckets:
            bucket.reshard()

    def gather_for_forward(self) -> None:
        """Starts to gather them for a forward pass that is about to come here."""
        if not any(bucket.is_unsharded for bucket in self.buckets):
            self._is_ahead = True
            self.unshard()

    def drop_unused(self) -> None:
        """Frees what was gathered ahead for a forward pass, now over, that did not come here."""
        if self._is_ahead:
            self._is_ahead = False
            self.reshard()

    # ---- forward ----------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def _before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cast = self._precision.param_dtype if self._precision.cast_forward_inputs else None
        if self._in_backward:
            if not _in_backward():
                raise RuntimeError(
                    "an exception ended the backward pass before: call reset_iter_state() on the root module, on all "
                    "ranks, before going on"
                )
            # Computed again, for activation checkpointing: the end of the backward pass frees what this needs.
            self.unshard()
            self.wait()
            return _cast((args, kwargs), cast)  # type: ignore[no-any-return]
        self._phase = _Phase.FORWARD
        self._is_ahead = False
        schedule = self.schedule
        args, kwargs = _cast((args, kwargs), cast)
        self.unshard()
        self.wait()
        if not _in_backward():
            schedule.enter(self)
            coming = schedule.next_after(self)
            for unit in self.ahead_in_forward or ([] if coming is None else [coming]):
                unit.gather_for_forward()
        return self._watch_inputs(args, kwargs)

    @_disable_dynamo
    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._in_backward:
            self._phase = _Phase.IDLE
            if not _in_backward():
                if self.reshards_after_forward:
                    self.reshard()
                self.schedule.leave(self)
            if torch.is_grad_enabled():
                self._watch_outputs((args, kwargs), output)
        return _cast(output, self._precision.output_dtype)

    def _watch_outputs(self, inputs: Any, output: Any) -> None:
        given = {id(_whole(tensor)) for tensor in tensors_in(inputs)}
        for tensor in tensors_in(output):
            if not tensor.requires_grad:
                continue
            tensor.register_hook(self._before_backward)
            # What changes a view in place takes it out of the graph, with its hooks, but not what it is a view of.
            whole = _whole(tensor)
            if whole is not tensor and whole.grad_fn is not None and id(whole) not in given:
                whole.grad_fn.register_prehook(self._before_backward_of_whole)

    def _watch_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.is_grad_enabled():
            return args, kwargs
        inputs = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
        if not inputs:
            return args, kwargs
        watched = iter(_AfterBackward.apply(self, *inputs))  # type: ignore[no-untyped-call]
        return map_tensors(  # type: ignore[no-any-return]
            (args, kwargs), lambda tensor: next(watched) if tensor.requires_grad else tensor
        )

    # ---- backward ---------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def _before_backward(self, gradient: Tensor) -> Tensor:
        schedule = self.schedule
        self._in_backward = True
        schedule.ask_for_end()
        if self._phase is not _Phase.PRE_BACKWARD:
            self._phase = _Phase.PRE_BACKWARD
            self.unshard()
            self.wait()
            before = schedule.before(self)
            self._coming = list(self.ahead_in_backward) or ([] if before is None else [before])
            if not schedule.holds_gradients:
                self._gather_ahead()
        return gradient

    def _before_backward_of_whole(self, gradients: tuple[Tensor | None, ...]) -> None:
        known = [gradient for gradient in gradients if gradient is not None]
        if known:
            self._before_backward(known[0])

    def _gather_ahead(self) -> None:
        coming, self._coming = self._coming, []
        for unit in coming:
            if unit._phase is _Phase.IDLE:  # else it has been here meanwhile
                unit.unshard()

    @_disable_dynamo
    @torch.no_grad()
    def after_backward(self) -> None:
        """All gradients of the module's parameters are there, or as many as there will be."""
        self._phase = _Phase.POST_BACKWARD
        self._gather_ahead()
        for bucket in self.buckets:
            bucket.accumulate()
        for bucket in self.buckets:
            if self.reshards_after_backward:
                bucket.hide()
            if self.reduces:
                self.schedule.reduce(bucket, self.reduces_unused, self.averages_replicas)
            else:
                bucket.keep()
            if self.reshards_after_backward:
                bucket.free()

    def _make_room(self) -> None:
        """A quarter of the gradients are there."""
        # Whole gradients that were sent before have had this long to arrive, and their memory, with what torch copies
        # of it on the CPU, is as large as what is gathered ahead.
        self.schedule.release_gradients()
        # Where ranks may differ in what has a gradient, this comes at another time on each: nothing is sent then.
        if not self.reduces_unused:
            self._gather_ahead()

    def end_backward(self) -> None:
        """The backward pass of the model is over."""
        # Where no input required a gradient it comes here first. Where activations are computed again it may have been
        # used once more since, as a module that is shared is.
        if self._phase is not _Phase.POST_BACKWARD or any(bucket.has_gradients for bucket in self.buckets):
            self.after_backward()
        if self.reshards_after_backward and any(bucket.is_unsharded for bucket in self.buckets):
            self.reshard()
        self._phase = _Phase.IDLE
        self._in_backward = False

    def settle(self) -> None:
        """Frees what was gathered ahead for a backward pass, now over, that did not come here: the weights are about to
        change."""
        self._coming = []
        for bucket in self.buckets:
            if bucket.is_gathering:
                bucket.reshard()

    def reset(self) -> None:
        """Forgets the pass that is going on."""
        self._coming = []
        self.reshard()
        for bucket in self.buckets:
            bucket.forget()
        self._phase = _Phase.IDLE
        self._in_backward = False


class _AfterBackward(torch.autograd.Function):
    """The identity, whose backward is called when the gradients of a module's inputs are known."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.unit = unit
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.unit.after_backward()
        return (None, *gradients)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _whole(tensor: Tensor) -> Tensor:
    """What it is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    """Floating-point tensors, wherever they are, in another dtype."""
    if dtype is None:
        return values
    return map_tensors(values, lambda x: x.to(dtype) if x.is_floating_point() and x.dtype != dtype else x)
