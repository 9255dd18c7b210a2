"""The parameters that are gathered and reduced together: a flat shard, a flat gathered buffer, and views of both."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from smallreduce.collectives import channel_of
from smallreduce.collectives._compat import all_gather_single
from smallreduce.fsdp._gather import borrow_engine
from smallreduce.fsdp._leg import Progress
from smallreduce.ragged._memory import Residuals
from smallreduce.ragged._packing import Packing
from smallreduce.ragged._placement import RaggedShard
from smallreduce.ragged._plan import plan
from smallreduce.ragged._policy import Policy
from smallreduce.ragged._tensor import RaggedTensor

__all__ = ["Bucket", "Named", "Slot"]

_ALIGNMENT = 16
"""Bytes: every rank's part of what is gathered and of what is reduced is a multiple of so many, as NCCL likes it."""

_PACKINGS_KEPT = 16
"""Of subsets of a bucket's parameters that have gradients: a model may drop other layers in every step."""


@dataclass(eq=False)
class Named:
    """A parameter that is to be sharded.

    Attributes:
        places: The modules that have it, and its name in each.
        block: Elements that are not cut.
    """

    name: str
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]
    block: int


@dataclass(eq=False)
class Slot:
    """A parameter of a bucket.

    Attributes:
        index: In the bucket.
        begin, length: Of what this rank owns, in the rank's flat shard.
        sharded, unsharded: What the modules have for it by turns.
        accumulated: Its gradient of passes that were not reduced, where that is of another dtype than its own.
    """

    index: int
    name: str
    places: list[tuple[nn.Module, str]]
    placement: RaggedShard
    begin: int
    length: int
    sharded: RaggedTensor
    unsharded: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.empty(0), requires_grad=False))
    accumulated: Tensor | None = None

    @property
    def local(self) -> Tensor:
        """This rank's elements, 1-D."""
        return self.sharded.to_local()

    def put(self, parameter: Tensor) -> None:
        """Gives it, which is a parameter, to the modules."""
        for module, name in self.places:
            # Past nn.Module.__setattr__, whose checks take long, unless the module has one of its own.
            if type(module).__setattr__ is nn.Module.__setattr__:
                module._parameters[name] = cast(nn.Parameter, parameter)
            else:
                setattr(module, name, parameter)


class _Work(Protocol):
    def wait(self) -> object: ...


class Bucket:
    """Parameters of one dtype, cut as :func:`smallreduce.ragged.plan` says.

    Args:
        parameters: Unsharded; each is replaced in its modules by one that is sharded.
        policy: Of the module.

    Attributes:
        number: Among the buckets of the model; the same on all ranks.
        plan: Where they lie.
        slots: The parameters.
        shard: What this rank owns, flat, of the parameters' dtype; their local parts are views of it.
        gathered: What all ranks own, of the dtype in which the module computes; without memory unless it is used.
        is_unsharded: Whether the modules have the unsharded parameters.
        progress: How often its gradients were reduced.
        on_gradients: Called in a backward pass when a quarter of its gradients, by their elements, are there.
        residuals: What compression has taken from them.
    """

    def __init__(self, parameters: Sequence[Named], policy: Policy) -> None:
        self.policy = policy
        self.number = 0
        self.progress = Progress()
        self.is_unsharded = False
        self.on_gradients: Callable[[], None] = _nothing
        self._arrived = 0
        self._gathering: _Work | None = None
        self._borrower: _Work | None = None
        self._partial: tuple[tuple[int, ...], Tensor] | None = None
        self._forward_step = 0
        group = policy.ranks.shard
        dtype = parameters[0].parameter.dtype
        itemsize = min(one.itemsize for one in (dtype, policy.compute_dtype(dtype), policy.reduce_dtype(dtype)))
        self.plan = plan(
            [(one.parameter.numel(), one.block) for one in parameters], group.size(), max(1, _ALIGNMENT // itemsize)
        )
        self._packing = functools.lru_cache(maxsize=_PACKINGS_KEPT)(functools.partial(Packing, self.plan))
        device = policy.ranks.device
        if any(one.parameter.device.type == "meta" for one in parameters):
            device = torch.device("meta")
        self._allocate(dtype, device)
        self.slots = [self._shard(index, one) for index, one in enumerate(parameters)]
        self.residuals = Residuals(self)
        self.gathered = torch.empty(0)

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        # Zeros, since padding is saved nowhere but travels.
        self.shard = torch.zeros(self.plan.shard_size, dtype=dtype, device=device)

    def _shard(self, index: int, one: Named) -> Slot:
        whole, group = one.parameter.detach(), self.policy.ranks.shard
        lengths = self.plan.lengths(index)
        placement = RaggedShard.from_lengths(whole.shape, lengths)
        first, length = sum(lengths[: group.rank()]), lengths[group.rank()]
        begin = max(0, self.plan.offsets[index] - group.rank() * self.plan.shard_size) if length else 0
        local = self.shard[begin : begin + length]
        if not local.is_meta:
            local.copy_(whole.reshape(-1)[first : first + length])
        ragged = RaggedTensor(local, whole.shape, placement, group)
        sharded = cast(RaggedTensor, nn.Parameter(ragged, requires_grad=one.parameter.requires_grad))
        slot = Slot(index, one.name, one.places, placement, begin, length, sharded)
        slot.put(sharded)
        return slot

    @property
    def label(self) -> str:
        """For messages."""
        names = [slot.name for slot in self.slots]
        return f"the parameters {', '.join(names[:2])}{' and others' if len(names) > 2 else ''}"

    # ---- the sharded parameters -------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Takes what the modules have as parameters now, where that is not what it gave them, as after ``to_empty``,
        ``to`` and ``load_state_dict(assign=True)``.

        Raises:
            RuntimeError: A parameter is not sharded any more, or is on the meta device.
        """
        if self.is_unsharded:
            return
        if all(self._is_own(slot) for slot in self.slots):
            return
        found: list[RaggedTensor] = []
        for slot in self.slots:
            module, name = slot.places[0]
            parameter = module._parameters[name]
            if not isinstance(parameter, RaggedTensor) or parameter.placement != slot.placement:
                raise RuntimeError(
                    f"{slot.name} was replaced by a {type(parameter).__name__} that is not sharded as it was: load "
                    "into the parameters (copy_, or a state_dict of RaggedTensors); change modules before fully_shard"
                )
            found.append(parameter)
        meta = [slot.name for slot, one in zip(self.slots, found, strict=True) if one.to_local().is_meta]
        if meta:
            raise RuntimeError(
                f"{', '.join(meta[:5])} {'are' if len(meta) > 1 else 'is'} on the meta device: call "
                "module.to_empty(device=...) and initialise the parameters, or load them, before the first forward pass"
            )
        kinds = {(one.dtype, one.to_local().device) for one in found}
        if len(kinds) > 1:
            raise RuntimeError(f"{self.label} must all be of one dtype and device, got {sorted(map(str, kinds))}")
        ((dtype, device),) = kinds
        locals_ = [one.to_local() for one in found]
        if (self.gathered.dtype, self.gathered.device) != (self.policy.compute_dtype(dtype), device):
            self._take_along(self.policy.reduce_dtype(dtype), device)
        self._allocate(dtype, device)
        for slot, taken, local in zip(self.slots, found, locals_, strict=True):
            own = self.shard[slot.begin : slot.begin + slot.length]
            own.copy_(local)
            taken.data = RaggedTensor(own, taken.shape, slot.placement, self.policy.ranks.shard)
            slot.sharded = taken
            slot.put(taken)

    def _take_along(self, dtype: torch.dtype, device: torch.device) -> None:
        """Gives up the unsharded parameters, for others, but keeps their gradients that have not been reduced."""
        for slot in self.slots:
            gradient = slot.unsharded.grad if slot.accumulated is None else slot.accumulated
            if gradient is not None:
                slot.accumulated, slot.unsharded.grad = gradient.to(device, dtype), None
        self.gathered = torch.empty(0)

    def _is_own(self, slot: Slot) -> bool:
        sharded: Tensor = slot.sharded
        if any(module._parameters[name] is not sharded for module, name in slot.places):
            return False
        local = slot.local
        return (
            not local.is_meta
            and local.dtype == self.shard.dtype
            and local.untyped_storage().data_ptr() == self.shard.untyped_storage().data_ptr()
        )

    # ---- the unsharded parameters -----------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Makes the gathered buffer and the unsharded parameters, once."""
        dtype = self.policy.compute_dtype(self.shard.dtype)
        numel = self.plan.world_size * self.plan.shard_size
        self.gathered = torch.empty(numel, dtype=dtype, device=self.shard.device)
        storage = self.gathered.untyped_storage()
        bucket = weakref.ref(self)  # a hook, which the garbage collector cannot see, would keep it for ever

        def count(parameter: Tensor) -> None:
            if (alive := bucket()) is not None:
                alive._count(parameter)

        for slot in self.slots:
            # Not a view of the buffer, with which it would share its version counter: gathering again is no change.
            tensor = torch.empty(0, dtype=dtype, device=self.shard.device)
            shape = slot.sharded.shape
            tensor.set_(storage, self.plan.offsets[slot.index], shape, torch.empty(shape, device="meta").stride())
            slot.unsharded = nn.Parameter(tensor, requires_grad=dtype.is_floating_point)
            if slot.unsharded.requires_grad:  # it follows the sharded one when it is given to the modules
                slot.unsharded.register_post_accumulate_grad_hook(count)

    def _count(self, parameter: Tensor) -> None:
        before, self._arrived = self._arrived, self._arrived + parameter.numel()
        if 4 * before < self.plan.numel <= 4 * self._arrived:
            self.on_gradients()

    def unshard(self, in_backward: bool, step: int) -> None:
        """Starts to gather, unless that is done or on its way.

        Args:
            step: Of the model, on which the random bits of a codec depend; a backward pass sees the bits of the latest
                forward pass.
        """
        if self.is_unsharded or self._gathering is not None:
            return
        if self._borrower is not None:
            self._borrower.wait()
        # The buffer outlives an inference mode in which it is first wanted.
        with torch.inference_mode(False), torch.no_grad():
            self.adopt()
            if self.gathered.numel() == 0 or self.gathered.device != self.shard.device:
                self._lay_out()
            nbytes = self.gathered.numel() * self.gathered.itemsize
            if self.gathered.untyped_storage().size() != nbytes:
                self.gathered.untyped_storage().resize_(nbytes)
            if not in_backward:
                self._forward_step = step
            self._gathering = self._gather()

    def _gather(self) -> _Work:
        policy, group, size = self.policy, self.policy.ranks.shard, self.plan.shard_size
        own = self.gathered[group.rank() * size : (group.rank() + 1) * size]
        if group.size() == 1:
            own.copy_(self.shard)
            return _Done()
        leg, uncompressed = policy.weights, (group.size() - 1) * own.nbytes
        if leg.is_exact(own.dtype):
            leg.count(uncompressed)
            given = self.shard if own.dtype == self.shard.dtype else own.copy_(self.shard)
            return all_gather_single(self.gathered, given, group)
        given = self.shard
        if given.dtype not in (own.dtype, torch.float32):  # from which the encoder rounds by itself
            given = own.copy_(given)
        engine, give_back = borrow_engine(
            leg, self.packing(range(len(self.slots))).segments, size, own.dtype, channel_of(group, own.device),
            policy.node_size,
        )  # fmt: skip
        leg.count(uncompressed, engine.bytes_sent)
        return engine.launch(self.gathered, given, leg.seed, 3 * self.number, self._forward_step, after=give_back)

    @property
    def is_gathering(self) -> bool:
        """Whether :meth:`wait` is still to be called."""
        return self._gathering is not None

    def wait(self) -> None:
        """Waits until all is gathered, and gives the modules the unsharded parameters."""
        if self._gathering is None:
            return
        work, self._gathering = self._gathering, None
        work.wait()
        for slot in self.slots:
            if slot.unsharded.requires_grad != slot.sharded.requires_grad:
                slot.unsharded.requires_grad_(slot.sharded.requires_grad)
            slot.put(slot.unsharded)
        self.is_unsharded = True

    def reshard(self) -> None:
        """Gives the modules the sharded parameters, and the memory of the gathered ones back."""
        self.hide()
        self.free()

    def hide(self) -> None:
        """Gives the modules the sharded parameters, but keeps the memory of the gathered ones."""
        self.wait()
        if self.is_unsharded:
            for slot in self.slots:
                slot.put(slot.sharded)
            self.is_unsharded = False

    def free(self) -> None:
        """Gives back the memory of gathered parameters that are hidden, unless it is lent or they are wanted again."""
        if not self.is_unsharded and self._gathering is None and self._borrower is None:
            self.gathered.untyped_storage().resize_(0)

    def lend(self, borrower: _Work, numel: int, dtype: torch.dtype, gradients: Sequence[Tensor]) -> Tensor | None:
        """The memory of the gathered parameters, which are hidden, as a flat buffer, until :meth:`take_back`; None if
        it is not to be had, or not so large, or if a gradient is a view of it."""
        storage = self.gathered.untyped_storage()
        if self.is_unsharded or self._gathering is not None or self._borrower is not None:
            return None
        if (numel, dtype) != (self.gathered.numel(), self.gathered.dtype) or storage.size() == 0:
            return None
        if any(gradient.untyped_storage().data_ptr() == storage.data_ptr() for gradient in gradients):
            return None
        self._borrower = borrower
        return self.gathered

    def take_back(self) -> None:
        """The borrower is done."""
        self._borrower = None
        self.free()

    # ---- gradients --------------------------------------------------------------------------------------------------

    def packing(self, members: Sequence[int]) -> Packing:
        """That of some parameters, by number."""
        return self._packing(tuple(members))

    @property
    def has_gradients(self) -> bool:
        """Whether gradients of unsharded parameters are there since :meth:`take_gradients`."""
        return any(slot.unsharded.grad is not None for slot in self.slots)

    def accumulate(self) -> None:
        """Adds the gradient of this pass to what earlier ones have left in another dtype."""
        for slot in self.slots:
            if slot.accumulated is not None and slot.unsharded.grad is not None:
                slot.accumulated += slot.unsharded.grad
                slot.unsharded.grad = None

    def keep(self) -> None:
        """Keeps gradients that are not reduced in this pass, in the dtype in which they will be."""
        dtype = self.policy.reduce_dtype(self.shard.dtype)
        for slot in self.slots:
            if slot.unsharded.grad is not None and slot.unsharded.grad.dtype != dtype:
                slot.accumulated, slot.unsharded.grad = slot.unsharded.grad.to(dtype), None

    def keep_partial(self, members: tuple[int, ...], part: Tensor) -> None:
        """Keeps what was reduced over the shards and is not yet averaged over replicas."""
        self._partial = (members, part)

    def take_partial(self, members: tuple[int, ...]) -> Tensor | None:
        """What was kept, of the same parameters; it is then gone.

        Raises:
            RuntimeError: It is of others.
        """
        kept, self._partial = self._partial, None
        if kept is None:
            return None
        if kept[0] != members:
            raise RuntimeError(
                f"of {self.label} not the same have a gradient as in the pass before, which was not averaged over "
                "replicas: call set_reduce_scatter_unused_params(True)"
            )
        return kept[1]

    def forget(self) -> None:
        """Forgets gradients that have not been reduced."""
        self._partial = None
        self.take_gradients(False)

    def take_gradients(self, all_of_them: bool) -> tuple[tuple[int, ...], list[Tensor]]:
        """The unreduced gradients, and the numbers of their parameters; they are then gone.

        Args:
            all_of_them: Zeros for the trainable parameters that have none.
        """
        self._arrived = 0
        members, gradients = [], []
        for slot in self.slots:
            gradient = slot.unsharded.grad if slot.accumulated is None else slot.accumulated
            slot.unsharded.grad = slot.accumulated = None
            if gradient is None and all_of_them and slot.sharded.requires_grad:
                gradient = torch.zeros(slot.sharded.shape, dtype=self.gathered.dtype, device=self.gathered.device)
            if gradient is not None:
                members.append(slot.index)
                gradients.append(gradient)
        return tuple(members), gradients


def _nothing() -> None:
    pass


class _Done:
    def wait(self) -> None:
        """There is nothing to wait for."""
