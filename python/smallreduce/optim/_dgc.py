"""``smallreduce.optim.DGC``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from smallreduce.codecs import TopK, fraction_of
from smallreduce.collectives import prepare_or_refuse
from smallreduce.ddp import Stats
from smallreduce.ddp._hook import channel_of_model, register_state
from smallreduce.optim._dgc_hook import DGCState, advance
from smallreduce.optim._dgc_reshard import reshard
from smallreduce.optim._dgc_warmup import check_warmup

__all__ = ["DGC"]

_BATCH_NUMEL = 1 << 22  # in fp32 16 MB: a step takes up to three times as much while it lasts, or as a larger parameter


class DGC(Optimizer):
    """SGD with momentum that sends a thousandth of the gradients: Deep Gradient Compression.

        ddp_model = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = smallreduce.optim.DGC(ddp_model, lr=0.1, warmup=smallreduce.optim.dgc_warmup(steps_per_epoch))
        ...
        loss.backward()  # reduces the gradients, while the rest of the pass is being computed
        optimizer.step()

    Each rank corrects its own gradients by momentum (``u = m*u + g``) and adds them up (``v += u``). Of each parameter
    it sends the elements of ``v`` that are largest, ``ratio`` of all, and sets them to zero, in ``v`` and in ``u``
    (momentum factor masking). The mean over the ranks of what was sent is the step: ``parameter.grad`` holds it.

    So momentum acts in the backward pass, while buckets are on their way, and each synchronised pass belongs to one
    :meth:`step`: gradients accumulate under ``ddp_model.no_sync()``, and a ``GradScaler``, which may skip a step, is
    passed as ``scaler``. A step that is left out otherwise (``zero_grad()`` and :meth:`step`, which then does nothing)
    is lost for good: what its pass sent is no longer owed. ``parameter.grad`` is sparse and of many passes: clip by
    ``clip_norm``, not by ``clip_grad_norm_``.

    Parameters of fewer than two dimensions, of dtypes that no codec takes, or at a ratio of 1 are dense: reduced
    exactly, with momentum acting on their mean, as in ``torch.optim.SGD``. At world size 1 all are. Weight decay is
    kept out of what is compressed, and has a momentum of its own.

    It registers a communication hook on the model, where there may be no other. Every rank makes its DGC before the
    first backward pass and changes groups and ratios alike. As any optimizer's, the state of a rank that joined early
    under ``ddp_model.join()`` stays behind the others'.

    Args:
        ddp_model: The model, with all of its parameters in one group unless ``params`` says otherwise.
        lr: Learning rate.
        momentum: m, from 0 to less than 1.
        nesterov: Nesterov's momentum: ``u = m*(u + g)`` and ``v += u + g``.
        weight_decay: Added to the gradient, times the parameter.
        ratio: The share of elements that a rank sends, from 1e-9 to 1: ``ceil(ratio * numel)`` of each parameter; where
            it is split among many ranks, of each part of it. A group that was compressed keeps a ratio below 1.
        warmup: Stages ``(steps, ratio)`` before that, of ratios that do not grow, as :func:`dgc_warmup` and
            :func:`dgc_geometric_warmup` make them. Steps are synchronised backward passes. While a stage's ratio is
            less than that of a group, the group's holds; stages of ratio 1 are dense.
        clip_norm: Clip the gradients on each rank before they are compressed: so that the mean of independent ones is
            of that 2-norm at most, each rank's share of the mean, ``g/N`` on N ranks, is shortened to ``clip_norm *
            N**-0.5``. For each parameter on its own, as buckets are sent before the last gradient is known. None: not.
        momentum_masking: Set ``u`` to zero, too, where ``v`` was sent.
        values: dtype of the values on the wire: torch.float32, bfloat16 or float16. What the latter two round away
            stays in ``v``.
        params: Parameters of the model, or groups of them (dicts), as torch's optimizers take them; with ``lr``,
            ``momentum``, ``nesterov``, ``weight_decay`` and ``ratio`` of their own. Groups keep at least their own
            ``ratio`` in the warm-up: with ``ratio=1.0`` they are never compressed.
        scaler: The ``torch.amp.GradScaler`` that scales the loss; see :class:`smallreduce.ddp.HookState`.

    Raises:
        TypeError, ValueError: Impossible values, or parameters that are not the model's.
        RuntimeError: The ranks do not agree; on every rank.

    Source: Lin, Han, Mao, Wang, Dally, *Deep Gradient Compression*, ICLR 2018, arXiv:1712.01887, algorithm 4 and
    section 3; Nesterov's form, weight decay and the dense parameters are those of the authors' program,
    github.com/synxlin/deep-gradient-compression. Selection is exact, not sampled. What is sent among many ranks may be
    selected a second time, from the sum, with error feedback of its own; the program sends everything to all.
    """

    def __init__(
        self,
        ddp_model: DistributedDataParallel,
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        ratio: float = 0.001,
        warmup: Sequence[tuple[int, float]] = (),
        clip_norm: float | None = None,
        momentum_masking: bool = True,
        values: torch.dtype = torch.float32,
        *,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]] | None = None,
        scaler: GradScaler | None = None,
    ) -> None:
        if not isinstance(ddp_model, DistributedDataParallel):
            raise TypeError(f"ddp_model must be a DistributedDataParallel module, got {type(ddp_model).__name__}")
        self._hook: DGCState | None = None
        self._ids = {id(parameter) for parameter in ddp_model.module.parameters()}

        def prepare() -> DGCState:
            if clip_norm is not None:
                _check_number("clip_norm", clip_norm, 0.0)
                if clip_norm == 0:
                    raise ValueError("clip_norm must be above 0, or None for no clipping, got 0")
            stages = check_warmup(warmup)
            TopK(ratio, values)
            defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, ratio=ratio)
            super(DGC, self).__init__(ddp_model.module.parameters() if params is None else params, defaults)
            return DGCState(
                self,
                ddp_model,
                warmup=stages,
                clip_norm=clip_norm,
                momentum_masking=bool(momentum_masking),
                values=values,
                scaler=scaler,
            )

        self._hook = prepare_or_refuse(channel_of_model(ddp_model), prepare)
        self._ignored = {
            id(parameter)
            for name, parameter in ddp_model.module.named_parameters()
            if name in ddp_model.parameters_to_ignore
        }
        register_state(ddp_model, self._hook)

    @property
    def _hook_state(self) -> DGCState:
        assert self._hook is not None
        return self._hook

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters of the model; as of torch's optimizers, with a ``ratio`` too. On all ranks alike.

        Raises:
            TypeError, ValueError: Impossible values, parameters that are not the model's, or that are in a group.
        """
        if isinstance(param_group, dict):
            _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        foreign = [parameter for parameter in param_group["params"] if id(parameter) not in self._ids]
        if foreign:
            self.param_groups.pop()
            raise ValueError(
                f"DGC takes parameters of its ddp_model, got others, the first of shape {tuple(foreign[0].shape)}"
            )
        if self._hook is not None:
            self._hook.regroup()

    # ---- a step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes a step along ``parameter.grad``, which the backward pass has reduced.

        Args:
            closure: Computes the loss anew, backward pass included, and returns it.

        Raises:
            RuntimeError: There are gradients, but no synchronised backward pass since the last step; or one that the
                model has not reduced, since DDP knows its parameter as a frozen one. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_group = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        reducible = [p for parameters in by_group for p in parameters if id(p) not in self._ignored]
        state = self._hook_state
        if reducible and not state.has_reduced:
            raise RuntimeError(
                "DGC.step() without a synchronised backward pass since the last one: the gradients are those of the "
                "step before, or have not been reduced. The last of the passes whose gradients accumulate must be "
                "outside of ddp_model.no_sync()"
            )
        corrected = state.reduced()
        for parameter in reducible:
            if id(parameter) not in corrected and not state.is_alone:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(parameter.shape)} has not been reduced: it did not "
                    "require one when DistributedDataParallel was made. Make model and optimizer anew"
                )
        state.end_step()
        for group, parameters in zip(self.param_groups, by_group, strict=True):
            lr = float(group["lr"])
            for batch in _batches(parameters):
                self._update(group, lr, batch, corrected)
        return loss

    def _update(
        self, group: Mapping[str, Any], lr: float, parameters: list[Tensor], corrected: Mapping[int, bool]
    ) -> None:
        """A step of some parameters of a group.

        Args:
            corrected: The parameters, by id, whose gradients are reduced: whether momentum is in these.
        """
        updates = [_wide(parameter.grad) for parameter in parameters if parameter.grad is not None]
        dense = [at for at, parameter in enumerate(parameters) if not corrected.get(id(parameter), False)]
        velocities = {}
        for at in dense:
            # On one rank nothing is sent, but a state made of those of several owes what they had not sent.
            owed = self._hook_state.release(parameters[at])
            if owed is not None:
                self.state[parameters[at]]["momentum_buffer"], velocities[at] = owed
        if dense and group["momentum"]:
            of_mean = self._with_momentum(group, [parameters[at] for at in dense], [updates[at] for at in dense])
            for at, update in zip(dense, of_mean, strict=True):
                updates[at] = update
        for at, velocity in velocities.items():
            updates[at] = updates[at] + velocity
        # Each operation is rounded on its own: what adds and multiplies in one may or may not, by device and dtype.
        if group["weight_decay"]:
            steps = torch._foreach_add(self._decay(group, parameters), updates)
            torch._foreach_mul_(steps, -lr)
        else:
            steps = torch._foreach_mul(updates, -lr)
        torch._foreach_add_(parameters, steps)

    def _with_momentum(self, group: Mapping[str, Any], parameters: list[Tensor], means: list[Tensor]) -> list[Tensor]:
        """What momentum makes of gradients that are means over the ranks."""
        momenta = self._buffers("momentum_buffer", parameters)
        advance(momenta, means, group["momentum"], group["nesterov"])
        return list(torch._foreach_add(momenta, means)) if group["nesterov"] else momenta

    def _decay(self, group: Mapping[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Weight decay, with a momentum of its own."""
        decays = torch._foreach_mul([_wide(parameter) for parameter in parameters], group["weight_decay"])
        if not group["momentum"]:
            return list(decays)
        momenta = self._buffers("weight_decay_buffer", parameters)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, decays)
        if group["nesterov"]:
            torch._foreach_add_(decays, torch._foreach_mul(momenta, group["momentum"]))
            return list(decays)
        return momenta

    def _buffers(self, name: str, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Of the optimizer's state, zeros at first: in fp32 at least."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(_wide(parameter), memory_format=torch.preserve_format)
        return [self.state[parameter][name] for parameter in parameters]

    # ---- state ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """It belongs to the communication hook of its model, of which a copy would know nothing.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "DGC cannot be copied or pickled, since it belongs to the communication hook of its model: save its "
            "state_dict(), or load that into the DGC of another model"
        )

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of a group of the same size, or to :meth:`reshard`.

        With a scaler, call it after ``scaler.update()``.

        Returns:
            As of torch's optimizers ``"state"`` (the buffers of dense parameters and of weight decay) and
            ``"param_groups"``, the same on all ranks; and ``"compression"``, this rank's: the velocities and momenta of
            compressed parameters, the step, rank and world size (:meth:`smallreduce.ddp.HookState.state_dict`).
        """
        state: dict[str, Any] = super().state_dict()
        return {**state, "compression": self._hook_state.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; every rank calls it, between the same two steps.

        Raises:
            ValueError: The state is of another rank, world size or model, or is none of DGC; nothing has changed then.
        """
        if not isinstance(state_dict, Mapping) or not state_dict.keys() >= {"state", "param_groups", "compression"}:
            given = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"not a state of smallreduce.optim.DGC, got {given}")
        before = {"state": self.state, "param_groups": self.param_groups}
        try:
            super().load_state_dict(dict(state_dict))
            for group in self.param_groups:
                _check_options(group)
            self._hook_state.load_state_dict(state_dict["compression"])
        except Exception:
            self.__dict__.update(before)
            raise
        # torch gives all buffers the dtype of their parameters.
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        parameters = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, values in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = values.detach().to(parameter.device, copy=True)
        self._hook_state.regroup()

    @staticmethod
    def reshard(state_dicts: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
        """The states for ``world_size`` ranks that go on where others, on however many ranks, stopped.

        What the ranks owe together is preserved: the mean over the ranks of the velocities, and of the momenta. Were
        the ranks laid out evenly on a line, once the old and once the new ones, each new rank gets the mean of the old
        ones that it overlaps, weighted by how far: a copy where the number of ranks is multiplied, the mean of several
        where it is divided, and its own where it stays. What the second selection in large groups has left
        (the server's residual) is of the mean, and becomes part of every rank's velocity.

        Args:
            state_dicts: :meth:`state_dict` of all ranks, taken between the same two steps, in any order.
            world_size: How many ranks there are to be.

        Returns:
            The state of each of them, in the order of the ranks. With one, its next step sends all that is owed.

        Raises:
            TypeError, ValueError: Not the states of all ranks of one run, or an impossible world size.
        """
        return reshard(state_dicts, world_size)

    def stats(self) -> Stats:
        """What was sent and held back so far on this rank. Call it between steps."""
        return self._hook_state.stats()


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts the parameters into batches, so that what is computed of one on the way stays small."""
    batch: list[Tensor] = []
    numel = 0
    for parameter in parameters:
        batch.append(parameter)
        numel += parameter.numel()
        if numel >= _BATCH_NUMEL:
            yield batch
            batch, numel = [], 0
    if batch:
        yield batch


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_number(name: str, value: object, least: float, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not least <= value < below:
        raise ValueError(f"{name} must be from {least:g} to less than {below:g}, got {value}")


def _check_options(options: Mapping[str, Any]) -> None:
    """Of a parameter group."""
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be one number, got a tensor of shape {tuple(lr.shape)}")
    _check_number("lr", lr.item() if isinstance(lr, Tensor) else lr, 0.0)
    _check_number("momentum", options["momentum"], 0.0, 1.0)
    _check_number("weight_decay", options["weight_decay"], 0.0)
    if not isinstance(options["nesterov"], bool):
        raise TypeError(f"nesterov must be a bool, got {type(options['nesterov']).__name__}")
    if options["nesterov"] and not options["momentum"]:
        raise ValueError("Nesterov's momentum needs a momentum above 0, got 0")
    fraction_of(options["ratio"])
