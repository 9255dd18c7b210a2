"""The scale of the loss, in whose units the residuals are, and the steps that a GradScaler skips."""

from __future__ import annotations

import math
import weakref

from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.nn.parallel import DistributedDataParallel


class LossScale:
    """The scale of an enabled GradScaler.

    Args:
        scaler: Of one model.
        ddp: That model, if known.
    """

    def __init__(self, scaler: GradScaler, ddp: DistributedDataParallel | None) -> None:
        self._scaler = scaler
        # DDP holds the hook's state, in C++, where the garbage collector does not see it.
        self._ddp = None if ddp is None else weakref.ref(ddp)
        self._seen: tuple[float, int] | None = None  # when the last step began

    def now(self) -> float:
        """Reads the scale, for which a CUDA device is waited for.

        Raises:
            ValueError: It is not finite and positive.
        """
        scale = float(self._scaler.get_scale())
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the loss scale must be finite and positive, got {scale}")
        return scale

    def begins_update(self) -> bool:
        """Called when a step begins, that is, a synchronised backward pass: whether it is the first since ``update()``.

        Raises:
            RuntimeError: The model is under ``join()``; or it is not the first, and the model is not known.
        """
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None and ddp._join_config.enable:
            raise RuntimeError("error feedback with a scaler does not work under join(): joined ranks skip no steps")
        # Each update() changes one of the two: it grows or lowers the scale, or counts a step in which it does neither.
        state = self._scaler.state_dict()
        seen = (state["scale"], state["_growth_tracker"])
        first = seen != self._seen
        if not first and self._ddp is None:
            raise RuntimeError(
                "two synchronised backward passes without scaler.update() in between: this may be a rank that has "
                "joined, whose residuals cannot follow the others' scale; HookState(..., module=ddp_model) tells that "
                "from gradients that accumulate"
            )
        self._seen = seen
        return first

    def forget(self) -> None:
        """The next step follows no other: a state has been loaded."""
        self._seen = None
