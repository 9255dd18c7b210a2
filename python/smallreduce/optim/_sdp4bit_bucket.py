"""A bucket of :class:`SDP4Bit`: parameters in one flat buffer, of which each rank updates an equal part."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Bucket", "Member", "Slice", "assign"]

_MIB = 1 << 20
_ALIGNMENT = 64  # elements: twice the vectors of 512 bits, of 16-bit elements, which a loop takes at a time
_DEFAULT_CAP_MB = 25.0


@dataclass
class Member:
    """A parameter of a bucket.

    Attributes:
        index: Among all trained parameters of the model.
        name: Its first name in the model.
        group: Number of its parameter group.
        offset: Of its first element in the weights of the bucket. Its elements lie there in the order that they have in
            memory.
        packed: Of its first element in a buffer of all parameters without gaps.
        weight: Its elements in the bucket's weights, of its shape.
    """

    index: int
    name: str
    parameter: nn.Parameter
    group: int
    offset: int = 0
    packed: int = 0
    weight: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def stride(self) -> tuple[int, ...]:
        """That of the parameter if it leaves no gaps, as channels_last does not; else that of its shape."""
        parameter = self.parameter
        return _strides(tuple(parameter.shape), parameter.stride())

    @property
    def order(self) -> tuple[int, ...]:
        """In which its elements lie in memory: the stride, but for dimensions of one element, which order nothing."""
        return tuple(0 if size == 1 else step for size, step in zip(self.parameter.shape, self.stride, strict=True))

    def view(self, flat: Tensor, packed: bool = False) -> Tensor:
        """Its elements in a buffer laid out as the weights are, or packed."""
        offset = self.packed if packed else self.offset
        return flat[offset : offset + self.numel].as_strided(
            self.parameter.shape, self.stride, flat.storage_offset() + offset
        )


def _strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                break
            expected *= size
    else:
        return strides
    return torch.empty(shape, device="meta").stride()


@dataclass
class Slice:
    """What this rank updates of a parameter.

    Attributes:
        begin: Its first element, of the parameter's in the order of memory.
        offset: Its first element in this rank's part of the bucket.
        tensor: What the optimizer is given: 1-D, a view of the master.
    """

    member: Member
    begin: int
    offset: int
    tensor: nn.Parameter

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    def view(self, part: Tensor) -> Tensor:
        """Its elements of a buffer laid out as the rank's part."""
        return part[self.offset : self.offset + self.numel]


def assign(parameters: Sequence[Tensor], cap_mb: float | None) -> list[list[int]]:
    """The parameters, by number, of each bucket in the order of the forward pass: as DDP assigns them at first, or with
    ``find_unused_parameters=True`` keeps them. One dtype each."""
    if cap_mb is None:
        limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, int(_DEFAULT_CAP_MB * _MIB)]  # type: ignore[attr-defined]
    else:
        limits = [max(1, int(cap_mb * _MIB))]
    buckets, _ = dist._compute_bucket_assignment_by_size(list(parameters), limits)  # type: ignore[attr-defined]
    return [list(bucket) for bucket in buckets]


class Bucket:
    """The weights of some parameters, whole, and this rank's part of their master and of their gradients.

    The weights are W equal parts. Parameters and parts begin at multiples of 64 elements; what lies between is zero,
    and stays it. So a parameter is cut only where the vector loops of torch's CPU kernels are, which may round
    differently in their remainder: the slices of a parameter are updated to the bits of the whole.

    Attributes:
        number: Counted in the order of the forward pass.
        numel: Elements of all parameters.
        part: Elements of each rank's part.
        weights: ``W * part`` elements. The parameters are views of it.
        own: This rank's part of it.
        master: What the optimizer updates: ``part`` elements; ``own`` itself where it is not a copy.
        slices: What the optimizer is given of it.
        reduced: The reduced gradients since they were last set to zero; None: there are none.
        is_whole: They are those of all parameters, packed; else this rank's part, laid out as the master.
    """

    @torch.no_grad()
    def __init__(
        self, number: int, members: Sequence[Member], master_dtype: torch.dtype, copy: bool, rank: int, world: int
    ) -> None:
        self.number = number
        self.members = list(members)
        self.rank, self.world = rank, world
        offset = packed = 0
        for member in members:
            member.offset, member.packed = offset, packed
            offset += _ALIGNMENT * -(-member.numel // _ALIGNMENT)
            packed += member.numel
        self.numel = packed
        self.part = _ALIGNMENT * max(1, -(-offset // (world * _ALIGNMENT)))
        like = members[0].parameter
        self.dtype = like.dtype
        self.weights = torch.zeros(world * self.part, dtype=like.dtype, device=like.device)
        for member in members:
            member.weight = member.view(self.weights)
            member.weight.copy_(member.parameter)
            member.parameter.data = member.weight
        self.own = self.weights[rank * self.part :][: self.part]
        self.is_copy = copy or master_dtype != like.dtype
        self.master = self.own.to(master_dtype, copy=True) if self.is_copy else self.own
        self.slices = list(self._cut())
        self.reduced: Tensor | None = None
        self.is_whole = False
        self._version = 0  # of ``reduced`` when nothing had been done to the slices' gradients alone

    def _cut(self) -> Iterator[Slice]:
        begin, end = self.rank * self.part, (self.rank + 1) * self.part
        for member in self.members:
            first, last = max(member.offset, begin), min(member.offset + member.numel, end)
            if first < last:
                tensor = nn.Parameter(self.master[first - begin : last - begin])
                yield Slice(member, first - member.offset, first - begin, tensor)

    # ---- gradients --------------------------------------------------------------------------------------------------

    def _gradient(self, one: Slice) -> Tensor:
        assert self.reduced is not None
        return self._packed(self.reduced, one) if self.is_whole else one.view(self.reduced)

    @staticmethod
    def _packed(flat: Tensor, one: Slice) -> Tensor:
        return flat[one.member.packed + one.begin :][: one.numel]

    @property
    def whole_gradients(self) -> list[Tensor] | None:
        """The reduced gradient of each parameter, where all of it is known on this rank, and nothing has been done to
        this rank's part alone."""
        reduced = self.reduced
        if reduced is None or not self.is_whole or reduced._version != self._version:
            return None
        for one in self.slices:
            if one.tensor.grad is None or one.tensor.grad.data_ptr() != self._gradient(one).data_ptr():
                return None
        return [member.view(reduced, packed=True) for member in self.members]

    def accumulate(self, reduced: Tensor, is_whole: bool) -> Tensor | None:
        """Adds reduced gradients to those there are. Returns a packed buffer that is not needed any more, if any."""
        if self.reduced is None:
            self.reduced, self.is_whole = reduced, is_whole
            self._version = reduced._version
            spare = None
        elif self.is_whole == is_whole:
            self._take_back()
            with self._alike():
                self.reduced += reduced
            spare = reduced if is_whole else None
        else:
            # Of two ways to reduce, as before and after ``start_step``, only this rank's part is in both.
            self._take_back()
            whole, part = (self.reduced, reduced) if self.is_whole else (reduced, self.reduced)
            for one in self.slices:
                one.view(part).add_(self._packed(whole, one))
                one.tensor.grad = one.view(part)
            self.reduced, self.is_whole, spare = part, False, whole
        for one in self.slices:
            if one.tensor.grad is None:
                one.tensor.grad = self._gradient(one)
        return spare

    def _take_back(self) -> None:
        """Brings what the user has put into ``grad`` of the slices, instead of the view of ``reduced``, into that."""
        for one in self.slices:
            view, gradient = self._gradient(one), one.tensor.grad
            if gradient is None:
                view.zero_()
            elif gradient.data_ptr() != view.data_ptr():
                one.tensor.grad = view.copy_(gradient)

    @contextmanager
    def _alike(self) -> Iterator[None]:
        """Around what is done to all of the reduced gradients."""
        assert self.reduced is not None
        alike = self.reduced._version == self._version
        yield
        if alike:
            self._version = self.reduced._version

    def scale(self, factor: Tensor) -> None:
        """Multiplies the reduced gradients, as they stand in ``grad`` of the slices."""
        if self.reduced is not None:
            with self._alike():
                self.reduced.mul_(factor)
            for one in self.slices:
                gradient = one.tensor.grad
                if gradient is not None and gradient.data_ptr() != self._gradient(one).data_ptr():
                    gradient.mul_(factor)  # put there by the user

    def zero(self) -> None:
        """Sets the reduced gradients to zero, and forgets what the user has put in their place."""
        if self.reduced is not None:
            self.reduced.zero_()
            self._version = self.reduced._version
            for one in self.slices:
                one.tensor.grad = self._gradient(one)

    def forget(self) -> Tensor | None:
        """Lets go of the reduced gradients. Returns their buffer."""
        for one in self.slices:
            one.tensor.grad = None
        reduced, self.reduced = self.reduced, None
        return reduced

    # ---- weights ----------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Rounds the master to this rank's part of the weights."""
        if self.is_copy:
            self.own.copy_(self.master)

    def read(self, parameters: Container[int] | None = None) -> None:
        """Takes this rank's part of the weights for the master: of some parameters, by id, or of all."""
        self.clean()
        if self.is_copy:
            for one in self.slices:
                if parameters is None or id(one.member.parameter) in parameters:
                    one.view(self.master).copy_(one.view(self.own))

    def clean(self) -> None:
        """Sets what lies between the parameters to zero, in the weights and in the master."""
        self.clean_gaps(self.weights)
        if self.is_copy:
            begins = [one.offset for one in self.slices] + [self.part]
            for end, begin in zip([0, *(one.offset + one.numel for one in self.slices)], begins, strict=True):
                self.master[end:begin].zero_()

    def clean_gaps(self, flat: Tensor) -> None:
        """Sets what lies between the parameters to zero in a buffer laid out as the weights are. It is encoded with
        the parameters: it enters the scale of its group, a Hadamard transform spreads it, a NaN reaches all of it."""
        begins = [member.offset for member in self.members[1:]] + [flat.numel()]
        for member, begin in zip(self.members, begins, strict=True):
            if member.offset + member.numel < begin:
                flat[member.offset + member.numel : begin].zero_()
