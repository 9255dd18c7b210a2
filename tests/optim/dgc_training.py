"""What the tests of DGC have in common: a model whose gradients are given, and the reference beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ddp.training import Given, dyadic, wrap
from optim.dgc_reference import DGCReference
from smallreduce.collectives import _engine_for

SHAPES = ((33, 9), (40,), (128, 5), (7, 1), (257, 3), (5,), (64, 64))
# Not the order in which DDP assumes gradients to come when it first makes its buckets, so it rebuilds them.
USE = (3, 0, 5, 1, 6, 4, 2)


def given_ddp(dtype: torch.dtype = torch.float32, **options: Any) -> DistributedDataParallel:
    """A model in several buckets, with weights that are multiples of 1/8."""
    module = Given(SHAPES, USE)
    with torch.no_grad():
        for index, weight in enumerate(module.weights):
            weight.copy_(dyadic(tuple(weight.shape), 99, index))
    return wrap(module.to(dtype), bucket_cap_mb=0.004, **options)


def given_gradients(step: int, rank: int, exact: bool = False) -> list[torch.Tensor]:
    """Of matrices any numbers, unless ``exact``; of vectors, which gloo adds up in an order of its own, dyadic ones."""
    gradients = []
    for index, shape in enumerate(SHAPES):
        if exact or len(shape) < 2:
            gradients.append(dyadic(shape, step, rank, index))
        else:
            generator = torch.Generator().manual_seed(10000 * step + 100 * rank + index)
            gradients.append(torch.randn(shape, generator=generator))
    return gradients


def reference_for(ddp: DistributedDataParallel, world: int, **options: Any) -> DGCReference:
    return DGCReference([weight.detach().numpy().copy() for weight in ddp.module.parameters()], world, **options)


def advance_reference(reference: DGCReference, step: int, exact: bool = False) -> None:
    reference.step([[g.numpy() for g in given_gradients(step, rank, exact)] for rank in range(reference.ranks)])


def same_weights(ddp: DistributedDataParallel, weights: Sequence[np.ndarray[Any, Any]]) -> bool:
    return all(
        np.array_equal(parameter.detach().numpy(), weight)
        for parameter, weight in zip(ddp.module.parameters(), weights, strict=True)
    )


@contextlib.contextmanager
def selecting_twice(wanted: bool = True) -> Iterator[None]:
    """Packets are split among the ranks, however small, and what is left of a sum is selected from it once more."""
    with pytest.MonkeyPatch.context() as patched:
        if wanted:
            patched.setattr(_engine_for, "gathers", lambda packet_nbytes, world_size: False)
        yield
