"""The state of :class:`SDP4Bit`: that of one rank, and that of all for torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from smallreduce._flat_shard import FlatShard
from smallreduce.codecs import as_int
from smallreduce.optim._sdp4bit_bucket import Bucket, Slice

__all__ = ["FORMAT", "Header", "check", "check_checkpoint", "checkpoint", "copied", "header", "restore", "template"]

FORMAT = 2

Header = dict[str, Any]
"""What a rank's state must have in common with the optimizer that loads it."""

_OWN = {"format", "rank", "world_size", "seed", "layout", "compressed", "steps", "passes", "master"}
_CHECKPOINT = {"format", "seed", "compressed", "steps", "passes", "strides", "master", "state", "param_groups"}


# ---- one rank -------------------------------------------------------------------------------------------------------


def header(rank: int, world_size: int, seed: int, buckets: Sequence[Bucket]) -> Header:
    """The header of this rank's state."""
    lines = [f"{m.name} {tuple(m.parameter.shape)} {m.order} {m.offset} {m.group}" for b in buckets for m in b.members]
    digest = hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()
    return {"format": FORMAT, "rank": rank, "world_size": world_size, "seed": seed, "layout": digest}


def _check_master(state: Mapping[str, Any], buckets: Sequence[Bucket]) -> None:
    if state["compressed"] and not all(bucket.is_copy for bucket in buckets):
        raise ValueError(
            "this state is of compressed weights, which are not those of its master, but here the weights are the "
            "master: give weights= as it was (with a large start_step they are exact), or load the model alone"
        )


def check(state_dict: object, expected: Header, inner: Optimizer, buckets: Sequence[Bucket]) -> None:
    """Raises TypeError or ValueError unless it is a state of this rank."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state is a dict, got {type(state_dict).__name__}")
    own = state_dict.get("sdp4bit")
    if not isinstance(own, Mapping) or own.keys() != _OWN or own["format"] != FORMAT:
        given = ", ".join(map(str, state_dict))
        raise ValueError(f"not a state of smallreduce.optim.SDP4Bit in format {FORMAT}, got a dict with {given}")
    theirs, mine = ((where["rank"], where["world_size"]) for where in (own, expected))
    if theirs != mine:
        raise ValueError(
            f"this state belongs to rank {theirs[0]} of {theirs[1]}, not to rank {mine[0]} of {mine[1]}: save and load "
            "one for each rank; checkpoint() is for another number of ranks"
        )
    for key, value in expected.items():
        if own[key] != value:
            what = "parameters, shapes or buckets" if key == "layout" else f"{key} {own[key]}"
            raise ValueError(f"this state has other {what}" + ("" if key == "layout" else f", not {value}"))
    for key in ("steps", "passes"):
        as_int(own[key], key)
    forms = [(tuple(bucket.master.shape), bucket.master.dtype) for bucket in buckets]
    masters = [(tuple(m.shape), m.dtype) if isinstance(m, Tensor) else type(m) for m in own["master"]]
    if masters != forms:
        raise ValueError(f"the state's master must be {forms}, got {masters}")
    _check_master(own, buckets)
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(state_dict.get("param_groups"), list):
        raise ValueError("a state of SDP4Bit must have 'state' and 'param_groups' of its optimizer")
    given_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    sizes = [len(group["params"]) for group in inner.param_groups]
    if given_sizes != sizes:
        raise ValueError(
            f"the state's parameter groups must have {sizes} slices on this rank, got {given_sizes}: has it the same "
            "groups, and a scaler where this has one?"
        )


def copied(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The part that is the inner optimizer's, sharing no memory with what was given."""
    return {
        "state": {
            key: {n: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for n, v in values.items()}
            for key, values in state_dict["state"].items()
        },
        "param_groups": state_dict["param_groups"],
    }


# ---- all ranks ------------------------------------------------------------------------------------------------------


def template(
    inner: Optimizer, optimizer_class: type[Optimizer], kwargs: Mapping[str, Any], buckets: Sequence[Bucket]
) -> dict[int, dict[str, Any]]:
    """The state of each slice, by its tensor's id: the inner optimizer's, or, before the first step, one of the same
    form, as a step of an optimizer like it leaves behind."""
    slices = [one for bucket in buckets for one in bucket.slices]
    if all(inner.state.get(one.tensor) for one in slices):
        return {id(one.tensor): inner.state[one.tensor] for one in slices}
    stand_in = {id(one.tensor): nn.Parameter(torch.zeros_like(one.tensor)) for one in slices}
    groups = []
    for group in inner.param_groups:
        options = {name: value for name, value in group.items() if name != "params"}
        groups.append({**options, "params": [stand_in[id(p)] for p in group["params"] if id(p) in stand_in]})
    like = optimizer_class(groups, **kwargs)
    for parameter in stand_in.values():
        parameter.grad = torch.zeros_like(parameter)
    like.step()
    return {key: like.state[parameter] for key, parameter in stand_in.items()}


def checkpoint(
    inner: Optimizer,
    states: Mapping[int, Mapping[str, Any]],
    groups: Sequence[tuple[Mapping[str, Any], Sequence[nn.Parameter]]],
    buckets: Sequence[Bucket],
    progress: Mapping[str, Any],
) -> dict[str, Any]:
    """See :meth:`SDP4Bit.checkpoint`. ``states``: of :func:`template`; ``progress``: the numbers of all ranks."""
    slices = [one for bucket in buckets for one in bucket.slices]
    names = {id(member.parameter): member.name for bucket in buckets for member in bucket.members}
    options = tuple(
        {name: value for name, value in group.items() if name != "params"}
        | {"params": tuple(names[id(p)] for p in parameters)}
        for group, (_, parameters) in zip(inner.param_groups, groups, strict=True)
    )
    return {
        "format": FORMAT,
        **progress,
        # The order in memory of each parameter's elements, which is that of what follows. In a tuple, as the groups,
        # which is saved as one object: a schedule may have added options that a new optimizer lacks.
        "strides": tuple((member.name, member.order) for bucket in buckets for member in bucket.members),
        "master": {one.member.name: _shard(one.tensor, one) for one in slices},
        "state": {
            one.member.name: {
                name: _shard(value, one) if _is_elementwise(value, one) else value
                for name, value in states[id(one.tensor)].items()
                if value is not None
            }
            for one in slices
        },
        "param_groups": options,
    }


def _shard(values: Tensor, one: Slice) -> FlatShard:
    return FlatShard(values.detach(), one.begin, one.member.numel)


def _is_elementwise(value: object, one: Slice) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == one.tensor.shape


def check_checkpoint(state: object, seed: int, inner: Optimizer, buckets: Sequence[Bucket]) -> None:
    """Raises TypeError or ValueError unless it is a checkpoint of such an optimizer."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a checkpoint is a dict, got {type(state).__name__}")
    if state.keys() != _CHECKPOINT or state["format"] != FORMAT:
        raise ValueError(
            f"not what SDP4Bit.checkpoint() gives in format {FORMAT}, got a dict with {', '.join(map(str, state))}"
        )
    if state["seed"] != seed:
        raise ValueError(f"this checkpoint has seed {state['seed']}, not {seed}")
    for key in ("steps", "passes"):
        as_int(state[key], key)
    _check_master(state, buckets)
    saved_groups = state["param_groups"]
    groups = len(inner.param_groups)
    if len(saved_groups) != groups:
        raise ValueError(f"the checkpoint has {len(saved_groups)} parameter groups, but this optimizer {groups}")
    for number, group in enumerate(saved_groups):
        own = {m.name for bucket in buckets for m in bucket.members if m.group == number}
        if own != set(group["params"]):
            raise ValueError(
                f"parameter group {number} of the checkpoint does not have the parameters of this optimizer's: "
                f"{', '.join(sorted(own ^ set(group['params'])))}"
            )
    strides = {name: tuple(stride) for name, stride in state["strides"]}
    for member in (member for bucket in buckets for member in bucket.members):
        if strides.get(member.name) != member.order:
            raise ValueError(
                f"the checkpoint's elements of {member.name} lie in memory with strides {strides.get(member.name)}, "
                f"but the parameter's with {member.order}: give the model the memory format that was saved"
            )
    slices = [one for bucket in buckets for one in bucket.slices]
    if lacking := [one.member.name for one in slices if one.member.name not in state["master"]]:
        raise ValueError(f"the checkpoint lacks the master of {', '.join(lacking)}")
    for one in slices:
        form = (state["master"][one.member.name].local.shape, state["master"][one.member.name].local.dtype)
        if form != (one.tensor.shape, one.tensor.dtype):
            raise ValueError(f"the checkpoint's master of {one.member.name} is of another rank or dtype: {form}")


def restore(
    state: Mapping[str, Any],
    inner: Optimizer,
    optimizer_class: type[Optimizer],
    kwargs: Mapping[str, Any],
    buckets: Sequence[Bucket],
) -> None:
    """See :meth:`SDP4Bit.load_checkpoint`; after :func:`check_checkpoint`."""
    if not state["steps"]:  # before the first step there is no state but what a new one may have, as Adagrad
        inner.state.clear()
        inner.state.update(optimizer_class([dict(group) for group in inner.param_groups], **kwargs).state)
    for one in (one for bucket in buckets for one in bucket.slices):
        loaded = state["master"][one.member.name]
        if loaded.local.data_ptr() != one.tensor.data_ptr():
            one.tensor.detach().copy_(loaded.local)
        if state["steps"]:
            values = state["state"].get(one.member.name, {})
            inner.state[one.tensor] = {
                name: value.local if isinstance(value, FlatShard) else copy.deepcopy(value)
                for name, value in values.items()
            }
    for group, options in zip(inner.param_groups, state["param_groups"], strict=True):
        group.update({name: copy.deepcopy(value) for name, value in options.items() if name != "params"})
