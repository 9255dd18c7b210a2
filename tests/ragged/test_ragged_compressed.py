"""What travels through codecs: the codes of whole parameters, whoever owns their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import smallreduce as sr
from fsdp.training import POLICIES, Given, loss_of, same_on_all_ranks
from ragged.sharding import full_gradients, ragged
from ranks import run
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec

SHAPES: list[tuple[int, ...]] = [(33, 5), (7,), (40, 64), (1, 1), (3, 50, 11), (129,)]


def _given(rank: int, step: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _roundtrip(x: torch.Tensor, codec: PacketCodec) -> torch.Tensor:
    return sr.decode(sr.encode(x, codec), codec, x.numel(), x.dtype).view(x.shape)


def _mean(everyones: list[torch.Tensor], codec: PacketCodec) -> torch.Tensor:
    """Of packets, each of a whole tensor."""
    layout = Layout.build([(0, everyones[0].numel())], codec.format, torch.float32)
    packets = torch.zeros(len(everyones), layout.stride, dtype=torch.uint8)
    for packet, x in zip(packets, everyones, strict=True):
        ops.encode(x.reshape(-1), layout, packet)
    mean = torch.empty_like(everyones[0])
    ops.reduce(packets, layout.stride, len(everyones), 1 / len(everyones), layout, mean.view(-1))
    return mean


def _codes(rank: int, world: int, spelling: str, granularity: Any, policy: str) -> None:
    """Both legs give each parameter what quantising all of it gives."""
    codec = sr.codec(f"{spelling},rounding=nearest")
    assert isinstance(codec, PacketCodec)
    model = Given(SHAPES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sr.ragged.fully_shard(
        model, granularity=granularity, gradients=codec, weights=codec, mp_policy=POLICIES[policy],
        reshard_after_forward=True,
    )  # fmt: skip
    dtype = POLICIES[policy].param_dtype or torch.float32
    model.unshard()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, _roundtrip(before[name].to(dtype), codec)), name
    model.reshard()
    for step in range(2):
        model.zero_grad()
        model(_given(rank, step)).backward()
        found = full_gradients(model)
        everyones = [_given(r, step) for r in range(world)]
        for index, gradient in enumerate(found.values()):
            mean = _mean([theirs[index].to(dtype).float() for theirs in everyones], codec)  # type: ignore[union-attr]
            assert gradient is not None
            assert torch.equal(gradient, mean), index


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
@pytest.mark.parametrize(("spelling", "granularity"), [
    ("int4:group=32", "group"), ("int8:group=64", "rows"), ("int8:group=128", "matrix"), ("int4:group=32", 3),
])  # fmt: skip
@pytest.mark.parametrize("world", [2, 3])
def test_codes_are_those_of_whole_parameters(world: int, spelling: str, granularity: Any, policy: str) -> None:
    run(_codes, world, spelling, granularity, policy)


def _partial(rank: int, world: int) -> None:
    """Where some have no gradient, what the others get does not change, and less travels."""
    codec = sr.codec("int8:group=32,rounding=nearest")
    found, sent = [], []
    for missing in ((), (2, 4)):
        model = sr.ragged.fully_shard(Given(SHAPES), granularity="rows", gradients=codec)
        given = [None if index in missing else one for index, one in enumerate(_given(rank, 0))]
        model(given).backward()
        found.append(full_gradients(model))
        sent.append(sr.ragged.state(model).stats().gradients.bytes_sent)
    assert sent[1] < sent[0]
    for index, (whole, part) in enumerate(zip(found[0].values(), found[1].values(), strict=True)):
        if index in (2, 4):
            assert part is None
        else:
            assert whole is not None
            assert part is not None
            assert torch.equal(whole, part)


@pytest.mark.parametrize("world", [2, 4])
def test_parameters_without_gradient(world: int) -> None:
    run(_partial, world)


def _replays(rank: int, world: int, codecs: dict[str, Any]) -> None:
    """The same bits every time, other bits in every step, the same weights on all ranks, and a loss that falls."""
    losses = []
    for _ in range(2):
        model = ragged(granularity="rows", **codecs)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(12):
            optimizer.zero_grad()
            loss = loss_of(model, 0, 0)  # the same on all ranks
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss))
            assert same_on_all_ranks([loss])
        model.unshard()
        assert same_on_all_ranks([p for p in model.parameters() if type(p) is nn.Parameter])
        model.reshard()
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize(
    ("world", "codecs"),
    [
        (2, {"gradients": "int4-hadamard", "weights": "int8"}),
        (3, {"gradients": "int4-hadamard", "weights": "int8"}),
        (4, {"gradients": ("int8-hadamard", "int4-hadamard"), "weights": "int8", "node_size": 2}),
        (2, {"gradients": "bf16", "weights": "bf16"}),
    ],
)
def test_training_can_be_replayed(world: int, codecs: dict[str, Any]) -> None:
    run(_replays, world, codecs)


def _forward_is_backward(rank: int, world: int) -> None:
    """Stochastic rounding of the weights is drawn once in a step: what a backward pass gathers is what the forward pass
    had."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in model:
        sr.ragged.fully_shard(layer, weights="int4:rounding=stochastic")
    sr.ragged.fully_shard(model)
    forward: list[torch.Tensor] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda module, args: forward.append(module.weight.detach().clone()))
    for step in range(2):
        backward: list[torch.Tensor] = []

        def watch(gradient: torch.Tensor, backward: list[torch.Tensor] = backward) -> None:
            backward.append(model[1].weight.detach().clone())

        out = model(torch.randn(2, 64))
        out.register_hook(watch)  # after that of the module, which gathers
        out.sum().backward()
        assert torch.equal(backward[0], forward[2 * step + 1])
    assert not torch.equal(forward[0], forward[2])


def test_weights_are_rounded_once_in_a_step() -> None:
    run(_forward_is_backward, 2)


def _replica_codec(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    codec = sr.codec("int8:group=32,rounding=nearest")
    assert isinstance(codec, PacketCodec)
    model = sr.ragged.fully_shard(Given(SHAPES), mesh=mesh, granularity="rows", replicate_gradients=codec)
    model(_given(rank, 0)).backward()
    means = []
    for replica in range(2):
        pair = [_given(2 * replica + r, 0) for r in range(2)]
        means.append([(a + b) / 2 for a, b in zip(*pair, strict=True)])  # type: ignore[operator]
    for index, gradient in enumerate(full_gradients(model).values()):
        total = _roundtrip(means[0][index], codec) + _roundtrip(means[1][index], codec)
        assert gradient is not None
        assert torch.equal(gradient, _roundtrip(total * 0.5, codec))
    assert same_on_all_ranks([g for g in full_gradients(model).values() if g is not None])


def test_codec_between_replicas() -> None:
    run(_replica_codec, 4)
