"""Residuals by themselves: lent for some parameters, two loans at a time, kept as parameters come and go and move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import smallreduce as sr
from smallreduce.collectives._pool import Pool
from smallreduce.fsdp._memory import Feedback, Memory, parse_feedback
from smallreduce.fsdp._residual_layout import stored_nbytes

WORLD = 3
ON = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
KINDS = [Feedback("full", 0.75, 3), Feedback("int8", 0.75, 3)]


@dataclass(frozen=True)
class Rows:
    """A parameter of which each rank has equally many rows, but the last ones fewer."""

    name: str
    shape: torch.Size

    def _rows(self, world_size: int) -> int:
        return -(-self.shape[0] // world_size)

    def parts(self, world_size: int) -> tuple[int, int]:
        return world_size, self._rows(world_size) * self.shape[1]

    def join(self, parts: Tensor) -> Tensor:
        rows = self._rows(len(parts)) * len(parts)
        return parts.reshape(rows, self.shape[1])[: self.shape[0]].clone()

    def split(self, whole: Tensor, world_size: int) -> Tensor:
        missing = self._rows(world_size) * world_size - self.shape[0]
        return torch.cat([whole, whole.new_zeros(missing, self.shape[1])]).reshape(world_size, -1)


SLOTS = [Rows(f"p{i}", torch.Size(shape)) for i, shape in enumerate([(7, 5), (1, 3), (40, 9), (2, 0), (6, 32)])]


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


def _values(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def _use(memory: Memory, step: int, pool: Pool, members: list[str] | None = None) -> None:
    """A reduction in whose place some of each parameter's residual is lost, whatever lies beside it."""
    loan = memory.lend(step, pool, members)
    for slot in loan.arrangement.slots:
        view = loan.arrangement.views(loan.worker)[slot.name]
        lost = _values(slot.shape.numel(), 10 * step + int(slot.name[1:])).view(slot.shape)
        view.mul_(0.5).add_(slot.split(lost, WORLD).to(view.device))
    loan.give_back()


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("feedback", KINDS, ids=str)
def test_some_are_lent_as_if_they_were_all(feedback: Feedback, device: str) -> None:
    on, pool = _device(device), Pool()
    memory = feedback.memory(SLOTS, WORLD, on)
    alone = {slot.name: feedback.memory([slot], WORLD, on) for slot in SLOTS}
    for step, names in enumerate((["p0", "p2"], ["p0", "p1", "p2", "p3", "p4"], ["p4", "p1"], ["p2"], ["p3"])):
        _use(memory, step, pool, names)
        for name, one in alone.items():
            if name in names:
                _use(one, step, pool)
            else:
                one.skip(step)
        stored = memory.stored()
        for name, one in alone.items():
            assert torch.equal(stored[name], one.stored()[name]), (step, name)
    assert memory.nbytes == stored_nbytes(feedback.kind, SLOTS, WORLD) == sum(one.nbytes for one in alone.values())
    if feedback.kind == "int8":
        # Of the fourth step, the one in which residuals begin anew, only what that step lost.
        assert not memory.owed("p0", stored["p0"], WORLD).any()
        assert memory.owed("p2", stored["p2"], WORLD).any()


@pytest.mark.parametrize("feedback", KINDS, ids=str)
def test_two_loans_at_a_time(feedback: Feedback) -> None:
    pool = Pool()
    memories, others = ([feedback.memory(SLOTS, WORLD, torch.device("cpu")) for _ in range(2)] for _ in range(2))
    for members in (None, ["p0", "p4"]):
        loans = [memory.lend(1, pool, members) for memory in memories]
        for number, loan in enumerate(loans):
            loan.worker.copy_(_values(len(loan.worker), number))
        for loan in loans:
            loan.give_back()
        for number, memory in enumerate(others):
            loan = memory.lend(1, Pool(), members)
            loan.worker.copy_(_values(len(loan.worker), number))
            loan.give_back()
    for ours, theirs in zip(memories, others, strict=True):
        assert all(torch.equal(one, theirs.stored()[name]) for name, one in ours.stored().items())
    largest = max(memory.lend(2, Pool()).worker.nbytes for memory in others)
    assert pool.nbytes <= 2 * largest


@pytest.mark.parametrize("feedback", KINDS, ids=str)
def test_padding_is_owed_to_no_one(feedback: Feedback) -> None:
    memory = feedback.memory(SLOTS, WORLD, torch.device("cpu"))
    loan = memory.lend(0, Pool())
    loan.worker.fill_(1.0)
    loan.give_back()
    views = memory.lend(1, Pool())
    for slot in SLOTS:
        parts = views.arrangement.views(views.worker)[slot.name]
        padding = slot.split(torch.ones(slot.shape), WORLD) == 0
        assert not parts[padding].any()
        assert parts[~padding].all()


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("feedback", KINDS, ids=str)
def test_parameters_come_and_go(feedback: Feedback, device: str) -> None:
    on, pool = _device(device), Pool()
    memory = feedback.memory(SLOTS, WORLD, torch.device("cpu"))
    _use(memory, 0, pool)
    before = memory.stored()
    memory.follow(SLOTS[1:3], on)
    assert memory.device == on
    assert memory.nbytes == stored_nbytes(feedback.kind, SLOTS[1:3], WORLD)
    after = memory.stored()
    assert after.keys() == {"p1", "p2"}
    assert all(torch.equal(one.cpu(), before[name]) for name, one in after.items())
    _use(memory, 1, pool)
    memory.follow(SLOTS, on)
    assert not memory.owed("p0", memory.stored()["p0"], WORLD).any()


@pytest.mark.parametrize("feedback", KINDS, ids=str)
@pytest.mark.parametrize("saved_on", [2, 3, 5])
def test_what_is_stored_goes_to_other_ranks(feedback: Feedback, saved_on: int) -> None:
    theirs = feedback.memory(SLOTS, saved_on, torch.device("cpu"))
    ours = feedback.memory(SLOTS, WORLD, torch.device("cpu"))
    owed = {slot.name: _values(slot.shape.numel(), 3).view(slot.shape) for slot in SLOTS}
    packets = {name: theirs.store(name, x) for name, x in owed.items()}
    theirs.restore(packets)
    for name, stored in theirs.stored().items():
        assert torch.equal(stored, packets[name])
        assert (stored.dtype, len(stored)) == ours.stored_shape(name, saved_on)
        found = ours.owed(name, stored, saved_on)
        if feedback.kind == "full":
            assert torch.equal(found, owed[name])
        elif found.numel():
            largest = owed[name].abs().max().item()
            assert (found - owed[name]).abs().max().item() <= largest * (1 + 2**-7) / 127 / 2  # half of a unit


def test_bad_arguments() -> None:
    assert parse_feedback(None, 0.8, 1024) is None
    wrong: list[tuple[type[Exception], str, tuple[Any, Any]]] = [
        (TypeError, "beta must be a float, got bool", (True, 1)),
        (ValueError, "beta must be at least 0 and below 1, got -0.5", (-0.5, 1)),
        (ValueError, "reset_every must be at least 1, got 0", (0.5, 0)),
        (TypeError, "reset_every", (0.5, 2.5)),
    ]
    for kind, match, (beta, reset_every) in wrong:
        with pytest.raises(kind, match=match):
            parse_feedback("int8", beta, reset_every)


def test_the_average_of_one_step() -> None:
    """``e <- beta * e + (1 - beta) * lost`` in eight bits, of a whole parameter as of its parts of whole groups."""
    memory = Feedback("int8", 0.75, 1024).memory([Rows("p0", torch.Size((384, 1)))], WORLD, torch.device("cpu"))
    lost = _values(384, 0)
    loan = memory.lend(0, Pool())
    loan.worker.copy_(lost)
    loan.give_back()
    codec = sr.IntQuant(8, rounding="nearest")
    expected = sr.decode(sr.encode(lost * 0.25, codec), codec, 384, torch.float32)
    assert torch.equal(memory.owed("p0", memory.stored()["p0"], WORLD).view(-1), expected)
