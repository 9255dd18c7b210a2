"""CSER: SGD with momentum whose ranks may differ for a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import Codec, as_int
from smallreduce.collectives import Count, agree, channel_of, group_of, prepare_or_refuse, ring_bytes
from smallreduce.collectives._agreement import Agreement
from smallreduce.optim import _cser_state
from smallreduce.optim._broadcast import broadcast_
from smallreduce.optim._cser_arguments import check_group, check_model
from smallreduce.optim._cser_exchange import mean_
from smallreduce.optim._cser_part import Part, exchange
from smallreduce.optim._cser_scheme import NOTHING, Scheme
from smallreduce.optim._cser_stats import CSERStats

__all__ = ["CSER"]


class CSER(torch.optim.Optimizer):
    """SGD with momentum that sends two things, each compressed: the update in every step, and every ``reset_interval``
    steps what the ranks have come to differ by. CSER with momentum, M-CSER (arXiv:2007.13221).

    What a rank could not send of its update it applies to its own parameters all the same, so ranks compute their
    gradients at different points, ``x_i = z + e_i``: ``z`` is the same on all of them, bit for bit, and ``e_i`` is what
    the rank still owes. With ``m_i`` its own momentum, a step is::

        m_i = momentum * m_i + g_i;  p_i = lr * (g_i + momentum * m_i)         # without Nesterov: lr * m_i
        x_i -= mean(C2(p)) + p_i - C2(p_i);  z -= mean(C2(p))
        every reset_interval steps, with e_i = x_i - z:
            z += mean(C1(e));  x_i = z + e_i - C1(e_i)

    Nothing needs DistributedDataParallel: ``model`` is a plain module, whose gradients stay local. At construction all
    parameters and buffers are broadcast from rank 0; from then on buffers are each rank's own. Evaluate, and save the
    model, within :meth:`averaged`. All ranks call ``step()``, ``add_param_group()``, ``averaged()`` and
    ``load_state_dict()`` together, and freeze the same parameters.

    Every parameter that requires a gradient is compressed, biases too, and a gradient of None counts as zero. One
    that is frozen after it was trained takes no further update, but is still averaged. Parameters are fp32: with mixed
    precision use ``torch.autocast``. A GradScaler works as with any optimizer; an Inf or a NaN on one rank skips the
    step on all, which a small all-reduce in each step tells them. Each rank's scale stays its own.

    **Blocks averaged in place.** Where C1 is :class:`RandomBlocks`, and C2 as well or ``"nothing"``, blocks of the
    parameters themselves are averaged, by one fp32 all-reduce: those of C2, in every ``reset_interval``-th step those
    of C1 instead. This is what the paper's released code does (its implementation II). It needs no memory for ``z`` and
    sends less than the formula says, ``((H-1)/R_C2 + 1/R_C1)/H``. Since averaging ``x_i`` where it stands also averages
    ``e_i`` there, it is the step above with C2 sending nothing and a reset in every step, by the blocks of that step.

    Args:
        model: The module; the same on all ranks.
        lr, momentum, nesterov, weight_decay: As of ``torch.optim.SGD``; each may differ between parameter groups.
            Nesterov is without effect where momentum is 0.
        gradient_codec: C2: a codec, its spelling, None (exact: nothing is left to reset) or ``"nothing"`` (no update is
            sent). The defaults of the three are those of the paper's scripts for ImageNet, an overall ratio of 32.
        model_codec: C1: a codec, its spelling, or None (exact).
        reset_interval: H, in steps.
        params: Parameters or parameter groups, as torch's optimizers take them; None: all parameters of the model.
        apply_residual: False: what could not be sent is not applied to the parameters but kept and sent with the next
            reset, after which all ranks have the same parameters. Only with ``gradient_codec="nothing"``.
        average_blocks: False: never average blocks in place; True: raise where it cannot be; None: where it can be.
        seed: Base of the random bits, the same on all ranks.
        process_group: None: the default group.

    Its relatives in the paper are configurations, each with a constructor of its own:

    ==========================================  ===============================================================
    :meth:`ef_sgd`                              ``gradient_codec="nothing", reset_interval=1, apply_residual=False``
    :meth:`qsparse_local_sgd`                   ``gradient_codec="nothing", apply_residual=False``
    :meth:`csea`                                ``gradient_codec="nothing", reset_interval=1``
    :meth:`partial_local_sgd` (CSER-PL)         ``gradient_codec="nothing"``
    ==========================================  ===============================================================

    Attributes:
        steps: Steps done, int; saved.

    Raises:
        TypeError, ValueError: Impossible values, a model wrapped in DistributedDataParallel, or parameters that are not
            dense fp32 on one device.
        RuntimeError: Another rank refused its arguments, or has others.
    """

    # step() is then called with `found_inf` and `grad_scale` as attributes, whether or not this rank found any.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: torch.nn.Module,
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        gradient_codec: str | Codec | None = "random-blocks:0.015625",
        model_codec: str | Codec | None = "random-blocks:0.25",
        reset_interval: int = 16,
        *,
        params: Iterable[Any] | None = None,
        apply_residual: bool = True,
        average_blocks: bool | None = None,
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        group = group_of(process_group)
        of_model = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
        self._device = of_model[0].device if of_model else torch.device("cpu")
        self._channel = channel_of(group, self._device) if group.size() > 1 else None
        self._rank, self._world = group.rank(), group.size()
        self._parts: list[Part] = []
        self._members: set[int] = set()  # ids of the parameters in them
        self._count = Count()
        self._step_bytes = self._uncompressed_bytes = 0
        self._done = self._resets = self._skipped = 0
        self._averaging = False
        self._constructed = False
        self._shown: list[tuple[str, ...]] = []  # what of the buckets' memory is in ``state``
        self.steps = 0

        def prepare() -> None:
            check_model(model)
            self._model = model
            self._seed = as_int(seed, "seed")
            self._scheme = Scheme.parse(gradient_codec, model_codec, reset_interval, apply_residual, average_blocks)
            defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
            super(CSER, self).__init__(of_model if params is None else params, defaults)

        prepare_or_refuse(self._channel, prepare)
        buffers = list(model.buffers())
        self._agree([*of_model, *buffers])
        self._broadcast([*of_model, *buffers])
        self._add(self._fresh())
        self._constructed = True

    @classmethod
    def ef_sgd(cls, model: torch.nn.Module, lr: float | Tensor, codec: str | Codec | None, **options: Any) -> CSER:
        """SGD with error feedback: update plus residual is compressed in every step, and all ranks have the same
        parameters. As in the paper's released code, weight decay is not compressed and has a momentum of its own.

        Args:
            codec: What compresses.
            **options: ``momentum`` and others, as of :class:`CSER`.
        """
        return cls(
            model, lr, gradient_codec=NOTHING, model_codec=codec, reset_interval=1, apply_residual=False, **options
        )

    @classmethod
    def qsparse_local_sgd(
        cls, model: torch.nn.Module, lr: float | Tensor, codec: str | Codec | None, reset_interval: int, **options: Any
    ) -> CSER:
        """Qsparse-local-SGD: local steps, whose sum plus residual is compressed every ``reset_interval`` steps; all
        ranks then have the same parameters. Arguments as of :meth:`ef_sgd`."""
        return cls(
            model, lr, gradient_codec=NOTHING, model_codec=codec, reset_interval=reset_interval, apply_residual=False,
            **options,
        )  # fmt: skip

    @classmethod
    def csea(cls, model: torch.nn.Module, lr: float | Tensor, codec: str | Codec | None, **options: Any) -> CSER:
        """CSEA, error assimilation: in every step what the ranks differ by is compressed and sent, and what is left
        stays applied. Arguments as of :meth:`ef_sgd`."""
        return cls(model, lr, gradient_codec=NOTHING, model_codec=codec, reset_interval=1, **options)

    @classmethod
    def partial_local_sgd(
        cls, model: torch.nn.Module, lr: float | Tensor, codec: str | Codec | None, reset_interval: int, **options: Any
    ) -> CSER:
        """CSER-PL, partial local SGD: :meth:`csea` every ``reset_interval`` steps, local steps between. Arguments as of
        :meth:`ef_sgd`."""
        return cls(model, lr, gradient_codec=NOTHING, model_codec=codec, reset_interval=reset_interval, **options)

    # ---- parameters -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch's optimizers. All ranks call it; the parameters are broadcast from rank 0.

        Raises:
            TypeError, ValueError: Impossible values, parameters that are not the model's, not dense fp32 on its device,
                or already in a group.
            RuntimeError: Another rank refused its arguments, or has others.
        """

        def prepare() -> None:
            super(CSER, self).add_param_group(param_group)
            try:
                check_group(self.param_groups[-1], {id(p) for p in self._model.parameters()}, self._device)
            except Exception:
                self.param_groups.pop()
                raise

        if not self._constructed:
            prepare()  # the other ranks are told of all groups at once
            return
        prepare_or_refuse(self._channel, prepare)
        parameters = self.param_groups[-1]["params"]
        try:
            self._agree(parameters)
        except Exception:
            # The ranks are still in step, so this one must not go on with a group that another has refused.
            self.param_groups.pop()
            raise
        self._broadcast(parameters)
        self._add(self._fresh())

    def _fresh(self) -> list[tuple[int, list[Tensor]]]:
        """Of each group, by its number, the parameters that require a gradient and are in no part."""
        fresh = [
            (number, [p for p in group["params"] if p.requires_grad and id(p) not in self._members])
            for number, group in enumerate(self.param_groups)
        ]
        return [(number, parameters) for number, parameters in fresh if parameters]

    @torch.no_grad()  # what the buckets hold has no history
    def _add(self, fresh: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
        for group, parameters in fresh:
            part = Part.build(len(self._parts), group, parameters, self._scheme, self._seed, self._channel)
            self._parts.append(part)
            self._members.update(map(id, parameters))
        self._show_state()

    def _agree(self, tensors: Sequence[Tensor]) -> None:
        """Compares the configuration and what there is of these parameters and buffers over the ranks."""
        if self._channel is None:
            return
        names = {id(t): name for name, t in [*self._model.named_buffers(), *self._model.named_parameters()]}
        groups = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        lines = [
            f"{names[id(t)]}: {tuple(t.shape)} of {t.dtype}, group {groups.get(id(t))}, requires_grad {t.requires_grad}"
            for t in tensors
        ]
        lines += [
            f"group {number}: lr {float(group['lr'])}, momentum {group['momentum']}, nesterov {group['nesterov']}, "
            f"weight_decay {group['weight_decay']}"
            for number, group in enumerate(self.param_groups)
        ]
        header = f"smallreduce.optim.CSER: {self._scheme}, seed {self._seed}, after {self.steps} steps"
        agree(self._channel, header, lines, self._count)

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        if self._channel is not None:
            broadcast_(tensors, self._channel.group, self._count)

    # ---- a step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Does one step. All ranks call it.

        Args:
            closure: Computes the loss and the gradients again, and returns the loss.

        Raises:
            TypeError: A sparse gradient.
            RuntimeError: The group failed, or it is called within :meth:`averaged`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_own_parameters("step()")
        if fresh := self._fresh():  # unfrozen since the last step
            self._agree([p for _, parameters in fresh for p in parameters])
            self._add(fresh)
        before = self._count.bytes_sent
        if self._overflows():
            self._skipped += 1
        else:
            self._step(self._inverse_scale())
        self._step_bytes += self._count.bytes_sent - before
        return loss

    def _overflows(self) -> bool:
        """Whether a GradScaler has found an Inf or a NaN on any rank."""
        found: Tensor | int | None = getattr(self, "found_inf", None)
        if found is None:
            return False
        found_inf = torch.as_tensor(found, dtype=torch.float32).to(self._device, copy=True).reshape(1)
        if self._channel is not None:
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=self._channel.group)
            self._count.add_all_reduce(found_inf, self._world)
        return bool(found_inf.item())

    def _inverse_scale(self) -> float:
        scale: Tensor | None = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else 1.0 / float(scale)

    def _step(self, inverse_scale: float) -> None:
        self.steps += 1
        self._done += 1
        step, scheme, channel = self.steps, self._scheme, self._channel
        for part in self._parts:
            options = self.param_groups[part.bucket.group]
            part.bucket.take_gradients(options, inverse_scale, alone=part.update is None)
            part.bucket.decay(options)
            self._uncompressed_bytes += ring_bytes(4 * part.bucket.numel, self._world)
        if channel is not None and scheme.sends_updates:
            exchange(self._parts, [part.update for part in self._parts], step, self._count)
            for part in self._parts:
                part.bucket.end_update()
        if channel is not None and scheme.average_blocks:
            self._average_blocks(step)
        elif channel is not None and scheme.resets(step):
            for part in self._parts:
                part.bucket.begin_reset()
            exchange(self._parts, [part.reset for part in self._parts], step, self._count)
            for part in self._parts:
                part.bucket.end_reset()
        self._resets += channel is not None and scheme.resets(step)
        if self._shown != [tuple(part.bucket.held) for part in self._parts]:
            self._show_state()

    def _average_blocks(self, step: int) -> None:
        codec = self._scheme.blocks(step)
        if codec is None:
            return
        averages = [part.blocks for part in self._parts if part.blocks is not None]
        in_flight = [average.start(codec, step, self._count) for average in averages]
        for average, work in zip(averages, in_flight, strict=True):
            work.wait()
            average.finish()

    # ---- the averaged model -----------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model is the average over the ranks, for evaluation and for saving; after it the rank's own
        again, bit for bit, whatever ends it. All ranks enter it together.

        The parameters that this optimizer updates are averaged, and the floating-point buffers of the model
        (BatchNorm's statistics). It takes the memory of these once more.

        Raises:
            RuntimeError: It is entered within itself, or the group failed.
        """
        self._check_own_parameters("averaged()")
        buffers = [buffer for buffer in self._model.buffers() if buffer.is_floating_point()]
        parameters = [p.detach() for part in self._parts for p in part.bucket.parameters]
        tensors = [*buffers, *parameters]
        saved = [tensor.clone() for tensor in tensors]
        self._averaging = True
        try:
            if self._channel is not None:
                with torch.no_grad():
                    # Of what is the same everywhere the mean would only be rounded.
                    mean_(buffers if self._scheme.ranks_agree else tensors, self._channel, self._count)
            yield
        finally:
            self._averaging = False
            with torch.no_grad():
                for tensor, value in zip(tensors, saved, strict=True):
                    tensor.copy_(value)

    def _check_own_parameters(self, call: str) -> None:
        if self._averaging:
            raise RuntimeError(f"{call} within averaged() would take the average for this rank's parameters")

    # ---- state ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """It belongs to its model and to a process group, of which a copy would know nothing.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "CSER cannot be copied or pickled, since it belongs to its model and to a process group: save its "
            "state_dict(), or load that into the CSER of another model"
        )

    def _header(self) -> dict[str, object]:
        return {
            "format": _cser_state.FORMAT,
            "rank": self._rank,
            "world_size": self._world,
            "scheme": str(self._scheme),
            "seed": self._seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of a group of the same size.

        The rank's parameters are in it, since they are its own: loading restores them. The tensors are copies on the
        CPU. :meth:`reshard` takes the states of all ranks to another number of ranks.

        Returns:
            A dict of plain types and tensors that ``torch.load(weights_only=True)`` takes.

        Raises:
            RuntimeError: It is called within :meth:`averaged`.
        """
        self._check_own_parameters("state_dict()")
        state = super().state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        index = {id(p): number for number, p in enumerate(parameters)}
        state["state"] = {
            index[id(p)]: {
                name: tensor.detach().to("cpu", copy=True) for name, tensor in {"parameter": p, **held}.items()
            }
            for part in self._parts
            for p, held in zip(part.bucket.parameters, part.bucket.held_of_each(), strict=True)
        }
        buckets = [_cser_state.saved_bucket(part.bucket, part.syncs, index) for part in self._parts]
        state["cser"] = {**self._header(), "step": self.steps, "buckets": buckets}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave, the rank's parameters included; all ranks call it. The next steps
        are those that followed the saving, bit for bit.

        Raises:
            TypeError, ValueError: The state is of another rank, world size, configuration or model, or none at all.
                Nothing has changed then.
            RuntimeError: Another rank refused its state, or has one of another step, or it is called within
                :meth:`averaged`.
        """
        self._check_own_parameters("load_state_dict()")
        parameters = [p for group in self.param_groups for p in group["params"]]
        parts: list[Part] = []

        def prepare() -> None:
            _cser_state.check(state_dict, self._header(), self.param_groups)
            for number, saved in enumerate(state_dict["cser"]["buckets"]):
                members = [parameters[index] for index in saved["params"]]
                part = Part.build(number, saved["group"], members, self._scheme, self._seed, self._channel)
                part.bucket.restore([state_dict["state"][index] for index in saved["params"]])
                for name, sync in part.syncs.items():
                    if sync is not None and saved[name] is not None:
                        sync.restore(saved[name]["server"])
                parts.append(part)

        prepare_or_refuse(self._channel, prepare)
        if self._channel is not None:
            Agreement(self._channel, f"load a state of CSER after {state_dict['cser']['step']} steps").check()
            self._count.collectives += 1
            self._count.bytes_sent += Agreement.nbytes(self._world)
        # What torch does with the state of each parameter is done here.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for index, saved in state_dict["state"].items():
            parameters[index].copy_(saved["parameter"])
        self.steps = state_dict["cser"]["step"]
        self._parts = parts
        self._members = {id(p) for part in parts for p in part.bucket.parameters}
        self._show_state()

    def _show_state(self) -> None:
        """Makes ``state`` of each parameter its part of the buckets' memory."""
        self._shown = [tuple(part.bucket.held) for part in self._parts]
        for part in self._parts:
            for parameter, held in zip(part.bucket.parameters, part.bucket.held_of_each(), strict=True):
                self.state[parameter] = held

    @staticmethod
    def reshard(state_dicts: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """Takes the states of all ranks to another number of ranks; needs no process group.

        The shared model ``z`` stays. What is owed to it stays too: each new rank's ``e_i`` is the mean of the old ones
        plus what the servers still owe, so the mean over the ranks is the same but for its rounding to fp32. In other
        words, each new rank starts at the averaged model. Its momentum is the mean of the old ones.

        Args:
            state_dicts: :meth:`state_dict` of every rank, in any order.
            world_size: The new number of ranks.

        Returns:
            The state of each new rank. With the number that it was, copies.

        Raises:
            TypeError, ValueError: They are not the states of all ranks of one group after the same step.
        """
        return _cser_state.reshard(state_dicts, world_size)

    # ---- figures ----------------------------------------------------------------------------------------------------

    @property
    def compression_ratio(self) -> float:
        """R_C, how many times fewer bits than fp32 are sent: ``1/R_C = 1/R_C2 + 1/(H * R_C1)``, by ``bits_per_element``
        of the codecs. What was sent in fact is in :meth:`stats`; blocks averaged in place send less."""
        return self._scheme.compression_ratio

    def stats(self) -> CSERStats:
        """What this object has done so far on this rank. It waits for a CUDA device."""
        norms = []
        for part in self._parts:
            bucket = part.bucket
            if "residual" in bucket.held:
                norms.append(float(bucket.held["residual"].norm()))
            elif "shared" in bucket.held:
                shared = bucket.views(bucket.held["shared"])
                norms += [float((p.detach() - z).norm()) for p, z in zip(bucket.parameters, shared, strict=True)]
        return CSERStats(
            world_size=self._world,
            steps=self._done,
            resets=self._resets,
            skipped_steps=self._skipped,
            compression_ratio=self.compression_ratio,
            collectives=self._count.collectives,
            bytes_sent=self._count.bytes_sent,
            step_bytes_sent=self._step_bytes,
            uncompressed_bytes=self._uncompressed_bytes,
            residual_norm=math.hypot(*norms) if norms else None,
        )

    def __repr__(self) -> str:
        groups = super().__repr__().removesuffix(")")
        return f"{groups}{self._scheme}, compression ratio {self.compression_ratio:.4g}\n)"
