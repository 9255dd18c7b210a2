"""What DGC does to a bucket on its way through DDP's communication hook: it clips, and corrects by momentum.

DGC is error feedback on gradients that momentum has corrected: what the residual of :class:`HookState` accumulates is
the *velocity*, and what top-k selects from it is sent. So all that is new here stands before the encoding (``u`` of the
paper, kept beside the residual) and right after it, where ``u`` forgets what was sent.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.nn.parallel import DistributedDataParallel

from smallreduce._layout import BLOCK
from smallreduce.codecs import TopK
from smallreduce.collectives import group_of
from smallreduce.collectives._channel import Channel
from smallreduce.ddp import HookState
from smallreduce.ddp._bucket import BucketPlan, Part
from smallreduce.ddp._memory import Binding, Residuals, blocks_of
from smallreduce.ddp._policy import Choice, choose
from smallreduce.optim._dgc_warmup import Warmup, ratio_at

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

    from smallreduce.optim._dgc import DGC

__all__ = ["DGCState", "advance"]


def advance(momenta: list[Tensor], gradients: list[Tensor], momentum: float, nesterov: bool) -> None:
    """Brings momenta to the next step, in place: ``u = m*u + g``, or with Nesterov ``u = m*(u + g)``.

    What they make of the gradients is ``u``, or with Nesterov ``u + g``.
    """
    if nesterov:
        torch._foreach_add_(momenta, gradients)
        torch._foreach_mul_(momenta, momentum)
    else:
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, gradients)


class DGCState(HookState):
    """The state of the communication hook that a :class:`DGC` registers.

    Args:
        optimizer: Whose parameter groups say how each parameter is treated.
        ddp: The model.
        warmup, clip_norm, momentum_masking, values, scaler: As for :class:`DGC`, checked.
    """

    _dtype = torch.float32  # momentum and velocity lose too much in 16 bits
    _with_momentum = True
    _reshard = "DGC.reshard() makes those of one number of ranks into those of another"

    def __init__(
        self,
        optimizer: DGC,
        ddp: DistributedDataParallel,
        *,
        warmup: Warmup,
        clip_norm: float | None,
        momentum_masking: bool,
        values: torch.dtype,
        scaler: GradScaler | None,
    ) -> None:
        # DDP holds this state, in C++, where the garbage collector does not see it.
        self._optimizer = weakref.ref(optimizer)
        self._ddp = weakref.ref(ddp)
        self._warmup = warmup
        self._clip_norm = clip_norm
        self._momentum_masking = momentum_masking
        self._values = values
        # Since the optimizer's last step:
        self._reduced = False  # gradients have been
        self._advanced = False  # momenta have been
        self._stages: dict[int, Tensor] = {}
        self._group_of: dict[str, int] = {}
        self._ratios: tuple[float, ...] | None = None  # of the groups, for which the buckets are planned
        super().__init__(None, module=ddp, scaler=scaler)
        self.regroup()

    # ---- what the optimizer calls -----------------------------------------------------------------------------------

    def regroup(self) -> None:
        """The optimizer's groups are others than before."""
        self._group_of = {
            self._named(parameter)[2]: index
            for index, group in enumerate(self._options())
            for parameter in group["params"]
        }
        self._ratios = None

    @property
    def is_alone(self) -> bool:
        """Whether there is nothing to reduce: at world size 1."""
        return self._alone()

    @property
    def has_reduced(self) -> bool:
        """Whether there are gradients for a step: a synchronised backward pass since the last one, or none needed."""
        return self._reduced or self.is_alone

    def end_step(self) -> None:
        """The optimizer uses the gradients of the last backward pass."""
        self._reduced = self._advanced = False

    def reduced(self) -> dict[int, bool]:
        """The parameters, by id, whose gradients the last backward pass reduced: whether momentum is in them."""
        corrected = {slot.name for plan in self._plans.values() for part in plan.parts for slot in part.slots}
        known = {slot.name for plan in self._plans.values() for slot in plan.slots}
        return {key: name in corrected for key, (_, _, name) in self._names.items() if name in known}

    def release(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gives away momentum and velocity of a parameter, shaped as it is, in units of gradients; None without any."""
        residuals = self._memory.pop(self._named(parameter)[2], None)
        if residuals is None or residuals.momentum is None:
            return None
        momentum, velocity = (
            _as_in_bucket(rows[0, : residuals.numel].to(parameter.device) / self._scale, parameter)
            for rows in (residuals.momentum, residuals.worker)
        )
        return momentum, velocity

    # ---- a step -----------------------------------------------------------------------------------------------------

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """See :meth:`smallreduce.ddp.HookState.reduce`."""
        future = super().reduce(bucket)
        self._reduced = bucket.is_last()
        return future

    def _begin_step(self) -> None:
        super()._begin_step()
        if self._advanced:
            raise RuntimeError(
                "a second synchronised backward pass before DGC.step(): momentum has gone into the gradients of the "
                "first. Accumulate gradients under ddp_model.no_sync(), and pass scaler= to DGC where a GradScaler may "
                "skip a step"
            )
        self._reduced = False
        ratios = tuple(self._ratio(group, self.step - 1) for group in self._options())
        if min(ratios) >= 1 and not self._alone():
            self._uncompressed_steps += 1
        if ratios != self._ratios:
            self._ratios = ratios
            self._forget_plans()

    def _prepare(self, plan: BucketPlan, buffer: Tensor) -> None:
        """Clips the gradient of each parameter."""
        if self._clip_norm is None:
            return
        # The paper clips a rank's share of the mean, 1/N of its own gradient, at N**-0.5 of the threshold.
        limit = self._scale * self._clip_norm * math.sqrt(group_of(self._process_group).size())
        gradients = [buffer.narrow(0, slot.offset, slot.numel) for slot in plan.slots]
        wide = torch.promote_types(buffer.dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(gradients, 2.0, wide))
        torch._foreach_mul_(gradients, list((limit / norms).clamp(max=1.0).unbind()))

    def _launch(
        self,
        part: Part,
        buffer: Tensor,
        measured: bool,
        futures: list[torch.futures.Future[Any]],
        masked: Tensor | None = None,
    ) -> Tensor | None:
        assert part.binding is not None and part.binding.momentum is not None
        ddp = self._ddp()
        # Under join() this may be a rank that has joined, which takes no steps of its own.
        self._advanced = ddp is None or not ddp._join_config.enable
        momentum = part.binding.momentum[0]
        values = self._staged(part, buffer)
        self._correct(part, values, momentum)
        velocity = super()._launch(part, values, measured, futures, momentum if self._momentum_masking else None)
        if values is not buffer:
            futures[-1] = futures[-1].then(lambda done: _copy(part, done.value(), buffer))
        return velocity

    def _staged(self, part: Part, buffer: Tensor) -> Tensor:
        """The bucket in fp32: itself, or a copy, which is kept and used again."""
        if buffer.dtype == torch.float32:
            return buffer
        staged = self._stages.get(part.number)
        if staged is None or staged.shape != buffer.shape or staged.device != buffer.device:
            staged = self._stages[part.number] = torch.empty_like(buffer, dtype=torch.float32)
        return staged.copy_(buffer)

    def _correct(self, part: Part, values: Tensor, momentum: Tensor) -> None:
        """Puts into ``values``, in place of the gradients, what the velocity accumulates."""
        by_group: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        block = 0
        for slot in part.slots:
            momenta, gradients = by_group.setdefault(self._group_of[slot.name], ([], []))
            momenta.append(momentum.narrow(0, BLOCK * block, slot.numel))
            gradients.append(values.narrow(0, slot.offset, slot.numel))
            block += blocks_of(slot.numel)
        options = self._options()
        for index, (momenta, gradients) in by_group.items():
            nesterov = options[index]["nesterov"]
            advance(momenta, gradients, options[index]["momentum"], nesterov)
            (torch._foreach_add_ if nesterov else torch._foreach_copy_)(gradients, momenta)

    def _follow_scaler(self) -> bool:
        skipped = super()._follow_scaler()
        if skipped:
            self._advanced = False
        return skipped

    # ---- which parameters are compressed ----------------------------------------------------------------------------

    def _options(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the DGC optimizer of this model is gone; keep it for as long as the model is trained")
        return optimizer.param_groups

    def _ratio(self, group: Mapping[str, Any], step: int) -> float:
        return float(max(group["ratio"], ratio_at(self._warmup, step)))

    def _choose(self, name: str | None, parameter: Tensor) -> Choice:
        return self._choose_in(name, parameter, self.step - 1 if self.step else 0)

    def _choose_loaded(self, name: str, parameter: Tensor) -> Choice:
        # They may be of any stage of the warm-up.
        return self._choose_in(name, parameter, sum(steps for steps, _ in self._warmup))

    def _choose_in(self, name: str | None, parameter: Tensor, step: int) -> Choice:
        if name not in self._group_of:
            return Choice(None, "in no parameter group of the optimizer")
        ratio = self._ratio(self._options()[self._group_of[name]], step)
        if ratio >= 1:
            return Choice(None, "a ratio of 1")
        return choose(name, parameter, TopK(ratio, self._values), None, True)

    @staticmethod
    def _check_residuals(residuals: Residuals | None, name: str, numel: int, choice: Choice) -> None:
        if residuals is not None and choice.codec is None:
            raise ValueError(
                f"{name} has been compressed and is now to be dense ({choice.reason}): with no codec, what the ranks "
                "have held back of it would never be sent. A group that was compressed keeps a ratio below 1"
            )
        HookState._check_residuals(residuals, name, numel, choice)

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._stages.clear()

    def _bind(self, part: Part, device: torch.device, channel: Channel) -> Binding:
        new = {slot.name for slot in part.slots if slot.name not in self._memory}
        binding = super()._bind(part, device, channel)
        optimizer = self._optimizer()
        assert optimizer is not None
        for parameter, _, name in self._names.values():
            # Until now its gradients were dense, and their momentum that of the mean, the same on all ranks.
            if name in new and "momentum_buffer" in optimizer.state.get(parameter, ()):
                kept = self._memory[name].momentum
                assert kept is not None
                momentum = optimizer.state[parameter].pop("momentum_buffer")
                kept[:, : parameter.numel()] = self._scale * _flat_as_in_bucket(momentum, parameter)
        return binding

    def _header(self) -> str:
        groups = [
            # A tensor is written with its device, which is each rank's own.
            {name: float(group[name]) if name == "lr" else group[name] for name in _AGREED}
            for group in self._options()
        ]
        return (
            f"smallreduce.optim.DGC: {groups}, warmup {self._warmup}, clip_norm {self._clip_norm}, momentum_masking "
            f"{self._momentum_masking}, values {self._values}, {super()._header()}"
        )

    # ---- state ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See :meth:`smallreduce.ddp.HookState.load_state_dict`."""
        super().load_state_dict(state_dict)
        self._reduced = self._advanced = False


_AGREED = ("lr", "momentum", "nesterov", "weight_decay", "ratio")


def _copy(part: Part, values: Tensor, buffer: Tensor) -> Tensor:
    places, results = (
        [tensor.narrow(0, slot.offset, slot.numel) for slot in part.slots] for tensor in (buffer, values)
    )
    torch._foreach_copy_(places, results)
    return buffer


def _strides_in_bucket(parameter: Tensor) -> tuple[int, ...]:
    # As DDP lays out its views of a bucket.
    if torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def _as_in_bucket(values: Tensor, parameter: Tensor) -> Tensor:
    """Flat ``values`` in the order of a bucket, shaped as their parameter."""
    return values.as_strided(parameter.shape, _strides_in_bucket(parameter))


def _flat_as_in_bucket(values: Tensor, parameter: Tensor) -> Tensor:
    """``values`` of the shape of their parameter, flat and in the order of a bucket."""
    flat = torch.empty(parameter.numel(), dtype=values.dtype, device=values.device)
    _as_in_bucket(flat, parameter).copy_(values)
    return flat
