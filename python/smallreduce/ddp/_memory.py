"""Error-feedback memory of a model: residuals that belong to parameters, wherever DDP puts them.

A kernel sees two flat tensors per bucket and codec: the residual of what this rank sends, and the residual of the
shard that it reduces. DDP rebuilds its buckets after the first iteration, and with them every shard's owner. What stays
is the parameter and its 32-element blocks (docs/wire-formats.md, 1): a bucket is only ever cut between groups of a
parameter, so its residuals move block by block, bit for bit, and what is owed to a parameter is preserved.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from smallreduce._layout import BLOCK


def blocks_of(numel: int) -> int:
    return -(-numel // BLOCK)


@dataclass(frozen=True, order=True)
class Shard:
    """Blocks ``[begin, end)`` of a parameter, whose server residual rank ``owner`` holds."""

    owner: int
    begin: int
    end: int


@dataclass(frozen=True)
class Residuals:
    """The residuals of one parameter that this rank holds.

    Attributes:
        codec: Spelling of the codec, in whose domain the server residual lies.
        numel: Elements of the parameter.
        worker: fp32 of shape (rows, 32 * blocks). Row 0 is the residual, others are what it was (:meth:`Binding.save`).
        shards: Where the server residual lies, on whichever rank; the same on all ranks. None of them where nothing is
            encoded a second time.
        server: For each of ``shards``, fp32 of shape (rows, 32 * its blocks) in the domain in which the codec adds;
            None where another rank holds it.
        momentum: As ``worker``: the momentum of this rank's own gradients, where these are corrected by it before they
            are encoded (DGC); else None.
    """

    codec: str
    numel: int
    worker: torch.Tensor
    shards: tuple[Shard, ...]
    server: tuple[torch.Tensor | None, ...]
    momentum: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.worker
        yield from (tensor for tensor in self.server if tensor is not None)
        if self.momentum is not None:
            yield self.momentum

    def take_over_server(self, old: Residuals, world_size: int) -> None:
        """Adds the server residual that this rank had, of the mean, to its worker's, of which the mean gets a W-th."""
        for shard, values in zip(old.shards, old.server, strict=True):
            if values is not None:
                self.worker[:, BLOCK * shard.begin : BLOCK * shard.end].add_(values, alpha=world_size)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "codec": self.codec,
            "numel": self.numel,
            "worker": self.worker[0, : self.numel].cpu().clone(),
            "shards": [(shard.owner, shard.begin, shard.end) for shard in self.shards],
            "server": [None if tensor is None else tensor[0].cpu().clone() for tensor in self.server],
        }
        if self.momentum is not None:
            state["momentum"] = self.momentum[0, : self.numel].cpu().clone()
        return state

    @staticmethod
    def from_state_dict(
        name: str, state: Mapping[str, Any], rank: int, world_size: int, momentum: bool = False
    ) -> Residuals:
        """Copies what :meth:`state_dict` gave on this rank, with or without a momentum.

        Raises:
            ValueError: It does not hold together; the message has the parameter's name.
        """

        def expect(what: str, given: object, expected: object) -> None:
            if given != expected:
                raise ValueError(f"the saved residuals of {name} have {what} {given}, expected {expected}")

        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state)
        expect("the keys", keys, sorted(["codec", "numel", "server", "shards", "worker"] + ["momentum"] * momentum))
        types = {key: type(state[key]).__name__ for key in ("codec", "numel", "server", "shards")}
        expect("the types", types, {"codec": "str", "numel": "int", "server": "list", "shards": "list"})
        numel = state["numel"]
        blocks = blocks_of(numel)
        try:
            shards = tuple(Shard(*map(operator.index, shard)) for shard in state["shards"])
        except TypeError:
            raise ValueError(f"the saved residuals of {name} have shards that are no triples of integers") from None
        if shards:
            expect("shards that begin at", [s.begin for s in shards] + [blocks], [0] + [s.end for s in shards])
        expect("impossible shards", [s for s in shards if not (0 <= s.owner < world_size and s.begin < s.end)], [])
        expect("a worker's of", _form(state["worker"]), f"torch.float32 {[numel]}")
        if momentum:
            expect("a momentum of", _form(state["momentum"]), f"torch.float32 {[numel]}")
        expect(
            f"a server's on rank {rank} of",
            [_form(tensor) for tensor in state["server"]],
            [f"torch.float32 {[BLOCK * (s.end - s.begin)]}" if s.owner == rank else "NoneType" for s in shards],
        )
        server = tuple(None if tensor is None else tensor.clone().unsqueeze(0) for tensor in state["server"])
        return Residuals(
            state["codec"],
            numel,
            _in_blocks(state["worker"]),
            shards,
            server,
            _in_blocks(state["momentum"]) if momentum else None,
        )


def _in_blocks(values: torch.Tensor) -> torch.Tensor:
    """One row of whole blocks, the last of which is filled up with zeros."""
    row = torch.zeros(1, BLOCK * blocks_of(values.numel()))
    row[0, : values.numel()] = values
    return row


def _form(tensor: object) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__


@dataclass(frozen=True)
class Binding:
    """The flat residuals of some parameters that one kernel call works on.

    Attributes:
        worker: fp32 of shape (rows, 32 * blocks), parameter after parameter.
        server: fp32 of shape (rows, 32 * blocks of this rank's packet).
        momentum: As ``worker``; None without.
        nbytes_moved: Bytes of server residuals that this rank sent to new owners.
        moved: Whether any rank did, so that an all_to_all took place.
    """

    worker: torch.Tensor
    server: torch.Tensor
    momentum: torch.Tensor | None
    nbytes_moved: int
    moved: bool

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.worker, self.server)
        if self.momentum is not None:
            yield self.momentum

    def save(self, row: int) -> None:
        """Keeps the residuals as they are now in one of the rows."""
        for tensor in self.tensors():
            tensor[row].copy_(tensor[0])

    def restore(self, row: int) -> None:
        """Brings back what :meth:`save` kept."""
        for tensor in self.tensors():
            tensor[0].copy_(tensor[row])


def bind(
    memory: dict[str, Residuals],
    numels: Mapping[str, int],
    codec: str,
    packet_blocks: Sequence[int],
    *,
    rows: int,
    device: torch.device,
    group: dist.ProcessGroup,
    with_momentum: bool = False,
) -> Binding:
    """Brings the residuals of some parameters together for one layout; a collective if any shard changes its owner.

    Args:
        memory: Residuals of all parameters by name, updated in place. Parameters not in it start at zero.
        numels: The elements of each parameter of the layout, in its order.
        codec: Spelling of the codec of all of them.
        packet_blocks: The blocks of each packet, in the order of the blocks; packet p is reduced by rank p mod W, whose
            server residual is that of its packets one after the other. Empty: nothing is encoded a second time, so
            there are no server residuals, and what is left of old ones their ranks owe as workers.
        rows: Of the new residuals. The old ones, which move with them, have as many or one, which fills all.
        device: Of the new residuals.
        group: All ranks must call with the same names, sizes, packets, rows, and old shards and rows.
        with_momentum: Keep a momentum beside the worker's residual.
    """
    rank, world_size = group.rank(), group.size()
    counts = [blocks_of(numel) for numel in numels.values()]
    worker = torch.zeros(rows, BLOCK * sum(counts), device=device)
    server = torch.zeros(rows, BLOCK * sum(packet_blocks[rank::world_size]), device=device)
    momentum = torch.zeros_like(worker) if with_momentum else None
    shards_of = _cut(counts, packet_blocks, world_size) if packet_blocks else [()] * len(counts)

    outgoing: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    incoming: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    moved = False
    worker_at = server_at = 0
    for (name, numel), shards in zip(numels.items(), shards_of, strict=True):
        at = slice(worker_at, worker_at + BLOCK * blocks_of(numel))
        worker_at = at.stop
        places: list[torch.Tensor | None] = []
        for shard in shards:
            size = BLOCK * (shard.end - shard.begin) if shard.owner == rank else 0
            places.append(server.narrow(1, server_at, size) if shard.owner == rank else None)
            server_at += size
        kept = None if momentum is None else momentum[:, at]
        new = Residuals(codec, numel, worker[:, at], shards, tuple(places), kept)
        old = memory.get(name)
        if old is not None:
            new.worker.copy_(old.worker)
            if new.momentum is not None and old.momentum is not None:
                new.momentum.copy_(old.momentum)
            if not packet_blocks:
                new.take_over_server(old, world_size)
            for source, target, begin, end in _overlaps(old.shards, new.shards):
                moved |= old.shards[source].owner != new.shards[target].owner
                values = _blocks(old, source, begin, end)
                place_of_values = _blocks(new, target, begin, end)
                if values is not None and place_of_values is not None:
                    place_of_values.copy_(values)
                elif values is not None:
                    outgoing[new.shards[target].owner].append(values.expand(rows, -1))
                elif place_of_values is not None:
                    incoming[old.shards[source].owner].append(place_of_values)
        memory[name] = new

    nbytes_moved = _exchange(outgoing, incoming, device, group) if moved else 0
    return Binding(worker, server, momentum, nbytes_moved, moved)


def _cut(counts: Sequence[int], packet_blocks: Sequence[int], world_size: int) -> list[tuple[Shard, ...]]:
    """The shards of parameters of ``counts`` blocks each, laid end to end and cut into packets."""
    ends = list(itertools.accumulate(packet_blocks))
    shards_of = []
    packet = first = 0
    for count in counts:
        shards = []
        begin = 0
        while begin < count:
            while ends[packet] <= first + begin:
                packet += 1
            end = min(count, ends[packet] - first)
            shards.append(Shard(packet % world_size, begin, end))
            begin = end
        shards_of.append(tuple(shards))
        first += count
    return shards_of


def _overlaps(old: Sequence[Shard], new: Sequence[Shard]) -> Iterator[tuple[int, int, int, int]]:
    """Each run of blocks that lies in one old and one new shard: their numbers, its first block and its end."""
    source = target = begin = 0
    while source < len(old) and target < len(new):
        end = min(old[source].end, new[target].end)
        yield source, target, begin, end
        source += end == old[source].end
        target += end == new[target].end
        begin = end


def _blocks(residuals: Residuals, shard: int, begin: int, end: int) -> torch.Tensor | None:
    """Blocks ``[begin, end)`` of the parameter, which lie in the given shard; None if another rank holds it."""
    tensor = residuals.server[shard]
    if tensor is None:
        return None
    return tensor.narrow(1, BLOCK * (begin - residuals.shards[shard].begin), BLOCK * (end - begin))


def _exchange(
    outgoing: Mapping[int, Sequence[torch.Tensor]],
    incoming: Mapping[int, Sequence[torch.Tensor]],
    device: torch.device,
    group: dist.ProcessGroup,
) -> int:
    """Sends tensors to ranks, fills those that come from ranks; returns the bytes sent."""
    ranks = range(group.size())
    send_sizes = [sum(tensor.numel() for tensor in outgoing.get(rank, ())) for rank in ranks]
    receive_sizes = [sum(tensor.numel() for tensor in incoming.get(rank, ())) for rank in ranks]
    send = torch.cat(
        [torch.empty(0, device=device)]
        + [tensor.to(device).reshape(-1) for rank in ranks for tensor in outgoing.get(rank, ())]
    )
    receive = torch.empty(sum(receive_sizes), device=device)
    dist.all_to_all_single(receive, send, receive_sizes, send_sizes, group=group)
    places = [tensor for rank in ranks for tensor in incoming.get(rank, ())]
    for place, values in zip(places, torch.split(receive, [place.numel() for place in places]), strict=True):
        place.copy_(values.view(place.shape))
    return send.numel() * send.element_size()
