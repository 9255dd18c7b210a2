"""``smallreduce.ragged.state``: what a model that is fully sharded on planned layouts has sent, owes, and has done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from smallreduce.collectives import Channel, channel_of
from smallreduce.fsdp._memory import Memory
from smallreduce.fsdp._resharding import Place
from smallreduce.fsdp._state import State
from smallreduce.fsdp._state_parts import Part
from smallreduce.fsdp._torch_groups import plain_name
from smallreduce.ragged._bucket import Bucket
from smallreduce.ragged._policy import Policy
from smallreduce.ragged._schedule import Schedule
from smallreduce.ragged._unit import Unit, unit_of

__all__ = ["state"]


def state(model: nn.Module) -> State:
    """The state of a model whose modules :func:`smallreduce.ragged.fully_shard` was applied to. It is read from the
    model, so that two calls give two views of the same; only loading communicates.

        for block in model.blocks:
            smallreduce.ragged.fully_shard(block, gradients="int4", feedback="full")
        smallreduce.ragged.fully_shard(model, gradients="int4", feedback="full")
        state = smallreduce.ragged.state(model)
        ...
        dcp.save({"model": model.state_dict(), "compression": state.sharded_state_dict()}, checkpoint_id=folder)

    The modules may have codecs of their own; ``stats()`` adds up what they sent. ``"steps"`` are three numbers for each
    module (or ``module:1`` and so on for its parameters of a second dtype): reductions of its gradients over the
    shards, over the replicas, and backward passes of the model. Residuals do not depend on who owns what: a state can
    be loaded into a model that is sharded with another granularity.

    Args:
        model: The root module, once all is sharded.

    Returns:
        As :func:`smallreduce.fsdp.compress` does: ``stats()``, ``state_dict()``, ``load_state_dict()``,
        ``sharded_state_dict()``, ``load_sharded_state_dict()``.

    Raises:
        TypeError: Nothing in ``model`` is fully sharded so.
        ValueError: Modules with ``feedback`` are sharded over different ranks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module that fully_shard was applied to, got {type(model).__name__}")
    units = {plain_name(name): unit for name, each in model.named_modules() if (unit := unit_of(each)) is not None}
    if not units:
        raise TypeError(
            f"nothing in {type(model).__name__} is sharded by smallreduce.ragged.fully_shard; for torch's fully_shard "
            "the state is what smallreduce.fsdp.compress returns"
        )
    _check_ranks(units)
    policies = [unit.policy for unit in units.values()]
    schedules = {name: unit.schedule for name, unit in units.items()}  # of the outermost first, which makes it for all
    buckets = {
        f"{name}:{index}" if index else name: (name, bucket)
        for name, unit in units.items()
        for index, bucket in enumerate(unit.buckets)
    }

    def channels() -> Mapping[Channel, Sequence[str]]:
        found: dict[Channel, list[str]] = {}
        for name, unit in units.items():
            for group in _groups(unit.policy):
                keys = found.setdefault(channel_of(group, unit.policy.ranks.device), [])
                keys += [key for key, (owner, _) in buckets.items() if owner == name]
        return found

    return State(
        _place(policies),
        [_part(policy) for policy in policies],
        {key: _Steps(bucket, schedules[name]) for key, (name, bucket) in buckets.items()},
        [(f"{name}." if name else "", _Reducer(name, bucket)) for name, bucket in buckets.values()],
        [],
        channels,
    )


@dataclass(frozen=True)
class _Steps:
    """How far a bucket has come, and the model: the random bits of gradients and of weights depend on these."""

    bucket: Bucket
    schedule: Schedule

    def stored(self) -> list[int]:
        return [*self.bucket.progress.stored(), self.schedule.step]

    def restore(self, stored: Sequence[int]) -> None:
        *own, self.schedule.step = stored
        self.bucket.progress.restore(own)


@dataclass(frozen=True)
class _Reducer:
    """A bucket, for the state."""

    name: str
    bucket: Bucket

    @property
    def label(self) -> str:
        return self.name or "the root module"

    @property
    def reduce_dtype(self) -> torch.dtype:
        return self.bucket.policy.reduce_dtype(self.bucket.shard.dtype)

    @property
    def memory(self) -> Memory | None:
        return self.bucket.residuals.memory()

    @property
    def partial(self) -> int:
        return self.bucket.residuals.partial


def _part(policy: Policy) -> Part:
    kind = None if policy.feedback is None else policy.feedback.kind
    return Part(policy.weights, policy.gradients, policy.between, kind, policy.weights.seed, policy.setup)


def _groups(policy: Policy) -> list[dist.ProcessGroup]:
    groups = (policy.ranks.shard, policy.ranks.replicas)
    return [group for group in groups if group is not None and group.size() > 1]


def _place(policies: Sequence[Policy]) -> Place:
    """Of this rank in the largest shard group: with feedback, all modules have the same."""
    ranks = max((policy.ranks for policy in policies), key=lambda each: each.shard.size())
    return Place(ranks.shard.size(), ranks.replica_count, ranks.row)


def _check_ranks(units: Mapping[str, Unit]) -> None:
    if all(unit.policy.feedback is None for unit in units.values()):
        return
    first, *others = (
        (name or "the root module", [dist.get_process_group_ranks(group) for group in _groups(unit.policy)])
        for name, unit in units.items()
    )
    for name, ranks in others:
        if ranks != first[1]:
            raise ValueError(
                f"{first[0]} is sharded over ranks {first[1]} and {name} over ranks {ranks}, but residuals are saved "
                "by the ranks of one shard group: call state on each part of the model that has one, or give "
                "feedback=None"
            )
