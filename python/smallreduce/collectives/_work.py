"""The handle of a collective in flight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Work"]


class Work:
    """What the collectives return with ``async_op=True``; as torch's own ``Work`` where they overlap.

    Attributes:
        bytes_sent: Payload that this rank sends for the collective, in bytes.
    """

    def __init__(self, value: Tensor, bytes_sent: int) -> None:
        self.bytes_sent = bytes_sent
        self._value = value
        self._future: torch.futures.Future[Any] = torch.futures.Future(
            devices=[value.device] if value.is_cuda else None
        )

    def wait(self) -> bool:
        """Blocks until the result is there (CUDA: until the current stream will wait for it). Returns True.

        On CUDA, where nothing waits for the device, a packet that did not fit is told later: the next collective of the
        group that starts after the device came to it raises RuntimeError, or ``smallreduce.shutdown``. What it would
        have been decoded to is left as it was.

        Raises:
            RuntimeError: The collective failed on this rank: a peer died, the group's timeout passed, or (CPU) a packet
                was refused.
        """
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future[Any]:
        """A future whose value is the result tensor (what a DDP communication hook returns)."""
        # An exception set from Python is known to the Python side of a future only. Raised inside a callback it
        # becomes an error of the future itself, which C++ consumers such as DDP's reducer see.
        return self._future.then(lambda future: future.value())

    def complete(self) -> None:
        """For the engine: the result is there."""
        self._future.set_result(self._value)

    def fail(self, error: BaseException) -> None:
        """For the engine: there will be no result."""
        self._future.set_exception(error)
