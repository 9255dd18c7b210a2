"""What DGC saves: a run goes on as if it had not been stopped, and on other ranks nothing that is owed is lost."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import smallreduce as sr
from ddp.training import equal, loss_of, mlp, same_on_all_ranks, wrap
from optim.dgc_training import SHAPES, given_ddp, given_gradients, selecting_twice
from ranks import run

OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 0.01,
    "ratio": 0.05,
    "warmup": ((3, 1.0), (4, 0.25)),
}


def _made() -> tuple[DistributedDataParallel, sr.optim.DGC]:
    ddp = wrap(mlp(), bucket_cap_mb=0.002)
    return ddp, sr.optim.DGC(ddp, **OPTIONS)


def _train(ddp: DistributedDataParallel, optimizer: sr.optim.DGC, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, rank, step).backward()
        optimizer.step()


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _resumes(rank: int, world: int, split: bool) -> None:
    with selecting_twice(split):
        for stop in (2, 5, 9):  # while all is dense, in the warm-up, and after it
            _resumes_after(stop, rank, split)


def _resumes_after(stop: int, rank: int, split: bool) -> None:
    ddp, optimizer = _made()
    _train(ddp, optimizer, rank, range(stop))
    saved = _through_a_file({"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict()})
    assert (stop == 2) == (not saved["optimizer"]["compression"]["parameters"])
    _train(ddp, optimizer, rank, range(stop, 12))
    expected = [p.detach().clone() for p in ddp.parameters()]

    if not split:  # a second selection is made in what is cut from a bucket, and a new process begins with others
        ddp, optimizer = _made()
    ddp.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    _train(ddp, optimizer, rank, range(stop, 12))
    assert equal(list(ddp.parameters()), expected), stop
    # Loading has copied: what was loaded is as it was.
    ddp.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    _train(ddp, optimizer, rank, range(stop, 12))
    assert equal(list(ddp.parameters()), expected), stop
    # Neither half of the state is for show.
    for part, key in (("compression", "parameters"), ("state", None)):
        less = {**saved["optimizer"], part: {**saved["optimizer"][part], key: {}} if key else {}}
        ddp.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(less)
        _train(ddp, optimizer, rank, range(stop, 12))
        assert equal(list(ddp.parameters()), expected) == (stop == 2 and part == "compression")


@pytest.mark.parametrize("split", [False, True])
def test_a_run_goes_on_bit_for_bit(split: bool) -> None:
    run(_resumes, 2, split)


def _refuses(rank: int, world: int) -> None:
    ddp, optimizer = _made()
    _train(ddp, optimizer, rank, range(5))
    saved = optimizer.state_dict()
    compression = saved["compression"]
    wrong: list[tuple[Any, str]] = [
        ({**saved, "compression": {**compression, "rank": 1 - rank}}, "belongs to rank"),
        ({**saved, "compression": {**compression, "world_size": 3}}, r"belongs to rank .*DGC\.reshard\(\)"),
        ({**saved, "compression": {**compression, "parameters": {"nobody": {}}}}, "nobody"),
        (torch.optim.SGD(ddp.parameters()).state_dict(), r"not a state of smallreduce.optim.DGC, got \['param_groups'"),
        (sr.ddp.HookState("topk:0.05", module=ddp).state_dict(), "not a state of smallreduce.optim.DGC"),
        ({**saved, "param_groups": saved["param_groups"] * 2}, "different number of parameter groups"),
        ({**saved, "param_groups": [{**saved["param_groups"][0], "ratio": 2.0}]}, "ratio must be from"),
        # What was held back of a parameter can only be sent compressed.
        ({**saved, "param_groups": [{**saved["param_groups"][0], "ratio": 1.0}]}, "no codec"),
        (None, "NoneType"),
    ]
    before = (optimizer.state, optimizer.param_groups)
    for state, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert optimizer.state is before[0] and optimizer.param_groups is before[1]
        assert optimizer.state_dict()["compression"]["step"] == 5
    # A hook without momentum does not take what has one, nor this one what has none.
    with pytest.raises(ValueError, match="keys"):
        sr.ddp.register(wrap(mlp()), "topk:0.05").load_state_dict(compression)
    _train(ddp, optimizer, rank, range(5, 7))
    assert same_on_all_ranks(list(ddp.parameters()))


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    run(_refuses, 2)


def _states(rank: int, world: int, split: bool) -> dict[str, Any]:
    with selecting_twice(split):
        ddp = given_ddp()
        optimizer = sr.optim.DGC(ddp, lr=0.5, momentum=0.5, ratio=0.05, weight_decay=0.5)
        for step in range(3):
            optimizer.zero_grad()
            ddp(given_gradients(step, rank, exact=True)).backward()
            optimizer.step()
    return optimizer.state_dict()


def _means(states: list[dict[str, Any]]) -> dict[tuple[str, str], torch.Tensor]:
    """What is owed in the mean, and the mean momentum, in fp64."""
    means = {}
    for name, first in states[0]["compression"]["parameters"].items():
        saved = [state["compression"]["parameters"][name] for state in states]
        for key in ("worker", "momentum"):
            means[name, key] = torch.stack([of_rank[key].double() for of_rank in saved]).mean(0)
        for of_rank in saved:
            for (_, begin, end), server in zip(of_rank["shards"], of_rank["server"], strict=True):
                if server is not None:
                    owed = means[name, "worker"][32 * begin : 32 * end]
                    owed += server[: len(owed)].double()
        assert means[name, "worker"].shape == (first["numel"],)
    return means


@pytest.mark.parametrize("split", [False, True])
def test_what_is_owed_survives_another_number_of_ranks(split: bool) -> None:
    for old, news in ((4, (1, 2, 4, 8)), (2, (1, 2, 4))):
        states = run(_states, old, split)
        servers = [s for state in states for p in state["compression"]["parameters"].values() for s in p["server"]]
        assert bool(servers) == split
        before = _means(states)
        for new in news:
            # In any order, and dyadic, so that the means of powers of two are exact.
            resharded = sr.optim.DGC.reshard(states[::-1], new)
            assert [(s["compression"]["rank"], s["compression"]["world_size"]) for s in resharded] == [
                (rank, new) for rank in range(new)
            ]
            after = _means(resharded)
            assert all(torch.equal(after[key], mean) for key, mean in before.items())
            for state in resharded:
                assert state["param_groups"] == states[0]["param_groups"]
                assert state["compression"]["step"] == 3
            for one, other in itertools.combinations(resharded, 2):
                assert one["state"] is not other["state"]
        if not split:
            same = sr.optim.DGC.reshard(states, old)
            for ours, theirs in zip(same, states, strict=True):
                for name, saved in theirs["compression"]["parameters"].items():
                    assert torch.equal(ours["compression"]["parameters"][name]["worker"], saved["worker"])


def test_a_number_of_ranks_that_divides_nothing() -> None:
    """3 ranks on 2: the middle one is half of each. fp64 sums rounded to fp32 once are within half a unit, 2**-24."""
    states = run(_states, 3, False)
    before, after = _means(states), _means(sr.optim.DGC.reshard(states, 2))
    for key, mean in before.items():
        largest = max(float(s["compression"]["parameters"][key[0]][key[1]].abs().max()) for s in states)
        assert float((after[key] - mean).abs().max()) <= 2.0**-24 * largest
    halves = [s["compression"]["parameters"]["weights.0"]["momentum"].double() for s in states]
    expected = ((halves[0] + halves[1] / 2) / 1.5).float()
    given = sr.optim.DGC.reshard(states, 2)[0]["compression"]["parameters"]["weights.0"]["momentum"]
    # Twice as many roundings in fp64, of which the last, to fp32, may fall on the other side.
    assert torch.allclose(given, expected, rtol=2.0**-23, atol=0.0)


def _goes_on(rank: int, world: int, states: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Two steps without gradients, from weights of zero: only what was owed moves them."""
    ddp = given_ddp()
    optimizer = sr.optim.DGC(ddp, lr=1.0, momentum=0.5, ratio=0.05, momentum_masking=False)
    optimizer.load_state_dict(states[rank])
    for group in optimizer.param_groups:
        group.update(lr=1.0, momentum=0.5, weight_decay=0.0)
    with torch.no_grad():
        for parameter in ddp.parameters():
            parameter.zero_()
    for _ in range(2):
        optimizer.zero_grad()
        ddp([torch.zeros(shape) for shape in SHAPES]).backward()
        optimizer.step()
    assert same_on_all_ranks(list(ddp.parameters()))
    if world == 1:
        assert optimizer.state_dict()["compression"]["parameters"] == {}
    owed = dict.fromkeys(range(len(SHAPES)), torch.zeros(()))
    for name, saved in optimizer.state_dict()["compression"]["parameters"].items():
        mean = saved["worker"] / world
        dist.all_reduce(mean)
        owed[int(name.split(".")[1])] = mean
    return [
        parameter.detach().flatten() - owed[index]
        for index, parameter in enumerate(ddp.parameters())
        if len(SHAPES[index]) > 1
    ]


def test_other_ranks_go_on_with_what_was_owed() -> None:
    states = run(_states, 4, True)
    before = _means(states)
    for new in (1, 2):
        moved = run(_goes_on, new, sr.optim.DGC.reshard(states, new))[0]
        names = [f"weights.{index}" for index, shape in enumerate(SHAPES) if len(shape) > 1]
        for name, total in zip(names, moved, strict=True):
            # u goes into v twice, halved each time.
            assert torch.equal(-total.double(), before[name, "worker"] + 0.75 * before[name, "momentum"])


def test_states_that_are_not_of_all_ranks_are_refused() -> None:
    states = run(_states, 2, False)
    later = {**states[1], "compression": {**states[1]["compression"], "step": 4}}
    fewer = {**states[1], "compression": {**states[1]["compression"], "parameters": {}}}
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (states[:1], 2, ValueError, "got those of 0 of 2"),
        ([states[0], states[0]], 2, ValueError, "got those of 0 of 2, 0 of 2"),
        ([], 2, ValueError, "all ranks, got 0"),
        ([{}], 2, ValueError, "all ranks, got 1"),
        (states[0], 2, TypeError, "sequence of dicts, got dict"),
        ([states[0], later], 2, ValueError, r"step \[3, 4\]"),
        ([states[0], fewer], 2, ValueError, "different names"),
        (states, 0, ValueError, "at least 1, got 0"),
        (states, 2.0, TypeError, "float"),
    ]
    for given, world_size, error, message in wrong:
        with pytest.raises(error, match=message):
            sr.optim.DGC.reshard(given, world_size)
