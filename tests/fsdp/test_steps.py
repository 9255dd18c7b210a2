"""What a step sees: the same weights from its forward pass to the end, other random bits than the step before, and
residuals of the parameters that are trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import smallreduce as sr
from fsdp.seen import Seen, Two, shard_each
from fsdp.training import Given
from ranks import run


def _same(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def _one_step_one_weight(rank: int, world: int) -> None:
    for trainable in (True, False):
        for recompute in (None, False, True):
            for packets in (False, True):
                case = (trainable, recompute, packets)
                model = shard_each(Two(trainable, recompute))
                sr.fsdp.compress(model, "int8", "int4", keep_packets=packets)
                steps = []
                for _ in range(3):
                    model(torch.ones(64)).backward()
                    seen = [[*model.first.seen], [*model.second.seen]]
                    assert len(seen[0]) == (2 if recompute is None else 3), case
                    assert _same(seen[0]) and _same(seen[1]), case
                    steps.append(seen[0][0])
                    model.first.seen.clear()
                    model.second.seen.clear()
                    with torch.no_grad():  # changes nothing of what follows
                        model(torch.ones(64))
                    assert not torch.equal(model.first.seen[0], seen[0][0]), case  # of the next step
                    model.first.seen.clear()
                    model.second.seen.clear()
                # No two steps round alike, and how often the model was looked at does not matter.
                assert not _same(steps[:2]) and not _same(steps[1:]), case
                again = shard_each(Two(trainable, recompute))
                sr.fsdp.compress(again, "int8", "int4", keep_packets=packets)
                for step in range(3):
                    again(torch.ones(64)).backward()
                    assert torch.equal(again.first.seen[0], steps[step]), case
                    again.first.seen.clear()


def _two_passes_at_once(rank: int, world: int) -> None:
    for packets in (False, True):
        model = shard_each(Two(True, None))
        sr.fsdp.compress(model, "int8", "int4", keep_packets=packets)
        losses = [model(torch.ones(64)), model(torch.ones(64))]
        for loss in losses:
            loss.backward()
        assert len(model.first.seen) == 4 and _same(model.first.seen)


def _other_weights_in_between(rank: int, world: int) -> None:
    for packets in (False, True):
        model = shard_each(Two(True, None))
        sr.fsdp.compress(model, "int8", "int4", keep_packets=packets)
        loss = model(torch.ones(64))
        shard = model.first.weight.to_local()
        before = shard.clone()
        with torch.no_grad():
            shard.fill_(7.0)
            model(torch.ones(64))
            shard.copy_(before)
        if packets:  # they are of the sevens
            with pytest.raises(RuntimeError, match="weights of first have changed since the latest forward pass"):
                loss.backward()
        else:
            loss.backward()
            assert torch.equal(model.first.seen[0], model.first.seen[-1])


class _Three(nn.Module):
    """Two units of which what the first, frozen one gives is computed again in backward, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Seen(trainable=False), Seen(), Seen()

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.ones(64, requires_grad=True)
        return self.c(checkpoint(lambda y: self.b(self.a(y)), x, use_reentrant=True)).sum()


def _computed_again(rank: int, world: int) -> None:
    # c has reduced when a is gathered to be computed again, and a frozen unit goes with the step of the others.
    for packets in (False, True):
        model = shard_each(_Three())
        sr.fsdp.compress(model, "int8", "int4", keep_packets=packets)
        for _ in range(2):
            model(torch.ones(64)).backward()
            for unit in (model.a, model.b, model.c):
                assert len(unit.seen) >= 2 and _same(unit.seen), packets
                unit.seen.clear()


@pytest.mark.parametrize(
    "check", [_one_step_one_weight, _two_passes_at_once, _other_weights_in_between, _computed_again]
)
def test_a_step_sees_its_own_weights(check: Any) -> None:
    run(check, 2, timeout=120)


def _replicas_round_afresh(rank: int, world: int) -> None:
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for gradients in (None, "int8"):
            model = fully_shard(Given([(40, 8)]), mesh=mesh["shard"])
            state = sr.fsdp.compress(
                model, gradients, replicate_group=mesh["replicate"],
                replicate_gradients="int4" if shape[0] > 1 else None,
            )  # fmt: skip
            found = []
            for _ in range(2):
                model([torch.linspace(-1, 1, 320).view(40, 8)]).backward()
                found.append(model.weights[0].grad.to_local().clone())
                model.zero_grad()
            compressed = shape[0] > 1 or gradients is not None
            assert torch.equal(*found) == (not compressed), (shape, gradients)
            # A resumed run goes on with the bits that follow.
            saved = copy.deepcopy(state.state_dict())
            results = []
            for _ in range(2):
                state.load_state_dict(saved)
                model([torch.linspace(-1, 1, 320).view(40, 8)]).backward()
                results.append(model.weights[0].grad.to_local().clone())
                model.zero_grad()
            assert torch.equal(*results)


def test_replicas_round_afresh_in_every_step() -> None:
    run(_replicas_round_afresh, 2)


def _frozen_later(rank: int, world: int) -> None:
    shapes = [(32, 8), (8,), (16, 4)]
    for feedback in ("full", "int8"):
        model = fully_shard(Given(shapes))
        state = sr.fsdp.compress(model, "int4", feedback=feedback)
        given = [torch.randn(shape, generator=torch.Generator().manual_seed(rank)) for shape in shapes]
        zeros = [torch.zeros(shape) for shape in shapes]
        other = fully_shard(Given(shapes))  # of which nothing is frozen
        unfrozen = sr.fsdp.compress(other, "int4", feedback=feedback)
        for each in (model, other):
            each(given).backward()
            each.zero_grad()
        before = state.stats().residual_nbytes
        model.weights[0].requires_grad_(False)
        model([None, *zeros[1:]]).backward()
        other(zeros).backward()
        # The remaining parameters are given what they owe, and go on owing the same.
        for name in ("weights.1", "weights.2"):
            mine, theirs = (dict(each.named_parameters())[name].grad.to_local() for each in (model, other))
            assert mine.any() and torch.equal(mine, theirs), (feedback, name)
            owed = state.state_dict()["residuals"][name]
            assert owed.any() and torch.equal(owed, unfrozen.state_dict()["residuals"][name]), (feedback, name)
        assert state.stats().residual_nbytes < before
        model.zero_grad()
        model.weights[0].requires_grad_(True)
        model(zeros).backward()  # what the frozen one owed is forgotten
        assert not model.weights[0].grad.to_local().any()
        assert state.stats().residual_nbytes == before
        # Nothing was trainable when it was compressed.
        late = Given(shapes)
        late.requires_grad_(False)
        fully_shard(late)
        state = sr.fsdp.compress(late, "int4", feedback=feedback)
        assert state.stats().residual_nbytes == 0
        late.requires_grad_(True)
        late([torch.randn(shape) for shape in shapes]).backward()
        assert state.stats().residual_nbytes == before


def test_parameters_frozen_and_unfrozen_after_compress() -> None:
    run(_frozen_later, 2)


def _wrong_replicas(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(Given([(40, 8)]), mesh=mesh["shard"])
    with pytest.raises(ValueError, match="replicate_group is the group of the shards"):
        sr.fsdp.compress(model, replicate_group=mesh["shard"])
    with pytest.raises(RuntimeError, match=r"shard 0 of 2.*shard 1 of 2"):
        sr.fsdp.compress(model, replicate_group=dist.group.WORLD)
    model.set_all_reduce_hook(lambda reduced: None)
    with pytest.raises(ValueError, match="all-reduce hook of its own"):
        sr.fsdp.compress(model, replicate_group=mesh["replicate"])


def test_replicas_that_are_none() -> None:
    run(_wrong_replicas, 4)


def test_what_needs_feedback_is_refused_without() -> None:
    for codec in ("sign", "topk:0.01"):
        with pytest.raises(ValueError, match="is biased"):
            sr.fsdp.HookState(codec)


def test_the_state_of_the_hook() -> None:
    state = sr.fsdp.HookState("int4", seed=3)
    assert state.state_dict() == {"seed": 3, "step": 0}
    state.load_state_dict({"seed": 3, "step": 7})
    assert state.state_dict()["step"] == 7
    for wrong in ({"seed": 4, "step": 7}, {"step": 7}):
        with pytest.raises(ValueError, match=r"this state has seed 4|must have a seed and a step"):
            state.load_state_dict(wrong)
