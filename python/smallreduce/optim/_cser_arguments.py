"""What CSER takes: which models and which parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["check_group", "check_model"]


def check_model(model: object) -> None:
    """Raises TypeError unless ``model`` is a module whose gradients stay local."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "model must not be wrapped in DistributedDataParallel, which averages the gradients that are to stay "
            "local: give its .module, and call that"
        )


def check_group(group: Mapping[str, Any], of_model: set[int], device: torch.device) -> None:
    """Checks a parameter group.

    Args:
        of_model: Ids of the model's parameters.

    Raises:
        TypeError, ValueError: An impossible option, or a parameter that CSER does not take.
    """
    for name in ("lr", "momentum", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")
        if isinstance(value, Tensor) and (name != "lr" or value.numel() != 1):
            raise TypeError(f"of the options only lr may be a tensor, of one element; {name} is one of {value.numel()}")
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be a bool, got {type(group['nesterov']).__name__}")
    for parameter in group["params"]:
        if id(parameter) not in of_model:
            raise ValueError("the parameters of a group must be the model's, got another tensor")
        if is_traceable_wrapper_subclass(parameter):
            raise TypeError(
                "parameters must be plain tensors that every rank holds whole, not sharded or quantised, got "
                f"{type(parameter).__name__}"
            )
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"parameters must be of torch.float32, got {parameter.dtype}: keep the model in fp32 and use "
                "torch.autocast for mixed precision"
            )
        if parameter.layout is not torch.strided or parameter.device != device:
            raise ValueError(f"parameters must be dense and on {device}, got {parameter.layout} on {parameter.device}")
