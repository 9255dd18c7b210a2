"""Noticing a hook that was asked for and never runs: frameworks ignore one in silence more often than not."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from smallreduce.ddp._state import HookState


class NeverCalled(UserWarning):
    """An optimizer takes a step and the communication hook that was asked for has never run."""


def warn_if_never_called(state: HookState, parameters: Iterable[torch.Tensor] | None) -> Callable[[], object]:
    """Warns once if an optimizer of some of ``parameters`` (None: any) takes a step before the hook's first call.

    An optimizer's step, unlike a forward or backward pass, comes after every gradient was due to be synchronised: it
    tells an ignored hook from gradient accumulation under ``no_sync``.

    Returns:
        What ends the watching; to be called at the hook's first call. (Not from here: torch is then going through its
        hooks.) It ends with the state too.
    """
    # Neither the state nor the parameters are to be kept alive by torch's global table of optimizer hooks.
    watched = weakref.ref(state)
    only = None if parameters is None else {id(parameter) for parameter in parameters}
    warned = False

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal warned
        if warned or watched() is None:
            return
        if only is None or any(id(p) in only for group in optimizer.param_groups for p in group["params"]):
            warned = True
            warnings.warn(
                f"{type(optimizer).__name__} takes a step, but the smallreduce communication hook has never been "
                "called: gradients are not compressed. Either no backward pass has gone through the "
                "DistributedDataParallel module outside of no_sync() (call that module, not the one inside it), or a "
                "framework ignores the hook that was passed to it: call ddp_model.register_comm_hook(state, "
                "smallreduce.ddp.hook) yourself (docs/frameworks.md).",
                NeverCalled,
                stacklevel=3,
            )

    return weakref.finalize(state, register_optimizer_step_pre_hook(before_step).remove)
