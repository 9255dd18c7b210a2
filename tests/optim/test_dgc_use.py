"""DGC is used as torch's own optimizers are; what it cannot do, it says."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import smallreduce as sr
from ddp.training import Given, dyadic, equal, loss_of, mlp, same_on_all_ranks, wrap
from optim.dgc_training import SHAPES, advance_reference, given_ddp, given_gradients, reference_for
from ranks import run
from smallreduce.optim import _dgc


def _groups(rank: int, world: int) -> None:
    """Two groups, one never compressed, under a schedule of rate and momentum, by closures: each group is a run of its
    own."""
    ddp = given_ddp()
    weights = list(ddp.module.parameters())
    groups = [
        {"params": weights[:3]},
        {"params": weights[3:], "lr": 0.3, "weight_decay": 0.1, "nesterov": True, "ratio": 1.0},
    ]
    optimizer = sr.optim.DGC(ddp, 0.1, ratio=0.03, warmup=[(2, 0.5)], params=groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.3], total_steps=8)
    first = reference_for(ddp, world, lr=0.1, momentum=0.9, ratio=0.03, warmup=[(2, 0.5)])
    second = reference_for(ddp, world, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.1, ratio=1.0)
    rates, momenta = set(), set()
    for step in range(7):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = ddp(given_gradients(step, rank, exact=True))
            loss.backward()
            return float(loss)

        for group, reference in zip(optimizer.param_groups, (first, second), strict=True):
            reference.lr, reference.m = np.float32(group["lr"]), np.float32(group["momentum"])
            advance_reference(reference, step, exact=True)
        rates.add(float(first.lr))
        momenta.add(float(first.m))
        assert isinstance(optimizer.step(closure), float)
        schedule.step()
        expected = [*first.weights[:3], *second.weights[3:]]
        assert equal([w.detach() for w in weights], [torch.from_numpy(w) for w in expected]), step
    assert len(rates) > 5 and len(momenta) > 5
    stats = optimizer.stats()
    assert {codec for bucket in stats.buckets for codec in bucket.codecs} == {"topk:0.03"}
    reasons = {parameter.name: parameter.reason for parameter in stats.bypassed}
    assert reasons == {
        "weights.1": "fewer than two dimensions",
        **{f"weights.{index}": "a ratio of 1" for index in range(3, 7)},
    }


def test_groups_schedules_and_closures() -> None:
    run(_groups, 4)


def _accumulates(rank: int, world: int) -> None:
    """Half of the gradient twice, without synchronisation in between, is the gradient; zeroing is as good as None."""
    ends = []
    for passes, to_none in ((1, True), (2, True), (2, False)):
        ddp = given_ddp()
        optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.03)
        for step in range(5):
            optimizer.zero_grad(set_to_none=to_none)
            gradients = [g / passes for g in given_gradients(step, rank, exact=True)]
            for number in range(passes):
                with ddp.no_sync() if number + 1 < passes else contextlib.nullcontext():
                    ddp(gradients).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in ddp.parameters()])
    assert equal(ends[0], ends[1]) and equal(ends[0], ends[2])


def test_gradients_accumulate_under_no_sync() -> None:
    run(_accumulates, 2)


def _grows(rank: int, world: int) -> None:
    """A group that comes later: until then its parameters are reduced, and stay as they are."""
    ddp = given_ddp()
    weights = list(ddp.module.parameters())
    begin = [w.detach().clone() for w in weights]
    optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.03, params=weights[:4])
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": weights[4:], "momentum": 0.5})
        optimizer.zero_grad()
        ddp(given_gradients(step, rank)).backward()
        optimizer.step()
        assert equal(weights[4:], begin[4:]) == (step < 3)
        assert not equal(weights[:1], begin[:1])
        assert same_on_all_ranks(weights)
        reasons = {parameter.name: parameter.reason for parameter in optimizer.stats().bypassed}
        assert (reasons.get("weights.6") == "in no parameter group of the optimizer") == (step < 3)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": weights[4:]})
    for group, error, message in (
        (
            {"params": nn.Parameter(torch.zeros(2, 3))},
            ValueError,
            r"ddp_model, got others, the first of shape \(2, 3\)",
        ),
        ({"params": [], "ratio": 0.0}, ValueError, "ratio must be from 1e-9 to 1, got 0.0"),
        ({"params": [], "momentum": 1.0}, ValueError, "momentum must be from 0 to less than 1, got 1.0"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2


def test_a_group_may_come_later() -> None:
    run(_grows, 2)


def _unused_by_one(rank: int, world: int) -> None:
    """What one rank alone does not use has a gradient of zero there."""
    ends = []
    for unused in (True, False):
        ddp = given_ddp(find_unused_parameters=unused)
        optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.05, nesterov=True, weight_decay=0.1)
        for step in range(6):
            gradients: list[torch.Tensor | None] = [*given_gradients(step, rank, exact=True)]
            if rank == 1 and step in (0, 2, 3):
                for index in (0, 1, 4):
                    gradients[index] = None if unused else torch.zeros(SHAPES[index])
            optimizer.zero_grad()
            ddp(gradients).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in ddp.parameters()])
    assert equal(*ends)


def test_parameters_that_one_rank_did_not_use() -> None:
    run(_unused_by_one, 2)


def _batches(rank: int, world: int) -> None:
    ends, batches = [], []
    for numel in (_dgc._BATCH_NUMEL, 300):  # all in one batch, and in several
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(_dgc, "_BATCH_NUMEL", numel)
            ddp = given_ddp()
            optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.05, nesterov=True, weight_decay=0.1)
            batches.append([[p.numel() for p in batch] for batch in _dgc._batches(ddp.parameters())])
            for step in range(3):
                optimizer.zero_grad()
                ddp(given_gradients(step, rank, exact=True)).backward()
                optimizer.step()
            ends.append([p.detach().clone() for p in ddp.parameters()])
    assert equal(*ends)
    sizes = [math.prod(shape) for shape in SHAPES]
    together, apart = batches
    assert together == [sizes]
    # A batch ends with the parameter that fills it.
    assert len(apart) > 1 and [numel for batch in apart for numel in batch] == sizes
    assert all(sum(batch) >= 300 > sum(batch[:-1]) for batch in apart[:-1])


def test_the_memory_of_a_step_is_bounded_and_changes_nothing() -> None:
    run(_batches, 2)


def _frozen(rank: int, world: int) -> None:
    module = mlp()
    module[0].weight.requires_grad_(False)
    ddp = wrap(module)
    optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.1, weight_decay=0.1)
    before = [p.detach().clone() for p in module.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()
    assert torch.equal(module[0].weight, before[0])
    assert not any(torch.equal(p, old) for p, old in list(zip(module.parameters(), before, strict=True))[1:])
    # DDP does not know of it, so every rank has a gradient of its own.
    module[0].weight.requires_grad_(True)
    optimizer.zero_grad()
    loss_of(ddp, rank, 3).backward()
    with pytest.raises(RuntimeError, match=r"shape \(40, 24\) has not been reduced"):
        optimizer.step()


def test_frozen_parameters_stay_and_are_not_taken_for_reduced_ones() -> None:
    run(_frozen, 2)


def _unused(rank: int, world: int) -> None:
    """What no rank uses keeps its momentum, its velocity and its weights, weight decay or not."""
    ddp = given_ddp(find_unused_parameters=True)
    optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.03, weight_decay=0.1)
    kept: dict[str, Any] = {}
    for step in range(5):
        optimizer.zero_grad()
        gradients: list[torch.Tensor | None] = [*given_gradients(step, rank)]
        if step in (2, 3):
            gradients[1] = gradients[4] = None
        weights = [p.detach().clone() for p in ddp.parameters()]
        ddp(gradients).backward()
        optimizer.step()
        after = {
            "compressed": optimizer.state_dict()["compression"]["parameters"]["weights.4"],
            "dense": optimizer.state[ddp.module.weights[1]]["momentum_buffer"].clone(),
        }
        unchanged = [torch.equal(p, old) for p, old in zip(ddp.parameters(), weights, strict=True)]
        assert unchanged == [step in (2, 3) and index in (1, 4) for index in range(len(SHAPES))]
        if step > 0:
            same = [torch.equal(after["compressed"][key], kept["compressed"][key]) for key in ("worker", "momentum")]
            assert [*same, torch.equal(after["dense"], kept["dense"])] == [step in (2, 3)] * 3
        kept = after


def test_parameters_that_no_rank_used_stay() -> None:
    run(_unused, 2)


def _modes(rank: int, world: int) -> None:
    """However DDP is set up, the bits are the same."""
    ends = []
    for options in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        ddp = given_ddp(**options)
        optimizer = sr.optim.DGC(ddp, lr=0.1, nesterov=True, ratio=0.03, warmup=[(2, 1.0)])
        for step in range(5):
            optimizer.zero_grad()
            ddp(given_gradients(step, rank, exact=step < 2)).backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in ddp.parameters()])
    assert all(equal(ends[0], end) for end in ends[1:])


def test_ddp_may_be_set_up_in_any_way() -> None:
    run(_modes, 2)


def _strided(rank: int, world: int) -> None:
    """Momentum that a dense stage hands on finds its elements in the bucket, where they stand as in the weight."""
    shapes = [(6, 5, 3, 3), (40, 3)]
    ends, states = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = Given(shapes)
        module.weights[0] = nn.Parameter(torch.zeros(shapes[0]).to(memory_format=memory_format))
        assert module.weights[0].is_contiguous(memory_format=memory_format)
        ddp = wrap(module)
        optimizer = sr.optim.DGC(ddp, lr=0.5, momentum=0.5, ratio=0.1, warmup=[(2, 1.0)])
        for step in range(5):
            optimizer.zero_grad()
            ddp([dyadic(shape, step, rank, 1) + torch.arange(shape.numel()).view(shape) / 2.0**12
                 for shape in map(torch.Size, shapes)]).backward()  # fmt: skip
            optimizer.step()
        ends.append([p.detach().clone() for p in ddp.parameters()])
        states.append(optimizer.state_dict())
    assert equal(*ends)
    flat, strided = (state["compression"]["parameters"]["weights.0"]["momentum"] for state in states)
    assert not torch.equal(flat, strided)
    assert torch.equal(flat, strided.as_strided(shapes[0], (45, 1, 15, 5)).flatten())


def test_the_order_of_elements_in_memory_is_no_matter() -> None:
    run(_strided, 2)


def _uneven(rank: int, world: int) -> None:
    """Under join() the ranks that have no more data take part in what the others reduce."""
    ddp = wrap(mlp())
    optimizer = sr.optim.DGC(ddp, lr=0.05, ratio=0.1)
    for _ in range(2):
        with ddp.join():
            for step in range(3 + 2 * rank):
                optimizer.zero_grad()
                loss_of(ddp, rank, step).backward()
                optimizer.step()
        assert same_on_all_ranks(list(ddp.parameters()))
    # What the others reduced is no step that this rank has left out.
    loss_of(ddp, rank, 0).backward()
    optimizer.step()


def test_uneven_inputs() -> None:
    run(_uneven, 2)


def _one_step_each(rank: int, world: int) -> None:
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.03, warmup=[(3, 1.0)])
    for _ in range(4):  # a mean can be taken twice
        ddp(given_gradients(0, rank)).backward()
    with pytest.raises(RuntimeError, match="no_sync"):
        ddp(given_gradients(0, rank)).backward()
    assert optimizer.stats().uncompressed_steps == 3


def _forgets(rank: int, world: int) -> None:
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.03)

    def backward(step: int) -> None:
        optimizer.zero_grad()
        ddp(given_gradients(step, rank)).backward()

    optimizer.step()  # as with torch's, nothing without gradients
    with ddp.no_sync():
        backward(0)
    with pytest.raises(RuntimeError, match="without a synchronised backward pass since the last one"):
        optimizer.step()
    ddp(given_gradients(1, rank)).backward()  # which reduces both
    optimizer.step()
    saved, weights = optimizer.state_dict(), [p.detach().clone() for p in ddp.parameters()]
    with pytest.raises(RuntimeError, match="gradients are those of the step before"):
        optimizer.step()
    with ddp.no_sync():
        backward(2)
    with pytest.raises(RuntimeError, match=r"outside of ddp_model.no_sync\(\)"):
        optimizer.step(lambda: 1.0)
    backward(3)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="without a synchronised"):
        optimizer.step()
    assert equal(list(ddp.parameters()), weights)
    backward(4)  # a step that is left out
    optimizer.zero_grad()
    optimizer.step()
    assert equal(list(ddp.parameters()), weights)
    backward(5)
    optimizer.step()
    assert not equal(list(ddp.parameters()), weights)


def test_a_step_without_a_synchronised_pass_is_refused() -> None:
    run(_forgets, 2)


def _dense(rank: int, world: int) -> None:
    """Means may be used again, as with torch's SGD."""
    ours, theirs = mlp(), mlp()
    ddp = wrap(ours)
    optimizer = sr.optim.DGC(ddp, lr=0.5, ratio=1.0)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.5, momentum=0.9)
    loss_of(ddp, 0, 0).backward()
    loss_of(theirs, 0, 0).backward()
    for _ in range(3):
        optimizer.step()
        sgd.step()
    assert equal(list(ours.parameters()), list(theirs.parameters()))


def test_a_gradient_may_be_used_again_on_one_rank() -> None:
    run(_dense, 1)


def _dense_but_not_reduced(rank: int, world: int) -> None:
    ddp = wrap(mlp())
    optimizer = sr.optim.DGC(ddp, lr=0.5, ratio=1.0)
    loss_of(ddp, rank, 0).backward()
    optimizer.step()
    before = [p.detach().clone() for p in ddp.parameters()]
    optimizer.zero_grad()
    with ddp.no_sync():
        loss_of(ddp, rank, 1).backward()
    with pytest.raises(RuntimeError, match="without a synchronised backward pass"):
        optimizer.step()
    assert equal(list(ddp.parameters()), before)


def test_dense_gradients_of_one_rank_are_no_step() -> None:
    run(_dense_but_not_reduced, 2)


def _copied(rank: int, world: int) -> None:
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, lr=0.1)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"DGC cannot be copied or pickled.*state_dict\(\)"):
            copied(optimizer)
    assert copy.deepcopy(ddp).module.weights[0] is not ddp.module.weights[0]


def test_a_copy_that_would_not_work_is_refused() -> None:
    run(_copied, 2)


def _densifies(rank: int, world: int) -> None:
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, lr=0.1, ratio=0.03)
    ddp(given_gradients(0, rank)).backward()
    optimizer.step()
    optimizer.param_groups[0]["ratio"] = 1.0
    with pytest.raises(ValueError, match=r"has been compressed and is now to be dense.*keeps a ratio below 1"):
        ddp(given_gradients(1, rank)).backward()


def test_what_was_compressed_stays_so() -> None:
    run(_densifies, 2)


def _gone(rank: int, world: int) -> None:
    ddp = given_ddp()
    sr.optim.DGC(ddp, lr=0.1)
    gc.collect()
    with pytest.raises(RuntimeError, match="DGC optimizer of this model is gone"):
        ddp(given_gradients(0, rank)).backward()


def test_a_second_backward_pass_before_the_step_is_refused() -> None:
    run(_one_step_each, 2)


def test_the_optimizer_must_live() -> None:
    run(_gone, 2)


def _differs(rank: int, world: int) -> None:
    ddp = given_ddp()
    differing: dict[str, tuple[Any, Any]] = {
        "lr": (0.1, 0.2),
        "ratio": (0.1, 0.2),
        "momentum": (0.9, 0.8),
        "weight_decay": (0.0, 0.1),
        "warmup": ((), ((3, 0.5),)),
        "clip_norm": (None, 1.0),
        "momentum_masking": (True, False),
    }
    for name, values in differing.items():
        with pytest.raises(RuntimeError, match="do not agree") as raised:
            sr.optim.DGC(ddp, **{"lr": 0.1, name: values[rank]})
        assert all(str(value) in str(raised.value) for value in values), name
    # The group is as good as before.
    optimizer = sr.optim.DGC(ddp, lr=0.1)
    ddp(given_gradients(0, rank)).backward()
    optimizer.step()


def test_ranks_that_disagree_are_told_so() -> None:
    run(_differs, 2)


def _bad_input(rank: int, world: int) -> None:
    ddp = wrap(mlp())
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lr": -0.1}, ValueError, "lr must be from 0 .*got -0.1"),
        ({"lr": "0.1"}, TypeError, "lr must be a float, got str"),
        ({"lr": torch.zeros(2)}, ValueError, r"lr must be one number, got a tensor of shape \(2,\)"),
        ({"momentum": 1.0}, ValueError, "momentum must be from 0 to less than 1, got 1.0"),
        ({"momentum": 0.0, "nesterov": True}, ValueError, "Nesterov's momentum needs"),
        ({"nesterov": 1}, TypeError, "nesterov must be a bool, got int"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be from 0 .*got nan"),
        ({"ratio": 0.0}, ValueError, "ratio must be from 1e-9 to 1, got 0.0"),
        ({"ratio": "1"}, TypeError, "ratio must be a float, got str"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be above 0.*got 0"),
        ({"clip_norm": True}, TypeError, "clip_norm must be a float, got bool"),
        ({"values": torch.float64}, TypeError, "values must be one of .*got torch.float64"),
        ({"warmup": 100}, TypeError, r"as dgc_warmup\(steps\) makes it, got 100"),
        ({"warmup": (5, 0.1)}, TypeError, r"pairs \(steps, ratio\), got 5"),
        ({"warmup": [(0, 0.1)]}, ValueError, "stage of warmup must be at least 1, got 0"),
        ({"warmup": [(1.5, 0.1)]}, TypeError, "stage of warmup must be an int, got float"),
        ({"warmup": [(1, 0.1), (1, 0.2)]}, ValueError, "must not grow, got 0.2 after 0.1"),
        ({"warmup": [(1, 1.5)]}, ValueError, "ratio must be from 1e-9 to 1, got 1.5"),
        ({"scaler": "scaler"}, TypeError, "scaler must be a torch.amp.GradScaler, got str"),
        ({"params": [torch.zeros(2, requires_grad=True)]}, ValueError, r"ddp_model, got others, the first .*\(2,\)"),
        ({"params": []}, ValueError, "empty parameter list"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            sr.optim.DGC(ddp, **{"lr": 0.1, **options})
        # One rank alone: the others are told.
        alone = rank == world - 1
        with pytest.raises(error if alone else RuntimeError, match=message):
            sr.optim.DGC(ddp, **{"lr": 0.1, **(options if alone else {})})
    with pytest.raises(TypeError, match="must be a DistributedDataParallel module, got Sequential"):
        sr.optim.DGC(ddp.module, lr=0.1)  # type: ignore[arg-type]
    # All of them left the model as it was.
    optimizer = sr.optim.DGC(ddp, lr=torch.tensor([0.1]) if rank else float(torch.tensor(0.1)), ratio=0.1)
    loss_of(ddp, rank, 0).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="takes one hook, once"):
        sr.optim.DGC(ddp, lr=0.1)


def test_bad_input_is_named() -> None:
    run(_bad_input, 2)


def test_warmups() -> None:
    assert sr.optim.dgc_warmup(100) == ((100, 0.25), (100, 0.0625), (100, 0.015625), (100, 0.004))
    geometric = sr.optim.dgc_geometric_warmup(10, 0.001, stages=5)
    assert [steps for steps, _ in geometric] == [10] * 5
    # 1e-3 ** (e / 6), to the last place of a double or two.
    expected = [10**-0.5, 0.1, 10**-1.5, 0.01, 10**-2.5]
    assert [ratio for _, ratio in geometric] == pytest.approx(expected, rel=2**-51)
    for call, error, message in (
        (lambda: sr.optim.dgc_warmup(0), ValueError, "steps must be at least 1, got 0"),
        (lambda: sr.optim.dgc_warmup(1.0), TypeError, "steps must be an int, got float"),  # type: ignore[arg-type]
        (lambda: sr.optim.dgc_geometric_warmup(1, 2.0), ValueError, "ratio must be from 1e-9 to 1, got 2.0"),
        (lambda: sr.optim.dgc_geometric_warmup(1, stages=0), ValueError, "stages must be at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            call()
