"""Error-feedback memory of one FSDP2 module: what compression took from this rank's gradients, to be added to the next.

A rank sends every other rank its part of the gradients, so what it owes is of the size of the *unsharded* parameters.
Residuals belong to parameters. The reduce-scatter sees them in one flat tensor: rank after rank, parameter after
parameter, each begun at a whole block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import BLOCK, Layout
from smallreduce.codecs import IntQuant
from smallreduce.fsdp._torch_groups import Slot

__all__ = ["FullMemory", "LoCoMemory", "Memory", "Scratch", "packet_layout", "padded", "residual_nbytes"]

STORED = IntQuant(8, rounding="nearest")
"""How LoCo's residuals are kept."""


def padded(numel: int) -> int:
    """Elements of so many, to the end of their last block."""
    return BLOCK * -(-numel // BLOCK)


def packet_layout(shard_numel: int, world_size: int, begin: int, distance: int) -> Layout:
    """That of one parameter's stored residual, over a flat one in which each rank's part of it begins ``distance``
    elements after the one before, the first at ``begin``."""
    segments = [(begin + rank * distance, shard_numel) for rank in range(world_size)]
    return Layout.build(segments, STORED.format, torch.float32)


def residual_nbytes(feedback: str, slots: Sequence[Slot], world_size: int) -> int:
    """What ``nbytes`` of the memory of these parameters is, before there is one.

    Args:
        feedback: ``"full"`` or ``"int8"``.
    """
    shards = [slot.shard_shape.numel() for slot in slots]
    if feedback == "full":
        return torch.float32.itemsize * world_size * sum(map(padded, shards))
    return sum(packet_layout(shard, world_size, 0, shard).stride for shard in shards)


class Scratch:
    """fp32 memory for one module's flat residual at a time, shared by all modules of a model.

    Every FSDP root reduces on a CUDA stream of its own, so a module may take the memory on another stream than the one
    before it.
    """

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._given_back: torch.cuda.Event | None = None

    def of(self, numel: int, device: torch.device) -> Tensor:
        """So many elements, for the current stream, until :meth:`give_back`."""
        if self._given_back is not None:
            torch.cuda.current_stream(device).wait_event(self._given_back)
        if self._tensor is None or self._tensor.numel() < numel:
            self._tensor = torch.empty(numel, device=device)
        if self._tensor.is_cuda:
            # It may be let go of, for a larger one, while this stream still works on it.
            self._tensor.record_stream(torch.cuda.current_stream(device))
        return self._tensor[:numel]

    def give_back(self) -> None:
        """What was taken is done with, once the current stream has come to here."""
        if self._tensor is not None and self._tensor.is_cuda:
            self._given_back = torch.cuda.current_stream(self._tensor.device).record_event()


class Memory(ABC):
    """The residuals of one module's parameters.

    Args:
        slots: The parameters that get gradients.
        world_size: Of the shard group.
        device: Of the gradients.
    """

    def __init__(self, slots: Sequence[Slot], world_size: int, device: torch.device) -> None:
        self.world_size = world_size
        self.device = device
        self.slots: tuple[Slot, ...] = ()
        self._lay_out(tuple(slots))

    def follow(self, slots: Sequence[Slot]) -> None:
        """Takes the parameters that get gradients now; what others owe is forgotten."""
        if tuple(slots) != self.slots:
            self._lay_out(tuple(slots))

    def _lay_out(self, slots: tuple[Slot, ...]) -> None:
        self.slots = slots
        self._begins: dict[str, int] = {}
        begin = 0
        for slot in slots:
            self._begins[slot.name] = begin
            begin += padded(slot.shard_shape.numel())
        self._part = begin
        self.numel = self.world_size * begin

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each parameter's residual in a flat one, of shape (W, elements of its shard)."""
        rows = flat.view(self.world_size, self._part)
        return {slot.name: rows.narrow(1, self._begins[slot.name], slot.shard_shape.numel()) for slot in self.slots}

    def _clear_padding(self, views: dict[str, Tensor]) -> None:
        """Padding is not owed to anyone: what a codec leaves there (a Hadamard block spreads over it) is forgotten."""
        for slot in self.slots:
            if slot.shape.numel() < self.world_size * slot.shard_shape.numel():
                # Only the first dimension is ever padded, so it is a rank's elements from some place on.
                rest = slot.shape.numel()
                for row in views[slot.name]:
                    kept = min(max(rest, 0), len(row))
                    row[kept:].zero_()
                    rest -= len(row)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of all residuals of this rank."""

    @abstractmethod
    def lend(self, step: int) -> Tensor:
        """The flat residual, fp32, for the reduction of a step, which replaces it by what its codec takes away."""

    @abstractmethod
    def take_back(self, worker: Tensor, step: int) -> None:
        """Called with what :meth:`lend` gave when the reduction is over."""

    @abstractmethod
    def skip(self, step: int) -> None:
        """Called in the place of :meth:`lend` and :meth:`take_back` for a step that is reduced without feedback."""

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

    def slot(self, name: str) -> Slot:
        return next(slot for slot in self.slots if slot.name == name)


class FullMemory(Memory):
    """Residuals as they are, fp32: outputs plus residuals equal inputs."""

    def _lay_out(self, slots: tuple[Slot, ...]) -> None:
        old: dict[str, Tensor] = getattr(self, "_residuals", {})
        super()._lay_out(slots)
        self._flat = torch.zeros(self.numel, device=self.device)
        new = self._views(self._flat)
        for name, residual in old.items():
            if name in new:
                new[name].copy_(residual)
        self._residuals = new

    @property
    def nbytes(self) -> int:
        return self._flat.nbytes

    def lend(self, step: int) -> Tensor:
        return self._flat

    def take_back(self, worker: Tensor, step: int) -> None:
        self._clear_padding(self._residuals)

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
        scratch: Shared by all modules.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        world_size: int,
        device: torch.device,
        beta: float,
        reset_every: int,
        scratch: Scratch,
    ) -> None:
        self._packets: dict[str, Tensor] = {}
        self._beta = beta
        self._reset_every = reset_every
        self._scratch = scratch
        super().__init__(slots, world_size, device)

    def _lay_out(self, slots: tuple[Slot, ...]) -> None:
        super()._lay_out(slots)
        self._layouts = {
            slot.name: packet_layout(slot.shard_shape.numel(), self.world_size, self._begins[slot.name], self._part)
            for slot in slots
        }
        zeros = torch.zeros(self.numel, device=self.device)
        self._packets = {name: self._packets[name] for name in self._layouts if name in self._packets}
        for name in self._layouts.keys() - self._packets.keys():
            self._packets[name] = self._encode(zeros, name)

    def _encode(self, flat: Tensor, name: str) -> Tensor:
        layout = self._layouts[name]
        packet = self._packets.get(name)
        if packet is None:
            packet = torch.zeros(layout.stride, dtype=torch.uint8, device=self.device)
        ops.encode(flat, layout, packet)
        return packet

    @property
    def nbytes(self) -> int:
        return sum(packet.nbytes for packet in self._packets.values())

    def _starts_anew(self, step: int) -> bool:
        return step % self._reset_every == 0 and step > 0

    def lend(self, step: int) -> Tensor:
        flat = self._scratch.of(self.numel, self.device).zero_()
        if not self._starts_anew(step):
            for slot in self.slots:
                ops.decode(self._packets[slot.name], self._layouts[slot.name], flat)
        return flat

    def take_back(self, worker: Tensor, step: int) -> None:
        worker.mul_(1 - self._beta)
        if self._beta and not self._starts_anew(step):
            worker.div_(self._beta)
            for slot in self.slots:
                ops.decode_add(self._packets[slot.name], self._layouts[slot.name], worker)
            worker.mul_(self._beta)
        self._clear_padding(self._views(worker))
        for slot in self.slots:
            self._encode(worker, slot.name)
        self._scratch.give_back()

    def skip(self, step: int) -> None:
        """What is owed stays owed; but e begins anew where it would have."""
        if self._starts_anew(step):
            zeros = torch.zeros(self.numel, device=self.device)
            for slot in self.slots:
                self._encode(zeros, slot.name)

    def stored(self) -> dict[str, Tensor]:
        return {slot.name: self._packets[slot.name].clone() for slot in self.slots}

    def restore(self, stored: dict[str, Tensor]) -> None:
        for slot in self.slots:
            self._packets[slot.name].copy_(stored[slot.name])

    def owed(self, name: str, stored: Tensor, world_size: int) -> Tensor:
        slot = self.slot(name)
        shard = _shard_shape(slot, world_size).numel()
        parts = torch.empty(world_size, shard)
        ops.decode(stored.cpu(), packet_layout(shard, world_size, 0, shard), parts.view(-1))
        shards = parts.view(world_size, *_shard_shape(slot, world_size))
        return torch.cat(list(shards), slot.dim).narrow(0, 0, slot.shape[0])

    def store(self, name: str, owed: Tensor) -> Tensor:
        slot = self.slot(name)
        shard = slot.shard_shape.numel()
        layout = packet_layout(shard, self.world_size, 0, shard)
        packet = torch.zeros(layout.stride, dtype=torch.uint8)
        ops.encode(slot.split(owed, self.world_size).contiguous().view(-1), layout, packet)
        return packet

    def stored_shape(self, name: str, world_size: int) -> tuple[torch.dtype, int]:
        shard = _shard_shape(self.slot(name), world_size).numel()
        return torch.uint8, packet_layout(shard, world_size, 0, shard).stride


def _shard_shape(slot: Slot, world_size: int) -> torch.Size:
    """Of a padded shard on so many ranks."""
    shape = list(slot.shape)
    shape[slot.dim] = -(-shape[slot.dim] // world_size)
    return torch.Size(shape)
