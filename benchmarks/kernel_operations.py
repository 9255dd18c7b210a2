"""What ``kernels.py`` times: calls of the kernels, with the buffers that they need, and checks of what they wrote."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import smallreduce as sr
from error_bounds import error_bound
from smallreduce import ops
from smallreduce._layout import BLOCK, Layout

RANKS = 4  # whose packets are reduced
CHECK_PART_NUMEL = 1_000_000  # at a time, to save memory


class Operations:
    """Some kernels on one tensor ``x``, with every buffer they need.

    Attributes:
        error: The word in which kernels on CUDA report a refused packet; None on the CPU.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.error = torch.zeros(1, dtype=torch.int32, device=x.device) if x.is_cuda else None

    def calls(self) -> dict[str, Callable[[], None]]:
        raise NotImplementedError

    def codec_of(self, operation: str) -> str:
        raise NotImplementedError

    def bits_of(self, operation: str) -> float:
        """Per element of the packet that is read or written."""
        raise NotImplementedError

    def uncompressed_nbytes(self, operation: str) -> int:
        return self.x.nbytes

    def moved_nbytes(self, operation: str) -> int:
        raise NotImplementedError

    def reset(self) -> None:
        """What an operation reads and writes, to what it was at first."""
        raise NotImplementedError

    def written(self, operation: str) -> list[Tensor]:
        raise NotImplementedError

    def check(self) -> None:
        """Raises AssertionError unless the calls, made at least once, wrote what the formats promise."""
        raise NotImplementedError

    def check_error(self) -> None:
        if self.error is not None and self.error.item() != 0:
            raise AssertionError(f"{', '.join(map(self.codec_of, self.calls()))}: a packet was refused")

    def results(self) -> dict[str, Tensor]:
        """What each operation makes of the first state, on the CPU, as bytes."""
        made: dict[str, Tensor] = {}
        for name, call in self.calls().items():
            self.reset()
            call()
            made[name] = torch.cat([tensor.flatten().view(torch.uint8) for tensor in self.written(name)]).cpu()
        self.check_error()
        return made


class Buffers(Operations):
    """The five operations of one codec on one dtype."""

    def __init__(self, codec: sr.PacketCodec, x: Tensor) -> None:
        super().__init__(x)
        self.codec = codec
        numel, device = x.numel(), x.device
        self.layout = Layout.build([(0, numel)], codec.format, x.dtype)
        self.nbytes = self.layout.stride
        padded = BLOCK * self.layout.blocks
        self.packet = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        self.of_ranks = torch.zeros(RANKS, self.nbytes, dtype=torch.uint8, device=device)
        self.reduced = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        self.residual = torch.zeros(padded, device=device)
        self.server_residual = torch.zeros(padded, device=device)
        self.decoded = torch.zeros_like(x)
        self.mean = torch.zeros_like(x)
        for rank in range(RANKS):
            ops.encode(x.roll(rank), self.layout, self.of_ranks[rank], seed=rank)

    def calls(self) -> dict[str, Callable[[], None]]:
        reduced = (self.of_ranks.view(-1), self.nbytes, RANKS, 1 / RANKS, self.layout)
        return {
            "encode": lambda: ops.encode(self.x, self.layout, self.packet, seed=1),
            "encode+residual": lambda: ops.encode(self.x, self.layout, self.packet, self.residual, seed=1),
            "decode": lambda: ops.decode(self.of_ranks[0], self.layout, self.decoded, self.error),
            "reduce": lambda: ops.reduce(*reduced, self.mean, self.error),
            "reduce+encode": lambda: ops.reduce_encode(
                *reduced, self.reduced, self.server_residual, seed=1, error=self.error
            ),
        }

    def codec_of(self, operation: str) -> str:
        return str(self.codec)

    def bits_of(self, operation: str) -> float:
        return self.codec.bits_per_element

    def moved_nbytes(self, operation: str) -> int:
        elements, packet, residual = self.x.nbytes, self.nbytes, self.residual.nbytes
        return {
            "encode": elements + packet,
            "encode+residual": elements + packet + 2 * residual,
            "decode": packet + elements,
            "reduce": RANKS * packet + elements,
            "reduce+encode": (RANKS + 1) * packet + 2 * residual,
        }[operation]

    def reset(self) -> None:
        self.residual.zero_()
        self.server_residual.zero_()

    def written(self, operation: str) -> list[Tensor]:
        return {
            "encode": [self.packet],
            "encode+residual": [self.packet, self.residual],
            "decode": [self.decoded],
            "reduce": [self.mean],
            "reduce+encode": [self.reduced, self.server_residual],
        }[operation]

    def check(self) -> None:
        check_decoded(self.codec, self.x, self.decoded)


class ShardedBuffers(Operations):
    """What sharded training adds, as SDP4Bit has it: ``x`` are the weights, and the gradients' elements as many."""

    READ, WRITTEN = sr.IntQuant(8, hadamard=True), sr.IntQuant(4, hadamard=True)
    DIFFERENCE = sr.IntQuant(4, group=2048, rounding="nearest")

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        device, segments = x.device, [(0, x.numel())]
        read, into, weights = (
            Layout.build(segments, codec.format, x.dtype) for codec in (self.READ, self.WRITTEN, self.DIFFERENCE)
        )
        self.read, self.into, self.weights = read, into, weights
        self.plain = Layout.build(segments, self.DIFFERENCE.format, torch.float32)
        self.of_ranks = torch.zeros(RANKS, read.stride, dtype=torch.uint8, device=device)
        self.reduced = torch.zeros(into.stride, dtype=torch.uint8, device=device)
        self.difference = torch.zeros(weights.stride, dtype=torch.uint8, device=device)
        self.new = x.float() + 0.01 * x.float().roll(1)
        self.added = x.clone()
        for rank in range(RANKS):
            ops.encode(x.roll(rank), read, self.of_ranks[rank], seed=rank)
        ops.encode_difference(self.new, x, weights, self.difference)

    def calls(self) -> dict[str, Callable[[], None]]:
        def reduce_encode(ranks: int) -> None:
            packets = self.of_ranks.view(-1)
            ops.reduce_encode(
                packets, self.read.stride, ranks, 1 / ranks, self.read, self.reduced, seed=1, error=self.error,
                into=self.into,
            )  # fmt: skip

        return {
            "reduce+encode of 2": lambda: reduce_encode(2),
            "reduce+encode of 4": lambda: reduce_encode(4),
            "encode difference": lambda: ops.encode_difference(self.new, self.x, self.weights, self.difference),
            "decode+add": lambda: ops.decode_add(self.difference, self.weights, self.added, self.error),
        }

    def codec_of(self, operation: str) -> str:
        return f"{self.READ} to {self.WRITTEN}" if operation.startswith("reduce") else str(self.DIFFERENCE)

    def bits_of(self, operation: str) -> float:
        return (self.WRITTEN if operation.startswith("reduce") else self.DIFFERENCE).bits_per_element

    def uncompressed_nbytes(self, operation: str) -> int:
        return self.x.nbytes + (self.new.nbytes if operation == "encode difference" else 0)

    def moved_nbytes(self, operation: str) -> int:
        return {
            "reduce+encode of 2": 2 * self.read.stride + self.into.stride,
            "reduce+encode of 4": 4 * self.read.stride + self.into.stride,
            "encode difference": self.new.nbytes + self.x.nbytes + self.weights.stride,
            "decode+add": self.weights.stride + 2 * self.x.nbytes,
        }[operation]

    def reset(self) -> None:
        self.added.copy_(self.x)

    def written(self, operation: str) -> list[Tensor]:
        if operation.startswith("reduce"):
            return [self.reduced]
        return [self.difference if operation == "encode difference" else self.added]

    def check(self) -> None:
        """What is encoded is what encode makes of the difference, what is added the sum rounded once, and the packet of
        int4 as far from the mean as the format allows."""
        plain, decoded = torch.zeros_like(self.difference), torch.zeros_like(self.new)
        ops.encode(self.new - self.x.float(), self.plain, plain)
        ops.decode(plain, self.plain, decoded, self.error)
        header = 16  # which names the dtype
        if not torch.equal(self.difference[header:], plain[header:]):
            raise AssertionError(f"{self.DIFFERENCE}: not the packet of the difference")
        self.reset()
        ops.decode_add(self.difference, self.weights, self.added, self.error)
        if not torch.equal(self.added, (self.x.float() + decoded).to(self.x.dtype)):
            raise AssertionError(f"{self.DIFFERENCE}: not the sum of what was held and what was decoded")
        if self.x.dtype == torch.float32:  # another would round the mean as well
            mean, reduced = torch.zeros_like(self.x), torch.zeros_like(self.x)
            ops.reduce(self.of_ranks.view(-1), self.read.stride, RANKS, 1 / RANKS, self.read, mean, self.error)
            self.calls()[f"reduce+encode of {RANKS}"]()
            ops.decode(self.reduced, self.into, reduced, self.error)
            check_distance(self.WRITTEN, mean, reduced)


class RoundedBuffers(Operations):
    """Packets of an fp32 buffer as it is once cast to the dtype of ``x``, in one pass and in two."""

    def __init__(self, codec: sr.PacketCodec, x: Tensor) -> None:
        super().__init__(x)
        self.codec = codec
        self.layout = Layout.build([(0, x.numel())], codec.format, x.dtype)
        self.original = x.float() + 0.001 * x.float().roll(1)
        self.cast = torch.zeros_like(x)
        self.packet, self.packet_of_cast = torch.zeros(2, self.layout.stride, dtype=torch.uint8, device=x.device)

    def calls(self) -> dict[str, Callable[[], None]]:
        def cast_and_encode() -> None:
            self.cast.copy_(self.original)
            ops.encode(self.cast, self.layout, self.packet_of_cast, seed=1)

        return {
            "encode rounded": lambda: ops.encode_rounded(self.original, self.layout, self.packet, seed=1),
            "cast, encode": cast_and_encode,
        }

    def codec_of(self, operation: str) -> str:
        return str(self.codec)

    def bits_of(self, operation: str) -> float:
        return self.codec.bits_per_element

    def uncompressed_nbytes(self, operation: str) -> int:
        return self.original.nbytes

    def moved_nbytes(self, operation: str) -> int:
        between = 2 * self.cast.nbytes if operation == "cast, encode" else 0
        return self.original.nbytes + between + self.layout.stride

    def reset(self) -> None:
        """Each call writes all that it reads but the input."""

    def written(self, operation: str) -> list[Tensor]:
        return [self.packet_of_cast if operation == "cast, encode" else self.packet]

    def check(self) -> None:
        if not torch.equal(self.packet, self.packet_of_cast):
            raise AssertionError(f"{self.codec} of {self.x.dtype}: not the packet of the buffer after the cast")


def check_decoded(codec: sr.PacketCodec, x: Tensor, decoded: Tensor) -> None:
    """Raises AssertionError unless ``decoded`` is what ``codec`` promises of ``x``."""
    if isinstance(codec, sr.TopK):
        check_selection(codec, x, decoded)
    else:
        check_distance(codec, x, decoded)


def check_selection(codec: sr.TopK, x: Tensor, decoded: Tensor) -> None:
    """Raises AssertionError unless ``decoded`` has the largest elements of ``x``, as they are, and zeros."""
    # A stable sort puts the lower index first among equals.
    kept = x.abs().sort(descending=True, stable=True).indices[: codec.kept(x.numel())]
    if not torch.equal(decoded, torch.zeros_like(x).scatter(0, kept, x[kept])):
        raise AssertionError(f"{codec} of {x.dtype}: the decoded elements are not the largest")


def check_distance(codec: sr.PacketCodec, x: Tensor, decoded: Tensor) -> None:
    """Raises AssertionError if any element of ``decoded`` is further from ``x`` than the format allows."""
    group = codec.format.group
    part_numel = group * -(-CHECK_PART_NUMEL // group)
    for part, decoded_part in zip(x.split(part_numel), decoded.split(part_numel), strict=True):
        distance = (decoded_part.double() - part.double()).abs()
        if not bool((distance <= error_bound(codec, part)).all()):
            raise AssertionError(f"{codec} of {x.dtype}: a decoded element is further off than the format allows")
