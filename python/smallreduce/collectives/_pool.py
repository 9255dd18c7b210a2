"""Buffers for gradients on their way, shared by all buckets of a model."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Pool"]


class Pool:
    """Buffers for gradients that have not been reduced. What they hold is undefined.

    On CUDA torch's allocator does that, and knows which streams still use what; this keeps none.

    Attributes:
        nbytes: Of the buffers, those in use included.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._used: dict[int, Tensor] = {}  # by address
        self._leaving: set[int] = set()  # of these, what is not to be kept
        self.nbytes = 0

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``numel`` elements of the smallest buffer that has as many. If none has, a larger one takes the place of the
        largest, so that in the end there are as many as are in use at a time."""
        if device.type == "cuda" or numel == 0:  # of which the address tells nothing
            return torch.empty(numel, dtype=dtype, device=device)
        free = sorted((b for b in self._free if b.dtype == dtype), key=Tensor.numel)
        whole = next((buffer for buffer in free if buffer.numel() >= numel), None)
        if whole is None and free:
            self._drop(free[-1])
        elif whole is not None:
            self._free = [buffer for buffer in self._free if buffer is not whole]
        if whole is None:
            whole = torch.empty(numel, dtype=dtype, device=device)
            self.nbytes += whole.nbytes
        self._used[whole.data_ptr()] = whole
        return whole[:numel]

    def give(self, buffer: Tensor | None) -> None:
        """Takes back what :meth:`take` gave."""
        if buffer is not None and not buffer.is_cuda and buffer.numel():
            whole = self._used.pop(buffer.data_ptr())
            self._free.append(whole)
            if whole.data_ptr() in self._leaving:
                self._leaving.discard(whole.data_ptr())
                self._drop(whole)

    def clear(self) -> None:
        """Lets go of all buffers, of those that are in use when they are given back."""
        for buffer in self._free[:]:
            self._drop(buffer)
        self._leaving = set(self._used)

    def _drop(self, dropped: Tensor) -> None:
        self._free = [buffer for buffer in self._free if buffer is not dropped]
        self.nbytes -= dropped.nbytes
