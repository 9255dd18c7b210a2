"""The scale of the loss, in whose units the residuals are, and the steps that a GradScaler skips."""

from __future__ import annotations

import math
import weakref

import torch
from torch.nn.parallel import DistributedDataParallel


class LossScale:
    """The scale of a GradScaler, read once in each step.

    Args:
        scaler: Of one model. A disabled one has the scale 1 and skips nothing.
        ddp: That model, if known.
    """

    def __init__(self, scaler: torch.amp.GradScaler, ddp: DistributedDataParallel | None) -> None:
        self._scaler = scaler
        # DDP holds the hook's state, in C++, where the garbage collector does not see it.
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self._seen: tuple[float, int] | None = None  # in the last step

    def now(self) -> float:
        """Reads the scale, for which a CUDA device is waited for.

        Raises:
            ValueError: It is not finite and positive.
        """
        scale = float(self._scaler.get_scale())
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the loss scale must be finite and positive, got {scale}")
        return scale

    def check_step(self) -> None:
        """Called when a step begins, that is, a synchronised backward pass. Only one of them can be undone.

        Raises:
            RuntimeError: ``update()`` has not been called since the last step began, or the model is under ``join()``.
        """
        if not self._scaler.is_enabled():
            return
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None and ddp._join_config.enable:
            raise RuntimeError("error feedback with a scaler does not work under join(): joined ranks skip no steps")
        # Each update() changes one of the two: it grows or lowers the scale, or counts a step in which it does neither.
        state = self._scaler.state_dict()
        seen = (state["scale"], state["_growth_tracker"])
        if seen == self._seen:
            raise RuntimeError(
                "two synchronised backward passes without scaler.update() in between: if the scaler skips the "
                "optimizer's step, only the last of them can be undone in the residuals; accumulate gradients under "
                "no_sync()"
            )
        self._seen = seen

    def forget(self) -> None:
        """The next step follows no other: a state has been loaded."""
        self._seen = None
