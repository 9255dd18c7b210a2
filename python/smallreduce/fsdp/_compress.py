"""``smallreduce.fsdp.compress``: packets instead of tensors in what FSDP2 sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from smallreduce.codecs import Codec, IntQuant, PacketCodec, as_int
from smallreduce.collectives import Channel, Count, channel_of
from smallreduce.collectives._levels import Levels, node_size_of
from smallreduce.collectives._pool import Pool
from smallreduce.fsdp._codecs import Spelling, parse_gradients, parse_unbiased, parse_weights
from smallreduce.fsdp._difference_gather import DifferenceGather
from smallreduce.fsdp._gather import WeightGather
from smallreduce.fsdp._leg import Codecs, Leg, Progress
from smallreduce.fsdp._memory import Feedback, Memory, parse_feedback, warn_of_memory
from smallreduce.fsdp._replicas import ReplicaReduce
from smallreduce.fsdp._resharding import Place
from smallreduce.fsdp._scatter import GradientScatter
from smallreduce.fsdp._state import State
from smallreduce.fsdp._state_parts import Part
from smallreduce.fsdp._together import together
from smallreduce.fsdp._torch_groups import Bucket, buckets_of

__all__ = ["compress"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Config:
    """The arguments of :func:`compress`, checked."""

    gradients: Codecs | None
    weights: PacketCodec | None
    replicas: PacketCodec | None
    feedback: Feedback | None
    node_size: int | None
    keep_packets: bool
    differences: bool
    seed: int

    def __str__(self) -> str:
        gradients = " and ".join(map(str, self.gradients)) if isinstance(self.gradients, tuple) else self.gradients
        return (
            f"gradients {gradients}, weights {self.weights}, feedback {self.feedback}, replicas "
            f"{self.replicas}, node_size {self.node_size}, keep_packets {self.keep_packets}, differences "
            f"{self.differences}, seed {self.seed}"
        )


def compress(
    model: nn.Module,
    gradients: Spelling | tuple[str | Codec, str | Codec] = "int4-hadamard",
    weights: Spelling = None,
    feedback: str | None = None,
    *,
    node_size: int | None = None,
    keep_packets: bool = False,
    differences: bool = False,
    replicate_group: dist.ProcessGroup | DeviceMesh | None = None,
    replicate_gradients: Spelling = None,
    beta: float = 0.8,
    reset_every: int = 1024,
    seed: int = 0,
) -> State:
    """Compresses what FSDP2 sends for ``model``. Every rank calls it, after ``fully_shard`` and before training.

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        state = smallreduce.fsdp.compress(model, gradients="int4-hadamard", weights="int8")

    Every module that ``fully_shard`` was applied to, and that has parameters, gets an all-gather and a reduce-scatter
    of its own. Modules sharded later are not touched. Groups of a codec start afresh at each parameter. Where the shard
    group has one rank, torch calls neither, and nothing is compressed.

    Weights are encoded in the dtype in which they are gathered (``MixedPrecisionPolicy.param_dtype``), and all ranks
    compute with the same decoded bits, the owner too; its own fp32 shard, which the optimizer updates, stays exact. The
    forward and backward passes of a step see the same decoded weights: a backward pass sees those of the latest forward
    pass, also where it belongs to an earlier one.

    Gradients are reduced as torch asks (a mean, or a sum that it divides itself), in fp32, into ``reduce_dtype``.

    Args:
        model: A module with FSDP modules, or one itself.
        gradients: A codec that makes packets (``Sign`` and ``TopK`` with ``feedback`` only), or its spelling; a pair,
            inside a node and between nodes, for the reduce-scatter on two levels (SDP4Bit, arXiv:2410.15526, Algorithm
            3); None: torch's own reduce-scatter.
        weights: ``IntQuant`` or ``Cast``, or None: torch's own all-gather.
        feedback: Error feedback for gradients: what the codec takes away from a rank's gradients is added to its next
            ones; all modules must then have one shard group. ``"full"``: fp32 residuals; ``"int8"``: LoCo
            (arXiv:2407.04480), an exponential average in 8-bit integers. A residual is of the size of the *unsharded*
            trainable parameters, on every rank: 4 bytes for each element, or 1.016, which a :class:`ResidualMemory`
            warning states once. A loss scale that changes (``GradScaler``) changes the units of what is owed; use
            neither with it.
        node_size: Ranks of a node, where ``gradients`` is a pair, and weights then take two levels too, each packet
            sent to another node once; None: as torchrun has laid them out.
        keep_packets: Keep the packets of the weights from the forward pass, and decode them again in the backward pass
            instead of gathering twice: half of what weights send, for 1.016 bytes (``int8``) of each unsharded element
            on every rank. A backward pass raises where weights have changed since the latest forward pass. Without
            effect where ``reshard_after_forward=False`` keeps the weights themselves.
        differences: Keep the unsharded weights, in the dtype in which they are gathered, on every rank, and send what a
            rank's own have changed by: four bits lose less of that than of the weights (SDP4Bit, arXiv:2410.15526,
            Algorithm 2), and what they lose is in the next difference. Weights then travel once in a step; exactly the
            first time, and where they change before gradients have been reduced again; frozen ones, once in all.
            ``IntQuant`` only. Rounding left open is to nearest. Without the Hadamard transform; all
            modules must have one shard group. A backward pass raises where torch tells that weights have changed since
            the latest forward pass.
        replicate_group: The ranks that hold the same shard of other replicas of the model (HSDP): a process group or a
            one-dimensional mesh; ``fully_shard`` gets the one-dimensional mesh of the shards. Gradients are then
            averaged over the replicas too, each time that they are reduced.
        replicate_gradients: The codec for that; None: exact.
        beta, reset_every: Of LoCo: ``e <- beta * e + (1 - beta) * (h - decoded)``; steps after which e begins at zero.
        seed: Base of the random bits, which also depend on step, module and rank.

    Returns:
        The state: ``stats()``, ``state_dict()``, ``sharded_state_dict()``.

    Raises:
        TypeError: ``model`` has no FSDP module, or a value is of another type.
        ValueError: Impossible values; or a model that cannot be compressed, with what to do instead.
        RuntimeError: Another rank refused its arguments, or has others.
    """
    buckets = buckets_of(model)
    setup = Count()
    shards = _channels(buckets, [bucket.mesh_group for bucket in buckets])
    # First whether there are replicas at all: where some rank has none, none may wait for it there.
    replicas = together(
        shards, lambda: _process_group(replicate_group), lambda group: f"replicate_group of {_size(group)} ranks",
        lambda _, channel: shards[channel], setup,
    )  # fmt: skip

    def check() -> _Config:
        if replicas is not None and any(replicas is bucket.mesh_group for bucket in buckets):
            raise ValueError(
                "replicate_group is the group of the shards; it must be the ranks that hold the same shard, such as "
                "mesh['replicate'].get_group()"
            )
        checked = _check(
            buckets, gradients, weights, feedback, node_size, keep_packets, differences, replicate_gradients, replicas,
            beta, reset_every, seed,
        )  # fmt: skip
        if checked.feedback is not None and _place(buckets, replicas).row == 0:
            # Before anything is agreed on: filters may make an error of it, which is then one on all ranks.
            world_size = buckets[0].shard_group.size()
            if world_size > 1:
                slots = [slot for bucket in buckets for slot in bucket.slots if slot.trainable]
                warn_of_memory(checked.feedback, slots, world_size, stacklevel=4)
        return checked

    lines = {**shards, **_channels(buckets, [replicas] * len(buckets))}
    config = together(lines, check, str, lambda _, channel: lines[channel], setup)
    return _install(buckets, config, replicas, setup)


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _process_group(given: object) -> dist.ProcessGroup | None:
    if isinstance(given, DeviceMesh):
        if given.ndim != 1:
            raise ValueError(f"replicate_group must be a mesh of one dimension, got {given}: give mesh['replicate']")
        return given.get_group()
    if given is not None and not isinstance(given, dist.ProcessGroup):
        raise TypeError(f"replicate_group must be a ProcessGroup or a DeviceMesh, got {type(given).__name__}")
    return given


def _channels(buckets: Sequence[Bucket], groups: Sequence[dist.ProcessGroup | None]) -> dict[Channel, list[str]]:
    """Where ranks compare what they are about to do with each module, which is of the group beside it."""
    lines: dict[Channel, list[str]] = {}
    for bucket, group in zip(buckets, groups, strict=True):
        if group is not None and group.size() > 1:
            line = bucket.description if group is bucket.mesh_group else f"{bucket.description}, {bucket.place}"
            lines.setdefault(channel_of(group, bucket.device), []).append(line)
    return lines


def _check(
    buckets: Sequence[Bucket],
    gradients: Spelling | tuple[str | Codec, str | Codec],
    weights: Spelling,
    feedback: str | None,
    node_size: int | None,
    keep_packets: bool,
    differences: bool,
    replicate_gradients: Spelling,
    replicas: dist.ProcessGroup | None,
    beta: float,
    reset_every: int,
    seed: int,
) -> _Config:
    codecs = parse_gradients(gradients, feedback, node_size)
    of_weights = parse_weights(weights)
    for name, flag in (("keep_packets", keep_packets), ("differences", differences)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")
        if flag and of_weights is None:
            raise ValueError(f"{name} is for compressed weights, and weights is None")
    if differences and of_weights is not None:
        if not isinstance(of_weights, IntQuant):
            raise ValueError(f"differences take IntQuant, whose scales follow how small they are, got {of_weights}")
        if keep_packets:
            raise ValueError("differences keep the weights themselves: give keep_packets or differences, not both")
        if of_weights.hadamard:
            raise ValueError(f"differences take a codec without the Hadamard transform, got {of_weights}")
        # What a difference loses is in the next one, as with error feedback.
        of_weights = of_weights.with_feedback()
    between = parse_unbiased(replicate_gradients, "replicate_gradients")
    if between is not None and replicas is None:
        raise ValueError("replicate_gradients needs replicate_group: the ranks that hold the same shard")
    memory = parse_feedback(feedback, beta, reset_every)
    as_int(seed, "seed")
    size = None
    if codecs is not None or of_weights is not None or replicas is not None:
        for bucket in buckets:
            reason = bucket.refusal() or (bucket.refusal_of_weights() if of_weights is not None else None)
            if reason is None and feedback is not None and any(slot.is_dtensor for slot in bucket.slots):
                reason = "has parameters of tensor parallelism, whose residuals are not kept: give feedback=None"
            if reason is None and replicas is not None and bucket.reduce_dtype == torch.float16:
                reason = "reduces in fp16, in which a sum over replicas may overflow: give reduce_dtype=torch.float32"
            if reason is not None:
                raise ValueError(f"{bucket.label} {reason}")
    if feedback is not None or differences:
        _one_shard_group(buckets, "feedback=None" if feedback is not None else "differences=False")
    if isinstance(codecs, tuple):
        given = None if node_size is None else as_int(node_size, "node_size")
        sizes = {node_size_of(dist.get_process_group_ranks(bucket.shard_group), given) for bucket in buckets}
        if len(sizes) > 1:
            raise ValueError(f"all modules must have as many ranks in a node for two levels, got {sorted(sizes)}")
        size = sizes.pop()
    return _Config(codecs, of_weights, between, memory, size, keep_packets, differences, seed)


def _one_shard_group(buckets: Sequence[Bucket], instead: str) -> None:
    """Refuses what keeps a state of the ranks of a shard group, where modules have several.

    Raises:
        ValueError: They do.
    """
    first, *others = ((bucket, dist.get_process_group_ranks(bucket.shard_group)) for bucket in buckets)
    for bucket, ranks in others:
        if ranks != first[1]:
            raise ValueError(
                f"{first[0].label} is sharded over ranks {_listed(first[1])} and {bucket.label} over ranks "
                f"{_listed(ranks)}, but what is kept from step to step is of one shard group: give {instead}, or call "
                "compress on each part of the model that has one"
            )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _install(buckets: Sequence[Bucket], config: _Config, replicas: dist.ProcessGroup | None, setup: Count) -> State:
    place = _place(buckets, replicas)
    replica, shard_rank = divmod(place.row, place.world_size)
    # All replicas gather the same bits, but no two ranks round gradients alike.
    seeds = config.seed, config.seed ^ replica << 32, config.seed ^ shard_rank << 32
    legs = [
        Leg(codec, one) for codec, one in zip((config.weights, config.gradients, config.replicas), seeds, strict=True)
    ]
    weights, gradients, between = legs
    progress: dict[str, Progress] = {}
    scatters: list[GradientScatter] = []
    gathers: list[WeightGather | DifferenceGather] = []
    memory_for, pool = partial(_memory, config.feedback), Pool()
    anything = config.gradients is not None or config.weights is not None
    for bucket in buckets:
        steps = progress[bucket.name] = Progress()
        if config.node_size is not None and bucket.shard_group.size() > 1:
            # Its wires are made now, by all ranks together.
            Levels(channel_of(bucket.shard_group, bucket.device), config.node_size)
        if anything:
            scatter = GradientScatter(bucket, gradients, steps, config.node_size, memory_for, pool)
            scatters.append(scatter)
            gather = (
                DifferenceGather(bucket, weights, steps, config.node_size)
                if config.differences
                else WeightGather(
                    bucket, weights, partial(_step_of, bucket, progress), config.node_size, config.keep_packets
                )
            )
            gathers.append(gather)
            bucket.module.set_custom_reduce_scatter(scatter)  # type: ignore[arg-type]
            bucket.module.set_custom_all_gather(gather)  # type: ignore[arg-type]
        if replicas is not None:
            bucket.module.set_all_reduce_hook(ReplicaReduce(bucket, between, steps, replicas))

    def channels() -> dict[Channel, list[str]]:
        names: dict[Channel, list[str]] = {}
        for bucket in buckets:
            for group in (bucket.mesh_group, replicas):
                if group is not None and group.size() > 1:
                    names.setdefault(channel_of(group, bucket.device), []).append(bucket.name)
        return names

    kind = None if config.feedback is None else config.feedback.kind
    part = Part(weights, gradients, between, kind, config.seed, setup)
    return State(place, [part], progress, [("", scatter) for scatter in scatters], gathers, channels)


def _place(buckets: Sequence[Bucket], replicas: dist.ProcessGroup | None) -> Place:
    """Of this rank in the largest shard group: with feedback, all modules have the same."""
    groups = [bucket.mesh_group for bucket in buckets]
    places = [(1, 0) if group is None else (group.size(), group.rank()) for group in groups]
    world_size, shard_rank = max(places, key=lambda place: place[0])
    replica, replica_count = (0, 1) if replicas is None else (replicas.rank(), replicas.size())
    return Place(world_size, replica_count, replica * world_size + shard_rank)


def _step_of(bucket: Bucket, progress: Mapping[str, Progress]) -> int:
    """That of a module for its weights. One that is frozen goes with those that are trained."""
    if any(slot.trainable for slot in bucket.slots):
        return progress[bucket.name].step
    return max(each.step for each in progress.values())


def _memory(feedback: Feedback | None, bucket: Bucket) -> Memory | None:
    world_size = bucket.shard_group.size() if feedback is not None else 1
    slots = [slot for slot in bucket.slots if slot.trainable]
    if feedback is None or world_size == 1 or not slots:
        return None
    return feedback.memory(slots, world_size, bucket.device)
