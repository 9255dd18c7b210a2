"""The state of :class:`CSER` as saved: its form, what is checked of it, and how it goes to another number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smallreduce._layout import BLOCK
from smallreduce.codecs import PacketCodec, as_int, codec
from smallreduce.optim._cser_bucket import Bucket
from smallreduce.optim._cser_exchange import PartialSync

__all__ = ["FORMAT", "SYNCS", "check", "reshard", "saved_bucket"]

FORMAT = 1
SYNCS = ("update", "reset")
"""The exchanges that may have a server's residual."""

_HEADER = ("format", "rank", "world_size", "scheme", "seed")
_HELD = {"parameter", "momentum_buffer", "decay_buffer", "shared", "residual"}
_BUCKET = {"group", "params", *SYNCS}
_SYNC = {"codec", "server", "origins"}


def saved_bucket(bucket: Bucket, syncs: Mapping[str, PartialSync | None], index: Mapping[int, int]) -> dict[str, Any]:
    """What is saved of a bucket beside the state of its parameters. ``index``: number of each parameter, by its id."""
    saved: dict[str, Any] = {"group": bucket.group, "params": [index[id(p)] for p in bucket.parameters]}
    for name in SYNCS:
        sync = syncs[name]
        saved[name] = None
        if sync is not None and sync.server.numel():
            assert sync.codec is not None
            saved[name] = {
                "codec": sync.codec.spelling,
                "server": sync.server.to("cpu", copy=True),
                "origins": sync.server_origins.clone(),
            }
    return saved


def check(state_dict: object, header: Mapping[str, object], groups: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a state fits.

    Args:
        header: What the state must have of the rank and the configuration.
        groups: The parameter groups of the optimizer.

    Raises:
        TypeError, ValueError: It does not.
    """
    _check_form(state_dict)
    assert isinstance(state_dict, Mapping)
    own = state_dict["cser"]
    theirs, mine = ((where["rank"], where["world_size"]) for where in (own, header))
    if theirs != mine:
        raise ValueError(
            f"this state belongs to rank {theirs[0]} of {theirs[1]}, not to rank {mine[0]} of {mine[1]}: save and load "
            "one for each rank; CSER.reshard() makes those of one number of ranks into those of another"
        )
    for key, expected in header.items():
        if own[key] != expected:
            raise ValueError(f"this state has {key} {own[key]}, but this optimizer has {expected}")
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    if saved_sizes != sizes:
        raise ValueError(f"this state has groups of {saved_sizes} parameters, but this optimizer has {sizes}")
    parameters = [parameter for group in groups for parameter in group["params"]]
    for bucket in own["buckets"]:
        held = [sorted(state_dict["state"].get(number, ())) for number in bucket["params"]]
        if any(names != held[0] for names in held) or "parameter" not in held[0] or not _HELD.issuperset(held[0]):
            raise ValueError(f"the parameters of a bucket must have the same state, of {sorted(_HELD)}, got {held}")
    of_bucket = [number for bucket in own["buckets"] for number in bucket["params"]]
    if sorted(of_bucket) != sorted(state_dict["state"]) or len(set(of_bucket)) != len(of_bucket):
        raise ValueError("the parameters of the state's buckets are not those that it has a state of")
    for number, saved in state_dict["state"].items():
        if not 0 <= number < len(parameters):
            raise ValueError(f"this state has a parameter {number}, but this optimizer has {len(parameters)}")
        shape = tuple(parameters[number].shape)
        for name, tensor in saved.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                form = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor)
                raise ValueError(f"{name} of parameter {number} must be {shape} of torch.float32, got {form}")


def _check_form(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"a state is a dict, got {type(state_dict).__name__}")
    for key, kind in (("state", Mapping), ("param_groups", list), ("cser", Mapping)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"not a state of smallreduce.optim.CSER: it has no {key!r}, or of another type")
    own = state_dict["cser"]
    if own.get("format") != FORMAT:
        raise ValueError(f"not a state of smallreduce.optim.CSER in format {FORMAT}, got {own.get('format')!r}")
    if own.keys() != {*_HEADER, "step", "buckets"} or not isinstance(own["buckets"], list):
        raise ValueError(f"the state's 'cser' has {', '.join(map(str, own))}")
    for key in ("rank", "world_size", "seed", "step"):
        as_int(own[key], key)
    for bucket in own["buckets"]:
        if not isinstance(bucket, Mapping) or bucket.keys() != _BUCKET or not bucket["params"]:
            raise ValueError("a bucket of the state does not have its group, its parameters and its exchanges")
        for name in SYNCS:
            sync = bucket[name]
            if sync is not None and (not isinstance(sync, Mapping) or sync.keys() != _SYNC):
                raise ValueError("an exchange of the state does not have its codec, its server's residual and origins")


def reshard(state_dicts: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """See :meth:`CSER.reshard`."""
    world_size = as_int(world_size, "world_size")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    for state_dict in state_dicts:
        _check_form(state_dict)
    states = sorted(state_dicts, key=lambda state: state["cser"]["rank"])
    headers = [state["cser"] for state in states]
    ranks = [header["rank"] for header in headers]
    if not states or ranks != list(range(headers[0]["world_size"])):
        raise ValueError(f"one state of each rank is needed, got those of ranks {ranks}")
    for header in headers:
        for key in ("world_size", "scheme", "seed", "step"):
            if header[key] != headers[0][key]:
                raise ValueError(f"the states differ in {key}: {headers[0][key]} and {header[key]}")
        if [bucket["params"] for bucket in header["buckets"]] != [b["params"] for b in headers[0]["buckets"]]:
            raise ValueError("the states differ in their buckets")
    if world_size == len(states):
        return [copy.deepcopy(dict(state)) for state in states]
    merged = copy.deepcopy(dict(states[0]))
    for number, of_first in merged["state"].items():
        for name in of_first:
            parts = [state["state"][number][name].cpu().double() for state in states]
            of_first[name] = torch.stack(parts).mean(0)
    for place, bucket in enumerate(merged["cser"]["buckets"]):
        for name in SYNCS:
            _settle(merged["state"], bucket["params"], [h["buckets"][place][name] for h in headers], name)
            bucket[name] = None
    for of_first in merged["state"].values():
        if world_size == 1 and "residual" in of_first:
            # One rank owes nothing to others. What its local steps have come to is added, an update subtracted.
            of_first["parameter"] += of_first.pop("residual") * (1 if "shared" in of_first else -1)
        if world_size == 1:
            of_first.pop("shared", None)
        for name, value in of_first.items():
            of_first[name] = value.float()
    resharded = []
    for rank in range(world_size):
        state = copy.deepcopy(merged)
        state["cser"].update(rank=rank, world_size=world_size)
        resharded.append(state)
    return resharded


def _settle(
    state: Mapping[int, dict[str, Tensor]], params: Sequence[int], syncs: Sequence[Mapping[str, Any] | None], name: str
) -> None:
    """Adds what the servers owe the mean to what every worker owes, whose mean it then is part of."""
    sizes = [state[number]["parameter"].numel() for number in params]
    owed = torch.zeros(sum(-(-size // BLOCK) for size in sizes), BLOCK, dtype=torch.float64)
    for sync in syncs:
        if sync is not None:
            owed[sync["origins"].cpu()] += _original(sync["server"].cpu(), sync["codec"]).double()
    flat = owed.view(-1)
    offset = 0
    for number, size in zip(params, sizes, strict=True):
        part = flat[offset : offset + size]
        offset += BLOCK * -(-size // BLOCK)
        if "residual" in state[number]:
            state[number]["residual"] += part.view_as(state[number]["residual"])
        else:
            # The updates that are exchanged are subtracted.
            parameter = state[number]["parameter"]
            parameter += (-part if name == "update" else part).view_as(parameter)


def _original(server: Tensor, spelling: str) -> Tensor:
    """A server's residual as an error of the mean itself, in blocks of 32."""
    blocks = server.view(-1, BLOCK)
    chosen = codec(spelling)
    if isinstance(chosen, PacketCodec) and chosen.format.hadamard:
        # docs/wire-formats.md, section 8: 2^5 T(e 2^-5), and T is linear.
        for h in (1, 2, 4, 8, 16):
            pairs = blocks.reshape(-1, BLOCK // (2 * h), 2, h)
            blocks = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        blocks = blocks.reshape(-1, BLOCK)
    return blocks
