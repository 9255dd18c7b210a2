"""The counting process group against counts made by hand, in real processes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from ranks import run
from smallreduce import metrics
from smallreduce.metrics import Sent

BACKEND = metrics.register_counting_backend()


def counted(check: Callable[[int, int], None], world_size: int) -> None:
    run(fresh, world_size, check, backend=BACKEND)


def fresh(rank: int, world_size: int, check: Callable[[int, int], None]) -> None:
    metrics.reset()
    check(rank, world_size)


def expect(op: str, calls: int, nbytes: int) -> None:
    assert metrics.sent() == {op: Sent(calls, nbytes)}
    assert metrics.bytes_sent() == nbytes
    metrics.reset()
    assert metrics.sent() == {} and metrics.bytes_sent() == 0


def all_gather_single(output: torch.Tensor, input: torch.Tensor) -> None:
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(output, input)


def reduce_scatter_single(output: torch.Tensor, input: torch.Tensor) -> None:
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(output, input)


def check_collectives(rank: int, world_size: int) -> None:
    others = world_size - 1
    root = rank == 0

    x = torch.full((12,), float(rank))  # 48 bytes
    dist.all_reduce(x)
    assert torch.equal(x, torch.full((12,), float(sum(range(world_size)))))
    expect("all_reduce", 1, 2 * others * 48 // world_size)

    dist.all_reduce(torch.ones(10, dtype=torch.bfloat16))  # 20 bytes: not divisible by 3 ranks
    expect("all_reduce", 1, {2: 20, 3: 26}[world_size])

    with dist._coalescing_manager():
        dist.all_reduce(torch.ones(12))
        dist.all_reduce(torch.ones(12))
    expect("all_reduce", 1, 2 * others * 96 // world_size)

    output = torch.empty(5 * world_size, dtype=torch.int16).view(torch.uint8)
    all_gather_single(output, torch.full((10,), rank, dtype=torch.uint8))
    assert output.view(world_size, 10)[:, 0].tolist() == list(range(world_size))
    expect("all_gather", 1, others * 10)

    dist.all_gather([torch.empty(7) for _ in range(world_size)], torch.ones(7))
    expect("all_gather", 1, others * 28)

    shard = torch.empty(4)
    reduce_scatter_single(shard, torch.ones(4 * world_size))
    assert torch.equal(shard, torch.full((4,), float(world_size)))
    expect("reduce_scatter", 1, others * 16)

    sizes = [3 + r for r in range(world_size)]
    dist.reduce_scatter(torch.empty(sizes[rank]), [torch.ones(size) for size in sizes])
    expect("reduce_scatter", 1, 4 * (sum(sizes) - sizes[rank]))

    dist.all_to_all_single(torch.empty(world_size, 2), torch.ones(world_size, 2))
    expect("all_to_all", 1, others * 8)

    # Rank r sends r + 1 rows of 2 floats to everyone.
    received = torch.empty(sum(r + 1 for r in range(world_size)), 2)
    dist.all_to_all_single(
        received,
        torch.full(((rank + 1) * world_size, 2), float(rank)),
        output_split_sizes=[r + 1 for r in range(world_size)],
        input_split_sizes=[rank + 1] * world_size,
    )
    assert received[:, 0].tolist() == [float(r) for r in range(world_size) for _ in range(r + 1)]
    expect("all_to_all", 1, others * (rank + 1) * 8)

    dist.broadcast(torch.ones(6), src=0)
    expect("broadcast", 1, others * 24 if root else 0)
    dist.reduce(torch.ones(6), dst=0)
    expect("reduce", 1, 0 if root else 24)
    dist.gather(torch.ones(6), [torch.empty(6) for _ in range(world_size)] if root else None, dst=0)
    expect("gather", 1, 0 if root else 24)
    dist.scatter(torch.empty(6), [torch.ones(6) for _ in range(world_size)] if root else None, src=0)
    expect("scatter", 1, others * 24 if root else 0)

    if rank == 0:
        dist.send(torch.ones(5), dst=1)
        expect("send", 1, 20)
    elif rank == 1:
        dist.recv(torch.empty(5), src=0)
        expect("recv", 1, 0)

    dist.barrier()
    expect("barrier", 1, 0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_collective_counts_what_it_sends(world_size: int) -> None:
    counted(check_collectives, world_size)


def check_clones(rank: int, world_size: int) -> None:
    clone = dist.new_group(list(range(world_size)), use_local_synchronization=True)
    pair = dist.new_group([0, 1])
    metrics.reset()

    def from_another_thread() -> None:
        for _ in range(20):
            dist.all_reduce(torch.ones(6), group=clone)

    thread = threading.Thread(target=from_another_thread)
    thread.start()
    for _ in range(20):
        dist.all_reduce(torch.ones(12))
    thread.join()
    in_clone, in_world = 20 * 2 * 24 * 2 // 3, 20 * 2 * 48 * 2 // 3
    assert metrics.bytes_sent(clone) == in_clone
    assert metrics.bytes_sent(dist.group.WORLD) == in_world
    dist.destroy_process_group(clone)
    assert metrics.sent()["all_reduce"] == Sent(40, in_clone + in_world)  # a destroyed group still counts

    if rank < 2:
        metrics.reset(pair)
        dist.all_reduce(torch.ones(12), group=pair)
        assert metrics.bytes_sent(pair) == 48

    gloo = dist.new_group([0, 1, 2], backend="gloo")
    with pytest.raises(TypeError, match="'counted' backend, got ProcessGroup"):
        metrics.bytes_sent(gloo)


def test_groups_made_later_are_counted() -> None:
    counted(check_clones, 3)


def check_ddp(rank: int, world_size: int) -> None:
    def make() -> DistributedDataParallel:
        torch.manual_seed(0)
        return DistributedDataParallel(
            torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
        )

    gradient_nbytes = 4 * (6 * 12 + 12 + 12 * 3 + 3)
    ring = 2 * (world_size - 1)

    plain, hooked = make(), make()
    hooked.register_comm_hook(None, default_hooks.fp16_compress_hook)
    # DDP's second step begins with a broadcast of the rebuilt buckets' sizes.
    for ddp in (plain, hooked, plain, hooked):
        ddp(torch.ones(4, 6) * (rank + 1)).sum().backward()
    for ddp, nbytes in ((plain, gradient_nbytes), (hooked, gradient_nbytes // 2)):
        ddp.zero_grad()
        metrics.reset()
        ddp(torch.ones(4, 6) * (rank + 1)).sum().backward()
        assert metrics.sent() == {"all_reduce": Sent(1, ring * nbytes // world_size)}
        gradient = torch.cat([parameter.grad.flatten() for parameter in ddp.parameters()])  # type: ignore[union-attr]
        gathered = [torch.empty_like(gradient) for _ in range(world_size)]
        dist.all_gather(gathered, gradient)
        assert all(torch.equal(other, gradient) for other in gathered)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_ddp_step_sends_its_gradients_once_around_the_ring(world_size: int) -> None:
    counted(check_ddp, world_size)


def check_bypass(rank: int, world_size: int) -> None:
    from torch.distributed._functional_collectives import all_gather_tensor

    gathered = all_gather_tensor(torch.full((2,), float(rank)), 0, dist.group.WORLD)
    assert gathered.tolist() == [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match="1 collectives reached gloo without being counted"):
        metrics.bytes_sent()
    metrics.reset()
    assert metrics.bytes_sent() == 0


def test_a_collective_that_goes_past_the_counter_is_noticed() -> None:
    counted(check_bypass, 2)
