"""Error feedback: what compression took away from a tensor, added back the next time.

Both sides of a collective lose something (DoubleSqueeze, arXiv:1905.05957): the worker that encodes its own tensor, and
the server, each rank for its shard, that encodes the sum. The kernels read, add and replace the residuals in the pass
that encodes (docs/wire-formats.md, section 10); here they are kept, rescaled, saved and loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.codecs import Codec, PacketCodec, as_int
from smallreduce.codecs import codec as parse_codec

__all__ = ["ErrorFeedback", "Owner"]


class Owner(NamedTuple):
    """Whose residuals these are: the codec, the tensor's size, and what part of it the server's residual is."""

    codec: Codec
    numel: int
    rank: int
    world_size: int
    chunks: int
    server_blocks: int

    def __str__(self) -> str:
        return (
            f"{self.codec}, {self.numel} elements, rank {self.rank} of {self.world_size}, {self.chunks} "
            f"chunk{'s' * (self.chunks != 1)}, {self.server_blocks} blocks of the server's"
        )

    @property
    def worker_numel(self) -> int:
        return BLOCK * -(-self.numel // BLOCK)

    @property
    def server_numel(self) -> int:
        return BLOCK * self.server_blocks


class ErrorFeedback:
    """Worker's and server's residuals of one tensor on this rank, for ``feedback=`` of the collectives.

    Made empty; the first collective that it is given to binds it to a codec, a size and a group, with residuals of
    zero: fp32, as many elements as the tensor, and 1/W of that for the server, or none where nothing is encoded twice.
    Use one for each tensor, not one for two. If a collective fails midway, :meth:`reset` before the next.

    Attributes:
        step: Collectives done so far, int. It enters the random bits, so that no two steps round alike, and is saved.
        seed: That of the first collective, int; later ones that are given none take it. Saved too, so that a step can
            be replayed bit for bit. None before the first use.
        worker: The worker's residual: fp32, flat, whole blocks of 32. None before the first use.
        server: The residual of this rank's shard of the result, in the domain in which the codec adds; likewise.
    """

    def __init__(self) -> None:
        self.step = 0
        self.seed: int | None = None
        self.worker: Tensor | None = None
        self.server: Tensor | None = None
        self._owner: Owner | None = None

    def bind(self, owner: Owner, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two residuals for a collective of ``owner``, made on first use.

        Raises:
            ValueError: They belong to another codec, size, rank or world size.
        """
        if self._owner is None:
            self._owner = owner
        elif self._owner != owner:
            raise ValueError(
                f"this ErrorFeedback belongs to ({self._owner}), not to ({owner}): use one for each tensor and group, "
                "or reset() it"
            )
        if self.worker is None or self.server is None:
            self.worker = torch.zeros(owner.worker_numel, dtype=torch.float32, device=device)
            self.server = torch.zeros(owner.server_numel, dtype=torch.float32, device=device)
        elif self.worker.device != device:
            self.worker, self.server = self.worker.to(device), self.server.to(device)
        return self.worker, self.server

    def advance(self, seed: int) -> None:
        """Counts a collective that has begun under ``seed``."""
        if self.seed is None:
            self.seed = seed
        self.step += 1

    def reset(self) -> None:
        """Forgets the residuals and what they belong to. ``step`` goes on, so that rounding stays fresh."""
        self.worker = self.server = self._owner = None

    def scale_(self, factor: float) -> None:
        """Multiplies the residuals, where what they are added to changes its scale (loss scale, learning rate)."""
        for residual in (self.worker, self.server):
            if residual is not None:
                residual.mul_(factor)

    def residual_norm(self) -> float:
        """2-norm of the residuals of this rank, the worker's and the server's taken together; 0.0 before first use."""
        if self._owner is None or self.worker is None or self.server is None:
            return 0.0
        # T of docs/wire-formats.md, section 8, times 2^-5 shortens a vector by sqrt(32).
        codec = self._owner.codec
        factor = math.sqrt(BLOCK) if isinstance(codec, PacketCodec) and codec.format.hadamard else 1.0
        return math.hypot(float(self.worker.norm()), factor * float(self.server.norm()))

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of a group of the same size.

        The tensors are copies on the CPU. The server's residual is in the domain in which the codec, which is saved
        beside it, adds: what is loaded is bit for bit what was saved.

        Returns:
            A dict of plain types and tensors that ``torch.load(weights_only=True)`` takes.
        """
        owner = self._owner
        if owner is None or self.worker is None or self.server is None:
            return {"step": self.step, "seed": self.seed, "owner": None}
        return {
            "step": self.step,
            "seed": self.seed,
            "owner": {**owner._asdict(), "codec": owner.codec.spelling},
            "worker": self.worker.to("cpu", copy=True),
            "server": self.server.to("cpu", copy=True),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: Not such a state, or one of another rank, world size, codec or tensor than this object is bound
                to. An object not yet bound finds the latter out, and raises, in the first collective that it is given
                to. Nothing has changed then.
            TypeError: A value of another type.
        """
        bound = isinstance(state, Mapping) and state.get("owner") is not None
        _check_keys("the state", state, {"step", "seed", "owner"} | ({"worker", "server"} if bound else set()))
        step = as_int(state["step"], "step")
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        seed = None if state["seed"] is None else as_int(state["seed"], "seed")
        if state["owner"] is None:
            self.reset()
            self.step, self.seed = step, seed
            return
        _check_keys("its owner", state["owner"], set(Owner._fields))
        sizes = {name: as_int(state["owner"][name], name) for name in Owner._fields[1:]}
        chosen = parse_codec(state["owner"]["codec"])
        if chosen is None:
            raise ValueError("its owner must have a codec, got None")
        owner = Owner(chosen, **sizes)
        if self._owner is not None and self._owner != owner:
            raise ValueError(
                f"this state belongs to ({owner}), not to ({self._owner}); a state_dict() is of one rank, and is "
                "loaded by that rank of a group of the same size"
            )
        worker = _checked(state["worker"], "worker", owner.worker_numel)
        server = _checked(state["server"], "server", owner.server_numel)
        device = torch.device("cpu") if self.worker is None else self.worker.device
        self.worker, self.server = worker.to(device, copy=True), server.to(device, copy=True)
        self._owner = owner
        self.step, self.seed = step, seed


def _check_keys(name: str, given: object, expected: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(given).__name__}")
    if given.keys() != expected:
        raise ValueError(f"{name} must have {', '.join(sorted(expected))}, got {', '.join(sorted(given)) or 'nothing'}")


def _checked(tensor: object, name: str, numel: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.float32 or tensor.shape != (numel,):
        raise ValueError(
            f"{name} must be {numel} elements of torch.float32, got shape {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tensor
