"""What a hook's state is in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smallreduce.ddp._memory import Residuals

_FORMAT = 1
_ENTRIES = {"rank": int, "world_size": int, "step": int, "seed": int, "loss_scale": float, "parameters": Mapping}


@dataclass(frozen=True)
class Saved:
    """What is kept of a :class:`HookState`.

    Attributes:
        memory: Residuals by the name of their parameter.
        step: Synchronised backward passes so far.
        loss_scale: In which the residuals are.
    """

    memory: dict[str, Residuals]
    step: int
    loss_scale: float

    def state_dict(self, rank: int, world_size: int, seed: int) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "rank": rank,
            "world_size": world_size,
            "step": self.step,
            "seed": seed,
            "loss_scale": self.loss_scale,
            "parameters": {name: residuals.state_dict() for name, residuals in self.memory.items()},
        }

    @staticmethod
    def check(state_dict: object, rank: int, world_size: int, seed: int, with_momentum: bool, reshard: str) -> Saved:
        """Copies what :meth:`state_dict` gave on this rank.

        Args:
            reshard: What to do with a state of another world size.

        Raises:
            ValueError: It is of another rank, world size or seed, or is none at all.
        """
        given = state_dict.get("format") if isinstance(state_dict, Mapping) else type(state_dict)
        if not isinstance(state_dict, Mapping) or given != _FORMAT:
            raise ValueError(f"not a state of smallreduce.ddp in format {_FORMAT}, got {given!r}")
        for key, kind in _ENTRIES.items():
            if not isinstance(state_dict.get(key), kind):
                raise ValueError(f"state_dict[{key!r}] must be of type {kind.__name__}, got {state_dict.get(key)!r}")
        step, scale = state_dict["step"], state_dict["loss_scale"]
        if step < 0 or not 0 < scale < math.inf:
            raise ValueError(f"a state must have a step >= 0 and a finite, positive loss_scale, got {step} and {scale}")
        mine, theirs = (rank, world_size), (state_dict["rank"], state_dict["world_size"])
        if mine != theirs:
            raise ValueError(
                f"this state belongs to rank {theirs[0]} of {theirs[1]}, not to rank {rank} of {world_size}: save and "
                f"load one for each rank; {reshard}"
            )
        if state_dict["seed"] != seed:
            raise ValueError(f"this state has seed {state_dict['seed']}, but this HookState has {seed}")
        memory = {
            name: Residuals.from_state_dict(name, state, rank, world_size, with_momentum)
            for name, state in state_dict["parameters"].items()
        }
        return Saved(memory, step, scale)
