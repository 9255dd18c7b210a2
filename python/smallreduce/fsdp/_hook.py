"""The communication hook of FSDP1 (``FullyShardedDataParallel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import Codec, PacketCodec, Sign, TopK, as_int
from smallreduce.codecs import codec as parse_codec
from smallreduce.collectives import (
    Channel,
    Count,
    Start,
    agree,
    channel_of,
    engine_for,
    group_of,
    reduce_scatter_for,
    ring_bytes,
)
from smallreduce.collectives._compat import reduce_scatter_single
from smallreduce.fsdp._leg import Leg, borrow
from smallreduce.fsdp._stats import LegStats, Stats

__all__ = ["HookState", "hook"]


class HookState:
    """State of :func:`smallreduce.fsdp.hook`, for ``fsdp1_model.register_comm_hook(state, smallreduce.fsdp.hook)``.

    Args:
        codec: A codec that makes packets and needs no feedback, as ``Sign`` and ``TopK`` do; its spelling; or None:
            exact, the same bits as FSDP without a hook.
        process_group: That of the model; None: the default group.
        seed: Base of the random bits; the same on all ranks.

    Raises:
        ValueError, TypeError: Impossible values.
    """

    def __init__(
        self, codec: Codec | str | None, process_group: dist.ProcessGroup | None = None, *, seed: int = 0
    ) -> None:
        chosen = parse_codec(codec)
        if chosen is not None and not isinstance(chosen, PacketCodec):
            raise TypeError(f"{chosen} makes no packets: it is for all_reduce, the DDP hook and the optimizers")
        if isinstance(chosen, (Sign, TopK)):
            raise ValueError(f"{chosen} is biased, and needs error feedback to train with, which FSDP1's hook has not")
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a ProcessGroup, got {type(process_group).__name__}")
        self._codec = chosen
        self._process_group = process_group
        self._leg = Leg(chosen, as_int(seed, "seed"))
        self._setup = Count()
        self._agreed: Channel | None = None
        self._step = 0

    def __getstate__(self) -> dict[str, Any]:
        """A process group is neither pickled nor copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError("HookState cannot be pickled, since it belongs to a process group")

    def stats(self) -> Stats:
        """What this rank has sent so far."""
        nothing = LegStats(None)
        return Stats(
            group_of(self._process_group).size(),
            1,
            nothing,
            self._leg.stats(),
            nothing,
            0,
            0,
            0,
            self._setup.bytes_sent,
        )

    def state_dict(self) -> dict[str, int]:
        """What the random bits of the next calls depend on: the same on all ranks."""
        return {"seed": self._leg.seed, "step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Takes over what :meth:`state_dict` gave; all ranks call it.

        Raises:
            ValueError: It is none of these, or of another seed.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != {"seed", "step"}:
            raise ValueError(f"the state must have a seed and a step, got {state_dict!r}")
        if state_dict["seed"] != self._leg.seed:
            raise ValueError(f"this state has seed {state_dict['seed']}, but this HookState has {self._leg.seed}")
        self._step = as_int(state_dict["step"], "step")

    def reduce(self, grad: Tensor, output: Tensor | None) -> None:
        """The hook itself; complete when it returns (CUDA: for the current stream)."""
        group, leg = group_of(self._process_group), self._leg
        shard = (grad if output is None else output).nbytes
        uncompressed = ring_bytes(shard, group.size()) if output is None else (group.size() - 1) * shard
        if group.size() == 1 or leg.is_exact(grad.dtype):
            _reduce_exactly(grad, output, group)
            leg.count(uncompressed)
            return
        codec = self._codec
        assert codec is not None
        channel = channel_of(group, grad.device)
        if self._agreed is not channel:
            agree(channel, f"smallreduce.fsdp.hook: codec {codec}, seed {leg.seed}", [], self._setup)
            self._agreed = channel
        if output is not None and grad.numel() != group.size() * output.numel():
            raise ValueError(
                f"the gradient has {grad.numel()} elements for a part of {output.numel()}, but the group of this "
                f"HookState has {group.size()} ranks: give it the model's process_group"
            )
        numel = grad.numel() if output is None else output.numel()
        segments, dtype, start = ((0, numel),), grad.dtype, Start(background=False)
        # Every call is a step of its own: FSDP1 tells neither steps nor modules.
        mean, seed, step = dist.ReduceOp.AVG, leg.seed, self._step
        self._step += 1
        if output is None:
            key = ("fsdp1.all_reduce", segments, codec, dtype)
            whole, give_back = borrow(channel, key, lambda: engine_for(segments, codec, dtype, channel))
            work = whole.launch(grad.view(-1), mean, None, None, seed, 0, step, after=give_back, start=start)
            leg.count(uncompressed, whole.bytes_sent)
        else:
            key = ("fsdp1.reduce_scatter", segments, codec, dtype)
            parts, give_back = borrow(channel, key, lambda: reduce_scatter_for(segments, numel, codec, dtype, channel))
            work = parts.launch(output, grad, mean, None, seed, 0, step, after=give_back, start=start)
            leg.count(uncompressed, parts.bytes_sent)
        work.wait()


def hook(state: HookState, grad: Tensor, output: Tensor | None = None) -> None:
    """Communication hook for ``fsdp1_model.register_comm_hook(HookState(...), hook)``.

    For ``FULL_SHARD``, ``SHARD_GRAD_OP`` and ``NO_SHARD``; torch refuses hooks with the hybrid strategies, for which
    FSDP2 with :func:`smallreduce.fsdp.compress` and ``replicate_group=`` stands in. Register it before the first
    forward pass. Groups do not restart at parameters, which FSDP1 cuts wherever a rank's part ends.

    Args:
        state: One for each model.
        grad: This rank's flat gradient, padded to a part for each rank. With ``NO_SHARD`` it becomes the mean.
        output: Becomes this rank's part of the mean; None with ``NO_SHARD``.

    Raises:
        RuntimeError: The ranks do not agree about the configuration, or a peer died.
    """
    state.reduce(grad, output)


def _reduce_exactly(grad: Tensor, output: Tensor | None, group: dist.ProcessGroup) -> None:
    """What FSDP does without a hook: its bits depend on where it divides."""
    world_size = group.size()
    before = 1
    while world_size % before == 0 and world_size / before > before:
        before *= 2
    if before > 1:
        grad.div_(float(before))
    if output is None:
        dist.all_reduce(grad, group=group)
        output = grad
    else:
        reduce_scatter_single(output, grad, dist.ReduceOp.SUM, group).wait()
    if world_size / before > 1:
        output.div_(world_size / before)
