"""What SDP4Bit takes: which models, parameters, optimizers and codecs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from smallreduce._layout import ELEMENT_TYPES
from smallreduce.codecs import Cast, Codec, PacketCodec, as_int, codec
from smallreduce.collectives._levels import grain_of
from smallreduce.optim._muon import Muon

__all__ = ["GradientCodec", "Scheme", "check_model", "check_optimizer", "parameter_groups"]

GradientCodec = str | Codec | tuple[str | Codec, str | Codec] | None
"""One codec, one for inside a node and one for between nodes, or None."""

_NOT_ELEMENTWISE = (
    torch.optim.Adafactor,
    torch.optim.LBFGS,
    torch.optim.Muon,
    torch.optim.SparseAdam,
    Muon,
)


@dataclass(frozen=True)
class Scheme:
    """The configuration, the same on all ranks. See :class:`SDP4Bit`."""

    weights: PacketCodec | None
    differences: bool
    gradients: PacketCodec | tuple[PacketCodec, PacketCodec] | None
    node_size: int | None
    start_step: int
    master_dtype: torch.dtype | None
    bucket_cap_mb: float | None
    overlap: bool
    seed: int

    @classmethod
    def parse(
        cls,
        weights: str | Codec | None,
        differences: bool,
        gradients: GradientCodec,
        node_size: int | None,
        start_step: int,
        master_dtype: torch.dtype | None,
        bucket_cap_mb: float | None,
        overlap: bool,
        seed: int,
    ) -> Scheme:
        """Checks the arguments.

        Raises:
            TypeError, ValueError: Impossible values.
        """
        for name, flag in (("differences", differences), ("overlap", overlap)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
        if node_size is not None and as_int(node_size, "node_size") < 1:
            raise ValueError(f"node_size must be at least 1, got {node_size}")
        if as_int(start_step, "start_step") < 0:
            raise ValueError(f"start_step must not be negative, got {start_step}")
        if master_dtype is not None and not isinstance(master_dtype, torch.dtype):
            raise TypeError(f"master_dtype must be a torch.dtype or None, got {type(master_dtype).__name__}")
        if master_dtype is not None and not master_dtype.is_floating_point:
            raise ValueError(f"master_dtype must be a floating-point dtype, got {master_dtype}")
        if bucket_cap_mb is not None:
            if isinstance(bucket_cap_mb, bool) or not isinstance(bucket_cap_mb, (int, float)):
                raise TypeError(f"bucket_cap_mb must be a float or None, got {type(bucket_cap_mb).__name__}")
            if not 0 < bucket_cap_mb < math.inf:
                raise ValueError(f"bucket_cap_mb must be finite and above 0, got {bucket_cap_mb}")
        of_weights = _packets(weights, "weights")
        if of_weights == Cast(torch.float8_e4m3fn) and differences:
            raise ValueError(f"differences are smaller than {of_weights} can hold, which has no scale: give IntQuant")
        if of_weights is not None and differences:
            # What a difference loses is in the next one, as with error feedback.
            of_weights = of_weights.with_feedback()
        of_gradients: PacketCodec | tuple[PacketCodec, PacketCodec] | None
        if isinstance(gradients, (tuple, list)):
            if len(gradients) != 2:
                raise ValueError(
                    "gradients must be one codec or two, for inside a node and between nodes, "
                    f"got {len(gradients)} of them"
                )
            intra, inter = (_packets(one, "gradients") for one in gradients)
            if (intra is None) != (inter is None):
                raise ValueError(
                    f"of the two codecs of gradients none or both must be None, got {gradients}; an exact level is "
                    "'fp32' only where both are: give None for both"
                )
            of_gradients = None if intra is None or inter is None else (intra, inter)
            if of_gradients is not None:
                grain_of(of_gradients)  # even where one of them is not used
        else:
            of_gradients = _packets(gradients, "gradients")
        return cls(
            of_weights, differences, of_gradients, node_size, as_int(start_step, "start_step"), master_dtype,
            bucket_cap_mb, overlap, as_int(seed, "seed"),
        )  # fmt: skip

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raises TypeError or ValueError unless parameters of ``dtype`` can be trained so."""
        if not dtype.is_floating_point:
            raise TypeError(f"parameters must be of a floating-point dtype, got {dtype}")
        master = self.master(dtype)
        if torch.promote_types(dtype, master) != master:
            raise ValueError(
                f"master_dtype must hold all values of the parameters' {dtype}, got {master}; None keeps it"
            )
        if (self.weights is not None or self.gradients is not None) and dtype not in ELEMENT_TYPES:
            accepted = ", ".join(map(str, ELEMENT_TYPES))
            raise TypeError(f"codecs take parameters of {accepted}, got {dtype}: give weights=None and gradients=None")
        if self.gradients is not None and master not in ELEMENT_TYPES:
            accepted = ", ".join(map(str, ELEMENT_TYPES))
            raise TypeError(f"codecs take gradients of {accepted}, in the master's dtype, got {master}: give "
                            "gradients=None or another master_dtype")  # fmt: skip
        if self.weights is not None and master != torch.float32:
            raise ValueError(
                f"compressed weights need a master in torch.float32, got {master} for parameters of {dtype}"
            )

    def master(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the master of parameters of ``dtype``."""
        return dtype if self.master_dtype is None else self.master_dtype

    def __str__(self) -> str:
        pair = self.gradients
        gradients = f"({pair[0]}, {pair[1]})" if isinstance(pair, tuple) else str(pair)
        return (
            f"weights={self.weights}, differences={self.differences}, gradients={gradients}, "
            f"node_size={self.node_size}, start_step={self.start_step}, master_dtype={self.master_dtype}, "
            f"bucket_cap_mb={self.bucket_cap_mb}, overlap={self.overlap}, seed={self.seed}"
        )


def _packets(spelling: str | Codec | None, name: str) -> PacketCodec | None:
    chosen = codec(spelling)
    if chosen is None or chosen == Cast(torch.float32):
        return None
    if not isinstance(chosen, PacketCodec):
        raise TypeError(f"{name} must be a codec that makes packets, its spelling or None, got {chosen}")
    if chosen.format.is_sparse:
        raise ValueError(f"{name} must be a codec that sends all elements, got {chosen}")
    return chosen


def check_model(model: object) -> None:
    """Raises TypeError unless ``model`` is a plain module, or ValueError unless it is dense and on one device."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        for parallel in (DistributedDataParallel, FullyShardedDataParallel, FSDPModule):
            if isinstance(module, parallel):
                raise TypeError(
                    f"no module may be wrapped in {parallel.__name__}, as {name or 'the model'} is, since SDP4Bit "
                    "shards and reduces itself: give the plain module, before it is wrapped or sharded, and call that"
                )
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) > 1:
        raise ValueError(f"all of the model must be on one device, got {', '.join(sorted(map(str, devices)))}")
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter):
            raise TypeError(
                f"parameters must be plain tensors that every rank holds whole, got {name} of "
                f"{type(parameter).__name__}"
            )
        if parameter.layout is not torch.strided:
            raise TypeError(f"parameters must be dense, got {name} of {parameter.layout}")


def check_optimizer(optimizer_class: object, scaler: object) -> None:
    """Raises TypeError unless the class is an elementwise optimizer, as far as is known, and the scaler one."""
    if not isinstance(optimizer_class, type) or not issubclass(optimizer_class, Optimizer):
        given = optimizer_class.__name__ if isinstance(optimizer_class, type) else type(optimizer_class).__name__
        raise TypeError(f"optimizer_class must be a subclass of torch.optim.Optimizer, got {given}")
    if issubclass(optimizer_class, _NOT_ELEMENTWISE):
        raise TypeError(
            f"optimizer_class must update each element by itself, since a rank holds ranges of the flat parameters; "
            f"{optimizer_class.__name__} does not"
        )
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")


def parameter_groups(model: nn.Module, params: Iterable[Any] | None) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    """The options and the trainable parameters of each group.

    Raises:
        TypeError, ValueError: Not what torch's optimizers take, a parameter that is not the model's or in two groups,
            or none that is trainable.
    """
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of parameters or of dicts, got a tensor")
    given = list(model.parameters()) if params is None else list(params)
    dicts: list[Any] = given if given and isinstance(given[0], Mapping) else [{"params": given}]
    of_model = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    groups = []
    for group in dicts:
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError("each parameter group must be a dict with 'params'")
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        parameters = []
        for member in members:
            parameter = member[1] if isinstance(member, tuple) and len(member) == 2 else member
            if not isinstance(parameter, nn.Parameter):
                raise TypeError(f"params must be the model's parameters, got {type(parameter).__name__}")
            if id(parameter) not in of_model:
                raise ValueError(f"params must be the model's parameters, got another, of {tuple(parameter.shape)}")
            if id(parameter) in seen:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is given twice")
            seen.add(id(parameter))
            if parameter.requires_grad:
                parameters.append(parameter)
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        groups.append((options, parameters))
    if not any(parameters for _, parameters in groups):
        raise ValueError("there must be a parameter that requires a gradient, got none")
    return groups
