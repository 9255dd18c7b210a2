"""What a collective should give, computed in one process from the operators: no channel, no chunks in flight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import smallreduce as sr
from smallreduce import ops
from smallreduce._layout import BLOCK, Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives._engine import chunk_count, stage_seed

_SIXTEENTH = 1 / 16


def to_original_domain(residual: Tensor, codec: sr.Codec) -> Tensor:
    """A server's residual, kept in the domain in which the codec adds, as error of the tensor itself."""
    if not isinstance(codec, PacketCodec) or not codec.format.hadamard:
        return residual
    # T of docs/wire-formats.md, section 8, on every 32 elements: 2^5 T(e * 2^-5).
    x = residual
    for h in (1, 2, 4, 8, 16):
        pairs = x.view(-1, 16 // h, 2, h)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
    return x.reshape(-1)


def inputs(numel: int, world: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Each rank's input, a function of the rank alone."""
    generators = [torch.Generator().manual_seed(1000 * seed + rank) for rank in range(world)]
    return [torch.randn(numel, generator=generator).to(dtype) for generator in generators]


def dyadic(numel: int, rank: int, seed: int = 0) -> Tensor:
    """Multiples of 1/16 of magnitude below 4: sums of thousands of such are exact in fp32."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(-63, 64, (numel,), generator=generator) * _SIXTEENTH


def composed_all_reduce(
    everyones: list[Tensor],
    codec: PacketCodec,
    op: dist.ReduceOp.RedOpType,
    seed: int,
    segments: Sequence[tuple[int, int]] | None = None,
    workers: Sequence[Tensor] | None = None,
    servers: dict[int, Tensor] | None = None,
) -> Tensor:
    """The all-reduce of every rank's flat tensor, by packets that are split among the ranks.

    Args:
        segments: None: the whole tensor. What lies between them is that of the first rank.
        workers, servers: Residuals of each rank and of each packet, replaced; those of packets begin at zero.
    """
    world, numel, dtype = len(everyones), everyones[0].numel(), everyones[0].dtype
    segments = [(0, numel)] if segments is None else segments
    chunks = chunk_count(sum(length for _, length in segments), world, codec)
    layout = Layout.build(segments, codec.format, dtype, packets=chunks * world)
    stride = layout.stride
    sent = []
    for rank, x in enumerate(everyones):
        packets = torch.zeros(layout.packet_count, stride, dtype=torch.uint8)
        ops.encode(x, layout, packets, None if workers is None else workers[rank], seed=stage_seed(seed, 0, rank, 0))
        sent.append(packets)
    reduced = torch.zeros(layout.packet_count, stride, dtype=torch.uint8)
    factor = 1 / world if op == dist.ReduceOp.AVG else 1.0
    for packet in range(layout.packet_count):
        owner = packet % world
        received = torch.stack([packets[packet] for packets in sent])
        zeros = torch.zeros(BLOCK * layout.packet_blocks[packet])
        ops.reduce_encode(
            received, stride, world, factor, layout.select([packet]), reduced[packet],
            None if servers is None else servers.setdefault(packet, zeros), seed=stage_seed(seed, 0, owner, 1),
        )  # fmt: skip
    result = everyones[0].clone()
    ops.decode(reduced, layout, result)
    return result


def composed_gather(everyones: list[Tensor], codec: PacketCodec, op: dist.ReduceOp.RedOpType) -> Tensor:
    """The all-reduce of every rank's flat tensor, by packets that go whole to all ranks."""
    world, numel, dtype = len(everyones), everyones[0].numel(), everyones[0].dtype
    total = torch.zeros(numel)
    for x in everyones:
        sent = sr.decode(sr.encode(x, codec), codec, numel, dtype).float()
        total += sent * (1 / world) if op == dist.ReduceOp.AVG else sent
    return total.to(dtype)


def composed_reduce_scatter(
    everyones: list[Tensor], codec: PacketCodec, op: dist.ReduceOp.RedOpType, seed: int
) -> list[Tensor]:
    """Each rank's part of the sum: the parts are encoded as segments of their own."""
    world, numel, dtype = len(everyones), everyones[0].numel() // len(everyones), everyones[0].dtype
    layout = Layout.build([(r * numel, numel) for r in range(world)], codec.format, dtype, world, range(world))
    sent = []
    for rank, x in enumerate(everyones):
        packets = torch.zeros(world, layout.stride, dtype=torch.uint8)
        ops.encode(x, layout, packets, seed=stage_seed(seed, 0, rank, 0))
        sent.append(packets)
    shard = Layout.build([(0, numel)], codec.format, dtype)
    results = []
    for owner in range(world):
        out = torch.empty(numel, dtype=dtype)
        received = torch.stack([packets[owner] for packets in sent])
        ops.reduce(received, layout.stride, world, 1 / world if op == dist.ReduceOp.AVG else 1.0, shard, out)
        results.append(out)
    return results


def composed_all_gather(everyones: list[Tensor], codec: PacketCodec, seed: int) -> Tensor:
    """What every rank sees of all."""
    return torch.cat(
        [
            sr.decode(sr.encode(x, codec, seed=stage_seed(seed, 0, rank, 0)), codec, x.numel(), x.dtype)
            for rank, x in enumerate(everyones)
        ]
    )
