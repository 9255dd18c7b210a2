"""Compressed collectives beside torch's own, in the manner of nccl-tests: a sweep over sizes, checked and timed.

    torchrun --nproc-per-node 2 benchmarks/collectives.py
    python benchmarks/slow_network.py --ranks 4 --rate 100mbit -- python benchmarks/collectives.py --min-bytes 64M

It runs on the CPU over gloo, with tensors of fp32. For each size, collective and codec it reports

time      of one call, from a barrier to the end of the slowest rank: median of ``--repeats``, and the spread from the
          tenth to the ninetieth percentile. torch's own collective takes turns with it, call by call.
algbw     bytes of the tensor over time (all_gather: of the gathered one; reduce_scatter: of the unreduced one)
busbw     algbw times the part of the tensor that every rank must send in a collective without compression:
          2 (W - 1) / W for all_reduce, (W - 1) / W for the others. Comparable with the speed of a link, which
          compression lets it exceed.
wire      payload that a rank sends in one call, counted at the process group (smallreduce.metrics); the most of all
ratio     torch's payload over that
error     norm of the difference from torch's fp32 result over the norm of that result, for normally distributed input
#wrong    elements, over all ranks, that are not what they must be: on inputs that the codec represents exactly, the
          exact result, and on normally distributed ones, bit for bit, what rank 0 has
speed-up  torch's time over ours
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import smallreduce as sr
from error_bounds import BLOCK, hadamard_matrix
from measurement import Spread, collective_seconds, interface_sent_nbytes, save, table
from smallreduce import metrics

CODECS = ("fp16", "int8", "int4", "int4-hadamard", "int2", "sign", "topk:0.001")
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")

# torch 2.13 has new names for these two.
torch_all_gather: Callable[..., object] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
torch_reduce_scatter: Callable[..., object] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class Row:
    """One line of the table; see the module's text. ``interface_nbytes`` is what the rank's network device sent in one
    call, all headers and acknowledgements included, under slow_network.py; elsewhere None."""

    collective: str
    codec: str
    nbytes: int
    world_size: int
    feedback: bool
    seconds: Spread
    algbw_gb_per_s: float
    busbw_gb_per_s: float
    wire_nbytes: int
    interface_nbytes: int | None
    ratio: float
    relative_error: float
    wrong: int
    torch_seconds: Spread
    torch_busbw_gb_per_s: float
    torch_wire_nbytes: int
    speedup: float
    target_speedup: float | None


def target_speedup(row_codec: str, collective: str, nbytes: int, world_size: int, ratio: float) -> float | None:
    """The speed-up that the design asks for (docs/benchmarks.md), or None."""
    if collective != "all_reduce":
        return None
    link_rate = os.environ.get("SLOW_NETWORK_RATE")
    if row_codec == "topk:0.001" and world_size == 4 and nbytes >= 64_000_000:
        return {"100mbit": 100.0, "1gbit": 15.0}.get(link_rate or "")
    if link_rate == "100mbit" and nbytes >= 64_000_000:
        return {"int4": 0.95 * ratio, "sign": 0.9 * ratio}.get(row_codec)
    if link_rate == "1gbit" and world_size == 2 and nbytes >= 64_000_000:
        return {"int4": 0.8 * ratio, "sign": 0.5 * ratio}.get(row_codec)
    if link_rate is None and world_size == 2 and nbytes >= 16_000_000:
        return {"int4": 1.5}.get(row_codec)
    return None


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"a size looks like 1000, 64K or 16M (powers of 1024), got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


class Case:
    """One collective on tensors of one size: ours with a codec, and torch's."""

    def __init__(self, collective: str, numel: int, codec: sr.PacketCodec, feedback: bool) -> None:
        self.collective, self.codec = collective, codec
        world_size = dist.get_world_size()
        self.numel = numel  # of the larger tensor
        self.shard_numel = numel // world_size
        self.input = torch.empty(self.shard_numel if collective == "all_gather" else numel)
        self.output = torch.empty(self.shard_numel if collective == "reduce_scatter" else numel)
        self.feedback = sr.ErrorFeedback() if feedback else None

    def ours(self, op: dist.ReduceOp.RedOpType = dist.ReduceOp.AVG) -> None:
        if self.collective == "all_reduce":
            sr.all_reduce(self.output, self.codec, op=op, feedback=self.feedback)
        elif self.collective == "reduce_scatter":
            sr.reduce_scatter(self.output, self.input, self.codec, op=op, feedback=self.feedback)
        else:
            sr.all_gather(self.output, self.input, self.codec)  # takes no feedback

    def torchs(self, output: Tensor) -> None:
        if self.collective == "all_reduce":
            dist.all_reduce(output)
        elif self.collective == "reduce_scatter":
            torch_reduce_scatter(output, self.input)
        else:
            torch_all_gather(output, self.input)

    def fill(self, values: Tensor) -> None:
        """Sets what the next call takes: the output itself for all_reduce, which works in place."""
        (self.output if self.collective == "all_reduce" else self.input).copy_(values)

    def forget(self) -> None:
        if self.feedback is not None:
            self.feedback.reset()


def exact_pattern(codec: sr.PacketCodec, numel: int) -> Tensor:
    """``numel`` values that the codec represents without error, as it does any one multiple of them all."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(codec, sr.TopK):
        # As few in any part as are kept of that part.
        pattern = torch.zeros(numel)
        pattern[:: math.ceil(1 / codec.ratio)] = 1.0
        return pattern
    if not isinstance(codec, sr.IntQuant):
        return torch.randint(0, 2, (numel,), generator=generator) * 2.0 - 1.0
    largest = 2 ** (codec.bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (numel,), generator=generator).float()
    codes[::BLOCK] = float(largest)  # in every group, however it is cut: the scale is then one level
    if codec.hadamard:
        # What the transform of 32 elements takes back to these codes.
        codes = (codes.view(-1, BLOCK) @ hadamard_matrix(codes.device).float()).flatten()
    return codes


def count_wrong_exact(case: Case) -> int:
    """Elements on this rank that differ from the exact result of an exactly representable input."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    amplitudes = [1.0 + r % 2 for r in range(world_size)]  # rank r sends the pattern times the r-th
    total = sum(amplitudes)
    scale_dtype = case.codec.dtype if isinstance(case.codec, sr.Cast) else torch.bfloat16
    if torch.tensor(total).to(scale_dtype).item() != total:
        raise ValueError(f"{case.codec} cannot represent {total:g}; use a world size that is a power of two")
    case.forget()
    pattern = exact_pattern(case.codec, case.input.numel())
    case.fill(pattern * amplitudes[rank])
    case.ours(dist.ReduceOp.SUM)
    case.forget()
    if case.collective == "all_gather":
        expected = torch.cat([pattern * amplitude for amplitude in amplitudes])
    elif case.collective == "reduce_scatter":
        expected = (pattern * total)[rank * case.shard_numel : (rank + 1) * case.shard_numel]
    else:
        expected = pattern * total
    # Of the two zeros either is exact.
    return int((case.output != expected).sum())


def random_error(case: Case) -> tuple[float, int]:
    """The relative error against torch over all ranks, and the elements that differ from rank 0's bits on this rank."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    values = torch.randn(case.input.numel(), generator=generator)
    case.fill(values)
    exact = case.output.clone()  # all_reduce works in place; the others overwrite it
    case.torchs(exact)
    case.forget()
    case.fill(values)
    case.ours(dist.ReduceOp.SUM)
    case.forget()
    squares = torch.stack([(case.output - exact).double().square().sum(), exact.double().square().sum()])
    dist.all_reduce(squares)
    differing = 0
    if case.collective != "reduce_scatter":  # whose outputs are different parts
        of_rank_0 = case.output.clone()
        dist.broadcast(of_rank_0, src=0)
        differing = int((of_rank_0.view(torch.int32) != case.output.view(torch.int32)).sum())
    return float((squares[0] / squares[1]).sqrt()), differing


def counted(call: Callable[[], object]) -> tuple[int, int | None]:
    """Payload, and bytes of the network device, that a rank sends in one call: the most of all ranks."""
    dist.barrier()
    metrics.reset()
    interface_before = interface_sent_nbytes()
    call()
    sent = metrics.bytes_sent()
    dist.barrier()  # nothing is under way any more when the device's counter is read
    interface_after = interface_sent_nbytes()
    most = torch.tensor([sent, 0], dtype=torch.int64)
    if interface_before is not None and interface_after is not None:
        most[1] = interface_after - interface_before
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most[0]), None if interface_before is None else int(most[1])


def measure(collective: str, codec: sr.PacketCodec, nbytes: int, feedback: bool, repeats: int) -> Row:
    """Checks and times one line of the table."""
    world_size = dist.get_world_size()
    case = Case(collective, nbytes // 4, codec, feedback)
    wrong = torch.tensor(count_wrong_exact(case))
    relative_error, differing = random_error(case)
    wrong += differing
    dist.all_reduce(wrong)

    # What all_reduce leaves is another input than the one that is asked about; of zeros torch makes nothing else.
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    zeros, values = torch.zeros_like(case.output), torch.randn(case.input.numel(), generator=generator)
    calls = {"ours": case.ours, "torch": lambda: case.torchs(zeros)}
    wire_nbytes, interface_nbytes = counted(calls["ours"])
    torch_wire_nbytes, _ = counted(calls["torch"])
    seconds = collective_seconds(calls, repeats, prepare=lambda: case.fill(values))
    ours, theirs = seconds["ours"], seconds["torch"]
    ratio = torch_wire_nbytes / wire_nbytes
    bus_factor = (2 if collective == "all_reduce" else 1) * (world_size - 1) / world_size
    return Row(
        collective=collective,
        codec=str(codec),
        nbytes=nbytes,
        world_size=world_size,
        feedback=feedback,
        seconds=ours,
        algbw_gb_per_s=nbytes / ours.median / 1e9,
        busbw_gb_per_s=nbytes * bus_factor / ours.median / 1e9,
        wire_nbytes=wire_nbytes,
        interface_nbytes=interface_nbytes,
        ratio=ratio,
        relative_error=relative_error,
        wrong=int(wrong),
        torch_seconds=theirs,
        torch_busbw_gb_per_s=nbytes * bus_factor / theirs.median / 1e9,
        torch_wire_nbytes=torch_wire_nbytes,
        speedup=theirs.median / ours.median,
        target_speedup=target_speedup(str(codec), collective, nbytes, world_size, ratio),
    )


def format_rows(rows: Sequence[Row]) -> str:
    header = [
        "bytes", "codec", "ms", "spread", "algbw", "busbw", "wire", "ratio", "error", "#wrong", "torch ms",
        "torch busbw", "speed-up", "of ratio", "target",
    ]  # fmt: skip
    cells = []
    for row in rows:
        met = row.target_speedup is None or row.speedup >= row.target_speedup
        wanted = "" if row.target_speedup is None else f"{row.target_speedup:.2f}" + ("" if met else " missed")
        cells.append(
            [
                str(row.nbytes), row.codec, f"{1e3 * row.seconds.median:.2f}",
                f"{1e3 * row.seconds.low:.2f}-{1e3 * row.seconds.high:.2f}", f"{row.algbw_gb_per_s:.3f}",
                f"{row.busbw_gb_per_s:.3f}", str(row.wire_nbytes), f"{row.ratio:.2f}", f"{row.relative_error:.1e}",
                str(row.wrong), f"{1e3 * row.torch_seconds.median:.2f}", f"{row.torch_busbw_gb_per_s:.3f}",
                f"{row.speedup:.2f}", f"{row.speedup / row.ratio:.2f}", wanted,
            ]
        )  # fmt: skip
    return table(header, cells)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--min-bytes", type=parse_bytes, default=parse_bytes("64K"), help="K, M, G: powers of 1024")
    parser.add_argument("--max-bytes", type=parse_bytes, default=parse_bytes("64M"))
    parser.add_argument("--factor", type=int, default=4, help="from one size to the next")
    parser.add_argument("--codecs", nargs="+", default=CODECS, metavar="CODEC")
    parser.add_argument("--collectives", nargs="+", default=COLLECTIVES, choices=COLLECTIVES)
    parser.add_argument("--feedback", action="store_true", help="with error feedback")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.max_bytes < args.min_bytes or args.factor < 2:
        parser.error("--max-bytes is at least --min-bytes, and --factor at least 2")
    return args


def main() -> None:
    args = parse_arguments()
    dist.init_process_group(metrics.register_counting_backend())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size < 2:
        raise SystemExit("start at least two ranks: torchrun --nproc-per-node 2 benchmarks/collectives.py")
    rows: list[Row] = []
    nbytes = args.min_bytes
    # Every shard a whole number of blocks.
    multiple = 4 * BLOCK * world_size
    while nbytes <= args.max_bytes:
        size = -(-nbytes // multiple) * multiple
        for collective in args.collectives:
            new_rows = []
            for spelling in args.codecs:
                codec = sr.codec(spelling)
                assert isinstance(codec, sr.PacketCodec), f"{spelling} makes no packets"
                new_rows.append(measure(collective, codec, size, args.feedback, args.repeats))
            rows += new_rows
            if rank == 0:
                print(f"{collective}, {world_size} ranks, GB/s\n{format_rows(new_rows)}\n", flush=True)
        nbytes *= args.factor
    if rank == 0:
        save(args.json, "collectives", rows)
    wrong = sum(row.wrong for row in rows)
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} elements are wrong")


if __name__ == "__main__":
    main()
