"""``smallreduce.two_level``: collectives that know which ranks are near each other."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce.codecs import Codec, as_int
from smallreduce.collectives import _call
from smallreduce.collectives._agreement import Agreement, prepare_or_refuse
from smallreduce.collectives._all_gather import gather
from smallreduce.collectives._all_reduce import reduce_all
from smallreduce.collectives._channel import Channel, channel_of
from smallreduce.collectives._levels import Levels, node_size_of
from smallreduce.collectives._reduce_scatter import scatter
from smallreduce.collectives._work import Work

__all__ = ["SDP4BIT", "TwoLevel", "two_level"]

SDP4BIT = ("int8-hadamard", "int4-hadamard")
"""The codecs of SDP4Bit (arXiv:2410.15526, section 3.2) inside the node and between nodes."""


class TwoLevel(Levels):
    """A group of ranks in nodes, and its collectives; made by :func:`two_level`.

    ``codecs`` is a pair, inside the node and between nodes, of dense codecs that both have ``hadamard`` or neither; one
    codec stands for both, and None is torch's own collective. What a codec between nodes encodes are the sums of whole
    nodes, which never leave the domain in which the codecs add until the last decode. All ranks end with the same bits
    where they end with the same tensor.

    Where there is one node, its codec and one exchange are all; so it is, with the other codec, where every node has
    one rank. On one rank alone everything is an exact copy.

    Attributes:
        group: The process group.
        node_size, nodes: Ranks of a node, and how many nodes there are.
        node, local_rank: This rank's.
    """

    def __init__(self, group: dist.ProcessGroup, channel: Channel, node_size: int, chunks: int | None) -> None:
        super().__init__(channel, node_size, chunks)
        # Weak: engines hold what they run on, and the channel, which is the group's, holds engines.
        self._group = weakref.ref(group)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError("the process group has been destroyed")
        return group

    def reduce_scatter(
        self,
        out: Tensor,
        x: Tensor,
        codecs: str | Codec | _call.Pair | None = SDP4BIT,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.AVG,
        async_op: bool = False,
        seed: int | None = None,
    ) -> Work | None:
        """As :func:`smallreduce.reduce_scatter`, through an exchange inside each node and one between the nodes
        (SDP4Bit, arXiv:2410.15526, Algorithm 3). There is no error feedback.

        A rank sends ``(node_size - 1) * nodes`` packets of 1/W of ``x`` to its node, and ``nodes - 1`` to other nodes,
        where a flat reduce-scatter sends ``(nodes - 1) * node_size``.

        Raises:
            TypeError, ValueError, RuntimeError: As :func:`smallreduce.reduce_scatter`; ValueError also for codecs that
                cannot follow one another.
        """
        self.channel.check()
        return scatter(out, x, codecs, op, self, self.group, None, async_op, seed)

    def all_gather(
        self, out: Tensor, x: Tensor, codec: str | Codec | None, async_op: bool = False, seed: int | None = None
    ) -> Work | None:
        """As :func:`smallreduce.all_gather`, with each packet sent to each other node once.

        Raises:
            TypeError, ValueError, RuntimeError: As :func:`smallreduce.all_gather`.
        """
        self.channel.check()
        return gather(out, x, codec, self, self.group, async_op, seed)

    def all_reduce(
        self,
        x: Tensor,
        codecs: str | Codec | _call.Pair | None = SDP4BIT,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.AVG,
        async_op: bool = False,
        seed: int | None = None,
    ) -> Work | None:
        """As :func:`smallreduce.all_reduce`, in place: a reduce-scatter and an all-gather of the sums, which the second
        of the codecs encodes. There is no error feedback.

        Raises:
            TypeError, ValueError, RuntimeError: As :func:`smallreduce.all_reduce`.
        """
        self.channel.check()
        return reduce_all(x, codecs, op, self, self.group, None, async_op, seed)


def two_level(
    group: dist.ProcessGroup | None = None,
    node_size: int | None = None,
    chunks: int | None = None,
    device: torch.device | str | None = None,
) -> TwoLevel:
    """The ranks of a group as nodes, for collectives on two levels. All ranks of the group call it together.

    Args:
        group: None is the default group. Its ranks lie node by node: those of the first node come first.
        node_size: Ranks of each node; None: as torchrun has laid them out (``LOCAL_WORLD_SIZE``).
        chunks: Into how many chunks a collective is cut, so that one level works while the other does; None: by its
            size.
        device: Where the tensors will be; None: this process's GPU if the group has NCCL, else the CPU.

    Raises:
        TypeError: A value of another type.
        ValueError: The ranks do not lie in nodes of one size, or the group has no backend for the device.
        RuntimeError: The ranks do not agree.
    """
    own = _call.own_group(group)
    if device is None:
        device = "cuda" if dist.is_initialized() and "nccl" in dist.get_backend_config(own) else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    channel = channel_of(group, place)
    channel.check()

    def prepare() -> int:
        if chunks is not None and as_int(chunks, "chunks") < 1:
            raise ValueError(f"chunks must be at least 1, got {chunks}")
        given = None if node_size is None else as_int(node_size, "node_size")
        return node_size_of(dist.get_process_group_ranks(own), given)

    size = prepare_or_refuse(channel, prepare)
    Agreement(channel, f"two_level in nodes of {size} ranks, in {chunks or 'as many chunks as fit'}").check()
    return TwoLevel(own, channel, size, chunks)
