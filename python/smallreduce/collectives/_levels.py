"""Ranks in nodes: the wires inside a node and those between nodes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from smallreduce.codecs import PacketCodec
from smallreduce.collectives._channel import Channel
from smallreduce.collectives._links import Links

__all__ = ["Levels", "Route", "grain_of", "node_size_of"]


class Levels:
    """A group as ``nodes`` nodes of ``node_size`` ranks each: rank ``node * node_size + local_rank``.

    All ranks of the group make it together; the wires are kept for the next time.

    Args:
        channel: Of the whole group.
        node_size: A divisor of its size.
        chunks: Into how many chunks a collective is cut; None: by its size.

    Attributes:
        is_flat: There is one node, or one rank in each, so one exchange does.
        intra: The wires among the ranks of this node, by local rank; unless ``is_flat``.
        inter: Those among the ranks with this local rank, by node; unless ``is_flat``.
    """

    intra: Links
    inter: Links

    def __init__(self, channel: Channel, node_size: int, chunks: int | None = None) -> None:
        self.channel = channel
        self.node_size = node_size
        self.nodes = channel.world_size // node_size
        self.node, self.local_rank = divmod(channel.rank, node_size)
        self.chunks = chunks
        self.is_flat = node_size == 1 or self.nodes == 1
        if not self.is_flat:
            if node_size not in channel.levels:
                mates = range(self.node * node_size, (self.node + 1) * node_size)
                intra = channel.subset(mates, f"{node_size}intra{self.node}")
                inter = channel.subset(self.counterparts, f"{node_size}inter{self.local_rank}")
                channel.levels[node_size] = (intra, inter)
            self.intra, self.inter = channel.levels[node_size]

    @property
    def order(self) -> list[int]:
        """All ranks, those of one local rank together: the order in which packets lie, so that what is for one rank of
        the node, or comes from it, is contiguous."""
        return [node * self.node_size + local for local in range(self.node_size) for node in range(self.nodes)]

    @property
    def counterparts(self) -> list[int]:
        """The ranks with this local rank, one of each node."""
        return [node * self.node_size + self.local_rank for node in range(self.nodes)]

    def one_of(self, codecs: tuple[PacketCodec, PacketCodec]) -> PacketCodec:
        """The codec of the only exchange, where one does: that inside the node if there is but one node."""
        return codecs[0] if self.nodes == 1 else codecs[1]


def grain_of(codecs: tuple[PacketCodec, PacketCodec]) -> int:
    """Elements at whose multiples a segment may be cut without changing a code of either codec.

    Raises:
        ValueError: The codecs cannot follow one another.
    """
    intra, inter = (codec.format for codec in codecs)
    for name, format in (("intra", intra), ("inter", inter)):
        if format.is_sparse:
            raise ValueError(f"two levels take dense codecs, got a sparse one for {name}")
    if intra.hadamard != inter.hadamard:
        given = " and ".join(map(str, codecs))
        raise ValueError(
            f"between the levels sums stay in the domain in which the codecs add: both with hadamard or neither, got "
            f"{given}"
        )
    return math.lcm(intra.group, inter.group)


def node_size_of(members: Sequence[int], given: int | None) -> int:
    """Ranks of each node.

    Args:
        members: The global ranks of the group, by rank.
        given: By the user; None: what torchrun has set.

    Raises:
        ValueError: The ranks do not lie in nodes of one size, one node after the other, or it is not known.
    """
    world_size = len(members)
    if given is not None:
        if given < 1 or world_size % given:
            raise ValueError(f"node_size must divide the {world_size} ranks of the group, got {given}")
        return given
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            "node_size is not given, and LOCAL_WORLD_SIZE, which torchrun sets, is "
            + (f"{text!r}" if text else "not set")
        )
    nodes = [rank // int(text) for rank in members]
    node_size = nodes.count(nodes[0])
    in_nodes = [nodes[i : i + node_size] for i in range(0, world_size, node_size)]
    if any(len(set(part)) != 1 or len(part) != node_size for part in in_nodes) or len(set(nodes)) != len(in_nodes):
        raise ValueError(
            f"two levels need nodes with the same number of ranks, one node after the other; with {text} ranks a node "
            f"the group's ranks lie on nodes {', '.join(map(str, nodes))}"
        )
    return node_size


Route = Channel | Levels
"""What a collective runs on: one level or two."""
