"""The communication hook and its registration."""

# DDP compares the hook's annotations with the types themselves, so they must not become strings here:
# no `from __future__ import annotations`.

import torch
import torch.distributed as dist
from torch.amp.grad_scaler import GradScaler  # torch.amp exports it from 2.13 on
from torch.nn.parallel import DistributedDataParallel

from smallreduce.codecs import Codec
from smallreduce.collectives import Channel, channel_of, prepare_or_refuse
from smallreduce.ddp._policy import CodecFor
from smallreduce.ddp._state import HookState


def hook(
    state: HookState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Communication hook for ``ddp_model.register_comm_hook(HookState(...), hook)``.

    Args:
        state: One for each DDP model.
        bucket: Dense gradients; fp32, bf16 and fp16 can be compressed, other dtypes are exact by default.

    Returns:
        A future of the bucket's own buffer, holding the mean over the ranks: the same bits on every rank.

    Raises:
        RuntimeError: The ranks do not agree about the configuration or the buckets, or a peer died; or a CUDA graph is
            being captured; or a ``scaler`` is used under ``join()``.
        TypeError: Sparse gradients, or a codec for a dtype that it does not take.
        ValueError: The residuals that were loaded are not of this model and these codecs.
    """
    return state.reduce(bucket)


def register(
    ddp: DistributedDataParallel,
    codec: Codec | str | None,
    *,
    codec_for: CodecFor | None = None,
    feedback: bool = True,
    warmup_steps: int = 0,
    scaler: GradScaler | None = None,
    seed: int = 0,
    measure_every: int = 100,
) -> HookState:
    """Compresses the gradients that a DDP model reduces. Every rank calls it, before the first backward pass.

        ddp_model = torch.nn.parallel.DistributedDataParallel(model)
        state = smallreduce.ddp.register(ddp_model, "int4")
        ...
        print(state.stats())

    Args:
        ddp: The model; no other communication hook may be registered on it.
        codec, codec_for, feedback, warmup_steps, scaler, seed, measure_every: See :class:`HookState`. ``codec_for``
            gets the parameters' names in ``ddp.module``.

    Returns:
        The state: ``stats()``, ``state_dict()``, ``load_state_dict()``.

    Raises:
        RuntimeError: Another rank refused its arguments, or has others.
        ValueError, TypeError: Impossible values.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(f"ddp must be a DistributedDataParallel module, got {type(ddp).__name__}")
    state = prepare_or_refuse(
        channel_of_model(ddp),
        lambda: HookState(
            codec,
            module=ddp,
            codec_for=codec_for,
            feedback=feedback,
            warmup_steps=warmup_steps,
            scaler=scaler,
            seed=seed,
            measure_every=measure_every,
        ),
    )
    register_state(ddp, state)
    return state


def register_state(ddp: DistributedDataParallel, state: HookState) -> None:
    """Registers a state on the model that it was made for, once the ranks agree about it.

    Raises:
        RuntimeError: They do not, or the model has a hook.
    """
    state.agree(reduced_parameters(ddp))
    try:
        ddp.register_comm_hook(state, hook)
    except RuntimeError as error:
        raise RuntimeError(
            "smallreduce's communication hook could not be registered. A DistributedDataParallel module takes one "
            "hook, once: smallreduce.ddp.register, smallreduce.optim.DGC or another. Wrap the model anew for a second"
        ) from error


def reduced_parameters(ddp: DistributedDataParallel) -> list[torch.Tensor]:
    """Those whose gradients go through the hook, as far as is known before the first backward pass."""
    ignored = ddp.parameters_to_ignore
    return [p for name, p in ddp.module.named_parameters() if p.requires_grad and name not in ignored]


def channel_of_model(ddp: DistributedDataParallel) -> Channel | None:
    """On which the ranks of a model agree about its hook; None where there is nothing to agree about."""
    group: dist.ProcessGroup = ddp.process_group
    parameters = reduced_parameters(ddp)
    return channel_of(group, parameters[0].device) if parameters and group.size() > 1 else None
