"""FSDP1's hook with a codec: what the operators give, step after step, and figures."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import smallreduce as sr
from collectives.compose import composed_all_reduce, composed_reduce_scatter
from fsdp.composed import at
from fsdp.test_fsdp_exact import STRATEGIES, fsdp1
from fsdp.training import Given, loss_of
from ranks import run
from smallreduce.codecs import PacketCodec

BACKEND = sr.metrics.register_counting_backend()

NUMEL, SEED = 1001, 3  # which no number of ranks here divides


def _given(rank: int, step: int) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(1000 * step + rank))


def _expected(strategy: ShardingStrategy, codec: PacketCodec, rank: int, world: int, step: int) -> Tensor:
    """This rank's gradient: the mean of all, by the operators alone, with the random bits of this step."""
    everyones = [_given(each, step) for each in range(world)]
    with at(step):
        if strategy is ShardingStrategy.NO_SHARD:
            return composed_all_reduce(everyones, codec, dist.ReduceOp.AVG, SEED)
        padding = -NUMEL % world
        padded = [torch.cat([x, torch.zeros(padding)]) for x in everyones]
        mine = composed_reduce_scatter(padded, codec, dist.ReduceOp.AVG, SEED)[rank]
    return mine[: len(mine) - padding] if rank == world - 1 else mine


def _composition(rank: int, world: int, strategy: ShardingStrategy) -> None:
    def made(codec: PacketCodec) -> tuple[nn.Module, sr.fsdp.HookState]:
        state = sr.fsdp.HookState(codec, seed=SEED)
        model = FullyShardedDataParallel(
            Given([(NUMEL,)]), sharding_strategy=strategy, use_orig_params=True, device_id=torch.device("cpu")
        )
        model.register_comm_hook(state, sr.fsdp.hook)
        return model, state

    def step_of(model: nn.Module, step: int) -> Tensor:
        model([_given(rank, step)]).backward()
        gradient = next(model.parameters()).grad
        assert gradient is not None
        found = gradient.clone()
        model.zero_grad()
        return found

    for codec in (sr.IntQuant(4, hadamard=True), sr.IntQuant(8, group=64, rounding="nearest"), sr.Cast(torch.bfloat16)):
        model, state = made(codec)
        for step in range(3):
            saved = state.state_dict()
            assert saved == {"seed": SEED, "step": step}
            found = step_of(model, step)
            assert torch.equal(found, _expected(strategy, codec, rank, world, step)), (codec, step)
        again, resumed = made(codec)
        resumed.load_state_dict(saved)
        assert torch.equal(step_of(again, 2), found)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_operators_give_the_same(strategy: ShardingStrategy) -> None:
    run(_composition, 3, strategy)


def _figures(rank: int, world: int) -> None:
    for strategy in STRATEGIES:
        model = fsdp1(strategy)
        state = sr.fsdp.HookState("int4-hadamard")
        model.register_comm_hook(state, sr.fsdp.hook)
        sr.metrics.reset()
        loss_of(model, rank, 0).backward()
        stats = state.stats()
        assert stats.gradients.wire_ratio > 4 and stats.gradients.exact_calls == 0 < stats.gradients.calls
        gathered = sr.metrics.sent().get("all_gather", sr.metrics.Sent()).nbytes
        assert stats.bytes_sent <= sr.metrics.bytes_sent() <= stats.bytes_sent + gathered


def test_figures() -> None:
    run(_figures, 2, backend=BACKEND)


def _wrong(rank: int, world: int) -> None:
    with pytest.raises(TypeError, match="makes no packets"):
        sr.fsdp.HookState(sr.RandomBlocks(0.1))
    with pytest.raises(TypeError, match="process_group"):
        sr.fsdp.HookState("int4", 3)  # type: ignore[arg-type]
    disagreeing = fsdp1(ShardingStrategy.FULL_SHARD)
    disagreeing.register_comm_hook(sr.fsdp.HookState("int8" if rank else "int4"), sr.fsdp.hook)
    with pytest.raises(RuntimeError, match=r"int4.*int8"):
        loss_of(disagreeing, rank, 0).backward()


def test_wrong_use() -> None:
    run(_wrong, 2)


def _other_group(rank: int, world: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = fsdp1(ShardingStrategy.FULL_SHARD)
    model.register_comm_hook(sr.fsdp.HookState("int4", pairs[rank // 2]), sr.fsdp.hook)
    match = "a part of .* the group of this HookState has 2 ranks: give it the model's process_group"
    with pytest.raises(ValueError, match=match):
        loss_of(model, rank, 0).backward()


def test_the_group_of_another_model() -> None:
    run(_other_group, 4)
