"""Without codecs SDP4Bit trains as DistributedDataParallel does with the same optimizer, bit for bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import smallreduce as sr
from ddp.training import equal
from optim.sdp4bit_training import EXACT, Case, train_ddp, train_sdp4bit, weights
from ranks import run

STEPS = 20

ADAM = {"lr": 0.01, "weight_decay": 0.1}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}

CASES = {
    "adamw": Case(),
    "sgd": Case(torch.optim.SGD, SGD),
    "clipped": Case(max_norm=0.05),
    "clipped by maximum": Case(max_norm=0.01, norm_type=math.inf),
    "accumulated": Case(micro_batches=3, max_norm=0.05),
    "groups, schedule": Case(groups=True, scheduled=True),
    "checkpointed": Case(checkpointed=True),
    "fused": Case(options={**ADAM, "fused": True}),
    "rmsprop": Case(torch.optim.RMSprop, {"lr": 0.001}),
    "adagrad": Case(torch.optim.Adagrad, {"lr": 0.01}),
    "scaled": Case(scaled=True),
}
BF16 = ("adamw", "sgd", "clipped", "accumulated", "checkpointed")


def _cases() -> dict[str, Case]:
    of_bf16 = {f"{name}, bf16": dataclasses.replace(CASES[name], dtype=torch.bfloat16) for name in BF16}
    return {**CASES, **of_bf16}


def _exact(rank: int, world: int) -> None:
    different = []
    for name, case in _cases().items():
        losses, model = train_ddp(case, rank, world, range(STEPS))
        master = None if case.dtype == torch.bfloat16 else torch.float32
        ours, sharded, optimizer = train_sdp4bit(case, rank, range(STEPS), **EXACT, master_dtype=master)
        if not equal(ours, losses):
            different.append(f"{name}: losses or norms")
        if not equal(weights(sharded), weights(model)):
            different.append(f"{name}: weights")
        assert optimizer.memory().master == 0
        assert optimizer.stats().steps == STEPS
    assert not different, different


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bits_are_those_of_ddp(world: int) -> None:
    run(_exact, world, timeout=150)


def _defaults_are_no_copy(rank: int, world: int) -> None:
    _, _, optimizer = train_sdp4bit(Case(), rank, range(1), **EXACT)
    memory = optimizer.memory()
    assert memory.master == memory.packets == 0
    assert sr.optim.SDP4BitMemory(1, 2, 3, 4, 5).total == 15


def test_the_master_of_exact_fp32_weights_is_no_copy() -> None:
    run(_defaults_are_no_copy, 2)
