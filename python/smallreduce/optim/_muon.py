"""``smallreduce.optim.Muon``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from smallreduce.codecs import as_int
from smallreduce.collectives import Count, channel_of
from smallreduce.optim._muon_agreement import check_agreement
from smallreduce.optim._muon_exchange import orthogonalize_sharded
from smallreduce.optim._muon_matrix import ADJUSTMENTS, Matrix
from smallreduce.optim._muon_owners import Owners, choose_owners
from smallreduce.optim._muon_stats import MuonStats
from smallreduce.optim._param_groups import Place, check_added, check_lr, check_number, places
from smallreduce.ragged import RaggedTensor

__all__ = ["Muon"]

_MIB = 1 << 20
_READ_AT_ONCE = ("cpu",)  # devices whose memory is read without waiting for them
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_MOST_STEPS = 99
_OPTIONS = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz iterations: ``torch.optim.Muon``, for sharded matrices too.

        smallreduce.ragged.fully_shard(model, granularity="rows")
        hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
        optimizer = smallreduce.optim.Muon(hidden, lr=0.02)
        others = torch.optim.AdamW(...)  # vectors, embeddings, the output layer

    Arguments, defaults, mathematics and state are those of ``torch.optim.Muon``, whose state dicts it loads, and the
    other way round; for plain tensors it is nothing else. (But where that divides in place, and so changes the momentum
    of bf16 parameters without ``nesterov``, as in torch 2.13, this does not.)

    Newton-Schulz needs a matrix whole. Of a :class:`smallreduce.ragged.RaggedTensor` each rank computes the momentum of
    what it holds; then each matrix is brought to one rank, its owner, orthogonalised there, and brought back: no
    rank computes another's. Owners are chosen anew from what has gradients, all of them at once and without a word, so
    that all ranks have about as much to do; a matrix that is whole on one rank (``granularity="matrix"``) stays there.
    What travels is bf16, in which Newton-Schulz computes anyway: the update of fp32 and fp64 parameters has the bits
    that ``torch.optim.Muon`` gives the unsharded ones on one such device, wherever they were cut. (Of parameters in 16
    bits, torch's addition on CPU has other bits in and outside of its vector loops; sharded ones are rounded once, as
    inside.)

    Every rank calls :meth:`step`, and has gradients for the same parameters. On CPU that is compared at every step;
    elsewhere, where to read the answer would be to wait for the device, at the first whose learning rates are not all
    zero, as they are where torch.distributed.checkpoint makes a state, and after groups were added or a state loaded.

    Args:
        params: Parameters or groups of them, all of two dimensions; plain tensors, RaggedTensors or both.
        lr: Learning rate; a number or a tensor of one element.
        weight_decay: Decoupled: the parameters shrink by ``lr * weight_decay``.
        momentum: From 0 to 1: the buffer moves by ``1 - momentum`` of the way to the gradient.
        nesterov: Orthogonalise what is ``momentum`` of the way from the gradient to the buffer; else the buffer.
        ns_coefficients: a, b, c of the Newton-Schulz polynomial.
        eps: The least Frobenius norm to divide an update by.
        ns_steps: Newton-Schulz iterations, below 100.
        adjust_lr_fn: What the learning rate is multiplied by for a matrix of m rows and n columns: with ``"original"``,
            or None, ``max(1, m/n)**0.5``; with ``"match_rms_adamw"`` ``0.2 * max(m, n)**0.5``, with which
            learning rate and weight decay may be those of AdamW.
        batch_cap_mb: MiB of matrices, in bf16, that a rank owns in one batch, unless a single one is larger. Three
            batches are on their way at a time: one comes, one is being computed, and one goes back.

    Raises:
        TypeError, ValueError: Impossible values, or parameters that are not matrices of floating-point numbers.

    Source: Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024,
    kellerjordan.github.io/posts/muon; ``"match_rms_adamw"``: Liu et al., *Muon is Scalable for LLM Training*,
    arXiv:2502.16982, section 2.2; owners of ragged shards: *veScale-FSDP*, arXiv:2602.22437, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        batch_cap_mb: float = 25.0,
    ) -> None:
        check_number("batch_cap_mb", batch_cap_mb)
        if batch_cap_mb == 0:
            raise ValueError("batch_cap_mb must be above 0, got 0")
        self._batch_cap_nbytes = int(batch_cap_mb * _MIB)
        self._count = Count()
        self._stats = MuonStats()
        self._agreed = False
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        # torch's own has nothing but what is in a state dict.
        of_any: dict[str, Any] = super().__getstate__()
        of_it = {"_batch_cap_nbytes": self._batch_cap_nbytes, "_count": Count(), "_stats": MuonStats()}
        return {**of_any, **of_it, "_agreed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what torch calls with what is loaded."""
        super().__setstate__(state)
        self._agreed = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch's optimizers; on all ranks alike.

        Raises:
            TypeError, ValueError: As the class.
        """
        super().add_param_group(param_group)
        self._agreed = False
        check_added(self.param_groups, _check_options, lambda place: _check_parameter(place.label, place.parameter))

    # ---- a step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes a step; where parameters are sharded, a collective.

        Args:
            closure: Computes the loss anew, backward pass included, and returns it.

        Raises:
            ValueError: A gradient, or a momentum that was loaded, is not sharded as its parameter is. Nothing has
                changed then.
            RuntimeError: The ranks have gradients for different parameters, or different options. Nothing has changed
                then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sent_before = self._count.bytes_sent
        every = list(places(self.param_groups))
        by_process_group = _by_process_group(every)
        for process_group, sharded in by_process_group.items():
            self._check_agreement(process_group, sharded)
        # Where the ranks agree, they have the same learning rates, and so go on to agree on whether they have agreed.
        self._agreed = self._agreed or any(group["lr"] != 0 for group in self.param_groups)
        for place in every:
            for name, tensor in self._tensors(place).items():
                if _kind(tensor) != _kind(place.parameter):
                    raise ValueError(
                        f"the {name} of {place.label} must be {_kind(place.parameter)}, as the parameter is, got "
                        f"{_kind(tensor)}"
                    )
        matrices = {id(place.parameter): self._matrix(place) for place in every if place.parameter.grad is not None}
        chosen = []
        for process_group, sharded in by_process_group.items():
            of_group = [matrices[id(place.parameter)] for place in sharded if id(place.parameter) in matrices]
            if of_group:
                chosen.append(self._owners(of_group))
                orthogonalize_sharded(of_group, chosen[-1], process_group, self._count)
        for matrix in matrices.values():
            if not isinstance(matrix.parameter, RaggedTensor):
                matrix.apply(matrix.orthogonalize(matrix.advance()))
        self._stats = MuonStats(
            steps=self._stats.steps + 1,
            matrices=len(matrices),
            moved_matrices=sum(sum(owners.moves) for owners in chosen),
            batches=sum(owners.moving_batches for owners in chosen),
            collectives=self._count.collectives,
            bytes_sent=self._count.bytes_sent,
            step_bytes_sent=self._count.bytes_sent - sent_before,
            imbalance=max((owners.imbalance for owners in chosen), default=1.0),
        )
        return loss

    def _check_agreement(self, process_group: dist.ProcessGroup, sharded: Sequence[Place]) -> None:
        device = sharded[0].parameter.device
        if process_group.size() == 1 or (self._agreed and device.type not in _READ_AT_ONCE):
            return
        options = [
            f"group {number}: {', '.join(f'{name}={_number(group[name])}' for name in _OPTIONS)}"
            for number, group in enumerate(self.param_groups)
        ]
        options.append(f"batches of {self._batch_cap_nbytes} bytes")
        check_agreement(
            channel_of(process_group, device), options + [self._describe(place) for place in sharded], self._count
        )

    def _tensors(self, place: Place) -> dict[str, Tensor]:
        """What is to be of a parameter's kind: its gradient and its momentum, where it has them."""
        state: Mapping[str, Tensor] = self.state.get(place.parameter, {})
        of_any = {"gradient": place.parameter.grad, "momentum": state.get("momentum_buffer")}
        return {name: tensor for name, tensor in of_any.items() if tensor is not None}

    def _describe(self, place: Place) -> str:
        tensors = self._tensors(place)
        has = "a gradient" if "gradient" in tensors else "no gradient"
        unlike = [f", {name} {_kind(one)}" for name, one in tensors.items() if _kind(one) != _kind(place.parameter)]
        return f"{place.label}: {has}, {_kind(place.parameter)}{''.join(unlike)}"

    def _matrix(self, place: Place) -> Matrix:
        parameter, gradient = place.parameter, place.parameter.grad
        assert gradient is not None
        momentum = self.state[parameter].get("momentum_buffer")
        if momentum is None:
            momentum = torch.zeros_like(gradient, memory_format=torch.preserve_format)
        self.state[parameter]["momentum_buffer"] = momentum
        return Matrix(parameter, gradient, momentum, place.group)

    def _owners(self, matrices: Sequence[Matrix]) -> Owners:
        shapes = tuple((matrix.parameter.shape[0], matrix.parameter.shape[1]) for matrix in matrices)
        placements = tuple(
            matrix.parameter.placement for matrix in matrices if isinstance(matrix.parameter, RaggedTensor)
        )
        return choose_owners(shapes, placements, self._batch_cap_nbytes)

    def stats(self) -> MuonStats:
        """What was sent so far by this rank, and how the last step was shared out."""
        return self._stats


def _number(value: object) -> object:
    """An option; of a tensor, its number alone."""
    return value.item() if isinstance(value, Tensor) else value


def _kind(tensor: Tensor) -> str:
    """Its shape, and how it is sharded."""
    sharding = f", {tensor.placement}" if isinstance(tensor, RaggedTensor) else ""
    return f"shape {tuple(tensor.shape)}{sharding}"


def _by_process_group(every: Sequence[Place]) -> dict[dist.ProcessGroup, list[Place]]:
    """Those that are sharded."""
    found: dict[dist.ProcessGroup, list[Place]] = {}
    for place in every:
        if isinstance(place.parameter, RaggedTensor):
            found.setdefault(place.parameter.group, []).append(place)
    return found


def _check_parameter(label: str, parameter: Tensor) -> None:
    if parameter.dim() != 2:
        raise ValueError(
            f"Muon takes matrices, parameters of two dimensions, but {label} has shape {tuple(parameter.shape)}: give "
            "vectors, embeddings and the like to a second optimizer, such as torch.optim.AdamW"
        )
    if not parameter.is_floating_point():
        raise TypeError(f"Muon takes parameters of floating-point numbers, but {label} is of {parameter.dtype}")


def _check_options(options: Mapping[str, Any]) -> None:
    """Of a parameter group."""
    check_lr(options["lr"])
    check_number("momentum", options["momentum"], 1)
    check_number("weight_decay", options["weight_decay"])
    check_number("eps", options["eps"])
    if not isinstance(options["nesterov"], bool):
        raise TypeError(f"nesterov must be a bool, got {type(options['nesterov']).__name__}")
    coefficients = options["ns_coefficients"]
    if not isinstance(coefficients, (tuple, list)) or not all(isinstance(one, (int, float)) for one in coefficients):
        raise TypeError(f"ns_coefficients must be three numbers, got {coefficients!r}")
    if len(coefficients) != 3:
        raise ValueError(f"ns_coefficients must be three numbers, got {len(coefficients)}")
    if not 0 <= as_int(options["ns_steps"], "ns_steps") <= _MOST_STEPS:
        raise ValueError(f"ns_steps must be from 0 to {_MOST_STEPS}, got {options['ns_steps']}")
    if options["adjust_lr_fn"] not in (None, *ADJUSTMENTS):
        raise ValueError(
            f"adjust_lr_fn must be {', '.join(map(repr, ADJUSTMENTS))} or None, got {options['adjust_lr_fn']!r}"
        )
