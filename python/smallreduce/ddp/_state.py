"""The state behind the DDP communication hook: the codecs, the residuals, the step, and what was sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.nn.parallel import DistributedDataParallel

from smallreduce.codecs import Codec, TopK
from smallreduce.codecs import codec as parse_codec
from smallreduce.collectives import Channel, Count, agree, channel_of, group_of, prepare_or_refuse, ring_bytes
from smallreduce.ddp._bucket import BucketPlan, Part, Slot, plan_bucket, slots_of
from smallreduce.ddp._loss_scale import LossScale
from smallreduce.ddp._memory import Binding, Residuals, bind
from smallreduce.ddp._notice import warn_if_never_called
from smallreduce.ddp._policy import Choice, CodecFor, choose
from smallreduce.ddp._saved import Saved
from smallreduce.ddp._stats import Bypassed, Stats

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

_BEFORE_STEP, _BEFORE_UPDATE = 1, -1  # rows of the residuals, beside row 0: what they are


class HookState:
    """State of :func:`smallreduce.ddp.hook`, for ``ddp_model.register_comm_hook(state, smallreduce.ddp.hook)``.

    :func:`smallreduce.ddp.register` makes one from a DDP model. One state serves one DDP model.

    Error feedback is that of DoubleSqueeze (arXiv:1905.05957, section 3): each rank keeps what compression took from
    its own gradient (as many fp32 values as compressed parameters), and what it took from the shard of the mean that
    the rank reduces (1/W of that). Both belong to parameters and survive DDP's rebuilding of its buckets.

    Args:
        codec: A codec, its spelling (``"int4"``), or None: exact, the same bits as DDP without a hook.
        module: The DDP module, or the model inside it. It gives parameters their names, in ``codec_for``, ``stats()``
            and ``state_dict()``; without it ``codec_for`` gets None and the others count ``parameter.0``,
            ``parameter.1``, ... in the order of DDP's first buckets.
        codec_for: ``codec_for(name, parameter)`` gives the codec of each parameter, its spelling, or None for exact. By
            default parameters with fewer than two dimensions are exact. It must give the same on all ranks.
        feedback: Error feedback. Without it only unbiased codecs (stochastic rounding) converge to the same loss.
        warmup_steps: Steps in the beginning that are exact.
        scaler: The ``torch.amp.GradScaler`` that scales the loss, of this model and one optimizer alone. Residuals
            follow its scale; after a step that it skipped (a scale lowered by ``update()``) they are what they were
            before the backward passes of that step, which takes their memory once more. Its scale is read in each
            backward pass, for which a CUDA device is waited for. With ``join()`` it raises RuntimeError: a rank that
            has joined does not see the scale. Where ``module`` is not the DDP module, so does a second synchronised
            backward pass before ``update()``, which may be that of such a rank.
        seed: Base of the random bits, which also depend on the step, the bucket and the rank
            (docs/wire-formats.md, section 6). The same on all ranks.
        find_unused_parameters: As given to DDP; None: that of ``module`` if it is the DDP module, else False. A
            parameter whose gradient is zero on all ranks then keeps its residuals and its zero gradient, at the price
            of one more small collective for each bucket and the residuals' memory once more.
        measure_every: Compressed steps of a bucket from one measurement of ``relative_error`` to the next; 0: never.
        process_group: That of DDP; None: that of ``module`` if it is the DDP module, else the default group.

    Attributes:
        step: Synchronised backward passes so far. Saved: with it a step can be replayed bit for bit.
        calls: Calls of the hook so far, in this object.

    Raises:
        ValueError, TypeError: Impossible values, or others than those of the DDP module.
    """

    _dtype: torch.dtype | None = None  # in which gradients are compressed; None: their own
    _with_momentum = False  # keep a momentum of this rank's gradients beside the residuals
    _reshard = "load it in a group of the same size"  # what to do with a state of another world size

    def __init__(
        self,
        codec: Codec | str | None,
        *,
        module: torch.nn.Module | None = None,
        codec_for: CodecFor | None = None,
        feedback: bool = True,
        warmup_steps: int = 0,
        scaler: GradScaler | None = None,
        seed: int = 0,
        find_unused_parameters: bool | None = None,
        measure_every: int = 100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._codec = parse_codec(codec)
        if codec_for is not None and not callable(codec_for):
            raise TypeError(f"codec_for must be callable, got {type(codec_for).__name__}")
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        for name, count in (("warmup_steps", warmup_steps), ("measure_every", measure_every)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"{name} must be an int, got {type(count).__name__}")
            if count < 0:
                raise ValueError(f"{name} must not be negative, got {count}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        ddp = module if isinstance(module, DistributedDataParallel) else None
        if ddp is not None:
            module = ddp.module
            if process_group is not None and process_group is not ddp.process_group:
                raise ValueError("process_group is not that of the DDP module; without it, the right one is taken")
            if find_unused_parameters is not None and find_unused_parameters != ddp.find_unused_parameters:
                raise ValueError(
                    f"find_unused_parameters is {find_unused_parameters}, but {ddp.find_unused_parameters} in the DDP "
                    "module; without it, the right one is taken"
                )
            process_group = ddp.process_group
            # With a static graph a parameter is used always or never, and one never used owes nothing.
            find_unused_parameters = ddp.find_unused_parameters and not ddp.static_graph
        self._codec_for = codec_for
        self._feedback = bool(feedback)
        self._warmup_steps = warmup_steps
        # Only residuals depend on the scale.
        self._scaler = LossScale(scaler, ddp) if scaler is not None and scaler.is_enabled() and self._feedback else None
        self._seed = seed
        self._find_unused = bool(find_unused_parameters)
        self._rows = 1 + self._find_unused + (self._scaler is not None)
        self._measure_every = measure_every
        self._process_group = process_group

        self.step = 0
        self.calls = 0
        self._steps = 0  # in this object: step is saved, and figures are not
        self._uncompressed_steps = 0
        self._scale = 1.0  # of the loss, in which the residuals are
        self._begins_update = False  # this step is the first since the scaler's update()
        self._plans: dict[int, BucketPlan] = {}
        self._memory: dict[str, Residuals] = {}
        self._retired = Count()
        self._unnamed = 0
        # By id: a tensor is no key. The tensor beside it keeps the id from being given to another.
        self._names: dict[int, tuple[torch.Tensor, str | None, str]] = {}
        if module is not None:
            self._names = {id(p): (p, name, name) for name, p in module.named_parameters()}
        self._watch = warn_if_never_called(self, None if module is None else module.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> HookState:
        """The state itself: a DDP module is copied with its hooks' states, but no hook is registered on the copy."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """A process group and the registration on a model are neither pickled nor copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, since it belongs to a process group and to the model that its "
            "hook is registered on: save its state_dict(), and the model's own instead of the DDP module"
        )

    # ---- a step -----------------------------------------------------------------------------------------------------

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts the reduction of one bucket; the hook itself."""
        group = group_of(self._process_group)
        # DDP reduces all of its buckets, in the order of their indices.
        if bucket.index() == 0:
            self._begin_step()
        if self.calls == 0:
            self._watch()
        self.calls += 1
        buffer = bucket.buffer()
        plan = self._plan(bucket, group)
        self._prepare(plan, buffer)
        plan.steps += 1
        plan.count.uncompressed_bytes += ring_bytes(buffer.numel() * buffer.element_size(), group.size())
        if plan.channel is None:
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future(
                devices=[buffer.device] if buffer.is_cuda else None
            )
            done.set_result(buffer)
            return done
        if not plan.parts or self.step <= self._warmup_steps:
            return plan.reduce_exactly(buffer, plan.channel)
        return self._reduce_compressed(plan, buffer, plan.channel)

    def _begin_step(self) -> None:
        """Called before the first bucket of a synchronised backward pass."""
        if self._scaler is not None and not self._alone():
            self._begins_update = self._scaler.begins_update()
        self._follow_scaler()
        if self.step < self._warmup_steps or self._alone():
            self._uncompressed_steps += 1
        self.step += 1
        self._steps += 1

    def _prepare(self, plan: BucketPlan, buffer: torch.Tensor) -> None:
        """What a derived state does to this rank's gradients before any are reduced."""

    def _reduce_compressed(
        self, plan: BucketPlan, buffer: torch.Tensor, channel: Channel
    ) -> torch.futures.Future[torch.Tensor]:
        futures: list[torch.futures.Future[Any]] = []

        exact = [buffer.narrow(0, slot.offset, slot.numel) for slot in plan.exact]
        together = torch.cat(exact).mul_(1.0 / channel.world_size) if exact else None
        if together is not None:
            futures.append(dist.all_reduce(together, group=channel.group, async_op=True).get_future())
            plan.count.add_all_reduce(together, channel.world_size)

        compressed = [slot for part in plan.parts for slot in part.slots]
        used = None
        if self._find_unused and self._feedback:
            used = torch.stack([buffer.narrow(0, slot.offset, slot.numel).any() for slot in compressed]).to(torch.uint8)
            futures.append(dist.all_reduce(used, dist.ReduceOp.MAX, group=channel.group, async_op=True).get_future())
            plan.count.add_all_reduce(used, channel.world_size)

        measured = bool(self._measure_every) and plan.compressed_steps % self._measure_every == 0
        plan.compressed_steps += 1
        for part in plan.parts:
            if part.binding is not None and self._find_unused:
                part.binding.save(_BEFORE_STEP)
            if part.binding is not None and self._begins_update:
                part.binding.save(_BEFORE_UPDATE)
        residuals = [self._launch(part, buffer, measured, futures) for part in plan.parts]
        plan.held = [together, used, *residuals]
        for part in plan.parts:
            plan.count.collectives += part.collectives
            plan.count.bytes_sent += part.engine.bytes_sent

        def finish(all_done: torch.futures.Future[list[torch.futures.Future[Any]]]) -> torch.Tensor:
            for future in all_done.value():
                future.wait()
            if together is not None:
                torch._foreach_copy_(exact, list(torch.split(together, [slot.numel for slot in plan.exact])))
            if used is not None:
                self._keep_unused(compressed, used, buffer)
            if measured:
                for part, residual in zip(plan.parts, residuals, strict=True):
                    if residual is not None:
                        part.measure_error(residual)
            return buffer

        reduced: torch.futures.Future[torch.Tensor] = torch.futures.collect_all(futures).then(finish)
        return reduced

    def _launch(
        self,
        part: Part,
        buffer: torch.Tensor,
        measured: bool,
        futures: list[torch.futures.Future[Any]],
        masked: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Starts one part of a bucket; returns the worker's residual that it replaces, if any.

        Args:
            buffer: Of the bucket's size and the dtype of the part's engine; holds the mean when all ``futures``, to
                which this adds, are done.
            masked: See :meth:`BucketEngine.launch`.
        """
        worker = server = None
        if part.binding is not None:
            worker, server = part.binding.worker[0], part.binding.server[0]
        elif measured:
            # Without feedback a residual of zeros shows what is lost, and changes nothing.
            worker = torch.zeros(part.engine.worker_numel, device=buffer.device)
        if measured and worker is not None:
            part.measure_input(buffer, worker)
        work = part.engine.launch(
            buffer,
            dist.ReduceOp.AVG,
            worker=worker,
            server=server,
            seed=self._seed,
            bucket=part.number,
            step=self.step - 1,
            masked=masked,
        )
        futures.append(work.get_future())
        return worker

    def _keep_unused(self, slots: Sequence[Slot], used: torch.Tensor, buffer: torch.Tensor) -> None:
        """Gives parameters without a gradient on any rank their residuals back, and their gradient its zeros.

        DDP drops the reduced gradient of a parameter that no rank used, so that what it would correct stays owed. Where
        such a parameter was used and its gradient is zero, its correction comes with the next one that is not.
        """
        for slot, flag in zip(slots, used.to(torch.bool), strict=True):
            for tensor in self._memory[slot.name].tensors():
                torch.where(flag, tensor[0], tensor[_BEFORE_STEP], out=tensor[0])
            gradient = buffer.narrow(0, slot.offset, slot.numel)
            gradient.copy_(torch.where(flag, gradient, gradient.new_zeros(())))

    def _follow_scaler(self) -> bool:
        """Brings the residuals into the loss scale of now, and, if an update was skipped, back to before it.

        Returns:
            Whether one was.
        """
        scale = 1.0 if self._scaler is None else self._scaler.now()
        if scale == self._scale:
            return False
        skipped = scale < self._scale
        if skipped:
            for plan in self._plans.values():
                for part in plan.parts:
                    if part.binding is not None:
                        part.binding.restore(_BEFORE_UPDATE)
        for residuals in self._memory.values():
            for tensor in residuals.tensors():
                tensor.mul_(scale / self._scale)
        self._scale = scale
        return skipped

    # ---- buckets ----------------------------------------------------------------------------------------------------

    def _plan(self, bucket: GradBucket, group: dist.ProcessGroup) -> BucketPlan:
        parameters = bucket.parameters()
        buffer = bucket.buffer()
        form = (*map(id, parameters), buffer.dtype, buffer.device)
        channel = channel_of(group, buffer.device) if group.size() > 1 else None  # another one after shutdown()
        known = self._plans.get(bucket.index())
        if known is not None and known.form == form and known.channel is channel:
            return known

        count = Count()
        plan = prepare_or_refuse(
            channel, lambda: plan_bucket(bucket, form, self._slots(bucket, parameters), channel, self._dtype)
        )
        slots = plan.slots
        if channel is not None:
            lines = [f"{slot.name}: {self._line(slot.numel, slot.choice)}" for slot in slots]
            # Server residuals are moved by what every rank believes of where they are.
            lines += [
                f"residuals of {name}: {[tuple(vars(shard).values()) for shard in self._memory[name].shards]}"
                for name in (slot.name for slot in slots)
                if name in self._memory
            ]
            header = f"bucket {bucket.index()} of {buffer.numel()} elements of {buffer.dtype} in step {self.step}"
            agree(channel, f"{self._header()}, {header}", lines, count)
        if self._feedback and channel is not None:
            for part in plan.parts:
                part.binding = self._bind(part, buffer.device, channel)
                count.collectives += part.binding.moved
                count.bytes_sent += part.binding.nbytes_moved
        self._retire({slot.name for slot in slots}, bucket.index())
        self._plans[bucket.index()] = plan
        plan.count = count
        return plan

    def _bind(self, part: Part, device: torch.device, channel: Channel) -> Binding:
        return bind(
            self._memory,
            {slot.name: slot.numel for slot in part.slots},
            part.codec.spelling,
            part.packet_blocks(),
            rows=self._rows,
            device=device,
            group=channel.group,
            with_momentum=self._with_momentum,
        )

    def _slots(self, bucket: GradBucket, parameters: Sequence[torch.Tensor]) -> tuple[Slot, ...]:
        if bucket.buffer().layout is not torch.strided:
            raise TypeError(
                f"bucket {bucket.index()} has gradients of layout {bucket.buffer().layout}; compressed reduction takes "
                "dense ones: make the embedding with sparse=False"
            )
        names, choices = [], []
        for parameter in parameters:
            _, given, name = self._named(parameter)
            choice = self._choose(given, parameter)
            self._check_residuals(self._memory.get(name), name, parameter.numel(), choice)
            names.append(name)
            choices.append(choice)
        return slots_of(bucket, names, choices)

    def _choose(self, name: str | None, parameter: torch.Tensor) -> Choice:
        return choose(name, parameter, self._codec, self._codec_for, self._feedback)

    def _named(self, parameter: torch.Tensor) -> tuple[torch.Tensor, str | None, str]:
        if id(parameter) not in self._names:
            self._names[id(parameter)] = (parameter, None, f"parameter.{self._unnamed}")
            self._unnamed += 1
        return self._names[id(parameter)]

    @staticmethod
    def _check_residuals(residuals: Residuals | None, name: str, numel: int, choice: Choice) -> None:
        if residuals is None:
            return
        spelling = None if choice.codec is None else choice.codec.spelling
        # What a TopK owes can be sent by any other.
        sparse = isinstance(choice.codec, TopK) and isinstance(parse_codec(residuals.codec), TopK)
        if residuals.numel != numel or (residuals.codec != spelling and not sparse):
            raise ValueError(
                f"the residuals of {name} are of {residuals.numel} elements in {residuals.codec}, but the parameter "
                f"has {numel} in {spelling or 'no codec'}: load the state of the same model and codecs"
            )

    def _retire(self, names: set[str], index: int) -> None:
        """Drops plans of buckets that DDP has rebuilt: those that share the index or a parameter with a new one."""
        for old, plan in list(self._plans.items()):
            if old == index or any(slot.name in names for slot in plan.slots):
                self._retired.add(self._plans.pop(old).count)

    def _forget_plans(self) -> None:
        """Has every bucket planned anew, by all ranks alike."""
        for plan in self._plans.values():
            self._retired.add(plan.count)
        self._plans.clear()

    # ---- the same on all ranks --------------------------------------------------------------------------------------

    def agree(self, parameters: Sequence[torch.Tensor]) -> None:
        """Compares the configuration for these parameters over the group.

        Raises:
            RuntimeError: On every rank, if they do not agree; the message says which rank had what.
        """
        group = group_of(self._process_group)
        if group.size() == 1 or not parameters:
            return
        channel = channel_of(group, parameters[0].device)

        def describe() -> list[str]:
            lines = []
            for parameter in parameters:
                _, given, name = self._named(parameter)
                choice = self._choose(given, parameter)
                lines.append(f"{name}: {parameter.dtype}, {self._line(parameter.numel(), choice)}")
            return lines

        agree(channel, self._header(), prepare_or_refuse(channel, describe), self._retired)

    def _header(self) -> str:
        return (
            f"smallreduce.ddp: codec {self._codec}, feedback {self._feedback}, seed {self._seed}, warmup_steps "
            f"{self._warmup_steps}, find_unused_parameters {self._find_unused}, scaler {self._scaler is not None}"
        )

    @staticmethod
    def _line(numel: int, choice: Choice) -> str:
        return f"{numel} elements in {choice.codec or 'no codec'}"

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of a group of the same size.

        With a scaler, call it after ``scaler.update()``. The tensors are copies on the CPU. Server residuals are in the
        domain in which the codec adds, so that what is loaded is bit for bit what was saved.

        Returns:
            A dict of plain types and tensors that ``torch.load(weights_only=True)`` takes.
        """
        self._follow_scaler()
        group = group_of(self._process_group)
        return Saved(self._memory, self.step, self._scale).state_dict(group.rank(), group.size(), self._seed)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; every rank calls it, between the same two steps.

        The next steps are those that followed the saving, bit for bit, if DDP's buckets are the same: a new process
        begins with DDP's first buckets, whose stochastic rounding differs from that of rebuilt ones.

        Raises:
            ValueError: The state is of another rank, world size, seed, model, or codec, or is none at all. A HookState
                without ``module`` finds another model or codec out at its next step.
        """
        group = group_of(self._process_group)
        saved = Saved.check(state_dict, group.rank(), group.size(), self._seed, self._with_momentum, self._reshard)
        if saved.memory and not self._feedback:
            raise ValueError("this state has residuals, but feedback is off")
        self._check_names(saved.memory)
        self._memory, self.step, self._scale = saved.memory, saved.step, saved.loss_scale
        if self._scaler is not None:
            self._scaler.forget()
        self._forget_plans()

    def _check_names(self, memory: Mapping[str, Residuals]) -> None:
        named = {name: p for p, given, name in self._names.values() if given is not None}
        if not named:
            return
        if unknown := sorted(map(str, memory.keys() - named.keys())):
            raise ValueError(f"this state has residuals of {', '.join(unknown)}, which the model does not have")
        for name, residuals in memory.items():
            choice = self._choose_loaded(name, named[name])
            self._check_residuals(residuals, name, named[name].numel(), choice)

    def _choose_loaded(self, name: str, parameter: torch.Tensor) -> Choice:
        """What residuals that are loaded must be of."""
        return self._choose(name, parameter)

    # ---- figures ----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """What this object has sent and lost so far on this rank. Call it between steps; it waits for a CUDA device."""
        total = Count()
        total.add(self._retired)
        buckets, bypassed = [], []
        for _, plan in sorted(self._plans.items()):
            total.add(plan.count)
            buckets.append(plan.stats())
            bypassed += [
                Bypassed(slot.name, slot.numel, "world size 1" if self._alone() else slot.choice.reason)
                for slot in plan.exact
            ]
        return Stats(
            world_size=group_of(self._process_group).size(),
            steps=self._steps,
            uncompressed_steps=self._uncompressed_steps,
            calls=self.calls,
            buckets=tuple(buckets),
            bypassed=tuple(bypassed),
            collectives=total.collectives,
            bytes_sent=total.bytes_sent,
            uncompressed_bytes=total.uncompressed_bytes,
        )

    def _alone(self) -> bool:
        return group_of(self._process_group).size() == 1
