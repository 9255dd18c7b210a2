"""SDP4Bit of all ranks in one process: the operators one after the other, whole parameters, no slices and no overlap.

From Jia et al., arXiv:2410.15526, Algorithms 2 and 3, with differences taken and added in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import smallreduce as sr
from smallreduce import ops
from smallreduce._layout import Layout
from smallreduce.codecs import PacketCodec
from smallreduce.collectives._engine import stage_seed

ALIGNMENT = 64


def packet_codec(spelling: str) -> PacketCodec:
    codec = sr.codec(spelling)
    assert isinstance(codec, PacketCodec)
    return codec


class Reference:
    """Training on ``ranks`` ranks.

    Args:
        parameters: Initial values.
        buckets: The parameters, by number, of each bucket.
        optimizer_class, options: Of the optimizer.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        buckets: Sequence[Sequence[int]],
        ranks: int,
        optimizer_class: type[torch.optim.Optimizer],
        options: dict[str, Any],
        weights: str | None = "int4:group=2048",
        differences: bool = True,
        gradients: Any = ("int8-hadamard:group=128", "int4-hadamard:group=128"),
        node_size: int = 1,
        start_step: int = 0,
        seed: int = 0,
    ) -> None:
        self.ranks, self.node_size, self.seed, self.start_step = ranks, node_size, seed, start_step
        self.weight_codec = None if weights is None else packet_codec(weights)
        if self.weight_codec is not None and differences:
            self.weight_codec = self.weight_codec.with_feedback()
        self.differences = differences
        pair = (gradients, gradients) if isinstance(gradients, str) else gradients
        self.gradient_codecs = None if pair is None else tuple(packet_codec(codec) for codec in pair)
        self.flat = isinstance(gradients, str)
        self.buckets = buckets
        self.dtype = parameters[0].dtype
        self.weights = [p.clone() for p in parameters]
        self.master = [nn.Parameter(p.float().clone()) for p in parameters]
        self.optimizer = optimizer_class(self.master, **options)
        self.passes = self.steps = 0

    def flattened(self, tensors: Sequence[Tensor], bucket: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Aligned, and filled up to equal parts."""
        pieces = []
        for index in bucket:
            x = tensors[index].detach().reshape(-1).to(dtype)
            pieces += [x, torch.zeros(-x.numel() % ALIGNMENT, dtype=dtype)]
        flat = torch.cat(pieces)
        return torch.cat([flat, torch.zeros(-flat.numel() % (ALIGNMENT * self.ranks), dtype=dtype)])

    def unflattened(self, flat: Tensor, bucket: Sequence[int]) -> list[Tensor]:
        tensors, offset = [], 0
        for index in bucket:
            numel = self.weights[index].numel()
            tensors.append(flat[offset : offset + numel].view_as(self.weights[index]))
            offset += -(-numel // ALIGNMENT) * ALIGNMENT
        return tensors

    def reduce(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """A backward pass: of each rank the gradient of each parameter."""
        self.passes += 1
        for number, bucket in enumerate(self.buckets):
            flats = [self.flattened(of_rank, bucket, torch.float32) for of_rank in gradients]
            if self.gradient_codecs is None or self.steps < self.start_step:
                mean = torch.stack([flat * (1 / self.ranks) for flat in flats]).sum(0)
            else:
                mean = torch.cat(self._reduced(flats, 2 * number))
            for index, gradient in zip(bucket, self.unflattened(mean, bucket), strict=True):
                before = self.master[index].grad
                self.master[index].grad = gradient.clone() if before is None else before + gradient

    def _reduced(self, flats: list[Tensor], bucket: int) -> list[Tensor]:
        world, step = self.ranks, torch.tensor(self.passes)
        part = flats[0].numel() // world
        parts = [(rank * part, part) for rank in range(world)]
        assert self.gradient_codecs is not None
        intra, inter = self.gradient_codecs
        nodes = world // self.node_size
        one_level = self.flat or nodes == 1 or self.node_size == 1
        first_codec = (intra if nodes == 1 else inter) if one_level else intra
        first = Layout.build(parts, first_codec.format, torch.float32, world, range(world))
        sent = []
        for rank, flat in enumerate(flats):
            packets = torch.zeros(world, first.stride, dtype=torch.uint8)
            ops.encode(flat, first, packets, None, stage_seed(self.seed, bucket, rank, 0), step)
            sent.append(packets)
        results = []
        second = Layout.build(parts, inter.format, torch.float32, world, range(world))
        shard = Layout.build([(0, part)], (first_codec if one_level else inter).format, torch.float32)
        for owner in range(world):
            if one_level:
                received = torch.stack([packets[owner] for packets in sent])
            else:
                received = torch.zeros(nodes, second.stride, dtype=torch.uint8)
                for node in range(nodes):
                    mates = range(node * self.node_size, (node + 1) * self.node_size)
                    of_node = torch.stack([sent[mate][owner] for mate in mates])
                    encoder = mates[owner % self.node_size]
                    ops.reduce_encode(
                        of_node, first.stride, self.node_size, 1.0, first.select([owner]), received[node], None,
                        stage_seed(self.seed, bucket, encoder, 1), step, into=second.select([owner]),
                    )  # fmt: skip
            out = torch.empty(part)
            ops.reduce(received, received.shape[1], len(received), 1 / world, shard, out)
            results.append(out)
        return results

    @torch.no_grad()
    def step(self) -> None:
        """A step of the optimizer, after which all ranks have ``weights``."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        exact = self.weight_codec is None or self.steps < self.start_step
        self.steps += 1
        for number, bucket in enumerate(self.buckets):
            master = self.flattened(self.master, bucket, torch.float32)
            weights = self.flattened(self.weights, bucket, self.dtype)
            if exact:
                weights.copy_(master)
            else:
                self._gather(weights, master, 2 * number + 1)
            for index, weight in zip(bucket, self.unflattened(weights, bucket), strict=True):
                self.weights[index].copy_(weight)

    def _gather(self, weights: Tensor, master: Tensor, bucket: int) -> None:
        assert self.weight_codec is not None
        part, step, format = weights.numel() // self.ranks, torch.tensor(self.steps), self.weight_codec.format
        parts = [(rank * part, part) for rank in range(self.ranks)]
        whole = Layout.build(parts, format, self.dtype, self.ranks, range(self.ranks))
        shard = Layout.build([(0, part)], format, self.dtype)
        packets = torch.zeros(self.ranks, whole.stride, dtype=torch.uint8)
        for rank, (offset, _) in enumerate(parts):
            seed = stage_seed(self.seed, bucket, rank, 0)
            new, old = master[offset : offset + part], weights[offset : offset + part]
            if self.differences:
                ops.encode_difference(new, old, shard, packets[rank], seed, step)
            else:
                ops.encode(new.to(self.dtype), shard, packets[rank], None, seed, step)
        (ops.decode_add if self.differences else ops.decode)(packets, whole, weights)
