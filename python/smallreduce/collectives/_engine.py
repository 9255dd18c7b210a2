"""What the engines of all collectives have in common, and the engine of the compressed all-reduce.

An engine is bound once to segments, a codec and a group. :class:`AllReduce` cuts a bucket of segments into
``chunks * W`` packets. Chunk c is the packets ``c * W`` to ``(c + 1) * W``, one for each rank: exchanged by one
all-to-all, reduced into one packet on each rank, collected by one all-gather, decoded. While one chunk is on the wire,
others are in the kernels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from smallreduce import ops
from smallreduce._layout import BLOCK, Format, Layout
from smallreduce._native import native
from smallreduce.codecs import IntQuant, PacketCodec
from smallreduce.collectives._channel import IN_BACKGROUND, Channel, Stages, Start
from smallreduce.collectives._links import Exchange
from smallreduce.collectives._work import Work

__all__ = [
    "AllReduce",
    "BucketEngine",
    "Engine",
    "PartSegments",
    "Parts",
    "PerRank",
    "Segments",
    "chunk_count",
    "cut",
    "cut_parts",
    "factor_of",
    "packets_of",
    "stage_seed",
]

Segments = Sequence[tuple[int, int]]
"""``(offset, length)`` in elements of a flat buffer."""


@dataclass(frozen=True)
class PerRank:
    """Segments that are not those of every rank's part: ``of[r]``, of rank r's, counts from the beginning of it."""

    of: tuple[tuple[tuple[int, int], ...], ...]


Chunks = Sequence[Sequence[Segments]]
PartSegments = Segments | PerRank
"""Segments of one rank's part: of every rank's, or each its own."""

# Elements of a chunk at the most, between two ranks. Each chunk costs handing-over between threads, gloo's and ours,
# which weighs where the link is fast; several in flight keep a slow link busy while the kernels run. More ranks take
# smaller ones, a quarter from four on: their connections drift apart, and a chunk waits for the slowest. Sparse packets
# are counted by their bytes instead, since these are what the wire and all kernels but the first have to do with.
CHUNK_NUMEL = 1 << 22


def chunk_count(numel: int, world_size: int, codec: PacketCodec) -> int:
    """Into how many chunks a collective on ``numel`` elements is cut: the same on all ranks."""
    load = codec.packet_nbytes(numel) if codec.format.is_sparse else numel
    return max(1, -(-load * min(world_size, 4) ** 2 // (4 * CHUNK_NUMEL)))


def cut(segments: Segments, pieces: int, grain: int) -> list[Segments]:
    """Cuts segments, laid end to end, into so many pieces of about one size, each segment at multiples of ``grain``
    elements, so that where these are whole groups a cut changes no code. A sparse codec selects in each on its own."""
    layout = Layout.build(segments, Format(IntQuant(8).format.kind, grain, False, False), torch.float32, pieces)
    found: list[list[tuple[int, int]]] = [[] for _ in range(pieces)]
    for offset, length, piece in layout.runs():
        found[piece].append((offset, length))
    return [piece or [(0, 0)] for piece in found]


def packets_of(pieces: Sequence[Segments], codec: PacketCodec, dtype: torch.dtype) -> Layout:
    """The layout in which each piece is a packet."""
    spans = [span for piece in pieces for span in piece]
    packet_of = [packet for packet, piece in enumerate(pieces) for _ in piece]
    return Layout.build(spans, codec.format, dtype, len(pieces), packet_of)


class Parts:
    """Each rank's part of a buffer of ``world_size * numel`` elements, cut into chunks: the packets of one format.

    Args:
        numel: Elements of a part.
        chunks: Of each rank's part: the segments of each chunk, counted from the beginning of the part; blocks and
            groups start afresh at each segment. As many for all ranks.
        codec, dtype: Of the packets.
    """

    def __init__(
        self, numel: int, chunks: Sequence[Sequence[Segments]], codec: PacketCodec, dtype: torch.dtype
    ) -> None:
        shifted = [
            [(rank * numel + offset, length) for offset, length in chunk]
            for rank, part in enumerate(chunks)
            for chunk in part
        ]
        self._whole = packets_of(shifted, codec, dtype)
        self._parts = {id(part): packets_of(part, codec, dtype) for part in chunks}
        self._part_of = [self._parts[id(part)] for part in chunks]
        self._ranks = len(chunks)
        self._chunks = len(chunks[0])
        self.blocks = self._whole.blocks

    def of_ranks(self, ranks: Iterable[int], chunk: int) -> Layout:
        """One chunk of the parts of some ranks, over the whole buffer; packets in the order of ``ranks``."""
        return self._whole.select([rank * self._chunks + chunk for rank in ranks])

    def of_one(self, rank: int, chunk: int) -> Layout:
        """One chunk of a rank's part, over a buffer of that part."""
        return self._part_of[rank].select([chunk])

    def stride(self, chunk: int) -> int:
        """Bytes of the largest packet of a chunk, of all ranks."""
        return self.of_ranks(range(self._ranks), chunk).stride


def cut_parts(segments: PartSegments, world_size: int, pieces: int | None, codec: PacketCodec, grain: int) -> Chunks:
    """Cuts each rank's part into so many pieces, None: by its size; see :func:`cut`."""
    each = segments.of if isinstance(segments, PerRank) else (segments,)
    if isinstance(segments, PerRank) and len(each) != world_size:
        raise ValueError(f"there must be segments for each of {world_size} ranks, got {len(each)}")
    if pieces is None:
        longest = max(sum(length for _, length in part) for part in each)
        pieces = chunk_count(world_size * longest, world_size, codec)
    chunks = [cut(part, pieces, grain) for part in each]
    return chunks if isinstance(segments, PerRank) else chunks * world_size


def factor_of(op: dist.ReduceOp.RedOpType, world_size: int) -> float:
    """What a sum over ranks is multiplied by for SUM or AVG."""
    return 1.0 / world_size if op == dist.ReduceOp.AVG else 1.0


def stage_seed(base: int, bucket: int, rank: int, stage: int) -> int:
    """Seed of one rank's packets in one stage (docs/wire-formats.md, section 6)."""
    mask = (1 << 64) - 1
    mixed: int = native.mix64(native.mix64(native.mix64(base & mask) ^ bucket) ^ (2 * rank + stage))
    return mixed


class Engine(Stages):
    """What the engines have in common: buffers for packets, and that one call runs at a time.

    Args:
        channel: Of the group.
        sizes: For each chunk, the bytes that its packets take.

    Attributes:
        nbytes: Of the buffers for packets.
    """

    def __init__(self, channel: Channel, sizes: Sequence[int]) -> None:
        self.channel = channel
        self.chunks = len(sizes)
        self.nbytes = 0
        self._sent = self._buffers(sizes)
        self._busy = False
        self._after: Callable[[], None] | None = None

    def _buffers(self, sizes: Sequence[int]) -> list[Tensor]:
        # Zeros, since a packet shorter than the stride leaves the rest as it is, and all of it travels.
        with torch.inference_mode(False):  # the engine may be used again outside of one
            whole = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.channel.device)
        self.channel.use(whole)
        self.nbytes += whole.nbytes
        return list(whole.split(list(sizes)))

    def _claim(self, after: Callable[[], None] | None, *tensors: Tensor | None) -> None:
        self.channel.check()
        if self._busy:
            raise RuntimeError(f"this engine's {self.name} is still in flight; wait for it before the next")
        self.channel.use(*tensors)
        self._busy = True
        self._after = after

    def done(self) -> None:
        after, self._after, self._busy = self._after, None, False
        if after is not None:
            after()

    def _step(self, step: int | Tensor) -> Tensor:
        if not isinstance(step, Tensor):
            step = torch.full((), step, dtype=torch.int64, device=self.channel.device)
        self.channel.use(step)
        return step


class BucketEngine(Engine):
    """An engine that all-reduces the segments of a flat buffer in place: what ``all_reduce`` and the DDP hook call.

    Attributes:
        collectives: Of torch's, that one call issues.
        is_sparse: Whether packets name the elements that they hold.
        bytes_sent: Payload that this rank sends in one call; where that is not always the same, in the latest.
        worker_numel: Elements of the worker's residual (fp32, block order of the segments: element j of block b at
            ``32 * b + j``).
        server_numel: Elements of the server's residual (fp32; in the codec's domain). 0 where nothing is encoded a
            second time.
        server_origins: int64, for each block of the server's residual, the block of the bucket that it stands for.
    """

    name = "all_reduce"
    collectives: int
    is_sparse = False
    bytes_sent: int
    worker_numel: int
    server_numel = 0
    server_origins = torch.empty(0, dtype=torch.int64)

    @property
    def packet_blocks(self) -> list[int]:
        """The blocks of each packet of which a rank encodes the sum again, in the order of the blocks; packet p is that
        of rank p mod W. Empty where nothing is encoded a second time."""
        return []

    def launch(
        self,
        buffer: Tensor,
        op: dist.ReduceOp.RedOpType,
        worker: Tensor | None = None,
        server: Tensor | None = None,
        seed: int = 0,
        bucket: int = 0,
        step: int | Tensor = 0,
        masked: Tensor | None = None,
        value: Tensor | None = None,
        after: Callable[[], None] | None = None,
        start: Start = IN_BACKGROUND,
    ) -> Work:
        """Starts the all-reduce of ``buffer``; its segments hold the result when the Work is done.

        Args:
            buffer: Flat, contiguous; not to be touched until then.
            op: SUM or AVG.
            worker, server: Residuals, read and replaced; None: no feedback on that side.
            seed, bucket, step: What the random bits depend on, beside rank and stage; the same on all ranks. ``step``
                may be an int64 tensor of one element on the buffer's device.
            masked: With sparse packets: laid out as the worker's residual, set to zero at the elements that this rank
                sends, before this returns.
            value: What the Work's future gives; None: ``buffer``.
            after: Called when the result stands in the buffer and the engine is free, before the Work completes.
            start: How.
        """
        if masked is not None and not self.is_sparse:
            raise ValueError("what is sent can be masked with sparse packets only")
        self._claim(after, buffer, worker, server, masked)
        self._buffer = buffer
        self._factor = factor_of(op, self.channel.world_size)
        self._worker = worker
        self._masked = masked
        self._prepare(server, seed, bucket, step)
        work = Work(buffer if value is None else value, self.bytes_sent)
        self.channel.run(self, work, start)
        return work

    @abstractmethod
    def _prepare(self, server: Tensor | None, seed: int, bucket: int, step: int | Tensor) -> None:
        """Takes what else :meth:`launch` was given, before the stages begin."""

    def _mask(self, packets: Tensor, layout: Layout) -> None:
        """Called with packets of this rank when they are encoded."""
        if self._masked is not None:
            ops.clear(packets, layout.by_origin, self._masked)

    def done(self) -> None:
        del self._buffer, self._worker, self._masked  # an idle engine keeps no one's tensors alive
        super().done()


class AllReduce(BucketEngine):
    """All-reduce through packets that are split among the ranks: each reduces its part and encodes the sum again. For
    dense codecs, and for sparse ones where the packets of all ranks would be too many for each.

    Args:
        segments: ``(offset, length)`` in elements of the buffer. The same on all ranks.
        codec: The wire format.
        dtype: Of the buffer.
        channel: ``channel_of(group, device)``.

    Attributes:
        layout: All packets of the bucket.
    """

    def __init__(
        self, segments: Sequence[tuple[int, int]], codec: PacketCodec, dtype: torch.dtype, channel: Channel
    ) -> None:
        world = channel.world_size
        chunks = chunk_count(sum(length for _, length in segments), world, codec)
        self.layout = Layout.build(segments, codec.format, dtype, packets=chunks * world)
        self._layouts = [self.layout.select(range(c * world, (c + 1) * world)) for c in range(chunks)]
        self._shards = [layout.select([channel.rank]) for layout in self._layouts]
        strides = [layout.stride for layout in self._layouts]
        sizes = [world * stride for stride in strides]
        super().__init__(channel, sizes)
        self._received = self._buffers(sizes)
        self.worker_numel = BLOCK * self.layout.blocks
        server_numels = [BLOCK * shard.blocks for shard in self._shards]
        self._server_numels = server_numels
        self.server_numel = sum(server_numels)
        self.server_origins = torch.cat([shard.block_origins() for shard in self._shards])
        self.collectives = 2 * chunks
        self.is_sparse = codec.format.is_sparse
        self.bytes_sent = 2 * (world - 1) * sum(strides)

    @property
    def packet_blocks(self) -> list[int]:
        return list(self.layout.packet_blocks)

    def _prepare(self, server: Tensor | None, seed: int, bucket: int, step: int | Tensor) -> None:
        none: list[Tensor | None] = [None] * self.chunks
        self._servers = none if server is None else list(server.split(self._server_numels))
        self._seeds = [stage_seed(seed, bucket, self.channel.rank, stage) for stage in (0, 1)]
        self._at_step = self._step(step)

    def encode(self, chunk: int) -> None:
        ops.encode(self._buffer, self._layouts[chunk], self._sent[chunk], self._worker, self._seeds[0], self._at_step)
        self._mask(self._sent[chunk], self._layouts[chunk])

    def send(self, chunk: int, tag: int) -> Exchange:
        return self.channel.links.all_to_all(self._received[chunk], self._sent[chunk], tag)

    def turn(self, chunk: int, tag: int) -> Exchange:
        # What was sent has arrived, so its buffer takes the reduced packets.
        stride = self._layouts[chunk].stride
        gathered = self._sent[chunk]
        mine = gathered[self.channel.rank * stride :][:stride]
        ops.reduce_encode(
            self._received[chunk], stride, self.channel.world_size, self._factor, self._shards[chunk], mine,
            self._servers[chunk], self._seeds[1], self._at_step, self.channel.error,
        )  # fmt: skip
        return self.channel.links.all_gather(gathered, mine, tag, second=True)

    def finish(self, chunk: int) -> None:
        ops.decode(self._sent[chunk], self._layouts[chunk], self._buffer, self.channel.error)

    def done(self) -> None:
        del self._servers
        super().done()
