"""Error-feedback memory of some parameters: what compression took from this rank's gradients, to be added to the next.

A rank sends every other rank its part of the gradients, so what it owes is of the size of the *unsharded* parameters.
Residuals belong to parameters, wherever a reduce-scatter sees them.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import as_int
from smallreduce.collectives._pool import Pool
from smallreduce.fsdp._residual_layout import Arrangement, Divided, packet_layout, stored_nbytes

__all__ = [
    "Feedback",
    "FullMemory",
    "LoCoMemory",
    "Loan",
    "Memory",
    "ResidualMemory",
    "parse_feedback",
    "warn_of_memory",
]


_SUBSETS_KEPT = 16
"""How some of the parameters lie, of those that were reduced last: a model may drop other layers in every step."""


class ResidualMemory(UserWarning):
    """What the residuals of error feedback take on every rank."""


@dataclass(frozen=True)
class Feedback:
    """How gradients are given error feedback.

    Attributes:
        kind: ``"full"`` or ``"int8"``.
        beta, reset_every: Of LoCo.
    """

    kind: str
    beta: float
    reset_every: int

    def __str__(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind} (beta {self.beta}, reset_every {self.reset_every})"

    def memory(self, slots: Sequence[Divided], world_size: int, device: torch.device) -> Memory:
        """Residuals of zero."""
        if self.kind == "full":
            return FullMemory(slots, world_size, device)
        return LoCoMemory(slots, world_size, device, self.beta, self.reset_every)


def parse_feedback(kind: str | None, beta: float, reset_every: int) -> Feedback | None:
    """The arguments that users give, ``kind`` checked before.

    Raises:
        TypeError, ValueError: ``beta`` or ``reset_every`` is not possible.
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta must be a float, got {type(beta).__name__}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    if as_int(reset_every, "reset_every") < 1:
        raise ValueError(f"reset_every must be at least 1, got {reset_every}")
    return None if kind is None else Feedback(kind, float(beta), reset_every)


def warn_of_memory(feedback: Feedback, slots: Iterable[Divided], world_size: int, stacklevel: int) -> None:
    """Says what the residuals of these parameters will take.

    Args:
        stacklevel: Of the user's call, as for :func:`warnings.warn` from where this is called.
    """
    slots = list(slots)
    elements = sum(slot.shape.numel() for slot in slots)
    nbytes = stored_nbytes(feedback.kind, slots, world_size)
    warnings.warn(
        f"feedback={feedback.kind!r} keeps {nbytes} bytes ({nbytes / 2**20:.1f} MiB) of residuals on every rank, for "
        f"{elements} trainable elements, unsharded; feedback=None, with stochastic rounding, keeps none",
        ResidualMemory,
        stacklevel=stacklevel + 1,
    )


@dataclass
class Loan:
    """Residuals of some parameters while these are reduced.

    Attributes:
        worker: The flat residual, fp32, for the reduction, which replaces it by what its codec takes away.
    """

    worker: Tensor
    arrangement: Arrangement
    _memory: Memory
    _step: int
    _pool: Pool

    def give_back(self) -> None:
        """To be called once, when the reduction is over."""
        self._memory._take_back(self.worker, self._step, self._pool, self.arrangement)


class Memory(ABC):
    """The residuals of parameters that are reduced together.

    Args:
        slots: The parameters that get gradients, in the order in which the reduce-scatter sees them.
        world_size: Of the shard group.
        device: Of the gradients.
    """

    def __init__(self, slots: Sequence[Divided], world_size: int, device: torch.device) -> None:
        self.world_size = world_size
        self.device = device
        self._lay_out(slots)

    @property
    def slots(self) -> tuple[Divided, ...]:
        """The parameters."""
        return self._whole.slots

    def follow(self, slots: Sequence[Divided], device: torch.device) -> None:
        """Takes the parameters that get gradients now, and their device; what others owe is forgotten."""
        if tuple(slots) != self.slots or device != self.device:
            self.device = device
            self._lay_out(slots)

    def _lay_out(self, slots: Sequence[Divided]) -> None:
        self._whole = Arrangement(slots, self.world_size)
        arrange = functools.partial(Arrangement, world_size=self.world_size)
        self._some = functools.lru_cache(maxsize=_SUBSETS_KEPT)(arrange)

    def _arrange(self, members: Collection[str] | None) -> Arrangement:
        if members is None or len(members) == len(self.slots):
            return self._whole
        return self._some(tuple(slot for slot in self.slots if slot.name in members))

    def lend(self, step: int, pool: Pool, members: Collection[str] | None = None) -> Loan:
        """The residuals for the reduction of a step, which are not to be lent again before they are given back.

        Args:
            step: Of the module: how often it has reduced before.
            pool: For flat residuals that are only made for the reduction.
            members: The names of the parameters that are reduced, of some of these; None: all. What others owe stays
                owed.
        """
        arrangement = self._arrange(members)
        return Loan(self._lend(step, pool, arrangement), arrangement, self, step, pool)

    def slot(self, name: str) -> Divided:
        return next(slot for slot in self.slots if slot.name == name)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of all residuals of this rank."""

    @abstractmethod
    def _lend(self, step: int, pool: Pool, arrangement: Arrangement) -> Tensor:
        """The flat residual of the parameters of the arrangement."""

    @abstractmethod
    def _take_back(self, worker: Tensor, step: int, pool: Pool, arrangement: Arrangement) -> None:
        """Called with what :meth:`_lend` gave when the reduction is over."""

    @abstractmethod
    def skip(self, step: int) -> None:
        """Called in the place of :meth:`lend` for a step that is reduced without feedback."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """What is kept for each parameter, as it is saved, in memory of its own."""

    @abstractmethod
    def restore(self, stored: dict[str, Tensor]) -> None:
        """Takes over what :meth:`stored` gave for these parameters."""

    @abstractmethod
    def owed(self, name: str, stored: Tensor, world_size: int) -> Tensor:
        """What :meth:`stored` gave for a parameter on one of ``world_size`` ranks, as a tensor of its shape; fp32."""

    @abstractmethod
    def store(self, name: str, owed: Tensor) -> Tensor:
        """The reverse of :meth:`owed`, for this number of ranks."""

    @abstractmethod
    def stored_shape(self, name: str, world_size: int) -> tuple[torch.dtype, int]:
        """dtype and elements of what is stored for a parameter on one of ``world_size`` ranks."""


class FullMemory(Memory):
    """Residuals as they are, fp32: outputs plus residuals equal inputs."""

    def _lay_out(self, slots: Sequence[Divided]) -> None:
        old: dict[str, Tensor] = getattr(self, "_residuals", {})
        super()._lay_out(slots)
        self._flat = torch.zeros(self._whole.numel, device=self.device)
        self._residuals = self._whole.views(self._flat)
        for name, residual in old.items():
            if name in self._residuals:
                self._residuals[name].copy_(residual)

    @property
    def nbytes(self) -> int:
        return self._flat.nbytes

    def _lend(self, step: int, pool: Pool, arrangement: Arrangement) -> Tensor:
        if arrangement is self._whole:
            return self._flat
        flat = pool.take(arrangement.numel, torch.float32, self.device)
        for name, view in arrangement.views(flat).items():
            view.copy_(self._residuals[name])
        return flat

    def _take_back(self, worker: Tensor, step: int, pool: Pool, arrangement: Arrangement) -> None:
        if arrangement is not self._whole:
            for name, view in arrangement.views(worker).items():
                self._residuals[name].copy_(view)
            pool.give(worker)
        self._whole.clear_padding(self._flat)

    def skip(self, step: int) -> None:
        """What is owed stays owed."""

    def stored(self) -> dict[str, Tensor]:
        return {slot.name: slot.join(self._residuals[slot.name]).reshape(-1) for slot in self.slots}

    def restore(self, stored: dict[str, Tensor]) -> None:
        for slot in self.slots:
            parts = slot.split(stored[slot.name].to(self.device).view(slot.shape), self.world_size)
            self._residuals[slot.name].copy_(parts)

    def owed(self, name: str, stored: Tensor, world_size: int) -> Tensor:
        return stored.view(self.slot(name).shape)

    def store(self, name: str, owed: Tensor) -> Tensor:
        return owed.reshape(-1)

    def stored_shape(self, name: str, world_size: int) -> tuple[torch.dtype, int]:
        return torch.float32, self.slot(name).shape.numel()


class LoCoMemory(Memory):
    """LoCo (arXiv:2407.04480): an exponential average of what compression takes away, in 8-bit integers.

    Args:
        beta: The weight of what was, in ``e <- beta * e + (1 - beta) * (h - decoded)``, h the gradient plus e.
        reset_every: Steps after which e begins at zero again.
    """

    def __init__(
        self, slots: Sequence[Divided], world_size: int, device: torch.device, beta: float, reset_every: int
    ) -> None:
        self._packets: dict[str, Tensor] = {}
        self._beta = beta
        self._reset_every = reset_every
        super().__init__(slots, world_size, device)

    def _lay_out(self, slots: Sequence[Divided]) -> None:
        super()._lay_out(slots)
        old, self._packets = self._packets, {}
        for slot in self.slots:
            if slot.name in old:
                self._packets[slot.name] = old[slot.name].to(self.device)
        self._forget([slot.name for slot in self.slots if slot.name not in old])

    def _forget(self, names: Sequence[str]) -> None:
        """Lets the residuals of some parameters begin at zero."""
        for name in names:
            layout = self._own_layout(name)
            self._encode(name, torch.zeros(layout.extent, device=self.device), layout)

    def _own_layout(self, name: str) -> Layout:
        """Over a flat residual of this parameter alone."""
        count, numel = self.slot(name).parts(self.world_size)
        return packet_layout(count, numel, 0, numel)

    def _encode(self, name: str, flat: Tensor, layout: Layout) -> None:
        if name not in self._packets:
            self._packets[name] = torch.zeros(layout.stride, dtype=torch.uint8, device=self.device)
        ops.encode(flat, layout, self._packets[name])

    @property
    def nbytes(self) -> int:
        return sum(packet.nbytes for packet in self._packets.values())

    def _starts_anew(self, step: int) -> bool:
        return step % self._reset_every == 0 and step > 0

    def _lend(self, step: int, pool: Pool, arrangement: Arrangement) -> Tensor:
        flat = pool.take(arrangement.numel, torch.float32, self.device).zero_()
        if self._starts_anew(step):
            self._forget([slot.name for slot in self.slots if slot.name not in arrangement.packets])
            return flat
        for name, layout in arrangement.packets.items():
            ops.decode(self._packets[name], layout, flat)
        return flat

    def _take_back(self, worker: Tensor, step: int, pool: Pool, arrangement: Arrangement) -> None:
        worker.mul_(1 - self._beta)
        if self._beta and not self._starts_anew(step):
            worker.div_(self._beta)
            for name, layout in arrangement.packets.items():
                ops.decode_add(self._packets[name], layout, worker)
            worker.mul_(self._beta)
        arrangement.clear_padding(worker)
        for name, layout in arrangement.packets.items():
            self._encode(name, worker, layout)
        pool.give(worker)

    def skip(self, step: int) -> None:
        """What is owed stays owed; but e begins anew where it would have."""
        if self._starts_anew(step):
            self._forget([slot.name for slot in self.slots])

    def stored(self) -> dict[str, Tensor]:
        return {slot.name: self._packets[slot.name].clone() for slot in self.slots}

    def restore(self, stored: dict[str, Tensor]) -> None:
        for slot in self.slots:
            self._packets[slot.name].copy_(stored[slot.name])

    def owed(self, name: str, stored: Tensor, world_size: int) -> Tensor:
        slot = self.slot(name)
        count, numel = slot.parts(world_size)
        parts = torch.empty(count, numel)
        ops.decode(stored.cpu(), packet_layout(count, numel, 0, numel), parts.view(-1))
        return slot.join(parts)

    def store(self, name: str, owed: Tensor) -> Tensor:
        layout = self._own_layout(name)
        packet = torch.zeros(layout.stride, dtype=torch.uint8)
        ops.encode(self.slot(name).split(owed, self.world_size).contiguous().view(-1), layout, packet)
        return packet

    def stored_shape(self, name: str, world_size: int) -> tuple[torch.dtype, int]:
        count, numel = self.slot(name).parts(world_size)
        return torch.uint8, packet_layout(count, numel, 0, numel).stride
