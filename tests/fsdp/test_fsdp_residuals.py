"""What a rank keeps of feedback: the warning of what it takes, what a step without it does, and what is saved."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import smallreduce as sr
from fsdp.training import Given
from ranks import run
from smallreduce.fsdp._scatter import ALWAYS

SHAPES: list[tuple[int, ...]] = [(13, 9), (5,), (64, 3)]


def _given(rank: int, step: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _warned(rank: int, world: int) -> None:
    for feedback in ("full", "int8"):
        model = fully_shard(Given(SHAPES))
        # Where filters make an error of it, it is one everywhere, before anything is installed.
        with warnings.catch_warnings():
            warnings.simplefilter("error", sr.fsdp.ResidualMemory)
            with pytest.raises(sr.fsdp.ResidualMemory if rank == 0 else RuntimeError, match=r"bytes .* of residuals"):
                sr.fsdp.compress(model, "int4", feedback=feedback)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state = sr.fsdp.compress(model, "int4", feedback=feedback)
        assert len(caught) == (rank == 0)
        if rank == 0:
            assert caught[0].filename == __file__
            nbytes, elements = re.findall(r"(\d+) (?:bytes|trainable)", str(caught[0].message))
            assert int(nbytes) == state.stats().residual_nbytes
            assert int(elements) == sum(torch.Size(shape).numel() for shape in SHAPES)


def test_a_warning_that_is_an_error_is_one_on_every_rank() -> None:
    run(_warned, 2)


def _begins_anew(rank: int, world: int) -> None:
    # Every second step: the third, too, whose reduction is partial and so without feedback.
    owed = []
    for steps in (range(4), range(3, 4)):
        model = fully_shard(Given(SHAPES))
        state = sr.fsdp.compress(model, sr.IntQuant(4, rounding="nearest"), feedback="int8", reset_every=2)
        for step in steps:
            given = _given(rank, step)
            if step == 2:
                given[1] = None
                before = state.state_dict()["residuals"]
                assert all(packet.any() for packet in before.values())
            model(given).backward()
        owed.append(state.state_dict()["residuals"])
    # With nothing owed, the step's number is all the same to rounding to nearest.
    assert all(torch.equal(packet, owed[1][name]) for name, packet in owed[0].items())


def _stays(rank: int, world: int) -> None:
    for feedback in ("full", "int8"):
        model = fully_shard(Given(SHAPES))
        state = sr.fsdp.compress(model, "int4", feedback=feedback)
        saved: list[Any] = []
        for step in range(2):
            given = _given(rank, step)
            given[1] = None if step == 1 else given[1]
            model(given).backward()
            saved.append(state.state_dict()["residuals"])
        assert all(packet.any() and torch.equal(packet, saved[1][name]) for name, packet in saved[0].items())


@pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")
@pytest.mark.parametrize("check", [_begins_anew, _stays])
def test_a_step_without_feedback(check: Any) -> None:
    run(check, 2)


def _always_partial(rank: int, world: int) -> None:
    for feedback, whole, expected in (("full", None, 1), ("full", 3, 0), (None, None, 0)):
        model = fully_shard(Given(SHAPES))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sr.fsdp.compress(model, "int8", feedback=feedback)
            for step in range(ALWAYS + 2):
                given = _given(rank, step)
                given[1] = given[1] if step == whole else None
                model(given).backward()
        found = [str(each.message) for each in caught if "set_reduce_scatter_unused_params(True)" in str(each.message)]
        assert len(found) == expected, (feedback, whole)
        assert all("the root module" in text for text in found)


def test_a_module_that_feedback_never_meets() -> None:
    run(_always_partial, 2)


def _saved_as_it_was(rank: int, world: int) -> None:
    # An asynchronous writer reads them while training goes on.
    for feedback in ("full", "int8"):
        model = fully_shard(Given(SHAPES))
        state = sr.fsdp.compress(model, "int4", feedback=feedback)
        model(_given(rank, 0)).backward()
        saved = {name: shard.local for name, shard in state.sharded_state_dict()["residuals"].items()}
        before = {name: local.clone() for name, local in saved.items()}
        model(_given(rank, 1)).backward()
        assert saved and all(torch.equal(local, before[name]) for name, local in saved.items()), feedback
        now = state.sharded_state_dict()["residuals"]
        assert not any(torch.equal(local, now[name].local) for name, local in saved.items())


@pytest.mark.filterwarnings("ignore::smallreduce.fsdp.ResidualMemory")
def test_what_was_saved_stays() -> None:
    run(_saved_as_it_was, 2)
