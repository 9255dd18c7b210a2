"""Random bits of step and module for what collectives.compose gives, as FSDP's collectives have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from collectives import compose
from smallreduce import ops
from smallreduce.collectives._engine import stage_seed


@contextmanager
def at(step: int, number: int = 0) -> Iterator[None]:
    """Composes with the random bits of this step and number of a bucket, which they leave at 0."""

    def numbered(seed: int, bucket: int, rank: int, stage: int) -> int:
        return stage_seed(seed, number, rank, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "encode", partial(ops.encode, step=torch.tensor(step)))
        patch.setattr(ops, "reduce_encode", partial(ops.reduce_encode, step=torch.tensor(step)))
        patch.setattr(compose, "stage_seed", numbered)
        yield
