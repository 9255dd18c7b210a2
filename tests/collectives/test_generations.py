"""Clones of a group have names that no earlier clone had: a store remembers what it was told under a name."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import smallreduce as sr
from ranks import run
from smallreduce.collectives import _channel, channel_of


def _names(device: torch.device, world: int) -> list[str]:
    """Of all clones of two channels of the default group, of which the first is shut down."""
    names: list[str] = []
    clone = _channel._clone

    def noting(group: dist.ProcessGroup, ranks: Any, device: torch.device, name: str) -> dist.ProcessGroup:
        names.append(f"{group.group_name}/{name}")
        return clone(group, ranks, device, name)

    with mock.patch.object(_channel, "_clone", noting):
        for _ in range(2):
            channel_of(None, device).subset(range(world), "2intra0")
            sr.shutdown(dist.group.WORLD)
    return names


class _WithoutDevice(_channel.StreamChannel):
    """The names of a StreamChannel, without its stream."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *generation: int) -> None:
        _channel.Channel.__init__(self, _channel.NcclLinks(group))
        self.device = torch.device("cpu")
        self._clones = []
        if generation:
            (self._generation,) = generation

    def close(self) -> None:
        _channel._destroy(self._clones)


def _distinct(rank: int, world: int, name: str) -> None:
    device = torch.device(name)
    if name == "cuda" and not torch.cuda.is_available():
        with (
            mock.patch.object(_channel, "StreamChannel", _WithoutDevice),
            mock.patch.object(_channel, "_refuse_capture"),
            mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"),
        ):
            names = _names(device, world)
    else:
        names = _names(device, world)
    assert len(names) == len(set(names)) >= 2, names


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_clone_has_the_name_of_an_earlier_one(device: str) -> None:
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" and torch.cuda.is_available() else "gloo"
    run(_distinct, 1, device, backend=backend, keep=backend == "gloo")
