"""Parameters that are updated and exchanged together, and the flat memory that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.optim._cser_scheme import Scheme

__all__ = ["Bucket"]

_RUN_NUMEL = 1 << 16  # of four tensors, 1 MB


class Bucket:
    """Some parameters of one group, and flat fp32 tensors that hold a value for each of their elements.

    In a flat tensor every parameter begins at a multiple of 32 elements, and what lies between two is zero. So a flat
    tensor is its own residual's block order (docs/wire-formats.md, section 10).

    Args:
        number: Of the bucket; random bits depend on it.
        group: Number of the parameter group.
        parameters: fp32, dense, on one device.
        scheme: What memory is needed.
        alone: World size 1: nothing is exchanged.

    Attributes:
        segments: ``(offset, numel)`` of each parameter in a flat tensor.
        update: Scratch: this step's update, or what is sent.
        left: Scratch: what an exchange leaves. None where nothing is left.
        held: What lasts, by name: ``momentum_buffer``; ``decay_buffer``, the momentum of weight decay that is not sent;
            ``shared``, the model that is the same on all ranks; ``residual``, what is kept apart from the parameters.
    """

    def __init__(self, number: int, group: int, parameters: Sequence[Tensor], scheme: Scheme, alone: bool) -> None:
        self.number = number
        self.group = group
        self.parameters = list(parameters)
        self._scheme = scheme
        self.segments: list[tuple[int, int]] = []
        blocks = 0
        for parameter in self.parameters:
            self.segments.append((BLOCK * blocks, parameter.numel()))
            blocks += -(-parameter.numel() // BLOCK)
        self._flat_numel = BLOCK * blocks
        self.numel = sum(length for _, length in self.segments)
        self.update = self._zeros()
        self.left = self._zeros() if scheme.leaves_residual and not alone else None
        self._runs = self._cut()
        self.held: dict[str, Tensor] = {}
        if scheme.keeps_shared and not alone:
            torch._foreach_copy_(self.views(self._hold("shared")), self.parameters)
        if scheme.keeps_residual and not alone:
            self._hold("residual")

    def _zeros(self) -> Tensor:
        return torch.zeros(self._flat_numel, device=self.parameters[0].device)

    def _hold(self, name: str) -> Tensor:
        if name not in self.held:
            self.held[name] = self._zeros()
        return self.held[name]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of a flat tensor that belongs to each parameter, in its shape."""
        return [
            flat.narrow(0, offset, numel).view(parameter.shape)
            for (offset, numel), parameter in zip(self.segments, self.parameters, strict=True)
        ]

    def held_of_each(self) -> list[dict[str, Tensor]]:
        """For each parameter its part of what lasts."""
        parts: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        for name, flat in self.held.items():
            for part, view in zip(parts, self.views(flat), strict=True):
                part[name] = view
        return parts

    def restore(self, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes over what :meth:`held_of_each` gave for each parameter, beside its value, ``parameter``. A state of
        world size 1 has no shared model and no residual: the ranks begin alike."""
        if "shared" in self.held:
            torch._foreach_copy_(self.views(self.held["shared"]), [part["parameter"] for part in parts])
        for name in parts[0]:
            if name != "parameter":
                torch._foreach_copy_(self.views(self._hold(name)), [part[name] for part in parts])

    def _cut(self) -> list[_Run]:
        """Cuts the parameters into runs whose memory stays in a CPU's cache from one operation to the next; on other
        devices few large operations are better."""
        limit = _RUN_NUMEL if self.update.device.type == "cpu" else self._flat_numel
        runs = []
        first = begin = 0
        for number, (offset, numel) in enumerate(self.segments, 1):
            end = offset + BLOCK * -(-numel // BLOCK)
            if end - begin >= limit or number == len(self.segments):
                part = slice(first, number)
                left = [] if self.left is None else self.views(self.left)[part]
                runs.append(_Run(slice(begin, end), self.parameters[part], self.views(self.update)[part], left))
                first, begin = number, end
        return runs

    # ---- the local part of a step -----------------------------------------------------------------------------------

    def take_gradients(self, options: Mapping[str, Any], inverse_scale: float, alone: bool) -> None:
        """Makes ``update`` this step's, after weight decay, momentum and learning rate; or, where it is not sent,
        applies it.

        The operations are those of ``torch.optim.SGD``, in its order.

        Args:
            options: The parameter group.
            inverse_scale: What the gradients are multiplied by.
            alone: The update is not sent.

        Raises:
            TypeError: A sparse gradient.
        """
        lr, momentum, weight_decay = float(options["lr"]), options["momentum"], options["weight_decay"]
        velocities = self._hold("momentum_buffer") if momentum else None
        for run in self._runs:
            update = self.update[run.span]
            run.copy_gradients(update)
            if inverse_scale != 1.0:
                update.mul_(inverse_scale)
            if weight_decay and not self._scheme.is_error_feedback:
                torch._foreach_add_(run.updates, run.parameters, alpha=weight_decay)
            run.hold_frozen_still()
            if velocities is not None:
                velocity = velocities[run.span].mul_(momentum).add_(update)
                if options["nesterov"]:
                    update.add_(velocity, alpha=momentum)
                else:
                    update.copy_(velocity)
                run.hold_frozen_still()
            if alone:
                torch._foreach_add_(run.parameters, run.updates, alpha=-lr)
            else:
                update.mul_(lr)

    def decay(self, options: Mapping[str, Any]) -> None:
        """Weight decay that is not sent, with a momentum of its own: where all ranks have the same parameters, they all
        do the same."""
        lr, momentum, weight_decay = float(options["lr"]), options["momentum"], options["weight_decay"]
        trained = [p for p in self.parameters if p.requires_grad]
        if not (weight_decay and self._scheme.is_error_feedback and trained):
            return
        if not momentum:
            torch._foreach_add_(trained, trained, alpha=-lr * weight_decay)
            return
        velocity = self._hold("decay_buffer").mul_(momentum)
        velocities = [view for view, p in zip(self.views(velocity), self.parameters, strict=True) if p.requires_grad]
        torch._foreach_add_(velocities, trained, alpha=weight_decay)
        if options["nesterov"]:
            torch._foreach_add_(trained, trained, alpha=-lr * weight_decay)
            torch._foreach_add_(trained, velocities, alpha=-lr * momentum)
        else:
            torch._foreach_add_(trained, velocities, alpha=-lr)

    # ---- around an exchange -----------------------------------------------------------------------------------------

    def residual(self) -> Tensor | None:
        """The residual of an exchange of ``update``: zeros, if what is left is applied at once."""
        return self.held.get("residual") if self.left is None else self.left.zero_()

    def end_update(self) -> None:
        """Applies the mean that ``update`` has become, and what was left."""
        for run in self._runs:
            if "shared" in self.held:
                self.held["shared"][run.span].sub_(self.update[run.span])
            if self.left is not None:
                self.left[run.span].add_(self.update[run.span])
            torch._foreach_sub_(run.parameters, run.updates if self.left is None else run.left)

    def begin_reset(self) -> None:
        """Makes ``update`` what this rank's parameters differ by from the shared model."""
        for run in self._runs:
            torch._foreach_copy_(run.updates, run.parameters)
            self.update[run.span].sub_(self.held["shared"][run.span])

    def end_reset(self) -> None:
        """Adds the mean that ``update`` has become to the shared model, and sets the parameters by it."""
        for run in self._runs:
            update = self.update[run.span]
            update.copy_(self.held["shared"][run.span].add_(update))
            if self.left is not None:
                update.add_(self.left[run.span])
            torch._foreach_copy_(run.parameters, run.updates)


@dataclass(frozen=True)
class _Run:
    """Some parameters, one after the other.

    Attributes:
        span: Theirs in a flat tensor.
        updates, left: For each its part of those tensors.
    """

    span: slice
    parameters: list[Tensor]
    updates: list[Tensor]
    left: list[Tensor]

    def copy_gradients(self, update: Tensor) -> None:
        """Copies the gradients into ``update``, zero for those that are None."""
        given = [(place, p.grad) for place, p in zip(self.updates, self.parameters, strict=True) if p.grad is not None]
        for _, gradient in given:
            if gradient.layout is not torch.strided:
                raise TypeError(f"gradients must be dense, got layout {gradient.layout}: make it with sparse=False")
        if len(given) < len(self.parameters):
            update.zero_()
        if given:
            torch._foreach_copy_([place for place, _ in given], [gradient for _, gradient in given])

    def hold_frozen_still(self) -> None:
        for update, parameter in zip(self.updates, self.parameters, strict=True):
            if not parameter.requires_grad:
                update.zero_()
