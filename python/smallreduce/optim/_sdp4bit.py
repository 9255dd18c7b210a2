"""``smallreduce.optim.SDP4Bit``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.optim import Optimizer

from smallreduce.codecs import Codec
from smallreduce.collectives import Channel, Count, TwoLevel, agree, channel_of, group_of, prepare_or_refuse, two_level
from smallreduce.collectives._agreement import Agreement
from smallreduce.optim import _sdp4bit_state as saved
from smallreduce.optim._broadcast import broadcast_
from smallreduce.optim._sdp4bit_arguments import (
    GradientCodec,
    Scheme,
    check_model,
    check_optimizer,
    parameter_groups,
)
from smallreduce.optim._sdp4bit_bucket import Bucket, Member, assign
from smallreduce.optim._sdp4bit_exchange import Exchange
from smallreduce.optim._sdp4bit_hooks import check_free, register_hooks
from smallreduce.optim._sdp4bit_norm import clip_
from smallreduce.optim._sdp4bit_passes import BackwardPasses
from smallreduce.optim._sdp4bit_stats import SDP4BitMemory, SDP4BitStats

__all__ = ["SDP4Bit"]


class SDP4Bit(Optimizer):
    """Data parallelism with a sharded optimizer that sends weights at four bits and gradients at eight and four.

        model = MyModel()                              # a plain module: no DistributedDataParallel around it
        optimizer = smallreduce.optim.SDP4Bit(model, torch.optim.AdamW, lr=3e-4, weight_decay=0.1)
        ...
        loss.backward()                                # reduces the gradients, while the rest of the pass is computed
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()                               # its all-gather of the weights overlaps with the next forward
        optimizer.zero_grad()

    Every rank holds all weights, and of the flat buffer of each bucket an equal part of the master (fp32) and of the
    state of ``optimizer_class``, which is given that part alone: one 1-D tensor for each parameter that reaches into it
    (ZeRO-1, and of gradients only the part is kept, ZeRO-2; exact ones on the CPU, an all-reduce, whole).
    So ``param_groups`` are those of this rank's slices, and
    any *elementwise* optimizer will do: Adam, AdamW, SGD, RMSprop, Adagrad and their like. Those that look at a whole
    parameter, as LAMB, Muon or Adafactor, will not.

    *Gradients* are reduced in the backward pass, bucket by bucket, into each rank's part: through
    :func:`smallreduce.two_level`, at 8 bits inside the node and 4 between nodes. *Weights*: after the step each rank
    sends what its part of the master differs by from the weights that all have, at 4 bits; all ranks, the sender too,
    add what was decoded, in fp32 with one rounding, so that their weights stay the same, bit for bit. What a difference
    loses is in the next one.

    ``parameter.grad`` is None after a synchronised pass; the reduced gradients accumulate until :meth:`zero_grad`, in
    ``grad`` of the slices. A parameter that gets no gradient on a rank counts as zero there. To accumulate without
    communication, run all passes but the last in :meth:`no_sync`. A ``GradScaler`` is given as ``scaler``. Activation
    checkpointing is to be non-reentrant: a reentrant segment is a backward pass of its own.

    With ``overlap`` the weights arrive in the background. Modules that own parameters wait for these in a forward
    pre-hook, all of them in evaluation and without grad mode; so do ``state_dict()`` and ``load_state_dict()`` of the
    model, and the end of this object, which takes its hooks along. Anything else
    that reads parameters, after a step and outside of the forward of their module, calls
    :meth:`synchronize` first.

    At construction all parameters and buffers are broadcast from rank 0; from then on buffers are each rank's own. The
    trainable parameters become views of the buckets, so move and cast the model before. Values set by
    ``model.load_state_dict()`` become those of the master; other changes are taken over by :meth:`adopt_weights`. All
    ranks call the methods together, except those for figures.

    Args:
        model: A module with all parameters on one device. Frozen parameters are left as they are.
        optimizer_class: A subclass of ``torch.optim.Optimizer``.
        params: Parameters of the model or a list of dicts with options of their own, as torch's optimizers take them;
            None: all that require a gradient.
        weights: The codec of the weights, or None: exact.
        differences: Quantise differences, rounded to nearest where the codec leaves it open; False: the weights
            themselves (stochastically), which trains worse and is there to be compared with.
        gradients: Two codecs, inside a node and between nodes, both with ``hadamard`` or neither; or one, on a flat
            group; or None: exact.
        node_size: Ranks of a node; None: as torchrun has laid them out. Used with two codecs for the gradients; the
            weights then travel on two levels, too.
        start_step: So many steps are exact at first.
        master_dtype: Of the master, and of the gradients when they are reduced; None: that of the parameters, which is
            then no copy unless the weights are compressed.
        process_group: None: the default group.
        bucket_cap_mb: Size of a bucket in MiB; None as in DDP: 25, the one of the first parameters 1.
        overlap: Gather the weights in the background. False: in :meth:`step`; then modules have no
            hooks in their forward, as suits torch.compile.
        scaler: The ``torch.amp.GradScaler`` that scales the loss, the same on all ranks.
        seed: Base of the random bits.
        **optimizer_kwargs: Of ``optimizer_class``.

    With ``weights=None, gradients=None`` and a master in the parameters' dtype, training is bit-equal to
    DistributedDataParallel with the same optimizer, on gloo with the same buckets (``find_unused_parameters=True``
    keeps DDP's; among two ranks it makes no difference).

    Raises:
        TypeError, ValueError: Impossible values; a model that is wrapped in DistributedDataParallel; parameters that
            are not the model's, or are those of another SDP4Bit that still lives.
        RuntimeError: Another rank refused its arguments, or has others.

    Source: Jia, Xie, Lu et al., *SDP4Bit: Toward 4-bit Communication Quantization in Sharded Data Parallelism for LLM
    Training*, NeurIPS 2024, arXiv:2410.15526, Algorithms 2 and 3. There differences are taken and added in the
    weights' dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer_class: type[Optimizer],
        *,
        params: Iterable[Any] | None = None,
        weights: str | Codec | None = "int4:group=2048",
        differences: bool = True,
        gradients: GradientCodec = ("int8-hadamard:group=128", "int4-hadamard:group=128"),
        node_size: int | None = None,
        start_step: int = 0,
        master_dtype: torch.dtype | None = torch.float32,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float | None = None,
        overlap: bool = True,
        scaler: GradScaler | None = None,
        seed: int = 0,
        **optimizer_kwargs: Any,
    ) -> None:
        group = group_of(process_group)
        tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
        device = tensors[0].device if tensors else torch.device("cpu")
        self._group, self._rank, self._world = group, group.rank(), group.size()
        self._channel = channel_of(group, device) if self._world > 1 else None
        self._count = Count()  # what is neither gradients nor weights
        self._steps = self._done = 0
        self._exchanges: list[Exchange] = []
        self._gathering = False
        self._loaded: set[int] | None = set()  # parameters, by id; None: the master itself was
        self._constructed = False

        def prepare() -> list[Member]:
            check_model(model)
            check_optimizer(optimizer_class, scaler)
            self._scheme = Scheme.parse(
                weights, differences, gradients, node_size, start_step, master_dtype, bucket_cap_mb, overlap, seed
            )
            if node_size is not None and self._world % node_size:
                raise ValueError(f"node_size must divide the group's {self._world} ranks, got {node_size}")
            self._groups = parameter_groups(model, params)
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            group_of = {id(p): number for number, (_, members) in enumerate(self._groups) for p in members}
            trained = [p for p in model.parameters() if id(p) in group_of]
            members = [Member(index, names[id(p)], p, group_of[id(p)]) for index, p in enumerate(trained)]
            for member in members:
                check_free(member.name, member.parameter)
                self._scheme.check_dtype(member.parameter.dtype)
            # What it would say of its arguments it says before anything is changed; a rank may have nothing of a group.
            for count in (1, 0):
                probe = [
                    {**options, "params": [nn.Parameter(torch.zeros(1, device=device)) for _ in range(count)]}
                    for options, _ in self._groups
                ]
                optimizer_class(probe, **optimizer_kwargs)
            return members

        members = prepare_or_refuse(self._channel, prepare)
        self._model = model
        self._scaler = scaler
        self._optimizer_class, self._optimizer_kwargs = optimizer_class, dict(optimizer_kwargs)
        route = self._route(self._scheme, group)
        self._agree(members)
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        self._build(members, route)
        self._inner = optimizer_class(self._slice_groups(), **optimizer_kwargs)
        super().__init__(self._inner.param_groups, self._inner.defaults)
        self._share()
        self._constructed = True
        hooks = self._passes.take, self._wait, self._mark_loaded
        register_hooks(self, model, self._exchanges, *hooks, self._scheme.overlap)

    # ---- construction -----------------------------------------------------------------------------------------------

    def _route(self, scheme: Scheme, group: dist.ProcessGroup) -> Channel | TwoLevel | None:
        if self._channel is None or not isinstance(scheme.gradients, tuple):
            return self._channel
        route = two_level(group, scheme.node_size, device=self._channel.device)
        self._count.collectives += 1
        self._count.bytes_sent += Agreement.nbytes(self._world)
        return route

    def _agree(self, members: list[Member]) -> None:
        """Compares the configuration and the model over the ranks."""
        if self._channel is None:
            return
        lines = [
            f"{m.name}: {tuple(m.parameter.shape)}, strides {m.stride}, {m.parameter.dtype}, group {m.group}"
            for m in members
        ]
        lines += [f"{name}: {tuple(p.shape)} of {p.dtype}" for name, p in self._model.named_parameters()]
        lines += [f"{name}: {tuple(b.shape)} of {b.dtype}" for name, b in self._model.named_buffers()]
        for options in [self._optimizer_kwargs, *(options for options, _ in self._groups)]:
            lines.append(", ".join(f"{name} {_plain(value)}" for name, value in sorted(options.items())))
        scaled = self._scaler is not None and self._scaler.is_enabled()
        lines.append(f"loss scale {self._scaler.get_scale()}" if self._scaler is not None and scaled else "no scaler")
        name = self._optimizer_class.__name__
        agree(self._channel, f"smallreduce.optim.SDP4Bit with {name}: {self._scheme}", lines, self._count)

    def _build(self, members: list[Member], route: Channel | TwoLevel | None) -> None:
        scheme = self._scheme
        for number, indices in enumerate(assign([m.parameter for m in members], scheme.bucket_cap_mb)):
            chosen = [members[index] for index in indices]
            master = scheme.master(chosen[0].parameter.dtype)
            bucket = Bucket(number, chosen, master, scheme.weights is not None, self._rank, self._world)
            self._exchanges.append(Exchange(bucket, scheme, self._group, route))
        of_buckets = {id(member.parameter) for member in members}
        others = [p for p in self._model.parameters() if id(p) not in of_buckets]
        everything = [*(e.bucket.weights for e in self._exchanges), *others, *self._model.buffers()]
        if self._world > 1:
            broadcast_(everything, self._group, self._count)
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.read()
        self._passes = BackwardPasses(self._exchanges, self._group, self._scaler, self._count)
        self._passes.is_exact = self._steps < scheme.start_step

    def _slice_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, of this rank's slices."""
        groups: list[dict[str, Any]] = [{**options, "params": []} for options, _ in self._groups]
        for bucket in self._buckets:
            for one in bucket.slices:
                groups[one.member.group]["params"].append(one.tensor)
        if self._scaler is not None and not any(group["params"] for group in groups):
            groups[0]["params"].append(self._passes.sentinel)
        return groups

    def _share(self) -> None:
        """Makes groups and state those of the inner optimizer: the same objects."""
        self.param_groups = self._inner.param_groups
        self.state = self._inner.state

    @property
    def _buckets(self) -> list[Bucket]:
        return [exchange.bucket for exchange in self._exchanges]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not supported: the buckets are made once.

        Raises:
            ValueError: Always.
        """
        if self._constructed:
            raise ValueError("SDP4Bit takes all parameter groups at construction, as params=[...]; make it anew")
        super().add_param_group(param_group)

    # ---- backward ---------------------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it backward passes accumulate in ``parameter.grad``, and nothing is sent; the next pass outside of it
        reduces all."""
        return self._passes.local()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the reduced gradients, and what has accumulated in ``grad`` of the parameters.

        Args:
            set_to_none: False: set the reduced gradients to zero.
        """
        self._passes.zero(set_to_none)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clips the norm of the reduced gradients of all parameters, as ``torch.nn.utils.clip_grad_norm_`` does, which
        would take that of this rank's slices. All ranks call it. With a scaler call ``scaler.unscale_()`` before.

        Args:
            max_norm: The norm that is not to be exceeded.
            norm_type: Order of the norm, above 0; ``inf`` for the maximum.
            error_if_nonfinite: Raise if the norm is NaN or Inf.

        Returns:
            The norm before clipping, the same on all ranks: one element, 0-dimensional.

        Raises:
            ValueError: ``norm_type`` is not above 0.
            RuntimeError: The norm is not finite, with ``error_if_nonfinite``.
        """
        self._passes.check("clip_grad_norm_()")
        return clip_(self._buckets, max_norm, norm_type, error_if_nonfinite, self._group, self._count)

    # ---- a step -----------------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A scaler that was not given then calls step() itself, with what it has found on this rank alone.
        return self.__dict__.get("_scaler") is None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates this rank's part of the master, and starts to gather the weights. All ranks call it. On one rank
        alone it does nothing without any gradient.

        Args:
            closure: Computes the loss and the gradients again, and returns the loss.

        Raises:
            RuntimeError: There are no gradients, or such as were not reduced; a backward pass failed; parameters have
                been moved, replaced or unfrozen; a GradScaler that was not given as ``scaler``; or the group failed.
        """
        if getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "SDP4Bit needs to know the GradScaler, so that all ranks skip the same steps: give it as "
                "SDP4Bit(..., scaler=scaler)"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_parameters()
        self._passes.check("step()")
        self.synchronize()
        self._adopt_loaded()
        if not self._passes.has_gradients:
            return loss
        self._passes.use()
        self._inner.step()
        exact = self._passes.is_exact
        self._count_step(self._steps + 1)
        self._done += 1
        self._loaded = set()
        self._gathering = True
        for exchange in self._exchanges:
            exchange.gather(exact, self._steps)
        if not self._scheme.overlap:
            self.synchronize()
        return loss

    def _count_step(self, steps: int) -> None:
        self._steps = steps
        exact = steps < self._scheme.start_step
        if exact != self._passes.is_exact:
            self._passes.pool.clear()  # the buffers are of other sizes
            self._passes.is_exact = exact

    def synchronize(self) -> None:
        """Waits until the weights of the last step have arrived from all ranks.

        Raises:
            RuntimeError: The group failed.
        """
        if self._gathering:
            for exchange in self._exchanges:
                exchange.end_gather()
            self._gathering = False

    def _wait(self, exchanges: Sequence[Exchange] | None) -> None:
        """Waits until the weights of these buckets have arrived; None: of all."""
        if self._gathering and exchanges is not None:
            for exchange in exchanges:
                exchange.end_gather()
        elif self._gathering:
            self.synchronize()

    @torch.no_grad()
    def adopt_weights(self) -> None:
        """Takes the parameters as they stand for the master's values; to be called when they were changed by anything
        but a step or ``load_state_dict()``, the same on all ranks."""
        self.synchronize()
        for bucket in self._buckets:
            bucket.read()
        self._loaded = set()

    def _mark_loaded(self, parameters: Sequence[nn.Parameter]) -> None:
        # A state that was loaded since the last step has the master itself, of which the model's is but the rounding.
        if self._loaded is not None:
            self._loaded.update(map(id, parameters))

    @torch.no_grad()
    def _adopt_loaded(self) -> None:
        if self._loaded:
            for bucket in self._buckets:
                bucket.read(self._loaded)
            self._loaded = set()

    def _check_parameters(self) -> None:
        of_model = {id(parameter) for parameter in self._model.parameters()}
        for bucket in self._buckets:
            for member in bucket.members:
                if id(member.parameter) not in of_model or member.parameter.data_ptr() != member.weight.data_ptr():
                    raise RuntimeError(
                        f"{member.name} is no longer where SDP4Bit has put it: move and cast the model before the "
                        "optimizer is made, load it without assign=True, and replace no parameter"
                    )
        for parameter in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"a parameter of shape {tuple(parameter.shape)} did not require a gradient when SDP4Bit was made: "
                    "make it anew to train that too"
                )

    # ---- state ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """It belongs to its model and to a process group, of which a copy would know nothing.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "SDP4Bit cannot be copied or pickled, since it belongs to its model and to a process group: save its "
            "state_dict() or checkpoint(), or load that into the SDP4Bit of another model"
        )

    def _header(self) -> saved.Header:
        return saved.header(self._rank, self._world, self._scheme.seed, self._buckets)

    def _progress(self) -> dict[str, Any]:
        compressed = self._scheme.weights is not None
        return {"compressed": compressed, "steps": self._steps, "passes": self._passes.number}

    def _resume(self, kind: str, state: Mapping[str, Any], check: Callable[[], None]) -> None:
        """Before anything is loaded: all ranks can, and have the same."""
        self.synchronize()
        prepare_or_refuse(self._channel, check)
        if self._channel is not None:
            progress = f"{state['steps']} steps and {state['passes']} passes"
            agree(self._channel, f"load a {kind} of SDP4Bit after {progress}", [], self._count)

    def _go_on(self, state: Mapping[str, Any]) -> None:
        for bucket in self._buckets:
            bucket.clean()
        self._share()
        self._count_step(state["steps"])
        self._passes.number = state["passes"]
        self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of a group of the same size; for any other
        :meth:`checkpoint`. Save the model's beside it, which has the weights that the others know.

        Returns:
            The inner optimizer's ``state_dict()`` and, as ``"sdp4bit"``, this rank's part of the master. The tensors
            are those in use, as with torch's optimizers; a master that is a part of the weights is copied.
        """
        self.synchronize()
        self._adopt_loaded()
        own = {**self._header(), **self._progress()}
        # A part of the weights would be saved with the whole of them.
        own["master"] = [b.master.detach() if b.is_copy else b.master.detach().clone() for b in self._buckets]
        return {**self._inner.state_dict(), "sdp4bit": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave. Load the model's, too, before or after.

        Raises:
            TypeError, ValueError: The state is of another rank, world size, model or configuration, or none at all,
                or of compressed weights where the master is no copy. Nothing has changed then.
            RuntimeError: Another rank refused its state, or has one of another step.
        """
        own = state_dict.get("sdp4bit", {}) if isinstance(state_dict, Mapping) else {}
        self._resume("state", own, lambda: saved.check(state_dict, self._header(), self._inner, self._buckets))
        self._inner.load_state_dict(saved.copied(state_dict))
        for bucket, master in zip(self._buckets, own["master"], strict=True):
            bucket.master.copy_(master)
        self._go_on(own)

    def checkpoint(self) -> dict[str, Any]:
        """The state of all ranks together, for ``torch.distributed.checkpoint``: saved by any number of ranks and
        loaded by any other.

            state = {"model": model.state_dict(), "optimizer": optimizer.checkpoint()}
            torch.distributed.checkpoint.save(state, checkpoint_id=folder)

            state = {"model": model.state_dict(), "optimizer": optimizer.checkpoint()}
            torch.distributed.checkpoint.load(state, checkpoint_id=folder)
            model.load_state_dict(state["model"])
            optimizer.load_checkpoint(state["optimizer"])

        Returns:
            By the name of each parameter the master (``"master"``) and what the inner optimizer holds of it
            (``"state"``), flat; the parameter groups and the number of steps. What is loaded goes straight into the
            memory in use, so a load that fails leaves the optimizer unusable.
        """
        self.synchronize()
        self._adopt_loaded()
        template = saved.template(self._inner, self._optimizer_class, self._optimizer_kwargs, self._buckets)
        progress = {"seed": self._scheme.seed, **self._progress()}
        return saved.checkpoint(self._inner, template, self._groups, self._buckets, progress)

    @torch.no_grad()
    def load_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`checkpoint` gave after ``torch.distributed.checkpoint.load`` has filled it.

        Raises:
            TypeError, ValueError: Not such a state, or one of other parameter groups, of another seed, or of compressed
                weights where the master is no copy.
            RuntimeError: Another rank refused its state, or has one of another step.
        """
        check = lambda: saved.check_checkpoint(state, self._scheme.seed, self._inner, self._buckets)  # noqa: E731
        self._resume("checkpoint", state, check)
        saved.restore(state, self._inner, self._optimizer_class, self._optimizer_kwargs, self._buckets)
        self._go_on(state)

    # ---- figures ----------------------------------------------------------------------------------------------------

    def stats(self) -> SDP4BitStats:
        """What this object has done so far on this rank."""
        gradients, weights = Count(), Count()
        for exchange in self._exchanges:
            gradients.add(exchange.gradients.count)
            weights.add(exchange.weights.count)
        total = Count()
        for count in (self._count, gradients, weights):
            total.add(count)
        return SDP4BitStats(
            world_size=self._world,
            buckets=len(self._exchanges),
            steps=self._done,
            passes=self._passes.done,
            collectives=total.collectives,
            bytes_sent=total.bytes_sent,
            gradient_bytes_sent=gradients.bytes_sent,
            weight_bytes_sent=weights.bytes_sent,
            uncompressed_bytes=total.uncompressed_bytes,
        )

    def memory(self) -> SDP4BitMemory:
        """The memory that training takes on this rank now, beside activations and what the model has of its own."""
        buckets = self._buckets
        states = [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]
        parts = [bucket.reduced for bucket in buckets if bucket.reduced is not None and not bucket.is_whole]
        return SDP4BitMemory(
            weights=sum(bucket.weights.nbytes for bucket in buckets),
            master=sum(bucket.master.nbytes for bucket in buckets if bucket.is_copy),
            optimizer_state=sum(state.nbytes for state in states),
            gradients=self._passes.pool.nbytes + sum(part.nbytes for part in parts),
            packets=sum(exchange.nbytes for exchange in self._exchanges),
        )

    def __repr__(self) -> str:
        groups = super().__repr__().removesuffix(")")
        return f"{groups}{self._optimizer_class.__name__} on rank {self._rank} of {self._world}, {self._scheme}\n)"


def _plain(value: object) -> object:
    """An option as all ranks would print it."""
    if isinstance(value, Tensor):
        return value.tolist()
    return getattr(value, "__qualname__", type(value)) if callable(value) else value
