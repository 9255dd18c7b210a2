"""Muon shares out its matrices: each is orthogonalised once, ranks are about equally busy, and bytes are counted."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import smallreduce as sr
from optim.sharded_parameters import cut, full, give, pair
from ranks import run
from smallreduce.optim import _muon_exchange, _muon_matrix
from smallreduce.optim._muon_newton_schulz import newton_schulz_cost
from smallreduce.optim._muon_owners import Owners, choose_owners
from smallreduce.ragged import RaggedShard, RaggedTensor

BACKEND = sr.metrics.register_counting_backend()
SHAPES = [(64, 96), (96, 64), (3, 40), (40, 3), (33, 17), (80, 80), (2, 2), (1, 50), (50, 1), (128, 65), (0, 7)]
CAP_MB = 0.005
CAP_NBYTES = int(CAP_MB * 2**20)


def _placements(seed: int, world: int, shapes: list[tuple[int, int]]) -> list[RaggedShard]:
    rng = random.Random(seed)
    blocks = (1, None, "row")
    found = []
    for shape in shapes:
        kind = rng.choice(blocks)
        block = 1 if kind == 1 else shape[1] if kind == "row" else max(1, shape[0] * shape[1])
        found.append(cut(rng, shape, block, world))
    return found


# ---- the choice of owners --------------------------------------------------------------------------------------------


def _choose(shapes: list[tuple[int, int]], placements: list[RaggedShard], cap: int = CAP_NBYTES) -> Owners:
    return choose_owners(tuple(shapes), tuple(placements), cap)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_owners_are_consistent(seed: int, world: int) -> None:
    rng = random.Random(1000 + seed)
    shapes = [(rng.randint(0, 100), rng.randint(1, 100)) for _ in range(rng.randint(1, 30))]
    placements = _placements(seed, world, shapes)
    owners = _choose(shapes, placements)
    costs = [0] * world
    for shape, placement, root, moves in zip(shapes, placements, owners.roots, owners.moves, strict=True):
        lengths = [end - begin for begin, end in placement.ranges(shape)]
        assert moves == (max(lengths) < shape[0] * shape[1])
        assert moves or lengths[root] == shape[0] * shape[1]
        costs[root] += newton_schulz_cost(*shape)
    assert owners.costs == tuple(costs)
    assert owners.imbalance == (max(costs) * world / sum(costs) if sum(costs) else 1)
    # Each once, and within the cap on each rank; nothing waits for a later batch without a reason.
    assert sorted(itertools.chain(*owners.batches)) == [i for i, (m, n) in enumerate(shapes) if m * n]
    assert all(list(batch) == sorted(batch) for batch in owners.batches)
    nbytes = [
        [[2 * shapes[i][0] * shapes[i][1] for i in batch if owners.roots[i] == rank] for batch in owners.batches]
        for rank in range(world)
    ]
    for of_rank in nbytes:
        assert all(sum(batch) <= CAP_NBYTES or len(batch) == 1 for batch in of_rank)
        for batch, following in itertools.pairwise(of_rank):
            assert batch or not following
            assert not following or sum(batch) + max(following) > CAP_NBYTES


def _best(costs: list[int], world: int) -> int:
    return min(
        max(sum(cost for cost, root in zip(costs, roots, strict=True) if root == rank) for rank in range(world))
        for roots in itertools.product(range(world), repeat=len(costs))
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("world", [2, 3])
def test_the_busiest_rank_is_within_the_bound_of_lpt(seed: int, world: int) -> None:
    """4/3 - 1/3W of the best there is (Graham, *Bounds on Multiprocessing Timing Anomalies*, 1969, theorem 2)."""
    rng = random.Random(seed)
    shapes = [(rng.randint(8, 60), rng.randint(8, 60)) for _ in range(8)]
    placements = [RaggedShard.from_lengths((m, n), [1, m * n - 1, *[0] * (world - 2)]) for m, n in shapes]
    owners = _choose(shapes, placements)
    assert all(owners.moves)
    costs = [newton_schulz_cost(*shape) for shape in shapes]
    assert sorted(costs)[0] > 0
    assert max(owners.costs) * 3 * world <= _best(costs, world) * (4 * world - 1)


def test_of_ranks_with_as_little_to_do_the_one_that_has_most_of_it_owns_a_matrix() -> None:
    owners = _choose([(8, 8)], [RaggedShard.from_lengths((8, 8), [16, 40, 8])])
    assert owners.roots == (1,)


def test_whole_matrices_count_before_others_are_shared_out() -> None:
    """The small one that is whole on rank 0 keeps the large one, that could go anywhere, away from it."""
    owners = _choose([(64, 64), (8, 8)], [RaggedShard.from_lengths((64, 64), [4000, 96]), RaggedShard.on_root(0, 2)])
    assert owners.roots == (1, 0)
    assert owners.moves == (True, False)
    assert owners.moving_batches == 1


def test_equal_layers_are_shared_out_evenly() -> None:
    shapes = [(256, 256), (1024, 256), (256, 1024), (768, 256)] * 8
    owners = _choose(shapes, [RaggedShard.from_lengths(shape, [shape[0] * shape[1] // 4] * 4) for shape in shapes])
    assert owners.imbalance == 1.0


# ---- a step ----------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    computed: list[tuple[int, ...]]
    events: list[str]
    imbalance: float
    batches: int


def _observed(rank: int, world: int, seed: int) -> _Seen:
    events: list[str] = []
    computed: list[tuple[int, ...]] = []
    newton_schulz, redistribute_many = _muon_matrix.newton_schulz, _muon_exchange.redistribute_many

    def compute(matrix: Tensor, *args: Any) -> Tensor:
        computed.append(tuple(matrix.shape))
        events.append("compute")
        return newton_schulz(matrix, *args)

    def send(*args: Any, **options: Any) -> Any:
        events.append("send")
        return redistribute_many(*args, **options)

    placements = _placements(seed, world, SHAPES)
    pairs = [pair(i, shape, at) for i, (shape, at) in enumerate(zip(SHAPES, placements, strict=True))]
    optimizer = sr.optim.Muon([sharded for _, sharded in pairs], batch_cap_mb=CAP_MB)
    owners = _choose(SHAPES, placements)
    expected = 8 * (world - 1)  # a digest of what is to be done
    for (_, sharded), root, moves in zip(pairs, owners.roots, owners.moves, strict=True):
        assert isinstance(sharded, RaggedTensor)
        mine = sharded.to_local().numel()
        expected += 2 * (sharded.numel() - mine if root == rank else mine) if moves else 0
    sr.metrics.reset()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_muon_matrix, "newton_schulz", compute)
        patched.setattr(_muon_exchange, "redistribute_many", send)
        for step in (1, 2):
            for index, one in enumerate(pairs):
                give(one, step, index)
            events.clear()
            computed.clear()
            optimizer.step()
    stats = optimizer.stats()
    assert stats.step_bytes_sent == expected
    assert stats.bytes_sent == sr.metrics.bytes_sent() == 2 * expected
    assert stats.collectives == 2 * (1 + 2 * stats.batches)
    assert sr.metrics.sent()["all_to_all"].calls == 2 * 2 * stats.batches
    assert (stats.steps, stats.matrices, stats.moved_matrices) == (2, len(SHAPES), sum(owners.moves))
    assert f"{stats.bytes_sent} bytes sent in {stats.collectives} collectives" in str(stats)
    return _Seen(computed, events, stats.imbalance, len(owners.batches))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_matrix_is_orthogonalized_once_while_the_next_ones_travel(world: int, seed: int) -> None:
    seen = run(_observed, world, seed, backend=BACKEND)
    everyones = sorted(shape for one in seen for shape in one.computed)
    assert everyones == sorted(shape for shape in SHAPES if shape[0])
    costs = [sum(newton_schulz_cost(*shape) for shape in one.computed) for one in seen]
    assert {one.imbalance for one in seen} == {max(costs) * world / sum(costs)}
    for one in seen:
        assert one.batches >= 2
        assert one.events.count("send") == 2 * one.batches
        sends = [at for at, event in enumerate(one.events) if event == "send"]
        computes = [at for at, event in enumerate(one.events) if event == "compute"]
        assert sends[1] < computes[0]  # of the first batch nothing is computed before the second has started


def _alone(rank: int, world: int) -> None:
    """Of ranks in groups of one each, and of plain tensors, nothing is sent."""
    groups = [torch.distributed.new_group([other]) for other in range(world)]
    weight = torch.nn.Parameter(RaggedTensor.distribute(torch.ones(8, 8), RaggedShard((), (1,)), groups[rank]))
    plain = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = sr.optim.Muon([weight, plain])
    weight.grad = RaggedTensor.distribute(torch.ones(8, 8), RaggedShard((), (1,)), groups[rank])
    plain.grad = torch.ones(8, 8)
    sr.metrics.reset()
    optimizer.step()
    assert optimizer.stats().bytes_sent == sr.metrics.bytes_sent() == 0
    assert optimizer.stats().imbalance == 1.0
    assert torch.equal(full(weight), plain)


def test_nothing_is_sent_where_nothing_is_sharded() -> None:
    run(_alone, 2, backend=BACKEND)


def _two_groups(rank: int, world: int) -> None:
    """Matrices on different process groups, as of a model with experts: each group shares out its own."""
    pairs_of_ranks = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    group = pairs_of_ranks[rank // 2]
    weights, references = [], []
    for index, shape in enumerate([(16, 24), (24, 16), (9, 9)]):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(index))
        everywhere = index == 2
        placement = cut(random.Random(index), shape, 1, 4 if everywhere else 2)
        weights.append(torch.nn.Parameter(RaggedTensor.distribute(whole, placement, None if everywhere else group)))
        references.append(torch.nn.Parameter(whole))
    ours, theirs = sr.optim.Muon(weights), torch.optim.Muon(references)
    for step in range(3):
        for index, (weight, reference) in enumerate(zip(weights, references, strict=True)):
            reference.grad = torch.randn(reference.shape, generator=torch.Generator().manual_seed(10 * step + index))
            assert isinstance(weight, RaggedTensor)
            weight.grad = RaggedTensor.distribute(reference.grad, weight.placement, weight.group)
        ours.step()
        theirs.step()
        assert all(torch.equal(full(a), b) for a, b in zip(weights, references, strict=True))


def test_process_groups_share_out_their_own() -> None:
    run(_two_groups, 4)
