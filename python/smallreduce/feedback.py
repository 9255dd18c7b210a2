"""Error feedback: what compression took away from a tensor, added back the next time.

Both sides of a collective lose something (DoubleSqueeze, arXiv:1905.05957): the worker that encodes its own tensor, and
the server, each rank for its shard, that encodes the sum. The kernels read, add and replace the residuals in the pass
that encodes (docs/wire-formats.md, section 10); here they are kept, rescaled, saved and loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.codecs import Codec, codec

__all__ = ["ErrorFeedback", "Owner", "from_original_domain", "to_original_domain"]


def _butterfly(x: Tensor) -> Tensor:
    # T of docs/wire-formats.md, section 8, on every 32 elements.
    for h in (1, 2, 4, 8, 16):
        pairs = x.view(-1, BLOCK // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((a + b, a - b), dim=2)
    return x.reshape(-1)


def to_original_domain(residual: Tensor, codec: Codec) -> Tensor:
    """A server's residual (whole blocks), kept in the domain in which the codec adds, as error of the tensor itself."""
    return _butterfly(residual * 2.0**-5) * 2.0**5 if codec.format.hadamard else residual.clone()


def from_original_domain(residual: Tensor, codec: Codec) -> Tensor:
    """The inverse of :func:`to_original_domain`."""
    return _butterfly(residual * 2.0**-5) if codec.format.hadamard else residual.clone()


class Owner(NamedTuple):
    """Whose residuals these are: the codec, the tensor's size, and what part of it the server's residual is."""

    codec: Codec
    numel: int
    rank: int
    world_size: int
    chunks: int
    server_blocks: int

    def __str__(self) -> str:
        return f"{self.codec}, {self.numel} elements, rank {self.rank} of {self.world_size}"


class ErrorFeedback:
    """Worker's and server's residuals of one tensor on this rank, for ``feedback=`` of the collectives.

    Made empty; the first collective that it is given to binds it to a codec, a size and a group, with residuals of
    zero: fp32, as many elements as the tensor, and 1/W of that for the server. Use one for each tensor, not one for
    two. If a collective fails midway, :meth:`reset` before the next.

    Attributes:
        step: Collectives done so far, int. It enters the random bits, so that no two steps round alike, and is saved.
        worker: The worker's residual: fp32, flat, whole blocks of 32. None before the first use.
        server: The residual of this rank's shard of the result, in the domain in which the codec adds; likewise.
    """

    def __init__(self) -> None:
        self.step = 0
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
            blocks = -(-owner.numel // BLOCK)
            self.worker = torch.zeros(BLOCK * blocks, dtype=torch.float32, device=device)
            self.server = torch.zeros(BLOCK * owner.server_blocks, dtype=torch.float32, device=device)
        elif self.worker.device != device:
            self.worker, self.server = self.worker.to(device), self.server.to(device)
        return self.worker, self.server

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
        server = to_original_domain(self.server, self._owner.codec)
        return float(torch.hypot(self.worker.norm(), server.norm()))

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, to be given back to the same rank of a group of the same size.

        The tensors are copies on the CPU; the server's residual is in the tensor's own domain, so that with
        ``hadamard`` it comes back rounded to fp32 once more.
        """
        owner = self._owner
        if owner is None or self.worker is None or self.server is None:
            return {"step": self.step, "owner": None}
        return {
            "step": self.step,
            "owner": {
                "codec": owner.codec.spelling,
                "numel": owner.numel,
                "rank": owner.rank,
                "world_size": owner.world_size,
                "chunks": owner.chunks,
                "server_blocks": owner.server_blocks,
            },
            "worker": self.worker.cpu().clone(),
            "server": to_original_domain(self.server, owner.codec).cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ValueError: The state is of another rank, world size, codec or tensor than this object is bound to. An
                object not yet bound finds out, and raises, in the first collective that it is given to.
        """
        if state["owner"] is None:
            self.reset()
            self.step = int(state["step"])
            return
        fields = dict(state["owner"])
        fields["codec"] = codec(fields["codec"])
        owner = Owner(**fields)
        if self._owner is not None and self._owner != owner:
            raise ValueError(
                f"this state belongs to ({owner}), not to ({self._owner}); a state_dict() is of one rank, and is "
                "loaded by that rank of a group of the same size"
            )
        worker, server = state["worker"], state["server"]
        device = torch.device("cpu") if self.worker is None else self.worker.device
        self.worker = worker.to(device=device, dtype=torch.float32, copy=True)
        self.server = from_original_domain(server.to(device=device, dtype=torch.float32), owner.codec)
        self._owner = owner
        self.step = int(state["step"])
