"""``smallreduce.ragged.fully_shard``: fully sharded data parallelism on a layout that cuts no block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.weak import WeakIdKeyDictionary

from smallreduce.codecs import Codec, IntQuant, PacketCodec, Sign, as_int
from smallreduce.collectives import Channel, Count, channel_of
from smallreduce.collectives._levels import Levels, node_size_of
from smallreduce.fsdp._codecs import Spelling, parse_gradients, parse_unbiased, parse_weights
from smallreduce.fsdp._leg import Leg
from smallreduce.fsdp._memory import parse_feedback, warn_of_memory
from smallreduce.fsdp._together import together
from smallreduce.fsdp._torch_groups import plain_name
from smallreduce.ragged._bucket import Bucket, Named
from smallreduce.ragged._granularity import Granularity, block_of
from smallreduce.ragged._memory import Whole, grain_of_feedback
from smallreduce.ragged._module import RaggedModule, make_ragged
from smallreduce.ragged._policy import Policy, Ranks
from smallreduce.ragged._tensor import RaggedTensor
from smallreduce.ragged._unit import Unit, unit_of

__all__ = ["fully_shard"]

M = TypeVar("M", bound=nn.Module)

# Parameters that were sharded, for as long as something else refers to them.
_sharded: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fully_shard(
    module: M,
    *,
    mesh: DeviceMesh | None = None,
    granularity: Granularity = "group",
    gradients: Spelling | tuple[str | Codec, str | Codec] = None,
    weights: Spelling = None,
    feedback: str | None = None,
    reshard_after_forward: bool | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    node_size: int | None = None,
    replicate_gradients: Spelling = None,
    beta: float = 0.8,
    reset_every: int = 1024,
    seed: int = 0,
) -> M:
    """Shards the parameters of a module over the ranks of a mesh, as torch's ``fully_shard`` does, but cuts no block of
    them. Every rank calls it: for inner modules first, each of which is then gathered and reduced by itself, and last
    for the root module, which takes what is left.

        for block in model.blocks:
            smallreduce.ragged.fully_shard(block, gradients="int4-hadamard", weights="int8")
        smallreduce.ragged.fully_shard(model, gradients="int4-hadamard", weights="int8")
        optimizer = torch.optim.AdamW(model.parameters())

    Parameters become :class:`RaggedTensor` ones. :func:`smallreduce.ragged.plan` lays all those of a module, of one
    dtype, into one buffer, of which each rank owns an equal part; they are views of it, sharded and unsharded, and only
    gradients, as autograd makes them, are copied into one. Gradients that are reduced are RaggedTensors, too. The
    module gets those methods of torch's ``FSDPModule`` that :class:`RaggedModule` has.

    Args:
        module: A module; its parameters contiguous, and not shared with a module that is sharded by itself. They may be
            on the meta device: after ``to_empty`` and an initialisation, or loading, training can begin.
        mesh: One-dimensional: the ranks to shard over; two-dimensional: replicas and, in each, ranks to shard over
            (HSDP). None: all ranks.
        granularity: What stays whole on a rank: ``"group"``: a group of the codecs, so that a parameter is quantised
            to the codes that it would have unsharded (and without codecs single elements); ``"rows"``, or a number of
            rows, of the last dimension (of a vector: of elements); ``"matrix"``: of the last two dimensions. Or a
            function of a parameter's name in the module and the parameter that gives one of these. Groups stay whole
            with all of them, and so, with ``feedback``, do the groups in which residuals are kept: 32 elements, or 128
            with ``"int8"``.
        gradients, weights, node_size, replicate_gradients, seed: As for :func:`smallreduce.fsdp.compress`; None:
            torch's own collectives, with the bits of torch's ``fully_shard`` where these do not depend on who owns
            what.
        feedback, beta, reset_every: As for :func:`smallreduce.fsdp.compress`, but for each module, and in a reduction
            without the gradients of all parameters too: those that have none go on owing what they owe. Save them with
            :func:`smallreduce.ragged.state`.
        reshard_after_forward: Free the gathered parameters after the forward pass and gather them again before the
            backward pass; None: but for the root module.
        mp_policy: torch's ``MixedPrecisionPolicy``: ``param_dtype``, ``reduce_dtype``, ``output_dtype``,
            ``cast_forward_inputs``.
        ignored_params: Parameters that are not sharded.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: A value that is not possible, a parameter that cannot be sharded; nothing is sharded
            then, on any rank. (Of ``mesh``, which says who the ranks are, on this rank only.)
        RuntimeError: Another rank refused its arguments, or has others.
    """
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh or None, got {type(mesh).__name__}")
    ranks = _ranks(mesh)
    setup = Count()
    channels = [
        channel_of(group, ranks.device)
        for group in (ranks.shard, ranks.replicas)
        if group is not None and group.size() > 1
    ]

    def check() -> tuple[list[Named], Policy]:
        named, policy = _check(
            module, ranks, granularity, gradients, weights, feedback, reshard_after_forward, mp_policy, ignored_params,
            node_size, replicate_gradients, beta, reset_every, seed, setup,
        )  # fmt: skip
        owing = [
            Whole(one.name, one.parameter.shape)
            for one in named
            if one.parameter.requires_grad and policy.takes_feedback(one.parameter.dtype)
        ]
        if policy.feedback is not None and any(one.shape.numel() for one in owing) and ranks.row == 0:
            # Before anything is agreed on: filters may make an error of it, which is then one on all ranks.
            warn_of_memory(policy.feedback, owing, ranks.shard.size(), stacklevel=4)
        return named, policy

    def lines(checked: tuple[list[Named], Policy], channel: Channel) -> Sequence[str]:
        named, _ = checked
        return [
            f"{one.name}: {tuple(one.parameter.shape)} of {one.parameter.dtype}, blocks of {one.block}, "
            f"{'trainable' if one.parameter.requires_grad else 'frozen'}"
            for one in named
        ]

    def text(checked: tuple[list[Named], Policy]) -> str:
        return f"{checked[1]}, reshard_after_forward {reshard_after_forward}"

    named, policy = together(channels, check, text, lines, setup, "smallreduce.ragged")
    if policy.node_size is not None and ranks.shard.size() > 1:
        Levels(channel_of(ranks.shard, ranks.device), policy.node_size)  # its wires are made by all ranks together
    dtypes = list(dict.fromkeys(one.parameter.dtype for one in named))
    buckets = []
    for dtype in dtypes:
        of_dtype = [one for one in named if one.parameter.dtype == dtype]
        for one in of_dtype:
            _sharded[one.parameter] = one.name
        buckets.append(Bucket(of_dtype, policy))
    _move_buffers(module, ranks.device)
    Unit(module, buckets, policy, reshard_after_forward)
    make_ragged(module)
    return module


def _ranks(mesh: DeviceMesh | None) -> Ranks:
    if mesh is None:
        kind = torch.accelerator.current_accelerator()
        device_type = "cuda" if kind is not None and kind.type == "cuda" and _has_nccl() else "cpu"
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    if mesh.ndim > 2:
        raise ValueError(f"mesh must have one dimension, or two: replicas and shards; got {mesh}")
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if mesh.ndim == 1:
        return Ranks(mesh.get_group(), None, device)
    return Ranks(mesh.get_group(1), mesh.get_group(0), device)


def _has_nccl() -> bool:
    return dict(item.split(":") for item in dist.get_backend_config().split(",")).get("cuda") == "nccl"


def _check(
    module: nn.Module,
    ranks: Ranks,
    granularity: Granularity,
    gradients: Spelling | tuple[str | Codec, str | Codec],
    weights: Spelling,
    feedback: str | None,
    reshard_after_forward: bool | None,
    mp_policy: MixedPrecisionPolicy | None,
    ignored_params: set[nn.Parameter] | None,
    node_size: int | None,
    replicate_gradients: Spelling,
    beta: float,
    reset_every: int,
    seed: int,
    setup: Count,
) -> tuple[list[Named], Policy]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}: shard each by itself")
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and type(module).forward is nn.Module.forward:
        raise ValueError(f"{type(module).__name__} is never called: shard the modules in it, or the one that has it")
    if isinstance(module, RaggedModule):
        raise ValueError(f"{type(module).__name__} is fully sharded already")
    for name in vars(RaggedModule):
        if not name.startswith("_") and hasattr(module, name):
            raise ValueError(
                f"{type(module).__name__} has something of its own called {name!r}, which is what a fully sharded "
                "module has it for: rename it"
            )
    if reshard_after_forward is not None and not isinstance(reshard_after_forward, bool):
        raise TypeError(
            f"reshard_after_forward must be True, False or None, got {reshard_after_forward!r}: parameters are not "
            "sharded over fewer ranks in between"
        )
    precision = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if not isinstance(precision, MixedPrecisionPolicy):
        raise TypeError(f"mp_policy must be a MixedPrecisionPolicy or None, got {type(precision).__name__}")
    as_int(seed, "seed")
    codecs = parse_gradients(gradients, feedback, node_size)
    memory = parse_feedback(feedback, beta, reset_every)
    of_weights = parse_weights(weights)
    between = parse_unbiased(replicate_gradients, "replicate_gradients")
    if between is not None and ranks.replicas is None:
        raise ValueError("replicate_gradients needs a mesh of two dimensions: replicas and shards")
    size = None
    if isinstance(codecs, tuple):
        size = node_size_of(dist.get_process_group_ranks(ranks.shard), node_size)
    pair = codecs if isinstance(codecs, tuple) else (codecs,)
    group = math.lcm(*(_group_of(codec) for codec in (*pair, of_weights)), grain_of_feedback(memory))
    ignored = set() if ignored_params is None else {id(parameter) for parameter in ignored_params}
    named = _parameters(module, ignored)
    for one in named:
        _check_parameter(one.name, one.parameter)
        one.block = block_of(granularity, one.name, one.parameter, group)
    # All replicas gather the same bits, but no two ranks round gradients alike.
    replica = 0 if ranks.replicas is None else ranks.replicas.rank()
    seeds = seed, seed ^ replica << 32, seed ^ ranks.shard.rank() << 32
    weights_leg, gradients_leg, between_leg = (
        Leg(codec, one) for codec, one in zip((of_weights, codecs, between), seeds, strict=True)
    )
    return named, Policy(ranks, weights_leg, gradients_leg, between_leg, memory, size, precision, setup)


def _group_of(codec: PacketCodec | None) -> int:
    """Elements that share a scale."""
    return codec.group if isinstance(codec, (IntQuant, Sign)) else 1


def _modules(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and those in it, but for what is fully sharded already."""
    yield prefix, module
    for name, child in module.named_children():
        if unit_of(child) is None:
            yield from _modules(f"{prefix}{name}.", child)


def _parameters(module: nn.Module, ignored: set[int]) -> list[Named]:
    found: dict[int, Named] = {}
    for prefix, owner in _modules("", module):
        for name, parameter in owner._parameters.items():
            if parameter is None or id(parameter) in ignored:
                continue
            if id(parameter) not in found:
                found[id(parameter)] = Named(plain_name(f"{prefix}{name}"), parameter, [], 1)
            if (owner, name) not in found[id(parameter)].places:
                found[id(parameter)].places.append((owner, name))
    return list(found.values())


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, RaggedTensor) or parameter in _sharded:
        raise ValueError(
            f"{name} is also a parameter of a module that is fully sharded by itself: shard the module that holds both"
        )
    if type(parameter) is not nn.Parameter and type(parameter.data) is not torch.Tensor:
        raise ValueError(f"{name} is a {type(parameter).__name__}: only plain parameters can be sharded so")
    if parameter.dim() == 0:
        raise ValueError(f"{name} is a scalar: make it a tensor of one element")
    if not parameter.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {parameter.stride()} of shape {tuple(parameter.shape)}"
        )
    if parameter.dtype.is_complex:
        raise ValueError(f"{name} is of {parameter.dtype}, which is not sharded")


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for _, owner in _modules("", module):
        for buffer in owner._buffers.values():
            if buffer is not None and not buffer.is_meta and buffer.device.type != device.type:
                buffer.data = buffer.to(device)
